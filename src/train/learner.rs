//! One model that learns: forward, loss, backward over micro-batches, then an update.

use super::Optimizer;
use super::batch::MicroBatch;
use super::config::Optim;
use super::memory::logit_bytes;
use super::optimizer::Update;
use crate::device::{Buffer, DType, Stream};
use crate::model::Model;
use crate::model::train::{self, Activations, BatchSize, GradStore, MemoryPlan, TrainBatch};
use crate::ops::loss::{self, Kl, LossRows, Objective, Outputs};
use crate::ops::softmax::forbidden_set;
use crate::{Error, Result};
use std::sync::Arc;

/// What `optim.activations_mib = 0` gives at least, in bytes, where nobody has planned it.
const LEAST_BUDGET: usize = 2 << 30;

/// What to do where activations do not fit the memory.
const MAKE_ROOM: &str = "lower optim.micro_batch_tokens, rollout.context or rollout.kv_cache_mib, give optim.activations_mib \
     less, or use a larger machine";

/// What is minimised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// Negative log-likelihood of the trained tokens.
    Nll,
    /// The clipped policy gradient, with a penalty for leaving the reference where `beta` is not 0; the reference's
    /// log-probabilities are needed then.
    Grpo {
        /// The ratio is clipped below at `1 - clip_low`.
        clip_low: f32,
        /// The ratio is clipped above at `1 + clip_high`.
        clip_high: f32,
        /// Weight of the KL estimate.
        beta: f32,
    },
}

/// What a pass told about each entry of its micro-batches, in order.
#[derive(Clone, Debug, Default)]
pub struct TokenStats {
    /// Log-probability under the current weights.
    pub logp: Vec<f32>,
    /// Entropy in nats.
    pub entropy: Vec<f32>,
    /// Loss before its weight.
    pub loss: Vec<f32>,
    /// New over old probability.
    pub ratio: Vec<f32>,
    /// The k3 estimate of the divergence from the reference.
    pub kl: Vec<f32>,
    /// 1 where the clip took the gradient away.
    pub clipped: Vec<f32>,
}

/// A model, its gradients and its optimizer.
pub struct Learner {
    model: Arc<Model>,
    stream: Stream,
    grads: GradStore,
    optimizer: Optimizer,
    options: Optim,
    /// Bytes for activations where the options do not say.
    budget: usize,
    room: Option<Room>,
    logits: loss::Workspace,
    forbidden: Buffer,
}

/// What batches are computed in: buffers that are reused, within a budget.
struct Room {
    plan: MemoryPlan,
    /// The largest batch that it holds.
    size: BatchSize,
    acts: Activations,
    /// `[rows, hidden]`: the loss's gradient for the hidden states.
    dhidden: Buffer,
}

impl Room {
    /// Room for a batch of `size`, one of several that are at most `largest`, in `budget` bytes: `held`, if that will do.
    ///
    /// # Errors
    /// [`Error::Limit`] if the batch does not fit the budget, or the memory.
    fn within(budget: usize, held: Option<Room>, model: &Model, size: BatchSize, largest: BatchSize) -> Result<Room> {
        let (c, vision) = (&model.config, model.trains_vision());
        // Planned for all of the batches where that is possible: those of other shapes than the one before then find room,
        // rather than have it made anew or let it grow beyond the budget.
        let float = model.device().float();
        let (mut size, plan) = match MemoryPlan::fit(c, float, vision, largest, budget) {
            Ok(plan) => (largest, plan),
            Err(_) => (size, MemoryPlan::fit(c, float, vision, size, budget)?),
        };
        if let Some(room) = held.filter(|room| room.plan == plan) {
            if size.fits(room.size) {
                return Ok(room);
            }
            if plan.bytes(c, float, vision, size.max(room.size)) <= budget {
                size = size.max(room.size);
            }
        }
        // What was held is free by now.
        model.device().check_room(plan.bytes(c, float, vision, size), "activations of a batch", MAKE_ROOM)?;
        let dhidden = model.device().alloc(float, size.rows * c.hidden_size);
        Ok(Room { plan, size, acts: Activations::with_room(model, plan, size), dhidden })
    }
}

impl Learner {
    /// A learner that moves `model`'s weights in place. `forbidden`: ids that rollouts can't sample, which the softmax
    /// leaves out ([`Engine::forbidden`](crate::engine::Engine::forbidden)); empty for the plain softmax.
    ///
    /// # Errors
    /// [`Error::Limit`] if gradients and moments do not fit the memory.
    pub fn new(model: Arc<Model>, options: &Optim, forbidden: &[u32]) -> Result<Learner> {
        let device = model.device().clone();
        let (c, float) = (&model.config, device.float());
        let logits = logit_bytes(float, c.vocab_size);
        let mirrors: usize = Optimizer::bytes_for(float, model.params.trainable().len(), options.masters).iter().sum();
        device.check_room(
            mirrors + loss::Workspace::bytes_for(float, c.vocab_size, c.hidden_size, logits),
            "gradients and the optimizer's moments",
            "freeze the vision tower (model.freeze_vision), lower rollout.kv_cache_mib, use a smaller model or a larger machine",
        )?;
        let stream = device.stream();
        Ok(Learner {
            grads: GradStore::new(&model),
            optimizer: Optimizer::new(&model.params, &stream, options.masters),
            stream,
            options: options.clone(),
            budget: LEAST_BUDGET,
            room: None,
            logits: loss::Workspace::new(&device, c.vocab_size, c.hidden_size, usize::MAX, logits),
            forbidden: device.upload(&forbidden_set(c.vocab_size, forbidden)),
            model,
        })
    }

    /// Gives activations `bytes` bytes, for as long as no batch needs more, where `optim.activations_mib` is 0
    /// ([`Plan::activations`](super::memory::Plan::activations)). Changes no result.
    pub fn give(&mut self, bytes: usize) {
        self.budget = bytes;
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// The optimizer, for checkpoints.
    pub fn optimizer(&mut self) -> &mut Optimizer {
        &mut self.optimizer
    }

    /// The stream that training runs on.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// The gradients that the last passes left.
    pub fn grads(&self) -> &GradStore {
        &self.grads
    }

    /// Gradients of all of `micros`, summed in order, then one update at rate `lr`. `ref_logp`: the reference's
    /// log-probabilities of every entry, for a goal with a penalty.
    ///
    /// # Errors
    /// [`Error::Input`] where an engine that is not [paused](crate::engine::Engine::pause) works on this model; as
    /// [`gradients`](Self::gradients); updates that are not finite, ten in a row.
    pub fn update(
        &mut self,
        micros: &[MicroBatch],
        goal: Goal,
        ref_logp: Option<&[f32]>,
        lr: f64,
    ) -> Result<(TokenStats, Update)> {
        let model = self.model.clone();
        let _weights = model.take_trainable()?;
        let stats = self.gradients(micros, goal, ref_logp)?;
        let update = self.optimizer.step(&self.stream, &self.model.params, &self.grads.flat, &self.options, lr)?;
        self.stream.synchronize()?;
        Ok((stats, update))
    }

    /// The gradients alone, from zero.
    ///
    /// # Errors
    /// [`Error::Input`] where `ref_logp` lacks what the goal needs, or is not about these entries; input that does not fit the
    /// model or the memory.
    pub fn gradients(&mut self, micros: &[MicroBatch], goal: Goal, ref_logp: Option<&[f32]>) -> Result<TokenStats> {
        let entries: usize = micros.iter().map(|m| m.entries.len()).sum();
        match ref_logp {
            None if matches!(goal, Goal::Grpo { beta, .. } if beta != 0.0) => {
                return Err(Error::input(
                    "a goal with a penalty for leaving the reference, and no log-probabilities of the reference",
                    "give those that learner::logprobs computes under the reference, or set beta to 0",
                ));
            }
            Some(r) if r.len() != entries => {
                return Err(Error::input(
                    format!("{} log-probabilities of the reference for {entries} entries", r.len()),
                    "give those of the same micro-batches",
                ));
            }
            _ => {}
        }
        let (c, device, s) = (&self.model.config, self.model.device(), &self.stream);
        let batches = micros.iter().map(|m| TrainBatch::pack(c, device, s, &m.groups)).collect::<Result<Vec<_>>>()?;
        let largest = batches.iter().map(TrainBatch::size).fold(BatchSize::default(), BatchSize::max);
        let least = |b: &TrainBatch| MemoryPlan::least(c, device.float(), self.model.trains_vision(), b.size());
        let budget = match self.options.activations_mib {
            0 => batches.iter().map(least).max().unwrap_or(0).max(self.budget),
            mib => mib << 20,
        };
        self.grads.zero(s);
        let mut stats = TokenStats::default();
        for (micro, batch) in micros.iter().zip(&batches) {
            let done = stats.logp.len();
            let reference = ref_logp.map(|r| &r[done..done + micro.entries.len()]);
            self.accumulate(micro, batch, budget, largest, goal, reference, &mut stats)?;
        }
        Ok(stats)
    }

    /// Adds the gradients of `micro`, packed as `batch`, one of several that are at most `largest`, within `budget` bytes of
    /// activations.
    fn accumulate(
        &mut self,
        micro: &MicroBatch,
        batch: &TrainBatch,
        budget: usize,
        largest: BatchSize,
        goal: Goal,
        ref_logp: Option<&[f32]>,
        stats: &mut TokenStats,
    ) -> Result<()> {
        let (model, s) = (self.model.clone(), self.stream.clone());
        let (device, c) = (model.device().clone(), &model.config);
        let room = Room::within(budget, self.room.take(), &model, batch.size(), largest)?;
        let Room { acts, dhidden, .. } = self.room.insert(room);
        let hidden = train::forward(&model, &s, batch, acts)?;

        let entries = loss_rows(&s, batch, micro);
        let field =
            |f: fn(&super::batch::Entry) -> f32| device.upload(&micro.entries.iter().map(f).collect::<Vec<_>>());
        let (weight, old_logp, advantage) = (field(|e| e.weight), field(|e| e.old_logp), field(|e| e.advantage));
        let ref_logp = ref_logp.map(|r| device.upload(r));
        let objective = match goal {
            Goal::Nll => Objective::Nll,
            Goal::Grpo { clip_low, clip_high, beta } => Objective::Grpo {
                old_logp: &old_logp,
                advantage: &advantage,
                clip_low,
                clip_high,
                kl: ref_logp.as_ref().filter(|_| beta != 0.0).map(|ref_logp| Kl { ref_logp, beta }),
            },
        };
        let results = Outputs::new(&device, entries.len());
        let dhidden = dhidden.view(0, batch.rows() * c.hidden_size);
        s.zero(&dhidden);
        loss::forward_backward(
            &s,
            &hidden,
            &model.text.head,
            &entries,
            objective,
            &weight,
            &self.forbidden,
            &self.logits,
            &results,
            &dhidden,
            Some(&self.grads.head().data),
        );
        train::backward(&model, &s, batch, acts, &dhidden, &self.grads)?;
        for (to, from) in [
            (&mut stats.logp, &results.logp),
            (&mut stats.entropy, &results.entropy),
            (&mut stats.loss, &results.loss),
            (&mut stats.ratio, &results.ratio),
            (&mut stats.kl, &results.kl),
            (&mut stats.clipped, &results.clipped),
        ] {
            to.extend(s.read::<f32>(from).wait()?);
        }
        Ok(())
    }
}

/// Log-probabilities of every entry of `micros` under `model`, in order: forward passes alone.
///
/// # Errors
/// As [`Learner::update`].
pub fn logprobs(model: &Model, micros: &[MicroBatch], forbidden: &[u32]) -> Result<Vec<f32>> {
    let (device, c) = (model.device(), &model.config);
    let s = device.stream();
    let forbidden = device.upload(&forbidden_set(c.vocab_size, forbidden));
    let logits = logit_bytes(device.float(), c.vocab_size);
    let logits = loss::Workspace::new(device, c.vocab_size, c.hidden_size, usize::MAX, logits);
    let batches = micros.iter().map(|m| TrainBatch::pack(c, device, &s, &m.groups)).collect::<Result<Vec<_>>>()?;
    let largest = batches.iter().map(TrainBatch::size).fold(BatchSize::default(), BatchSize::max);
    let mut acts = Activations::forward_with_room(model, largest);
    let mut all = Vec::new();
    for (micro, batch) in micros.iter().zip(&batches) {
        let hidden = train::forward(model, &s, batch, &mut acts)?;
        let entries = loss_rows(&s, batch, micro);
        let logp = device.alloc(DType::F32, entries.len());
        loss::logprobs(&s, &hidden, &model.text.head, &entries, &forbidden, &logits, &logp, None);
        all.extend(s.read::<f32>(&logp).wait()?);
    }
    Ok(all)
}

fn loss_rows(s: &Stream, batch: &TrainBatch, micro: &MicroBatch) -> LossRows {
    let e = &micro.entries;
    let rows: Vec<u32> = e.iter().map(|e| batch.completion_row(e.group, e.completion, e.index) as u32).collect();
    let targets: Vec<u32> = e.iter().map(|e| e.target).collect();
    let temperature: Vec<f32> = e.iter().map(|e| e.temperature).collect();
    LossRows::new(s, &rows, &targets, &temperature)
}

#[cfg(test)]
mod tests {
    use super::super::batch::Entry;
    use super::*;
    use crate::device::Device;
    use crate::engine::{Engine, EngineOptions, Request, Sampling};
    use crate::input::{Image, Prompt};
    use crate::model::train::Group;
    use crate::model::{LoadOptions, Preset};

    fn model() -> Arc<Model> {
        let (config, device) = (Preset::Tiny.config(), Device::cpu(1));
        Arc::new(Model::random(config, 3, &device, &LoadOptions::default()).unwrap())
    }

    /// `tokens` of text after an image of `image` x `image` tokens, if that is not 0.
    fn batch(model: &Model, tokens: usize, image: usize) -> MicroBatch {
        let mut prompt = Prompt::from_tokens(vec![7]);
        if image > 0 {
            let side = 28 * image;
            let image = Image::from_resized(vec![90; 3 * side * side], side, side, 14, (side, side)).unwrap();
            prompt.push_image(Arc::new(image), model.config.tokens.image);
        }
        let mut batch = MicroBatch::default();
        let text = Prompt::from_tokens((0..tokens as u32).map(|i| i % 500).collect());
        batch.groups.push(Group { prompt, completions: vec![text] });
        let weight = 1.0 / tokens as f32;
        batch.entries.extend((0..tokens).map(|index| Entry {
            group: 0,
            completion: 0,
            index,
            target: index as u32 % 500,
            temperature: 1.0,
            old_logp: 0.0,
            advantage: 0.0,
            weight,
        }));
        batch
    }

    #[test]
    fn batches_of_different_shapes_stay_within_the_budget_together() {
        let model = model();
        let (long, shown) = (batch(&model, 300, 0), batch(&model, 8, 7));
        let size = |m: &MicroBatch| {
            let (d, c) = (model.device(), &model.config);
            TrainBatch::pack(c, d, &d.stream(), &m.groups).unwrap().size()
        };
        let plan = MemoryPlan::keep_all(&model.config);
        let needed = |size: BatchSize| plan.bytes(&model.config, DType::F32, model.trains_vision(), size);
        // All of either is kept in a budget that does not hold room for both.
        let most = needed(size(&long)).max(needed(size(&shown)));
        let mib = most.div_ceil(1 << 20);
        assert!(needed(size(&long).max(size(&shown))) > mib << 20, "{most} bytes");
        for step in [vec![long.clone(), shown.clone()], vec![shown, long]] {
            let options = Optim { activations_mib: mib, ..Optim::default() };
            let mut learner = Learner::new(model.clone(), &options, &[]).unwrap();
            let before = model.device().allocated_bytes();
            for micros in [&step[..], &step[..1], &step[1..], &step[..]] {
                learner.gradients(micros, Goal::Nll, None).unwrap();
                let held = model.device().allocated_bytes() - before;
                // Buffers are rounded up to 64 bytes.
                assert!(held <= (mib << 20) + 64 * 200, "{held} bytes");
            }
            let alone = |m: &MicroBatch| {
                let mut learner = Learner::new(model.clone(), &Optim::default(), &[]).unwrap();
                learner.gradients(std::slice::from_ref(m), Goal::Nll, None).unwrap().logp
            };
            let together = learner.gradients(&step, Goal::Nll, None).unwrap().logp;
            assert_eq!(together, [alone(&step[0]), alone(&step[1])].concat(), "the plan shows in no bit");
        }
    }

    #[test]
    fn a_penalty_without_its_reference_is_refused() {
        let model = model();
        let micros = [batch(&model, 5, 0), batch(&model, 3, 0)];
        let mut learner = Learner::new(model, &Optim::default(), &[]).unwrap();
        let mut told = |beta, reference: Option<&[f32]>| {
            let goal = Goal::Grpo { clip_low: 0.2, clip_high: 0.2, beta };
            learner.update(&micros, goal, reference, 1e-3).map_err(|e| e.to_string()).map(drop)
        };
        assert!(told(0.1, None).unwrap_err().contains("no log-probabilities of the reference"));
        assert!(told(0.1, Some(&[0.0; 7])).unwrap_err().contains("7 log-probabilities of the reference for 8"));
        assert_eq!((told(0.1, Some(&[0.0; 8])), told(0.0, None)), (Ok(()), Ok(())));
    }

    #[test]
    fn weights_do_not_move_under_an_engine_at_work() {
        let model = model();
        let options =
            EngineOptions { kv_bytes: 1 << 20, vision_bytes: 1 << 16, step_patches: 64, ..Default::default() };
        let engine = Engine::start(model.clone(), options).unwrap();
        let mut learner = Learner::new(model.clone(), &Optim::default(), engine.forbidden()).unwrap();
        let micros = [batch(&model, 5, 0)];
        let mut update = || learner.update(&micros, Goal::Nll, None, 1e-3).map(|(_, update)| update.applied);
        let e = update().unwrap_err().to_string();
        assert!(e.contains("Engine::pause"), "{e}");
        let paused = engine.pause().unwrap();
        assert!(update().unwrap());
        drop(paused);
        assert!(update().is_err(), "from the moment when the guard is gone");
        drop(engine.pause().unwrap());
        let request = Request { prompt: Prompt::from_tokens(vec![1]), sampling: Sampling::default(), n: 1 };
        let one = engine.generate(request).unwrap().remove(0).wait().unwrap();
        assert_eq!(one.epochs.0, 1, "an update is known as it is; a pause without one changes nothing");
        drop(engine);
        assert!(update().unwrap());
    }
}
