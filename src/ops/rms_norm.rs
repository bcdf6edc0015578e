//! Root-mean-square layer normalisation (Zhang and Sennrich 2019, arXiv 1910.07467):
//! `y = x / sqrt(mean(x^2) + eps) * w`, row by row.

use super::simd::{LANES, dot, madd, multiversion, rows_per_item, sum_lanes};
use crate::device::{Arg, Backend, Buffer, DType, Launch, SendPtr, Stream};

/// Rows whose terms of the weight gradient are summed before they join the total. Fixed, so that the order of additions
/// depends on the shape alone.
const ROW_BLOCK: usize = 64;
/// Columns per work item of the weight gradient.
const COL_BLOCK: usize = 128;

/// Threads of the kernels' blocks.
const THREADS: usize = 128;
/// Blocks of the backward kernel, at most: two for each multiprocessor of the largest card. Fixed, because each sums its share of
/// the weight gradient.
const BLOCKS: usize = 264;

/// `y[r, :] = x[r, :] / rms(x[r, :]) * w`, with x and y `[rows, cols]` and w `[cols]`.
pub fn forward(s: &Stream, x: &Buffer, w: &Buffer, eps: f32, y: &Buffer, rows: usize, cols: usize) {
    check(&[x, y], w, rows, cols);
    assert!(!y.overlaps(x) && !y.overlaps(w), "y apart from x and w");
    let (x, w, y) = (x.clone(), w.clone(), y.clone());
    match s.backend() {
        Backend::Cpu(s) => s.launch(move |pool| {
            // SAFETY: launches of one stream run in order; y is neither x nor w.
            let (x, w, y) = unsafe { (x.get::<f32>(), w.get::<f32>(), y.get_mut::<f32>()) };
            let per = rows_per_item(cols);
            pool.chunks_mut(&mut y[..rows * cols], per * cols, |i, y| {
                for (x, y) in x[i * per * cols..].chunks_exact(cols).zip(y.chunks_exact_mut(cols)) {
                    scale_row(x, w, inverse_rms(x, eps), y);
                }
            });
        }),
        Backend::Gpu(gpu) if rows * cols > 0 => gpu.launch(
            "rms_norm_forward",
            Launch::linear(rows, THREADS),
            &[Arg::Buffer(&x), Arg::Buffer(&w), Arg::Buffer(&y), Arg::len(cols), Arg::F32(eps)],
        ),
        Backend::Gpu(_) => {}
    }
}

/// The gradients of [`forward`]: `dx += ..` `[rows, cols]`, and `dw += ..` `[cols]` where the weight is trained.
///
/// With `k = 1 / rms(x)` and `g = dy * w`: `dx = k g - x k^3 mean(g x)` and `dw = sum over rows of dy x k`, the rows in
/// ascending order, in blocks of 64.
pub fn backward(
    s: &Stream,
    x: &Buffer,
    w: &Buffer,
    eps: f32,
    dy: &Buffer,
    dx: &Buffer,
    dw: Option<&Buffer>,
    rows: usize,
    cols: usize,
) {
    check(&[x, dy, dx], w, rows, cols);
    assert!([x, w, dy].iter().all(|b| !dx.overlaps(b)), "dx apart from x, w and dy");
    assert!(dw.is_none_or(|d| d.len() == cols), "dw of {cols} elements");
    let (x, w, dy, dx, dw) = (x.clone(), w.clone(), dy.clone(), dx.clone(), dw.cloned());
    match s.backend() {
        Backend::Cpu(s) => s.launch(move |pool| {
            // SAFETY: launches of one stream run in order, and dx and dw are nobody else's inputs here.
            let (x, w, dy, dx) = unsafe { (x.get::<f32>(), w.get::<f32>(), dy.get::<f32>(), dx.get_mut::<f32>()) };
            let mut inv = vec![0.0f32; rows];
            let inv_p = SendPtr(inv.as_mut_ptr());
            let per = rows_per_item(cols);
            pool.chunks_mut(&mut dx[..rows * cols], per * cols, |i, dx| {
                for (j, dx) in dx.chunks_exact_mut(cols).enumerate() {
                    let r = i * per + j;
                    let (x, dy) = (&x[r * cols..][..cols], &dy[r * cols..][..cols]);
                    let k = inverse_rms(x, eps);
                    // SAFETY: row r belongs to this item.
                    unsafe { *inv_p.get().add(r) = k };
                    input_gradient(x, w, dy, k, dx);
                }
            });
            if let Some(dw) = dw {
                // SAFETY: as above.
                let dw = unsafe { dw.get_mut::<f32>() };
                pool.chunks_mut(dw, COL_BLOCK, |i, dw| weight_gradient(x, dy, &inv, i * COL_BLOCK, cols, dw));
            }
        }),
        Backend::Gpu(gpu) if rows * cols > 0 => {
            let blocks = rows.min(BLOCKS);
            let [parts] = gpu.scratch([(DType::F32, if dw.is_some() { blocks * cols } else { 0 })]);
            let dw_partial = Arg::maybe(dw.as_ref().map(|_| &parts), DType::F32);
            let [x, w, dy, dx] = [&x, &w, &dy, &dx].map(Arg::Buffer);
            let args = [x, w, dy, dx, dx, dw_partial, Arg::len(rows), Arg::len(cols), Arg::F32(eps)];
            gpu.launch("rms_norm_backward", Launch::linear(blocks, THREADS).shared(cols * size_of::<f32>()), &args);
            if let Some(dw) = &dw {
                let args = [Arg::Buffer(&parts), Arg::Buffer(dw), Arg::len(blocks), Arg::len(cols)];
                gpu.launch("rms_norm_weight_gradient", Launch::linear(cols.div_ceil(THREADS), THREADS), &args);
            }
        }
        Backend::Gpu(_) => {}
    }
}

fn check(matrices: &[&Buffer], w: &Buffer, rows: usize, cols: usize) {
    assert!(matrices.iter().all(|b| b.len() >= rows * cols), "matrices of at least [{rows}, {cols}]");
    assert_eq!(w.len(), cols, "a weight of {cols} elements");
}

#[inline(always)]
fn inverse_rms_body<const FMA: bool>(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot::<FMA>(x, x) / x.len() as f32 + eps).sqrt()
}
multiversion!(fn inverse_rms(x: &[f32], eps: f32) -> f32 = inverse_rms_body);

#[inline(always)]
fn scale_row_body<const FMA: bool>(x: &[f32], w: &[f32], k: f32, y: &mut [f32]) {
    let n = y.len();
    let (x, w) = (&x[..n], &w[..n]);
    for i in 0..n {
        y[i] = x[i] * k * w[i];
    }
}
multiversion!(fn scale_row(x: &[f32], w: &[f32], k: f32, y: &mut [f32]) = scale_row_body);

#[inline(always)]
fn input_gradient_body<const FMA: bool>(x: &[f32], w: &[f32], dy: &[f32], k: f32, dx: &mut [f32]) {
    let n = x.len();
    let mut acc = [0.0; LANES];
    let whole = n - n % LANES;
    for c in (0..whole).step_by(LANES) {
        let (x, w, dy) = (&x[c..c + LANES], &w[c..c + LANES], &dy[c..c + LANES]);
        for i in 0..LANES {
            acc[i] = madd::<FMA>(dy[i] * w[i], x[i], acc[i]);
        }
    }
    for c in whole..n {
        acc[c - whole] = madd::<FMA>(dy[c] * w[c], x[c], acc[c - whole]);
    }
    let back = -sum_lanes(acc) / n as f32 * k * k * k;
    let (x, w, dy, dx) = (&x[..n], &w[..n], &dy[..n], &mut dx[..n]);
    for i in 0..n {
        dx[i] += madd::<FMA>(dy[i] * w[i], k, x[i] * back);
    }
}
multiversion!(fn input_gradient(x: &[f32], w: &[f32], dy: &[f32], k: f32, dx: &mut [f32]) = input_gradient_body);

/// Adds the gradient of the columns `col..col + dw.len()`.
#[inline(always)]
fn weight_gradient_body<const FMA: bool>(x: &[f32], dy: &[f32], k: &[f32], col: usize, cols: usize, dw: &mut [f32]) {
    let n = dw.len();
    for first in (0..k.len()).step_by(ROW_BLOCK) {
        let mut acc = [0.0f32; COL_BLOCK];
        let acc = &mut acc[..n];
        for r in first..k.len().min(first + ROW_BLOCK) {
            let (x, dy, k) = (&x[r * cols + col..][..n], &dy[r * cols + col..][..n], k[r]);
            for i in 0..n {
                acc[i] = madd::<FMA>(dy[i], x[i] * k, acc[i]);
            }
        }
        for i in 0..n {
            dw[i] += acc[i];
        }
    }
}
multiversion!(fn weight_gradient(x: &[f32], dy: &[f32], k: &[f32], col: usize, cols: usize, dw: &mut [f32]) = weight_gradient_body);

#[cfg(test)]
mod tests {
    use super::super::testing::{close, devices, noise, same_on_every_isa};
    use super::*;
    use crate::device::DType;

    const SHAPES: [(usize, usize); 5] = [(1, 1), (3, 17), (70, 128), (130, 320), (2, 1000)];
    const EPS: f32 = 1e-6;

    #[test]
    fn forward_equals_the_f64_loop_and_rows_are_independent() {
        for (rows, cols) in SHAPES {
            let (x, w) = (noise(rows * cols, 1), noise(cols, 2));
            let mut want = vec![];
            for r in x.chunks(cols) {
                let ms = r.iter().map(|&v| (v as f64).powi(2)).sum::<f64>() / cols as f64;
                want.extend(r.iter().zip(&w).map(|(&v, &w)| v as f64 / (ms + EPS as f64).sqrt() * w as f64));
            }
            let mut first: Option<Vec<f32>> = None;
            for d in devices() {
                let s = d.stream();
                let (xb, wb, y) = (d.upload(&x), d.upload(&w), d.alloc(DType::F32, rows * cols));
                forward(&s, &xb, &wb, EPS, &y, rows, cols);
                let got = s.read::<f32>(&y).wait().unwrap();
                close(&got, &want, 1e-6);
                assert_eq!(*first.get_or_insert(got.clone()), got);
                let (last, alone) = (xb.view((rows - 1) * cols, cols), d.alloc(DType::F32, cols));
                forward(&s, &last, &wb, EPS, &alone, 1, cols);
                assert_eq!(s.read::<f32>(&alone).wait().unwrap(), got[(rows - 1) * cols..]);
            }
        }
    }

    #[test]
    fn backward_equals_the_f64_loop_and_accumulates() {
        for (rows, cols) in SHAPES {
            let (x, w, dy) = (noise(rows * cols, 1), noise(cols, 2), noise(rows * cols, 3));
            let (dx0, dw0) = (noise(rows * cols, 4), noise(cols, 5));
            let mut dx: Vec<f64> = dx0.iter().map(|&v| v as f64).collect();
            let mut dw: Vec<f64> = dw0.iter().map(|&v| v as f64).collect();
            for r in 0..rows {
                let at = |v: &[f32], c: usize| v[r * cols + c] as f64;
                let ms = (0..cols).map(|c| at(&x, c).powi(2)).sum::<f64>() / cols as f64;
                let k = 1.0 / (ms + EPS as f64).sqrt();
                let dot = (0..cols).map(|c| at(&dy, c) * w[c] as f64 * at(&x, c)).sum::<f64>() / cols as f64;
                for c in 0..cols {
                    dx[r * cols + c] += k * (at(&dy, c) * w[c] as f64 - at(&x, c) * k * k * dot);
                    dw[c] += at(&dy, c) * at(&x, c) * k;
                }
            }
            let mut first: Option<(Vec<f32>, Vec<f32>)> = None;
            for d in devices() {
                let s = d.stream();
                let [xb, wb, dyb, dxb, dwb] = [&x, &w, &dy, &dx0, &dw0].map(|v| d.upload(v));
                backward(&s, &xb, &wb, EPS, &dyb, &dxb, Some(&dwb), rows, cols);
                let got = (s.read::<f32>(&dxb).wait().unwrap(), s.read::<f32>(&dwb).wait().unwrap());
                close(&got.0, &dx, 2e-5);
                close(&got.1, &dw, 2e-5);
                assert_eq!(*first.get_or_insert(got.clone()), got);
                let frozen = d.upload(&dx0);
                backward(&s, &xb, &wb, EPS, &dyb, &frozen, None, rows, cols);
                assert_eq!(s.read::<f32>(&frozen).wait().unwrap(), got.0);
            }
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        for (rows, cols) in SHAPES {
            same_on_every_isa(|d| {
                let (s, n) = (d.stream(), rows * cols);
                let [x, w, dy] = [(n, 1), (cols, 2), (n, 3)].map(|(n, seed)| d.upload(&noise(n, seed)));
                let [y, dx, dw] = [n, n, cols].map(|n| d.zeros(DType::F32, n));
                forward(&s, &x, &w, EPS, &y, rows, cols);
                backward(&s, &x, &w, EPS, &dy, &dx, Some(&dw), rows, cols);
                [y, dx, dw].map(|b| s.read::<f32>(&b).wait().unwrap()).concat()
            });
        }
    }
}
