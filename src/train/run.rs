//! A run and its folder: what it works with, what it writes down, where it goes on.

use super::checkpoint::{Checkpoints, TrainState};
use super::config::RunConfig;
use super::learner::Learner;
use crate::agent::{Ending, EpisodeOptions, Episodes, Job, Partial, Rollouts, Trajectory, Void};
use crate::engine::{Engine, Sampling};
use crate::input::{Detokenizer, Tokenizer};
use crate::model::SaveOptions;
use crate::report::view::{EpisodeView, Phase, RewardPart, StepView, TokenView};
use crate::report::{MetricsLog, Progress, TrajectoryStore, read_metrics};
use crate::tasks::{Example, Examples};
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Everything that a run works with.
pub struct Setup {
    /// Speaks for the model that is trained.
    pub engine: Arc<Engine>,
    /// The model folder's.
    pub tokenizer: Arc<Tokenizer>,
    /// Runs episodes, as in training.
    pub rollouts: Rollouts,
    /// Training questions.
    pub train: Arc<dyn Examples>,
    /// Held-out questions.
    pub eval: Vec<Arc<Example>>,
    /// Raised to end the run early (Ctrl-C); what is done by then is saved.
    pub stop: Arc<AtomicBool>,
}

/// Scores of held-out questions.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Scores {
    /// Mean F1, 0 to 1.
    pub f1: f64,
    /// Share of exact matches.
    pub em: f64,
    /// Share of episodes that kept the format and answered.
    pub format: f64,
    /// Tool calls per episode.
    pub tool_calls: f64,
    /// Episodes scored.
    pub episodes: usize,
    /// Episodes that the machinery failed; they are not among those scored.
    pub void: usize,
}

/// What came of an evaluation.
pub struct Evaluation {
    /// Scores of the episodes that are complete.
    pub scores: Scores,
    /// The questions, one episode each.
    pub jobs: Vec<Job>,
    /// Per job: its episode, or nothing where the evaluation ended before it was complete.
    pub episodes: Episodes,
    /// Why not all are complete, as [`Partial::ended_by`](crate::agent::Partial::ended_by) has it.
    pub ended_by: Option<Error>,
}

impl Evaluation {
    /// This evaluation, if every question was asked.
    ///
    /// # Errors
    /// What ended it early.
    pub fn complete(self) -> Result<Evaluation> {
        match self.ended_by {
            Some(e) => Err(e),
            None => Ok(self),
        }
    }
}

/// Asks `examples` once each, or as many as get an answer before `rollouts.stop` is raised or something fails; no weights
/// move.
///
/// # Errors
/// What ended it where no episode was complete by then; the failure itself where the tool's machinery failed every single
/// episode.
pub fn evaluate(
    rollouts: &Rollouts,
    examples: &[Arc<Example>],
    seed: u64,
    done: impl FnMut(usize, &Result<Trajectory, Void>),
) -> Result<Evaluation> {
    let jobs: Vec<Job> = examples
        .iter()
        .enumerate()
        // Groups of evaluation are numbered apart from those of training, so that no noise is used twice.
        .map(|(i, e)| Job { example: e.clone(), group: (1 << 40) + i as u64, samples: 1 })
        .collect();
    let Partial { episodes, ended_by } = rollouts.run_as_far_as_it_goes(&jobs, seed, done);
    if !jobs.is_empty() && episodes.iter().flatten().all(Result::is_err) {
        let first = episodes.into_iter().flatten().find_map(Result::err).map(|void| void.error);
        return Err(ended_by.or(first).unwrap_or_else(|| Error::internal("a job without an episode")));
    }
    let scored: Vec<&Trajectory> = episodes.iter().flatten().flatten().collect();
    let n = scored.len().max(1) as f64;
    let mean = |f: &dyn Fn(&Trajectory) -> f64| scored.iter().map(|t| f(t)).sum::<f64>() / n;
    let scores = Scores {
        f1: mean(&|t| t.reward.f1),
        em: mean(&|t| t.reward.em),
        format: mean(&|t| t.reward.format),
        tool_calls: mean(&|t| t.steps.iter().filter(|s| s.tool.is_some()).count() as f64),
        episodes: scored.len(),
        void: episodes.iter().flatten().filter(|e| e.is_err()).count(),
    };
    Ok(Evaluation { scores, jobs, episodes, ended_by })
}

impl Setup {
    /// Runs the episodes of the held-out questions.
    pub fn held_out(&self, config: &RunConfig) -> Rollouts {
        Rollouts { options: eval_options(&self.rollouts.options, config), ..self.rollouts.clone() }
    }

    /// Asks the held-out questions after `step` steps and writes down how it went, unless an earlier session has.
    pub(super) fn evaluate(&self, config: &RunConfig, step: u64, keeper: &mut Keeper) -> Result<()> {
        if keeper.evaluated == Some(step) {
            return Ok(());
        }
        let rollouts = self.held_out(config);
        let total = self.eval.len();
        let busy = |done, _: &Result<_, _>| keeper.busy("held-out", done, total);
        let all = evaluate(&rollouts, &self.eval, config.run.seed, busy)?.complete()?;
        let Evaluation { scores, jobs, episodes, .. } = all;
        let done: Vec<&Trajectory> = episodes.iter().flatten().flatten().collect();
        let by_kind = kind_metrics(&done, "eval");
        let mut metrics = episode_metrics(&done, Phase::Eval);
        metrics.push(("eval/void", scores.void as f64));
        metrics.extend(by_kind.iter().map(|(name, value)| (name.as_str(), *value)));
        let most = config.log.trajectories;
        let views = views(&episodes, &jobs, step, Phase::Eval, most, &keeper.store, &keeper.tokenizer, |_| None)?;
        keeper.log(step, &metrics, Phase::Eval, &views)?;
        keeper.evaluated = Some(step);
        Ok(())
    }
}

/// Options of episodes as in training, sampled as for evaluation.
pub fn eval_options(options: &EpisodeOptions, config: &RunConfig) -> EpisodeOptions {
    let sampling = Sampling { temperature: config.rollout.eval_temperature as f32, ..options.sampling.clone() };
    EpisodeOptions { sampling, ..options.clone() }
}

/// What a run writes down, and the step it has reached.
pub struct Keeper {
    dir: PathBuf,
    metrics: MetricsLog,
    pub(super) store: TrajectoryStore,
    checkpoints: Checkpoints,
    state: TrainState,
    /// Steps between checkpoints; 0: only when asked.
    every: u64,
    saved: Option<u64>,
    /// The step whose checkpoint could not be written.
    unsaved: Option<u64>,
    /// The last step after which the held-out questions were asked.
    evaluated: Option<u64>,
    progress: Progress,
    pub(super) tokenizer: Arc<Tokenizer>,
    companions: Vec<PathBuf>,
}

impl Keeper {
    /// Opens the folder `run_dir` for a run that stands at `state`: what a lost session wrote about later steps is cut.
    /// Every checkpoint gets a copy of the files `companions`: the model folder's tokenizer, its image processor.
    ///
    /// # Errors
    /// [`Error::Input`] when it stands beyond the steps of `config`; [`Error::Io`] when a file cannot be read or written.
    pub fn open(
        run_dir: &Path,
        config: &RunConfig,
        state: TrainState,
        tokenizer: Arc<Tokenizer>,
        companions: Vec<PathBuf>,
    ) -> Result<Keeper> {
        let steps = config.optim.steps;
        if state.step > steps {
            return Err(Error::input(
                format!(
                    "{}: the checkpoint is of step {}, and `optim.steps` is {steps}",
                    run_dir.display(),
                    state.step
                ),
                format!("set `optim.steps` to at least {}, or remove the checkpoints of later steps", state.step),
            ));
        }
        let store = TrajectoryStore::open(run_dir)?;
        store.cut(state.step)?;
        let metrics = MetricsLog::open(run_dir, state.step, config.log.tensorboard)?;
        let evaluated = read_metrics(run_dir)?
            .iter()
            .filter(|r| r.values.iter().any(|(name, _)| name.starts_with("eval/")))
            .map(|r| r.step)
            .max();
        Ok(Keeper {
            dir: run_dir.to_path_buf(),
            metrics,
            store,
            evaluated,
            checkpoints: Checkpoints::new(run_dir, config.log.keep_last),
            every: config.log.checkpoint_every,
            saved: Some(state.step),
            unsaved: None,
            progress: Progress::new(&state.kind, state.step, config.optim.steps),
            state,
            tokenizer,
            companions,
        })
    }

    /// Completed steps.
    pub fn step(&self) -> u64 {
        self.state.step
    }

    /// Shows how far the episodes under way are.
    pub(super) fn busy(&self, what: &str, done: usize, total: usize) {
        self.progress.busy(format!("{what} {done}/{total}"));
    }

    /// A line above the bar.
    pub(super) fn note(&self, text: &str) {
        self.progress.note(text);
    }

    /// Whether the state after the step reached is on the disk, or is that in which the run began: whoever gives up what came
    /// after it gives up nothing that is complete.
    pub(super) fn is_saved(&self) -> bool {
        self.saved == Some(self.state.step)
    }

    /// That the run's folder is still where it was.
    fn check_folder(&self) -> Result<()> {
        if self.metrics.is_in_place() {
            return Ok(());
        }
        Err(Error::input(
            format!(
                "{}: the run's folder was removed, renamed or replaced while the run was at work (after step {})",
                self.dir.display(),
                self.state.step
            ),
            "leave it where it is until the run has ended; if it was renamed, go on from its newest checkpoint under the new name \
             (--resume), else begin again",
        ))
    }

    /// The error to report for a run that `e` ends, having saved its last complete step if that can be done: see
    /// [`save_after_failure`](Self::save_after_failure). Where the run's folder is gone that is the reason for whatever failed,
    /// and nothing is written to where it was.
    pub(super) fn failed(&mut self, learner: &mut Learner, e: Error) -> Error {
        if let Err(gone) = self.check_folder() {
            return gone;
        }
        self.save_after_failure(learner);
        e
    }

    /// Notes that a step's updates are done. What comes after them, such as writing down how it went, may fail without making
    /// the step any less complete.
    pub(super) fn completed(&mut self, learner: &mut Learner) {
        self.state.step += 1;
        self.state.updates = learner.optimizer().updates();
    }

    /// Writes a checkpoint if one is due after the step reached.
    ///
    /// # Errors
    /// As [`save`](Self::save).
    pub(super) fn save_if_due(&mut self, learner: &mut Learner) -> Result<()> {
        if self.every > 0 && self.state.step.is_multiple_of(self.every) { self.save(learner) } else { Ok(()) }
    }

    /// For a run that an error ends: writes a checkpoint of the last complete step, unless there is one, or the weights are no
    /// longer those after that step because an update of the next one has moved them. A failure is only noted: the error
    /// that ends the run is the one to report.
    fn save_after_failure(&mut self, learner: &mut Learner) {
        let optimizer = learner.optimizer();
        if optimizer.updates() != self.state.updates || optimizer.has_diverged() || self.unsaved == Some(self.step()) {
            return;
        }
        if let Err(e) = self.save(learner) {
            self.progress.note(&format!("the state after step {} could not be saved: {e}", self.step()));
        }
    }

    /// Writes a checkpoint of the step reached, unless there is one.
    ///
    /// # Errors
    /// [`Error::Io`], for example on a full disk; earlier checkpoints are as they were. [`Error::Input`] where the run's folder
    /// is no longer there.
    pub fn save(&mut self, learner: &mut Learner) -> Result<()> {
        if self.is_saved() {
            return Ok(());
        }
        self.check_folder()?;
        self.unsaved = Some(self.state.step);
        let (model, stream) = (learner.model().clone(), learner.stream().clone());
        let options = SaveOptions { copy: self.companions.clone(), ..Default::default() };
        let optimizer = learner.optimizer();
        self.checkpoints.save(&self.state, |dir| {
            model.save(&stream, dir, &options)?;
            optimizer.save(&stream, &model.params, &dir.join(OPTIMIZER_FILE))
        })?;
        (self.saved, self.unsaved) = (Some(self.state.step), None);
        Ok(())
    }

    /// Writes figures and episodes, and shows the figures that matter. Episodes are filed under `step`, the number of
    /// updates that their policy had; figures under the number of steps that are complete when they are known, which in
    /// training is one more: what a lost session logged about a step that is taken again is then cut by its number.
    pub(super) fn log(
        &mut self,
        step: u64,
        metrics: &[(&str, f64)],
        phase: Phase,
        episodes: &[EpisodeView],
    ) -> Result<()> {
        self.check_folder()?;
        self.metrics.log(step + u64::from(phase == Phase::Train), metrics)?;
        if !episodes.is_empty() {
            self.store.write(phase, step, episodes)?;
        }
        let figure = |name: &str| metrics.iter().find(|(n, _)| *n == name).map(|(_, v)| *v);
        let shown: Vec<(&str, String)> = SHOWN
            .iter()
            .filter_map(|(name, short, digits)| Some((*short, format!("{:.*}", digits, figure(name)?))))
            .collect();
        match phase {
            Phase::Train => self.progress.set(step + 1, &shown),
            Phase::Eval => {
                let text: Vec<String> = shown.iter().map(|(n, v)| format!("{n} {v}")).collect();
                self.progress.note(&format!("held-out, after {step} steps: {}", text.join("  ")));
            }
        }
        Ok(())
    }

    /// Writes figures that were measured after `step` steps beside those of the run itself.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::Input`] where the run's folder is no longer there.
    pub fn measured(&mut self, step: u64, metrics: &[(&str, f64)]) -> Result<()> {
        self.check_folder()?;
        self.metrics.log(step, metrics)
    }
}

/// The optimizer's file in a checkpoint.
pub const OPTIMIZER_FILE: &str = "optimizer.safetensors";

/// Figures beside the progress bar: name, short name, digits.
const SHOWN: [(&str, &str, usize); 11] = [
    ("sft/loss", "loss", 3),
    ("reward/mean", "reward", 3),
    ("train/f1", "f1", 3),
    ("eval/f1", "f1", 3),
    ("eval/em", "em", 3),
    ("eval/format", "format", 3),
    ("policy/entropy", "entropy", 2),
    ("tools/calls", "calls", 2),
    ("optim/grad_norm", "grad", 2),
    ("speed/rollout_s", "rollout s", 1),
    ("speed/train_s", "train s", 1),
];

/// Means over episodes, by the names under which metrics are logged.
pub fn episode_metrics(episodes: &[&Trajectory], phase: Phase) -> Vec<(&'static str, f64)> {
    let n = episodes.len().max(1) as f64;
    let mean = |f: &dyn Fn(&Trajectory) -> f64| episodes.iter().map(|t| f(t)).sum::<f64>() / n;
    let calls = |t: &Trajectory| t.steps.iter().filter(|s| s.tool.is_some()).count() as f64;
    let failed =
        |t: &Trajectory| t.steps.iter().filter(|s| s.tool.as_ref().is_some_and(|c| c.status != "ok")).count() as f64;
    let (f1, em, format) = (mean(&|t| t.reward.f1), mean(&|t| t.reward.em), mean(&|t| t.reward.format));
    let used_tool = mean(&|t| f64::from(calls(t) > 0.0));
    match phase {
        Phase::Eval => vec![
            ("eval/f1", f1),
            ("eval/em", em),
            ("eval/format", format),
            ("eval/used_tool", used_tool),
            ("eval/tokens", mean(&|t| t.sampled() as f64)),
        ],
        Phase::Train => vec![
            ("reward/mean", mean(&|t| t.reward.total)),
            ("reward/answer", mean(&|t| t.reward.total - t.reward.format_part)),
            ("reward/format", mean(&|t| t.reward.format_part)),
            ("train/f1", f1),
            ("train/em", em),
            ("tools/calls", mean(&calls)),
            ("tools/exceptions", mean(&failed)),
            ("episodes/well_formed", format),
            ("episodes/used_tool", used_tool),
            ("episodes/truncated", mean(&|t| f64::from(t.ending == Ending::Truncated))),
            ("episodes/turns", mean(&|t| t.steps.len() as f64)),
            ("episodes/tokens", mean(&|t| t.sampled() as f64)),
        ],
    }
}

/// For each kind of item among `episodes`, how many there are (`GROUP/n/KIND`) and their mean F1 (`GROUP/f1/KIND`).
pub fn kind_metrics(episodes: &[&Trajectory], group: &str) -> Vec<(String, f64)> {
    let mut kinds: BTreeMap<&str, (f64, f64)> = BTreeMap::new();
    for t in episodes {
        let (n, f1) = kinds.entry(&t.kind).or_default();
        (*n, *f1) = (*n + 1.0, *f1 + t.reward.f1);
    }
    let both = |(kind, (n, f1)): (&str, (f64, f64))| {
        [(format!("{group}/n/{kind}"), n), (format!("{group}/f1/{kind}"), f1 / n)]
    };
    kinds.into_iter().flat_map(both).collect()
}

/// The first `most` episodes as a run's page shows them; their images are written to the store.
///
/// # Errors
/// [`Error::Io`] when an image cannot be written.
pub fn views(
    episodes: &Episodes,
    jobs: &[Job],
    step: u64,
    phase: Phase,
    most: usize,
    store: &TrajectoryStore,
    tokenizer: &Tokenizer,
    advantage: impl Fn(&Trajectory) -> Option<f64>,
) -> Result<Vec<EpisodeView>> {
    let mut out = Vec::new();
    for (job, group) in jobs.iter().zip(episodes) {
        for episode in group {
            if out.len() == most {
                return Ok(out);
            }
            // A void episode has nothing to show but its failure, which the metrics count.
            if let Ok(t) = episode {
                out.push(view(t, job, step, phase, store, tokenizer, advantage(t))?);
            }
        }
    }
    Ok(out)
}

fn view(
    t: &Trajectory,
    job: &Job,
    step: u64,
    phase: Phase,
    store: &TrajectoryStore,
    tokenizer: &Tokenizer,
    advantage: Option<f64>,
) -> Result<EpisodeView> {
    let image = |i: &image::RgbImage| store.image(i.width(), i.height(), i.as_raw()).map(Some);
    let mut steps = Vec::with_capacity(t.steps.len());
    for s in &t.steps {
        steps.push(StepView {
            who: "assistant".into(),
            text: s.text.clone(),
            tokens: token_views(tokenizer, &t.sequence.tokens[s.tokens.clone()], &t.logprobs[s.tokens.clone()]),
            code: s.tool.as_ref().map(|c| c.code.clone()),
            tool_output: s.tool.as_ref().map(|c| c.output.clone()),
            tool_status: s.tool.as_ref().map(|c| c.status.to_owned()),
            tool_ms: s.tool.as_ref().map(|c| c.ms),
            image_before: image(&s.image_before)?,
            image_after: match &s.image_after {
                Some(i) => image(i)?,
                None => None,
            },
        });
    }
    Ok(EpisodeView {
        step,
        phase,
        item: t.item.clone(),
        kind: t.kind.clone(),
        group: job.group,
        sample: t.sample,
        of: job.samples as u64,
        question: t.question.clone(),
        answers: t.answers.clone(),
        prediction: t.answer().map(str::to_owned),
        finish: t.ending.name().into(),
        steps,
        f1: t.reward.f1,
        em: t.reward.em,
        reward: t.reward.total,
        reward_parts: vec![
            RewardPart { name: "answer".into(), value: t.reward.total - t.reward.format_part },
            RewardPart { name: "format".into(), value: t.reward.format_part },
        ],
        advantage,
    })
}

/// Tokens with their text. A character whose bytes are spread over tokens stands, with what else these say, at the first of
/// them, and the others have no text.
fn token_views(tokenizer: &Tokenizer, ids: &[u32], logprobs: &[f32]) -> Vec<TokenView> {
    let mut views: Vec<TokenView> = logprobs.iter().map(|&logp| TokenView { text: String::new(), logp }).collect();
    let (mut stream, mut first) = (Detokenizer::new(), 0);
    for (i, &id) in ids.iter().enumerate() {
        views[first].text += &stream.push(tokenizer, id);
        if stream.is_whole() {
            first = i + 1;
        }
    }
    if let Some(cut_short) = views.get_mut(first) {
        cut_short.text += &stream.finish();
    }
    views
}

#[cfg(test)]
mod tests {
    use super::super::batch::{Entry, MicroBatch};
    use super::super::learner::Goal;
    use super::*;
    use crate::device::Device;
    use crate::input::Prompt;
    use crate::model::train::Group;
    use crate::model::{LoadOptions, Model, Preset};

    fn tokenizer() -> Tokenizer {
        Tokenizer::from_bytes(include_bytes!("../cli/tiny/tokenizer.json"), "the tiny tokenizer").unwrap()
    }

    #[test]
    fn tokens_of_one_character_have_its_text_together() {
        let tokenizer = tokenizer();
        let view = |ids: &[u32]| -> Vec<String> {
            let logprobs: Vec<f32> = (0..ids.len()).map(|i| -(i as f32)).collect();
            let views = token_views(&tokenizer, ids, &logprobs);
            assert_eq!(views.iter().map(|v| v.logp).collect::<Vec<_>>(), logprobs);
            views.into_iter().map(|v| v.text).collect()
        };
        let ids = tokenizer.encode("a😀字b").unwrap();
        let shown = view(&ids);
        assert!(ids.len() > 4, "characters of several tokens: {ids:?}");
        assert_eq!(shown.iter().filter(|t| !t.is_empty()).collect::<Vec<_>>(), ["a", "😀", "字", "b"]);
        let cut = view(&ids[..2]);
        assert_eq!(cut, ["a", "\u{fffd}"], "a character that the limit on tokens cut in two");
        assert_eq!(view(&[]), [""; 0]);
    }

    #[test]
    fn after_a_failure_whole_steps_are_saved_and_halves_are_not() {
        let (dir, device) = (tempfile::tempdir().unwrap(), Device::cpu(1));
        let model = Arc::new(Model::random(Preset::Tiny.config(), 3, &device, &LoadOptions::default()).unwrap());
        let config = RunConfig::read(None, &["log.checkpoint_every=0".into()]).unwrap();
        let mut learner = Learner::new(model, &config.optim, &[]).unwrap();
        let state = TrainState { kind: "train".into(), step: 0, updates: 0 };
        let mut keeper = Keeper::open(dir.path(), &config, state, Arc::new(tokenizer()), Vec::new()).unwrap();
        let text = Prompt::from_tokens(vec![1, 2, 3]);
        let entry = Entry {
            group: 0,
            completion: 0,
            index: 1,
            target: 2,
            temperature: 1.0,
            old_logp: 0.0,
            advantage: 0.0,
            weight: 1.0,
        };
        let mut micro = MicroBatch::default();
        micro.groups.push(Group { prompt: text.clone(), completions: vec![text] });
        micro.entries.push(entry);
        let update = |learner: &mut Learner| {
            let (_, update) = learner.update(std::slice::from_ref(&micro), Goal::Nll, None, 1e-3).unwrap();
            assert!(update.applied);
        };
        let saved = || Checkpoints::new(dir.path(), 0).latest().unwrap().0.map(|c| c.state.step);
        update(&mut learner);
        keeper.save_after_failure(&mut learner);
        assert_eq!(saved(), None, "the first update of several");
        update(&mut learner);
        keeper.completed(&mut learner);
        keeper.save_after_failure(&mut learner);
        assert_eq!(saved(), Some(1), "between steps");
        update(&mut learner);
        keeper.save_after_failure(&mut learner);
        assert_eq!(saved(), Some(1), "half of the second step");
        keeper.completed(&mut learner);
        std::fs::remove_dir_all(dir.path().join("checkpoints")).unwrap();
        std::fs::write(dir.path().join("checkpoints"), "in the way").unwrap();
        assert!(keeper.save(&mut learner).is_err());
        // Noted, and no panic and no second attempt.
        keeper.save_after_failure(&mut learner);
        // A folder that is gone is the reason for any failure, and does not come back.
        keeper.completed(&mut learner);
        let away = dir.path().with_extension("renamed");
        std::fs::rename(dir.path(), &away).unwrap();
        let told = [
            keeper.failed(&mut learner, Error::internal("something else")),
            keeper.save(&mut learner).unwrap_err(),
            keeper.log(2, &[("optim/lr", 1.0)], Phase::Train, &[]).unwrap_err(),
        ];
        for e in told.map(|e| e.to_string()) {
            assert!(e.contains("removed, renamed or replaced") && e.contains("after step 3"), "{e}");
        }
        assert!(!dir.path().exists());
        std::fs::remove_dir_all(away).unwrap();
    }
}
