//! The warm start: what the tiny model knows before it learns anything by reinforcement.
//!
//! It is taught two things by examples, apart from each other. To *keep the format*: to name a problem and give the code that
//! belongs to it, where the problem is drawn by lot and has nothing to do with the image, and to answer with some number where that
//! left the image unreadable. To *read*: to answer from an image that was repaired as it needed, where the choice of the
//! repair is hidden from the loss. So it can read what is repaired, and repairs at random; which repair an image needs is
//! left for it to find out.

use super::super::init::TINY_TOKENIZER;
use super::super::setup::{episode_options, preprocessor, python, see, training_examples};
use crate::agent::{Author, CodingProtocol, Job, Rollouts, ScriptedPolicy, Trajectory};
use crate::device::{DType, Device};
use crate::engine::placeholders;
use crate::input::{ChatTemplate, Tokenizer};
use crate::model::{Config, LoadOptions, Model, Preset, SaveOptions, write_atomically};
use crate::report::Progress;
use crate::tasks::{Degradation, Example, Examples, synthetic};
use crate::train::RunConfig;
use crate::train::config::Optim;
use crate::train::learner::{Goal, Learner};
use crate::train::schedule::{Decay, Schedule};
use crate::train::sft::supervised;
use crate::{Error, Result};
use std::path::Path;
use std::sync::Arc;

/// The files of the warm start, in bf16; `varft quickstart --remake-warm-start` writes them.
const FILES: [(&str, &[u8]); 3] = [
    ("config.json", include_bytes!("warm/config.json")),
    ("model.safetensors", include_bytes!("warm/model.safetensors")),
    ("tokenizer.json", TINY_TOKENIZER),
];

/// Writes the warm start into `dir` as a model folder.
pub(super) fn unpack(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(|e| Error::io("create the folder", dir, e))?;
    FILES.iter().try_for_each(|(name, bytes)| {
        let path = dir.join(name);
        write_atomically(&path, |out| out.write_all(bytes).map_err(|e| Error::io("write", &path, e)))
    })
}

/// The shape: Qwen2.5-VL with about a million parameters, and full attention throughout: its images are smaller than a window.
fn shape() -> Config {
    let mut c = Preset::Tiny.config();
    (c.hidden_size, c.intermediate_size, c.layers) = (128, 256, 4);
    (c.mrope_section, c.rope_theta) = ([4, 6, 6], 10_000.0);
    let v = &mut c.vision;
    (v.hidden_size, v.intermediate_size, v.heads, v.out_hidden_size) = (64, 128, 4, 128);
    v.full_attention_blocks = vec![0, 1, 2, 3];
    c
}

/// Of so many lessons one teaches the format, the others reading.
const FORMAT_EVERY: u64 = 2;

/// Trains the warm start from random weights and writes it to `dir`.
pub(super) fn remake(config: &RunConfig, dir: &Path) -> Result<()> {
    let device = Device::cpu(config.run.threads);
    let model = Arc::new(Model::random(shape(), config.run.seed, &device, &LoadOptions::default())?);
    let optim = Optim {
        steps: STEPS,
        lr: 1e-3,
        schedule: Decay::Cosine,
        warmup_steps: 50,
        final_lr: 0.02,
        weight_decay: 0.01,
        ..config.optim.clone()
    };
    let school = School::new(config)?;
    let forbidden = placeholders(&model.config, Some(&school.tokenizer));
    let mut learner = Learner::new(model.clone(), &optim, &forbidden)?;
    let schedule = Schedule::new(&optim);
    let mut progress = Progress::new("warm start", 0, optim.steps);
    let batch = config.sft.batch_size as u64;
    for step in 0..optim.steps {
        let episodes = school.lessons(step * batch..(step + 1) * batch)?;
        let micros = supervised(&episodes, optim.micro_batch_tokens);
        let (stats, update) = learner.update(&micros, Goal::Nll, None, schedule.lr(step))?;
        let loss = stats.loss.iter().sum::<f32>() / stats.loss.len().max(1) as f32;
        progress.set(step + 1, &[("loss", format!("{loss:.3}")), ("grad", format!("{:.2}", update.grad_norm))]);
    }
    progress.finish();
    model.save(learner.stream(), dir, &SaveOptions { dtype: DType::BF16, ..SaveOptions::default() })?;
    say!("{}: the warm start, {} steps of {batch} episodes", dir.display(), optim.steps);
    Ok(())
}

/// Steps of supervised training.
const STEPS: u64 = 1000;

/// What lessons are made with.
struct School {
    tokenizer: Arc<Tokenizer>,
    template: Arc<ChatTemplate>,
    rollouts: Rollouts,
    examples: Arc<dyn Examples>,
    kinds: Vec<Degradation>,
}

impl School {
    fn new(config: &RunConfig) -> Result<School> {
        let tokenizer = Arc::new(Tokenizer::from_bytes(TINY_TOKENIZER, "the tiny tokenizer")?);
        let template = Arc::new(ChatTemplate::builtin());
        let nobody = ScriptedPolicy { tokenizer: tokenizer.clone(), template: template.clone(), lines: Vec::new() };
        let rollouts = Rollouts {
            policy: Arc::new(nobody),
            protocol: CodingProtocol { style: config.rollout.prompt },
            tool: python(config)?,
            see: see(preprocessor(config, Path::new(""))?),
            options: episode_options(config),
            concurrency: 1,
            stop: Arc::default(),
        };
        let kinds = config.task.synthetic.degradations.clone();
        Ok(School { tokenizer, template, rollouts, examples: training_examples(config)?, kinds })
    }

    /// Lessons by number, in order; made on two threads, since each waits for its tool.
    fn lessons(&self, numbers: std::ops::Range<u64>) -> Result<Vec<Trajectory>> {
        let numbers: Vec<u64> = numbers.collect();
        let (first, second) = numbers.split_at(numbers.len() / 2);
        let make = |numbers: &[u64]| numbers.iter().map(|&i| self.lesson(i)).collect::<Result<Vec<_>>>();
        std::thread::scope(|scope| {
            let other = std::thread::Builder::new()
                .spawn_scoped(scope, || make(second))
                .map_err(|e| Error::no_thread("a thread for lessons", e))?;
            let mut all = make(first)?;
            all.extend(other.join().map_err(|_| Error::internal("a lesson panicked"))??);
            Ok(all)
        })
    }

    fn lesson(&self, number: u64) -> Result<Trajectory> {
        let example = self.examples.get(number % self.examples.len())?;
        if !number.is_multiple_of(FORMAT_EVERY) {
            let mut episode = self.play(example.kinds[0], &example.answers[0], example.clone(), number)?;
            let choice = episode.steps[0].tokens.clone();
            episode.authors[choice].fill(Author::Tool);
            return Ok(episode);
        }
        // Examples are drawn at random, so taking turns is as good as a lot, and another one's answer is any number.
        let kind = self.kinds[(number / FORMAT_EVERY) as usize % self.kinds.len()];
        let answer = match kind == example.kinds[0] {
            true => example.answers[0].clone(),
            false => self.examples.get((number + 1) % self.examples.len())?.answers[0].clone(),
        };
        self.play(kind, &answer, example, number)
    }

    /// The episode in which the image is repaired as if it were damaged by `kind`, and then answered.
    fn play(&self, kind: Degradation, answer: &str, example: Arc<Example>, number: u64) -> Result<Trajectory> {
        let repair = format!("<problem>{{'{kind}'}}</problem><code>```python\n{}\n```</code>", synthetic::repair(kind));
        let lines = vec![repair, format!("<answer>{answer}</answer>")];
        let (tokenizer, template) = (self.tokenizer.clone(), self.template.clone());
        let policy = Arc::new(ScriptedPolicy { tokenizer, template, lines });
        let job = Job { example, group: number, samples: 1 };
        let episode =
            Rollouts { policy, ..self.rollouts.clone() }.run(&[job], 0, |_, _| ())?.pop().and_then(|mut g| g.pop());
        let episode = episode.ok_or_else(|| Error::internal("a job without an episode"))?.map_err(|void| void.error)?;
        match episode.steps.len() {
            2 if episode.steps.iter().all(|s| s.well_formed) => Ok(episode),
            _ => Err(Error::internal(format!("a lesson that is not one: {:?}", episode.steps))),
        }
    }
}
