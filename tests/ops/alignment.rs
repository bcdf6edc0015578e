//! Operands that begin anywhere in their memory: the same bits, or a failure that says why; never a load across an alignment.

use super::{Noise, devices, read};
use half::bf16;
use varft::device::{Buffer, DType, Device, Element};
use varft::ops::linear::{self, Epilogue, Weight};
use varft::ops::{rms_norm, swiglu};

/// A copy of `data` that begins `first` elements into its memory.
fn placed<T: Element>(d: &Device, data: &[T], first: usize) -> Buffer {
    let memory = d.zeros(T::DTYPE, first + data.len());
    let b = memory.view(first, data.len());
    d.stream().write(&b, data);
    d.stream().synchronize().unwrap();
    b
}

/// Memory for bf16 results that begins so.
fn room(d: &Device, len: usize, first: usize) -> Buffer {
    d.zeros(DType::BF16, first + len).view(first, len)
}

#[test]
fn rows_at_odd_places_give_the_same_bits() {
    let mut rng = Noise::fresh();
    let (m, n, k) = (5, 24, 64);
    let (x, w, bias, r) = (rng.bf16s(m * k, 1.0), rng.bf16s(n * k, 1.0), rng.bf16s(n, 1.0), rng.bf16s(m * n, 1.0));
    for d in devices() {
        let s = d.stream();
        let weight = Weight { data: d.upload(&w), n, k };
        let run = |first: usize| {
            let x = placed(&d, &x, first);
            let (y, norm, gated) = (room(&d, m * n, first), room(&d, m * k, first), room(&d, m * k / 2, first));
            let (bias, r) = (placed(&d, &bias, first), placed(&d, &r, first));
            linear::forward(&s, &x, &weight, Epilogue::BiasAdd(&bias, &r), &y, m);
            rms_norm::forward(&s, &x, &placed(&d, &w[..k], first), 1e-6, &norm, m, k);
            swiglu::forward(&s, &x, &gated, m, k / 2);
            let db = d.zeros(DType::F32, n);
            linear::backward_bias(&s, &r, &db, m);
            let [y, norm, gated] = [y, norm, gated].map(|b| read::<bf16>(&s, &b));
            (y, norm, gated, s.read::<f32>(&db).wait().unwrap())
        };
        let aligned = run(0);
        for first in [1, 2, 4, 8] {
            assert!(run(first) == aligned, "{d:?}: operands from element {first} on");
        }
    }
}

#[test]
fn a_weight_at_an_odd_place_is_the_same_or_refused() {
    let mut rng = Noise::fresh();
    let (m, n, k) = (3, 16, 64);
    let (x, w) = (rng.bf16s(m * k, 1.0), rng.bf16s(n * k, 1.0));
    for d in devices() {
        let s = d.stream();
        let run = |first: usize| {
            let weight = Weight { data: placed(&d, &w, first), n, k };
            let y = room(&d, m * n, 0);
            linear::forward(&s, &d.upload(&x), &weight, Epilogue::None, &y, m);
            s.read::<bf16>(&y).wait()
        };
        let aligned = run(0).unwrap();
        match run(1) {
            Ok(y) => assert!(y == aligned, "{d:?}"),
            Err(e) => assert!(e.to_string().contains("begins at a multiple of 2 bytes, not of 16"), "{d:?}: {e}"),
        }
    }
}
