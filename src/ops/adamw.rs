//! Decoupled weight decay Adam (Loshchilov and Hutter 2019, arXiv 1711.05101) over flat buffers, and the global norm that
//! gradient clipping needs. The arithmetic is that of `torch.optim.AdamW`.
//!
//! Gradients and moments are f32. Parameters are f32, or f32 masters with bf16 weights beside them, or bf16 alone ([`Params`]).

use super::philox::philox;
use super::simd::multiversion;
use crate::device::{Arg, Backend, Buffer, DType, Launch, SendPtr, Stream};
use half::bf16;

const CHUNK: usize = 16_384;
/// Elements whose squares are summed before they join the total; fixed, so that the norm is the same on any machine
/// whatever its number of cores.
const NORM_BLOCK: usize = 65_536;
const NORM_LANES: usize = 8;

/// Threads of the kernels' blocks, of which each takes eight elements.
const THREADS: usize = 256;
const VECTOR: usize = 8;

/// Where the parameters are kept.
#[derive(Clone, Copy)]
pub enum Params<'a> {
    /// f32, updated in place.
    Float(&'a Buffer),
    /// f32 masters, updated in place, and bf16 weights, which get them rounded to nearest.
    Masters(&'a Buffer, &'a Buffer),
    /// bf16 weights alone. An updated value goes to one of the two bf16 numbers beside it, to the nearer one the likelier, so that
    /// updates too small to move a weight by themselves move it in the mean. The noise is a function of `seed`, the step, and
    /// the element's index, which is `first` for the first element.
    Rounded {
        /// bf16.
        weights: &'a Buffer,
        /// Of the noise.
        seed: u64,
        /// Index of the first element among all parameters: parts of them may be updated by several calls.
        first: u64,
    },
}

impl<'a> Params<'a> {
    /// The buffers that a step writes, the one that it computes with first.
    fn buffers(&self) -> (&'a Buffer, Option<&'a Buffer>) {
        match *self {
            Params::Float(p) | Params::Rounded { weights: p, .. } => (p, None),
            Params::Masters(p, weights) => (p, Some(weights)),
        }
    }
}

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
        Backend::Gpu(gpu) => {
            let blocks = grads.len().div_ceil(NORM_BLOCK);
            let [sums] = gpu.scratch([(DType::U64, blocks)]);
            if blocks > 0 {
                let args = [Arg::Buffer(&grads), Arg::Buffer(&sums), Arg::U64(grads.len() as u64)];
                gpu.launch("square_sums", Launch::linear(blocks, THREADS), &args);
            }
            let args = [Arg::Buffer(&sums), Arg::Buffer(&out), Arg::len(blocks)];
            gpu.launch("norm_of_sums", Launch::linear(1, THREADS), &args);
        }
    }
}

/// One AdamW step on flat buffers of one length: parameters, gradients, first and second moments. `step` counts from 1;
/// the gradients are multiplied by `grad_scale` first (gradient clipping; 1 for none).
pub fn step(
    s: &Stream,
    params: Params<'_>,
    grads: &Buffer,
    m: &Buffer,
    v: &Buffer,
    hyper: AdamW,
    step: u64,
    grad_scale: f32,
) {
    let (p, weights) = params.buffers();
    let n = p.len();
    assert!(grads.len() == n && m.len() == n && v.len() == n, "gradients and moments of {n} elements");
    assert!(weights.is_none_or(|w| w.len() == n), "{n} weights");
    assert!(step >= 1, "steps count from 1");
    let apart = |b: &Buffer, others: &[&Buffer]| others.iter().all(|o| !b.overlaps(o));
    assert!(apart(p, &[grads, m, v]) && apart(grads, &[m, v]) && apart(m, &[v]), "four buffers that are apart");
    assert!(weights.is_none_or(|w| apart(w, &[p, grads, m, v])), "weights apart from their masters");
    let k = Constants::new(hyper, step, grad_scale);
    match s.backend() {
        Backend::Cpu(s) => {
            let noise = match params {
                Params::Rounded { seed, first, .. } => Some(Noise { seed, step, first }),
                _ => None,
            };
            let (p, weights, g, m, v) = (p.clone(), weights.cloned(), grads.clone(), m.clone(), v.clone());
            // SAFETY: launches of one stream run in order; the buffers are apart and have one length.
            s.launch(move |pool| unsafe {
                let (g, m, v) = (g.get::<f32>(), out::<f32>(&m), out::<f32>(&v));
                let at = |i: usize| i * CHUNK..n.min((i + 1) * CHUNK);
                match noise {
                    None => {
                        let (p, weights) = (out::<f32>(&p), weights.map(|w| out::<bf16>(&w)));
                        pool.run(n.div_ceil(CHUNK), |i| {
                            let p = part(&p, at(i));
                            update(p, &g[at(i)], part(&m, at(i)), part(&v, at(i)), k);
                            if let Some(weights) = &weights {
                                let weights = part(weights, at(i));
                                weights.iter_mut().zip(p).for_each(|(w, p)| *w = bf16::from_f32(*p));
                            }
                        });
                    }
                    Some(noise) => {
                        let weights = out::<bf16>(&p);
                        pool.run(n.div_ceil(CHUNK), |i| {
                            let weights = part(&weights, at(i));
                            let mut p: Vec<f32> = weights.iter().map(|w| w.to_f32()).collect();
                            update(&mut p, &g[at(i)], part(&m, at(i)), part(&v, at(i)), k);
                            for ((w, &p), index) in weights.iter_mut().zip(&p).zip(at(i)) {
                                *w = noise.round(p, index);
                            }
                        });
                    }
                }
            });
        }
        Backend::Gpu(_) if n == 0 => {}
        Backend::Gpu(gpu) => {
            let constants =
                [k.keep, k.rest1, k.beta2, k.rest2, k.step_size, k.root_bias2, k.eps, k.grad_scale].map(Arg::F32);
            let (kernel, mut args, groups) = match params {
                Params::Float(_) | Params::Masters(..) => {
                    let mut args = [p, grads, m, v].map(Arg::Buffer).to_vec();
                    args.extend([Arg::maybe(weights, DType::BF16), Arg::U64(n as u64)]);
                    ("adamw", args, n.div_ceil(VECTOR))
                }
                Params::Rounded { seed, first, .. } => {
                    let mut args = [p, grads, m, v].map(Arg::Buffer).to_vec();
                    args.extend([n as u64, first, step, seed].map(Arg::U64));
                    ("adamw_rounded", args, (first as usize % VECTOR + n).div_ceil(VECTOR))
                }
            };
            args.extend(constants);
            gpu.launch(kernel, Launch::linear(groups.div_ceil(THREADS), THREADS), &args);
        }
    }
}

/// # Safety
/// As [`Buffer::get_mut`].
unsafe fn out<T: crate::device::Element>(b: &Buffer) -> SendPtr<T> {
    // SAFETY: by contract.
    SendPtr(unsafe { b.get_mut::<T>() }.as_mut_ptr())
}

/// # Safety
/// The range is the caller's alone.
#[allow(clippy::mut_from_ref)] // the caller's contract
unsafe fn part<T>(p: &SendPtr<T>, range: std::ops::Range<usize>) -> &mut [T] {
    // SAFETY: by contract.
    unsafe { std::slice::from_raw_parts_mut(p.get().add(range.start), range.len()) }
}

/// The random bits of rounding.
#[derive(Clone, Copy)]
struct Noise {
    seed: u64,
    step: u64,
    first: u64,
}

impl Noise {
    /// `x` rounded up or down, where the element is `index` places behind the first.
    fn round(&self, x: f32, index: usize) -> bf16 {
        let (i, halves) = (self.first + index as u64, |x: u64| [x as u32, (x >> 32) as u32]);
        let ([low, high], [step_low, step_high]) = (halves(i / VECTOR as u64), halves(self.step));
        let words = philox([low, high, step_low, step_high], halves(self.seed));
        let lane = (i % VECTOR as u64) as usize;
        let random = words[lane / 2] >> (lane % 2 * 16) & 0xFFFF;
        if x.is_nan() { bf16::NAN } else { bf16::from_bits((x.to_bits().wrapping_add(random) >> 16) as u16) }
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

impl Constants {
    fn new(hyper: AdamW, step: u64, grad_scale: f32) -> Constants {
        let AdamW { lr, beta1, beta2, eps, weight_decay } = hyper;
        let t = step as f64;
        let (bias1, bias2) = (1.0 - beta1.powf(t), 1.0 - beta2.powf(t));
        Constants {
            keep: (1.0 - lr * weight_decay) as f32,
            rest1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            rest2: (1.0 - beta2) as f32,
            step_size: (lr / bias1) as f32,
            root_bias2: bias2.sqrt() as f32,
            eps: eps as f32,
            grad_scale,
        }
    }
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
            let (masters, weights) = (d.upload(&start), d.alloc(DType::BF16, n));
            let (m2, v2) = (d.zeros(DType::F32, n), d.zeros(DType::F32, n));
            for t in 1..=3 {
                let g = d.upload(&noise(n, 10 + t));
                step(&s, Params::Float(&pb), &g, &mb, &vb, hyper, t, scale);
                step(&s, Params::Masters(&masters, &weights), &g, &m2, &v2, hyper, t, scale);
            }
            let got = s.read::<f32>(&pb).wait().unwrap();
            close(&got, &p, 1e-6);
            close(&s.read::<f32>(&mb).wait().unwrap(), &m, 1e-6);
            close(&s.read::<f32>(&vb).wait().unwrap(), &v, 1e-6);
            assert_eq!(*first.get_or_insert(got.clone()), got);
            assert_eq!(s.read::<f32>(&masters).wait().unwrap(), got);
            let rounded: Vec<bf16> = got.into_iter().map(bf16::from_f32).collect();
            assert_eq!(s.read::<bf16>(&weights).wait().unwrap(), rounded);
        }
    }

    #[test]
    fn without_masters_the_noise_belongs_to_the_element_and_its_mean_is_nothing() {
        let n = CHUNK + 37;
        // No moments yet and a gradient of one: every weight moves by lr, which is an eighth of a unit in its last place.
        let hyper = AdamW { lr: 1.0 / 1024.0, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 };
        let run = |d: &Device, seed: u64, cuts: &[usize]| {
            let s = d.stream();
            let (w, g) = (d.upload(&vec![bf16::from_f32(1.5); n]), d.upload(&vec![1.0f32; n]));
            let (m, v) = (d.zeros(DType::F32, n), d.zeros(DType::F32, n));
            let mut start = 0;
            for &end in cuts.iter().chain(&[n]) {
                let view = |b: &Buffer| b.view(start, end - start);
                let params = Params::Rounded { weights: &view(&w), seed, first: 5 + start as u64 };
                step(&s, params, &view(&g), &view(&m), &view(&v), hyper, 1, 1.0);
                start = end;
            }
            s.read::<bf16>(&w).wait().unwrap()
        };
        let want = run(&Device::cpu(1), 3, &[]);
        for d in devices() {
            assert_eq!(run(&d, 3, &[1, 900, CHUNK]), want);
        }
        assert_ne!(run(&Device::cpu(1), 4, &[]), want);
        let unit = 1.0 / 128.0;
        assert!(want.iter().all(|w| [1.5, 1.5 - unit].contains(&w.to_f64())));
        let moved = want.iter().filter(|w| w.to_f64() < 1.5).count() as f64 / n as f64;
        // A standard deviation is 0.0026 for as many elements.
        assert!((moved - 0.125).abs() < 0.011, "{moved} of the weights moved");
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
            step(&s, Params::Float(&p), &g, &m, &v, hyper, 2, 0.37);
            [norm, p, m, v].map(|b| s.read::<f32>(&b).wait().unwrap()).concat()
        });
    }
}
