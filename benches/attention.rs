//! Attention at the shapes of the `mid` preset: 8 query heads over 2 KV heads of 64 in the decoder, 4 heads of 80 in the
//! vision tower. Rates are floating-point operations a second (multiply-adds of visible pairs count two); beside them a
//! matrix product of about the same size, on the same threads.
//!
//! `cargo bench --bench attention`; BENCH_THREADS sets the threads (all cores otherwise).

mod harness;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use harness::device;
use harness::operands::{cu_seqlens, paged, random};
use std::time::Duration;
use varft::device::DType;
use varft::ops::attention::{paged_backward, paged_forward, varlen_backward, varlen_forward};
use varft::ops::linear::{self, Epilogue, Weight};

const HQ: usize = 8;
const HKV: usize = 2;
const HD: usize = 64;

fn decoder(c: &mut Criterion) {
    let d = device();
    let s = d.stream();
    let scale = 1.0 / (HD as f32).sqrt();
    let cases: [(&str, Vec<(usize, usize)>); 6] = [
        ("decode/b1", vec![(1, 365)]),
        ("decode/b8", vec![(1, 365); 8]),
        ("decode/b32", vec![(1, 365); 32]),
        ("prefill/300", vec![(300, 300)]),
        ("prefill/512", vec![(512, 512)]),
        ("train/4x512", vec![(512, 512); 4]),
    ];
    for (name, lens) in cases {
        let (seg, cache, t) = paged(&d, &lens, HKV, HD);
        let pairs: usize = lens.iter().map(|&(q, kv)| (0..q).map(|i| kv - q + i + 1).sum::<usize>()).sum();
        let (stride, layer) = ((HQ + 2 * HKV) * HD, &cache.layers[0]);
        let q = random(&d, t * stride);
        let (out, lse) = (d.zeros(DType::F32, t * HQ * HD), d.zeros(DType::F32, t * HQ));
        let mut g = c.benchmark_group(name);
        g.measurement_time(Duration::from_secs(2)).throughput(Throughput::Elements((pairs * HQ * HD * 4) as u64));
        g.bench_function("forward", |b| {
            b.iter(|| {
                paged_forward(&s, &q, stride, layer, &seg, HQ, HKV, HD, scale, &out, Some(&lse));
                s.synchronize()
            });
        });
        if name.starts_with("train") {
            let (_, grads, _) = paged(&d, &lens, HKV, HD);
            let (dout, dq, dkv) = (random(&d, t * HQ * HD), d.zeros(DType::F32, t * stride), &grads.layers[0]);
            g.throughput(Throughput::Elements((pairs * HQ * HD * 10) as u64));
            g.bench_function("backward", |b| {
                b.iter(|| {
                    paged_backward(&s, &q, stride, layer, &seg, HQ, HKV, HD, scale, &out, &lse, &dout, &dq, dkv);
                    s.synchronize()
                });
            });
        }
        g.finish();
    }
}

fn vision(c: &mut Criterion) {
    let d = device();
    let s = d.stream();
    let (h, hd) = (4, 80);
    let scale = 1.0 / (hd as f32).sqrt();
    for (name, windows) in [
        ("vision/windows", vec![64, 64, 32, 64, 64, 32, 32, 32, 16]),
        ("vision/full", vec![400]),
        ("vision/full-x8", vec![400; 8]),
    ] {
        let t: usize = windows.iter().sum();
        let cu = cu_seqlens(windows.iter().copied());
        let pairs: usize = windows.iter().map(|w| w * w).sum();
        let (n, cu, qkv) = (windows.len(), d.upload(&cu), random(&d, t * 3 * h * hd));
        let (out, lse) = (d.zeros(DType::F32, t * h * hd), d.zeros(DType::F32, t * h));
        let (dout, dqkv) = (random(&d, t * h * hd), d.zeros(DType::F32, t * 3 * h * hd));
        let mut g = c.benchmark_group(name);
        g.measurement_time(Duration::from_secs(2)).throughput(Throughput::Elements((pairs * h * hd * 4) as u64));
        g.bench_function("forward", |b| {
            b.iter(|| {
                varlen_forward(&s, &qkv, &cu, n, h, hd, scale, false, &out, Some(&lse));
                s.synchronize()
            });
        });
        g.throughput(Throughput::Elements((pairs * h * hd * 10) as u64));
        g.bench_function("backward", |b| {
            b.iter(|| {
                varlen_backward(&s, &qkv, &cu, n, h, hd, scale, false, &out, &lse, &dout, &dqkv);
                s.synchronize()
            });
        });
        g.finish();
    }
}

/// The yardstick: a product with about the operations of a 512-token prefill.
fn product(c: &mut Criterion) {
    let d = device();
    let s = d.stream();
    let (m, k, n) = (512, 512, 512);
    let w = Weight { data: random(&d, linear::packed_len(n, k)), n, k };
    let (x, y) = (random(&d, m * k), d.zeros(DType::F32, m * n));
    let mut g = c.benchmark_group("product/512x512x512");
    g.measurement_time(Duration::from_secs(2)).throughput(Throughput::Elements((2 * m * k * n) as u64));
    g.bench_function("forward", |b| {
        b.iter(|| {
            linear::forward(&s, &x, &w, Epilogue::None, &y, m);
            s.synchronize()
        });
    });
    g.finish();
}

criterion_group!(benches, product, decoder, vision);
criterion_main!(benches);
