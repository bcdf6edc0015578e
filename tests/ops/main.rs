//! Every op's CUDA kernels against f64, on the emulated device as either architecture and on a card where there is one. Seeds are
//! fresh in every run, and printed.
//!
//! The rule for a result: its largest error is at most twice that of a straightforward computation in bf16, beside one rounding
//! of the value itself ([`as_good_as_bf16`]).
#![cfg(emulator)]

mod adamw;
mod alignment;
mod attention;
mod cast;
mod embedding;
mod gelu;
mod kv_cache;
mod linear;
mod loss;
mod patch_embed;
mod rms_norm;
mod rope;
mod rows;
mod sample;
#[path = "../setting/mod.rs"]
mod setting;
mod swiglu;

use half::bf16;
use std::hash::{BuildHasher, RandomState};
use varft::device::{Buffer, Device, Element, Stream};

/// The emulated device as either architecture, with fresh orders of warps.
fn emulated() -> [Device; 2] {
    let seed = RandomState::new().hash_one("seed");
    println!("seed {seed}");
    [80, 90].map(|sm| Device::emulated_as(seed, sm).unwrap())
}

/// The same, and a card where there is one; or the card alone ([`setting`]).
fn devices() -> Vec<Device> {
    let emulated: Vec<Device> = if setting::emulates() { emulated().into() } else { vec![] };
    emulated.into_iter().chain(setting::card()).collect()
}

/// Two devices that must agree to the bit: the emulated one as either architecture; a card with itself.
fn pairs() -> Vec<[Device; 2]> {
    let emulated = setting::emulates().then(emulated);
    emulated.into_iter().chain(setting::card().map(|card| [card.clone(), card])).collect()
}

/// One device, for what is large: a card, where there is one.
fn one() -> Device {
    devices().pop().expect("a card, or the emulated device")
}

/// Random numbers that depend on the seed alone.
struct Noise(u64);

impl Noise {
    /// With a fresh seed.
    fn fresh() -> Noise {
        let seed = RandomState::new().hash_one("noise");
        println!("noise {seed}");
        Noise(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }

    /// In (-scale, scale).
    fn f32s(&mut self, n: usize, scale: f32) -> Vec<f32> {
        let unit = |x: u64| (x >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
        (0..n).map(|_| unit(self.next()) * scale).collect()
    }

    /// The same, rounded.
    fn bf16s(&mut self, n: usize, scale: f32) -> Vec<bf16> {
        self.f32s(n, scale).into_iter().map(bf16::from_f32).collect()
    }
}

/// Waits for the buffer's values.
#[track_caller]
fn read<T: Element>(s: &Stream, b: &Buffer) -> Vec<T> {
    s.read::<T>(b).wait().unwrap()
}

/// That a kernel's result is as good as bf16 allows: its largest error is at most twice that of a straightforward
/// computation in bf16, beside one rounding of the value itself.
#[track_caller]
fn as_good_as_bf16(what: &str, got: &[f64], straightforward: &[f64], want: &[f64]) {
    assert!(got.len() == want.len() && straightforward.len() == want.len(), "{what}: lengths");
    let allowed = 2.0 * straightforward.iter().zip(want).map(|(s, w)| (s - w).abs()).fold(0.0, f64::max);
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= allowed + w.abs() / 256.0, "{what}, element {i}: {g}, not {w} (+- {allowed})");
    }
}

/// bf16 values exactly.
fn wide(values: &[bf16]) -> Vec<f64> {
    values.iter().map(|v| v.to_f64()).collect()
}

/// f32 values exactly.
fn wide32(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v)).collect()
}

/// The nearest bf16: what a computation in bf16 does after every step.
fn round(x: f64) -> f64 {
    bf16::from_f64(x).to_f64()
}
