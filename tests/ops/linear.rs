//! [`varft::ops::linear`].

use super::setting::{card, emulates};
use super::{Noise, as_good_as_bf16, devices, read, round, wide, wide32};
use half::bf16;
use varft::device::{Buffer, DType, Device};
use varft::ops::linear::{Epilogue, Weight, backward_bias, backward_input, backward_weight, forward};

/// Rows, outputs, inputs: one of each; odd ones, whose rows begin anywhere; inputs of 8-byte rows, as the vision tower's 3420; one
/// more than a tile; more than one tile of any kind either way.
const SHAPES: [[usize; 3]; 10] = [
    [1, 1, 1],
    [1, 40, 64],
    [3, 17, 7],
    [5, 33, 22],
    [7, 24, 3420],
    [9, 65, 136],
    [33, 129, 20],
    [65, 130, 72],
    [129, 264, 40],
    [260, 136, 24],
];

struct Case {
    x: Vec<bf16>,
    w: Vec<bf16>,
    bias: Vec<bf16>,
    residual: Vec<bf16>,
}

fn case(rng: &mut Noise, [m, n, k]: [usize; 3]) -> Case {
    let [x, w, bias, residual] = [m * k, n * k, n, m * n].map(|len| rng.bf16s(len, 1.0));
    Case { x, w, bias, residual }
}

fn weight(d: &Device, w: &[bf16], n: usize, k: usize) -> Weight {
    Weight { data: d.upload(w), n, k }
}

/// `sum a[i] b[i]`, exactly enough.
fn dot<'a>(a: impl Iterator<Item = &'a bf16>, b: impl Iterator<Item = &'a bf16>) -> f64 {
    a.zip(b).map(|(a, b)| a.to_f64() * b.to_f64()).sum()
}

/// The sums `[m, n]` of a case.
fn sums(c: &Case, [m, n, k]: [usize; 3]) -> Vec<f64> {
    let at = |i: usize| dot(c.x[i / n * k..][..k].iter(), c.w[i % n * k..][..k].iter());
    (0..m * n).map(at).collect()
}

#[test]
fn forward_equals_f64_with_every_epilogue() {
    let mut rng = Noise::fresh();
    for d in devices() {
        let s = d.stream();
        for shape in SHAPES {
            let [m, n, k] = shape;
            let c = case(&mut rng, shape);
            let sums = sums(&c, shape);
            let (xb, wb, bb) = (d.upload(&c.x), weight(&d, &c.w, n, k), d.upload(&c.bias));
            for (bias, residual) in [(false, false), (true, false), (false, true), (true, true)] {
                // In place: the residual is where the result goes.
                let y = if residual { d.upload(&c.residual) } else { d.alloc(DType::BF16, m * n) };
                let epilogue = match (bias, residual) {
                    (false, false) => Epilogue::None,
                    (true, false) => Epilogue::Bias(&bb),
                    (false, true) => Epilogue::Add(&y),
                    (true, true) => Epilogue::BiasAdd(&bb, &y),
                };
                forward(&s, &xb, &wb, epilogue, &y, m);
                let added = |i: usize| {
                    [(bias, c.bias[i % n]), (residual, c.residual[i])].map(|(on, v)| if on { v.to_f64() } else { 0.0 })
                };
                let want: Vec<f64> = sums.iter().enumerate().map(|(i, sum)| sum + added(i)[0] + added(i)[1]).collect();
                let plain: Vec<f64> = (sums.iter().enumerate())
                    .map(|(i, sum)| round(round(round(*sum) + added(i)[0]) + added(i)[1]))
                    .collect();
                let what = format!("{d:?} {shape:?}, bias {bias}, residual {residual}");
                as_good_as_bf16(&what, &wide(&read::<bf16>(&s, &y)), &plain, &want);
            }
        }
    }
}

#[test]
fn logits_are_f32_sums() {
    let mut rng = Noise::fresh();
    for d in devices() {
        let s = d.stream();
        for shape in SHAPES {
            let [m, n, k] = shape;
            let c = case(&mut rng, shape);
            let y = d.alloc(DType::F32, m * n);
            forward(&s, &d.upload(&c.x), &weight(&d, &c.w, n, k), Epilogue::None, &y, m);
            for (i, (got, want)) in read::<f32>(&s, &y).into_iter().zip(sums(&c, shape)).enumerate() {
                // k roundings of sums below k.
                let allowed = (k as f64).powi(2) * 2f64.powi(-24);
                assert!((f64::from(got) - want).abs() <= allowed, "{d:?} {shape:?}, element {i}: {got}, not {want}");
            }
        }
    }
}

/// The bits of `forward` for the rows `[first, first + m)` of `x`.
fn rows(d: &Device, x: &Buffer, w: &Weight, first: usize, m: usize) -> Vec<bf16> {
    let (s, y) = (d.stream(), d.alloc(DType::BF16, m * w.n));
    forward(&s, &x.view(first * w.k, m * w.k), w, Epilogue::None, &y, m);
    read(&s, &y)
}

#[test]
fn a_rows_bits_do_not_depend_on_its_company_nor_on_the_number_of_multiprocessors() {
    let mut rng = Noise::fresh();
    // As many multiprocessors as the seed says, one to seven.
    let mut emulated =
        |sm| -> Vec<Device> { (0..7).map(|i| Device::emulated_as(rng.next() / 7 * 7 + i, sm).unwrap()).collect() };
    let mut all = if emulates() { vec![emulated(80), emulated(90)] } else { vec![] };
    all.extend(card().map(|d| vec![d]));
    for cards in all {
        for [n, k] in [[72, 200], [200, 44], [40, 22], [33, 13]] {
            let most = 280;
            let (x, w) = (rng.bf16s(most * k, 1.0), rng.bf16s(n * k, 1.0));
            let mut whole: Option<Vec<bf16>> = None;
            for (i, d) in cards.iter().enumerate() {
                let (xb, wb) = (d.upload(&x), weight(d, &w, n, k));
                if i % 3 == 0 {
                    let got = rows(d, &xb, &wb, 0, most);
                    assert!(*whole.get_or_insert(got.clone()) == got, "{d:?}, [{n}, {k}] on card {i}");
                }
                let whole = whole.as_ref().unwrap();
                for m in [1, 8, 9, 17, 32, 33, 64, 65, 100, 129] {
                    let first = rng.next() as usize % (most - m + 1);
                    let got = rows(d, &xb, &wb, first, m);
                    assert!(got == whole[first * n..][..m * n], "{d:?}, {m} rows of [{n}, {k}] on card {i}");
                }
            }
        }
    }
}

#[test]
fn gradients_equal_f64_and_are_added_where_they_should_be() {
    let mut rng = Noise::fresh();
    for d in devices() {
        let s = d.stream();
        for shape in SHAPES.into_iter().chain([[520, 9, 3], [1030, 200, 2]]) {
            let [m, n, k] = shape;
            let c = case(&mut rng, shape);
            let (dy, dx0) = (rng.bf16s(m * n, 1.0), rng.bf16s(m * k, 1.0));
            let (dw0, db0) = (rng.f32s(n * k, 1.0), rng.f32s(n, 1.0));
            let (xb, wb, dyb) = (d.upload(&c.x), weight(&d, &c.w, n, k), d.upload(&dy));

            let at = |i: usize| dot(dy[i / k * n..][..n].iter(), c.w.iter().skip(i % k).step_by(k));
            let terms: Vec<f64> = (0..m * k).map(at).collect();
            for accumulate in [false, true] {
                let dx = if accumulate { d.upload(&dx0) } else { d.alloc(DType::BF16, m * k) };
                backward_input(&s, &dyb, &wb, &dx, m, accumulate);
                let before = |i: usize| if accumulate { dx0[i].to_f64() } else { 0.0 };
                let want: Vec<f64> = terms.iter().enumerate().map(|(i, t)| before(i) + t).collect();
                let plain: Vec<f64> = terms.iter().enumerate().map(|(i, t)| round(before(i) + round(*t))).collect();
                as_good_as_bf16(&format!("dx of {d:?} {shape:?}"), &wide(&read::<bf16>(&s, &dx)), &plain, &want);
            }

            let dw = d.upload(&dw0);
            backward_weight(&s, &dyb, &xb, &dw, m);
            let at = |i: usize| dot(dy.iter().skip(i / k).step_by(n), c.x.iter().skip(i % k).step_by(k));
            let terms: Vec<f64> = (0..n * k).map(at).collect();
            let want: Vec<f64> = terms.iter().zip(&dw0).map(|(t, w)| f64::from(*w) + t).collect();
            let plain: Vec<f64> = terms.iter().zip(&dw0).map(|(t, w)| f64::from(*w) + round(*t)).collect();
            as_good_as_bf16(&format!("dw of {d:?} {shape:?}"), &wide32(&read::<f32>(&s, &dw)), &plain, &want);

            let db = d.upload(&db0);
            backward_bias(&s, &dyb, &db, m);
            for (j, got) in read::<f32>(&s, &db).into_iter().enumerate() {
                let column = dy.iter().skip(j).step_by(n).map(|v| v.to_f64());
                let want = f64::from(db0[j]) + column.sum::<f64>();
                // Sums of up to m values below one, added in at most 64 + m / 32 steps.
                let allowed = (m + 1) as f64 * (64 + m / 32) as f64 * 2f64.powi(-24);
                assert!((f64::from(got) - want).abs() <= allowed, "db[{j}] of {d:?} {shape:?}: {got}, not {want}");
            }
        }
    }
}

#[test]
fn no_rows_are_no_work() {
    for d in devices() {
        let s = d.stream();
        let w = weight(&d, &[bf16::ONE; 35], 5, 7);
        let (none, dw, db) = (d.alloc(DType::BF16, 0), d.upload(&[1.0f32; 35]), d.upload(&[2.0f32; 5]));
        forward(&s, &none, &w, Epilogue::None, &none, 0);
        backward_input(&s, &none, &w, &none, 0, true);
        backward_weight(&s, &none, &none, &dw, 0);
        backward_bias(&s, &none, &db, 0);
        assert_eq!((read::<f32>(&s, &dw), read::<f32>(&s, &db)), (vec![1.0; 35], vec![2.0; 5]));
    }
}
