//! Sixteen-lane vectors, the same to the bit on AVX-512, AVX2 and plain Rust.
//!
//! Whatever the register width, a vector here is sixteen f32: one AVX-512 register, two AVX2 registers, or an array.
//! Sums over lanes are folded 8, 4, 2, 1 everywhere, and every multiply-add is fused, so that a result does not depend
//! on the instruction set that computed it.

/// Lanes of a vector.
pub(super) const LANES: usize = 16;

/// One instruction set's sixteen-lane vector, and the register tile that fits it.
///
/// # Safety
/// Every function requires that the processor has the instruction set; `load` and `store` that 16 floats are there.
pub(super) trait Simd {
    /// Sixteen f32.
    type V: Copy;
    /// Rows and vectors of the largest register tile (accumulators + one row of B + one broadcast).
    const TILE: (usize, usize);
    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    /// `a * b + c`, rounded once.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// The larger; `b` where either is NaN.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// To the nearest integer, ties to even.
    unsafe fn round(a: Self::V) -> Self::V;
    /// `p * 2^n` for integral `n` in [-126, 127].
    unsafe fn scale(p: Self::V, n: Self::V) -> Self::V;
    /// Zero where `x < limit`, else `v`.
    unsafe fn zero_below(v: Self::V, x: Self::V, limit: f32) -> Self::V;
    /// The first `n` lanes of `v`, then `other`. A selection, not arithmetic: NaN in the lanes left out is gone.
    unsafe fn first(n: usize, v: Self::V, other: Self::V) -> Self::V;
    unsafe fn sum(a: Self::V) -> f32;
    unsafe fn largest(a: Self::V) -> f32;
}

/// Asks for the cache line at `p`, which may be any address at all, in the second-level cache: a request for the first
/// level holds one of the few places for its misses until memory answers (measured: 22 GB/s of pages, and 37 with this).
#[inline(always)]
pub(super) fn prefetch(p: *const f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, which never faults.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// `2^x` to 1 ulp; 0 below `2^-126` (there are no denormal results), NaN for NaN. For `x < 128`.
///
/// `2^x = 2^n * (1 + f q(f))` with `n` the nearest integer and `|f| <= 1/2`: the product with `2^n` is exact, and
/// `2^0 = 1` exactly. `q` is the minimax polynomial of the relative error (4.7e-11 before rounding).
#[inline(always)]
pub(super) unsafe fn exp2<S: Simd>(x: S::V) -> S::V {
    const Q: [f32; 7] = [
        std::f32::consts::LN_2,
        0.240_226_5,
        0.055_504_102,
        0.009_618_038,
        0.001_333_393_5,
        0.000_154_667_56,
        0.000_015_196_156,
    ];
    // SAFETY: the caller has the instruction set.
    unsafe {
        // The clamp comes first in `max`, so that a NaN survives it.
        let c = S::max(S::splat(-126.0), x);
        let n = S::round(c);
        let f = S::sub(c, n);
        let mut q = S::splat(Q[6]);
        for &k in Q[..6].iter().rev() {
            q = S::fma(q, f, S::splat(k));
        }
        S::zero_below(S::scale(S::fma(q, f, S::splat(1.0)), n), x, -126.0)
    }
}

/// Plain Rust.
pub(super) struct Portable;

impl Portable {
    #[inline(always)]
    fn map(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
        std::array::from_fn(|i| f(a[i], b[i]))
    }
    #[inline(always)]
    fn fold(a: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
        let mut a = a;
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                a[i] = f(a[i], a[i + half]);
            }
        }
        a[0]
    }
}

impl Simd for Portable {
    type V = [f32; LANES];
    const TILE: (usize, usize) = (4, 1);
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        // SAFETY: by the trait's contract.
        unsafe { p.cast::<Self::V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        // SAFETY: by the trait's contract.
        unsafe { p.cast::<Self::V>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        Self::map(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        Self::map(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        Self::map(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        Self::map(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn round(a: Self::V) -> Self::V {
        a.map(f32::round_ties_even)
    }
    #[inline(always)]
    unsafe fn scale(p: Self::V, n: Self::V) -> Self::V {
        Self::map(p, n, |p, n| p * f32::from_bits((n as i32).wrapping_add(127).wrapping_shl(23) as u32))
    }
    #[inline(always)]
    unsafe fn zero_below(v: Self::V, x: Self::V, limit: f32) -> Self::V {
        Self::map(v, x, |v, x| if x < limit { 0.0 } else { v })
    }
    #[inline(always)]
    unsafe fn first(n: usize, v: Self::V, other: Self::V) -> Self::V {
        std::array::from_fn(|i| if i < n { v[i] } else { other[i] })
    }
    #[inline(always)]
    unsafe fn sum(a: Self::V) -> f32 {
        Self::fold(a, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn largest(a: Self::V) -> f32 {
        Self::fold(a, |a, b| if a > b { a } else { b })
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Simd;
    use std::arch::x86_64::*;

    #[inline(always)]
    unsafe fn sum8(a: __m256) -> f32 {
        // SAFETY: register arithmetic; the caller has AVX2.
        unsafe {
            let b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
            let c = _mm_add_ps(b, _mm_movehl_ps(b, b));
            _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)))
        }
    }
    #[inline(always)]
    unsafe fn largest8(a: __m256) -> f32 {
        // SAFETY: register arithmetic; the caller has AVX2.
        unsafe {
            let b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
            let c = _mm_max_ps(b, _mm_movehl_ps(b, b));
            _mm_cvtss_f32(_mm_max_ss(c, _mm_shuffle_ps(c, c, 1)))
        }
    }

    /// AVX2 and FMA: two registers a vector.
    pub(in super::super) struct Avx2;

    const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

    /// An operation on both halves.
    macro_rules! both {
        ($f:expr) => {{
            // SAFETY: register arithmetic; the caller has AVX2 and FMA.
            unsafe { ($f(0usize), $f(1usize)) }
        }};
    }

    #[inline(always)]
    fn half(v: (__m256, __m256), i: usize) -> __m256 {
        if i == 0 { v.0 } else { v.1 }
    }

    impl Simd for Avx2 {
        type V = (__m256, __m256);
        const TILE: (usize, usize) = (6, 1);
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self::V {
            both!(|_: usize| _mm256_set1_ps(x))
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self::V {
            both!(|i: usize| _mm256_loadu_ps(p.add(8 * i)))
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: Self::V) {
            // SAFETY: by the trait's contract.
            unsafe {
                _mm256_storeu_ps(p, v.0);
                _mm256_storeu_ps(p.add(8), v.1);
            }
        }
        #[inline(always)]
        unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            both!(|i: usize| _mm256_fmadd_ps(half(a, i), half(b, i), half(c, i)))
        }
        #[inline(always)]
        unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
            both!(|i: usize| _mm256_add_ps(half(a, i), half(b, i)))
        }
        #[inline(always)]
        unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
            both!(|i: usize| _mm256_sub_ps(half(a, i), half(b, i)))
        }
        #[inline(always)]
        unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
            both!(|i: usize| _mm256_mul_ps(half(a, i), half(b, i)))
        }
        #[inline(always)]
        unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
            both!(|i: usize| _mm256_max_ps(half(a, i), half(b, i)))
        }
        #[inline(always)]
        unsafe fn round(a: Self::V) -> Self::V {
            both!(|i: usize| _mm256_round_ps(half(a, i), NEAREST))
        }
        #[inline(always)]
        unsafe fn scale(p: Self::V, n: Self::V) -> Self::V {
            both!(|i: usize| {
                let e = _mm256_add_epi32(_mm256_cvtps_epi32(half(n, i)), _mm256_set1_epi32(127));
                _mm256_mul_ps(half(p, i), _mm256_castsi256_ps(_mm256_slli_epi32(e, 23)))
            })
        }
        #[inline(always)]
        unsafe fn zero_below(v: Self::V, x: Self::V, limit: f32) -> Self::V {
            both!(|i: usize| _mm256_andnot_ps(_mm256_cmp_ps(half(x, i), _mm256_set1_ps(limit), _CMP_LT_OQ), half(v, i)))
        }
        #[inline(always)]
        unsafe fn first(n: usize, v: Self::V, other: Self::V) -> Self::V {
            both!(|i: usize| {
                let lane = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(8 * i as i32));
                let keep = _mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), lane);
                _mm256_blendv_ps(half(other, i), half(v, i), _mm256_castsi256_ps(keep))
            })
        }
        #[inline(always)]
        unsafe fn sum(a: Self::V) -> f32 {
            // SAFETY: register arithmetic.
            unsafe { sum8(_mm256_add_ps(a.0, a.1)) }
        }
        #[inline(always)]
        unsafe fn largest(a: Self::V) -> f32 {
            // SAFETY: register arithmetic.
            unsafe { largest8(_mm256_max_ps(a.0, a.1)) }
        }
    }

    /// AVX-512 (F and DQ): one register a vector.
    pub(in super::super) struct Avx512;

    impl Simd for Avx512 {
        type V = __m512;
        const TILE: (usize, usize) = (12, 2);
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self::V {
            // SAFETY: register arithmetic.
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self::V {
            // SAFETY: by the trait's contract.
            unsafe { _mm512_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: Self::V) {
            // SAFETY: by the trait's contract.
            unsafe { _mm512_storeu_ps(p, v) }
        }
        #[inline(always)]
        unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            // SAFETY: register arithmetic.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: register arithmetic.
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: register arithmetic.
            unsafe { _mm512_sub_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: register arithmetic.
            unsafe { _mm512_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: register arithmetic.
            unsafe { _mm512_max_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn round(a: Self::V) -> Self::V {
            // SAFETY: register arithmetic.
            unsafe { _mm512_roundscale_ps(a, NEAREST) }
        }
        #[inline(always)]
        unsafe fn scale(p: Self::V, n: Self::V) -> Self::V {
            // SAFETY: register arithmetic.
            unsafe {
                let e = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
                _mm512_mul_ps(p, _mm512_castsi512_ps(_mm512_slli_epi32(e, 23)))
            }
        }
        #[inline(always)]
        unsafe fn zero_below(v: Self::V, x: Self::V, limit: f32) -> Self::V {
            // SAFETY: register arithmetic.
            unsafe { _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_NLT_UQ), v) }
        }
        #[inline(always)]
        unsafe fn first(n: usize, v: Self::V, other: Self::V) -> Self::V {
            let keep = if n >= 16 { !0 } else { (1u16 << n) - 1 };
            // SAFETY: register arithmetic.
            unsafe { _mm512_mask_mov_ps(other, keep, v) }
        }
        #[inline(always)]
        unsafe fn sum(a: Self::V) -> f32 {
            // SAFETY: register arithmetic.
            unsafe { sum8(_mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1))) }
        }
        #[inline(always)]
        unsafe fn largest(a: Self::V) -> f32 {
            // SAFETY: register arithmetic.
            unsafe { largest8(_mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1))) }
        }
    }
}
