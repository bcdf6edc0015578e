//! Mistakes with what is asynchronous: copies, mbarriers, wgmma, and the fences that they need.

use super::planted::{caught, floats};
use super::{fresh, noise};
use half::bf16;
use varft::device::emulated::Emulator;
use varft::device::{Arg, DType, Launch, TensorMap};

#[test]
fn copies_that_nobody_waited_for_are_caught() {
    let (x, out) = (floats(64), floats(64));
    let args = [Arg::Buffer(&x), Arg::Buffer(&out)];
    let early = ["asynchronous copy not waited for", "has not landed"];
    caught("no_wait", Launch::linear(1, 32), &args, &early, &["no-wait-copy", "no-wait-read"]);
    // Whether the copy has landed or not when the other thread reads is chance; that it must not read is not.
    caught("wait_without_barrier", Launch::linear(1, 64), &args, &[], &["own-wait-copy", "own-wait-read"]);
    caught("copy_at_exit", Launch::linear(1, 32), &args, &["ended before it waited for the copy"], &["exit-copy"]);
}

#[test]
fn tensor_copies_that_are_not_waited_for_or_never_complete_are_caught() {
    let gpu = fresh();
    let x = gpu.copied(&vec![bf16::ONE; 64 * 8]).unwrap();
    let out = gpu.alloc(DType::U32, 32).unwrap();
    let map = gpu.tensor_map(&x, &[64, 8], &[64, 8], 128).unwrap();
    let run = |map: &TensorMap, expected: i32, wait: i32, wanted: &[&str]| {
        let args = [Arg::TensorMap(map), Arg::Buffer(&out), Arg::I32(1024), Arg::I32(expected), Arg::I32(wait)];
        match gpu.launch("box_mistakes", Launch::linear(1, 32).shared(1024), &args) {
            Ok(()) => assert!(wanted.is_empty(), "it went through"),
            Err(e) => wanted.iter().for_each(|w| assert!(e.to_string().contains(w), "{w:?} is missing from:\n{e}")),
        }
    };
    run(&map, 1024, 1, &[]);
    run(
        &map,
        1024,
        0,
        &["asynchronous copy not waited for", "the tensor copy that thread (0,0,0) started", "has not landed"],
    );
    run(&map, 2048, 1, &["deadlock", "32 in all, at the mbarrier at byte", "lacks 0 arrivals and 1024 bytes"]);
}

#[test]
fn a_wgmma_without_its_fences_and_waits_is_caught() {
    let (gpu, mut rng) = (fresh(), noise());
    let x = rng.bf16s(72 * 16, 1.0);
    let (xb, d) = (gpu.copied(&x).unwrap(), gpu.alloc(DType::F32, 64 * 8).unwrap());
    let shape = Launch::linear(1, 128).shared(72 * 32);
    let args =
        |registers: i32, mistake: i32| [Arg::Buffer(&xb), Arg::Buffer(&d), Arg::I32(registers), Arg::I32(mistake)];
    for registers in [0, 1] {
        gpu.launch("wgmma_mistakes", shape, &args(registers, 0)).unwrap();
        for (i, got) in gpu.read::<f32>(&d).unwrap().into_iter().enumerate() {
            let (a, b) = (&x[i / 8 * 16..][..16], &x[(64 + i % 8) * 16..][..16]);
            let want: f64 = a.iter().zip(b).map(|(x, y)| x.to_f64() * y.to_f64()).sum();
            assert!((f64::from(got) - want).abs() < 2e-5, "element {i}: {got}, not {want}");
        }
    }
    let proxy = "no fence.proxy.async is between";
    let cases: [(i32, i32, &[&str], &[&str]); 12] = [
        (0, 1, &["was written by", proxy], &["wgmma", "operand-write"]),
        (1, 1, &["was written by", proxy], &["wgmma-a", "operand-write"]),
        (0, 2, &["was written by", proxy], &["wgmma", "operand-write"]),
        (0, 3, &["no wgmma.fence is before"], &["wgmma"]),
        (1, 3, &["no wgmma.fence is before"], &["wgmma-a"]),
        (0, 4, &["its accumulators were touched after the last wgmma.fence"], &["wgmma"]),
        (1, 5, &["operand A was written after the last wgmma.fence"], &["wgmma-a"]),
        (0, 6, &["at byte 2112", "not in the first row of a pattern, which repeats after 256"], &["wgmma"]),
        (0, 7, &["reads an accumulator", "before it waited"], &["wgmma", "early-read"]),
        (1, 7, &["reads an accumulator", "before it waited"], &["wgmma-a", "early-read"]),
        (1, 8, &["writes operand A", "before it waited"], &["wgmma-a", "a-write"]),
        (0, 9, &["ended before it waited for the wgmma"], &["wgmma"]),
    ];
    for (registers, mistake, wanted, places) in cases {
        caught("wgmma_mistakes", shape, &args(registers, mistake), wanted, places);
    }
}

#[test]
fn a_tensor_copy_without_its_rules_is_caught() {
    let gpu = fresh();
    let data: Vec<bf16> = (0..64 * 8).map(|i| bf16::from_bits(i as u16)).collect();
    let (x, out) = (gpu.copied(&data).unwrap(), gpu.alloc(DType::BF16, 64).unwrap());
    let map = gpu.tensor_map(&x, &[64, 8], &[64, 8], 128).unwrap();
    let shape = Launch::linear(1, 32).shared(2048);
    let args = |mistake: i32| [Arg::TensorMap(&map), Arg::Buffer(&out), Arg::I32(mistake)];
    gpu.launch("copy_mistakes", shape, &args(0)).unwrap();
    assert_eq!(gpu.read::<bf16>(&out).unwrap(), data[..64]);
    let cases: [(i32, &[&str], &[&str]); 6] = [
        (1, &["to what thread (0,0,0) wrote", "no fence.proxy.async is between"], &["box-copy", "box-write"]),
        (2, &["was told of 512 bytes fewer than came"], &[]),
        (3, &["at which all 1 arrivals of this phase have been"], &["second-arrival"]),
        (4, &["aligned to 1024 bytes, as a swizzle of 128 bytes needs it"], &["box-copy"]),
        (5, &["the block ended before anybody waited for the tensor copy"], &["box-copy"]),
        // Of the threads that do not wait, the first to read.
        (6, &["asynchronous copy not waited for"], &["box-copy", "box-read"]),
    ];
    for (mistake, wanted, places) in cases {
        caught("copy_mistakes", shape, &args(mistake), wanted, places);
    }
}

#[test]
fn a_descriptor_must_name_the_swizzle_of_the_copy() {
    let gpu = fresh();
    let (x, d) = (gpu.copied(&[bf16::ONE; 64 * 8]).unwrap(), gpu.alloc(DType::F32, 512).unwrap());
    let map = gpu.tensor_map(&x, &[64, 8], &[64, 8], 128).unwrap();
    let shape = Launch::linear(1, 128).shared(2048);
    let args = |described: i32| [Arg::TensorMap(&map), Arg::Buffer(&d), Arg::I32(described)];
    gpu.launch("described_box", shape, &args(128)).unwrap();
    let wanted = ["described with a swizzle of 64 bytes, and a tensor copy has brought it with one of 128"];
    caught("described_box", shape, &args(64), &wanted, &["described"]);
}

#[test]
fn phases_that_a_wait_cannot_tell_apart_and_bytes_that_never_come_are_caught() {
    let out = Emulator::new(0).unwrap().alloc(DType::U32, 32).unwrap();
    let args = |mistake: i32| [Arg::Buffer(&out), Arg::I32(mistake)];
    let one = Launch::linear(1, 32);
    fresh().launch("phase_mistakes", one, &args(0)).unwrap();
    let passed = ["thread (31,0,0) waits", "for the end of phase 0", "a wait by parity cannot tell"];
    caught("phase_mistakes", one, &args(1), &passed, &["phase-wait"]);
    caught("phase_mistakes", one, &args(2), &["waits for 64 more bytes"], &[]);
}

#[test]
fn boxes_that_the_hardware_does_not_copy_are_refused() {
    let gpu = fresh();
    let x = gpu.copied(&vec![bf16::ONE; 64 * 64]).unwrap();
    let refused = |first: usize, size: &[usize], region: &[u32], swizzle: u32, want: &str| {
        let said = gpu.tensor_map(&x.view(first, 64 * 32), size, region, swizzle).unwrap_err().to_string();
        assert!(said.contains(want), "{want:?} is missing from:\n{said}");
    };
    refused(1, &[64, 8], &[64, 8], 128, "begins at a multiple of 2 bytes, not of 16");
    refused(0, &[60, 8], &[56, 8], 0, "rows are 120 bytes apart, not a multiple of 16");
    refused(0, &[64, 8], &[64, 0], 0, "a side of 0, and must have 1 to 256");
    refused(0, &[64, 8], &[64, 257], 0, "a side of 257, and must have 1 to 256");
    refused(0, &[64, 8], &[12, 8], 0, "a row of 24 bytes, not a multiple of 16");
    refused(0, &[64, 8], &[64, 8], 32, "a row of 128 bytes, and a swizzle of 32");
    refused(0, &[64, 8], &[64, 8], 16, "a swizzle of 16 bytes");
    refused(0, &[64, 64], &[64, 8], 128, "boxes of");
}
