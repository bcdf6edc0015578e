//! [`varft::ops::gelu`].

use super::{Noise, as_good_as_bf16, devices, read, round, wide};
use half::bf16;
use std::f64::consts::{PI, SQRT_2};
use varft::device::DType;
use varft::ops::gelu::{backward, forward};

/// The complement of the error function, by its series near 0 and its continued fraction beyond.
fn erfc(x: f64) -> f64 {
    if x < 0.0 {
        return 2.0 - erfc(-x);
    }
    let scale = (-x * x).exp() / PI.sqrt();
    if x < 2.0 {
        let terms = (1..60).scan(x, |term, n| {
            *term *= 2.0 * x * x / f64::from(2 * n + 1);
            Some(*term)
        });
        1.0 - 2.0 * scale * (x + terms.sum::<f64>())
    } else {
        scale / (1..100).rev().fold(x, |below, n| x + f64::from(n) / 2.0 / below)
    }
}

#[test]
fn forward_and_backward_equal_f64_far_into_the_tails() {
    let mut rng = Noise::fresh();
    for d in devices() {
        let s = d.stream();
        for (n, at) in [(1, 0), (2048, 0), (5000, 0), (1003, 1), (0, 0)] {
            let mut x = rng.bf16s(n + at, 4.0);
            // Where 1 + erf is all rounding, and where everything is 0.
            let far = [-5.0, -9.0, -14.0, -200.0, 200.0, 0.0].map(bf16::from_f32);
            (x.iter_mut().skip(at + 1)).zip(far).for_each(|(x, far)| *x = far);
            let dy = rng.bf16s(n + at, 1.0);
            let (mut want, mut plain, mut want_dx, mut plain_dx) = (vec![], vec![], vec![], vec![]);
            for (x, d) in x[at..].iter().zip(&dy[at..]) {
                let (x, d) = (x.to_f64(), d.to_f64());
                let (cdf, pdf) = (0.5 * erfc(-x / SQRT_2), (-x * x / 2.0).exp() / (2.0 * PI).sqrt());
                want.push(x * cdf);
                plain.push(round(x * round(cdf)));
                want_dx.push(d * (cdf + x * pdf));
                plain_dx.push(round(d * round(round(cdf) + round(x * round(pdf)))));
            }
            let [xb, dyb] = [&x, &dy].map(|v| d.upload(v).view(at, n));
            let [y, dx] = [(); 2].map(|()| d.alloc(DType::BF16, n));
            forward(&s, &xb, &y, n);
            backward(&s, &xb, &dyb, &dx, n);
            let (y, what) = (read::<bf16>(&s, &y), format!("{d:?}, {n} elements from {at} on"));
            as_good_as_bf16(&what, &wide(&y), &plain, &want);
            as_good_as_bf16(&format!("the gradient of {what}"), &wide(&read::<bf16>(&s, &dx)), &plain_dx, &want_dx);
            // In the left tail too: a bf16 has eight bits of every value.
            for (got, want) in wide(&y).iter().zip(&want).filter(|(_, want)| want.abs() > 1e-37) {
                assert!((got - want).abs() <= want.abs() / 200.0, "{what}: {got}, not {want}");
            }
        }
    }
}
