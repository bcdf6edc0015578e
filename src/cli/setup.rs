//! From a run file to what a command works with: model, tokenizer, engine, tool, questions.

use super::{device, fit};
use crate::agent::{CodingProtocol, EnginePolicy, EpisodeOptions, RewardRule, Rollouts, See};
use crate::device::{DType, Device};
use crate::engine::{Engine, EngineOptions, Sampling};
use crate::input::{ChatTemplate, Image, ImageProcessor, ImageSource, Picture, Preprocessor, Tokenizer};
use crate::model::{Config, LoadOptions, Model};
use crate::ops::patch_embed::PATCH;
use crate::tasks::synthetic::{self, Subset, Synthetic};
use crate::tasks::{Example, Examples, MatExamples, Outline, SyntheticExamples};
use crate::tools::python::environment::Search;
use crate::tools::{Limits, PythonOptions, PythonTool, Tool};
use crate::train::RunConfig;
use crate::train::config::TaskKind;
use crate::train::learner::Learner;
use crate::train::memory::{Part, Plan, Target, engine_options};
use crate::train::room::Work;
use crate::train::run::Setup;
use crate::{Error, Result};
use image::RgbImage;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Pixels of prepared images that are kept for when they are shown again.
const IMAGE_CACHE_BYTES: usize = 128 << 20;

/// The files of a model folder that belong to its weights wherever they go.
const COMPANIONS: [&str; 11] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
];

/// A model folder, but for its weights, and the device that they are for.
pub(super) struct Folder {
    dir: PathBuf,
    pub config: Config,
    pub device: Device,
    pub tokenizer: Arc<Tokenizer>,
    pub template: Arc<ChatTemplate>,
    pub preprocessor: Arc<Preprocessor>,
    pub companions: Vec<PathBuf>,
}

impl Folder {
    /// `config.model.path` and everything in it that is small: what is wrong with that should not wait for the weights.
    ///
    /// # Errors
    /// Whatever is wrong with the folder or the device.
    pub fn open(config: &RunConfig) -> Result<Folder> {
        let dir = model_dir(config)?;
        let tokenizer = Arc::new(Tokenizer::load(&dir)?);
        let model = Config::load(&dir)?;
        model.check_tokenizer(&tokenizer)?;
        let template = Arc::new(ChatTemplate::load(&dir)?);
        let preprocessor = preprocessor(config, &dir)?;
        let device = device::open(&config.run)?;
        let companions = COMPANIONS.iter().map(|f| dir.join(f)).filter(|p| p.is_file()).collect();
        Ok(Folder { dir, config: model, device, tokenizer, template, preprocessor, companions })
    }

    /// Where the memory of a run of `config` goes.
    ///
    /// # Errors
    /// [`Error::Limit`] where it does not fit, or a cache holds less than the run file allows an episode.
    pub fn plan(&self, config: &RunConfig, work: Work) -> Result<Plan> {
        let target = Target::of(&self.device);
        if !matches!(work, Work::Conversations { .. }) {
            check_caches(config, &self.config, target.float)?;
        }
        Plan::new(&self.config, config, target, work)
    }

    /// The folder with its weights, or those of `weights`, where those are others (a checkpoint's), for `work`.
    ///
    /// # Errors
    /// As [`plan`](Self::plan); whatever is wrong with the weights.
    pub fn load(self, config: &RunConfig, weights: Option<&Path>, work: Work) -> Result<Loaded> {
        let plan = self.plan(config, work)?;
        let options = LoadOptions { freeze_vision: config.model.freeze_vision, progress: true };
        let model = Arc::new(Model::load(weights.unwrap_or(&self.dir), &self.device, &options)?);
        Ok(Loaded { folder: self, plan, model })
    }
}

/// A model folder, loaded.
pub(super) struct Loaded {
    pub folder: Folder,
    /// Where its memory goes.
    pub plan: Plan,
    pub model: Arc<Model>,
}

impl Loaded {
    /// The model that the run began with, where the loss ties the policy to it.
    ///
    /// # Errors
    /// Whatever is wrong with its files.
    pub fn reference(&self, config: &RunConfig) -> Result<Option<Model>> {
        if config.algo.beta == 0.0 {
            return Ok(None);
        }
        let options = LoadOptions { freeze_vision: true, progress: true };
        Model::load(&self.folder.dir, &self.folder.device, &options).map(Some)
    }

    /// An engine for this model, of the size that the plan gives.
    ///
    /// # Errors
    /// As [`Engine::start`].
    pub fn engine(&self, config: &RunConfig) -> Result<Arc<Engine>> {
        let options = EngineOptions {
            kv_bytes: self.plan.bytes(Part::KvPages),
            tokenizer: Some(self.folder.tokenizer.clone()),
            ..engine_options(config, &self.model.config)
        };
        Ok(Arc::new(Engine::start(self.model.clone(), options)?))
    }

    /// A learner for this model, with the room that the plan gives.
    ///
    /// # Errors
    /// As [`Learner::new`].
    pub fn learner(&self, config: &RunConfig, forbidden: &[u32]) -> Result<Learner> {
        let mut learner = Learner::new(self.model.clone(), &config.optim, forbidden)?;
        learner.give(self.plan.activations);
        Ok(learner)
    }

    /// Episodes as the run file describes them, on `engine` with `tool`, until `stop` is raised.
    pub fn rollouts(
        &self,
        config: &RunConfig,
        engine: &Arc<Engine>,
        tool: Arc<dyn Tool>,
        stop: &Arc<AtomicBool>,
    ) -> Rollouts {
        Rollouts {
            policy: Arc::new(EnginePolicy::new(
                engine.clone(),
                self.folder.tokenizer.clone(),
                self.folder.template.clone(),
            )),
            protocol: CodingProtocol { style: config.rollout.prompt },
            tool,
            see: see(self.folder.preprocessor.clone()),
            options: episode_options(config),
            concurrency: config.rollout.concurrency,
            stop: stop.clone(),
        }
    }

    /// Everything that `varft train` works with.
    ///
    /// # Errors
    /// Whatever is wrong with data, tool or the engine's sizes.
    pub fn setup(&self, config: &RunConfig, stop: &Arc<AtomicBool>) -> Result<Setup> {
        let train = training_examples(config)?;
        let eval = if config.log.eval_every > 0 { held_out_examples(config, stop)? } else { Vec::new() };
        fit::check(config, &self.folder, fit::first(&*train, u64::MAX))?;
        fit::check(config, &self.folder, eval.iter().map(|e| Ok(Outline::of(e))))?;
        let tool = python(config)?;
        let engine = self.engine(config)?;
        Ok(Setup {
            rollouts: self.rollouts(config, &engine, tool, stop),
            engine,
            tokenizer: self.folder.tokenizer.clone(),
            train,
            eval,
            stop: stop.clone(),
        })
    }
}

/// That the engine's caches, where the run file gives their sizes, hold an episode of `rollout.context` tokens (or as many as the model
/// takes) and an image of `model.max_pixels`, in elements of type `float`. In smaller ones episodes would end early, and nothing
/// would say why.
///
/// # Errors
/// [`Error::Limit`] naming the key and the least value that does.
fn check_caches(config: &RunConfig, model: &Config, float: DType) -> Result<()> {
    let (r, patches) = (&config.rollout, config.model.max_pixels / (PATCH * PATCH));
    let context = r.context.min(model.max_position_embeddings);
    for (key, mib, needed, what, other) in [
        (
            "rollout.kv_cache_mib",
            r.kv_cache_mib,
            if r.kv_cache_mib == 0 { 0 } else { EngineOptions::kv_bytes_for(model, float, context) },
            format!("an episode of {context} tokens"),
            "rollout.context",
        ),
        (
            "rollout.vision_cache_mib",
            r.vision_cache_mib,
            EngineOptions::vision_bytes_for(model, float, patches),
            format!("an image of {patches} patches"),
            "model.max_pixels",
        ),
    ] {
        let needed = needed.div_ceil(1 << 20);
        if mib < needed {
            return Err(Error::limit(
                format!("`{key}` is {mib}, and {what} of this model needs {needed}"),
                format!("set {key} to {needed} or more, or lower {other}"),
            ));
        }
    }
    Ok(())
}

/// The folder that `model.path` names.
fn model_dir(config: &RunConfig) -> Result<PathBuf> {
    if config.model.path.is_empty() {
        return Err(Error::input(
            "`model.path` is not set",
            "name a model's folder: --set model.path=DIR, or path = \"DIR\" under [model] in the run file; \
             `varft init tiny DIR` makes a small one",
        ));
    }
    Ok(PathBuf::from(&config.model.path))
}

/// Prepares images as the folder `dir` says, at the sizes that the run file allows.
pub(super) fn preprocessor(config: &RunConfig, dir: &Path) -> Result<Arc<Preprocessor>> {
    let processor = ImageProcessor {
        min_pixels: config.model.min_pixels,
        max_pixels: config.model.max_pixels,
        ..ImageProcessor::load(dir)?
    };
    Ok(Arc::new(Preprocessor::new(processor, config.run.threads, IMAGE_CACHE_BYTES)?))
}

/// Pixels to what the model reads, each content once.
pub(super) fn see(preprocessor: Arc<Preprocessor>) -> Arc<See> {
    Arc::new(move |image: &Arc<RgbImage>| {
        let picture =
            Picture { pixels: image.as_raw().clone(), height: image.height() as usize, width: image.width() as usize };
        let name = "an image of an episode".to_owned();
        preprocessor.submit(ImageSource::Picture { picture: Arc::new(picture), name }).wait()
    })
}

/// An image file as the model reads it.
pub(super) fn see_file(preprocessor: &Preprocessor, path: impl Into<PathBuf>) -> Result<Arc<Image>> {
    preprocessor.submit(ImageSource::Path(path.into())).wait()
}

/// How episodes of training are run.
pub(super) fn episode_options(config: &RunConfig) -> EpisodeOptions {
    let (r, p, w) = (&config.rollout, &config.tools.python, &config.reward);
    EpisodeOptions {
        max_turns: r.max_turns,
        sampling: Sampling {
            temperature: r.temperature as f32,
            top_k: r.top_k as u32,
            top_p: r.top_p as f32,
            min_p: r.min_p as f32,
            max_tokens: r.max_new_tokens,
            ..Sampling::default()
        },
        max_output_chars: r.output_chars,
        limits: Limits {
            cpu: Duration::from_secs_f64(p.cpu_s),
            memory: p.memory_mib << 20,
            file: p.file_mib << 20,
            output: p.output_kib << 10,
            ..Limits::default()
        },
        withhold_images: !p.show_image,
        reward: RewardRule {
            accuracy: w.accuracy,
            scorer: w.scorer,
            accuracy_weight: w.answer,
            format_weight: w.format,
        },
    }
}

/// Where the run file looks for Python.
fn search(config: &RunConfig) -> Search {
    let p = &config.tools.python;
    let mut search = Search::default();
    if !p.interpreter.is_empty() {
        search.python = Some(PathBuf::from(&p.interpreter));
    }
    search.install &= p.install;
    search
}

/// The `python` tool of the run file.
///
/// # Errors
/// As [`PythonTool::new`].
pub(super) fn python(config: &RunConfig) -> Result<Arc<dyn Tool>> {
    let mut options = PythonOptions { search: search(config), ..PythonOptions::default() };
    if config.tools.python.concurrency > 0 {
        options.concurrency = config.tools.python.concurrency;
    }
    Ok(Arc::new(PythonTool::new(options)?))
}

/// The synthetic task of the run file.
fn synthetic_task(config: &RunConfig) -> Result<Arc<Synthetic>> {
    let mut task = config.task.synthetic.clone();
    if config.task.photographs && task.photographs.is_none() {
        task.photographs = Some(synthetic::photographs(&search(config))?);
    }
    Ok(Arc::new(Synthetic::new(task, config.task.seed)?))
}

fn mat(config: &RunConfig, key: &str, file: &str) -> Result<MatExamples> {
    let t = &config.task;
    if file.is_empty() {
        return Err(Error::input(
            format!("`task.kind` is mat, but `{key}` is not set"),
            format!("name a JSON file in MAT-Coding's row format: --set {key}=FILE"),
        ));
    }
    // Where no folder is given, paths start from the file.
    let images = match t.images.is_empty() {
        true => Path::new(file).parent().unwrap_or(Path::new("")).to_path_buf(),
        false => PathBuf::from(&t.images),
    };
    MatExamples::open(Path::new(file), &images)
}

/// The questions to learn from.
///
/// # Errors
/// What is wrong with the files of the task.
pub(super) fn training_examples(config: &RunConfig) -> Result<Arc<dyn Examples>> {
    Ok(match config.task.kind {
        TaskKind::Mat => Arc::new(mat(config, "task.train", &config.task.train)?),
        TaskKind::Synthetic => Arc::new(SyntheticExamples {
            task: synthetic_task(config)?,
            subset: Subset::Train,
            items: config.task.train_items as u64,
        }),
    })
}

/// Where the questions to measure on come from.
///
/// # Errors
/// What is wrong with the files of the task.
pub(super) fn held_out_source(config: &RunConfig) -> Result<Arc<dyn Examples>> {
    Ok(match config.task.kind {
        TaskKind::Mat => Arc::new(mat(config, "task.eval", &config.task.eval)?),
        TaskKind::Synthetic => {
            let items = config.task.eval_items as u64;
            Arc::new(SyntheticExamples { task: synthetic_task(config)?, subset: Subset::HeldOut, items })
        }
    })
}

/// The questions to measure on, all in memory; `stop` ends their making.
///
/// # Errors
/// As [`held_out_source`], and what is wrong with a question's image; [`Error::Cancelled`] where `stop` was raised.
pub(super) fn held_out_examples(config: &RunConfig, stop: &AtomicBool) -> Result<Vec<Arc<Example>>> {
    let (source, wanted) = (held_out_source(config)?, config.task.eval_items as u64);
    let n = if wanted == 0 { source.len() } else { wanted.min(source.len()) };
    let get = |i| match stop.load(Ordering::Relaxed) {
        true => Err(Error::Cancelled("stopped before the first question was asked".into())),
        false => source.get(i),
    };
    (0..n).map(get).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Preset;

    #[test]
    fn the_making_of_questions_can_be_stopped() {
        let stop = AtomicBool::new(false);
        let mut config = RunConfig::default();
        config.task.eval_items = 2;
        assert_eq!(held_out_examples(&config, &stop).unwrap().len(), 2);
        stop.store(true, Ordering::Relaxed);
        assert!(matches!(held_out_examples(&config, &stop), Err(Error::Cancelled(_))));
    }

    #[test]
    fn caches_that_hold_less_than_an_episode_are_refused() {
        for preset in Preset::ALL {
            let (model, mut config) = (preset.config(), RunConfig::default());
            check_caches(&config, &model, DType::F32).unwrap();
            config.rollout.vision_cache_mib = 0;
            let e = check_caches(&config, &model, DType::F32).unwrap_err().to_string();
            assert!(e.contains("rollout.vision_cache_mib to") && e.contains("model.max_pixels"), "{e}");
            config.rollout.kv_cache_mib = 3;
            let e = check_caches(&config, &model, DType::F32).unwrap_err().to_string();
            assert!(e.contains("rollout.kv_cache_mib to") && e.contains("rollout.context"), "{e}");
            // The value that the error names is the least that works.
            let least: usize = e.split("mib to ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
            config.rollout.vision_cache_mib = 256;
            config.rollout.kv_cache_mib = least;
            check_caches(&config, &model, DType::F32).unwrap();
            config.rollout.kv_cache_mib = least - 1;
            check_caches(&config, &model, DType::F32).unwrap_err();
            // Half the bytes hold as much in bf16; and what is not given is no mistake.
            config.rollout.kv_cache_mib = least.div_ceil(2);
            check_caches(&config, &model, DType::BF16).unwrap();
            config.rollout.kv_cache_mib = 0;
            check_caches(&config, &model, DType::F32).unwrap();
        }
    }
}
