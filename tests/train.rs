//! Training as a whole: what a step does, and that a run survives whatever ends it.

mod school;

use image::imageops;
use school::{COMMON, School, ok, run_keys, school, sft_args, stderr, text, varft};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
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
    assert_eq!(train_on(keys, run, u64::MAX).unwrap(), Finished::Complete);
    read_metrics(run).unwrap().into_iter().filter(|r| r.values.iter().any(|(n, _)| n == "policy/loss")).collect()
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

/// [`train`] on so many questions.
fn train_on(keys: &[&str], run: &Path, questions: u64) -> varft::Result<Finished> {
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
            tool: Arc::new(Turn),
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
    let mut learner = Learner::new(model, &config.optim, engine.forbidden());
    let state = TrainState { kind: "train".into(), step: 0, updates: 0 };
    let mut keeper = Keeper::open(run, &config, state, tokenizer, Vec::new()).unwrap();
    grpo::train(&config, &setup, &mut learner, reference.as_ref(), &mut keeper)
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
    let e = train_on(&[&keys[..], &["log.checkpoint_every=0"]].concat(), &failed, 7).unwrap_err().to_string();
    assert!(e.contains("no more questions"), "{e}");
    let newest = Checkpoints::new(&failed, 0).latest().unwrap().0.unwrap();
    assert_eq!(newest.state.step, 2);
    for file in ["model.safetensors", "optimizer.safetensors", "train_state.json"] {
        let read = |run: &Path| std::fs::read(run.join("checkpoints/step-2").join(file)).unwrap();
        assert!(read(&calm) == read(&failed), "{file}");
    }
}

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

    /// Weights and moments at the end, and all logged figures that do not depend on the machine.
    fn result(&self) -> (Vec<u8>, Vec<u8>, Vec<Record>) {
        let at = self.run.join(format!("checkpoints/step-{}", self.last));
        let read = |f: &str| std::fs::read(at.join(f)).unwrap();
        let mut metrics = read_metrics(&self.run).unwrap();
        for r in &mut metrics {
            r.wall_s = 0.0;
            r.values.retain(|(n, _)| !n.starts_with("speed/") && !n.starts_with("memory/"));
        }
        (read("model.safetensors"), read("optimizer.safetensors"), metrics)
    }
}

/// Until it has been killed so often, a process is killed at a random moment of its work and a new one goes on.
fn killed(job: &Job, times: usize, undisturbed: Duration, want: &(Vec<u8>, Vec<u8>, Vec<Record>)) {
    let mut random = std::time::UNIX_EPOCH.elapsed().unwrap().subsec_nanos() as u64;
    let mut kills = 0;
    let mut checks = 0;
    while kills < times || checks == 0 {
        if kills == times {
            job.finish();
        } else {
            let mut child: Child = job.command().stderr(Stdio::null()).spawn().unwrap();
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            std::thread::sleep(undisturbed.mul_f64(0.3 * (random >> 40) as f64 / (1 << 24) as f64));
            match child.try_wait().unwrap() {
                None => {
                    child.kill().unwrap(); // SIGKILL
                    child.wait().unwrap();
                    kills += 1;
                }
                Some(status) => assert!(status.success()),
            }
        }
        if job.run.join(format!("checkpoints/step-{}/train_state.json", job.last)).exists() {
            job.finish(); // if it was killed after its last checkpoint
            let got = job.result();
            assert!(got.0 == want.0, "weights differ after {kills} kills");
            assert!(got.1 == want.1, "moments differ after {kills} kills");
            assert_eq!(got.2, want.2);
            checks += 1;
            std::fs::remove_dir_all(&job.run).unwrap();
        }
    }
}

#[test]
fn a_run_that_is_killed_ends_as_if_it_had_not_been() {
    let dir = tempfile::tempdir().unwrap();
    let school = school();
    // Supervised: the school's own run is the one that nobody disturbed.
    let run = dir.path().join("sft");
    let undisturbed = Job { args: Vec::new(), run: school.run.clone(), last: 120 };
    let started = Instant::now();
    let calm = Job { args: sft_args(&school.random, &school.talks, &run), run: run.clone(), last: 120 };
    calm.finish();
    let took = started.elapsed();
    assert!(calm.result() == undisturbed.result(), "two undisturbed runs differ");
    std::fs::remove_dir_all(&run).unwrap();
    killed(&calm, 10, took, &undisturbed.result());
    // By reinforcement, with the python tool, evaluations and every checkpoint.
    let keys = ["optim.lr=1e-3", "log.eval_every=2", "log.checkpoint_every=1", "algo.mask_truncated=false"];
    let calm = Job::train(school, &dir.path().join("calm"), 5, &keys);
    let started = Instant::now();
    calm.finish();
    let took = started.elapsed();
    assert!(!moved(&calm.run, 5).is_empty(), "nothing was learned, so nothing is shown");
    killed(&Job::train(school, &dir.path().join("killed"), 5, &keys), 10, took, &calm.result());
}

#[test]
fn a_full_disk_at_a_checkpoint_costs_no_more_than_the_steps_since_the_last() {
    let dir = tempfile::tempdir().unwrap();
    let keys = ["optim.lr=1e-3", "log.eval_every=0", "log.checkpoint_every=2", "algo.mask_truncated=false"];
    let calm = Job::train(school(), &dir.path().join("calm"), 4, &keys);
    calm.finish();
    let run = dir.path().join("full");
    Job::train(school(), &run, 2, &keys).finish();
    let job = Job::train(school(), &run, 4, &keys);
    let mut command = job.command();
    // No file may grow beyond 100 kB, which the system says as it says that a disk is full: a write fails half-way.
    // SAFETY: only calls that are allowed between fork and exec.
    unsafe {
        use std::os::unix::process::CommandExt;
        command.pre_exec(|| {
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            let limit = libc::rlimit { rlim_cur: 100_000, rlim_max: libc::RLIM_INFINITY };
            libc::setrlimit(libc::RLIMIT_FSIZE, &limit);
            Ok(())
        });
    }
    let o = command.output().unwrap();
    let said = stderr(&o);
    assert_eq!(o.status.code(), Some(1), "{said}");
    assert!(said.contains("model.safetensors") && said.contains("--resume") && !said.contains("panicked"), "{said}");
    let checkpoints = std::fs::read_dir(run.join("checkpoints")).unwrap().count();
    assert_eq!(checkpoints, 1, "half a checkpoint was left");
    assert_eq!(Checkpoints::new(&run, 0).latest().unwrap().0.unwrap().state.step, 2);
    job.finish();
    assert!(job.result() == calm.result());
}

#[test]
fn ctrl_c_saves_and_says_how_to_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("stopped");
    let job = Job::train(school(), &run, 100_000, &["log.eval_every=0", "log.checkpoint_every=0"]);
    let child = job.command().spawn().unwrap();
    while read_metrics(&run).map_or(0, |m| m.len()) < 2 {
        std::thread::sleep(Duration::from_millis(20));
    }
    // SAFETY: our own child, which has not been waited for.
    unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
    let o = child.wait_with_output().unwrap();
    let said = stderr(&o);
    assert_eq!(o.status.code(), Some(1), "{said}");
    assert!(said.contains(&format!("varft train {} --resume", text(&run))), "{said}");
    let step = Checkpoints::new(&run, 0).latest().unwrap().0.unwrap().state.step;
    assert!(step >= 2 && said.contains(&format!("after step {step}")), "{said}");
    assert!(run.join("report.html").is_file());
    // By the folder alone, as the message says.
    let steps = format!("optim.steps={}", step + 1);
    ok(&["train", text(&run), "--resume", "--set", &steps]);
    assert!(run.join(format!("checkpoints/step-{}/model.safetensors", step + 1)).is_file());
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
