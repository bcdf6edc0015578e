//! The device's side of a step: buffers planned once, and the launches in their order.

use super::plan::Plan;
use super::scheduler::Limits;
use crate::Result;
use crate::device::{Buffer, DType, Device, Element, Pending, Stream};
use crate::model::{Model, StepBatch, StepLimits, VisionWorkspace, Workspace};
use crate::ops::kv_cache::{self, KvCache};
use crate::ops::sample::{SampleParams, sample};
use crate::ops::{rows, softmax};
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

/// A value for each draw of a step: a device buffer and the host's list for it.
struct PerDraw<T> {
    buffer: Buffer,
    host: Vec<T>,
}

impl<T: Element> PerDraw<T> {
    fn new(device: &Device, most: usize) -> PerDraw<T> {
        PerDraw { buffer: device.zeros(T::DTYPE, most), host: Vec::with_capacity(most) }
    }

    fn upload(&mut self, s: &Stream, values: impl Iterator<Item = T>) {
        self.host.clear();
        self.host.extend(values);
        s.write(&self.buffer, &self.host);
    }
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
    rows: PerDraw<u32>,
    temperature: PerDraw<f32>,
    top_k: PerDraw<u32>,
    top_p: PerDraw<f32>,
    min_p: PerDraw<f32>,
    seed: PerDraw<u64>,
    stream_id: PerDraw<u64>,
    position: PerDraw<u32>,
    tokens: Buffer,
    logprobs: Buffer,
}

impl Runner {
    pub fn new(model: Arc<Model>, limits: &Limits, blocks: usize, vision_rows: usize, forbidden: &[u32]) -> Runner {
        let (c, d) = (&model.config, model.device().clone());
        let most = limits.max_sequences;
        let step = StepLimits {
            tokens: limits.step_tokens,
            segments: most,
            blocks_per_segment: limits.max_len.div_ceil(limits.block),
            logits: most,
        };
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
            rows: PerDraw::new(&d, most),
            temperature: PerDraw::new(&d, most),
            top_k: PerDraw::new(&d, most),
            top_p: PerDraw::new(&d, most),
            min_p: PerDraw::new(&d, most),
            seed: PerDraw::new(&d, most),
            stream_id: PerDraw::new(&d, most),
            position: PerDraw::new(&d, most),
            tokens: d.zeros(DType::U32, most),
            logprobs: d.zeros(DType::F32, most),
            model,
        }
    }

    /// Submits a step: page copies, images, the decoder, the draws.
    pub fn submit(&mut self, plan: &Plan) -> Result<Drawn> {
        let (s, c) = (&self.stream, &self.model.config);
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
        self.batch.upload(s, &plan.input);
        let hidden = self.model.forward(s, &self.batch, &self.cache, Some(&self.arena), &self.workspace);
        let n = plan.draws.len();
        if n == 0 {
            return Ok(Drawn(None));
        }
        self.rows.upload(s, plan.draws.iter().map(|d| d.row));
        self.temperature.upload(s, plan.draws.iter().map(|d| d.sampling.temperature));
        self.top_k.upload(s, plan.draws.iter().map(|d| d.sampling.top_k));
        self.top_p.upload(s, plan.draws.iter().map(|d| d.sampling.top_p));
        self.min_p.upload(s, plan.draws.iter().map(|d| d.sampling.min_p));
        self.seed.upload(s, plan.draws.iter().map(|d| d.sampling.seed));
        self.stream_id.upload(s, plan.draws.iter().map(|d| d.sampling.stream));
        self.position.upload(s, plan.draws.iter().map(|d| d.position));
        let params = SampleParams {
            temperature: self.temperature.buffer.clone(),
            top_k: self.top_k.buffer.clone(),
            top_p: self.top_p.buffer.clone(),
            min_p: self.min_p.buffer.clone(),
            seed: self.seed.buffer.clone(),
            stream_id: self.stream_id.buffer.clone(),
            position: self.position.buffer.clone(),
        };
        self.model.logits(s, &hidden, &self.rows.buffer, &self.workspace, &self.logits, n);
        sample(s, &self.logits, &params, &self.forbidden, &self.tokens, &self.logprobs, n, c.vocab_size);
        Ok(Drawn(Some((s.read(&self.tokens.view(0, n)), s.read(&self.logprobs.view(0, n))))))
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
