//! [`varft::ops::swiglu`].

use super::{Noise, as_good_as_bf16, devices, read, round, wide};
use half::bf16;
use varft::device::DType;
use varft::ops::swiglu::{backward, forward};

#[test]
fn forward_and_backward_also_in_place() {
    let mut rng = Noise::fresh();
    for d in devices() {
        let s = d.stream();
        for (rows, width) in [(1, 1), (1, 2048), (3, 19), (5, 1000), (7, 129), (0, 8)] {
            let mut x = rng.bf16s(rows * 2 * width, 6.0);
            if let Some(x) = x.first_mut() {
                *x = bf16::from_f32(-120.0); // far in the tail: the exponential overflows
            }
            let dh = rng.bf16s(rows * width, 1.0);
            let (mut want, mut plain) = (vec![], vec![]);
            let (mut want_dx, mut plain_dx) = (vec![0.0; rows * 2 * width], vec![0.0; rows * 2 * width]);
            for (i, d) in dh.iter().enumerate() {
                let (gate, up) = (i / width * 2 * width + i % width, i / width * 2 * width + width + i % width);
                let (g, u, d) = (x[gate].to_f64(), x[up].to_f64(), d.to_f64());
                let s = 1.0 / (1.0 + (-g).exp());
                want.push(g * s * u);
                plain.push(round(round(g * round(s)) * u));
                want_dx[gate] = d * u * s * (1.0 + g * (1.0 - s));
                want_dx[up] = d * g * s;
                let s = round(s);
                let slope = round(s * round(1.0 + round(g * round(1.0 - s))));
                plain_dx[gate] = round(round(d * u) * slope);
                plain_dx[up] = round(d * round(g * s));
            }
            let (xb, dhb, h) = (d.upload(&x), d.upload(&dh), d.alloc(DType::BF16, rows * width));
            forward(&s, &xb, &h, rows, width);
            let what = format!("{d:?} [{rows}, {width}]");
            as_good_as_bf16(&what, &wide(&read::<bf16>(&s, &h)), &plain, &want);
            let dx = d.alloc(DType::BF16, rows * 2 * width);
            backward(&s, &xb, &dhb, &dx, rows, width);
            let got = read::<bf16>(&s, &dx);
            as_good_as_bf16(&format!("dx of {what}"), &wide(&got), &plain_dx, &want_dx);
            backward(&s, &xb, &dhb, &xb, rows, width);
            assert_eq!(read::<bf16>(&s, &xb), got, "in place");
        }
    }
}
