//! Attention at the shapes of the `mid` preset: 8 query heads over 2 KV heads of 64 in the decoder, 4 heads of 80 in the
//! vision tower. Rates are floating-point operations a second (multiply-adds of visible pairs count two); beside them a
//! matrix product of about the same size, on the same threads.
//!
//! `cargo bench --bench attention`; VARFT_THREADS sets the threads (all cores otherwise).

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::time::Duration;
use varft::device::{Buffer, DType, Device};
use varft::ops::attention::{Segments, paged_backward, paged_forward, varlen_backward, varlen_forward};
use varft::ops::kv_cache::{BLOCK, KvCache};
use varft::ops::linear::{self, Epilogue, Weight};

const HQ: usize = 8;
const HKV: usize = 2;
const HD: usize = 64;

fn device() -> Device {
    Device::cpu(std::env::var("VARFT_THREADS").ok().and_then(|t| t.parse().ok()).unwrap_or(0))
}

fn random(d: &Device, n: usize) -> Buffer {
    let mut x = 1u32;
    let values: Vec<f32> = (0..n)
        .map(|_| {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (x >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect();
    d.upload(&values)
}

/// Segments of (queries, context), each with pages of its own; a cache that holds them.
fn paged(d: &Device, lens: &[(usize, usize)]) -> (Segments, KvCache, usize) {
    let stride = lens.iter().map(|l| l.1.div_ceil(BLOCK)).max().unwrap_or(0);
    let cu: Vec<u32> = std::iter::once(0)
        .chain(lens.iter().scan(0, |a, l| {
            *a += l.0 as u32;
            Some(*a)
        }))
        .collect();
    let tables: Vec<u32> = (0..(lens.len() * stride) as u32).collect();
    let kv: Vec<u32> = lens.iter().map(|l| l.1 as u32).collect();
    let mut cache = KvCache::new(d, 1, lens.len() * stride, HKV, HD);
    let n = cache.layers[0].k.len();
    cache.layers[0].k = random(d, n);
    cache.layers[0].v = random(d, n);
    let seg = Segments {
        cu_seqlens_q: d.upload(&cu),
        kv_lens: d.upload(&kv),
        block_tables: d.upload(&tables),
        stride,
        n: lens.len(),
    };
    (seg, cache, cu[lens.len()] as usize)
}

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
        let (seg, cache, t) = paged(&d, &lens);
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
            let (_, grads, _) = paged(&d, &lens);
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
        let cu: Vec<u32> = std::iter::once(0)
            .chain(windows.iter().scan(0, |a, &w| {
                *a += w as u32;
                Some(*a)
            }))
            .collect();
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
