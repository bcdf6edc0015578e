//! The CUDA emulator: its execution model against what CUDA promises, its checks against kernels with planted mistakes
//! (`tests/kernels/planted.cu` and `planted_async.cu`). Seeds are fresh in every run, and printed.
#![cfg(emulator)]

mod asynchronous;
mod planted;
mod sanitizer;

use half::bf16;
use std::hash::{BuildHasher, RandomState};
use varft::device::emulated::Emulator;
use varft::device::{Arg, DType, Launch};

// Brings the test kernels into this program: their table of names is filled before `main`.
#[link(name = "varft_test_kernels", kind = "static", modifiers = "+whole-archive")]
unsafe extern "C" {}

fn fresh() -> Emulator {
    let seed = RandomState::new().hash_one("seed");
    println!("seed {seed}");
    Emulator::new(seed).unwrap()
}

/// Random numbers that depend on the seed alone.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// In (-scale, scale).
    fn bf16s(&mut self, n: usize, scale: f32) -> Vec<bf16> {
        let unit = |x: u64| (x >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
        (0..n).map(|_| bf16::from_f32(unit(self.next()) * scale)).collect()
    }
}

fn noise() -> Noise {
    let seed = RandomState::new().hash_one("noise");
    println!("noise {seed}");
    Noise(seed)
}

// ---- the execution model ----

#[test]
fn indices_run_over_three_dimensions() {
    let gpu = fresh();
    let (grid, block) = ([3, 2, 2], [4, 3, 5]);
    let n = 12 * 60;
    let out = gpu.alloc(DType::U32, n).unwrap();
    gpu.launch("indices", Launch { grid, block, shared_bytes: 0 }, &[Arg::Buffer(&out)]).unwrap();
    for (i, got) in gpu.read::<u32>(&out).unwrap().into_iter().enumerate() {
        let (b, t) = (i as u32 / 60, i as u32 % 60);
        let want = (b % 3) | (b / 3 % 2) << 4 | (b / 6) << 8 | (t % 4) << 12 | (t / 4 % 3) << 16 | (t / 12) << 20;
        assert_eq!(got, want, "block {b}, thread {t}");
    }
}

#[test]
fn shuffles_read_the_lanes_that_the_ptx_manual_says() {
    let (gpu, mut rng) = (fresh(), noise());
    for width in [1, 2, 4, 8, 16, 32] {
        let operands: Vec<i32> = (0..32).map(|_| rng.below(40) as i32).collect();
        let (ops, out) = (gpu.copied(&operands).unwrap(), gpu.alloc(DType::I32, 128).unwrap());
        let args = [Arg::Buffer(&ops), Arg::I32(width), Arg::Buffer(&out)];
        gpu.launch("shuffles", Launch::linear(1, 32), &args).unwrap();
        let out = gpu.read::<i32>(&out).unwrap();
        for lane in 0..32 {
            // "shfl.sync": the pseudocode, with c as __shfl*_sync set it.
            let (b, seg) = (operands[lane as usize] & 31, 32 - width);
            let (min, max) = (lane & seg, (lane & seg) | (31 & !seg));
            let clamp = |j: i32, ok: bool| if ok { j } else { lane };
            let operand = operands[lane as usize];
            let up = clamp(lane - operand, lane - operand >= min);
            let down = clamp(lane + operand, lane + operand <= max);
            let xor = clamp(lane ^ operand, lane ^ operand <= max);
            for (mode, source) in [min | (b & !seg), up, down, xor].into_iter().enumerate() {
                let got = out[mode * 32 + lane as usize];
                assert_eq!(got, 100 + source, "mode {mode}, lane {lane}, operand {operand}, width {width}");
            }
        }
    }
}

#[test]
fn votes_and_shuffles_under_partial_masks() {
    let (gpu, mut rng) = (fresh(), noise());
    for round in 0..4 {
        // All true and all false in one half at least once.
        let p: Vec<i32> = (0..24).map(|l| if round < 2 && l < 16 { round } else { rng.below(2) as i32 }).collect();
        let (pb, out) = (gpu.copied(&p).unwrap(), gpu.copied(&[0u32; 128]).unwrap());
        gpu.launch("votes", Launch::linear(1, 24), &[Arg::Buffer(&pb), Arg::Buffer(&out)]).unwrap();
        let out = gpu.read::<u32>(&out).unwrap();
        for lane in 0..24 {
            let group = if lane < 16 { 0..16 } else { 16..24 };
            let ballot = group.clone().filter(|&l| p[l] != 0).fold(0u32, |b, l| b | 1 << l);
            assert_eq!(out[lane], ballot, "ballot of lane {lane}");
            assert_eq!(out[32 + lane], u32::from(ballot != 0), "any of lane {lane}");
            assert_eq!(out[64 + lane], u32::from(group.clone().all(|l| p[l] != 0)), "all of lane {lane}");
            assert_eq!(out[96 + lane], u32::from(group.contains(&((lane + 8) % 32))), "shuffle of lane {lane}");
        }
    }
}

#[test]
fn barriers_order_what_they_should() {
    let gpu = fresh();
    let data: Vec<i32> = (0..64).map(|i| i * 7).collect();
    for seed in 0..20 {
        let gpu = gpu.with_seed(seed);
        let (x, out) = (gpu.copied(&data).unwrap(), gpu.alloc(DType::I32, 128).unwrap());
        gpu.launch("producer_consumer", Launch::linear(1, 96), &[Arg::Buffer(&x), Arg::Buffer(&out)]).unwrap();
        for (i, got) in gpu.read::<i32>(&out).unwrap().into_iter().enumerate() {
            assert_eq!(got, data[i / 64 * 32 + 31 - i % 32]);
        }
        let out = gpu.alloc(DType::I32, 64).unwrap();
        gpu.launch("warp_reverse", Launch::linear(1, 64), &[Arg::Buffer(&x), Arg::Buffer(&out)]).unwrap();
        for (i, got) in gpu.read::<i32>(&out).unwrap().into_iter().enumerate() {
            assert_eq!(got, data[i / 32 * 32 + 31 - i % 32]);
        }
        let out = gpu.alloc(DType::I32, 40).unwrap();
        gpu.launch("early_exit", Launch::linear(1, 128), &[Arg::Buffer(&out)]).unwrap();
        assert!(gpu.read::<i32>(&out).unwrap().iter().enumerate().all(|(i, &v)| v == if i < 32 { -1 } else { 0xFF }));
    }
}

#[test]
fn atomics_lose_nothing_between_blocks_on_several_threads() {
    let gpu = fresh();
    let (blocks, threads) = (40usize, 96usize);
    let n = (blocks * threads) as u32;
    let (counters, sum) = (gpu.copied(&[0u32; 5]).unwrap(), gpu.copied(&[0f32]).unwrap());
    let (largest, wide) = (gpu.copied(&[0u32]).unwrap(), gpu.copied(&[1u64]).unwrap());
    let args = [Arg::Buffer(&counters), Arg::Buffer(&sum), Arg::Buffer(&largest), Arg::Buffer(&wide)];
    gpu.launch("atomics", Launch::linear(blocks, threads), &args).unwrap();
    let counters = gpu.read::<u32>(&counters).unwrap();
    assert_eq!(counters[..3], [2 * n, 3 * n, n]);
    // What was left there at last nobody has found.
    assert_eq!(counters[3] + counters[4], (1..=threads as u32).sum::<u32>() * blocks as u32);
    assert_eq!(gpu.read::<f32>(&sum).unwrap(), [n as f32 / 2.0]);
    assert_eq!(gpu.read::<u32>(&largest).unwrap(), [39_095]);
    assert_eq!(gpu.read::<u64>(&wide).unwrap(), [1 + (u64::from(n) << 32)]);
}

#[test]
fn asynchronous_copies_land_group_by_group_with_zeros_for_the_rest() {
    let gpu = fresh();
    let data: Vec<u32> = (1..=512).collect();
    let (x, out) = (gpu.copied(&data).unwrap(), gpu.alloc(DType::U32, 512).unwrap());
    gpu.launch("async_copies", Launch::linear(1, 32), &[Arg::Buffer(&x), Arg::Buffer(&out)]).unwrap();
    for (i, got) in gpu.read::<u32>(&out).unwrap().into_iter().enumerate() {
        let (stage, t, e) = (i / 256, 31 - i / 8 % 32, i % 8);
        let cut = t == 31 && [3, 5, 7].contains(&e);
        assert_eq!(got, if cut { 0 } else { data[(stage * 32 + t) * 8 + e] }, "element {i}");
    }
}

#[test]
fn ldmatrix_spreads_rows_and_columns_over_lanes() {
    let gpu = fresh();
    let out = gpu.alloc(DType::U32, 24 * 32).unwrap();
    gpu.launch("load_matrices", Launch::linear(1, 32), &[Arg::Buffer(&out)]).unwrap();
    let out = gpu.read::<u32>(&out).unwrap();
    for (form, matrices) in [1, 2, 4, 1, 2, 4].into_iter().enumerate() {
        for (m, lane) in (0..matrices).flat_map(|m| (0..32).map(move |l| (m, l))) {
            let element = |row: u32, col: u32| m * 64 + row * 8 + col;
            let (i, j) = (lane / 4, lane % 4 * 2);
            let want = if form < 3 { [element(i, j), element(i, j + 1)] } else { [element(j, i), element(j + 1, i)] };
            let got = out[(form as u32 * 128 + m * 32 + lane) as usize];
            assert_eq!([got & 0xFFFF, got >> 16], want, "form {form}, matrix {m}, lane {lane}");
        }
    }
}

#[test]
fn mma_equals_the_f64_product_for_both_types() {
    let (gpu, mut rng) = (fresh(), noise());
    for is_f16 in [false, true] {
        let values: Vec<f32> = rng.bf16s(16 * 16 + 8 * 16 + 16 * 8, 2.0).iter().map(|v| v.to_f32()).collect();
        let bits = |v: f32| if is_f16 { half::f16::from_f32(v).to_bits() } else { bf16::from_f32(v).to_bits() };
        let exact = |v: f32| if is_f16 { half::f16::from_f32(v).to_f64() } else { f64::from(v) };
        let pairs = |v: &[f32]| -> Vec<u32> {
            v.chunks(2).map(|p| u32::from(bits(p[0])) | u32::from(bits(p[1])) << 16).collect()
        };
        let (a, rest) = values.split_at(256);
        let (b, c) = rest.split_at(128);
        let [ab, bb] = [a, b].map(|v| gpu.copied(&pairs(v)).unwrap());
        let d = gpu.copied(c).unwrap();
        let args = [Arg::Buffer(&ab), Arg::Buffer(&bb), Arg::Buffer(&d), Arg::I32(is_f16.into())];
        gpu.launch("multiply_tile", Launch::linear(1, 32), &args).unwrap();
        for (i, got) in gpu.read::<f32>(&d).unwrap().into_iter().enumerate() {
            let (row, col) = (i / 8, i % 8);
            let terms = (0..16).map(|k| exact(a[row * 16 + k]) * exact(b[col * 16 + k]));
            let want = f64::from(c[i]) + terms.sum::<f64>();
            assert!((f64::from(got) - want).abs() < 2e-5, "element {i}: {got}, not {want}");
        }
    }
}

#[test]
fn a_pipelined_product_of_tiles_equals_f64_under_many_seeds() {
    let (gpu, mut rng) = (fresh(), noise());
    let (m, n, k) = (128usize, 192usize, 320usize);
    let (a, b) = (rng.bf16s(m * k, 1.0), rng.bf16s(n * k, 1.0));
    let mut first: Option<Vec<f32>> = None;
    for round in 0..3 {
        let gpu = gpu.with_seed(rng.next());
        let (ab, bb, cb) = (gpu.copied(&a).unwrap(), gpu.copied(&b).unwrap(), gpu.alloc(DType::F32, m * n).unwrap());
        let shape =
            Launch { grid: [n as u32 / 64, m as u32 / 64, 1], block: [128, 1, 1], shared_bytes: 3 * 2 * 64 * 64 * 2 };
        let args = [Arg::Buffer(&ab), Arg::Buffer(&bb), Arg::Buffer(&cb), Arg::I32(n as i32), Arg::I32(k as i32)];
        let start = std::time::Instant::now();
        gpu.launch("gemm_bf16", shape, &args).unwrap();
        let rate = 2.0 * (m * n * k) as f64 / start.elapsed().as_secs_f64() / 1e9;
        println!("round {round}: mma at {rate:.2} GFLOP/s");
        let got = gpu.read::<f32>(&cb).unwrap();
        for (i, &g) in got.iter().enumerate() {
            let (row, col) = (&a[i / n * k..][..k], &b[i % n * k..][..k]);
            let want: f64 = row.iter().zip(col).map(|(x, y)| x.to_f64() * y.to_f64()).sum();
            assert!((f64::from(g) - want).abs() < 1e-3, "element {i}: {g}, not {want}");
        }
        assert_eq!(*first.get_or_insert(got.clone()), got, "the order of warps must not matter");
    }
}

#[test]
fn tensor_copies_move_swizzled_boxes_through_a_ring_of_mbarriers() {
    let (gpu, mut rng) = (fresh(), noise());
    for (swizzle, width) in [(0, 64), (0, 24), (32, 16), (64, 32), (128, 64)] {
        for rank in [2usize, 3] {
            let size = [40usize + 8 * rng.below(4) as usize, 19, 5];
            let region = [width, 6, 3];
            let data: Vec<u16> = (0..size.iter().take(rank).product::<usize>()).map(|i| i as u16 + 1).collect();
            let x = gpu.copied(&data.iter().map(|&b| bf16::from_bits(b)).collect::<Vec<_>>()).unwrap();
            let map = gpu.tensor_map(&x, &size[..rank], &region[..rank], swizzle).unwrap();
            // Boxes anywhere, also across every edge.
            let boxes = 5;
            let corners: Vec<i32> = (0..boxes * 3).map(|i| rng.below(size[i % 3] as u64 + 10) as i32 - 5).collect();
            let elements = region[..rank].iter().product::<u32>() as usize;
            let (cb, out) = (gpu.copied(&corners).unwrap(), gpu.alloc(DType::U32, boxes * elements / 2).unwrap());
            let bytes = elements * 2;
            let args = [
                Arg::TensorMap(&map),
                Arg::Buffer(&cb),
                Arg::Buffer(&out),
                Arg::I32(boxes as i32),
                Arg::I32(bytes as i32),
                Arg::I32(rank as i32),
            ];
            let shape = Launch::linear(1, 96).shared(2 * bytes.next_multiple_of(1024));
            gpu.launch("copy_boxes", shape, &args).unwrap();
            let out = gpu.read::<u32>(&out).unwrap();
            for (b, corner) in corners.chunks(3).enumerate() {
                for e in 0..elements {
                    let (w, h) = (width as usize, region[1] as usize);
                    let in_box = [e % w, e / w % h, e / w / h];
                    let at: Vec<i64> = (0..rank).map(|i| i64::from(corner[i]) + in_box[i] as i64).collect();
                    let inside = at.iter().zip(size).all(|(&a, s)| (0..s as i64).contains(&a));
                    let index = at.iter().rev().zip(size[..rank].iter().rev()).fold(0, |n, (a, s)| n * *s as i64 + a);
                    let want = if inside { data[index as usize] } else { 0 };
                    // The chunk of 16 bytes: its number within a row of 128 bytes, XORed with the row's.
                    let (chunk, row) = (e * 2 / 16 % 8, e * 2 / 128);
                    let chunk = chunk ^ (row % (swizzle as usize / 16).max(1));
                    let byte = row * 128 + chunk * 16 + e * 2 % 16;
                    let word = out[b * elements / 2 + byte / 4];
                    let got = if byte.is_multiple_of(4) { word & 0xFFFF } else { word >> 16 };
                    assert_eq!(got as u16, want, "swizzle {swizzle}, rank {rank}, box {corner:?}, element {in_box:?}");
                }
            }
        }
    }
}

#[test]
fn wgmma_equals_the_f64_product_in_every_layout() {
    let (gpu, mut rng) = (fresh(), noise());
    for (n, swizzle) in [8usize, 96, 256].into_iter().flat_map(|n| [0, 32, 64, 128].map(|s| (n, s))) {
        let (a, b) = (rng.bf16s(64 * 64, 1.0), rng.bf16s(n * 64, 1.0));
        let (ab, bb, d) = (gpu.copied(&a).unwrap(), gpu.copied(&b).unwrap(), gpu.alloc(DType::F32, 64 * n).unwrap());
        let shape = Launch::linear(1, 128).shared((64 + n) * 64 * 2);
        let run = |registers: i32| {
            let args = [Arg::Buffer(&ab), Arg::Buffer(&bb), Arg::Buffer(&d), Arg::I32(swizzle), Arg::I32(registers)];
            gpu.launch(&format!("wgmma_{n}"), shape, &args).unwrap();
            gpu.read::<f32>(&d).unwrap()
        };
        let shared = run(0);
        for (i, &got) in shared.iter().enumerate() {
            let (row, col) = (&a[i / n * 64..][..64], &b[i % n * 64..][..64]);
            let want: f64 = row.iter().zip(col).map(|(x, y)| x.to_f64() * y.to_f64()).sum();
            assert!((f64::from(got) - want).abs() < 2e-5, "N {n}, swizzle {swizzle}, element {i}: {got}, not {want}");
        }
        assert_eq!(run(1), shared, "A from registers");
    }
}
