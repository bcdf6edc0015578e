//! Qwen2.5-VL (arXiv 2502.13923): config, weights, positions, vision tower, decoder; forward and explicit backward.
//!
//! A [`Model`] is read from a Hugging Face folder ([`Model::load`]), made at random from a [`Preset`], and written back in a
//! form that transformers reads ([`Model::save`]). Rollouts and training run the same layer functions on the same weights,
//! so a token's log-probability has the same bits in both.

mod config;
mod decoder;
mod init;
mod layer;
mod load;
mod params;
pub mod positions;
mod presets;
mod save;
mod stripes;
pub mod train;
mod vision;
mod window;

pub use config::{Config, TokenIds, VISION_NORM_EPS, VISION_ROPE_THETA, VisionConfig};
pub use decoder::{StepBatch, StepInput, StepLimits, TableEntry, Workspace};
pub use layer::LayerShape;
pub use params::{Init, LayerParams, Layout, ParamStore, Segment, Tensor, TextParams, VisionParams};
pub use presets::Preset;
pub use save::{SaveOptions, write_atomically};
pub use vision::VisionWorkspace;
pub use window::WindowPlan;

use crate::device::{Buffer, Device, Stream};
use crate::input::{Image, ImageProcessor};
use crate::ops::attention;
use crate::ops::kv_cache::KvCache;
use crate::ops::patch_embed::Normalize;
use crate::{Error, Result};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How to make or read a model.
#[derive(Clone, Copy, Debug, Default)]
pub struct LoadOptions {
    /// Keeps the vision tower out of training.
    pub freeze_vision: bool,
    /// Shows a progress bar, where there is a terminal.
    pub progress: bool,
}

/// A Qwen2.5-VL model on a device.
pub struct Model {
    /// Its shape.
    pub config: Config,
    /// Its weights.
    pub params: ParamStore,
    /// The decoder's weights, views into `params`.
    pub text: TextParams,
    /// The vision tower's weights, views into `params`.
    pub vision: VisionParams,
    /// What pixels become before the patch embedding.
    pub normalize: Normalize,
    device: Device,
    /// Held locked while the weights move.
    access: Mutex<Access>,
}

/// Who works with the weights.
#[derive(Default)]
struct Access {
    /// Engines that read them at present.
    readers: usize,
    version: Version,
}

/// How often weights were taken by somebody who moves them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Version {
    /// Any weights.
    pub any: u64,
    /// Those of the vision tower.
    pub vision: u64,
}

/// The right to write a model's weights: see [`Model::take_weights`]. When it is dropped, they count as others.
#[must_use = "the weights are given back when it is dropped"]
pub struct TakenWeights<'a> {
    access: MutexGuard<'a, Access>,
    /// The vision tower may be written too.
    vision: bool,
}

impl Drop for TakenWeights<'_> {
    fn drop(&mut self) {
        self.access.version.any += 1;
        self.access.version.vision += u64::from(self.vision);
    }
}

impl Config {
    /// That a GPU has kernels for the heads of both towers.
    ///
    /// # Errors
    /// [`Error::Limit`] naming the width that has none.
    pub fn check_heads(&self) -> Result<()> {
        let dims = [self.head_dim(), self.vision.layer_shape().head_dim];
        match dims.into_iter().find(|hd| !attention::HEAD_DIMS.contains(hd)) {
            Some(hd) => Err(Error::limit(
                format!("the model has heads of {hd} elements, for which a GPU has no kernel"),
                format!(
                    "use a model with heads of {:?} elements, or the processor (--device cpu)",
                    attention::HEAD_DIMS
                ),
            )),
            None => Ok(()),
        }
    }
}

/// [`Config::check_heads`] where `device` is a GPU: before the weights are read.
fn check_heads(config: &Config, device: &Device) -> Result<()> {
    if device.packs_weights() { Ok(()) } else { config.check_heads() }
}

impl Model {
    fn new(config: Config, params: ParamStore, images: &ImageProcessor, device: &Device) -> Result<Model> {
        let text = params.text(&config, &params.flat);
        let vision = params.vision(&config, &params.flat);
        let vision = vision.ok_or_else(|| Error::internal("the store has no vision tower"))?;
        let normalize = Normalize::new(images.mean, images.std);
        Ok(Model { config, params, text, vision, normalize, device: device.clone(), access: Mutex::default() })
    }

    /// Reads a Hugging Face folder: `config.json`, and `model.safetensors` or shards with their index; pixels are normalised
    /// as its image processor's settings say, if it has them.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Input`] that names the file and the tensor or field, [`Error::Limit`] where the weights do not fit the
    /// memory or the device has no kernels for the shape.
    pub fn load(dir: &Path, device: &Device, options: &LoadOptions) -> Result<Model> {
        let config = Config::load(dir)?;
        check_heads(&config, device)?;
        let images = ImageProcessor::load(dir)?;
        let checkpoint = load::Checkpoint::open(dir)?;
        checkpoint.check(dir, &config)?;
        let params = ParamStore::new(&config, device, options.freeze_vision)?;
        let s = device.stream();
        checkpoint.read_into(&s, dir, &params, options.progress)?;
        s.synchronize()?;
        Model::new(config, params, &images, device)
    }

    /// A model of `config`'s shape with random weights: the same for a `seed` on every machine.
    ///
    /// # Errors
    /// [`Error::Input`] where the shape is contradictory, [`Error::Limit`] where it does not fit the memory or the device.
    pub fn random(config: Config, seed: u64, device: &Device, options: &LoadOptions) -> Result<Model> {
        config
            .check()
            .map_err(|e| Error::input(format!("the shape is contradictory: {e}"), "correct those figures"))?;
        check_heads(&config, device)?;
        let params = ParamStore::new(&config, device, options.freeze_vision)?;
        let s = device.stream();
        init::fill(&s, &params, seed)?;
        s.synchronize()?;
        Model::new(config, params, &ImageProcessor::default(), device)
    }

    /// Writes a Hugging Face folder under the hub's names; transformers loads it. Work that `s` still has is waited for.
    ///
    /// Every file is written beside its name and renamed; a failure (a full disk) is an error and leaves no half file.
    pub fn save(&self, s: &Stream, dir: &Path, options: &SaveOptions) -> Result<()> {
        save::save(s, &self.params, &self.config, dir, options)
    }

    /// Whether training moves the vision tower.
    pub fn trains_vision(&self) -> bool {
        self.params.segments().iter().all(|s| s.trainable)
    }

    /// The device it lives on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Notes that an engine begins to read the weights, or goes on after a pause; waits while they are being moved. Gives
    /// their version, which stays as it is for as long as anybody reads.
    pub(crate) fn begin_reading(&self) -> Version {
        let mut access = self.access();
        access.readers += 1;
        access.version
    }

    /// Takes back one [`begin_reading`](Self::begin_reading). Gives the version that was read.
    pub(crate) fn end_reading(&self) -> Version {
        let mut access = self.access();
        access.readers -= 1;
        access.version
    }

    /// Takes the weights for somebody who moves them in place; no engine reads them until the guard is dropped, and one that
    /// read them before, and was [paused](crate::engine::Engine::pause) since, forgets what it computed from them.
    /// [`Learner::update`](crate::train::learner::Learner::update) takes them by itself; whoever writes into
    /// [`params`](Self::params) by other means takes them meanwhile, and waits for what was written before the guard goes.
    ///
    /// Whoever asks again for what it holds, or lets an engine go on, waits for itself and never ends: drop the guard first.
    ///
    /// # Errors
    /// [`Error::Input`] while an engine is at work on them.
    pub fn take_weights(&self) -> Result<TakenWeights<'_>> {
        self.take(true)
    }

    /// [`take_weights`](Self::take_weights) for somebody who moves what training moves and nothing else: where the vision tower
    /// is frozen, what an engine has computed with it stays.
    ///
    /// # Errors
    /// As [`take_weights`](Self::take_weights).
    pub fn take_trainable(&self) -> Result<TakenWeights<'_>> {
        self.take(self.trains_vision())
    }

    fn take(&self, vision: bool) -> Result<TakenWeights<'_>> {
        let access = self.access();
        match access.readers {
            0 => Ok(TakenWeights { access, vision }),
            n => Err(Error::input(
                format!("these weights cannot be moved: they are being read (engines at work on this model: {n})"),
                "hold the guard of Engine::pause meanwhile, or drop the engine",
            )),
        }
    }

    fn access(&self) -> MutexGuard<'_, Access> {
        self.access.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A KV cache of `blocks` pages for this shape.
    pub fn kv_cache(&self, blocks: usize) -> KvCache {
        let (c, d) = (&self.config, &self.device);
        KvCache::new(d, d.float(), c.layers, blocks, c.kv_heads, c.head_dim())
    }

    /// Submits the encoding of `images` into `out`, `[tokens of all, hidden]`, image after image.
    ///
    /// # Errors
    /// [`Error::Limit`] if they do not fit the workspace.
    pub fn encode_images(&self, s: &Stream, images: &[&Image], ws: &mut VisionWorkspace, out: &Buffer) -> Result<()> {
        vision::encode(s, &self.config, &self.vision, &self.normalize, images, ws, out)
    }

    /// Submits one step of the decoder: writes the step's keys and values into their pages of `cache` and returns the hidden
    /// states after the final norm, `[tokens, hidden]`, in the workspace (valid until the next step with it).
    ///
    /// `vision`: `[.., hidden]`, the rows that `StepInput::image_sources` names.
    pub fn forward(
        &self,
        s: &Stream,
        batch: &StepBatch,
        cache: &KvCache,
        vision: Option<&Buffer>,
        ws: &Workspace,
    ) -> Buffer {
        decoder::forward(s, &self.config, &self.text, batch, cache, vision, ws)
    }

    /// Submits the logits, f32 `[n, vocab]` into `out`, of the `n` rows of `hidden` that `rows` (u32) names.
    pub fn logits(&self, s: &Stream, hidden: &Buffer, rows: &Buffer, ws: &Workspace, out: &Buffer, n: usize) {
        decoder::logits(s, &self.config, &self.text, hidden, rows, ws, out, n)
    }
}
