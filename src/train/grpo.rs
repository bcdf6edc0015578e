//! Reinforcement learning by GRPO: roll out a batch of groups, score, update, again.

use super::advantages::{group_advantages, token_weights};
use super::batch::{MicroBatch, Sample, micro_batches};
use super::config::RunConfig;
use super::learner::{Goal, Learner, TokenStats, logprobs};
use super::order::item_at;
use super::run::{Keeper, Setup, episode_metrics, views};
use super::schedule::Schedule;
use crate::agent::{Ending, Episodes, Job, Trajectory};
use crate::model::Model;
use crate::report::view::Phase;
use crate::{Error, Result};
use std::sync::atomic::Ordering;
use std::time::Instant;

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finished {
    /// After its last step.
    Complete,
    /// Earlier, because it was asked to stop; the steps that were complete are saved, and the run can be resumed.
    Stopped {
        /// Completed steps; where there are none, nothing is saved.
        at: u64,
    },
}

/// Trains `setup.model` on rollouts, from step `keeper.step()` to `config.optim.steps`, writing down everything in the
/// run's folder. `reference`: the model that `algo.beta` ties the policy to; not needed at beta = 0.
///
/// The episodes and updates of a step depend on the weights before it, the run file and the number of the step alone: a run
/// that is killed and resumed takes the same path, bit for bit. That holds for the model's programs too as long as what they
/// show depends on their images, random generators and files: one that shows the time, a process id or the path of its working
/// folder shows something else each time.
///
/// # Errors
/// [`Error::Input`] where `algo.beta` is not 0 and there is no reference, or where groups of one leave nothing to learn from.
/// Whatever fails later; the run's folder is whole then, and the last complete step is saved, if that can be done and its
/// weights are still there (they are not where an update failed after another of its step).
pub fn train(
    config: &RunConfig,
    setup: &Setup,
    learner: &mut Learner,
    reference: Option<&Model>,
    keeper: &mut Keeper,
) -> Result<Finished> {
    if config.algo.beta != 0.0 && reference.is_none() {
        return Err(Error::input(
            "algo.beta ties the policy to a reference, and there is none",
            "give one, or set beta to 0",
        ));
    }
    if config.algo.beta == 0.0 && config.rollout.group_size == 1 {
        return Err(Error::input(
            "rollout.group_size is 1, and a completion that is compared with no other has no advantage",
            "set it to 2 or more, such as 8",
        ));
    }
    let schedule = Schedule::new(&config.optim);
    let mut trainer = Trainer { config, setup, learner, reference, schedule, finishing: false };
    match trainer.steps(keeper) {
        Ok(()) => {
            keeper.save(trainer.learner)?;
            Ok(Finished::Complete)
        }
        // Whatever is interrupted, the state is that of whole steps, or there is a checkpoint of the last of them.
        Err(Error::Cancelled(_)) if setup.stop.load(Ordering::Relaxed) => {
            keeper.save(trainer.learner)?;
            Ok(Finished::Stopped { at: keeper.step() })
        }
        Err(e) => Err(keeper.failed(trainer.learner, e)),
    }
}

struct Trainer<'a> {
    config: &'a RunConfig,
    setup: &'a Setup,
    learner: &'a mut Learner,
    reference: Option<&'a Model>,
    schedule: Schedule,
    /// It was asked to stop, and finishes a step first.
    finishing: bool,
}

/// The episodes of a step that the loss is about, and what was left out.
struct Selected<'a> {
    /// Groups of samples; each belongs to an update of its own or with others.
    groups: Vec<Vec<(&'a Trajectory, f32)>>,
    /// Groups that say nothing.
    zero_variance: usize,
    /// Episodes that were cut short.
    masked: usize,
    /// Episodes that were scored but are not in `groups`. They still count as episodes where a loss is a mean over
    /// those, or a batch with much left out would take larger steps than one with little.
    left_out: usize,
}

impl Trainer<'_> {
    /// All steps that are left, and the evaluations between them.
    fn steps(&mut self, keeper: &mut Keeper) -> Result<()> {
        let (every, last) = (self.config.log.eval_every, self.config.optim.steps);
        loop {
            let step = keeper.step();
            if every > 0 && (step.is_multiple_of(every) || step >= last) {
                self.setup.evaluate(self.config, step, keeper)?;
            }
            if step >= last {
                return Ok(());
            }
            self.step(step, keeper)?;
            keeper.save_if_due(self.learner)?;
        }
    }

    /// Step `step` and what is written down about it.
    fn step(&mut self, step: u64, keeper: &mut Keeper) -> Result<()> {
        let (r, a) = (&self.config.rollout, &self.config.algo);
        let started = Instant::now();
        let jobs = (0..r.prompts as u64)
            .map(|i| {
                let group = step * r.prompts as u64 + i;
                let item = item_at(self.config.run.seed, self.setup.train.len(), group);
                Ok(Job { example: self.setup.train.get(item)?, group, samples: r.group_size })
            })
            .collect::<Result<Vec<_>>>()?;
        let total = jobs.len() * r.group_size;
        let seed = self.config.run.seed;
        let episodes = self.setup.rollouts.run(&jobs, seed, |done, _| keeper.busy("episodes", done, total))?;
        keeper.busy("updating after episodes", total, total);
        let void = episodes.iter().flatten().filter(|e| e.is_err()).count();
        if 2 * void > total {
            return Err(machinery(episodes, void, total));
        }
        let rollout_s = started.elapsed().as_secs_f64();

        let started = Instant::now();
        let selected = self.select(&episodes);
        if selected.groups.iter().flatten().all(|(_, advantage)| *advantage == 0.0) {
            keeper.note(&format!(
                "step {}: no group teaches anything: in {} of {} all episodes have the same reward, and {} episodes were cut short; {}",
                step + 1,
                selected.zero_variance,
                jobs.len(),
                selected.masked,
                match selected.groups.is_empty() {
                    true => "nothing is updated",
                    false => "nothing but algo.beta and the weight decay moves the weights",
                }
            ));
        }
        let lr = self.schedule.lr(step);
        let mut tokens = Sums::default();
        let (mut grad_norm, mut skipped, mut mismatch) = (0.0f64, 0u64, 0.0f64);
        if !selected.groups.is_empty() {
            let _paused = self.setup.engine.pause()?;
            let parts = parts(self.config, &selected);
            let references = match self.reference {
                Some(model) if a.beta != 0.0 => parts
                    .iter()
                    .map(|p| logprobs(model, p, self.setup.engine.forbidden()).map(Some))
                    .collect::<Result<Vec<_>>>()?,
                _ => vec![None; parts.len()],
            };
            let goal = Goal::Grpo { clip_low: a.clip_low as f32, clip_high: a.clip_high as f32, beta: a.beta as f32 };
            let updates = a.iterations * parts.len();
            for iteration in 0..a.iterations {
                for (i, (part, reference)) in parts.iter().zip(&references).enumerate() {
                    self.look_for_stop(iteration * parts.len() + i, updates, keeper)?;
                    let (stats, update) = self.learner.update(part, goal, reference.as_deref(), lr)?;
                    if iteration == 0 && i == 0 {
                        mismatch = largest_mismatch(part, &stats);
                    }
                    tokens.add(part, &stats);
                    grad_norm = larger(grad_norm, update.grad_norm.into());
                    skipped += u64::from(!update.applied);
                }
            }
        }
        keeper.completed(self.learner);
        let train_s = started.elapsed().as_secs_f64();

        let done: Vec<&Trajectory> = episodes.iter().flatten().flatten().collect();
        let mut metrics = episode_metrics(&done, Phase::Train);
        let sampled: usize = done.iter().map(|t| t.sampled()).sum();
        metrics.extend([
            ("groups/zero_variance", selected.zero_variance as f64 / jobs.len().max(1) as f64),
            ("episodes/masked", selected.masked as f64),
            ("episodes/void", (jobs.len() * r.group_size - done.len()) as f64),
            ("optim/lr", lr),
            ("speed/rollout_s", rollout_s),
            ("speed/train_s", train_s),
            ("speed/rollout_tokens_s", sampled as f64 / rollout_s),
            ("speed/train_tokens_s", tokens.n / train_s),
            ("memory/peak_mib", peak_memory_mib()),
        ]);
        // A step that updated nothing has none of these.
        if tokens.n > 0.0 {
            metrics.extend([
                ("policy/loss", tokens.loss / tokens.updates),
                ("policy/kl", tokens.kl / tokens.n),
                ("policy/entropy", tokens.entropy / tokens.n),
                ("policy/clip_share", tokens.clipped / tokens.n),
                ("policy/ratio", tokens.ratio / tokens.n),
                ("policy/mismatch", mismatch),
                ("optim/grad_norm", grad_norm),
                ("optim/skipped", skipped as f64),
            ]);
        }
        let most = self.config.log.trajectories;
        let views = views(&episodes, &jobs, step, Phase::Train, most, &keeper.store, &keeper.tokenizer, |t| {
            selected.groups.iter().flatten().find(|(s, _)| std::ptr::eq(*s, t)).map(|(_, a)| f64::from(*a))
        })?;
        keeper.log(step, &metrics, Phase::Train, &views)
    }

    /// Ends a step whose update number `next` (from 0) of `updates` comes next, if somebody has asked for that and no complete
    /// step is lost by it: before the first update nothing has moved yet, and between two of them there must be a checkpoint of
    /// the step before. Otherwise the rest is soon done, beside what would have to be done again.
    fn look_for_stop(&mut self, next: usize, updates: usize, keeper: &Keeper) -> Result<()> {
        if !self.setup.stop.load(Ordering::Relaxed) {
            return Ok(());
        }
        if next == 0 || keeper.is_saved() {
            return Err(Error::Cancelled("the updates were asked to stop".into()));
        }
        if !std::mem::replace(&mut self.finishing, true) {
            keeper.note(&format!(
                "finishing the {} updates that step {} still has: without them all steps since the last checkpoint would be lost",
                updates - next,
                keeper.step() + 1
            ));
        }
        Ok(())
    }

    /// Advantages, and what has none.
    fn select<'e>(&self, episodes: &'e Episodes) -> Selected<'e> {
        let a = &self.config.algo;
        let mut selected = Selected { groups: Vec::new(), zero_variance: 0, masked: 0, left_out: 0 };
        for group in episodes {
            let whole = group.iter().all(Result::is_ok);
            let group: Vec<&Trajectory> = group.iter().flatten().collect();
            if !whole {
                // Only an episode that calls its tool can be void: what is left of its group is not a fair sample.
                selected.left_out += group.len();
                continue;
            }
            let rewards: Vec<f64> = group.iter().map(|t| t.reward.total).collect();
            let advantages = group_advantages(&rewards, a.scale);
            selected.zero_variance += usize::from(advantages.zero_variance);
            // With a penalty for leaving the reference even a group without advantages says something.
            if advantages.zero_variance && a.drop_zero_variance && a.beta == 0.0 {
                selected.left_out += rewards.len();
                continue;
            }
            let samples: Vec<_> = group
                .into_iter()
                .zip(advantages.values)
                .filter(|(t, _)| !(a.mask_truncated && t.ending == Ending::Truncated))
                .collect();
            selected.masked += rewards.len() - samples.len();
            selected.left_out += rewards.len() - samples.len();
            if !samples.is_empty() {
                selected.groups.push(samples);
            }
        }
        selected
    }
}

/// The micro-batches of each update of a pass: as many as asked for, or as there are groups if those are fewer, with numbers of
/// groups that differ by one at most.
fn parts(config: &RunConfig, selected: &Selected) -> Vec<Vec<MicroBatch>> {
    let (r, a) = (&config.rollout, &config.algo);
    let all = selected.groups.len();
    let n = all.min(a.minibatches);
    let kept: usize = selected.groups.iter().map(Vec::len).sum();
    (0..n)
        .map(|i| {
            let groups = &selected.groups[i * all / n..(i + 1) * all / n];
            let lengths: Vec<usize> = groups.iter().flatten().map(|(t, _)| t.sampled()).collect();
            let left_out = (selected.left_out * lengths.len()) as f64 / kept as f64;
            let weights = token_weights(a.loss, &lengths, left_out, r.max_turns * r.max_new_tokens);
            let mut weights = weights.into_iter();
            let groups: Vec<Vec<Sample>> = groups
                .iter()
                .map(|g| {
                    g.iter()
                        .zip(weights.by_ref())
                        .map(|(&(trajectory, advantage), weight)| Sample { trajectory, advantage, weight })
                        .collect()
                })
                .collect();
            micro_batches(&groups, config.optim.micro_batch_tokens)
        })
        .collect()
}

/// The error of a step whose episodes were failed by the machinery: that is nothing to learn from.
fn machinery(episodes: Episodes, void: usize, total: usize) -> Error {
    let first = episodes.into_iter().flatten().find_map(Result::err);
    let why = first.map_or_else(String::new, |v| format!("; the first failure: {}", v.error));
    Error::Tool {
        tool: "python".into(),
        what: format!("{void} of {total} episodes of a step failed, so that it was given up{why}"),
    }
}

/// The largest difference between a token's log-probability now and when it was sampled, before any update: 0.
fn largest_mismatch(micros: &[MicroBatch], stats: &TokenStats) -> f64 {
    let old = micros.iter().flat_map(|m| m.entries.iter().map(|e| e.old_logp));
    old.zip(&stats.logp).map(|(old, new)| f64::from((old - new).abs())).fold(0.0, larger)
}

/// The larger of two figures; a NaN wins, since it must not hide.
fn larger(a: f64, b: f64) -> f64 {
    if a.is_nan() || a >= b { a } else { b }
}

/// Sums over the tokens of a step.
#[derive(Default)]
struct Sums {
    n: f64,
    updates: f64,
    loss: f64,
    kl: f64,
    entropy: f64,
    clipped: f64,
    ratio: f64,
}

impl Sums {
    fn add(&mut self, micros: &[MicroBatch], stats: &TokenStats) {
        let sum = |x: &[f32]| x.iter().map(|&x| f64::from(x)).sum::<f64>();
        let weights = micros.iter().flat_map(|m| m.entries.iter().map(|e| f64::from(e.weight)));
        self.n += stats.logp.len() as f64;
        self.updates += 1.0;
        self.loss += weights.zip(&stats.loss).map(|(w, &l)| w * f64::from(l)).sum::<f64>();
        self.kl += sum(&stats.kl);
        self.entropy += sum(&stats.entropy);
        self.clipped += sum(&stats.clipped);
        self.ratio += sum(&stats.ratio);
    }
}

/// The most memory this process has held, in MiB; 0 where the system does not say.
fn peak_memory_mib() -> f64 {
    // SAFETY: plain old data, filled in by the call.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        if libc::getrusage(libc::RUSAGE_SELF, &mut usage) != 0 {
            return 0.0;
        }
        usage
    };
    usage.ru_maxrss as f64 / 1024.0
}

#[cfg(test)]
mod tests {
    use super::super::config::LossKind;
    use super::*;
    use crate::agent::{Author, Reward};
    use crate::input::Prompt;

    /// Two tokens of a prompt, then so many of the model's.
    fn episode(tokens: usize) -> Trajectory {
        let authors = [vec![Author::Prompt; 2], vec![Author::Policy; tokens]].concat();
        Trajectory {
            item: String::new(),
            kind: String::new(),
            question: String::new(),
            answers: Vec::new(),
            group: 0,
            sample: 0,
            sequence: Prompt::from_tokens(vec![1; authors.len()]),
            prompt_len: 2,
            logprobs: vec![0.0; authors.len()],
            authors,
            temperature: 1.0,
            steps: Vec::new(),
            ending: Ending::OutOfTurns,
            reward: Reward::default(),
        }
    }

    /// Per update: its groups, and the sum of its weights.
    fn split(loss: LossKind, minibatches: usize, groups: &[usize], left_out: usize) -> Vec<(usize, f64)> {
        let mut config = RunConfig::default();
        (config.algo.loss, config.algo.minibatches) = (loss, minibatches);
        let t = episode(4);
        let groups = groups.iter().map(|&n| vec![(&t, 1.0); n]).collect();
        parts(&config, &Selected { groups, zero_variance: 0, masked: 0, left_out })
            .iter()
            .map(|part| {
                let weights = part.iter().flat_map(|m| m.entries.iter().map(|e| f64::from(e.weight)));
                (part.iter().map(|m| m.groups.len()).sum(), weights.sum())
            })
            .collect()
    }

    #[test]
    fn a_pass_has_as_many_updates_as_were_asked_for_of_nearly_one_size() {
        let sizes = |n: usize, groups: usize| -> Vec<usize> {
            split(LossKind::Grpo, n, &vec![2; groups], 0).into_iter().map(|(groups, _)| groups).collect()
        };
        assert_eq!(sizes(8, 9), [1, 1, 1, 1, 1, 1, 1, 2]);
        assert_eq!((sizes(4, 10), sizes(8, 3), sizes(1, 5)), (vec![2, 3, 2, 3], vec![1; 3], vec![5]));
        assert!(sizes(2, 0).is_empty());
    }

    #[test]
    fn what_was_left_out_is_spread_over_the_updates_in_full() {
        // Three left out beside eight: every update's mean is over 11/8 of its episodes, however many there are.
        for (n, groups) in [(1, vec![2, 2, 2, 2]), (4, vec![2, 2, 2, 2]), (4, vec![1, 3, 2, 2]), (3, vec![2, 2, 2, 2])]
        {
            for (_, weights) in split(LossKind::Grpo, n, &groups, 3) {
                assert!((weights - 8.0 / 11.0).abs() < 1e-6, "{n} updates of {groups:?}: {weights}");
            }
        }
        let r = RunConfig::default().rollout;
        let constant = (r.max_turns * r.max_new_tokens) as f64;
        let [(_, weights), _] = split(LossKind::DrGrpo, 2, &[1, 1], 1)[..] else { panic!("two updates") };
        assert!((weights - 4.0 / (1.5 * constant)).abs() < 1e-9, "{weights}");
    }
}
