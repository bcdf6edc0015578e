//! Losses on the log-probabilities of chosen tokens, with their gradients through the language-model head.
//!
//! The logits of a 150k vocabulary never exist for all rows: rows go through in chunks whose logits fit a budget, and a
//! chunk's logits are overwritten by their gradient (on a GPU in bf16, which is what the products with it take). A row of hidden states that several entries refer to (the last token
//! of a prompt that a whole group shares) goes through once.
//!
//! With x the logits of an entry's row, T its temperature and y its target, over the ids that are not forbidden:
//! `logp = x_y / T - ln(sum exp(x_j / T))`, taken from [`softmax`] as the sampler's is. The total loss is
//! `sum over entries of weight * loss`, with, per entry,
//!
//! - [`Objective::Nll`]: `loss = -logp`;
//! - [`Objective::Grpo`] (Shao et al. 2024, arXiv 2402.03300; the asymmetric clip is DAPO's, arXiv 2503.14476):
//!   `loss = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + beta (exp(d) - d - 1)`, `r = exp(logp - old_logp)`,
//!   `d = ref_logp - logp` (the k3 estimator of the KL divergence).

mod gpu;

use super::linear::{self, Epilogue, Weight};
use super::rows;
use super::simd::{exp, madd, multiversion};
use super::softmax::{self, BLOCK, GROUP, LogSumExp, allowed, forbidden_words, is_forbidden, log_sum_exp};
use crate::device::{Backend, Buffer, DType, Device, Inputs, Matmul, SendPtr, Stream};

/// Most rows of a chunk, whatever the budget: more make the products no faster.
const MAX_CHUNK: usize = 1024;

/// Which tokens of a batch are scored: `n` entries, each a row of hidden states, a target id and a temperature.
pub struct LossRows {
    n: usize,
    /// The distinct rows, ascending, u32.
    unique: Buffer,
    /// For distinct row u, its entries are `order[start[u]..start[u + 1]]`, by temperature; on the host, it cuts the work into chunks.
    start: std::sync::Arc<Vec<u32>>,
    order: std::sync::Arc<Vec<u32>>,
    targets: Buffer,
    temperature: Buffer,
    /// What a GPU's kernels go by.
    runs: Option<gpu::Runs>,
}

impl LossRows {
    /// Entry e scores the token `targets[e]` by the logits of `rows[e]` of the hidden states at `temperature[e]` (0 as 1,
    /// see [`softmax::scoring_temperature`]). Rows may repeat and come in any order. The lists are uploaded on `s`.
    pub fn new(s: &Stream, rows: &[u32], targets: &[u32], temperature: &[f32]) -> LossRows {
        let n = rows.len();
        assert!(targets.len() == n && temperature.len() == n, "a target and a temperature for each of {n} entries");
        let mut order: Vec<u32> = (0..n as u32).collect();
        order.sort_by_key(|&e| (rows[e as usize], temperature[e as usize].to_bits()));
        let (mut unique, mut start) = (vec![], vec![]);
        for (i, &e) in order.iter().enumerate() {
            if unique.last() != Some(&rows[e as usize]) {
                unique.push(rows[e as usize]);
                start.push(i as u32);
            }
        }
        start.push(n as u32);
        let mut inputs = Inputs::new(s.device(), 0);
        let [unique, targets] = [&unique, targets].map(|list| inputs.put_all(list));
        let listed = inputs.put_all(temperature);
        let runs = match s.backend() {
            Backend::Gpu(_) => Some(gpu::Runs::put(&mut inputs, &start, &order, temperature)),
            Backend::Cpu(_) => None,
        };
        inputs.send(s);
        LossRows {
            n,
            unique: inputs.get(unique),
            runs: runs.map(|runs| runs.sent(&inputs)),
            start: start.into(),
            order: order.into(),
            targets: inputs.get(targets),
            temperature: inputs.get(listed),
        }
    }

    /// Number of entries.
    #[allow(clippy::len_without_is_empty)] // nobody asks whether it is empty
    pub fn len(&self) -> usize {
        self.n
    }

    fn runs(&self) -> &gpu::Runs {
        self.runs.as_ref().expect("entries that were made for a GPU")
    }

    /// Number of distinct rows: what goes through the head.
    pub fn distinct(&self) -> usize {
        self.unique.len()
    }
}

/// The penalty for leaving a reference model.
#[derive(Clone, Copy)]
pub struct Kl<'a> {
    /// f32 `[n]`: the reference's log-probabilities of the targets.
    pub ref_logp: &'a Buffer,
    /// Its factor.
    pub beta: f32,
}

/// What is minimised, per entry; see the module's text.
#[derive(Clone, Copy)]
pub enum Objective<'a> {
    /// Negative log-likelihood.
    Nll,
    /// Clipped policy gradient.
    Grpo {
        /// f32 `[n]`: log-probabilities under the policy that sampled.
        old_logp: &'a Buffer,
        /// f32 `[n]`.
        advantage: &'a Buffer,
        /// The ratio is clipped below at `1 - clip_low`.
        clip_low: f32,
        /// The ratio is clipped above at `1 + clip_high`.
        clip_high: f32,
        /// None where there is no penalty: no reference model is needed then.
        kl: Option<Kl<'a>>,
    },
}

/// What [`forward_backward`] tells about each entry; f32 `[n]` each.
#[derive(Clone)]
pub struct Outputs {
    /// Log-probability of the target.
    pub logp: Buffer,
    /// Entropy of the distribution at the entry's temperature over the allowed ids, in nats.
    pub entropy: Buffer,
    /// The entry's loss, before its weight.
    pub loss: Buffer,
    /// `exp(logp - old_logp)`; 1 for Nll.
    pub ratio: Buffer,
    /// The k3 estimate `exp(d) - d - 1`; 0 without a reference.
    pub kl: Buffer,
    /// 1 where the clip takes the gradient away, else 0.
    pub clipped: Buffer,
}

impl Outputs {
    /// Room for `n` entries.
    pub fn new(device: &Device, n: usize) -> Outputs {
        let f = || device.alloc(DType::F32, n);
        Outputs { logp: f(), entropy: f(), loss: f(), ratio: f(), kl: f(), clipped: f() }
    }
}

/// Buffers for a chunk of rows: hidden states, logits, and the gradient of the hidden states.
pub struct Workspace {
    hidden: Buffer,
    logits: Buffer,
    dhidden: Buffer,
    rows: usize,
}

impl Workspace {
    /// For a head of `vocabulary` outputs and `hidden` inputs: as many rows as have their logits within `budget` bytes,
    /// at least one, at most 1024 and at most `max_rows`. The results depend on the budget in no bit, but for gradients on a
    /// GPU, whose products add in an order of their own.
    pub fn new(device: &Device, vocabulary: usize, hidden: usize, max_rows: usize, budget: usize) -> Workspace {
        let rows = Self::rows_within(vocabulary, budget).min(max_rows.max(1));
        Workspace {
            hidden: device.alloc(device.float(), rows * hidden),
            logits: device.alloc(DType::F32, rows * vocabulary),
            dhidden: device.alloc(device.float(), rows * hidden),
            rows,
        }
    }

    /// How many rows have their logits within `budget` bytes: at least one, at most 1024.
    pub fn rows_within(vocabulary: usize, budget: usize) -> usize {
        (budget / (DType::F32.size() * vocabulary)).clamp(1, MAX_CHUNK)
    }

    /// Bytes of a workspace for as many rows as `budget` allows, where hidden states are of type `float`.
    pub fn bytes_for(float: DType, vocabulary: usize, hidden: usize, budget: usize) -> usize {
        Self::rows_within(vocabulary, budget) * (2 * hidden * float.size() + vocabulary * DType::F32.size())
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        [&self.hidden, &self.logits, &self.dhidden].into_iter().map(|b| b.len() * b.dtype().size()).sum()
    }

    fn check(&self, head: &Weight) {
        let (v, h) = (self.logits.len() / self.rows, self.hidden.len() / self.rows);
        assert_eq!((v, h), (head.n, head.k), "a workspace for this head");
    }
}

/// The log-probability of each entry into `logp` f32 `[n]`, and the entropies into `entropy` if asked for. `hidden` is
/// `[t, head.k]`; `forbidden` is a set of [`softmax::forbidden_words`] words.
pub fn logprobs(
    s: &Stream,
    hidden: &Buffer,
    head: &Weight,
    entries: &LossRows,
    forbidden: &Buffer,
    ws: &Workspace,
    logp: &Buffer,
    entropy: Option<&Buffer>,
) {
    let v = head.n;
    assert!(forbidden.len() == forbidden_words(v), "a forbidden set over {v} ids");
    assert!(
        logp.len() >= entries.n && entropy.is_none_or(|b| b.len() >= entries.n),
        "results of {} entries",
        entries.n
    );
    for (first, m) in chunks(s, hidden, head, entries, ws) {
        let (logits, forbidden) = (ws.logits.clone(), forbidden.clone());
        let (targets, temperature) = (entries.targets.clone(), entries.temperature.clone());
        let (start, order) = (entries.start.clone(), entries.order.clone());
        let (logp, entropy) = (logp.clone(), entropy.cloned());
        match s.backend() {
            Backend::Cpu(s) => s.launch(move |pool| {
                // SAFETY: launches of one stream run in order; the results are not inputs.
                let (x, forbidden, targets, temperature, logp) = unsafe {
                    (logits.get::<f32>(), forbidden.get(), targets.get::<u32>(), temperature.get::<f32>(), out(&logp))
                };
                // SAFETY: as above.
                let entropy = entropy.map(|b| unsafe { out(&b) });
                pool.run(m, |i| {
                    let row = &x[i * v..][..v];
                    let mut seen = Scored::default();
                    for e in entries_of(&start, &order, first + i) {
                        let at = seen.at(row, temperature[e], forbidden, entropy.is_some());
                        // SAFETY: an entry has one row, and the row is this item's.
                        unsafe {
                            *logp.get().add(e) = target_logp(&at.lse, row, forbidden, targets[e] as usize);
                            if let Some(b) = entropy {
                                *b.get().add(e) = at.entropy;
                            }
                        }
                    }
                });
            }),
            Backend::Gpu(gpu) => {
                let chunk = entries.runs().chunk(gpu, &logits, &forbidden, (first, m), v, entropy.is_some());
                chunk.logprobs(&targets, &logp, entropy.as_ref());
            }
        }
    }
}

/// The loss of each entry, and the gradients of `sum of weight * loss`: `dhidden += ..` `[t, head.k]` and, where the head
/// is trained, `dhead += ..` (packed like the head). `weight` is f32 `[n]`. A loss that is not finite comes out as it is;
/// so do its gradients, with one exception: a target that is forbidden has the log-probability -inf and under
/// [`Objective::Nll`] an infinite loss, but a finite gradient, which takes its logit for one outside the softmax.
pub fn forward_backward(
    s: &Stream,
    hidden: &Buffer,
    head: &Weight,
    entries: &LossRows,
    objective: Objective<'_>,
    weight: &Buffer,
    forbidden: &Buffer,
    ws: &Workspace,
    results: &Outputs,
    dhidden: &Buffer,
    dhead: Option<&Buffer>,
) {
    let (v, h, n) = (head.n, head.k, entries.n);
    assert!(forbidden.len() == forbidden_words(v), "a forbidden set over {v} ids");
    assert!(weight.len() >= n, "a weight for each of {n} entries");
    let o = results;
    assert!([&o.logp, &o.entropy, &o.loss, &o.ratio, &o.kl, &o.clipped].iter().all(|b| b.len() >= n), "{n} results");
    let terms = Terms::new(objective, n);
    for (first, m) in chunks(s, hidden, head, entries, ws) {
        let (logits, forbidden, weight) = (ws.logits.clone(), forbidden.clone(), weight.clone());
        let (targets, temperature) = (entries.targets.clone(), entries.temperature.clone());
        let (start, order) = (entries.start.clone(), entries.order.clone());
        let (terms, results) = (terms.clone(), results.clone());
        match s.backend() {
            Backend::Cpu(cpu) => {
                cpu.launch(move |pool| {
                    // SAFETY: launches of one stream run in order; the results are not inputs.
                    let (forbidden, targets, temperature, weight) = unsafe {
                        (forbidden.get(), targets.get::<u32>(), temperature.get::<f32>(), weight.get::<f32>())
                    };
                    // SAFETY: as above.
                    let [logp, entropy, loss, ratio, kl, clipped] = unsafe {
                        [&results.logp, &results.entropy, &results.loss, &results.ratio, &results.kl, &results.clipped]
                            .map(|b| out(b))
                    };
                    // SAFETY: as above.
                    let x = unsafe { logits.get_mut::<f32>() };
                    pool.chunks_mut(&mut x[..m * v], v, |i, row| {
                        let mut seen = Scored::default();
                        let mut at_targets: Vec<(usize, f32)> = vec![];
                        for e in entries_of(&start, &order, first + i) {
                            let at = seen.at(row, temperature[e], forbidden, true);
                            let target = targets[e] as usize;
                            let lp = target_logp(&at.lse, row, forbidden, target);
                            let t = terms.evaluate(e, lp);
                            // d(weight * loss) / d(x_y / T)
                            let slope = (t.slope * weight[e] as f64) as f32 * at.lse.inv_t;
                            at.slope += slope;
                            at_targets.push((target, slope));
                            // SAFETY: an entry has one row, and the row is this item's.
                            unsafe {
                                *logp.get().add(e) = lp;
                                *entropy.get().add(e) = at.entropy;
                                *loss.get().add(e) = t.loss as f32;
                                *ratio.get().add(e) = t.ratio as f32;
                                *kl.get().add(e) = t.kl as f32;
                                *clipped.get().add(e) = t.clipped as u8 as f32;
                            }
                        }
                        seen.gradient(row, forbidden);
                        for (target, slope) in at_targets {
                            row[target] += slope;
                        }
                    });
                });
                linear::backward_input(s, &ws.logits, head, &ws.dhidden, m, false);
                if let Some(dhead) = dhead {
                    linear::backward_weight(s, &ws.logits.view(0, m * v), &ws.hidden.view(0, m * h), dhead, m);
                }
            }
            Backend::Gpu(gpu) => {
                let chunk = entries.runs().chunk(gpu, &logits, &forbidden, (first, m), v, true);
                let stride = 2 * v; // where f32 logits were
                let gradient = chunk.forward_backward(&terms, &targets, &weight, &results);
                gpu.matmul(Matmul { stride, ..Matmul::new(&gradient, &head.data, &ws.dhidden, [m, h, v]) });
                if let Some(dhead) = dhead {
                    let product = Matmul::transposed(&gradient, &ws.hidden, dhead, [v, h, m]);
                    gpu.matmul(Matmul { stride, accumulate: true, ..product });
                }
            }
        }
        rows::scatter_add(s, &ws.dhidden, &entries.unique.view(first, m), dhidden, m, h);
    }
}

/// Submits each chunk's logits, into the workspace, when the iterator reaches it; gives (first distinct row, rows).
fn chunks<'a>(
    s: &'a Stream,
    hidden: &'a Buffer,
    head: &'a Weight,
    entries: &'a LossRows,
    ws: &'a Workspace,
) -> impl Iterator<Item = (usize, usize)> + 'a {
    ws.check(head);
    let total = entries.distinct();
    (0..total).step_by(ws.rows).map(move |first| {
        let m = ws.rows.min(total - first);
        rows::gather(s, hidden, &entries.unique.view(first, m), &ws.hidden, m, head.k);
        linear::forward(s, &ws.hidden, head, Epilogue::None, &ws.logits, m);
        (first, m)
    })
}

fn entries_of<'a>(start: &[u32], order: &'a [u32], u: usize) -> impl Iterator<Item = usize> + 'a {
    order[start[u] as usize..start[u + 1] as usize].iter().map(|&e| e as usize)
}

/// # Safety
/// As [`Buffer::get_mut`].
unsafe fn out(b: &Buffer) -> SendPtr<f32> {
    // SAFETY: by contract.
    SendPtr(unsafe { b.get_mut::<f32>() }.as_mut_ptr())
}

fn target_logp(lse: &LogSumExp, row: &[f32], forbidden: &[u32], target: usize) -> f32 {
    if is_forbidden(forbidden, target) { f32::NEG_INFINITY } else { lse.logp(row[target]) }
}

/// One row at one temperature.
struct AtTemperature {
    temperature: f32,
    lse: LogSumExp,
    entropy: f32,
    /// The sum of the slopes of the entries at this temperature.
    slope: f32,
}

/// One row at the temperatures of its entries: one, unless the sequences that share it were sampled at several.
#[derive(Default)]
struct Scored(Vec<AtTemperature>);

impl Scored {
    fn at(&mut self, row: &[f32], temperature: f32, forbidden: &[u32], entropy: bool) -> &mut AtTemperature {
        let known = self.0.iter().position(|a| a.temperature.to_bits() == temperature.to_bits());
        let i = known.unwrap_or_else(|| {
            let lse = log_sum_exp(row, temperature, forbidden);
            let entropy = if entropy { softmax::entropy(row, forbidden, &lse) } else { 0.0 };
            self.0.push(AtTemperature { temperature, lse, entropy, slope: 0.0 });
            self.0.len() - 1
        });
        &mut self.0[i]
    }

    /// Overwrites the logits by the softmax's part of their gradient: `-sum over temperatures of slope * p`.
    fn gradient(&self, row: &mut [f32], forbidden: &[u32]) {
        for (x, words) in row.chunks_mut(BLOCK).zip(forbidden.chunks(BLOCK / GROUP)) {
            block_gradient(x, words, &self.0);
        }
    }
}

#[inline(always)]
fn block_gradient_body<const FMA: bool>(x: &mut [f32], words: &[u32], at: &[AtTemperature]) {
    for g in 0..words.len() {
        let v = allowed(x, words, g);
        let mut d = [0.0f32; GROUP];
        for a in at {
            for i in 0..GROUP {
                let logp = madd::<FMA>(v[i] - a.lse.max, a.lse.inv_t, -a.lse.log_sum);
                d[i] = madd::<FMA>(-a.slope, exp::<FMA>(logp), d[i]);
            }
        }
        let to = &mut x[g * GROUP..];
        let n = to.len().min(GROUP);
        to[..n].copy_from_slice(&d[..n]);
    }
}
multiversion!(fn block_gradient(x: &mut [f32], words: &[u32], at: &[AtTemperature]) = block_gradient_body, "avx2,fma");

/// An entry's loss and its derivative.
struct Term {
    loss: f64,
    /// d loss / d logp
    slope: f64,
    ratio: f64,
    kl: f64,
    clipped: bool,
}

/// The objective, with the buffers that it reads inside a launch.
#[derive(Clone)]
enum Terms {
    Nll,
    Grpo { old_logp: Buffer, advantage: Buffer, clip_low: f32, clip_high: f32, kl: Option<(Buffer, f32)> },
}

impl Terms {
    fn new(objective: Objective<'_>, n: usize) -> Terms {
        match objective {
            Objective::Nll => Terms::Nll,
            Objective::Grpo { old_logp, advantage, clip_low, clip_high, kl } => {
                let reference = kl.map(|k| k.ref_logp);
                let inputs = [Some(old_logp), Some(advantage), reference];
                assert!(inputs.into_iter().flatten().all(|b| b.len() >= n), "inputs of {n} entries");
                assert!(clip_low >= 0.0 && clip_high >= 0.0, "clips of {clip_low} and {clip_high}");
                let kl = kl.map(|k| (k.ref_logp.clone(), k.beta));
                Terms::Grpo { old_logp: old_logp.clone(), advantage: advantage.clone(), clip_low, clip_high, kl }
            }
        }
    }

    /// Called within a launch.
    fn evaluate(&self, e: usize, logp: f32) -> Term {
        // SAFETY: the launch's stream orders the writers of these inputs.
        let read = |b: &Buffer| unsafe { b.get::<f32>()[e] } as f64;
        let lp = logp as f64;
        match self {
            Terms::Nll => Term { loss: -lp, slope: -1.0, ratio: 1.0, kl: 0.0, clipped: false },
            Terms::Grpo { old_logp, advantage, clip_low, clip_high, kl } => {
                let (low, high) = (1.0 - *clip_low as f64, 1.0 + *clip_high as f64);
                let (ratio, a) = ((lp - read(old_logp)).exp(), read(advantage));
                let (plain, bounded) = (ratio * a, ratio.clamp(low, high) * a);
                let clipped = bounded < plain;
                let mut t = Term {
                    // Written so that a NaN stays one.
                    loss: if clipped { -bounded } else { -plain },
                    slope: if clipped { 0.0 } else { -plain },
                    ratio,
                    kl: 0.0,
                    clipped,
                };
                if let Some((reference, beta)) = kl {
                    let (d, beta) = (read(reference) - lp, *beta as f64);
                    t.kl = d.exp() - d - 1.0;
                    t.loss += beta * t.kl;
                    t.slope += beta * (1.0 - d.exp());
                }
                t
            }
        }
    }
}

#[cfg(test)]
mod tests;
