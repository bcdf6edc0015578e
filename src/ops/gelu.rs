//! The exact Gaussian error linear unit (Hendrycks and Gimpel 2016, arXiv 1606.08415): `y = x (1 + erf(x / sqrt 2)) / 2`.

use super::rows::eights;
use super::simd::{erf, exp, madd, multiversion};
use crate::device::{Arg, Backend, Buffer, Stream};

const CHUNK: usize = 8192;

/// `y = gelu(x)` over `len` elements.
pub fn forward(s: &Stream, x: &Buffer, y: &Buffer, len: usize) {
    assert!(x.len() >= len && y.len() >= len, "buffers of at least {len} elements");
    assert!(!y.overlaps(x), "y apart from x");
    let (x, y) = (x.clone(), y.clone());
    match s.backend() {
        Backend::Cpu(s) => s.launch(move |pool| {
            // SAFETY: launches of one stream run in order; y is not x.
            let (x, y) = unsafe { (x.get::<f32>(), y.get_mut::<f32>()) };
            pool.chunks_mut(&mut y[..len], CHUNK, |i, y| apply(&x[i * CHUNK..][..y.len()], y));
        }),
        Backend::Gpu(gpu) if len > 0 => {
            gpu.launch("gelu_forward", eights(1, len), &[Arg::Buffer(&x), Arg::Buffer(&y), Arg::len(len)]);
        }
        Backend::Gpu(_) => {}
    }
}

/// `dx = dy * gelu'(x)` over `len` elements, with `gelu'(x) = cdf(x) + x pdf(x)` of the normal distribution.
pub fn backward(s: &Stream, x: &Buffer, dy: &Buffer, dx: &Buffer, len: usize) {
    assert!(x.len() >= len && dy.len() >= len && dx.len() >= len, "buffers of at least {len} elements");
    assert!(!dx.overlaps(x) && !dx.overlaps(dy), "dx apart from x and dy");
    let (x, dy, dx) = (x.clone(), dy.clone(), dx.clone());
    match s.backend() {
        Backend::Cpu(s) => s.launch(move |pool| {
            // SAFETY: launches of one stream run in order; dx is neither x nor dy.
            let (x, dy, dx) = unsafe { (x.get::<f32>(), dy.get::<f32>(), dx.get_mut::<f32>()) };
            pool.chunks_mut(&mut dx[..len], CHUNK, |i, dx| {
                let at = i * CHUNK;
                apply_backward(&x[at..][..dx.len()], &dy[at..][..dx.len()], dx)
            });
        }),
        Backend::Gpu(gpu) if len > 0 => {
            let [x, dy, dx] = [&x, &dy, &dx].map(Arg::Buffer);
            gpu.launch("gelu_backward", eights(1, len), &[x, dy, dx, Arg::len(len)]);
        }
        Backend::Gpu(_) => {}
    }
}

#[inline(always)]
fn cdf<const FMA: bool>(x: f32) -> f32 {
    madd::<FMA>(0.5, erf::<FMA>(x * std::f32::consts::FRAC_1_SQRT_2), 0.5)
}

#[inline(always)]
fn apply_body<const FMA: bool>(x: &[f32], y: &mut [f32]) {
    let x = &x[..y.len()];
    for i in 0..y.len() {
        y[i] = x[i] * cdf::<FMA>(x[i]);
    }
}
multiversion!(fn apply(x: &[f32], y: &mut [f32]) = apply_body);

#[inline(always)]
fn apply_backward_body<const FMA: bool>(x: &[f32], dy: &[f32], dx: &mut [f32]) {
    /// 1 / sqrt(2 pi)
    const PEAK: f32 = 0.398_942_3;
    let n = dx.len();
    let (x, dy) = (&x[..n], &dy[..n]);
    for i in 0..n {
        let pdf = PEAK * exp::<FMA>(-0.5 * x[i] * x[i]);
        dx[i] = dy[i] * madd::<FMA>(x[i], pdf, cdf::<FMA>(x[i]));
    }
}
multiversion!(fn apply_backward(x: &[f32], dy: &[f32], dx: &mut [f32]) = apply_backward_body);

#[cfg(test)]
mod tests {
    use super::super::testing::{close, devices, noise, same_on_every_isa};
    use super::*;
    use crate::device::DType;

    /// The normal distribution's function by Simpson's rule in f64.
    fn cdf_f64(x: f64) -> f64 {
        let pdf = |t: f64| (-t * t / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
        let n = 2000;
        let h = x / n as f64;
        let inner: f64 = (1..n).map(|i| pdf(i as f64 * h) * if i % 2 == 1 { 4.0 } else { 2.0 }).sum();
        0.5 + (pdf(0.0) + inner + pdf(x)) * h / 3.0
    }

    #[test]
    fn equals_the_f64_loop_on_every_device() {
        let mut x = noise(9001, 1);
        x.iter_mut().for_each(|v| *v *= 4.0);
        let dy = noise(x.len(), 2);
        let x64 = || x.iter().map(|&v| v as f64);
        let y: Vec<f64> = x64().map(|v| v * cdf_f64(v)).collect();
        let pdf = |t: f64| (-t * t / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
        let dx: Vec<f64> = x64().zip(&dy).map(|(v, &d)| d as f64 * (cdf_f64(v) + v * pdf(v))).collect();
        let mut first: Option<(Vec<f32>, Vec<f32>)> = None;
        for d in devices() {
            let s = d.stream();
            let (xb, dyb) = (d.upload(&x), d.upload(&dy));
            let (yb, dxb) = (d.alloc(DType::F32, x.len()), d.alloc(DType::F32, x.len()));
            forward(&s, &xb, &yb, x.len());
            backward(&s, &xb, &dyb, &dxb, x.len());
            let got = (s.read::<f32>(&yb).wait().unwrap(), s.read::<f32>(&dxb).wait().unwrap());
            close(&got.0, &y, 1e-6);
            close(&got.1, &dx, 2e-6);
            assert_eq!(*first.get_or_insert(got.clone()), got);
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let n = 9001;
        let x: Vec<f32> = noise(n, 1).iter().map(|x| x * 9.0).collect();
        same_on_every_isa(|d| {
            let (s, x, dy) = (d.stream(), d.upload(&x), d.upload(&noise(n, 2)));
            let (y, dx) = (d.alloc(DType::F32, n), d.alloc(DType::F32, n));
            forward(&s, &x, &y, n);
            backward(&s, &x, &dy, &dx, n);
            [y, dx].map(|b| s.read::<f32>(&b).wait().unwrap()).concat()
        });
    }
}
