//! What the ops' tests share.

use super::simd::Isa;
use crate::device::Device;
use std::cell::Cell;

thread_local! {
    /// What this thread computes with instead of the best.
    pub(crate) static ISA: Cell<Option<Isa>> = const { Cell::new(None) };
}

/// Asserts that `run` gives the same bits with every instruction set that fuses, on a device of this thread alone.
#[track_caller]
pub(crate) fn same_on_every_isa(run: impl Fn(&Device) -> Vec<f32>) {
    let device = Device::cpu(1);
    let results = Isa::available().into_iter().filter(|isa| *isa != Isa::Portable).map(|isa| {
        ISA.set(Some(isa));
        let bits: Vec<u32> = run(&device).into_iter().map(f32::to_bits).collect();
        ISA.set(None);
        bits
    });
    let results: Vec<_> = results.collect();
    assert!(results.windows(2).all(|w| w[0] == w[1]));
}

/// Every kind of device that a result must not depend on: one, two and three threads, and deferred.
pub(crate) fn devices() -> [Device; 4] {
    [Device::cpu(1), Device::cpu(2), Device::cpu(3), Device::cpu_deferred(2)]
}

/// `n` values in (-1, 1) that depend on `seed` alone.
pub(crate) fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut x = seed.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (0..n)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// Asserts `|got - want| <= tol * (1 + |want|)`, element by element.
#[track_caller]
pub(crate) fn close(got: &[f32], want: &[f64], tol: f64) {
    assert_eq!(got.len(), want.len());
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        assert!((g as f64 - w).abs() <= tol * (1.0 + w.abs()), "element {i}: {g}, not {w}");
    }
}
