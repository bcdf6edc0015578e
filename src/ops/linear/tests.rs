use super::*;
use crate::device::{DType, Device};

/// Numbers in [-1, 1), the same for a seed.
fn numbers(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn packed(rows: &[f32], n: usize, k: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; packed_len(n, k)];
    pack(rows, n, k, &mut out);
    out
}

fn unpacked(data: &[f32], n: usize, k: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; n * k];
    unpack(data, n, k, &mut out);
    out
}

/// The sum and the sum of magnitudes of `a(i) * b(i)`, in f64.
fn dot(len: usize, a: impl Fn(usize) -> f32, b: impl Fn(usize) -> f32) -> (f64, f64) {
    (0..len).map(|i| a(i) as f64 * b(i) as f64).fold((0.0, 0.0), |(s, m), p| (s + p, m + p.abs()))
}

/// A sum of `len` products by fused multiply-adds is off by at most `len` roundings of partial sums, each of which is at
/// most the sum of magnitudes; additions after it round once each.
fn assert_near(got: f32, want: f64, magnitude: f64, len: usize, what: &str) {
    let bound = (len + 2) as f64 * (f32::EPSILON as f64 / 2.0) * magnitude * 1.01 + 1e-30;
    assert!((got as f64 - want).abs() <= bound, "{what}: {got} for {want}, off by more than {bound:e}");
}

fn bits(v: &[f32]) -> Vec<u32> {
    v.iter().map(|x| x.to_bits()).collect()
}

/// [m, n, k]: one row and many, sizes around the tiles' and the panels', and sums longer than a cut.
const SHAPES: &[[usize; 3]] = &[
    [1, 1, 1],
    [1, 16, 8],
    [1, 300, 40],
    [2, 33, 7],
    [3, 17, 64],
    [5, 130, 19],
    [7, 48, 300],
    [8, 95, 513],
    [12, 16, 16],
    [13, 31, 257],
    [25, 64, 33],
    [30, 50, 600],
    [61, 20, 5],
    [100, 70, 260],
    [230, 45, 530],
];

#[test]
fn a_packed_weight_unpacks_to_itself_and_its_padding_is_zero() {
    for (n, k) in [(1, 1), (15, 3), (16, 8), (17, 5), (40, 33)] {
        let w = numbers((n * k) as u64, n * k);
        let p = packed(&w, n, k);
        assert_eq!(bits(&unpacked(&p, n, k)), bits(&w));
        for (i, v) in p.iter().enumerate() {
            let (panel, step, lane) = (i / (PANEL * k), i / PANEL % k, i % PANEL);
            let output = panel * PANEL + lane;
            assert_eq!(*v, if output < n { w[output * k + step] } else { 0.0 });
        }
    }
}

#[test]
fn forward_is_near_the_sum_in_f64_with_every_epilogue() {
    let device = Device::cpu_deferred(2);
    let s = device.stream();
    for &[m, n, k] in SHAPES {
        let (x, w) = (numbers(1, m * k), numbers(2, n * k));
        let (bias, residual) = (numbers(3, n), numbers(4, m * n));
        let weight = Weight { data: device.upload(&packed(&w, n, k)), n, k };
        let (dx, db, dr) = (device.upload(&x), device.upload(&bias), device.upload(&residual));
        let in_place = device.upload(&residual);
        let cases = [
            (Epilogue::None, device.alloc(DType::F32, m * n), 0.0, 0.0),
            (Epilogue::Bias(&db), device.alloc(DType::F32, m * n), 1.0, 0.0),
            (Epilogue::Add(&dr), device.alloc(DType::F32, m * n), 0.0, 1.0),
            (Epilogue::BiasAdd(&db, &dr), device.alloc(DType::F32, m * n), 1.0, 1.0),
            (Epilogue::Add(&in_place), in_place.clone(), 0.0, 1.0),
        ];
        for (case, (epilogue, y, with_bias, with_residual)) in cases.into_iter().enumerate() {
            forward(&s, &dx, &weight, epilogue, &y, m);
            let y = s.read::<f32>(&y).wait().unwrap();
            for i in 0..m {
                for j in 0..n {
                    let (sum, magnitude) = dot(k, |t| x[i * k + t], |t| w[j * k + t]);
                    let extra = [with_bias * bias[j] as f64, with_residual * residual[i * n + j] as f64];
                    let (want, magnitude) = (sum + extra[0] + extra[1], magnitude + extra[0].abs() + extra[1].abs());
                    let what = format!("[{m}, {n}, {k}], epilogue {case}, row {i}, output {j}");
                    assert_near(y[i * n + j], want, magnitude, k, &what);
                }
            }
        }
    }
}

#[test]
fn gradients_are_near_the_sums_in_f64_and_accumulate() {
    let device = Device::cpu_deferred(2);
    let s = device.stream();
    for &[m, n, k] in SHAPES {
        let (x, w, dy) = (numbers(1, m * k), numbers(2, n * k), numbers(3, m * n));
        let (dx0, dw0, db0) = (numbers(4, m * k), numbers(5, n * k), numbers(6, n));
        let weight = Weight { data: device.upload(&packed(&w, n, k)), n, k };
        let (bx, bdy) = (device.upload(&x), device.upload(&dy));
        let (fresh, dx) = (device.alloc(DType::F32, m * k), device.upload(&dx0));
        let (dw, db) = (device.upload(&packed(&dw0, n, k)), device.upload(&db0));
        backward_input(&s, &bdy, &weight, &fresh, m, false);
        backward_input(&s, &bdy, &weight, &dx, m, true);
        backward_weight(&s, &bdy, &bx, &dw, m);
        backward_bias(&s, &bdy, &db, m);
        let fresh = s.read::<f32>(&fresh).wait().unwrap();
        let dx = s.read::<f32>(&dx).wait().unwrap();
        let dw = s.read::<f32>(&dw).wait().unwrap();
        let db = s.read::<f32>(&db).wait().unwrap();
        for i in 0..m {
            for t in 0..k {
                let (sum, magnitude) = dot(n, |j| dy[i * n + j], |j| w[j * k + t]);
                let (at, what) = (i * k + t, format!("dx of [{m}, {n}, {k}], row {i}, input {t}"));
                assert_near(fresh[at], sum, magnitude, n, &what);
                let before = dx0[at] as f64;
                assert_near(dx[at], sum + before, magnitude + before.abs(), n, &what);
            }
        }
        let padding_is_zero = |p: &[f32]| packed(&unpacked(p, n, k), n, k) == p;
        assert!(padding_is_zero(&dw), "a padded lane of dw is not zero");
        let dw = unpacked(&dw, n, k);
        for j in 0..n {
            for t in 0..k {
                let (sum, magnitude) = dot(m, |i| dy[i * n + j], |i| x[i * k + t]);
                let before = dw0[j * k + t] as f64;
                let what = format!("dw of [{m}, {n}, {k}], output {j}, input {t}");
                assert_near(dw[j * k + t], sum + before, magnitude + before.abs(), m, &what);
            }
            let (sum, magnitude) = dot(m, |i| dy[i * n + j], |_| 1.0);
            let before = db0[j] as f64;
            assert_near(db[j], sum + before, magnitude + before.abs(), m, "db");
        }
    }
}

/// The contract, written as plainly as it can be: one accumulator, ascending, fused.
fn one_by_one(start: f32, len: usize, a: impl Fn(usize) -> f32, b: impl Fn(usize) -> f32) -> f32 {
    (0..len).fold(start, |acc, i| a(i).mul_add(b(i), acc))
}

/// Runs all three products with `isa` on `threads` threads: y (with bias and residual `dy`), dx, dw.
fn products(
    isa: Isa,
    threads: usize,
    [m, n, k]: [usize; 3],
    x: &[f32],
    w: &[f32],
    bias: &[f32],
    dy: &[f32],
) -> [Vec<f32>; 3] {
    let pool = Pool::new(threads);
    let (mut y, mut dx, mut dw) = (vec![f32::NAN; m * n], vec![f32::NAN; m * k], vec![0.0; packed_len(n, k)]);
    let w = packed(w, n, k);
    let (bias, residual) = (bias.as_ptr(), dy.as_ptr());
    let out = Out::Rows { y: y.as_mut_ptr(), stride: n, cols: n, continues: false, bias, residual };
    // SAFETY: all lengths are those of the shape, and nothing overlaps.
    unsafe {
        forward_on(&pool, isa, x, &w, m, n, k, out);
        backward_input_on(&pool, isa, dy, &w, dx.as_mut_ptr(), m, n, k, false);
        backward_weight_on(&pool, isa, dy, x, dw.as_mut_ptr(), m, n, k);
    }
    [y, dx, unpacked(&dw, n, k)]
}

#[test]
fn every_instruction_set_and_thread_count_gives_the_bits_of_the_plain_loop() {
    for &[m, n, k] in SHAPES {
        let (x, w, bias, dy) = (numbers(1, m * k), numbers(2, n * k), numbers(3, n), numbers(4, m * n));
        let at = |len: usize, of: &dyn Fn(usize) -> f32| (0..len).map(of).collect::<Vec<_>>();
        let sum = |i: usize| one_by_one(0.0, k, |t| x[i / n * k + t], |t| w[i % n * k + t]);
        let want = [
            at(m * n, &|i| (sum(i) + bias[i % n]) + dy[i]),
            at(m * k, &|i| one_by_one(0.0, n, |j| dy[i / k * n + j], |j| w[j * k + i % k])),
            at(n * k, &|i| one_by_one(0.0, m, |r| dy[r * n + i / k], |r| x[r * k + i % k])),
        ];
        for isa in Isa::available() {
            for threads in 1..=3 {
                let got = products(isa, threads, [m, n, k], &x, &w, &bias, &dy);
                for (which, (got, want)) in ["y", "dx", "dw"].iter().zip(got.iter().zip(&want)) {
                    assert!(bits(got) == bits(want), "{which} of [{m}, {n}, {k}], {isa:?}, {threads} threads");
                }
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_among_others() {
    let (n, k) = (70, 300);
    let (x, w, bias, dy) = (numbers(1, 64 * k), numbers(2, n * k), numbers(3, n), numbers(4, 64 * n));
    for isa in Isa::available() {
        let alone: Vec<_> =
            (0..64).map(|i| products(isa, 1, [1, n, k], &x[i * k..][..k], &w, &bias, &dy[i * n..][..n])).collect();
        for m in 1..=64 {
            let [y, dx, _] = products(isa, 2, [m, n, k], &x[..m * k], &w, &bias, &dy[..m * n]);
            for i in 0..m {
                assert_eq!(bits(&y[i * n..][..n]), bits(&alone[i][0]), "row {i} of {m}, {isa:?}");
                assert_eq!(bits(&dx[i * k..][..k]), bits(&alone[i][1]), "row {i} of {m}, {isa:?}");
            }
        }
    }
}

#[test]
fn operands_that_are_copied_in_parts_give_the_bits_of_the_plain_loop() {
    // More outputs than backward_input takes at a time, more rows than backward_weight does; and more columns of the
    // copied operand, and rows of the other, than a slab holds.
    for [m, n, k] in [[2 * BATCH + 3, PART + 5, 3], [7, PART + 5, 1100], [BATCH + 9, 4117, 5]] {
        let (x, w, bias, dy) = (numbers(1, m * k), numbers(2, n * k), numbers(3, n), numbers(4, m * n));
        let [y, dx, dw] = products(Isa::detect(), 2, [m, n, k], &x, &w, &bias, &dy);
        for i in (0..m * n).step_by(1009) {
            let sum = one_by_one(0.0, k, |t| x[i / n * k + t], |t| w[i % n * k + t]);
            assert_eq!(y[i].to_bits(), ((sum + bias[i % n]) + dy[i]).to_bits(), "y[{i}] of [{m}, {n}, {k}]");
        }
        for i in (0..m * k).step_by(37) {
            let want = one_by_one(0.0, n, |j| dy[i / k * n + j], |j| w[j * k + i % k]);
            assert_eq!(dx[i].to_bits(), want.to_bits(), "dx[{i}] of [{m}, {n}, {k}]");
        }
        for i in (0..n * k).step_by(41) {
            let want = one_by_one(0.0, m, |r| dy[r * n + i / k], |r| x[r * k + i % k]);
            assert_eq!(dw[i].to_bits(), want.to_bits(), "dw[{i}] of [{m}, {n}, {k}]");
        }
    }
}

#[test]
fn micro_batches_accumulate_to_the_bits_of_one_batch() {
    let (m, n, k) = (40, 37, 21);
    let device = Device::cpu(2);
    let s = device.stream();
    let (x, dy) = (device.upload(&numbers(1, m * k)), device.upload(&numbers(2, m * n)));
    let run = |cuts: &[usize]| {
        let (dw, db) = (device.zeros(DType::F32, packed_len(n, k)), device.zeros(DType::F32, n));
        for c in cuts.windows(2) {
            let rows = c[1] - c[0];
            let dy = dy.view(c[0] * n, rows * n);
            backward_weight(&s, &dy, &x.view(c[0] * k, rows * k), &dw, rows);
            backward_bias(&s, &dy, &db, rows);
        }
        (bits(&s.read(&dw).wait().unwrap()), bits(&s.read(&db).wait().unwrap()))
    };
    assert_eq!(run(&[0, 40]), run(&[0, 1, 14, 40]));
}

#[test]
fn no_rows_is_no_work() {
    let device = Device::cpu(2);
    let s = device.stream();
    let weight = Weight { data: device.zeros(DType::F32, packed_len(5, 7)), n: 5, k: 7 };
    let empty = device.zeros(DType::F32, 0);
    forward(&s, &empty, &weight, Epilogue::None, &empty, 0);
    backward_input(&s, &empty, &weight, &empty, 0, true);
    backward_weight(&s, &empty, &empty, &weight.data, 0);
    backward_bias(&s, &empty, &device.zeros(DType::F32, 5), 0);
}
