//! Products with a weight: `y = x W^T`, and its gradients.
//!
//! **Layout.** A weight `[n, k]` (outputs, inputs) is held packed: `ceil(n / 16)` panels of `[k][16]`, 16 outputs side
//! by side for each input, lanes past `n` zero. A step of the sum is then one load and one multiply-add for 16 outputs,
//! and decoding reads the weight end to end. Gradients have the same layout, so that optimizers go over flat memory.
//!
//! **Order of additions.** Every output is one f32 accumulator, starts at zero, and takes its products by fused
//! multiply-add in ascending order of the summed index; then `(acc + bias) + residual` is stored. This holds for every number of
//! rows, every thread count and every instruction set: a row's result is the same bits alone, in a batch and in training.
//! Where a sum is cut for the caches, the exact accumulator is stored and loaded again. Where a gradient is added to
//! one that is there, its accumulators start from that instead of zero: micro-batches that are accumulated in order give
//! the bits of one large batch.
//!
//! **On a GPU** weights and what goes from op to op are bf16, weights row-major; sums are f32, and so are gradients of parameters. An
//! output of [`forward`] is again one accumulator over ascending inputs, sixteen at a time, by one tensor-core instruction for
//! all numbers of rows (`kernels/linear/`), rounded once after bias and residual. Gradients with respect to inputs and weights
//! come from the vendor's library.

mod gemm;
mod gpu;
mod kernel;
#[cfg(test)]
mod tests;
pub(super) mod transpose;

pub use kernel::PANEL;

use super::simd::Isa;
use crate::device::{Backend, Buffer, Matmul, Pool, SendPtr, Stream};
use gemm::{Left, Out, Product, SLAB, spread, with_scratch};
use transpose::{ABREAST, gather_abreast, gather_rows, transpose};

/// A weight, trainable or not.
#[derive(Clone)]
pub struct Weight {
    /// [`packed_len`]`(n, k)` f32 in the layout of [`pack`]; on a GPU bf16 `[n, k]`, row-major.
    pub data: Buffer,
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
}

/// What [`forward`] adds to a finished sum, before the one store of it.
#[derive(Clone, Copy)]
pub enum Epilogue<'a> {
    /// Nothing.
    None,
    /// A bias `[n]`.
    Bias(&'a Buffer),
    /// A residual `[m, n]`, which may be `y` itself.
    Add(&'a Buffer),
    /// A bias, then a residual.
    BiasAdd(&'a Buffer, &'a Buffer),
}

/// Floats of a packed weight with `n` outputs and `k` inputs.
pub fn packed_len(n: usize, k: usize) -> usize {
    n.div_ceil(PANEL) * PANEL * k
}

/// Packs `rows`, `[n, k]` row-major (the layout of checkpoints), into `out` of [`packed_len`] floats. On the host.
pub fn pack(rows: &[f32], n: usize, k: usize, out: &mut [f32]) {
    assert_eq!((rows.len(), out.len()), (n * k, packed_len(n, k)), "packing a weight of {n} outputs and {k} inputs");
    for (p, panel) in out.chunks_mut(PANEL * k.max(1)).enumerate() {
        let lanes = PANEL.min(n - p * PANEL);
        if lanes < PANEL {
            panel.fill(0.0);
        }
        // SAFETY: rows `16 p .. 16 p + lanes` of `rows`; a panel holds `k` steps of 16 lanes.
        unsafe { transpose(rows.as_ptr().add(p * PANEL * k), k, lanes, k, panel.as_mut_ptr(), PANEL) }
    }
}

/// The inverse of [`pack`]: `out` is `[n, k]` row-major. On the host.
pub fn unpack(packed: &[f32], n: usize, k: usize, out: &mut [f32]) {
    assert_eq!(
        (packed.len(), out.len()),
        (packed_len(n, k), n * k),
        "unpacking a weight of {n} outputs and {k} inputs"
    );
    for (p, rows) in out.chunks_mut(PANEL * k.max(1)).enumerate() {
        let lanes = PANEL.min(n - p * PANEL);
        // SAFETY: panel `p` holds `k` steps of 16 lanes, `rows` the first `lanes` of them.
        unsafe { transpose(packed.as_ptr().add(p * PANEL * k), PANEL, k, lanes, rows.as_mut_ptr(), k) }
    }
}

/// Elements of a weight with `n` outputs and `k` inputs where `s` runs.
fn stored_len(s: &Stream, n: usize, k: usize) -> usize {
    if s.device().packs_weights() { packed_len(n, k) } else { n * k }
}

fn check(s: &Stream, w: &Weight) {
    assert!(w.n > 0 && w.k > 0, "a weight of {} outputs and {} inputs", w.n, w.k);
    assert!(w.data.len() == stored_len(s, w.n, w.k), "a weight [{}, {}] in {:?}", w.n, w.k, w.data);
}

/// `y[m, n] = x[m, k] W^T`, plus what the epilogue says. Panics if `y` overlaps `x`.
///
/// On a GPU `y` may be f32 (logits), and so is a residual then.
pub fn forward(s: &Stream, x: &Buffer, w: &Weight, epilogue: Epilogue, y: &Buffer, m: usize) {
    check(s, w);
    let (n, k) = (w.n, w.k);
    assert!(x.len() >= m * k && y.len() >= m * n, "{m} rows of a weight [{n}, {k}]: x is {x:?}, y is {y:?}");
    assert!(!y.overlaps(x), "y apart from x");
    let (bias, residual) = match epilogue {
        Epilogue::None => (None, None),
        Epilogue::Bias(b) => (Some(b.clone()), None),
        Epilogue::Add(r) => (None, Some(r.clone())),
        Epilogue::BiasAdd(b, r) => (Some(b.clone()), Some(r.clone())),
    };
    assert!(bias.as_ref().is_none_or(|b| b.len() >= n), "a bias of {bias:?} for {n} outputs");
    assert!(residual.as_ref().is_none_or(|r| r.len() >= m * n), "a residual of {residual:?} for [{m}, {n}]");
    let (x, w, y) = (x.clone(), w.clone(), y.clone());
    match s.backend() {
        Backend::Cpu(s) => s.launch(move |pool| {
            // SAFETY: lengths were checked, the stream orders writers, and `y` is apart from `x`.
            unsafe {
                let null = std::ptr::null();
                let bias = bias.map_or(null, |b| b.get::<f32>().as_ptr());
                let residual = residual.map_or(null, |r| r.get::<f32>().as_ptr());
                let y = y.get_mut::<f32>().as_mut_ptr();
                // In place, reads and writes go through one pointer.
                let residual = if std::ptr::eq(residual, y) { y.cast_const() } else { residual };
                let out = Out::Rows { y, stride: n, cols: n, continues: false, bias, residual };
                forward_on(pool, Isa::detect(), x.get(), w.data.get(), m, n, k, out);
            }
        }),
        Backend::Gpu(gpu) => {
            let then = gpu::Then::Add { bias: bias.as_ref(), residual: residual.as_ref() };
            gpu::forward(gpu, &x, &w, then, &y, m);
        }
    }
}

/// `h[m, n / 2] = silu(gate) up` of `[gate, up] = x[m, k] W^T + bias`, with the bits of [`forward`] and
/// [`swiglu::forward`](super::swiglu::forward). On a GPU in one pass; elsewhere `gate_up`, `[m, n]`, takes what is in between, and a
/// GPU's may be empty. Panics if any of `x`, `gate_up` and `h` overlap.
pub fn forward_gated(
    s: &Stream,
    x: &Buffer,
    w: &Weight,
    bias: Option<&Buffer>,
    gate_up: &Buffer,
    h: &Buffer,
    m: usize,
) {
    check(s, w);
    let (n, k) = (w.n, w.k);
    assert!(n.is_multiple_of(2), "as many gates as ups in {n} outputs");
    assert!(x.len() >= m * k && h.len() >= m * n / 2, "{m} rows of a weight [{n}, {k}]: x is {x:?}, h is {h:?}");
    assert!(!h.overlaps(x) && !h.overlaps(gate_up) && !gate_up.overlaps(x), "x, gate_up and h apart");
    assert!(bias.is_none_or(|b| b.len() >= n), "a bias of {bias:?} for {n} outputs");
    let float = s.device().float();
    assert!([x, h].into_iter().chain(bias).all(|b| b.dtype() == float), "{x:?}, {h:?} and {bias:?} of {float:?}");
    match s.backend() {
        Backend::Cpu(_) => {
            forward(s, x, w, bias.map_or(Epilogue::None, Epilogue::Bias), gate_up, m);
            super::swiglu::forward(s, gate_up, h, m, n / 2);
        }
        Backend::Gpu(gpu) => gpu::forward(gpu, x, w, gpu::Then::Gate { bias }, h, m),
    }
}

/// # Safety
/// As [`gemm::multiply`], with lengths for `[m, k]` and `[n, k]`.
unsafe fn forward_on(pool: &Pool, isa: Isa, x: &[f32], w: &[f32], m: usize, n: usize, k: usize, out: Out) {
    let product = Product { rows: m, len: k, panels: n.div_ceil(PANEL), right: w.as_ptr(), stride: k * PANEL };
    // SAFETY: by contract.
    unsafe { gemm::multiply(pool, isa, Left::Rows(x.as_ptr(), k), &product, out) }
}

/// `dx[m, k] = dy[m, n] W`, or `+=` if `accumulate`: a sum over ascending outputs, from zero or from `dx`.
pub fn backward_input(s: &Stream, dy: &Buffer, w: &Weight, dx: &Buffer, m: usize, accumulate: bool) {
    check(s, w);
    let (n, k) = (w.n, w.k);
    assert!(dy.len() >= m * n && dx.len() >= m * k, "{m} rows of a weight [{n}, {k}]: dy is {dy:?}, dx is {dx:?}");
    assert!(!dx.overlaps(dy), "dx apart from dy");
    let (dy, w, dx) = (dy.clone(), w.clone(), dx.clone());
    match s.backend() {
        // SAFETY: lengths were checked, the stream orders writers, and `dx` is apart from `dy`.
        Backend::Cpu(s) => s.launch(move |pool| unsafe {
            let (dy, w, dx) = (dy.get::<f32>(), w.data.get::<f32>(), dx.get_mut::<f32>());
            backward_input_on(pool, Isa::detect(), dy, w, dx.as_mut_ptr(), m, n, k, accumulate);
        }),
        Backend::Gpu(gpu) => gpu.matmul(Matmul { accumulate, ..Matmul::new(&dy, &w.data, &dx, [m, k, n]) }),
    }
}

/// # Safety
/// Lengths for `[m, n]`, `[n, k]`, `[m, k]`; `dx` overlaps neither input, nothing else writes them meanwhile.
unsafe fn backward_input_on(
    pool: &Pool,
    isa: Isa,
    dy: &[f32],
    w: &[f32],
    dx: *mut f32,
    m: usize,
    n: usize,
    k: usize,
    accumulate: bool,
) {
    let panels = k.div_ceil(PANEL);
    for start in (0..n).step_by(PART) {
        let part = PART.min(n - start);
        let slab = (SLAB / (part * PANEL)).min(panels);
        for first in (0..panels).step_by(slab) {
            let count = slab.min(panels - first);
            with_scratch(1, count * part * PANEL, |turned| {
                let to = SendPtr(turned);
                // The transpose of the weight, [k / 16][part][16], for these inputs and outputs.
                spread(pool, count * part * PANEL, count.div_ceil(SIDE), |item| {
                    for o in (0..part).step_by(PANEL) {
                        for i in item * SIDE..count.min((item + 1) * SIDE) {
                            let at = (first + i) * PANEL;
                            let inputs = PANEL.min(k - at);
                            // SAFETY: a block of `inputs` steps of the panel of output `start + o`; each item writes
                            // its own panels of `turned`.
                            unsafe {
                                let from = w.as_ptr().add((start + o) * k + at * PANEL);
                                let to = to.get().add((i * part + o) * PANEL);
                                transpose_padded(from, inputs, PANEL.min(part - o), to);
                            }
                        }
                    }
                });
                let product = Product { rows: m, len: part, panels: count, right: turned, stride: part * PANEL };
                let cols = (count * PANEL).min(k - first * PANEL);
                let (bias, residual) = (std::ptr::null(), std::ptr::null());
                let continues = accumulate || start > 0;
                // SAFETY: by contract; the columns from `16 first` of `dx`, the columns from `start` of `dy`.
                unsafe {
                    let out = Out::Rows { y: dx.add(first * PANEL), stride: k, cols, continues, bias, residual };
                    gemm::multiply(pool, isa, Left::Rows(dy.as_ptr().add(start), n), &product, out);
                }
            });
        }
    }
}

/// A block of `steps <= 16` steps of 16 lanes, turned: `outputs` steps of `steps` lanes and zeros up to 16.
///
/// # Safety
/// `from` holds `16 steps` floats, `to` takes `16 outputs`.
unsafe fn transpose_padded(from: *const f32, steps: usize, outputs: usize, to: *mut f32) {
    // SAFETY: by contract.
    unsafe {
        transpose(from, PANEL, steps, outputs, to, PANEL);
        for o in 0..outputs {
            (steps..PANEL).for_each(|lane| *to.add(o * PANEL + lane) = 0.0);
        }
    }
}

/// Panels that [`backward_input`] copies at a time: so many lie side by side in memory, 4 KiB.
const SIDE: usize = 4;
/// Outputs whose gradients [`backward_input`] sums before it moves on to the next: bounds its scratch memory. A
/// multiple of [`PANEL`].
const PART: usize = 4096;
/// Rows of a batch that [`backward_weight`] takes at a time, for the same reason.
pub(super) const BATCH: usize = 512;

/// `dW += dy[m, n]^T x[m, k]`, `dw` laid out like the weight, f32: sums over ascending rows that start from `dw`.
///
/// `n` and `k` are what the lengths of `dy` and `x` say, so pass views of exactly `m` rows.
pub fn backward_weight(s: &Stream, dy: &Buffer, x: &Buffer, dw: &Buffer, m: usize) {
    if m == 0 {
        return;
    }
    let (n, k) = (dy.len() / m, x.len() / m);
    assert!(
        dy.len() == m * n && x.len() == m * k && dw.len() == stored_len(s, n, k),
        "a weight's gradient from {m} rows: dy is {dy:?}, x is {x:?}, dw is {dw:?}"
    );
    let (dy, x, dw) = (dy.clone(), x.clone(), dw.clone());
    match s.backend() {
        // SAFETY: lengths were checked, the stream orders writers, and a gradient is no activation.
        Backend::Cpu(s) => s.launch(move |pool| unsafe {
            let (dy, x, dw) = (dy.get::<f32>(), x.get::<f32>(), dw.get_mut::<f32>());
            backward_weight_on(pool, Isa::detect(), dy, x, dw.as_mut_ptr(), m, n, k);
        }),
        Backend::Gpu(gpu) => {
            gpu.matmul(Matmul { accumulate: true, ..Matmul::transposed(&dy, &x, &dw, [n, k, m]) });
        }
    }
}

/// # Safety
/// Lengths for `[m, n]`, `[m, k]`, packed `[n, k]`; `dw` overlaps neither input, nothing else writes them meanwhile.
unsafe fn backward_weight_on(pool: &Pool, isa: Isa, dy: &[f32], x: &[f32], dw: *mut f32, m: usize, n: usize, k: usize) {
    let panels = n.div_ceil(PANEL);
    for start in (0..m).step_by(BATCH) {
        let steps = BATCH.min(m - start);
        let slab = (SLAB / (steps * PANEL)).min(panels);
        for first in (0..panels).step_by(slab) {
            let count = slab.min(panels - first);
            with_scratch(1, count * steps * PANEL, |right| {
                let to = SendPtr(right);
                spread(pool, count * steps * PANEL, count.div_ceil(ABREAST), |item| {
                    gather_abreast(steps, item * ABREAST..count.min((item + 1) * ABREAST), |i, t, steps_here| {
                        let column = (first + i) * PANEL;
                        let lanes = PANEL.min(n - column);
                        // SAFETY: `lanes` columns of rows from `start + t`; each item writes its own panels.
                        unsafe {
                            let to = to.get().add((i * steps + t) * PANEL);
                            let from = dy.as_ptr().add((start + t) * n + column);
                            if lanes == PANEL {
                                gather_rows(from, n, steps_here, PANEL, to);
                            } else {
                                for t in 0..steps_here {
                                    let to = to.add(t * PANEL);
                                    to.copy_from_nonoverlapping(from.add(t * n), lanes);
                                    (lanes..PANEL).for_each(|lane| *to.add(lane) = 0.0);
                                }
                            }
                        }
                    });
                });
                let product = Product { rows: k, len: steps, panels: count, right, stride: steps * PANEL };
                // SAFETY: by contract.
                unsafe {
                    let left = Left::Columns(x.as_ptr().add(start * k), k);
                    let out = Out::Panels { c: dw.add(first * PANEL * k), stride: k * PANEL };
                    gemm::multiply(pool, isa, left, &product, out);
                }
            });
        }
    }
}

/// `db[n] += ` the sum of `dy[m, n]` over ascending rows, starting from `db`. `n` is the length of `db`, which is f32.
pub fn backward_bias(s: &Stream, dy: &Buffer, db: &Buffer, m: usize) {
    let n = db.len();
    assert!(dy.len() >= m * n, "a bias gradient of {n} outputs from {m} rows: dy is {dy:?}");
    let (dy, db) = (dy.clone(), db.clone());
    match s.backend() {
        // SAFETY: lengths were checked, and the stream orders writers.
        Backend::Cpu(s) => s.launch(move |pool| unsafe { backward_bias_on(pool, dy.get(), db.get_mut(), m) }),
        Backend::Gpu(gpu) => gpu::backward_bias(gpu, &dy, &db, m),
    }
}

fn backward_bias_on(pool: &Pool, dy: &[f32], db: &mut [f32], m: usize) {
    let n = db.len();
    // A few cache lines of each row per item.
    pool.chunks_mut(db, 8 * PANEL, |i, sums| {
        let at = i * 8 * PANEL;
        for t in 0..m {
            let row = &dy[t * n + at..][..sums.len()];
            sums.iter_mut().zip(row).for_each(|(sum, g)| *sum += g);
        }
    });
}
