//! Qwen2.5-VL (arXiv 2502.13923): config, weights, positions, vision tower, decoder; forward and explicit backward.
//!
//! A [`Model`] is read from a Hugging Face folder ([`Model::load`]), made at random from a [`Preset`], and written back in a
//! form that transformers reads ([`Model::save`]). Rollouts and training run the same layer functions on the same weights,
//! so a token's log-probability has the same bits in both.

mod config;
mod init;
mod load;
mod params;
pub mod positions;
mod presets;
mod save;
mod stripes;
mod window;

pub use config::{Config, MERGE, PATCH, PATCH_VALUES, TokenIds, VISION_NORM_EPS, VISION_ROPE_THETA, VisionConfig};
pub use params::{Init, LayerParams, Layout, ParamStore, Segment, Tensor, TextParams, VisionParams};
pub use presets::Preset;
pub use save::{SaveOptions, write_atomically};
pub use window::WindowPlan;

use crate::device::{Device, Stream};
use crate::{Error, Result};
use std::path::Path;

/// Mean of each channel that pixels are normalised with (CLIP's), after division by 255.
pub const IMAGE_MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
/// Standard deviation of each channel.
pub const IMAGE_STD: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];

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
    device: Device,
}

impl Model {
    fn new(config: Config, params: ParamStore, device: &Device) -> Result<Model> {
        let text = params.text(&config, &params.flat);
        let vision = params.vision(&config, &params.flat);
        let vision = vision.ok_or_else(|| Error::internal("the store has no vision tower"))?;
        Ok(Model { config, params, text, vision, device: device.clone() })
    }

    /// Reads a Hugging Face folder: `config.json`, and `model.safetensors` or shards with their index.
    pub fn load(dir: &Path, device: &Device, options: &LoadOptions) -> Result<Model> {
        let config = Config::load(dir)?;
        let checkpoint = load::Checkpoint::open(dir)?;
        let params = ParamStore::new(&config, device, options.freeze_vision);
        let s = device.stream();
        checkpoint.read_into(&s, dir, &params, config.tie_word_embeddings, options.progress)?;
        s.synchronize()?;
        Model::new(config, params, device)
    }

    /// A model of `config`'s shape with random weights: the same for a `seed` on every machine.
    pub fn random(config: Config, seed: u64, device: &Device, options: &LoadOptions) -> Result<Model> {
        config
            .check()
            .map_err(|e| Error::input(format!("the shape is contradictory: {e}"), "correct those figures"))?;
        let params = ParamStore::new(&config, device, options.freeze_vision);
        let s = device.stream();
        init::fill(&s, &params, seed)?;
        s.synchronize()?;
        Model::new(config, params, device)
    }

    /// Writes a Hugging Face folder under the hub's names; transformers loads it. Work that `s` still has is waited for.
    ///
    /// Every file is written beside its name and renamed; a failure (a full disk) is an error and leaves no half file.
    pub fn save(&self, s: &Stream, dir: &Path, options: &SaveOptions) -> Result<()> {
        save::save(s, &self.params, &self.config, dir, options)
    }

    /// The device it lives on.
    pub fn device(&self) -> &Device {
        &self.device
    }
}
