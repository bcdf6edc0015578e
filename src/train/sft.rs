//! Supervised fine-tuning on a teacher's episodes: the warm start before reinforcement learning.

use super::batch::{MicroBatch, Sample, micro_batches};
use super::config::RunConfig;
use super::grpo::Finished;
use super::learner::{Goal, Learner};
use super::run::Keeper;
use super::schedule::Schedule;
use crate::agent::Trajectory;
use crate::report::view::Phase;
use crate::{Error, Result};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Teaches `learner` the tokens that trajectories say the policy wrote, from step `keeper.step()` to
/// `config.optim.steps`. `episode(i)` gives the `i`-th episode of an endless sequence (see
/// [`item_at`](super::order::item_at)); a step takes `config.sft.batch_size` of them and weighs all their tokens alike.
///
/// # Errors
/// Whatever fails; the run's folder is whole then, and the last complete step is saved, if that can be done.
pub fn sft(
    config: &RunConfig,
    learner: &mut Learner,
    keeper: &mut Keeper,
    stop: &AtomicBool,
    episode: impl Fn(u64) -> Result<Trajectory> + Sync,
) -> Result<Finished> {
    match steps(config, learner, keeper, stop, &episode) {
        Ok(()) => {
            keeper.save(learner)?;
            Ok(Finished::Complete)
        }
        Err(Error::Cancelled(_)) if stop.load(Ordering::Relaxed) => {
            keeper.save(learner)?;
            Ok(Finished::Stopped { at: keeper.step() })
        }
        Err(e) => Err(keeper.failed(learner, e)),
    }
}

fn steps(
    config: &RunConfig,
    learner: &mut Learner,
    keeper: &mut Keeper,
    stop: &AtomicBool,
    episode: &(impl Fn(u64) -> Result<Trajectory> + Sync),
) -> Result<()> {
    let schedule = Schedule::new(&config.optim);
    while keeper.step() < config.optim.steps {
        if stop.load(Ordering::Relaxed) {
            return Err(Error::Cancelled("the training was asked to stop".into()));
        }
        let (step, started) = (keeper.step(), Instant::now());
        let first = step * config.sft.batch_size as u64;
        let episodes = prepare(first..first + config.sft.batch_size as u64, episode)?;
        let micros = supervised(&episodes, config.optim.micro_batch_tokens);
        let lr = schedule.lr(step);
        let (stats, update) = learner.update(&micros, Goal::Nll, None, lr)?;
        keeper.completed(learner);
        let n = stats.loss.len().max(1) as f64;
        let metrics = [
            ("sft/loss", stats.loss.iter().map(|&l| f64::from(l)).sum::<f64>() / n),
            ("policy/entropy", stats.entropy.iter().map(|&l| f64::from(l)).sum::<f64>() / n),
            ("optim/grad_norm", update.grad_norm.into()),
            ("optim/skipped", f64::from(u8::from(!update.applied))),
            ("optim/lr", lr),
            ("speed/train_s", started.elapsed().as_secs_f64()),
        ];
        keeper.log(step, &metrics, Phase::Train, &[])?;
        keeper.save_if_due(learner)?;
    }
    Ok(())
}

/// The episodes with these numbers, in order, made on several threads: each waits for its images, or for its tool.
fn prepare(
    numbers: std::ops::Range<u64>,
    episode: &(impl Fn(u64) -> Result<Trajectory> + Sync),
) -> Result<Vec<Trajectory>> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let numbers: Vec<u64> = numbers.collect();
    std::thread::scope(|scope| {
        let parts = numbers.chunks(numbers.len().div_ceil(threads).max(1));
        let parts: Vec<_> = parts
            .map(|part| {
                let work = move || part.iter().map(|&i| episode(i)).collect::<Result<Vec<_>>>();
                let thread = std::thread::Builder::new().spawn_scoped(scope, work);
                thread.map_err(|e| Error::no_thread("a thread that prepares episodes", e))
            })
            .collect();
        let mut all = Vec::with_capacity(numbers.len());
        for part in parts {
            all.extend(part?.join().map_err(|_| Error::internal("the preparation of an episode panicked"))??);
        }
        Ok(all)
    })
}

/// Micro-batches in which every token that the policy wrote weighs the same, and all together weigh 1.
pub fn supervised(episodes: &[Trajectory], max_rows: usize) -> Vec<MicroBatch> {
    let tokens: usize = episodes.iter().map(Trajectory::sampled).sum();
    let weight = 1.0 / tokens.max(1) as f32;
    let groups: Vec<Vec<Sample>> =
        episodes.iter().map(|trajectory| vec![Sample { trajectory, advantage: 0.0, weight }]).collect();
    micro_batches(&groups, max_rows)
}
