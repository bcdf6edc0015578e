//! The loss's kernels.
//!
//! The entries of one row at one temperature are a run: its log-sum-exp is taken once, in two steps, over blocks of ids (the
//! logits' only pass in [`logprobs`](super::logprobs)), then over the blocks. The gradient's pass puts bf16 in the place of the
//! f32 logits, row by row: no memory is taken for it, and the products read rows that are twice as far apart.

use super::super::softmax::{self, block_count};
use super::{Outputs, Terms};
use crate::device::{Arg, Buffer, DType, Gpu, Input, Inputs, Launch};

/// Threads of the kernels that give a warp to each run, and how many they are.
const THREADS: usize = 128;
const RUNS: usize = THREADS / 32;
/// Threads of the kernel that gives a block to each row.
const GRADIENT_THREADS: usize = 512;

/// The runs of a batch's entries, by row, then by temperature.
pub(super) struct Runs {
    /// Distinct row u's runs are `row_start[u]..row_start[u + 1]`.
    row_start: Vec<u32>,
    lists: Lists<Buffer>,
}

/// [`Runs`] whose lists are still to be sent.
pub(super) struct Unsent {
    row_start: Vec<u32>,
    lists: Lists<Input>,
}

/// What kernels read, u32 but for the temperatures.
struct Lists<T> {
    row_start: T,
    /// Of each run: the distinct row, the temperature, where its entries begin in `order`.
    row: T,
    temperature: T,
    start: T,
    order: T,
}

impl Runs {
    /// Of entries in `order`, those of distinct row u being `order[start[u]..start[u + 1]]`.
    pub fn put(inputs: &mut Inputs, start: &[u32], order: &[u32], temperature: &[f32]) -> Unsent {
        let (mut row, mut run_temperature, mut run_start) = (vec![], vec![], vec![]);
        let mut row_start = vec![0];
        for (u, bounds) in start.windows(2).enumerate() {
            for at in bounds[0]..bounds[1] {
                let t = temperature[order[at as usize] as usize];
                let last = if at == bounds[0] { None } else { run_temperature.last() };
                if last.is_none_or(|last: &f32| last.to_bits() != t.to_bits()) {
                    row.push(u as u32);
                    run_temperature.push(t);
                    run_start.push(at);
                }
            }
            row_start.push(row.len() as u32);
        }
        run_start.push(order.len() as u32);
        let lists = Lists {
            row_start: inputs.put_all(&row_start),
            row: inputs.put_all(&row),
            temperature: inputs.put_all(&run_temperature),
            start: inputs.put_all(&run_start),
            order: inputs.put_all(order),
        };
        Unsent { row_start, lists }
    }

    /// Submits the first pass over the logits `[m, v]` of the `m` distinct rows from `first` on.
    pub fn chunk<'a>(
        &'a self,
        gpu: &'a Gpu,
        logits: &Buffer,
        forbidden: &Buffer,
        (first, m): (usize, usize),
        v: usize,
        entropy: bool,
    ) -> Chunk<'a> {
        let first_run = self.row_start[first] as usize;
        let runs = self.row_start[first + m] as usize - first_run;
        let (all, blocks) = (&self.lists, block_count(v));
        let moments = if entropy { runs * blocks } else { 0 };
        let [sums, moments, run_gradient, entry_gradient] = gpu.scratch([
            (DType::F32, runs * blocks * 2),
            (DType::F32, moments),
            (DType::F32, runs * 4),
            (DType::F32, all.order.len() * 2),
        ]);
        let (row, temperature) = (all.row.view(first_run, runs), all.temperature.view(first_run, runs));
        let wanted = entropy.then_some(&moments);
        softmax::gpu_blocks(gpu, logits, Some(&row), &temperature, forbidden, &sums, wanted, [runs, first, v]);
        Chunk {
            gpu,
            logits: logits.clone(),
            forbidden: forbidden.clone(),
            sums,
            moments,
            run_gradient,
            entry_gradient,
            row_start: all.row_start.view(first, m + 1),
            row,
            temperature,
            start: all.start.view(first_run, runs + 1),
            order: &all.order,
            first,
            first_run,
            runs,
            m,
            v,
        }
    }
}

impl Unsent {
    /// The runs, now that `inputs` has been sent.
    pub fn sent(self, inputs: &Inputs) -> Runs {
        let Lists { row_start, row, temperature, start, order } = self.lists;
        let lists = Lists {
            row_start: inputs.get(row_start),
            row: inputs.get(row),
            temperature: inputs.get(temperature),
            start: inputs.get(start),
            order: inputs.get(order),
        };
        Runs { row_start: self.row_start, lists }
    }
}

/// The runs of a chunk of rows, after the first pass. Its buffers are of the stream's workspace.
pub(super) struct Chunk<'a> {
    gpu: &'a Gpu,
    logits: Buffer,
    forbidden: Buffer,
    sums: Buffer,
    moments: Buffer,
    run_gradient: Buffer,
    entry_gradient: Buffer,
    row_start: Buffer,
    row: Buffer,
    temperature: Buffer,
    start: Buffer,
    order: &'a Buffer,
    first: usize,
    first_run: usize,
    runs: usize,
    m: usize,
    v: usize,
}

impl Chunk<'_> {
    fn by_runs(&self) -> Launch {
        Launch::linear(self.runs.div_ceil(RUNS), THREADS)
    }

    /// What the kernels over runs begin with.
    fn of_runs<'a>(&'a self, targets: &'a Buffer) -> Vec<Arg<'a>> {
        let moments = if self.moments.len() > 0 { Arg::Buffer(&self.moments) } else { Arg::Null(DType::F32) };
        let [logits, sums, row, temperature, start, order, targets, forbidden] =
            [&self.logits, &self.sums, &self.row, &self.temperature, &self.start, self.order, targets, &self.forbidden]
                .map(Arg::Buffer);
        vec![logits, sums, moments, row, temperature, start, order, targets, forbidden]
    }

    /// What they end their lengths with.
    fn lengths(&self) -> [Arg<'static>; 3] {
        [self.runs, self.first, self.v].map(Arg::len)
    }

    /// [`logprobs`](super::logprobs) of the chunk.
    pub fn logprobs(&self, targets: &Buffer, logp: &Buffer, entropy: Option<&Buffer>) {
        let mut args = self.of_runs(targets);
        args.extend([Arg::Buffer(logp), Arg::maybe(entropy, DType::F32)]);
        args.extend(self.lengths());
        self.gpu.launch("loss_logprobs", self.by_runs(), &args);
    }

    /// The losses of the chunk's entries, and the gradient of its logits, in their place: bf16 `[m, v]`, rows `2 v` apart.
    pub fn forward_backward(&self, terms: &Terms, targets: &Buffer, weight: &Buffer, results: &Outputs) -> Buffer {
        let none = [None; 3];
        let ([old_logp, advantage, ref_logp], [low, high, beta]) = match terms {
            Terms::Nll => (none, [0.0; 3]),
            Terms::Grpo { old_logp, advantage, clip_low, clip_high, kl } => {
                let (reference, beta) = kl.as_ref().map_or((None, 0.0), |(reference, beta)| (Some(reference), *beta));
                ([Some(old_logp), Some(advantage), reference], [*clip_low, *clip_high, beta])
            }
        };
        let o = results;
        let mut args = self.of_runs(targets);
        args.push(Arg::Buffer(weight));
        args.extend([old_logp, advantage, ref_logp].map(|b| Arg::maybe(b, DType::F32)));
        args.extend([&o.logp, &o.entropy, &o.loss, &o.ratio, &o.kl, &o.clipped].map(Arg::Buffer));
        args.extend([&self.run_gradient, &self.entry_gradient].map(Arg::Buffer));
        args.extend(self.lengths());
        args.extend([low, high, beta].map(Arg::F32));
        self.gpu.launch("loss_terms", self.by_runs(), &args);

        let gradient = self.logits.as_bf16();
        let buffers = [
            &self.logits,
            &gradient,
            &self.row_start,
            &self.start,
            self.order,
            targets,
            &self.forbidden,
            &self.run_gradient,
            &self.entry_gradient,
        ];
        let mut args: Vec<Arg<'_>> = buffers.into_iter().map(Arg::Buffer).collect();
        args.extend([self.first_run, self.v].map(Arg::len));
        self.gpu.launch("loss_gradient", Launch::linear(self.m, GRADIENT_THREADS), &args);
        gradient
    }
}
