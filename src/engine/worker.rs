//! The engine's thread: takes commands, plans a step while the one before it runs, submits it, reads the results of the one
//! before. On the host's cores, where a step runs as it is submitted, they are read first, so that whoever waits for them goes
//! on meanwhile.

use super::generation::{Link, Writer};
use super::plan::Plan;
use super::runner::{Drawn, Runner};
use super::sampling::Sampling;
use super::scheduler::Scheduler;
use super::stats::Stats;
use crate::input::Prompt;
use crate::{Error, Result};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What handles ask of the engine's thread. A command that comes too late is dropped, and so is the [`Writer`] in it,
/// which tells its reader.
pub(super) enum Command {
    Append {
        id: u64,
        prompt: Prompt,
    },
    Generate {
        id: u64,
        sampling: Arc<Sampling>,
        writer: Writer,
    },
    /// One prompt, several samples, the first of which computes the prompt.
    Request {
        samples: Vec<(u64, Arc<Sampling>, Writer)>,
        prompt: Prompt,
    },
    Fork {
        parent: u64,
        child: u64,
    },
    Close {
        id: u64,
    },
    /// Nothing runs from the acknowledgement until `release` is dropped; a message from it says that weights changed, and
    /// whether those of the vision tower did.
    Pause {
        idle: Sender<()>,
        release: Receiver<bool>,
    },
    Shutdown,
}

pub(super) struct Worker {
    pub commands: Receiver<Command>,
    pub scheduler: Scheduler,
    pub runner: Runner,
    pub stats: Arc<Mutex<Stats>>,
    pub link: Arc<Link>,
    cancels_seen: usize,
    running: Option<Step>,
    spare: Vec<Plan>,
}

/// What is being computed.
struct Step {
    plan: Plan,
    pending: Drawn,
    timing: Timing,
}

#[derive(Clone, Copy, Default)]
struct Timing {
    host: Duration,
    device: Duration,
}

impl Worker {
    pub fn new(
        commands: Receiver<Command>,
        scheduler: Scheduler,
        runner: Runner,
        stats: Arc<Mutex<Stats>>,
        link: Arc<Link>,
    ) -> Worker {
        let spare = vec![Plan::default(), Plan::default()];
        let mut w = Worker { commands, scheduler, runner, stats, link, cancels_seen: 0, running: None, spare };
        w.publish(|_| ()); // the budgets, before the thread first gets to it
        w
    }

    /// Serves until the engine is dropped.
    pub fn serve(&mut self) -> Result<()> {
        let mut stalls = 0;
        loop {
            // Before the commands: a turn is always sent before it is cancelled, so every turn that this count is about
            // is known once the commands are in.
            let cancels = self.link.cancels.load(Ordering::Acquire);
            if !self.take_commands()? {
                return Ok(());
            }
            if cancels != self.cancels_seen {
                self.cancels_seen = cancels;
                self.scheduler.drop_cancelled();
            }
            let begun = Instant::now();
            let mut plan = self.spare.pop().unwrap_or_default();
            self.scheduler.plan(&mut plan);
            let mut timing = Timing { host: begun.elapsed(), device: Duration::ZERO };
            let mut before = self.running.take();
            if plan.is_empty() {
                self.spare.push(plan);
                let settled = self.settle(before)?;
                stalls = if settled || !self.scheduler.busy() { 0 } else { stalls + 1 };
                if stalls > 2 {
                    return Err(Error::internal("the scheduler cannot go on with any sequence"));
                }
                continue;
            }
            stalls = 0;
            let ahead = self.runner.runs_ahead();
            if !ahead {
                self.settle(before.take())?;
            }
            let begun = Instant::now();
            let pending = self.runner.submit(&plan)?;
            timing.device = begun.elapsed();
            self.running = Some(Step { plan, pending, timing });
            if ahead {
                self.settle(before)?;
            }
        }
    }

    /// Reads the results of a step, if there is one.
    fn settle(&mut self, step: Option<Step>) -> Result<bool> {
        let Some(Step { plan, pending, timing }) = step else {
            self.publish(|_| ());
            return Ok(false);
        };
        let begun = Instant::now();
        let (tokens, logprobs) = pending.wait()?;
        let read = Instant::now();
        self.scheduler.settle(&plan.draws, &tokens, &logprobs);
        let host = timing.host + read.elapsed();
        let took = host + timing.device + (read - begun);
        let (prefill, sampled) = (plan.prefill_tokens, plan.draws.len());
        self.publish(|s| s.record(prefill, sampled, took, host));
        self.spare.push(plan);
        Ok(true)
    }

    /// Takes what has been asked for; blocks while there is nothing else to do. `false`: the engine is being dropped.
    fn take_commands(&mut self) -> Result<bool> {
        loop {
            let idle = self.running.is_none() && !self.scheduler.busy();
            let command = if idle {
                self.publish(|_| ());
                match self.commands.recv() {
                    Ok(c) => c,
                    Err(_) => return Ok(false),
                }
            } else {
                match self.commands.try_recv() {
                    Ok(c) => c,
                    Err(TryRecvError::Empty) => return Ok(true),
                    Err(TryRecvError::Disconnected) => return Ok(false),
                }
            };
            match command {
                Command::Append { id, prompt } => self.scheduler.append(id, &prompt),
                Command::Generate { id, sampling, writer } => {
                    self.scheduler.begin_turn(id, sampling, writer, false, None);
                }
                Command::Request { samples, prompt } => {
                    let mut leader = None;
                    for (id, sampling, writer) in samples {
                        self.scheduler.append(id, &prompt);
                        self.scheduler.begin_turn(id, sampling, writer, true, leader);
                        leader = leader.or(Some(id));
                    }
                }
                Command::Fork { parent, child } => self.scheduler.fork(parent, child),
                Command::Close { id } => self.scheduler.close(id),
                Command::Pause { idle, release } => {
                    let running = self.running.take();
                    self.settle(running)?;
                    self.runner.synchronize()?;
                    // Whoever asked may be gone; then the release is gone too.
                    let _ = idle.send(());
                    let mut changed = None;
                    while let Ok(vision) = release.recv() {
                        changed = Some(vision);
                    }
                    if let Some(vision) = changed {
                        self.scheduler.change_epoch(vision);
                    }
                }
                Command::Shutdown => return Ok(false),
            }
        }
    }

    /// Brings the figures that callers see up to date, and then tells them of turns that have ended.
    fn publish(&mut self, step: impl FnOnce(&mut Stats)) {
        let mut s = self.stats.lock().unwrap_or_else(PoisonError::into_inner);
        step(&mut s);
        let (c, row) = (self.scheduler.counters, self.runner.vision_row_bytes());
        s.graph_steps = self.runner.replays();
        s.sampled_tokens = c.sampled_tokens;
        s.prefix_hit_tokens = c.prefix_hit_tokens;
        (s.images_encoded, s.image_hits) = (c.vision_misses, c.vision_hits);
        (s.turns, s.preemptions, s.retracted_tokens) = (c.turns, c.preemptions, c.retracted_tokens);
        (s.running, s.waiting, s.sequences) = self.scheduler.gauges();
        let b = &self.scheduler.blocks;
        (s.pages, s.pages_held, s.pages_cached) = (b.count(), b.count() - b.free(), b.cached());
        s.kv_bytes = b.count() * self.runner.page_bytes();
        let v = &self.scheduler.vision;
        (s.images_cached, s.vision_bytes_used, s.vision_bytes) = (v.images(), v.used_rows() * row, v.rows() * row);
        s.epoch = self.scheduler.epoch;
        drop(s);
        self.scheduler.announce();
    }
}
