//! [`varft::ops::rms_norm`].

use super::{Noise, as_good_as_bf16, devices, read, round, wide, wide32};
use half::bf16;
use varft::device::DType;
use varft::ops::rms_norm::{backward, forward};

const EPS: f32 = 1e-6;
/// One row, one column, widths that are no multiple of 8, more than one step of a block, more rows than blocks, none.
const SHAPES: [(usize, usize); 8] = [(1, 1), (1, 2048), (3, 17), (5, 1280), (33, 200), (4, 1031), (300, 24), (0, 64)];

#[test]
fn forward_equals_f64_and_rows_do_not_depend_on_their_company() {
    let mut rng = Noise::fresh();
    for d in devices() {
        let s = d.stream();
        for (rows, cols) in SHAPES {
            let (x, w) = (rng.bf16s(rows * cols, 3.0), rng.bf16s(cols, 2.0));
            let (xb, wb, y) = (d.upload(&x), d.upload(&w), d.alloc(DType::BF16, rows * cols));
            forward(&s, &xb, &wb, EPS, &y, rows, cols);
            let (mut want, mut straightforward) = (vec![], vec![]);
            for row in wide(&x).chunks(cols) {
                let k = 1.0 / (row.iter().map(|v| v * v).sum::<f64>() / cols as f64 + f64::from(EPS)).sqrt();
                want.extend(row.iter().zip(&w).map(|(v, w)| v * k * w.to_f64()));
                straightforward.extend(row.iter().zip(&w).map(|(v, w)| round(round(v * round(k)) * w.to_f64())));
            }
            let got = read::<bf16>(&s, &y);
            as_good_as_bf16(&format!("{d:?} [{rows}, {cols}]"), &wide(&got), &straightforward, &want);
            if rows > 0 {
                let alone = d.alloc(DType::BF16, cols);
                forward(&s, &xb.view((rows - 1) * cols, cols), &wb, EPS, &alone, 1, cols);
                assert_eq!(read::<bf16>(&s, &alone), got[(rows - 1) * cols..]);
            }
        }
    }
}

#[test]
fn backward_joins_the_residual_streams_gradient_and_adds_to_the_weights() {
    let mut rng = Noise::fresh();
    for d in devices() {
        let s = d.stream();
        for (rows, cols) in SHAPES {
            let [x, dy, dx0] = [3.0, 1.0, 1.0].map(|scale| rng.bf16s(rows * cols, scale));
            let w = rng.bf16s(cols, 2.0);
            let before = rng.f32s(cols, 1.0);
            let (mut want, mut plain) = (wide(&dx0), wide(&dx0));
            let (mut want_dw, mut plain_dw) = (wide32(&before), wide32(&before));
            for r in 0..rows {
                let at = |v: &[bf16], c: usize| v[r * cols + c].to_f64();
                let squares = (0..cols).map(|c| at(&x, c).powi(2)).sum::<f64>() / cols as f64;
                let k = 1.0 / (squares + f64::from(EPS)).sqrt();
                let dot = (0..cols).map(|c| at(&dy, c) * w[c].to_f64() * at(&x, c)).sum::<f64>() / cols as f64;
                for c in 0..cols {
                    let (v, g) = (at(&x, c), at(&dy, c) * w[c].to_f64());
                    want[r * cols + c] += k * (g - v * k * k * dot);
                    want_dw[c] += at(&dy, c) * v * k;
                    // Every step rounded.
                    let (k, normal) = (round(k), round(v * round(k)));
                    let grad = round(k * round(round(g) - round(normal * round(round(dot) * k))));
                    plain[r * cols + c] = round(plain[r * cols + c] + grad);
                    plain_dw[c] = round(plain_dw[c] + round(at(&dy, c) * normal));
                }
            }
            let [xb, wb, dyb, dx] = [&x, &w, &dy, &dx0].map(|v| d.upload(v));
            let dw = d.upload(&before);
            backward(&s, &xb, &wb, EPS, &dyb, &dx, Some(&dw), rows, cols);
            let what = format!("{d:?} [{rows}, {cols}]");
            let got = read::<bf16>(&s, &dx);
            as_good_as_bf16(&what, &wide(&got), &plain, &want);
            as_good_as_bf16(&format!("dw of {what}"), &wide32(&read::<f32>(&s, &dw)), &plain_dw, &want_dw);
            let frozen = d.upload(&dx0);
            backward(&s, &xb, &wb, EPS, &dyb, &frozen, None, rows, cols);
            assert_eq!(read::<bf16>(&s, &frozen), got, "a frozen weight");
        }
    }
}
