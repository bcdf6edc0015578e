//! The device's side of a step: buffers planned once, and the launches in their order.

use super::plan::Plan;
use super::scheduler::Limits;
use crate::Result;
use crate::device::{Buffer, DType, Graph, Input, Inputs, Pending, Stream};
use crate::model::{Config, Model, StepBatch, StepLimits, VisionWorkspace, Workspace};
use crate::ops::kv_cache::{self, KvCache};
use crate::ops::sample::{SampleParams, sample};
use crate::ops::{rows, softmax};
use std::collections::HashMap;
use std::sync::Arc;

/// Tokens on their way from the device.
pub(super) struct Drawn(Option<(Pending<u32>, Pending<f32>)>);

impl Drawn {
    /// Waits for the step; the ids and log-probabilities of its draws.
    pub fn wait(self) -> Result<(Vec<u32>, Vec<f32>)> {
        match self.0 {
            Some((tokens, logprobs)) => Ok((tokens.wait()?, logprobs.wait()?)),
            None => Ok(Default::default()),
        }
    }
}

/// The lists of a step that say what to draw, and what the step before has drawn.
struct Lists {
    row: Input,
    temperature: Input,
    top_k: Input,
    top_p: Input,
    min_p: Input,
    seed: Input,
    stream_id: Input,
    position: Input,
    patch_rows: Input,
    patch_draws: Input,
}

impl Lists {
    /// Those of `plan`, filled up to `n` draws with ones that nobody reads.
    fn put(inputs: &mut Inputs, plan: &Plan, n: usize) -> Lists {
        let draws = || plan.draws.iter();
        Lists {
            row: inputs.put(draws().map(|d| d.row), n, 0),
            temperature: inputs.put(draws().map(|d| d.sampling.temperature), n, 0.0),
            top_k: inputs.put(draws().map(|d| d.sampling.top_k), n, 0),
            top_p: inputs.put(draws().map(|d| d.sampling.top_p), n, 1.0),
            min_p: inputs.put(draws().map(|d| d.sampling.min_p), n, 0.0),
            seed: inputs.put(draws().map(|d| d.sampling.seed), n, 0),
            stream_id: inputs.put(draws().map(|d| d.sampling.stream), n, 0),
            position: inputs.put(draws().map(|d| d.position), n, 0),
            // The last, because no graph reads them: their lengths may differ from step to step.
            patch_rows: inputs.put_all(&plan.patch_rows),
            patch_draws: inputs.put_all(&plan.patch_draws),
        }
    }
}

/// The graph of steps that decode so many rows.
struct Decoding {
    /// What it reads: where the lists lie elsewhere it is of no use.
    ids: Buffer,
    /// `None`: so many rows have been decoded once.
    graph: Option<Graph>,
}

/// Rows that a step of `n` decoding sequences is filled up to, `most` at the most: few numbers, so that few graphs are made.
fn padded(n: usize, most: usize) -> usize {
    let up = if n <= 8 { n.next_power_of_two() } else { n.next_multiple_of(8) };
    up.min(most)
}

pub(super) struct Runner {
    model: Arc<Model>,
    stream: Stream,
    cache: KvCache,
    batch: StepBatch,
    workspace: Workspace,
    vision: VisionWorkspace,
    /// `[step_patches / 4, hidden]`: what the vision tower has just made.
    encoded: Buffer,
    /// `[vision_rows, hidden]`: the vision cache.
    arena: Buffer,
    /// Rows of the arena that `encoded` goes to.
    encode_rows: Buffer,
    /// `[max_sequences, vocab]`
    logits: Buffer,
    forbidden: Buffer,
    /// u32 `[max_sequences]`: what the last step has drawn.
    tokens: Buffer,
    logprobs: Buffer,
    /// Most rows of a step that decodes.
    most: usize,
    /// By the number of rows.
    graphs: HashMap<usize, Decoding>,
    /// Of the stream's workspace, when the graphs were captured.
    workspace_bytes: usize,
    replays: u64,
}

/// Room for every step within `limits`.
fn step_limits(limits: &Limits) -> StepLimits {
    StepLimits {
        tokens: limits.step_tokens,
        segments: limits.max_sequences,
        blocks_per_segment: limits.max_len.div_ceil(limits.block),
        logits: limits.max_sequences,
    }
}

impl Runner {
    pub fn new(model: Arc<Model>, limits: &Limits, blocks: usize, vision_rows: usize, forbidden: &[u32]) -> Runner {
        let (c, d) = (&model.config, model.device().clone());
        let most = limits.max_sequences;
        let step = step_limits(limits);
        Runner {
            stream: d.stream(),
            cache: model.kv_cache(blocks),
            batch: StepBatch::new(&d, &step),
            workspace: Workspace::new(c, &d, &step),
            vision: VisionWorkspace::new(c, &d, limits.step_patches),
            encoded: d.alloc(d.float(), limits.step_patches / 4 * c.hidden_size),
            arena: d.alloc(d.float(), vision_rows * c.hidden_size),
            encode_rows: d.zeros(DType::U32, limits.step_patches / 4),
            logits: d.alloc(DType::F32, most * c.vocab_size),
            forbidden: d.upload(&softmax::forbidden_set(c.vocab_size, forbidden)),
            tokens: d.zeros(DType::U32, most),
            logprobs: d.zeros(DType::F32, most),
            most: most.min(limits.step_tokens),
            graphs: HashMap::new(),
            workspace_bytes: 0,
            replays: 0,
            model,
        }
    }

    /// Bytes that a runner holds beside pages and the vision cache, but for the rounding of buffers.
    pub fn step_bytes(c: &Config, float: DType, limits: &Limits) -> usize {
        let (most, step, images) = (limits.max_sequences, step_limits(limits), limits.step_patches / 4);
        // Of each draw: a token and its log-probability.
        let draw = DType::U32.size() + DType::F32.size();
        let host =
            images * (c.hidden_size * float.size() + DType::U32.size()) + 4 * softmax::forbidden_words(c.vocab_size);
        let step = StepBatch::bytes(&step) + Workspace::bytes(c, float, &step);
        step + VisionWorkspace::bytes(c, float, limits.step_patches) + host + most * (draw + c.vocab_size * 4)
    }

    /// Submits a step: page copies, images, the decoder, the draws.
    pub fn submit(&mut self, plan: &Plan) -> Result<Drawn> {
        let (s, c) = (&self.stream.clone(), &self.model.config);
        for &(from, to) in &plan.copies {
            kv_cache::copy_block(s, &self.cache, from as usize, to as usize);
        }
        if !plan.encode.is_empty() {
            let images: Vec<_> = plan.encode.iter().map(|i| &**i).collect();
            self.model.encode_images(s, &images, &mut self.vision, &self.encoded)?;
            s.write(&self.encode_rows, &plan.encode_rows);
            rows::scatter(s, &self.encoded, &self.encode_rows, &self.arena, plan.encode_rows.len(), c.hidden_size);
        }
        if plan.rows() == 0 {
            return Ok(Drawn(None));
        }
        let (draws, decodes) = (plan.draws.len(), plan.decodes() && s.has_graphs());
        let size = decodes.then(|| padded(draws, self.most));
        let n = size.unwrap_or(draws);
        let lists = self.batch.upload_with(s, &plan.input, size, |inputs| Lists::put(inputs, plan, n));
        let [patch_rows, patch_draws] = [lists.patch_rows, lists.patch_draws].map(|list| self.batch.added(list));
        rows::put(s, plan.patch_rows.len(), &patch_rows, Some(&patch_draws), &self.tokens, &self.batch.ids);
        match size {
            Some(_) => self.decode(&lists, n),
            None => self.compute(s, &lists, n),
        }
        let values = (draws > 0).then(|| (s.read(&self.tokens.view(0, draws)), s.read(&self.logprobs.view(0, draws))));
        Ok(Drawn(values))
    }

    /// Submits the decoder on what was uploaded, and `n` draws.
    fn compute(&self, s: &Stream, lists: &Lists, n: usize) {
        let hidden = self.model.forward(s, &self.batch, &self.cache, Some(&self.arena), &self.workspace);
        if n == 0 {
            return;
        }
        let list = |input| self.batch.added(input);
        let params = SampleParams {
            temperature: list(lists.temperature),
            top_k: list(lists.top_k),
            top_p: list(lists.top_p),
            min_p: list(lists.min_p),
            seed: list(lists.seed),
            stream_id: list(lists.stream_id),
            position: list(lists.position),
        };
        self.model.logits(s, &hidden, &list(lists.row), &self.workspace, &self.logits, n);
        let vocabulary = self.model.config.vocab_size;
        sample(s, &self.logits, &params, &self.forbidden, &self.tokens, &self.logprobs, n, vocabulary);
    }

    /// [`compute`](Self::compute) of `n` rows that decode. The first step of a size is submitted launch by launch, so that the kernels
    /// are loaded and the workspace is as large as it must be; the second makes the graph that all others replay.
    fn decode(&mut self, lists: &Lists, n: usize) {
        let (s, ids) = (&self.stream, &self.batch.ids);
        let workspace = s.workspace_bytes();
        if std::mem::replace(&mut self.workspace_bytes, workspace) != workspace {
            self.graphs.clear(); // they hold the one before
        }
        match self.graphs.get(&n).filter(|d| d.ids.overlaps(ids)) {
            Some(Decoding { graph: Some(graph), .. }) => s.replay(graph),
            Some(_) => {
                let graph = s.capture(|s| self.compute(s, lists, n));
                s.replay(&graph);
                self.graphs.insert(n, Decoding { ids: ids.clone(), graph: Some(graph) });
            }
            None => {
                self.compute(s, lists, n);
                self.graphs.insert(n, Decoding { ids: ids.clone(), graph: None });
                return;
            }
        }
        self.replays += 1;
    }

    /// Whether a step is best submitted before the one before it is read: where it does not run in the call itself.
    pub fn runs_ahead(&self) -> bool {
        !self.model.device().runs_at_submission()
    }

    /// Steps that were replayed from a graph.
    pub fn replays(&self) -> u64 {
        self.replays
    }

    /// Waits until the device has done all that was submitted.
    pub fn synchronize(&self) -> Result<()> {
        self.stream.synchronize()
    }

    /// Bytes of one image token in the vision cache.
    pub fn vision_row_bytes(&self) -> usize {
        self.model.config.hidden_size * self.model.device().float().size()
    }

    /// Bytes of one page of the KV cache.
    pub fn page_bytes(&self) -> usize {
        let c = &self.cache;
        KvCache::bytes_per_block(self.model.device().float(), c.layers.len(), c.kv_heads, c.head_dim)
    }
}
