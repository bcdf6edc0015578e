//! The tile kernels: `C[R, 16 P] (+)= X[len, R]^T W[len, 16 P]`, each output one accumulator over ascending `len`.
//!
//! Every instruction set does the same arithmetic: one fused multiply-add per output and step. Which of them runs
//! therefore never shows in a result.

use crate::ops::simd::Isa;

/// Outputs per panel of a packed weight: the lanes of one AVX-512 register, two of AVX2.
pub const PANEL: usize = 16;

/// Rows of the tallest tile of any instruction set.
pub(super) const MAX_ROWS: usize = 12;
/// How far ahead in a panel, in floats, memory is asked for more, into the second-level cache. With one row the reads
/// keep up by themselves; with 8 the product takes 14% less for it.
const AHEAD: usize = 64 * PANEL;
/// Panels of the widest tile of any instruction set.
pub(super) const MAX_PANELS: usize = 4;

impl Isa {
    /// Rows of the tallest tile. With two panels (AVX-512: 24 of 32 registers) or one (AVX2: 12 of 16) the accumulators
    /// fill the register file but for the operands.
    pub(super) fn max_rows(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => 12,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => 6,
            Isa::Portable => 4,
        }
    }

    /// How many panels a tile of `rows` rows is wide: enough accumulators in flight to cover the latency of the
    /// multiply-add (4 cycles), few enough to stay in registers. A power of two.
    pub(super) fn panels(self, rows: usize) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => match rows {
                1..=6 => 4,
                _ => 2,
            },
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => match rows {
                1 => 4,
                2 => 2,
                _ => 1,
            },
            Isa::Portable => 1,
        }
    }

    /// The kernel for a tile of `rows` rows and `panels` panels, a power of two not above [`Isa::panels`].
    pub(super) fn kernel(self, rows: usize, panels: usize) -> Kernel {
        macro_rules! table {
            ($f:ident: $(($r:literal, $p:literal))*) => {
                match (rows, panels) {
                    $(($r, $p) => $f::<$r, $p>,)*
                    _ => unreachable!("no tile of {rows} rows and {panels} panels"),
                }
            };
        }
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => table!(avx512:
                (1, 1) (2, 1) (3, 1) (4, 1) (5, 1) (6, 1) (7, 1) (8, 1) (9, 1) (10, 1) (11, 1) (12, 1)
                (1, 2) (2, 2) (3, 2) (4, 2) (5, 2) (6, 2) (7, 2) (8, 2) (9, 2) (10, 2) (11, 2) (12, 2)
                (1, 4) (2, 4) (3, 4) (4, 4) (5, 4) (6, 4)),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => table!(avx2:
                (1, 1) (2, 1) (3, 1) (4, 1) (5, 1) (6, 1) (1, 2) (2, 2) (1, 4)),
            Isa::Portable => table!(portable: (1, 1) (2, 1) (3, 1) (4, 1)),
        }
    }

    /// Adds what comes after a sum, and stores it.
    ///
    /// # Safety
    /// The pointers cover the extents or are null, and nothing else writes them meanwhile.
    pub(super) unsafe fn finish(self, f: &Finish) {
        // SAFETY: by contract; this machine has the instruction set.
        unsafe {
            match self {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 | Isa::Avx2 => finish_avx2(f),
                Isa::Portable => finish(f),
            }
        }
    }
}

/// The epilogue of one tile of finished sums: `y = (acc + bias) + residual`, leaving out what is null.
pub(super) struct Finish {
    /// `[rows, width]`.
    pub acc: *const f32,
    /// A multiple of 16.
    pub width: usize,
    pub rows: usize,
    /// Columns that exist in `y`: the last panel may have padded lanes.
    pub cols: usize,
    pub y: *mut f32,
    /// Floats from one row of `y`, and of `residual`, to the next.
    pub stride: usize,
    pub bias: *const f32,
    /// May be `y`.
    pub residual: *const f32,
}

#[inline(always)]
unsafe fn finish(f: &Finish) {
    // SAFETY: the caller's.
    unsafe {
        match (f.bias.is_null(), f.residual.is_null()) {
            (true, true) => finish_with::<false, false>(f),
            (false, true) => finish_with::<true, false>(f),
            (true, false) => finish_with::<false, true>(f),
            (false, false) => finish_with::<true, true>(f),
        }
    }
}

#[inline(always)]
unsafe fn finish_with<const BIAS: bool, const RESIDUAL: bool>(f: &Finish) {
    let add = |acc: f32, j: usize, at: usize| {
        // SAFETY: `j` is a column of `bias`, `at` a place in `residual`, where they are given.
        unsafe {
            let acc = if BIAS { acc + *f.bias.add(j) } else { acc };
            if RESIDUAL { acc + *f.residual.add(at) } else { acc }
        }
    };
    for j in (0..f.cols).step_by(PANEL) {
        for r in 0..f.rows {
            // SAFETY: row `r` and columns from `j` of `acc`, which has padded lanes, and of `y`.
            unsafe {
                let (acc, at) = (f.acc.add(r * f.width + j), r * f.stride + j);
                if f.cols - j >= PANEL {
                    // A length that the compiler knows: a few vector moves.
                    let acc = acc.cast::<[f32; PANEL]>().read();
                    f.y.add(at).cast::<[f32; PANEL]>().write(std::array::from_fn(|l| add(acc[l], j + l, at + l)));
                } else {
                    (0..f.cols - j).for_each(|l| *f.y.add(at + l) = add(*acc.add(l), j + l, at + l));
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn finish_avx2(f: &Finish) {
    // SAFETY: the caller's.
    unsafe { finish(f) }
}

/// The operands of one tile. Strides count floats.
pub(super) struct Tile {
    /// `[len][R]`.
    pub x: *const f32,
    /// `P` panels of `[len][16]`.
    pub w: *const f32,
    /// From one panel of `w` to the next.
    pub w_panel: usize,
    /// Length of the sum.
    pub len: usize,
    /// `R` rows of `P` panels of 16 lanes.
    pub c: *mut f32,
    /// From one row of `c` to the next.
    pub c_row: usize,
    /// From one panel of `c` to the next.
    pub c_panel: usize,
    /// Whether the accumulators start from what `c` holds, or from zero.
    pub load: bool,
}

/// Computes a [`Tile`].
///
/// # Safety
/// The pointers cover the tile's extents, nothing else writes them meanwhile, and the machine has the instruction set
/// that [`Isa::kernel`] was asked for.
pub(super) type Kernel = unsafe fn(&Tile);

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
#[allow(clippy::needless_range_loop)] // registers are named by row and panel
unsafe fn avx512<const R: usize, const P: usize>(t: &Tile) {
    use std::arch::x86_64::*;
    let mut acc = [[_mm512_setzero_ps(); P]; R];
    let (mut x, mut w) = (t.x, t.w);
    // SAFETY: within the tile's extents, by the contract of `Kernel`.
    unsafe {
        if t.load {
            for r in 0..R {
                for p in 0..P {
                    acc[r][p] = _mm512_loadu_ps(t.c.add(r * t.c_row + p * t.c_panel));
                }
            }
        }
        for _ in 0..t.len {
            let mut lanes = [_mm512_setzero_ps(); P];
            for p in 0..P {
                lanes[p] = _mm512_loadu_ps(w.add(p * t.w_panel));
                if R > 1 {
                    _mm_prefetch::<_MM_HINT_T1>(w.wrapping_add(p * t.w_panel + AHEAD).cast());
                }
            }
            for r in 0..R {
                let v = _mm512_set1_ps(*x.add(r));
                for p in 0..P {
                    acc[r][p] = _mm512_fmadd_ps(v, lanes[p], acc[r][p]);
                }
            }
            x = x.add(R);
            w = w.add(PANEL);
        }
        for r in 0..R {
            for p in 0..P {
                _mm512_storeu_ps(t.c.add(r * t.c_row + p * t.c_panel), acc[r][p]);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
#[allow(clippy::needless_range_loop)] // as above
unsafe fn avx2<const R: usize, const P: usize>(t: &Tile) {
    use std::arch::x86_64::*;
    let mut acc = [[[_mm256_setzero_ps(); 2]; P]; R];
    let (mut x, mut w) = (t.x, t.w);
    // SAFETY: within the tile's extents, by the contract of `Kernel`.
    unsafe {
        if t.load {
            for r in 0..R {
                for p in 0..P {
                    for h in 0..2 {
                        acc[r][p][h] = _mm256_loadu_ps(t.c.add(r * t.c_row + p * t.c_panel + 8 * h));
                    }
                }
            }
        }
        for _ in 0..t.len {
            let mut lanes = [[_mm256_setzero_ps(); 2]; P];
            for p in 0..P {
                for h in 0..2 {
                    lanes[p][h] = _mm256_loadu_ps(w.add(p * t.w_panel + 8 * h));
                }
                if R > 1 {
                    _mm_prefetch::<_MM_HINT_T1>(w.wrapping_add(p * t.w_panel + AHEAD).cast());
                }
            }
            for r in 0..R {
                let v = _mm256_set1_ps(*x.add(r));
                for p in 0..P {
                    for h in 0..2 {
                        acc[r][p][h] = _mm256_fmadd_ps(v, lanes[p][h], acc[r][p][h]);
                    }
                }
            }
            x = x.add(R);
            w = w.add(PANEL);
        }
        for r in 0..R {
            for p in 0..P {
                for h in 0..2 {
                    _mm256_storeu_ps(t.c.add(r * t.c_row + p * t.c_panel + 8 * h), acc[r][p][h]);
                }
            }
        }
    }
}

/// For machines without the above: exact on any (a fused multiply-add, in software where there is no instruction).
#[allow(clippy::needless_range_loop)] // as above
unsafe fn portable<const R: usize, const P: usize>(t: &Tile) {
    let mut acc = [[[0f32; PANEL]; P]; R];
    // SAFETY: within the tile's extents, by the contract of `Kernel`.
    unsafe {
        for r in 0..R {
            for p in 0..P {
                let c = t.c.add(r * t.c_row + p * t.c_panel);
                if t.load {
                    acc[r][p].copy_from_slice(std::slice::from_raw_parts(c, PANEL));
                }
            }
        }
        for i in 0..t.len {
            for p in 0..P {
                let lanes = std::slice::from_raw_parts(t.w.add(p * t.w_panel + i * PANEL), PANEL);
                for r in 0..R {
                    let v = *t.x.add(i * R + r);
                    for l in 0..PANEL {
                        acc[r][p][l] = v.mul_add(lanes[l], acc[r][p][l]);
                    }
                }
            }
        }
        for r in 0..R {
            for p in 0..P {
                let c = t.c.add(r * t.c_row + p * t.c_panel);
                std::slice::from_raw_parts_mut(c, PANEL).copy_from_slice(&acc[r][p]);
            }
        }
    }
}
