//! Decoupled weight decay Adam (Loshchilov and Hutter 2019, arXiv 1711.05101) over flat buffers, and the global norm that
//! gradient clipping needs. The arithmetic is that of `torch.optim.AdamW`.

use super::simd::multiversion;
use crate::device::{Backend, Buffer, SendPtr, Stream};

const CHUNK: usize = 16_384;
/// Elements whose squares are summed before they join the total; fixed, so that the norm is the same on any machine
/// whatever its number of cores.
const NORM_BLOCK: usize = 65_536;
const NORM_LANES: usize = 8;

/// The optimizer's constants for one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the mean of the gradients.
    pub beta1: f64,
    /// Decay of the mean of their squares.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Each step first multiplies the parameters by `1 - lr * weight_decay`.
    pub weight_decay: f64,
}

/// `out[0] = sqrt(sum of squares of grads)`, summed in f64 in blocks of a fixed size. Not finite if a gradient is not
/// finite: look at it before the step.
pub fn grad_norm(s: &Stream, grads: &Buffer, out: &Buffer) {
    assert_eq!(out.len(), 1, "one f32 for the norm");
    let (grads, out) = (grads.clone(), out.clone());
    match s.backend() {
        Backend::Cpu(s) => s.launch(move |pool| {
            // SAFETY: launches of one stream run in order; out is not part of grads.
            let (g, out) = unsafe { (grads.get::<f32>(), out.get_mut::<f32>()) };
            let mut sums = vec![0.0f64; g.len().div_ceil(NORM_BLOCK)];
            pool.chunks_mut(&mut sums, 1, |i, sum| {
                sum[0] = square_sum(&g[i * NORM_BLOCK..g.len().min((i + 1) * NORM_BLOCK)]);
            });
            out[0] = sums.iter().sum::<f64>().sqrt() as f32;
        }),
        Backend::Gpu(gpu) => gpu.missing("adamw"),
    }
}

/// One AdamW step on flat buffers of one length: parameters, gradients, first and second moments. `step` counts from 1;
/// the gradients are multiplied by `grad_scale` first (gradient clipping; 1 for none).
pub fn step(
    s: &Stream,
    params: &Buffer,
    grads: &Buffer,
    m: &Buffer,
    v: &Buffer,
    hyper: AdamW,
    step: u64,
    grad_scale: f32,
) {
    let n = params.len();
    assert!(grads.len() == n && m.len() == n && v.len() == n, "gradients and moments of {n} elements");
    assert!(step >= 1, "steps count from 1");
    let apart = |b: &Buffer, others: &[&Buffer]| others.iter().all(|o| !b.overlaps(o));
    assert!(apart(params, &[grads, m, v]) && apart(grads, &[m, v]) && apart(m, &[v]), "four buffers that are apart");
    let AdamW { lr, beta1, beta2, eps, weight_decay } = hyper;
    let t = step as f64;
    let (bias1, bias2) = (1.0 - beta1.powf(t), 1.0 - beta2.powf(t));
    let k = Constants {
        keep: (1.0 - lr * weight_decay) as f32,
        rest1: (1.0 - beta1) as f32,
        beta2: beta2 as f32,
        rest2: (1.0 - beta2) as f32,
        step_size: (lr / bias1) as f32,
        root_bias2: bias2.sqrt() as f32,
        eps: eps as f32,
        grad_scale,
    };
    let (p, g, m, v) = (params.clone(), grads.clone(), m.clone(), v.clone());
    match s.backend() {
        Backend::Cpu(s) => s.launch(move |pool| {
            // SAFETY: launches of one stream run in order; the four buffers are apart.
            let (g, m, v) = unsafe { (g.get::<f32>(), m.get_mut::<f32>(), v.get_mut::<f32>()) };
            let (m, v) = (SendPtr(m.as_mut_ptr()), SendPtr(v.as_mut_ptr()));
            // SAFETY: as above.
            pool.chunks_mut(unsafe { p.get_mut::<f32>() }, CHUNK, |i, p| {
                let (at, n) = (i * CHUNK, p.len());
                // SAFETY: all four have one length; this range belongs to this item.
                let (m, v) = unsafe {
                    (
                        std::slice::from_raw_parts_mut(m.get().add(at), n),
                        std::slice::from_raw_parts_mut(v.get().add(at), n),
                    )
                };
                update(p, &g[at..at + n], m, v, k);
            });
        }),
        Backend::Gpu(gpu) => gpu.missing("adamw"),
    }
}

#[derive(Clone, Copy)]
struct Constants {
    keep: f32,
    rest1: f32,
    beta2: f32,
    rest2: f32,
    step_size: f32,
    root_bias2: f32,
    eps: f32,
    grad_scale: f32,
}

#[inline(always)]
fn update_body<const FMA: bool>(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], k: Constants) {
    let n = p.len();
    let (g, m, v) = (&g[..n], &mut m[..n], &mut v[..n]);
    for i in 0..n {
        let g = g[i] * k.grad_scale;
        m[i] += (g - m[i]) * k.rest1;
        v[i] = v[i] * k.beta2 + k.rest2 * g * g;
        let denominator = v[i].sqrt() / k.root_bias2 + k.eps;
        p[i] = p[i] * k.keep - k.step_size * (m[i] / denominator);
    }
}
multiversion!(fn update(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], k: Constants) = update_body);

#[inline(always)]
fn square_sum_body<const FMA: bool>(g: &[f32]) -> f64 {
    let mut acc = [0.0f64; NORM_LANES];
    let chunks = g.chunks_exact(NORM_LANES);
    let rest = chunks.remainder();
    for c in chunks {
        for i in 0..NORM_LANES {
            acc[i] += c[i] as f64 * c[i] as f64;
        }
    }
    for i in 0..rest.len() {
        acc[i] += rest[i] as f64 * rest[i] as f64;
    }
    acc.iter().sum()
}
multiversion!(fn square_sum(g: &[f32]) -> f64 = square_sum_body);

#[cfg(test)]
mod tests {
    use super::super::testing::{close, devices, noise, same_on_every_isa};
    use super::*;
    use crate::device::{DType, Device};

    #[test]
    fn steps_equal_the_published_update_in_f64() {
        let n = CHUNK + 37;
        let hyper = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 };
        let start = noise(n, 1);
        let mut p: Vec<f64> = start.iter().map(|&x| x as f64).collect();
        let (mut m, mut v) = (vec![0.0f64; n], vec![0.0f64; n]);
        let scale = 0.37f32;
        for t in 1..=3 {
            for (i, g) in noise(n, 10 + t).into_iter().enumerate() {
                let g = g as f64 * scale as f64;
                m[i] = 0.9 * m[i] + 0.1 * g;
                v[i] = 0.999 * v[i] + 0.001 * g * g;
                let (mh, vh) = (m[i] / (1.0 - 0.9f64.powi(t as i32)), v[i] / (1.0 - 0.999f64.powi(t as i32)));
                p[i] -= 1e-2 * (0.1 * p[i] + mh / (vh.sqrt() + 1e-8));
            }
        }
        let mut first: Option<Vec<f32>> = None;
        for d in devices() {
            let s = d.stream();
            let (pb, mb, vb) = (d.upload(&start), d.zeros(DType::F32, n), d.zeros(DType::F32, n));
            for t in 1..=3 {
                step(&s, &pb, &d.upload(&noise(n, 10 + t)), &mb, &vb, hyper, t, scale);
            }
            let got = s.read::<f32>(&pb).wait().unwrap();
            close(&got, &p, 1e-6);
            close(&s.read::<f32>(&mb).wait().unwrap(), &m, 1e-6);
            close(&s.read::<f32>(&vb).wait().unwrap(), &v, 1e-6);
            assert_eq!(*first.get_or_insert(got.clone()), got);
        }
    }

    #[test]
    fn the_norm_is_exact_to_f32_and_shows_what_is_not_finite() {
        for n in [0, 1, 7, NORM_BLOCK * 2 + 13] {
            let g = noise(n, 3);
            let want = g.iter().map(|&x| (x as f64).powi(2)).sum::<f64>().sqrt() as f32;
            for d in devices() {
                let (s, out) = (d.stream(), d.alloc(DType::F32, 1));
                grad_norm(&s, &d.upload(&g), &out);
                assert_eq!(s.read::<f32>(&out).wait().unwrap(), [want]);
            }
        }
        let d = Device::cpu(2);
        for (bad, nan) in [(f32::NAN, true), (f32::INFINITY, false)] {
            let mut g = noise(NORM_BLOCK + 9, 3);
            g[NORM_BLOCK + 5] = bad;
            let (s, out) = (d.stream(), d.alloc(DType::F32, 1));
            grad_norm(&s, &d.upload(&g), &out);
            let got = s.read::<f32>(&out).wait().unwrap()[0];
            assert!(if nan { got.is_nan() } else { got == f32::INFINITY });
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let n = CHUNK + 37;
        let hyper = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 };
        same_on_every_isa(|d| {
            let (s, norm) = (d.stream(), d.alloc(DType::F32, 1));
            let [p, g, m] = [1, 2, 3].map(|seed| d.upload(&noise(n, seed)));
            let v = d.zeros(DType::F32, n);
            grad_norm(&s, &g, &norm);
            step(&s, &p, &g, &m, &v, hyper, 2, 0.37);
            [norm, p, m, v].map(|b| s.read::<f32>(&b).wait().unwrap()).concat()
        });
    }
}
