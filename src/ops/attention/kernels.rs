//! The inner loops: one matrix product, the softmax of a cut, and the row updates, per instruction set.
//!
//! Everything above works in tiles of rows (a row is one query of one head) against one cut of keys, in buffers whose
//! rows are padded to whole vectors. The functions here are compiled once for each instruction set and reached through
//! a table, so that the code above is written once.

use super::vector::{LANES, Portable, Simd, exp2, prefetch};
use std::sync::OnceLock;

/// `C (+)= A B`, with A read by broadcast and B and C in vectors of columns.
///
/// Each `C[i][j]` is one chain of fused multiply-adds over ascending k that starts from zero; `accumulate` adds the
/// finished chain to what is there.
pub(super) struct Product {
    /// `A[i][k] = a[i * a_row + k * a_col]`.
    pub a: *const f32,
    pub a_row: usize,
    pub a_col: usize,
    /// Rows of A and C.
    pub m: usize,
    /// B in blocks of `block` rows of `b_row` floats: `B[k] = b[k / block] + (k % block) * b_row`.
    pub b: *const *const f32,
    pub block: usize,
    pub b_row: usize,
    /// What is read after the last block: fetched into the cache meanwhile. May be null.
    pub next: *const f32,
    /// Length of the chains. With `limits`, row i needs only `limits[i] <= k` steps: later ones would multiply by zero.
    pub k: usize,
    /// Ascending, `m` of them, or null.
    pub limits: *const u32,
    pub c: *mut f32,
    pub c_row: usize,
    /// Columns, a multiple of 16.
    pub n: usize,
    pub accumulate: bool,
}

/// The scale of scores in the exponent: `p = 2^(score * factor - max * factor)`, with `factor = scale * log2(e)`.
#[derive(Clone, Copy)]
pub(super) struct Exponent {
    factor: f32,
}

impl Exponent {
    /// For scores multiplied by `scale`.
    pub(super) fn new(scale: f32) -> Exponent {
        Exponent { factor: (f64::from(scale) * std::f64::consts::LOG2_E) as f32 }
    }
}

/// The inner loops of one instruction set.
pub(super) struct Kernels {
    pub product: unsafe fn(&Product),
    /// `softmax_cut(row, valid, padded, exponent) -> (max, sum)`: turns the first `valid` scores of a row into
    /// `2^(score*factor - max)`, where `max` is the largest `score*factor`, and zeroes up to `padded`.
    pub softmax_cut: unsafe fn(*mut f32, usize, usize, Exponent) -> (f32, f32),
    /// `combine(out, cut, width, keep, take)`: `out = out * keep + cut * take`.
    pub combine: unsafe fn(*mut f32, *const f32, usize, f32, f32),
    /// `softmax_backward(p, dp, valid, padded, exponent, lse, delta, scale)`: scores in `p` become probabilities and
    /// their gradients in `dp` become those of the unscaled scores, `p * (dp - delta) * scale`; zero past `valid`.
    pub softmax_backward: unsafe fn(*mut f32, *mut f32, usize, usize, Exponent, f32, f32, f32),
    /// `dot(a, b, width)` in sixteen lanes.
    pub dot: unsafe fn(*const f32, *const f32, usize) -> f32,
    /// `2^x`.
    pub exp2: unsafe fn(f32) -> f32,
}

/// # Safety
/// The processor has `S`; all of A, B and C that the shape reaches is there.
#[inline(always)]
unsafe fn tile<S: Simd, const M: usize, const N: usize>(p: &Product, i: usize, j: usize, k: usize) {
    // SAFETY: by contract.
    unsafe {
        let mut acc = [[S::splat(0.0); N]; M];
        let mut a = p.a.add(i * p.a_row);
        let (mut left, mut blocks) = (k, p.b);
        while left > 0 {
            let mut b = (*blocks).add(j);
            let steps = left.min(p.block);
            // Pages lie anywhere in memory: without this each would begin with a wait.
            let mut ahead = if left > steps { *blocks.add(1) } else { p.next }.wrapping_add(j);
            for _ in 0..steps {
                let mut row = [S::splat(0.0); N];
                for (n, v) in row.iter_mut().enumerate() {
                    *v = S::load(b.add(n * LANES));
                    prefetch(ahead.wrapping_add(n * LANES));
                }
                for (m, acc) in acc.iter_mut().enumerate() {
                    let x = S::splat(*a.add(m * p.a_row));
                    for (acc, v) in acc.iter_mut().zip(row) {
                        *acc = S::fma(x, v, *acc);
                    }
                }
                b = b.add(p.b_row);
                ahead = ahead.wrapping_add(p.b_row);
                a = a.add(p.a_col);
            }
            left -= steps;
            blocks = blocks.add(1);
        }
        for (m, acc) in acc.iter().enumerate() {
            for (n, &v) in acc.iter().enumerate() {
                let c = p.c.add((i + m) * p.c_row + j + n * LANES);
                S::store(c, if p.accumulate { S::add(S::load(c), v) } else { v });
            }
        }
    }
}

/// # Safety
/// As [`tile`].
#[inline(always)]
unsafe fn columns<S: Simd, const N: usize>(p: &Product, j: usize) {
    let mut i = 0;
    while i < p.m {
        let left = p.m - i;
        let most = if N > 2 { 4 } else { S::TILE.0 };
        let rows = [12, 8, 6, 4, 2].into_iter().find(|&r| r <= left && r <= most).unwrap_or(1);
        // SAFETY: by contract; `limits` has `m` entries.
        unsafe {
            // The last row of the tile needs the most keys; for the others the rest is multiplied by zero.
            let k = if p.limits.is_null() { p.k } else { *p.limits.add(i + rows - 1) as usize };
            match rows {
                12 if S::TILE.0 >= 12 && N <= 2 => tile::<S, 12, N>(p, i, j, k),
                8 if S::TILE.0 >= 8 && N <= 2 => tile::<S, 8, N>(p, i, j, k),
                6 if N <= 2 => tile::<S, 6, N>(p, i, j, k),
                4 => tile::<S, 4, N>(p, i, j, k),
                2 => tile::<S, 2, N>(p, i, j, k),
                _ => tile::<S, 1, N>(p, i, j, k),
            }
        }
        i += rows;
    }
}

/// # Safety
/// As [`tile`].
#[inline(always)]
unsafe fn product<S: Simd>(p: &Product) {
    let mut j = 0;
    while j < p.n {
        // SAFETY: by contract.
        unsafe {
            if S::TILE.1 == 2 && p.m <= 4 && p.n - j >= 4 * LANES {
                // One pass over whole rows of B, and enough accumulators for the latency of the multiply-add.
                columns::<S, 4>(p, j);
                j += 4 * LANES;
            } else if S::TILE.1 == 2 && p.n - j >= 2 * LANES {
                columns::<S, 2>(p, j);
                j += 2 * LANES;
            } else {
                columns::<S, 1>(p, j);
                j += LANES;
            }
        }
    }
}

/// # Safety
/// The processor has `S`; `row` has `padded` floats, a multiple of 16, and `0 < valid <= padded`.
#[inline(always)]
unsafe fn softmax_cut<S: Simd>(row: *mut f32, valid: usize, padded: usize, e: Exponent) -> (f32, f32) {
    let (whole, rest) = (valid / LANES * LANES, valid % LANES);
    // SAFETY: by contract.
    unsafe {
        let none = S::splat(f32::NEG_INFINITY);
        let mut max = none;
        for j in (0..whole).step_by(LANES) {
            max = S::max(max, S::load(row.add(j)));
        }
        if rest > 0 {
            max = S::max(max, S::first(rest, S::load(row.add(whole)), none));
        }
        let max = S::largest(max) * e.factor;
        let (factor, shift, zero) = (S::splat(e.factor), S::splat(-max), S::splat(0.0));
        let mut sum = zero;
        for j in (0..whole).step_by(LANES) {
            let p = exp2::<S>(S::fma(S::load(row.add(j)), factor, shift));
            S::store(row.add(j), p);
            sum = S::add(sum, p);
        }
        let mut j = whole;
        if rest > 0 {
            let p = exp2::<S>(S::fma(S::load(row.add(j)), factor, shift));
            let p = S::first(rest, p, zero);
            S::store(row.add(j), p);
            sum = S::add(sum, p);
            j += LANES;
        }
        while j < padded {
            S::store(row.add(j), zero);
            j += LANES;
        }
        (max, S::sum(sum))
    }
}

/// # Safety
/// The processor has `S`; both rows have `width` floats, a multiple of 16.
#[inline(always)]
unsafe fn combine<S: Simd>(out: *mut f32, cut: *const f32, width: usize, keep: f32, take: f32) {
    // SAFETY: by contract.
    unsafe {
        let (keep, take) = (S::splat(keep), S::splat(take));
        for j in (0..width).step_by(LANES) {
            let o = S::mul(S::load(out.add(j)), keep);
            S::store(out.add(j), S::fma(S::load(cut.add(j)), take, o));
        }
    }
}

/// # Safety
/// As [`softmax_cut`], for both rows; `valid` may be zero.
#[inline(always)]
unsafe fn softmax_backward<S: Simd>(
    p: *mut f32,
    dp: *mut f32,
    valid: usize,
    padded: usize,
    e: Exponent,
    lse: f32,
    delta: f32,
    scale: f32,
) {
    // SAFETY: by contract.
    unsafe {
        let (factor, shift, zero) = (S::splat(e.factor), S::splat(-lse * std::f32::consts::LOG2_E), S::splat(0.0));
        let (delta, scale) = (S::splat(delta), S::splat(scale));
        let mut j = 0;
        while j < padded {
            if j < valid {
                let left = valid - j;
                let prob = exp2::<S>(S::fma(S::load(p.add(j)), factor, shift));
                let ds = S::mul(S::mul(prob, S::sub(S::load(dp.add(j)), delta)), scale);
                S::store(p.add(j), if left >= LANES { prob } else { S::first(left, prob, zero) });
                S::store(dp.add(j), if left >= LANES { ds } else { S::first(left, ds, zero) });
            } else {
                S::store(p.add(j), zero);
                S::store(dp.add(j), zero);
            }
            j += LANES;
        }
    }
}

/// # Safety
/// As [`combine`].
#[inline(always)]
unsafe fn dot<S: Simd>(a: *const f32, b: *const f32, width: usize) -> f32 {
    // SAFETY: by contract.
    unsafe {
        let mut sum = S::splat(0.0);
        for j in (0..width).step_by(LANES) {
            sum = S::fma(S::load(a.add(j)), S::load(b.add(j)), sum);
        }
        S::sum(sum)
    }
}

/// The table of one instruction set.
macro_rules! table {
    ($name:ident, $simd:ty $(, $features:literal)?) => {{
        $(#[target_feature(enable = $features)])?
        unsafe fn product_(p: &Product) {
            // SAFETY: by contract.
            unsafe { product::<$simd>(p) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn softmax_cut_(row: *mut f32, valid: usize, padded: usize, e: Exponent) -> (f32, f32) {
            // SAFETY: by contract.
            unsafe { softmax_cut::<$simd>(row, valid, padded, e) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn combine_(out: *mut f32, cut: *const f32, width: usize, keep: f32, take: f32) {
            // SAFETY: by contract.
            unsafe { combine::<$simd>(out, cut, width, keep, take) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn softmax_backward_(
            p: *mut f32,
            dp: *mut f32,
            valid: usize,
            padded: usize,
            e: Exponent,
            lse: f32,
            delta: f32,
            scale: f32,
        ) {
            // SAFETY: by contract.
            unsafe { softmax_backward::<$simd>(p, dp, valid, padded, e, lse, delta, scale) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn dot_(a: *const f32, b: *const f32, width: usize) -> f32 {
            // SAFETY: by contract.
            unsafe { dot::<$simd>(a, b, width) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn exp2_(x: f32) -> f32 {
            // SAFETY: by contract.
            unsafe { <$simd>::largest(exp2::<$simd>(<$simd>::splat(x))) }
        }
        static $name: Kernels = Kernels {
            product: product_,
            softmax_cut: softmax_cut_,
            combine: combine_,
            softmax_backward: softmax_backward_,
            dot: dot_,
            exp2: exp2_,
        };
        &$name
    }};
}

/// Every table that this processor can run, the fastest first.
pub(super) fn available() -> &'static [&'static Kernels] {
    static TABLES: OnceLock<Vec<&'static Kernels>> = OnceLock::new();
    TABLES.get_or_init(|| {
        let mut t: Vec<&'static Kernels> = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            use super::vector::{Avx2, Avx512};
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512dq") {
                t.push(table!(AVX512, Avx512, "avx512f,avx512dq,avx2,fma"));
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                t.push(table!(AVX2, Avx2, "avx2,fma"));
            }
        }
        t.push(table!(PORTABLE, Portable));
        t
    })
}

/// The fastest table that this processor can run.
pub(super) fn best() -> &'static Kernels {
    available()[0]
}
