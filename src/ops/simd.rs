//! What the row-wise ops share: one body compiled for several instruction sets, `exp` and `erf` that vectorise, and
//! sums in a fixed order.
//!
//! A body is written once over scalars and arrays of [`LANES`], generic over `const FMA: bool`, and [`multiversion!`]
//! compiles it again with AVX-512, and with AVX2 and FMA; the compiler turns its loops into vector code. Every element, in
//! the body of a loop or in its tail, goes through the same arithmetic, so results don't depend on where a slice is cut nor
//! on the width of a register.

/// Width of the arrays that loops are written over: two AVX2 registers, one of AVX-512.
pub(crate) const LANES: usize = 16;

/// What to compute with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Isa {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

impl Isa {
    /// The best that this machine has. The standard library caches the detection.
    #[inline]
    pub fn detect() -> Isa {
        #[cfg(test)]
        if let Some(isa) = super::testing::ISA.get() {
            return isa;
        }
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                return Isa::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Isa::Avx2;
            }
        }
        Isa::Portable
    }

    /// All that this machine has, for tests that compare them.
    #[cfg(test)]
    pub fn available() -> Vec<Isa> {
        let mut all = vec![Isa::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                all.push(Isa::Avx2);
            }
            if is_x86_feature_detected!("avx512f") {
                all.push(Isa::Avx512);
            }
        }
        all
    }
}

/// Declares `$name`, which runs `$generic::<FMA>` compiled for the best instruction set that this machine has.
/// `$generic` is an `#[inline(always)]` function with a `const FMA: bool` parameter.
macro_rules! multiversion {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $generic:ident) => {
        $crate::ops::simd::multiversion!(
            $(#[$meta])* $vis fn $name($($arg: $ty),*) $(-> $ret)? = $generic, "avx512f"
        );
    };
    // With the features that are used where there is AVX-512.
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $generic:ident,
        $widest:literal) => {
        $(#[$meta])*
        #[inline]
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                use $crate::ops::simd::Isa;
                #[target_feature(enable = $widest)]
                fn widest($($arg: $ty),*) $(-> $ret)? {
                    $generic::<true>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    $generic::<true>($($arg),*)
                }
                match Isa::detect() {
                    // SAFETY: the features are there.
                    Isa::Avx512 => return unsafe { widest($($arg),*) },
                    // SAFETY: as above.
                    Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    Isa::Portable => {}
                }
            }
            $generic::<{ cfg!(target_arch = "aarch64") }>($($arg),*)
        }
    };
}
pub(crate) use multiversion;

/// `a * b + c`, fused where the instruction exists (elsewhere a fused result would be a call into libm).
#[inline(always)]
pub(crate) fn madd<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// `e^x` within 2 units in the last place. Zero below -87.33 (no subnormal results), infinite above 88.37, NaN for NaN.
///
/// x = n ln 2 + r with |r| <= ln 2 / 2, and e^r = 1 + r + r^2 q(r), q a minimax polynomial of degree 4.
#[inline(always)]
pub(crate) fn exp<const FMA: bool>(x: f32) -> f32 {
    /// 1.5 * 2^23: adding it rounds to an integer and leaves that integer in the low bits.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts; n * LN2_HI is exact for |n| <= 128.
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    let t = madd::<FMA>(x, std::f32::consts::LOG2_E, ROUND);
    let n = t - ROUND;
    let r = madd::<FMA>(n, -LN2_LO, madd::<FMA>(n, -LN2_HI, x));
    let mut q = 0.001_395_049;
    q = madd::<FMA>(q, r, 0.008_368_89);
    q = madd::<FMA>(q, r, 0.041_666_206);
    q = madd::<FMA>(q, r, 0.166_665_18);
    q = madd::<FMA>(q, r, 0.5);
    let p = madd::<FMA>(madd::<FMA>(q, r, 1.0), r, 1.0);
    // 2^n by way of the exponent field: the bits of ROUND above the low nine are shifted out.
    let y = p * f32::from_bits(t.to_bits().wrapping_add(127) << 23);
    let y = if x < -87.33 { 0.0 } else { y };
    if x > 88.37 { f32::INFINITY } else { y }
}

/// The error function, absolute error below 2e-7.
#[inline(always)]
pub(crate) fn erf<const FMA: bool>(x: f32) -> f32 {
    let a = x.abs();
    // |x| < 1: x times a minimax polynomial of x^2.
    let u = x * x;
    let mut p = 7.889_119e-5;
    p = madd::<FMA>(p, u, -0.000_802_084_1);
    p = madd::<FMA>(p, u, 0.005_189_535);
    p = madd::<FMA>(p, u, -0.026_854_444);
    p = madd::<FMA>(p, u, 0.112_836);
    p = madd::<FMA>(p, u, -0.376_126_26);
    p = madd::<FMA>(p, u, std::f32::consts::FRAC_2_SQRT_PI);
    let near = x * p;
    // |x| >= 1: 1 - exp(-x^2) r(t), t = 1 / (1 + |x| / 2), r minimax on 1 <= |x| <= 4.2; beyond that erf is 1 in f32.
    let c = if a < 4.2 { a } else { 4.2 };
    let t = 1.0 / madd::<FMA>(0.5, c, 1.0);
    let mut r = -0.057_837_97;
    r = madd::<FMA>(r, t, -0.044_144_142);
    r = madd::<FMA>(r, t, 0.387_124_3);
    r = madd::<FMA>(r, t, 0.112_444_32);
    r = madd::<FMA>(r, t, 0.326_681_8);
    r = madd::<FMA>(r, t, 0.274_434_5);
    r = madd::<FMA>(r, t, 0.000_540_391_54);
    let far = (1.0 - exp::<FMA>(-c * c) * r).copysign(x);
    let y = if a < 1.0 { near } else { far };
    if x.is_nan() { x } else { y }
}

/// The sum of the lanes, a power of two of them, by halves: an order that depends on nothing.
#[inline(always)]
pub(crate) fn sum_lanes<const N: usize>(mut v: [f32; N]) -> f32 {
    let mut n = N / 2;
    while n > 0 {
        for i in 0..n {
            v[i] += v[i + n];
        }
        n /= 2;
    }
    v[0]
}

/// `sum a[i] b[i]`: lane i % LANES adds its products in ascending order, then the lanes are summed.
#[inline(always)]
pub(crate) fn dot<const FMA: bool>(a: &[f32], b: &[f32]) -> f32 {
    let mut acc = [0.0; LANES];
    let (ac, bc) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let (ar, br) = (ac.remainder(), bc.remainder());
    for (x, y) in ac.zip(bc) {
        for i in 0..LANES {
            acc[i] = madd::<FMA>(x[i], y[i], acc[i]);
        }
    }
    for i in 0..ar.len() {
        acc[i] = madd::<FMA>(ar[i], br[i], acc[i]);
    }
    sum_lanes(acc)
}

/// Rows per work item, so that an item is worth handing to another thread. Elementwise and row-wise ops only: the cut
/// changes no result.
pub(crate) fn rows_per_item(cols: usize) -> usize {
    (16_384 / cols.max(1)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[inline(always)]
    fn map<const FMA: bool>(x: &[f32], e: &mut [f32], f: &mut [f32]) {
        for i in 0..x.len() {
            e[i] = exp::<FMA>(x[i]);
            f[i] = erf::<FMA>(x[i]);
        }
    }
    multiversion!(fn best(x: &[f32], e: &mut [f32], f: &mut [f32]) = map);
    fn portable(x: &[f32], e: &mut [f32], f: &mut [f32]) {
        map::<false>(x, e, f)
    }

    /// erf by its Maclaurin series, or one minus a continued fraction, in f64.
    fn erf_f64(x: f64) -> f64 {
        let a = x.abs();
        let y = if a < 3.0 {
            let (mut term, mut sum) = (a, a);
            for n in 1..80 {
                term *= -a * a / n as f64;
                sum += term / (2 * n + 1) as f64;
            }
            sum * 2.0 / std::f64::consts::PI.sqrt()
        } else {
            let mut k = 0.0;
            for n in (1..60).rev() {
                k = n as f64 / 2.0 / (a + k);
            }
            1.0 - (-a * a).exp() / (a + k) / std::f64::consts::PI.sqrt()
        };
        y.copysign(x)
    }

    #[test]
    fn exp_and_erf_are_accurate_over_their_range() {
        let xs: Vec<f32> = (-88_000..88_400).map(|i| i as f32 * 1e-3 + 0.000_123).collect();
        for run in [best, portable] {
            let (mut e, mut f) = (vec![0.0; xs.len()], vec![0.0; xs.len()]);
            run(&xs, &mut e, &mut f);
            for ((&x, &e), &f) in xs.iter().zip(&e).zip(&f) {
                let want = (x as f64).exp();
                if (-87.3..88.36).contains(&x) {
                    assert!(((e as f64 - want) / want).abs() < 1.8e-7, "exp({x}) = {e}, not {want}");
                }
                assert!((f as f64 - erf_f64(x as f64)).abs() < 2e-7, "erf({x}) = {f}");
            }
        }
    }

    #[test]
    fn special_values() {
        let x = [f32::NEG_INFINITY, f32::INFINITY, f32::NAN, 0.0, -200.0, 200.0];
        let (mut e, mut f) = ([0.0; 6], [0.0; 6]);
        best(&x, &mut e, &mut f);
        assert_eq!((e[0], e[1], e[3], e[4], e[5]), (0.0, f32::INFINITY, 1.0, 0.0, f32::INFINITY));
        assert_eq!((f[0], f[1], f[3], f[4], f[5]), (-1.0, 1.0, 0.0, -1.0, 1.0));
        assert!(e[2].is_nan() && f[2].is_nan());
    }

    #[test]
    fn where_a_slice_is_cut_changes_no_bit() {
        let xs: Vec<f32> = (0..103).map(|i| (i as f32 - 50.0) * 0.37).collect();
        let (mut e, mut f) = (vec![0.0; 103], vec![0.0; 103]);
        best(&xs, &mut e, &mut f);
        for i in 0..xs.len() {
            let (mut a, mut b) = ([0.0], [0.0]);
            best(&xs[i..=i], &mut a, &mut b);
            assert_eq!((a[0].to_bits(), b[0].to_bits()), (e[i].to_bits(), f[i].to_bits()));
        }
    }
}
