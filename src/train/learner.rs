//! One model that learns: forward, loss, backward over micro-batches, then an update.

use super::Optimizer;
use super::batch::MicroBatch;
use super::config::Optim;
use super::optimizer::Update;
use crate::Result;
use crate::device::{Buffer, DType, Device, Stream};
use crate::model::Model;
use crate::model::train::{self, Activations, GradStore, MemoryPlan, TrainBatch};
use crate::ops::loss::{self, Kl, LossRows, Objective, Outputs};
use crate::ops::softmax::forbidden_set;
use std::sync::Arc;

/// Bytes of logits that exist at once: about 1,700 rows of Qwen2.5-VL's vocabulary would be one GiB.
const LOGIT_BYTES: usize = 256 << 20;

/// What is minimised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// Negative log-likelihood of the trained tokens.
    Nll,
    /// The clipped policy gradient, with a penalty for leaving the reference where `beta` is not 0.
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
    acts: Option<(MemoryPlan, Activations)>,
    logits: loss::Workspace,
    forbidden: Buffer,
    dhidden: Option<Buffer>,
}

impl Learner {
    /// A learner that moves `model`'s weights in place. `forbidden`: ids that rollouts can't sample, which the softmax
    /// leaves out ([`Engine::forbidden`](crate::engine::Engine::forbidden)); empty for the plain softmax.
    pub fn new(model: Arc<Model>, options: &Optim, forbidden: &[u32]) -> Learner {
        let device = model.device().clone();
        let c = &model.config;
        Learner {
            stream: device.stream(),
            grads: GradStore::new(&model),
            optimizer: Optimizer::new(&model.params, &device),
            options: options.clone(),
            acts: None,
            logits: loss::Workspace::new(&device, c.vocab_size, c.hidden_size, usize::MAX, LOGIT_BYTES),
            forbidden: device.upload(&forbidden_set(c.vocab_size, forbidden)),
            dhidden: None,
            model,
        }
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
    /// Input that does not fit the model or the memory; updates that are not finite, ten in a row.
    pub fn update(
        &mut self,
        micros: &[MicroBatch],
        goal: Goal,
        ref_logp: Option<&[f32]>,
        lr: f64,
    ) -> Result<(TokenStats, Update)> {
        let stats = self.gradients(micros, goal, ref_logp)?;
        let update = self.optimizer.step(&self.stream, &self.model.params, &self.grads.flat, &self.options, lr)?;
        self.stream.synchronize()?;
        Ok((stats, update))
    }

    /// The gradients alone, from zero.
    pub fn gradients(&mut self, micros: &[MicroBatch], goal: Goal, ref_logp: Option<&[f32]>) -> Result<TokenStats> {
        self.grads.zero(&self.stream);
        let mut stats = TokenStats::default();
        for micro in micros {
            let done = stats.logp.len();
            let reference = ref_logp.map(|r| &r[done..done + micro.entries.len()]);
            self.accumulate(micro, goal, reference, &mut stats)?;
        }
        Ok(stats)
    }

    fn accumulate(
        &mut self,
        micro: &MicroBatch,
        goal: Goal,
        ref_logp: Option<&[f32]>,
        stats: &mut TokenStats,
    ) -> Result<()> {
        let (model, s) = (self.model.clone(), self.stream.clone());
        let (device, c) = (model.device().clone(), &model.config);
        let batch = TrainBatch::pack(c, &device, &s, &micro.groups)?;
        let plan = MemoryPlan::fit(c, batch.rows(), batch.patches(), self.options.activations_mib << 20)?;
        if self.acts.as_ref().is_none_or(|(p, _)| *p != plan) {
            self.acts = None; // frees the old ones first
        }
        let (_, acts) = self.acts.get_or_insert_with(|| (plan, Activations::new(&model, plan, &batch)));
        let hidden = train::forward(&model, &s, &batch, acts)?;

        let entries = loss_rows(&device, &batch, micro);
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
        let needed = batch.rows() * c.hidden_size;
        let room = self.dhidden.take().filter(|b| b.len() >= needed);
        let dhidden = self.dhidden.insert(room.unwrap_or_else(|| device.alloc(DType::F32, needed))).view(0, needed);
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
        train::backward(&model, &s, &batch, acts, &dhidden, &self.grads)?;
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
    let logits = loss::Workspace::new(device, c.vocab_size, c.hidden_size, usize::MAX, LOGIT_BYTES);
    let mut acts: Option<Activations> = None;
    let mut all = Vec::new();
    for micro in micros {
        let batch = TrainBatch::pack(c, device, &s, &micro.groups)?;
        let acts = acts.get_or_insert_with(|| Activations::forward_only(model, &batch));
        let hidden = train::forward(model, &s, &batch, acts)?;
        let entries = loss_rows(device, &batch, micro);
        let logp = device.alloc(DType::F32, entries.len());
        loss::logprobs(&s, &hidden, &model.text.head, &entries, &forbidden, &logits, &logp, None);
        all.extend(s.read::<f32>(&logp).wait()?);
    }
    Ok(all)
}

fn loss_rows(device: &Device, batch: &TrainBatch, micro: &MicroBatch) -> LossRows {
    let e = &micro.entries;
    let rows: Vec<u32> = e.iter().map(|e| batch.completion_row(e.group, e.completion, e.index) as u32).collect();
    let targets: Vec<u32> = e.iter().map(|e| e.target).collect();
    let temperature: Vec<f32> = e.iter().map(|e| e.temperature).collect();
    LossRows::new(device, &rows, &targets, &temperature)
}
