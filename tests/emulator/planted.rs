//! Kernels with one mistake each, which must be reported with its places, and others that must not.

use super::{fresh, noise};
use half::bf16;
use std::process::Command;
use varft::device::emulated::Emulator;
use varft::device::{Arg, Buffer, DType, Launch};

const PLANTED: [(&str, &str); 2] = [
    ("planted.cu", include_str!("../kernels/planted.cu")),
    ("planted_async.cu", include_str!("../kernels/planted_async.cu")),
];

/// Where a marked line is, as reports name it; nothing is known of lines without binutils' addr2line.
fn place(mark: &str) -> String {
    if Command::new("addr2line").arg("--version").output().is_err() {
        return String::new();
    }
    let marked = |text: &str| text.lines().position(|l| l.ends_with(&format!("// MARK {mark}")));
    let found = PLANTED.iter().find_map(|(file, text)| marked(text).map(|line| format!("{file}:{}", line + 1)));
    found.expect(mark)
}

/// The report of a launch, which must fail, under several seeds; each must hold all of `wanted`.
pub(super) fn caught(kernel: &str, shape: Launch, args: &[Arg<'_>], wanted: &[&str], places: &[&str]) {
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
        Emulator::new(1).unwrap().launch("no_race_of_halves", Launch::linear(1, 32), &[Arg::Buffer(&out)]).unwrap();
    }
}

pub(super) fn floats(n: usize) -> Buffer {
    Emulator::new(0).unwrap().copied(&vec![0f32; n]).unwrap()
}

pub(super) fn ints(n: usize) -> Buffer {
    Emulator::new(0).unwrap().copied(&vec![0i32; n]).unwrap()
}

#[test]
fn deadlocks_name_who_waits_where() {
    let out = floats(96);
    let args = [Arg::Buffer(&out)];
    let both = ["deadlock", "32 in all, at barrier 1 for 64 threads", "64 in all, at __syncthreads"];
    caught("deadlock", Launch::linear(2, 96), &args, &both, &["deadlock-named", "deadlock-all"]);
    let both =
        ["thread (0,0,0) to thread (15,0,0), 16 in all, in __shfl_xor_sync", "thread (16,0,0) to thread (31,0,0)"];
    caught("deadlock_half", Launch::linear(1, 32), &args, &both, &["half-shuffle", "half-barrier"]);
}

#[test]
fn lanes_that_part_are_named() {
    let out = floats(96);
    let args = [Arg::Buffer(&out)];
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
    gpu.launch("uninitialised", Launch::linear(1, 32), &[Arg::Buffer(&out)]).unwrap();
    let out = gpu.read::<f32>(&out).unwrap();
    assert!(out[31].is_nan() && out[..31].iter().all(|&v| v == 1.0));
}

#[test]
fn races_on_shared_memory_are_caught_and_nothing_else_is() {
    let out = ints(128);
    let race = ["race on shared memory", "thread (", "no barrier is between"];
    let without = [Arg::Buffer(&out), Arg::I32(0)];
    caught("race", Launch::linear(1, 128), &without, &race, &["race-write", "race-read"]);
    let gpu = fresh();
    gpu.launch("race", Launch::linear(1, 128), &[Arg::Buffer(&out), Arg::I32(1)]).unwrap();
    assert_eq!(gpu.read::<i32>(&out).unwrap(), (0..128).rev().collect::<Vec<_>>());
    let args = [Arg::Buffer(&out)];
    caught("race_of_rounds", Launch::linear(1, 64), &args, &race, &["rounds-write", "rounds-read"]);
    caught("race_in_warp", Launch::linear(1, 32), &args, &race, &["warp-write", "warp-read"]);
    let out = floats(32);
    fresh().launch("no_race_of_halves", Launch::linear(1, 32), &[Arg::Buffer(&out)]).unwrap();
}

#[test]
fn accesses_out_of_bounds_are_caught_before_they_happen() {
    let (x, out) = (floats(32), floats(32));
    let (to, both) = ([Arg::Buffer(&out)], [Arg::Buffer(&x), Arg::Buffer(&out)]);
    let one = Launch::linear(1, 32);
    let shared = "out of bounds of shared memory: thread (31,0,0) writes 4 bytes";
    let global = "out of bounds of global memory";
    caught("past_static", one, &to, &[shared, "past the end of a static array of 128 bytes"], &["past-static"]);
    caught("past_dynamic", one.shared(128), &to, &[shared, "the dynamic array of 128 bytes"], &["past-dynamic"]);
    caught("past_global", one, &both, &[global, "thread (31,0,0) reads", "of 128 bytes"], &["past-global"]);
    caught("write_past_global", Launch::linear(2, 32), &to, &[global, "block (1,0,0)"], &["write-past-global"]);
    caught("misaligned", Launch::linear(1, 1), &both, &["misaligned", "reads 4 bytes"], &["misaligned"]);
    caught("misaligned_vector", Launch::linear(1, 1), &both, &["misaligned", "reads 16 bytes"], &["misaligned-vector"]);
    let halves = Emulator::new(0).unwrap().copied(&[bf16::ONE; 4]).unwrap();
    let pair = [Arg::Buffer(&halves), Arg::Buffer(&out)];
    caught("misaligned_pair", Launch::linear(1, 1), &pair, &["misaligned", "reads 4 bytes"], &["misaligned-pair"]);
    caught("too_much_shared", one.shared(227 << 10), &to, &["256 more bytes of shared memory"], &["too-much"]);
}

#[test]
fn what_depends_on_the_order_of_warps_depends_on_the_seed_alone() {
    let mut rng = noise();
    let run = |seed: u64| {
        let gpu = Emulator::new(seed).unwrap();
        let (counter, order) = (gpu.copied(&[0u32]).unwrap(), gpu.alloc(DType::U32, 16).unwrap());
        let args = [Arg::Buffer(&counter), Arg::Buffer(&order)];
        gpu.launch("order_dependent", Launch::linear(1, 512), &args).unwrap();
        gpu.read::<u32>(&order).unwrap()
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
    refused("race", one, &[Arg::Buffer(&out)], "kernel race takes (i32*, i32), not (f32*)");
    refused("past_static", Launch::linear(1, 64), &[Arg::Buffer(&out)], "it is written for 32");
    refused("indices", Launch::linear(1, 2000), &[Arg::Null(DType::U32)], "it must have 1 to 1024");
    refused("indices", Launch::linear(0, 32), &[Arg::Null(DType::U32)], "at least one");
    refused("past_dynamic", one.shared(1 << 20), &[Arg::Buffer(&out)], "a block has at most 232448");
    refused("indices", one, &[Arg::Null(DType::U32)], "out of bounds of global memory");
}

#[test]
fn memory_that_was_given_back_is_out_of_bounds() {
    let (gpu, out, address) = (fresh(), floats(1), Emulator::new(0).unwrap().copied(&[0u64]).unwrap());
    let gone = floats(1 << 20);
    gpu.launch("address_of", Launch::linear(1, 1), &[Arg::Buffer(&gone), Arg::Buffer(&address)]).unwrap();
    let args = [Arg::U64(gpu.read::<u64>(&address).unwrap()[0]), Arg::Buffer(&out)];
    gpu.launch("read_address", Launch::linear(1, 1), &args).unwrap();
    drop(gone);
    caught("read_address", Launch::linear(1, 1), &args, &["out of bounds of global memory"], &["read-address"]);
}

#[test]
fn races_between_blocks_are_caught_and_nothing_else_is() {
    let (x, out) = (ints(32), ints(32));
    let two = Launch::linear(2, 32);
    let race = ["race on global memory", "in the same launch, and nothing orders blocks"];
    caught("blocks_write", two, &[Arg::Buffer(&out)], &race, &["blocks-write"]);
    // Which of the two comes second, and is reported, is chance.
    let both = [Arg::Buffer(&x), Arg::Buffer(&out)];
    caught("blocks_read_and_write", two, &both, &race, &[]);
    let [counter, seen] = [0, 0].map(|_| Emulator::new(0).unwrap().copied(&[0u32; 32]).unwrap());
    caught("blocks_update_and_read", two, &[Arg::Buffer(&counter), Arg::Buffer(&seen)], &race, &[]);

    let gpu = fresh();
    gpu.launch("blocks_write", Launch::linear(1, 32), &[Arg::Buffer(&out)]).unwrap();
    gpu.launch("blocks_read_and_write", Launch::linear(1, 32), &both).unwrap();
    let (blocks, n) = (40, 40 * 33);
    let (x, own, halves) = (floats(32), floats(n), gpu.copied(&vec![bf16::ZERO; n]).unwrap());
    let [counter, counters] = [1, blocks].map(|n| gpu.copied(&vec![0u32; n]).unwrap());
    for _ in 0..3 {
        let args = [&x, &halves, &own, &counter, &counters].map(Arg::Buffer);
        gpu.launch("no_race_of_blocks", Launch::linear(blocks, 33), &args).unwrap();
    }
    assert_eq!(gpu.read::<u32>(&counter).unwrap(), [3 * n as u32]);
    assert_eq!(gpu.read::<u32>(&counters).unwrap(), vec![3 * 34; blocks]);
}

#[test]
fn what_the_language_leaves_undefined_is_caught() {
    let gpu = Emulator::new(0).unwrap();
    let (large, out) = (gpu.copied(&[i32::MAX, 0, 32]).unwrap(), floats(1));
    let cases = [
        ("an overflow of a signed sum", "undefined-sum"),
        ("an overflow of a signed product", "undefined-product"),
        ("a division by zero", "undefined-quotient"),
        ("a shift by more bits than there are", "undefined-shift"),
        ("a conversion of a float", "undefined-conversion"),
    ];
    for (which, (what, mark)) in cases.into_iter().enumerate() {
        let args = [Arg::Buffer(&large), Arg::Buffer(&out), Arg::I32(which as i32)];
        caught("undefined", Launch::linear(1, 1), &args, &["undefined behaviour", what], &[mark]);
    }
    let (past, out) = (gpu.copied(&[4i32; 32]).unwrap(), floats(32));
    let args = [Arg::Buffer(&past), Arg::Buffer(&out)];
    caught("past_local", Launch::linear(1, 32), &args, &["an index past the end of an array"], &["past-local"]);
}
