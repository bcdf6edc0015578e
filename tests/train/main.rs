//! Training as a whole: what a step does, and that a run survives whatever ends it.

#[cfg(emulator)]
mod emulated;
mod full_disk;
mod interrupted;
#[path = "../school/mod.rs"]
mod school;
#[path = "../setting/mod.rs"]
mod setting;
mod unreliable;

use image::imageops;
use school::{COMMON, School, run_keys, school, stderr, text, varft};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use varft::agent::{CodingProtocol, EnginePolicy, EpisodeOptions, PromptStyle, Rollouts};
use varft::device::Device;
use varft::engine::{Engine, EngineOptions, Sampling};
use varft::input::{ChatTemplate, ImageProcessor, Picture, Tokenizer};
use varft::model::{LoadOptions, Model};
use varft::report::{Record, read_metrics};
use varft::tasks::synthetic::{Subset, Synthetic};
use varft::tasks::{Example, Examples, SyntheticExamples};
use varft::tools::{Outcome, Tool, ToolCall, ToolResult};
use varft::train::checkpoint::TrainState;
use varft::train::grpo::{self, Finished};
use varft::train::learner::Learner;
use varft::train::run::{Keeper, Setup};
use varft::train::{Checkpoints, RunConfig};

/// What the python tool would make of the model's only program, without Python.
struct Turn;

impl Tool for Turn {
    fn name(&self) -> &str {
        "turn"
    }
    fn run(&self, call: ToolCall) -> varft::Result<ToolResult> {
        let image = call.images.last().map(|i| imageops::flip_vertical(&**i));
        let (stdout, stderr, usage) = Default::default();
        Ok(ToolResult { outcome: Outcome::Ok, stdout, stderr, image, usage })
    }
}

fn config(model: &Path, run: &Path, keys: &[&str]) -> RunConfig {
    let mut all: Vec<String> = COMMON.iter().chain(keys).map(|k| k.to_string()).collect();
    all.extend(run_keys(run));
    all.push(format!("model.path={}", text(model)));
    RunConfig::read(None, &all).unwrap()
}

/// Trains in this process, with the stub for a tool; returns what was logged about training steps.
fn train(keys: &[&str], run: &Path) -> Vec<Record> {
    train_with(keys, run, Arc::new(Turn));
    read_metrics(run).unwrap().into_iter().filter(|r| r.values.iter().any(|(n, _)| n == "policy/loss")).collect()
}

fn train_with(keys: &[&str], run: &Path, tool: Arc<dyn Tool>) {
    assert_eq!(train_on(keys, run, u64::MAX, tool).unwrap(), Finished::Complete);
}

/// Questions of which only so many can be had.
struct RunningOut {
    all: SyntheticExamples,
    left: AtomicU64,
}

impl Examples for RunningOut {
    fn len(&self) -> u64 {
        self.all.len()
    }
    fn get(&self, i: u64) -> varft::Result<Arc<Example>> {
        match self.left.fetch_sub(1, Ordering::Relaxed) {
            0 => Err(varft::Error::input("no more questions", "wait")),
            _ => self.all.get(i),
        }
    }
}

/// [`train_with`] on so many questions.
fn train_on(keys: &[&str], run: &Path, questions: u64, tool: Arc<dyn Tool>) -> varft::Result<Finished> {
    Run::new(keys, run, questions, tool)?.train()
}

/// A run in this process, set up.
struct Run {
    config: RunConfig,
    setup: Setup,
    learner: Learner,
    reference: Option<Model>,
    keeper: Keeper,
}

impl Run {
    fn new(keys: &[&str], run: &Path, questions: u64, tool: Arc<dyn Tool>) -> varft::Result<Run> {
        let config = config(&school().model, run, keys);
        let device = Device::cpu(2);
        let options = LoadOptions { freeze_vision: config.model.freeze_vision, progress: false };
        let model = Arc::new(Model::load(&school().model, &device, &options).unwrap());
        let reference = (config.algo.beta > 0.0).then(|| Model::load(&school().model, &device, &options).unwrap());
        let tokenizer = Arc::new(Tokenizer::load(&school().model).unwrap());
        let r = &config.rollout;
        let engine_options = EngineOptions {
            kv_bytes: r.kv_cache_mib << 20,
            vision_bytes: r.vision_cache_mib << 20,
            max_context: r.context,
            tokenizer: Some(tokenizer.clone()),
            ..EngineOptions::default()
        };
        let engine = Arc::new(Engine::start(model.clone(), engine_options).unwrap());
        let template = Arc::new(ChatTemplate::builtin());
        let processor = ImageProcessor { min_pixels: config.model.min_pixels, ..Default::default() };
        let see = move |i: &Arc<image::RgbImage>| {
            let (height, width) = (i.height() as usize, i.width() as usize);
            processor.process_picture(Picture { pixels: i.as_raw().clone(), height, width }, "image").map(Arc::new)
        };
        let task = Arc::new(Synthetic::new(config.task.synthetic.clone(), 0).unwrap());
        let sampling = Sampling { max_tokens: r.max_new_tokens, ..Sampling::default() };
        let setup = Setup {
            rollouts: Rollouts {
                policy: Arc::new(EnginePolicy::new(engine.clone(), tokenizer.clone(), template)),
                protocol: CodingProtocol { style: PromptStyle::Brief },
                tool,
                see: Arc::new(see),
                options: EpisodeOptions { max_turns: r.max_turns, sampling, ..Default::default() },
                concurrency: 8,
                stop: Arc::default(),
            },
            engine: engine.clone(),
            tokenizer: tokenizer.clone(),
            train: Arc::new(RunningOut {
                all: SyntheticExamples { task, subset: Subset::Train, items: 50 },
                left: AtomicU64::new(questions),
            }),
            eval: Vec::new(),
            stop: Arc::default(),
        };
        let learner = Learner::new(model, &config.optim, engine.forbidden())?;
        let state = TrainState { kind: "train".into(), step: 0, updates: 0 };
        let keeper = Keeper::open(run, &config, state, tokenizer, Vec::new()).unwrap();
        Ok(Run { config, setup, learner, reference, keeper })
    }

    fn train(&mut self) -> varft::Result<Finished> {
        let Run { config, setup, learner, reference, keeper } = self;
        grpo::train(config, setup, learner, reference.as_ref(), keeper)
    }
}

fn figure(r: &Record, name: &str) -> f64 {
    r.values.iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("no {name} in {r:?}")).1
}

#[test]
fn whatever_the_loss_the_first_update_of_a_step_knows_the_samples_to_the_bit() {
    let dir = tempfile::tempdir().unwrap();
    let common = ["log.eval_every=0", "optim.steps=3", "optim.lr=1e-3", "optim.micro_batch_tokens=300"];
    for (i, keys) in [
        &["algo.loss=dapo"][..],
        &["algo.loss=grpo", "algo.scale=none", "algo.mask_truncated=false"],
        &["algo.loss=dr_grpo", "algo.iterations=2", "algo.minibatches=2"],
        &["algo.beta=0.2", "algo.drop_zero_variance=false", "optim.micro_batch_tokens=5000"],
    ]
    .iter()
    .enumerate()
    {
        let keys: Vec<&str> = common.iter().chain(*keys).copied().collect();
        let steps = train(&keys, &dir.path().join(i.to_string()));
        assert_eq!(steps.iter().map(|r| r.step).collect::<Vec<_>>(), [1, 2, 3]);
        for r in &steps {
            assert_eq!(figure(r, "policy/mismatch"), 0.0, "{keys:?} {r:?}");
            assert_eq!(figure(r, "optim/skipped"), 0.0);
        }
        let most = |name: &str| steps.iter().map(|r| figure(r, name)).fold(f64::MIN, f64::max);
        assert!(
            most("optim/grad_norm") > 0.0 && most("reward/mean") > 0.0,
            "{keys:?}: nothing to learn from {steps:?}"
        );
        // A second update sees other weights than those that sampled; a first one never does.
        let moved = steps.iter().any(|r| (figure(r, "policy/ratio") - 1.0).abs() > 1e-6);
        assert_eq!(moved, keys.contains(&"algo.iterations=2"), "{keys:?} {steps:?}");
        let kl: Vec<f64> = steps.iter().map(|r| figure(r, "policy/kl")).collect();
        if keys.contains(&"algo.beta=0.2") {
            assert!(kl[0] == 0.0 && kl[2] > 0.0, "the reference is the model that the run began with: {kl:?}");
        } else {
            assert_eq!(kl, [0.0; 3]);
        }
    }
}

/// The tensors of a checkpoint that differ from those that the run began with.
fn moved(run: &Path, step: u64) -> Vec<String> {
    let read = |dir: &Path| std::fs::read(dir.join("model.safetensors")).unwrap();
    let (before, after) = (read(&school().model), read(&run.join(format!("checkpoints/step-{step}"))));
    let load = |bytes| safetensors::SafeTensors::deserialize(bytes).unwrap();
    let (before, after) = (load(&before), load(&after));
    let names = before.names().into_iter().map(str::to_string);
    names.filter(|n| before.tensor(n).unwrap().data() != after.tensor(n).unwrap().data()).collect()
}

#[test]
fn a_frozen_vision_tower_stays_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    for freeze in [true, false] {
        let run = dir.path().join(freeze.to_string());
        let key = format!("model.freeze_vision={freeze}");
        train(&[&key, "log.eval_every=0", "optim.steps=3", "optim.lr=1e-3", "algo.mask_truncated=false"], &run);
        let moved = moved(&run, 3);
        assert!(moved.iter().any(|n| n.contains("layers.0.self_attn.q_proj")), "{moved:?}");
        assert_eq!(moved.iter().any(|n| n.contains("visual.")), !freeze, "{moved:?}");
    }
}

#[test]
fn a_failure_between_updates_costs_no_complete_step() {
    let dir = tempfile::tempdir().unwrap();
    let (calm, failed) = (dir.path().join("calm"), dir.path().join("failed"));
    let keys = ["log.eval_every=0", "log.keep_last=0", "optim.steps=3", "optim.lr=1e-3", "algo.mask_truncated=false"];
    train(&[&keys[..], &["log.checkpoint_every=1"]].concat(), &calm);
    assert!(!moved(&calm, 2).is_empty(), "nothing was learned, so nothing is shown");
    // Three for each of two steps; the third step fails at its second question.
    let e = train_on(&[&keys[..], &["log.checkpoint_every=0"]].concat(), &failed, 7, Arc::new(Turn));
    let e = e.unwrap_err().to_string();
    assert!(e.contains("no more questions"), "{e}");
    let newest = Checkpoints::new(&failed, 0).latest().unwrap().0.unwrap();
    assert_eq!(newest.state.step, 2);
    for file in ["model.safetensors", "optimizer.safetensors", "train_state.json"] {
        let read = |run: &Path| std::fs::read(run.join("checkpoints/step-2").join(file)).unwrap();
        assert!(read(&calm) == read(&failed), "{file}");
    }
}

/// What a run ends with: weights, moments, and what was logged but for what depends on the machine.
type Ended = (Vec<u8>, Vec<u8>, Vec<String>);

/// A run of the binary, and how to begin or go on with it.
struct Job {
    args: Vec<String>,
    run: PathBuf,
    /// The checkpoint that it ends with.
    last: u64,
}

impl Job {
    fn train(school: &School, run: &Path, steps: u64, keys: &[&str]) -> Job {
        let own = [format!("model.path={}", text(&school.model)), format!("optim.steps={steps}")];
        let keys = own.into_iter().chain(run_keys(run)).chain(COMMON.iter().chain(keys).map(|k| k.to_string()));
        let args = ["train".to_string()].into_iter().chain(keys.flat_map(|k| ["--set".into(), k])).collect();
        Job { args, run: run.to_path_buf(), last: steps }
    }

    /// The process, going on where there is something to go on with.
    fn command(&self) -> std::process::Command {
        let mut c = varft();
        c.args(&self.args).stdout(Stdio::null()).stderr(Stdio::piped());
        if self.run.join("config.toml").exists() {
            c.arg("--resume");
        }
        c
    }

    fn finish(&self) {
        let o = self.command().output().unwrap();
        assert!(o.status.success(), "{}", stderr(&o));
    }

    fn result(&self) -> Ended {
        let at = self.run.join(format!("checkpoints/step-{}", self.last));
        let read = |f: &str| std::fs::read(at.join(f)).unwrap();
        let metrics = std::fs::read_to_string(self.run.join("metrics.jsonl")).unwrap();
        (read("model.safetensors"), read("optimizer.safetensors"), metrics.lines().map(lasting).collect())
    }
}

/// A line of `metrics.jsonl`, letter for letter, without the fields that depend on the machine. All others are figures, so
/// commas are only between them.
fn lasting(line: &str) -> String {
    let of_machine = ["\"wall_s\"", "\"speed/", "\"memory/"];
    let fields = line.trim_matches(['{', '}']).split(',');
    fields.filter(|f| !of_machine.iter().any(|m| f.starts_with(m))).collect::<Vec<_>>().join(",")
}

#[test]
fn a_run_does_not_become_another_one() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |args: &[&str], parts: &[&str]| {
        let o = varft().args(args).output().unwrap();
        let said = stderr(&o);
        assert!(o.status.code() == Some(1) && parts.iter().all(|p| said.contains(p)), "{args:?}: {said}");
    };
    let run = text(&school().run);
    refused(&["sft", run], &["there is a run", "--resume", "run.name"]);
    refused(&["sft", run, "--resume", "--set", "optim.lr=1.0"], &["optim.lr: 0.003 before, 1.0 now", "another run"]);
    refused(&["train", run, "--resume"], &["a run of `varft sft`", "varft sft"]);
    refused(&["train", text(dir.path()), "--resume"], &["no run in this folder"]);
    let nowhere = format!("run.dir={}", text(dir.path()));
    refused(&["train", "--resume", "--set", &nowhere], &["no run to go on with"]);
    refused(&["train", "--set", &nowhere], &["`model.path` is not set", "varft init"]);
    refused(&["train", "--set", "algo.betta=1"], &["algo.betta", "`algo.beta`"]);
    refused(&["train", "--set", &nowhere, "--set", "model.path=/no/model"], &["/no/model"]);
    let (mat, model) = (["--set", "task.kind=mat"], format!("model.path={}", text(&school().random)));
    refused(&[&["train", "--set", &nowhere, "--set", &model][..], &mat].concat(), &["`task.train` is not set"]);
    refused(&[&["sft", "--set", &nowhere, "--set", &model][..], &mat].concat(), &["sft.data"]);
    // What failed before it began has not taken the name.
    assert!(!dir.path().join("run/config.toml").exists());
    // A second process on the same run.
    let lock = std::fs::File::create(school().run.join(".lock")).unwrap();
    use std::os::fd::AsRawFd;
    // SAFETY: the descriptor is open.
    unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX) };
    refused(&["sft", run, "--resume"], &["another process"]);
}
