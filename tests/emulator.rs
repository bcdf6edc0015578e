//! The CUDA emulator: its execution model against what CUDA promises, its checks against kernels with planted mistakes
//! (`tests/kernels/planted.cu`), and the first kernels against f64. Seeds are fresh in every run, and printed.
#![cfg(emulator)]

use half::bf16;
use std::hash::{BuildHasher, RandomState};
use std::path::Path;
use std::process::Command;
use varft::device::DType;
use varft::device::emulated::{Arg, Emulator, Launch, Memory, TensorMap};

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
    gpu.launch("indices", Launch { grid, block, shared_bytes: 0 }, &[Arg::Memory(&out)]).unwrap();
    for (i, got) in out.read::<u32>().unwrap().into_iter().enumerate() {
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
        let (ops, out) = (gpu.upload(&operands).unwrap(), gpu.alloc(DType::I32, 128).unwrap());
        let args = [Arg::Memory(&ops), Arg::I32(width), Arg::Memory(&out)];
        gpu.launch("shuffles", Launch::linear(1, 32), &args).unwrap();
        let out = out.read::<i32>().unwrap();
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
        let (pb, out) = (gpu.upload(&p).unwrap(), gpu.upload(&[0u32; 128]).unwrap());
        gpu.launch("votes", Launch::linear(1, 24), &[Arg::Memory(&pb), Arg::Memory(&out)]).unwrap();
        let out = out.read::<u32>().unwrap();
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
        let (x, out) = (gpu.upload(&data).unwrap(), gpu.alloc(DType::I32, 128).unwrap());
        gpu.launch("producer_consumer", Launch::linear(1, 96), &[Arg::Memory(&x), Arg::Memory(&out)]).unwrap();
        for (i, got) in out.read::<i32>().unwrap().into_iter().enumerate() {
            assert_eq!(got, data[i / 64 * 32 + 31 - i % 32]);
        }
        let out = gpu.alloc(DType::I32, 64).unwrap();
        gpu.launch("warp_reverse", Launch::linear(1, 64), &[Arg::Memory(&x), Arg::Memory(&out)]).unwrap();
        for (i, got) in out.read::<i32>().unwrap().into_iter().enumerate() {
            assert_eq!(got, data[i / 32 * 32 + 31 - i % 32]);
        }
        let out = gpu.alloc(DType::I32, 40).unwrap();
        gpu.launch("early_exit", Launch::linear(1, 128), &[Arg::Memory(&out)]).unwrap();
        assert!(out.read::<i32>().unwrap().iter().enumerate().all(|(i, &v)| v == if i < 32 { -1 } else { 0xFF }));
    }
}

#[test]
fn atomics_lose_nothing_between_blocks_on_several_threads() {
    let gpu = fresh();
    let (blocks, threads) = (40usize, 96usize);
    let n = (blocks * threads) as u32;
    let (counters, sum) = (gpu.upload(&[0u32; 3]).unwrap(), gpu.upload(&[0f32]).unwrap());
    let (largest, wide) = (gpu.upload(&[0u32]).unwrap(), gpu.upload(&[1u64]).unwrap());
    let args = [Arg::Memory(&counters), Arg::Memory(&sum), Arg::Memory(&largest), Arg::Memory(&wide)];
    gpu.launch("atomics", Launch::linear(blocks, threads), &args).unwrap();
    assert_eq!(counters.read::<u32>().unwrap(), [2 * n, 3 * n, n]);
    assert_eq!(sum.read::<f32>().unwrap(), [n as f32 / 2.0]);
    assert_eq!(largest.read::<u32>().unwrap(), [39_095]);
    assert_eq!(wide.read::<u64>().unwrap(), [1 + (u64::from(n) << 32)]);
}

#[test]
fn asynchronous_copies_land_group_by_group_with_zeros_for_the_rest() {
    let gpu = fresh();
    let data: Vec<u32> = (1..=512).collect();
    let (x, out) = (gpu.upload(&data).unwrap(), gpu.alloc(DType::U32, 512).unwrap());
    gpu.launch("async_copies", Launch::linear(1, 32), &[Arg::Memory(&x), Arg::Memory(&out)]).unwrap();
    for (i, got) in out.read::<u32>().unwrap().into_iter().enumerate() {
        let (stage, t, e) = (i / 256, 31 - i / 8 % 32, i % 8);
        let cut = t == 31 && [3, 5, 7].contains(&e);
        assert_eq!(got, if cut { 0 } else { data[(stage * 32 + t) * 8 + e] }, "element {i}");
    }
}

#[test]
fn ldmatrix_spreads_rows_and_columns_over_lanes() {
    let gpu = fresh();
    let out = gpu.alloc(DType::U32, 24 * 32).unwrap();
    gpu.launch("load_matrices", Launch::linear(1, 32), &[Arg::Memory(&out)]).unwrap();
    let out = out.read::<u32>().unwrap();
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
        let [ab, bb] = [a, b].map(|v| gpu.upload(&pairs(v)).unwrap());
        let d = gpu.upload(c).unwrap();
        let args = [Arg::Memory(&ab), Arg::Memory(&bb), Arg::Memory(&d), Arg::I32(is_f16.into())];
        gpu.launch("multiply_tile", Launch::linear(1, 32), &args).unwrap();
        for (i, got) in d.read::<f32>().unwrap().into_iter().enumerate() {
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
        let (ab, bb, cb) = (gpu.upload(&a).unwrap(), gpu.upload(&b).unwrap(), gpu.alloc(DType::F32, m * n).unwrap());
        let shape =
            Launch { grid: [n as u32 / 64, m as u32 / 64, 1], block: [128, 1, 1], shared_bytes: 3 * 2 * 64 * 64 * 2 };
        let args = [Arg::Memory(&ab), Arg::Memory(&bb), Arg::Memory(&cb), Arg::I32(n as i32), Arg::I32(k as i32)];
        let start = std::time::Instant::now();
        gpu.launch("gemm_bf16", shape, &args).unwrap();
        let rate = 2.0 * (m * n * k) as f64 / start.elapsed().as_secs_f64() / 1e9;
        println!("round {round}: mma at {rate:.2} GFLOP/s");
        let got = cb.read::<f32>().unwrap();
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
            let x = gpu.upload(&data.iter().map(|&b| bf16::from_bits(b)).collect::<Vec<_>>()).unwrap();
            let map = TensorMap::new(&x, &size[..rank], &region[..rank], swizzle).unwrap();
            // Boxes anywhere, also across every edge.
            let boxes = 5;
            let corners: Vec<i32> = (0..boxes * 3).map(|i| rng.below(size[i % 3] as u64 + 10) as i32 - 5).collect();
            let elements = region[..rank].iter().product::<u32>() as usize;
            let (cb, out) = (gpu.upload(&corners).unwrap(), gpu.alloc(DType::U32, boxes * elements / 2).unwrap());
            let bytes = elements * 2;
            let args = [
                Arg::TensorMap(&map),
                Arg::Memory(&cb),
                Arg::Memory(&out),
                Arg::I32(boxes as i32),
                Arg::I32(bytes as i32),
                Arg::I32(rank as i32),
            ];
            let shape = Launch::linear(1, 96).shared(2 * bytes.next_multiple_of(1024));
            gpu.launch("copy_boxes", shape, &args).unwrap();
            let out = out.read::<u32>().unwrap();
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
fn wgmma_equals_the_f64_product_in_every_layout_and_lands_at_its_wait() {
    let (gpu, mut rng) = (fresh(), noise());
    for (n, swizzle) in [8usize, 96, 256].into_iter().flat_map(|n| [0, 32, 64, 128].map(|s| (n, s))) {
        let (a, b) = (rng.bf16s(64 * 64, 1.0), rng.bf16s(n * 64, 1.0));
        let (ab, bb, d) = (gpu.upload(&a).unwrap(), gpu.upload(&b).unwrap(), gpu.alloc(DType::F32, 64 * n).unwrap());
        let shape = Launch::linear(1, 128).shared((64 + n) * 64 * 2);
        let run = |registers: i32, early: i32| {
            let layout = [swizzle, registers, early].map(Arg::I32);
            let args = [Arg::Memory(&ab), Arg::Memory(&bb), Arg::Memory(&d), layout[0], layout[1], layout[2]];
            gpu.launch(&format!("wgmma_{n}"), shape, &args).unwrap();
            d.read::<f32>().unwrap()
        };
        let shared = run(0, 0);
        for (i, &got) in shared.iter().enumerate() {
            let (row, col) = (&a[i / n * 64..][..64], &b[i % n * 64..][..64]);
            let want: f64 = row.iter().zip(col).map(|(x, y)| x.to_f64() * y.to_f64()).sum();
            assert!((f64::from(got) - want).abs() < 2e-5, "N {n}, swizzle {swizzle}, element {i}: {got}, not {want}");
        }
        assert_eq!(run(1, 0), shared, "A from registers");
        assert!(run(0, 1)[..128].iter().all(|v| v.is_nan()), "accumulators before their wait");
    }
}

// ---- planted mistakes ----

const PLANTED: &str = include_str!("kernels/planted.cu");

/// Where a marked line is, as reports name it; nothing is known of lines without binutils' addr2line.
fn place(mark: &str) -> String {
    if Command::new("addr2line").arg("--version").output().is_err() {
        return String::new();
    }
    let line = PLANTED.lines().position(|l| l.ends_with(&format!("// MARK {mark}"))).expect(mark);
    format!("planted.cu:{}", line + 1)
}

/// The report of a launch, which must fail, under several seeds; each must hold all of `wanted`.
fn caught(kernel: &str, shape: Launch, args: &[Arg<'_>], wanted: &[&str], places: &[&str]) {
    let mut rng = noise();
    for _ in 0..5 {
        let seed = rng.next();
        let report = match Emulator::new(seed).unwrap().launch(kernel, shape, args) {
            Ok(()) => panic!("{kernel} went through with seed {seed}"),
            Err(e) => e.to_string(),
        };
        let seed = format!("seed {seed}");
        let places: Vec<String> = places.iter().map(|m| place(m)).collect();
        let all = wanted.iter().copied().chain(places.iter().map(String::as_str)).chain([kernel, "block (", &seed]);
        for want in all {
            assert!(report.contains(want), "{want:?} is missing from:\n{report}");
        }
        // Still usable: a clean launch follows.
        let out = Emulator::new(1).unwrap().alloc(DType::F32, 32).unwrap();
        Emulator::new(1).unwrap().launch("no_race_of_halves", Launch::linear(1, 32), &[Arg::Memory(&out)]).unwrap();
    }
}

fn floats(n: usize) -> Memory {
    Emulator::new(0).unwrap().upload(&vec![0f32; n]).unwrap()
}

fn ints(n: usize) -> Memory {
    Emulator::new(0).unwrap().upload(&vec![0i32; n]).unwrap()
}

#[test]
fn deadlocks_name_who_waits_where() {
    let out = floats(96);
    let args = [Arg::Memory(&out)];
    let both = ["deadlock", "32 in all, at barrier 1 for 64 threads", "64 in all, at __syncthreads"];
    caught("deadlock", Launch::linear(2, 96), &args, &both, &["deadlock-named", "deadlock-all"]);
    let both =
        ["thread (0,0,0) to thread (15,0,0), 16 in all, in __shfl_xor_sync", "thread (16,0,0) to thread (31,0,0)"];
    caught("deadlock_half", Launch::linear(1, 32), &args, &both, &["half-shuffle", "half-barrier"]);
}

#[test]
fn lanes_that_part_are_named() {
    let out = floats(96);
    let args = [Arg::Memory(&out)];
    let both = ["divergent warp", "__shfl_xor_sync", "__ballot_sync"];
    caught("divergent", Launch::linear(1, 32), &args, &both, &["divergent-shuffle", "divergent-ballot"]);
    caught("not_in_mask", Launch::linear(1, 32), &args, &["lacks its own lane"], &["not-in-mask"]);
    caught("mma_by_half_a_warp", Launch::linear(1, 32), &args, &["needs all 32 lanes"], &["half-mma"]);
    let both = ["barrier 3 for 64 threads", "for 96 threads"];
    caught("barrier_counts", Launch::linear(1, 96), &args, &["barrier 3", both[1]], &["count-64", "count-96"]);
}

#[test]
fn shared_memory_that_nobody_wrote_is_nan() {
    let (gpu, out) = (fresh(), floats(32));
    gpu.launch("uninitialised", Launch::linear(1, 32), &[Arg::Memory(&out)]).unwrap();
    let out = out.read::<f32>().unwrap();
    assert!(out[31].is_nan() && out[..31].iter().all(|&v| v == 1.0));
}

#[test]
fn races_on_shared_memory_are_caught_and_nothing_else_is() {
    let out = ints(128);
    let race = ["race on shared memory", "thread (", "no barrier is between"];
    let without = [Arg::Memory(&out), Arg::I32(0)];
    caught("race", Launch::linear(1, 128), &without, &race, &["race-write", "race-read"]);
    fresh().launch("race", Launch::linear(1, 128), &[Arg::Memory(&out), Arg::I32(1)]).unwrap();
    assert_eq!(out.read::<i32>().unwrap(), (0..128).rev().collect::<Vec<_>>());
    let args = [Arg::Memory(&out)];
    caught("race_of_rounds", Launch::linear(1, 64), &args, &race, &["rounds-write", "rounds-read"]);
    caught("race_in_warp", Launch::linear(1, 32), &args, &race, &["warp-write", "warp-read"]);
    let out = floats(32);
    fresh().launch("no_race_of_halves", Launch::linear(1, 32), &[Arg::Memory(&out)]).unwrap();
}

#[test]
fn copies_that_nobody_waited_for_are_caught() {
    let (x, out) = (floats(64), floats(64));
    let args = [Arg::Memory(&x), Arg::Memory(&out)];
    let early = ["asynchronous copy not waited for", "has not landed"];
    caught("no_wait", Launch::linear(1, 32), &args, &early, &["no-wait-copy", "no-wait-read"]);
    // Whether the copy has landed or not when the other thread reads is chance; that it must not read is not.
    caught("wait_without_barrier", Launch::linear(1, 64), &args, &[], &["own-wait-copy", "own-wait-read"]);
}

#[test]
fn tensor_copies_that_are_not_waited_for_or_never_complete_are_caught() {
    let gpu = fresh();
    let x = gpu.upload(&vec![bf16::ONE; 64 * 8]).unwrap();
    let out = gpu.alloc(DType::U32, 32).unwrap();
    let map = TensorMap::new(&x, &[64, 8], &[64, 8], 128).unwrap();
    let run = |map: &TensorMap, expected: i32, wait: i32, wanted: &[&str]| {
        let args = [Arg::TensorMap(map), Arg::Memory(&out), Arg::I32(1024), Arg::I32(expected), Arg::I32(wait)];
        match gpu.launch("box_mistakes", Launch::linear(1, 32).shared(1024), &args) {
            Ok(()) => assert!(wanted.is_empty(), "it went through"),
            Err(e) => wanted.iter().for_each(|w| assert!(e.to_string().contains(w), "{w:?} is missing from:\n{e}")),
        }
    };
    run(&map, 1024, 1, &[]);
    run(&map, 1024, 0, &["asynchronous copy not waited for", "tensor copy has not landed"]);
    run(&map, 2048, 1, &["deadlock", "32 in all, at the mbarrier at byte"]);
    run(&TensorMap::new(&x, &[64, 8], &[64, 8], 32).unwrap(), 1024, 1, &["not as long as the swizzle"]);
    run(&TensorMap::new(&x, &[60, 8], &[56, 8], 0).unwrap(), 1024, 1, &["not multiples of 16"]);
}

#[test]
fn accesses_out_of_bounds_are_caught_before_they_happen() {
    let (x, out) = (floats(32), floats(32));
    let (to, both) = ([Arg::Memory(&out)], [Arg::Memory(&x), Arg::Memory(&out)]);
    let one = Launch::linear(1, 32);
    let shared = "out of bounds of shared memory: thread (31,0,0) writes 4 bytes";
    let global = "out of bounds of global memory";
    caught("past_static", one, &to, &[shared, "past the end of a static array of 128 bytes"], &["past-static"]);
    caught("past_dynamic", one.shared(128), &to, &[shared, "the dynamic array of 128 bytes"], &["past-dynamic"]);
    caught("past_global", one, &both, &[global, "thread (31,0,0) reads", "of 128 bytes"], &["past-global"]);
    caught("write_past_global", Launch::linear(2, 32), &to, &[global, "block (1,0,0)"], &["write-past-global"]);
    caught("misaligned", Launch::linear(1, 1), &both, &["misaligned", "reads 4 bytes"], &["misaligned"]);
    caught("misaligned_vector", Launch::linear(1, 1), &both, &["misaligned", "reads 16 bytes"], &["misaligned-vector"]);
    caught("too_much_shared", one.shared(227 << 10), &to, &["256 more bytes of shared memory"], &["too-much"]);
}

#[test]
fn what_depends_on_the_order_of_warps_depends_on_the_seed_alone() {
    let mut rng = noise();
    let run = |seed: u64| {
        let gpu = Emulator::new(seed).unwrap();
        let (counter, order) = (gpu.upload(&[0u32]).unwrap(), gpu.alloc(DType::U32, 16).unwrap());
        let args = [Arg::Memory(&counter), Arg::Memory(&order)];
        gpu.launch("order_dependent", Launch::linear(1, 512), &args).unwrap();
        order.read::<u32>().unwrap()
    };
    let orders: Vec<Vec<u32>> = (0..8)
        .map(|_| rng.next())
        .map(|s| (run(s), run(s)))
        .map(|(a, b)| {
            assert_eq!(a, b, "one seed, one order");
            a
        })
        .collect();
    assert!(orders.iter().any(|o| *o != orders[0]), "eight seeds, one order");
}

#[test]
fn launches_that_do_not_fit_their_kernel_are_refused() {
    let (gpu, out) = (fresh(), floats(32));
    let refused = |kernel: &str, shape: Launch, args: &[Arg<'_>], want: &str| {
        let report = gpu.launch(kernel, shape, args).unwrap_err().to_string();
        assert!(report.contains(want), "{want:?} is missing from:\n{report}");
    };
    let one = Launch::linear(1, 32);
    refused("no_such_kernel", one, &[], "no kernel is named no_such_kernel");
    refused("race", one, &[Arg::Memory(&out)], "kernel race takes (i32*, i32), not (f32*)");
    refused("past_static", Launch::linear(1, 64), &[Arg::Memory(&out)], "it is written for 32");
    refused("indices", Launch::linear(1, 2000), &[Arg::Null(DType::U32)], "it must have 1 to 1024");
    refused("indices", Launch::linear(0, 32), &[Arg::Null(DType::U32)], "at least one");
    refused("past_dynamic", one.shared(1 << 20), &[Arg::Memory(&out)], "a block has at most 232448");
    refused("indices", one, &[Arg::Null(DType::U32)], "out of bounds of global memory");
}

// ---- kernels ----

/// That the kernel's result is as good as bf16 allows: its largest error is at most twice that of a straightforward
/// computation in bf16, beside one rounding of the value itself.
#[track_caller]
fn as_good_as_bf16(what: &str, got: &[f64], straightforward: &[f64], want: &[f64]) {
    assert!(got.len() == want.len() && straightforward.len() == want.len());
    let allowed = 2.0 * straightforward.iter().zip(want).map(|(s, w)| (s - w).abs()).fold(0.0, f64::max);
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= allowed + w.abs() / 256.0, "{what}, element {i}: {g}, not {w} (+- {allowed})");
    }
}

fn wide(values: &[bf16]) -> Vec<f64> {
    values.iter().map(|v| v.to_f64()).collect()
}

/// The nearest bf16: what a computation in bf16 does after every step.
fn round(x: f64) -> f64 {
    bf16::from_f64(x).to_f64()
}

const EPS: f32 = 1e-6;
/// One row, one column, widths that are no multiple of 8, more than one step of a block, more rows than blocks.
const SHAPES: [(usize, usize); 6] = [(1, 1), (1, 2048), (3, 17), (5, 1280), (33, 200), (4, 1031)];

#[test]
fn rms_norm_forward_with_and_without_a_residual() {
    let (gpu, mut rng) = (fresh(), noise());
    for (rows, cols) in SHAPES {
        let (x, r, w) = (rng.bf16s(rows * cols, 3.0), rng.bf16s(rows * cols, 1.0), rng.bf16s(cols, 2.0));
        let [xb, rb, wb] = [&x, &r, &w].map(|v| gpu.upload(v).unwrap());
        let [h, y] = [(); 2].map(|()| gpu.alloc(DType::BF16, rows * cols).unwrap());
        for residual in [false, true] {
            let none = Arg::Null(DType::BF16);
            let (r_arg, h_arg) = if residual { (Arg::Memory(&rb), Arg::Memory(&h)) } else { (none, none) };
            let shape = Launch::linear(rows, 128);
            let [xa, wa, ya] = [&xb, &wb, &y].map(Arg::Memory);
            let args = [xa, r_arg, wa, h_arg, ya, Arg::I32(cols as i32), Arg::F32(EPS)];
            gpu.launch("rms_norm_forward", shape, &args).unwrap();
            let sum: Vec<f64> = (0..rows * cols)
                .map(|i| if residual { round(x[i].to_f64() + r[i].to_f64()) } else { x[i].to_f64() })
                .collect();
            if residual {
                assert_eq!(wide(&h.read::<bf16>().unwrap()), sum, "the sum, rounded once");
            }
            let (mut want, mut straightforward) = (vec![], vec![]);
            for row in sum.chunks(cols) {
                let k = 1.0 / (row.iter().map(|v| v * v).sum::<f64>() / cols as f64 + f64::from(EPS)).sqrt();
                want.extend(row.iter().zip(&w).map(|(v, w)| v * k * w.to_f64()));
                straightforward.extend(row.iter().zip(&w).map(|(v, w)| round(round(v * round(k)) * w.to_f64())));
            }
            let what = format!("[{rows}, {cols}], residual {residual}");
            as_good_as_bf16(&what, &wide(&y.read::<bf16>().unwrap()), &straightforward, &want);
        }
    }
}

#[test]
fn rms_norm_backward_and_the_weights_gradient() {
    let (gpu, mut rng) = (fresh(), noise());
    for (rows, cols) in SHAPES {
        let blocks = rows.min(4);
        let [h, dy, dr] = [3.0, 1.0, 1.0].map(|scale| rng.bf16s(rows * cols, scale));
        let w = rng.bf16s(cols, 2.0);
        let before: Vec<f32> = rng.bf16s(cols, 1.0).iter().map(|v| v.to_f32()).collect();
        let (mut want, mut plain) = (wide(&dr), wide(&dr));
        let mut want_dw: Vec<f64> = before.iter().map(|&v| f64::from(v)).collect();
        let mut plain_dw = want_dw.clone();
        for r in 0..rows {
            let at = |v: &[bf16], c: usize| v[r * cols + c].to_f64();
            let squares = (0..cols).map(|c| at(&h, c).powi(2)).sum::<f64>() / cols as f64;
            let k = 1.0 / (squares + f64::from(EPS)).sqrt();
            let dot = (0..cols).map(|c| at(&dy, c) * w[c].to_f64() * at(&h, c)).sum::<f64>() / cols as f64;
            for c in 0..cols {
                let (v, g) = (at(&h, c), at(&dy, c) * w[c].to_f64());
                want[r * cols + c] += k * (g - v * k * k * dot);
                want_dw[c] += at(&dy, c) * v * k;
                // Every step rounded.
                let (k, normal) = (round(k), round(v * round(k)));
                let grad = round(k * round(round(g) - round(normal * round(round(dot) * k))));
                plain[r * cols + c] = round(plain[r * cols + c] + grad);
                plain_dw[c] = round(plain_dw[c] + round(at(&dy, c) * normal));
            }
        }
        let [hb, wb, dyb, drb] = [&h, &w, &dy, &dr].map(|v| gpu.upload(v).unwrap());
        let (dw, partial) = (gpu.upload(&before).unwrap(), gpu.alloc(DType::F32, blocks * cols).unwrap());
        let shape = Launch::linear(blocks, 128).shared(cols * 4);
        let [rows_arg, cols_arg, eps] = [Arg::I32(rows as i32), Arg::I32(cols as i32), Arg::F32(EPS)];
        let [ha, wa, dya, dra] = [&hb, &wb, &dyb, &drb].map(Arg::Memory);
        // In place: the gradient joins the residual stream's.
        let args = [ha, wa, dya, dra, dra, Arg::Memory(&partial), rows_arg, cols_arg, eps];
        gpu.launch("rms_norm_backward", shape, &args).unwrap();
        let args = [Arg::Memory(&partial), Arg::Memory(&dw), Arg::I32(blocks as i32), cols_arg];
        gpu.launch("rms_norm_weight_gradient", Launch::linear(cols.div_ceil(128), 128), &args).unwrap();
        let what = format!("[{rows}, {cols}]");
        let got = drb.read::<bf16>().unwrap();
        as_good_as_bf16(&what, &wide(&got), &plain, &want);
        let got_dw: Vec<f64> = dw.read::<f32>().unwrap().into_iter().map(f64::from).collect();
        as_good_as_bf16(&format!("dw of {what}"), &got_dw, &plain_dw, &want_dw);
        // A frozen weight, out of place, more blocks than rows: the same bits.
        let (drb, dh) = (gpu.upload(&dr).unwrap(), gpu.alloc(DType::BF16, rows * cols).unwrap());
        let dra = Arg::Memory(&drb);
        let args = [ha, wa, dya, dra, Arg::Memory(&dh), Arg::Null(DType::F32), rows_arg, cols_arg, eps];
        gpu.launch("rms_norm_backward", Launch::linear(rows + 3, 128).shared(cols * 4), &args).unwrap();
        assert_eq!(dh.read::<bf16>().unwrap(), got);
    }
}

#[test]
fn swiglu_forward_and_backward_also_in_place() {
    let (gpu, mut rng) = (fresh(), noise());
    for (rows, width) in [(1, 1), (1, 2048), (3, 19), (5, 1000), (7, 129)] {
        let mut x = rng.bf16s(rows * 2 * width, 6.0);
        x[0] = bf16::from_f32(-120.0); // far in the tail: the exponential overflows
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
        let (xb, dhb) = (gpu.upload(&x).unwrap(), gpu.upload(&dh).unwrap());
        let h = gpu.alloc(DType::BF16, rows * width).unwrap();
        let dx = gpu.alloc(DType::BF16, rows * 2 * width).unwrap();
        let shape = Launch::linear((width.div_ceil(8) * rows).div_ceil(256), 256);
        let size = [Arg::I32(rows as i32), Arg::I32(width as i32)];
        gpu.launch("swiglu_forward", shape, &[Arg::Memory(&xb), Arg::Memory(&h), size[0], size[1]]).unwrap();
        let what = format!("[{rows}, {width}]");
        as_good_as_bf16(&what, &wide(&h.read::<bf16>().unwrap()), &plain, &want);
        let [xa, dha, dxa] = [&xb, &dhb, &dx].map(Arg::Memory);
        gpu.launch("swiglu_backward", shape, &[xa, dha, dxa, size[0], size[1]]).unwrap();
        let got = dx.read::<bf16>().unwrap();
        as_good_as_bf16(&format!("dx of {what}"), &wide(&got), &plain_dx, &want_dx);
        gpu.launch("swiglu_backward", shape, &[xa, dha, xa, size[0], size[1]]).unwrap();
        assert_eq!(xb.read::<bf16>().unwrap(), got, "in place");
    }
}

#[test]
fn rows_do_not_depend_on_their_company_and_rates_are_printed() {
    let (gpu, mut rng) = (fresh(), noise());
    let (rows, cols) = (512usize, 256usize);
    let (x, w) = (rng.bf16s(rows * cols, 1.0), rng.bf16s(cols, 1.0));
    let wb = gpu.upload(&w).unwrap();
    let run = |x: &[bf16]| {
        let (xb, y) = (gpu.upload(x).unwrap(), gpu.alloc(DType::BF16, x.len()).unwrap());
        let none = Arg::Null(DType::BF16);
        let args = [Arg::Memory(&xb), none, Arg::Memory(&wb), none, Arg::Memory(&y), Arg::I32(256), Arg::F32(EPS)];
        let start = std::time::Instant::now();
        gpu.launch("rms_norm_forward", Launch::linear(x.len() / cols, 128), &args).unwrap();
        (y.read::<bf16>().unwrap(), (x.len() / cols) as f64 / start.elapsed().as_secs_f64())
    };
    let (all, rate) = run(&x);
    println!("rms_norm_forward: {rate:.0} blocks of 128 threads a second");
    assert_eq!(run(&x[300 * cols..301 * cols]).0, all[300 * cols..301 * cols]);
}

// ---- AddressSanitizer ----

/// The same sources, with AddressSanitizer in place of the emulator's own checks of loads and stores: it also sees a thread's
/// own arrays, and the emulator itself.
#[test]
fn address_sanitizer_finds_no_mistake_but_the_planted_ones() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulator-asan");
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "g++".into());
    let built = Command::new(compiler)
        .args(["-std=c++17", "-O1", "-g1", "-fsanitize=address", "-Wno-unknown-pragmas", "-I"])
        .arg(root.join("kernels"))
        .arg(root.join("tests/kernels/asan.cpp"))
        .arg("-o")
        .arg(&out)
        .args(["-ldl", "-lpthread"])
        .output();
    match built {
        Ok(o) if o.status.success() => {}
        Ok(o) if String::from_utf8_lossy(&o.stderr).contains("asan") => {
            return println!("skipped: this compiler has no AddressSanitizer: {}", String::from_utf8_lossy(&o.stderr));
        }
        Ok(o) => panic!("{}", String::from_utf8_lossy(&o.stderr)),
        Err(e) => return println!("skipped: no C++ compiler to build with AddressSanitizer: {e}"),
    }
    // Stacks are switched by hand, which its check for use after return cannot follow.
    let run = |case: &str| {
        let options = "detect_stack_use_after_return=0:detect_leaks=0";
        let o = Command::new(&out).arg(case).env("ASAN_OPTIONS", options).output().unwrap();
        (o.status.success(), String::from_utf8_lossy(&o.stderr).into_owned() + &String::from_utf8_lossy(&o.stdout))
    };
    let (well, said) = run("clean");
    assert!(well, "{said}");
    for (case, want) in [
        ("past_local", "stack-buffer-overflow"),
        ("past_static", "use-after-poison"),
        ("past_dynamic", "use-after-poison"),
        ("past_global", "use-after-poison"),
    ] {
        let (well, said) = run(case);
        assert!(!well && said.contains(want) && said.contains(case), "{case}: {want} is missing from:\n{said}");
    }
}
