//! [`varft::ops::adamw`].

use super::{Noise, devices, pairs, read, wide32};
use half::bf16;
use varft::device::{DType, Device};
use varft::ops::adamw::{AdamW, Params, grad_norm, step};

const HYPER: AdamW = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 };
const SCALE: f32 = 0.37;
/// More than a block, no multiple of a vector, less than one, none.
const LENGTHS: [usize; 4] = [4099, 2048, 5, 0];

/// The published update, in f64; gives the parameters.
fn published(p: &mut [f64], g: &[f32], m: &mut [f64], v: &mut [f64], t: i32) {
    for i in 0..p.len() {
        let g = f64::from(g[i]) * f64::from(SCALE);
        m[i] = 0.9 * m[i] + 0.1 * g;
        v[i] = 0.999 * v[i] + 0.001 * g * g;
        let (mh, vh) = (m[i] / (1.0 - 0.9f64.powi(t)), v[i] / (1.0 - 0.999f64.powi(t)));
        p[i] -= 1e-2 * (0.1 * p[i] + mh / (vh.sqrt() + 1e-8));
    }
}

#[track_caller]
fn close(what: &str, got: &[f32], want: &[f64]) {
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        assert!((f64::from(g) - w).abs() <= 1e-6 * (1.0 + w.abs()), "{what}, element {i}: {g}, not {w}");
    }
}

#[test]
fn f32_parameters_and_masters_take_the_published_steps_and_weights_are_the_masters_rounded() {
    let mut rng = Noise::fresh();
    for d in devices() {
        for n in LENGTHS {
            let s = d.stream();
            let start = rng.f32s(n, 1.0);
            let (mut p, mut m, mut v) = (wide32(&start), vec![0.0; n], vec![0.0; n]);
            let (alone, masters, weights) = (d.upload(&start), d.upload(&start), d.alloc(DType::BF16, n));
            let [m1, v1, m2, v2] = [(); 4].map(|()| d.zeros(DType::F32, n));
            for t in 1..=3 {
                let g = rng.f32s(n, 1.0);
                published(&mut p, &g, &mut m, &mut v, t);
                let gb = d.upload(&g);
                step(&s, Params::Float(&alone), &gb, &m1, &v1, HYPER, t as u64, SCALE);
                step(&s, Params::Masters(&masters, &weights), &gb, &m2, &v2, HYPER, t as u64, SCALE);
            }
            let got = read::<f32>(&s, &alone);
            close("parameters", &got, &p);
            close("means", &read::<f32>(&s, &m1), &m);
            close("squares", &read::<f32>(&s, &v1), &v);
            assert_eq!(read::<f32>(&s, &masters), got);
            assert_eq!(read::<f32>(&s, &m2), read::<f32>(&s, &m1));
            let rounded: Vec<bf16> = got.into_iter().map(bf16::from_f32).collect();
            assert_eq!(read::<bf16>(&s, &weights), rounded);
        }
    }
}

/// One step of bf16 weights without masters, of the elements from `first` on, in parts of these lengths; weights and means.
fn rounded(d: &Device, w: &[bf16], g: &[f32], seed: u64, first: u64, t: u64, parts: &[usize]) -> (Vec<bf16>, Vec<f32>) {
    let (s, n) = (d.stream(), w.len());
    let (w, g, m, v) = (d.upload(w), d.upload(g), d.zeros(DType::F32, n), d.zeros(DType::F32, n));
    let mut at = 0;
    for &len in parts {
        let params = Params::Rounded { weights: &w.view(at, len), seed, first: first + at as u64 };
        step(&s, params, &g.view(at, len), &m.view(at, len), &v.view(at, len), HYPER, t, SCALE);
        at += len;
    }
    assert_eq!(at, n);
    (read(&s, &w), read(&s, &m))
}

#[test]
fn weights_without_masters_go_to_a_neighbour_and_their_mean_to_the_published_value() {
    let mut rng = Noise::fresh();
    for d in devices() {
        let n = 999;
        let (w, g) = (rng.bf16s(n, 1.0), rng.f32s(n, 1.0));
        let mut p: Vec<f64> = w.iter().map(|w| w.to_f64()).collect();
        let (mut m, mut v) = (vec![0.0; n], vec![0.0; n]);
        published(&mut p, &g, &mut m, &mut v, 1);
        let (draws, mut sums) = (200, vec![0.0; n]);
        for seed in 0..draws {
            let (got, means) = rounded(&d, &w, &g, seed, 3, 1, &[n]);
            close("means", &means, &m);
            for i in 0..n {
                let got = got[i].to_f64();
                let unit = (p[i].abs() + 1e-6) / 128.0;
                assert!((got - p[i]).abs() < unit, "element {i}: {got} is no neighbour of {}", p[i]);
                sums[i] += (got - p[i]) / unit;
            }
        }
        // The mean of the errors in units of the last place, over elements and draws: half a unit is their largest deviation.
        let mean = sums.iter().sum::<f64>() / (n as f64 * draws as f64);
        let deviation = 0.5 / (n as f64 * draws as f64).sqrt();
        assert!(mean.abs() < 5.0 * deviation, "mean {mean}, {deviation} expected");
        let worst = sums.iter().fold(0.0f64, |a, s| a.max(s.abs())) / draws as f64;
        assert!(worst < 6.0 * 0.5 / (draws as f64).sqrt(), "an element is {worst} units away in the mean");
    }
}

#[test]
fn the_noise_is_a_function_of_seed_step_and_index_alone_and_the_hosts() {
    let mut rng = Noise::fresh();
    let n = 1000;
    let (w, g, seed) = (rng.bf16s(n, 1.0), rng.f32s(n, 1.0), rng.next());
    let bits = |(w, _): (Vec<bf16>, Vec<f32>)| w.iter().map(|w| w.to_bits()).collect::<Vec<_>>();
    let first = (1 << 35) + 5;
    for [a, b] in pairs() {
        let whole = bits(rounded(&a, &w, &g, seed, first, 2, &[n]));
        for parts in [&[n][..], &[3, 8, 500, 489], &[0, 1, 999]] {
            assert_eq!(bits(rounded(&b, &w, &g, seed, first, 2, parts)), whole, "{parts:?}");
        }
        let differ = |other: Vec<u16>| other.iter().zip(&whole).filter(|(a, b)| a != b).count();
        assert!(differ(bits(rounded(&a, &w, &g, seed + 1, first, 2, &[n]))) > n / 10);
        assert!(differ(bits(rounded(&a, &w, &g, seed, first + 8, 2, &[n]))) > n / 10);
        // The host has no fused multiply-add here: an update may differ in its last bit, and so, seldom, may where it goes.
        assert!(differ(bits(rounded(&Device::cpu(1), &w, &g, seed, first, 2, &[n]))) <= 2);
    }
}

#[test]
fn the_norm_is_exact_to_f32_and_shows_what_is_not_finite() {
    let mut rng = Noise::fresh();
    for d in devices() {
        let s = d.stream();
        for n in [0, 1, 7, 2 * 65_536 + 13] {
            let g = rng.f32s(n, 1.0);
            let want = g.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt() as f32;
            let (gb, out) = (d.upload(&g), d.alloc(DType::F32, 1));
            grad_norm(&s, &gb, &out);
            assert_eq!(read::<f32>(&s, &out), [want]);
            if n > 1 {
                let rest = g[1..].iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt() as f32;
                grad_norm(&s, &gb.view(1, n - 1), &out);
                assert_eq!(read::<f32>(&s, &out), [rest], "from an address that is no multiple of 16 bytes");
            }
        }
        for bad in [f32::NAN, f32::INFINITY] {
            let mut g = rng.f32s(70_000, 1.0);
            g[66_000] = bad;
            let out = d.alloc(DType::F32, 1);
            grad_norm(&s, &d.upload(&g), &out);
            assert!(!read::<f32>(&s, &out)[0].is_finite());
        }
    }
}
