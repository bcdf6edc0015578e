//! What training keeps: activations of every layer, or of as many as a budget allows; the rest is computed a second time,
//! by the same launches on the same inputs, so with the same bits.

use crate::device::{Buffer, DType, Device, Stream};
use crate::model::layer::{LayerActs, LayerGrads, LayerShape};
use crate::model::{Config, Model, ParamStore, TextParams, VisionParams};
use crate::{Error, Result};

/// Which layers keep their activations. The first ones do: what the last layer computed is still there when the backward
/// pass begins, so the last layer never has to be computed again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Decoder layers that keep theirs.
    pub text: usize,
    /// Vision blocks that keep theirs.
    pub vision: usize,
}

impl MemoryPlan {
    /// Keeps everything.
    pub fn keep_all(config: &Config) -> MemoryPlan {
        MemoryPlan { text: config.layers, vision: config.vision.depth }
    }

    /// Keeps what fits `budget` bytes for batches of `rows` tokens and `patches` patches; the decoder comes first, whose
    /// layers are dearer to compute again.
    ///
    /// # Errors
    /// [`Error::Limit`] if not even the layers' inputs fit.
    pub fn fit(config: &Config, rows: usize, patches: usize, budget: usize) -> Result<MemoryPlan> {
        let none = MemoryPlan { text: 0, vision: 0 };
        let least = none.bytes(config, rows, patches);
        if least > budget {
            return Err(Error::limit(
                format!(
                    "a batch of {rows} tokens and {patches} image patches needs {} MB for activations even when every layer is computed twice, and the budget is {} MB",
                    least >> 20,
                    budget >> 20
                ),
                "make the micro-batch smaller or the budget larger",
            ));
        }
        let layer = |shape: LayerShape, rows: usize| 4 * rows * shape.kept_values();
        let left = budget - least;
        let text = (left / layer(config.layer_shape(), rows).max(1)).min(config.layers);
        let left = left - text * layer(config.layer_shape(), rows);
        let vision = (left / layer(config.vision.layer_shape(), patches).max(1)).min(config.vision.depth);
        Ok(MemoryPlan { text, vision })
    }

    /// Bytes of a batch's activations under this plan, to within the rotary tables and pages of one layer.
    pub fn bytes(&self, config: &Config, rows: usize, patches: usize) -> usize {
        let tower = |shape: LayerShape, layers: usize, kept: usize, rows: usize| {
            // Inputs of the layers and the output, one set that is reused, gradients, and a few rows of the residual width.
            let fixed = (layers + 4) * shape.hidden + shape.kept_values() + shape.grad_values();
            4 * rows * (fixed + kept * shape.kept_values())
        };
        tower(config.layer_shape(), config.layers, self.text, rows)
            + tower(config.vision.layer_shape(), config.vision.depth, self.vision, patches)
    }
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
        let stream = || device.alloc(DType::F32, rows * shape.hidden);
        Tower {
            inputs: (0..=layers).map(|_| stream()).collect(),
            kept: (0..kept.min(layers)).map(|_| LayerActs::new(device, shape, rows)).collect(),
            shared: LayerActs::new(device, shape, if kept < layers { rows } else { 0 }),
            backward: Some(TowerGrads { layer: LayerGrads::new(device, shape, rows), dx: stream() }),
        }
    }

    /// For a forward pass alone: everything in place.
    pub fn forward_only(device: &Device, shape: &LayerShape, layers: usize, rows: usize) -> Tower {
        let x = device.alloc(DType::F32, rows * shape.hidden);
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
