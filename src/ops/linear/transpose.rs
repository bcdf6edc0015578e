//! Copies that bring operands into the kernels' order.

/// `to[c * to_stride + r] = from[r * from_stride + c]` for `r < rows`, `c < cols`. Strides count floats.
///
/// # Safety
/// Both ranges are valid over those extents and do not overlap; nothing else writes them meanwhile.
pub(in crate::ops) unsafe fn transpose(
    from: *const f32,
    from_stride: usize,
    rows: usize,
    cols: usize,
    to: *mut f32,
    to_stride: usize,
) {
    let full = if cfg!(target_arch = "x86_64") && rows >= 4 { cols & !3 } else { 0 };
    // SAFETY: `r < rows` and `c < cols` throughout: the last block of four rows ends at `rows`.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        for c in (0..full).step_by(4) {
            let mut r = 0;
            while r < rows {
                // The last block overlaps the one before instead of going row by row.
                let at = r.min(rows - 4);
                four_by_four(from.add(at * from_stride + c), from_stride, to.add(c * to_stride + at), to_stride);
                r += 4;
            }
        }
        for c in full..cols {
            for r in 0..rows {
                *to.add(c * to_stride + r) = *from.add(r * from_stride + c);
            }
        }
    }
}

/// # Safety
/// As [`transpose`], with four rows and four columns.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn four_by_four(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
    use std::arch::x86_64::*;
    // SAFETY: by contract; SSE is part of x86-64.
    unsafe {
        let (mut a, mut b) = (_mm_loadu_ps(from), _mm_loadu_ps(from.add(from_stride)));
        let (mut c, mut d) = (_mm_loadu_ps(from.add(2 * from_stride)), _mm_loadu_ps(from.add(3 * from_stride)));
        _MM_TRANSPOSE4_PS(&mut a, &mut b, &mut c, &mut d);
        _mm_storeu_ps(to, a);
        _mm_storeu_ps(to.add(to_stride), b);
        _mm_storeu_ps(to.add(2 * to_stride), c);
        _mm_storeu_ps(to.add(3 * to_stride), d);
    }
}

/// Groups of columns that are copied together: the lines of a row lie side by side in memory, and it is read once.
pub(super) const ABREAST: usize = 4;

/// Calls `copy(group, from, steps)` so that all of `groups` advance together through `len` steps, a few at a time: few enough
/// for what they share of each row to stay in the first-level cache however far apart rows lie.
pub(super) fn gather_abreast(len: usize, groups: std::ops::Range<usize>, copy: impl Fn(usize, usize, usize)) {
    const STEPS: usize = 8;
    for t in (0..len).step_by(STEPS) {
        groups.clone().for_each(|g| copy(g, t, STEPS.min(len - t)));
    }
}

/// Copies `steps` rows of `width <= 16` floats, `from_stride` apart, to lie one after the other.
///
/// # Safety
/// Both ranges are valid over those extents and do not overlap; nothing else writes them meanwhile.
pub(super) unsafe fn gather_rows(from: *const f32, from_stride: usize, steps: usize, width: usize, to: *mut f32) {
    macro_rules! widths {
        ($($w:literal)*) => {
            match width {
                // A width known to the compiler makes this a few moves instead of a call per row.
                // SAFETY: by contract.
                $($w => for t in 0..steps {
                    unsafe { to.add(t * $w).cast::<[f32; $w]>().write(from.add(t * from_stride).cast::<[f32; $w]>().read()) }
                },)*
                _ => unreachable!("rows of {width} floats"),
            }
        };
    }
    widths!(1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16)
}
