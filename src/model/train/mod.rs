//! Training: the forward pass over a packed batch, and its backward, written out as the mirror of the forward.
//!
//! ```text
//! TrainBatch::pack -> forward -> hidden ─ ops::loss::forward_backward ─> d hidden -> backward -> GradStore (+=)
//! ```
//!
//! The forward pass is the engine's, layer function by layer function: keys and values go into pages, the completions of a
//! group read their prompt's pages through their block tables, so hidden states have the engine's bits and a shared prompt
//! is computed once. In the backward pass the gradients of those pages collect what every completion contributes.

mod backward;
mod batch;
mod memory;
#[cfg(test)]
mod tests;

pub use backward::backward;
pub use batch::{Group, TrainBatch};
pub use memory::{BatchSize, GradStore, MemoryPlan};

use super::layer::Rope;
use super::vision::{self, MergerActs, VisionBatch};
use super::{Model, VisionWorkspace, decoder};
use crate::Result;
use crate::device::{Buffer, DType, Stream};
use crate::ops::kv_cache::KvCache;
use crate::ops::rms_norm;
use memory::Tower;

/// The buffers of a training pass, reused from batch to batch.
pub struct Activations {
    plan: Option<MemoryPlan>,
    room: BatchSize,
    text: Tower,
    rope: Rope,
    /// One layer's pages, written anew by each layer.
    cache: KvCache,
    /// Their gradients.
    dcache: Option<KvCache>,
    /// `[rows, hidden]` after the final norm.
    hidden: Buffer,
    /// `[image tokens, hidden]`
    vision_out: Buffer,
    vision: VisionPass,
}

/// How images are encoded.
enum VisionPass {
    /// With nothing kept: the tower is frozen, or there is no backward pass.
    Frozen(Box<VisionWorkspace>),
    /// With what the tower's own backward pass needs.
    Trained(Box<TrainedVision>),
}

struct TrainedVision {
    batch: VisionBatch,
    tower: Tower,
    rope: Rope,
    merger: MergerActs,
}

impl Activations {
    /// Buffers for training with batches up to the size of `batch`; they grow when a larger one comes.
    pub fn new(model: &Model, plan: MemoryPlan, batch: &TrainBatch) -> Activations {
        Self::with_room(model, plan, batch.size())
    }

    /// The same for batches up to `room`: [`MemoryPlan::bytes`] at most, until they grow.
    pub fn with_room(model: &Model, plan: MemoryPlan, room: BatchSize) -> Activations {
        Self::sized(model, Some(plan), room)
    }

    /// Buffers for forward passes alone (a reference policy's log-probabilities).
    pub fn forward_only(model: &Model, batch: &TrainBatch) -> Activations {
        Self::forward_with_room(model, batch.size())
    }

    /// The same for batches up to `room`: [`MemoryPlan::forward_bytes`], until they grow.
    pub fn forward_with_room(model: &Model, room: BatchSize) -> Activations {
        Self::sized(model, None, room)
    }

    fn sized(model: &Model, plan: Option<MemoryPlan>, room: BatchSize) -> Activations {
        let (c, d) = (&model.config, model.device());
        let BatchSize { rows, patches, blocks } = room;
        let (shape, vision_shape) = (c.layer_shape(), c.vision.layer_shape());
        let cache = |dtype: DType| KvCache::new(d, dtype, 1, blocks, c.kv_heads, c.head_dim());
        let frozen = || VisionPass::Frozen(Box::new(VisionWorkspace::new(c, d, patches)));
        let vision = match plan {
            Some(plan) if model.trains_vision() => VisionPass::Trained(Box::new(TrainedVision {
                batch: VisionBatch::new(d, patches),
                tower: Tower::new(d, &vision_shape, c.vision.depth, plan.vision, patches),
                rope: Rope::new(d, patches, vision_shape.head_dim),
                merger: MergerActs::new(d, &c.vision, patches),
            })),
            _ => frozen(),
        };
        Activations {
            plan,
            room,
            text: match plan {
                Some(plan) => Tower::new(d, &shape, c.layers, plan.text, rows),
                None => Tower::forward_only(d, &shape, c.layers, rows),
            },
            rope: Rope::new(d, rows, shape.head_dim),
            cache: cache(d.float()),
            dcache: plan.map(|_| cache(DType::F32)),
            hidden: d.alloc(d.float(), rows * c.hidden_size),
            vision_out: d.alloc(d.float(), patches / vision::GROUP * c.hidden_size),
            vision,
        }
    }

    /// Makes room for `batch`.
    fn reserve(&mut self, model: &Model, batch: &TrainBatch) {
        if !batch.size().fits(self.room) {
            *self = Self::sized(model, self.plan, batch.size().max(self.room));
        }
    }

    /// `[rows, hidden]`: what decoder layer `i` was given by the last forward pass; `i` = number of layers: the last
    /// one's output, before the final norm. For comparing with other implementations.
    pub fn text_input(&self, i: usize) -> &Buffer {
        &self.text.inputs[i]
    }

    /// The same for the blocks of the vision tower, `[patches, hidden]` in window order; `None` if it is frozen.
    pub fn vision_input(&self, i: usize) -> Option<&Buffer> {
        match &self.vision {
            VisionPass::Trained(v) => v.tower.inputs.get(i),
            VisionPass::Frozen(_) => None,
        }
    }

    /// `[image tokens, hidden]`: the vision tower's output of the last forward pass, image after image.
    pub fn vision_out(&self) -> &Buffer {
        &self.vision_out
    }
}

/// Submits the forward pass of `batch`: hidden states after the final norm, `[rows, hidden]`, valid until the next pass
/// with these activations. Rows are found with [`TrainBatch::completion_row`].
///
/// # Errors
/// [`Error::Limit`](crate::Error::Limit) where the batch's images do not fit the activations.
pub fn forward(model: &Model, s: &Stream, batch: &TrainBatch, acts: &mut Activations) -> Result<Buffer> {
    acts.reserve(model, batch);
    let (c, b) = (&model.config, &batch.step);
    if !batch.images.is_empty() {
        let images: Vec<_> = batch.images.iter().map(|i| &**i).collect();
        match &mut acts.vision {
            VisionPass::Frozen(ws) => model.encode_images(s, &images, ws, &acts.vision_out)?,
            VisionPass::Trained(v) => v.forward(model, s, &images, &acts.vision_out),
        }
    }
    let (shape, text) = (c.layer_shape(), &acts.text);
    decoder::embed(s, c, &model.text, b, Some(&acts.vision_out), &acts.hidden, &text.inputs[0]);
    decoder::rope_tables(s, c, b, &acts.rope);
    let kv = &acts.cache.layers[0];
    for (i, p) in model.text.layers.iter().enumerate() {
        let (x, out) = (&text.inputs[i], &text.inputs[i + 1]);
        decoder::layer(s, &shape, p, b, &acts.rope, &acts.cache, kv, x, text.acts(i), Some(out));
    }
    rms_norm::forward(s, text.output(), &model.text.norm, c.rms_norm_eps, &acts.hidden, b.tokens, c.hidden_size);
    Ok(acts.hidden.clone())
}

impl TrainedVision {
    fn forward(&mut self, model: &Model, s: &Stream, images: &[&crate::input::Image], out: &Buffer) {
        let (c, p) = (&model.config.vision, &model.vision);
        self.batch.upload(s, c, images);
        let (b, shape, t) = (&self.batch, c.layer_shape(), &self.tower);
        vision::embed(s, c, p, b, &model.normalize, &self.merger.normed, &t.inputs[0]);
        vision::rope_tables(s, &shape, b, &self.rope);
        for (i, p) in p.blocks.iter().enumerate() {
            let (x, out) = (&t.inputs[i], &t.inputs[i + 1]);
            let cuts = vision::cuts(c, b, i);
            vision::block(s, &shape, p, cuts, &self.rope, x, t.acts(i), Some(out), b.plan.patches());
        }
        vision::merge(s, c, p, b, t.output(), &self.merger, out);
    }
}
