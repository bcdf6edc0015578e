//! What training keeps: activations of every layer, or of as many as a budget allows; the rest is computed a second time,
//! by the same launches on the same inputs, so with the same bits.

use crate::device::{Buffer, DType, Device, Stream};
use crate::model::layer::{LayerActs, LayerGrads, LayerShape, Rope};
use crate::model::vision::{GROUP, MergerActs, VisionBatch};
use crate::model::{Config, Model, ParamStore, TextParams, VisionParams, VisionWorkspace};
use crate::ops::kv_cache::KvCache;
use crate::{Error, Result};

/// What of a batch decides how much memory its activations take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatchSize {
    /// Rows of hidden states.
    pub rows: usize,
    /// Patches of its images, each image counted once.
    pub patches: usize,
    /// Pages of keys and values.
    pub blocks: usize,
}

impl BatchSize {
    /// The size of room for both: the larger one in each respect.
    pub fn max(self, other: BatchSize) -> BatchSize {
        BatchSize {
            rows: self.rows.max(other.rows),
            patches: self.patches.max(other.patches),
            blocks: self.blocks.max(other.blocks),
        }
    }

    /// Whether there is room for it in `room`.
    pub fn fits(self, room: BatchSize) -> bool {
        self.max(room) == room
    }
}

/// Which layers keep their activations. The first ones do: what the last layer computed is still there when the backward
/// pass begins, so the last layer never has to be computed again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Decoder layers that keep theirs.
    pub text: usize,
    /// Vision blocks that keep theirs, where the tower is trained.
    pub vision: usize,
}

impl MemoryPlan {
    /// Keeps everything.
    pub fn keep_all(config: &Config) -> MemoryPlan {
        MemoryPlan { text: config.layers, vision: config.vision.depth }
    }

    /// Keeps what fits `budget` bytes for batches of `size`; the decoder comes first, whose layers are dearer to compute again.
    /// `float`: as [`Device::float`]. `trains_vision`: as [`Model::trains_vision`]; a frozen tower keeps nothing.
    ///
    /// # Errors
    /// [`Error::Limit`] if the budget is below [`least`](Self::least).
    pub fn fit(
        config: &Config,
        float: DType,
        trains_vision: bool,
        size: BatchSize,
        budget: usize,
    ) -> Result<MemoryPlan> {
        let BatchSize { rows, patches, .. } = size;
        let least = MemoryPlan::least(config, float, trains_vision, size);
        if least > budget {
            let mib = least.div_ceil(1 << 20);
            return Err(Error::limit(
                format!(
                    "a batch of {rows} tokens and {patches} image patches needs {mib} MiB for activations even when every layer is computed twice, and the budget is {} MiB",
                    budget >> 20
                ),
                format!(
                    "set optim.activations_mib to {mib} or more (0: as much as is needed), or make batches smaller"
                ),
            ));
        }
        // Where all but one are kept, the set that is reused is that one's: it is kept too.
        let most = |left: usize, set: usize, layers: usize| match left / set.max(1) {
            n if n + 1 >= layers => layers,
            n => n,
        };
        let set = rows * config.layer_shape().kept_bytes(float);
        let text = most(budget - least, set, config.layers);
        let left = budget - MemoryPlan { text, vision: 0 }.bytes(config, float, trains_vision, size);
        let set = patches * config.vision.layer_shape().kept_bytes(float);
        let vision = if trains_vision { most(left, set, config.vision.depth) } else { 0 };
        Ok(MemoryPlan { text, vision })
    }

    /// Bytes of the activations of a batch of `size` when nothing is kept: no budget may be smaller.
    pub fn least(config: &Config, float: DType, trains_vision: bool, size: BatchSize) -> usize {
        MemoryPlan { text: 0, vision: 0 }.bytes(config, float, trains_vision, size)
    }

    /// Bytes of the activations of a batch of `size` under this plan, with the gradient of the hidden states and but for the
    /// rounding of buffers to 64 bytes.
    pub fn bytes(&self, config: &Config, float: DType, trains_vision: bool, size: BatchSize) -> usize {
        let BatchSize { rows, patches, blocks } = size;
        let (c, v) = (config, &config.vision);
        // Inputs of the layers and the output, the residual stream's gradient, one set that is reused, gradients, rotary tables.
        let tower = |shape: LayerShape, layers: usize, kept: usize| {
            let sets = (kept + 1).min(layers) * shape.kept_bytes(float);
            ((layers + 2) * shape.hidden + shape.grad_values()) * float.size() + sets + Rope::row_bytes(shape.head_dim)
        };
        // The hidden states and their gradient.
        let row = tower(c.layer_shape(), c.layers, self.text) + 2 * c.hidden_size * float.size();
        let vision = match trains_vision {
            true => {
                let kept = patches * tower(v.layer_shape(), v.depth, self.vision);
                kept + VisionBatch::bytes(patches) + MergerActs::bytes(v, float, patches)
            }
            false => VisionWorkspace::bytes(c, float, patches),
        };
        rows * row
            + vision
            + encoded_bytes(c, float, patches)
            + blocks * (page_bytes(c, float) + page_bytes(c, DType::F32))
    }

    /// Bytes of the activations of a batch of `size` in a forward pass alone, but for the rounding of buffers.
    pub fn forward_bytes(config: &Config, float: DType, size: BatchSize) -> usize {
        let BatchSize { rows, patches, blocks } = size;
        let shape = config.layer_shape();
        let row = (2 * shape.hidden + shape.in_place_values(float)) * float.size() + Rope::row_bytes(shape.head_dim);
        let vision = VisionWorkspace::bytes(config, float, patches) + encoded_bytes(config, float, patches);
        rows * row + vision + blocks * page_bytes(config, float)
    }
}

/// Bytes of the vision tower's output for `patches` patches.
fn encoded_bytes(c: &Config, float: DType, patches: usize) -> usize {
    patches / GROUP * c.hidden_size * float.size()
}

/// Bytes of one layer's page.
fn page_bytes(c: &Config, dtype: DType) -> usize {
    KvCache::bytes_per_block(dtype, 1, c.kv_heads, c.head_dim())
}

/// One tower's activations.
pub(super) struct Tower {
    /// `[layers + 1]` of `[rows, hidden]`: each layer's input, and the last one's output.
    pub inputs: Vec<Buffer>,
    kept: Vec<LayerActs>,
    /// Of the layers that keep nothing, one after the other.
    shared: LayerActs,
    /// `None`: forward only.
    pub backward: Option<TowerGrads>,
}

/// What a tower's backward pass needs beside the activations.
pub(super) struct TowerGrads {
    pub layer: LayerGrads,
    /// `[rows, hidden]`: the gradient of the residual stream.
    pub dx: Buffer,
}

impl Tower {
    pub fn new(device: &Device, shape: &LayerShape, layers: usize, kept: usize, rows: usize) -> Tower {
        let stream = || device.alloc(device.float(), rows * shape.hidden);
        Tower {
            inputs: (0..=layers).map(|_| stream()).collect(),
            kept: (0..kept.min(layers)).map(|_| LayerActs::new(device, shape, rows)).collect(),
            shared: LayerActs::new(device, shape, if kept < layers { rows } else { 0 }),
            backward: Some(TowerGrads { layer: LayerGrads::new(device, shape, rows), dx: stream() }),
        }
    }

    /// For a forward pass alone: everything in place.
    pub fn forward_only(device: &Device, shape: &LayerShape, layers: usize, rows: usize) -> Tower {
        let x = device.alloc(device.float(), rows * shape.hidden);
        let shared = LayerActs::in_place(device, shape, rows, &x);
        Tower { inputs: vec![x; layers + 1], kept: Vec::new(), shared, backward: None }
    }

    pub fn layers(&self) -> usize {
        self.inputs.len() - 1
    }
    pub fn acts(&self, layer: usize) -> &LayerActs {
        self.kept.get(layer).unwrap_or(&self.shared)
    }
    /// Whether a layer's activations are gone when its backward pass comes.
    pub fn is_lost(&self, layer: usize) -> bool {
        layer >= self.kept.len() && layer + 1 < self.layers()
    }
    pub fn output(&self) -> &Buffer {
        &self.inputs[self.layers()]
    }
}

/// Gradients of the trainable parameters, in one flat buffer that mirrors [`ParamStore::trainable`].
pub struct GradStore {
    /// f32, element for element the trainable front of [`ParamStore::flat`].
    pub flat: Buffer,
    pub(super) text: TextParams,
    pub(super) vision: Option<VisionParams>,
}

impl GradStore {
    /// Zero gradients for `model`.
    pub fn new(model: &Model) -> GradStore {
        let flat = model.params.mirror(model.device());
        let (params, config): (&ParamStore, &Config) = (&model.params, &model.config);
        GradStore { text: params.text(config, &flat), vision: params.vision(config, &flat), flat }
    }

    /// Submits setting all gradients to zero.
    pub fn zero(&self, s: &Stream) {
        s.zero(&self.flat);
    }
}
