//! What a run holds in memory, part by part, before any of it is there: what is kept, what is computed again, how many pages of
//! keys and values are left, and, where it does not fit, what would.
//!
//! Each part's size is computed beside the code that allocates it; here they are put together for a model, a run file and a
//! device. The elements that go from op to op are f32 on the host's cores and bf16 on a GPU.

#[cfg(test)]
mod tests;
mod ways;

pub use ways::{Way, Ways, ways};

use super::config::RunConfig;
use super::optimizer::Optimizer;
use super::room::{self, Work};
use crate::device::{DType, Device};
use crate::engine::EngineOptions;
use crate::model::train::{BatchSize, MemoryPlan};
use crate::model::{Config, ParamStore};
use crate::ops::kv_cache::BLOCK;
use crate::ops::loss;
use crate::ops::patch_embed::PATCH;
use crate::{Error, Result};
use std::fmt::Write;

/// Bytes of logits that exist at once on the host's cores: 441 rows of Qwen2.5-VL's vocabulary.
const HOST_LOGITS: usize = 256 << 20;
/// Rows of logits that exist at once on a GPU: as many as fill it.
const GPU_LOGIT_ROWS: usize = 1024;
/// What the host keeps of activations at most, unless more is asked for; other programs live there too.
const HOST_ACTIVATIONS: usize = 2 << 30;
/// Keys and values on the host's cores, unless another size is asked for or an episode needs more.
const HOST_KV: usize = 1 << 30;
/// What stays free on a GPU: for the workspaces of kernels and of cuBLASLt, for the inputs of batches, and for gaps.
const HEADROOM: usize = 512 << 20;
/// What such cards have free when a program begins.
pub const CARDS: [(&str, u64); 2] = [("80 GB", 78 << 30), ("141 GB", 139 << 30)];

/// Bytes of logits that exist at once, for weights of type `float`. Not a matter of what is free: on a GPU, the order in which
/// gradients are added follows from it.
pub fn logit_bytes(float: DType, vocabulary: usize) -> usize {
    match float {
        DType::F32 => HOST_LOGITS,
        _ => GPU_LOGIT_ROWS * vocabulary * DType::F32.size(),
    }
}

/// Where a plan is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The type of weights and activations: f32 on the host's cores, bf16 on a GPU.
    pub float: DType,
    /// Bytes that are free; `None` where nobody knows.
    pub free: Option<u64>,
}

impl Target {
    /// `device` as it is now.
    pub fn of(device: &Device) -> Target {
        Target { float: device.float(), free: device.free_bytes() }
    }

    /// A card with so many bytes free.
    pub fn card(free: u64) -> Target {
        Target { float: DType::BF16, free: Some(free) }
    }
}

/// What memory is held for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the names say it
pub enum Part {
    Weights,
    Masters,
    Gradients,
    Moments,
    /// The weights of the model that `algo.beta` ties the policy to.
    Reference,
    /// That model's forward pass.
    ReferencePass,
    Activations,
    Logits,
    /// Buffers of the engine's steps.
    Engine,
    VisionCache,
    KvPages,
    Headroom,
}

impl Part {
    /// All of them, in the order in which they are listed.
    pub const ALL: [Part; 12] = [
        Part::Weights,
        Part::Masters,
        Part::Gradients,
        Part::Moments,
        Part::Reference,
        Part::ReferencePass,
        Part::Activations,
        Part::Logits,
        Part::Engine,
        Part::VisionCache,
        Part::KvPages,
        Part::Headroom,
    ];

    /// What a table calls it.
    pub fn name(self) -> &'static str {
        match self {
            Part::Weights => "weights",
            Part::Masters => "masters",
            Part::Gradients => "gradients",
            Part::Moments => "moments",
            Part::Reference => "reference",
            Part::ReferencePass => "reference pass",
            Part::Activations => "activations",
            Part::Logits => "logits",
            Part::Engine => "engine's steps",
            Part::VisionCache => "vision cache",
            Part::KvPages => "KV pages",
            Part::Headroom => "left free",
        }
    }
}

/// A run's memory, planned.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Where it is for.
    pub target: Target,
    /// Bytes of each of [`Part::ALL`].
    bytes: [usize; Part::ALL.len()],
    /// Layers that keep their activations, and how many there are that could.
    pub kept: [MemoryPlan; 2],
    /// The batch that activations are planned for.
    pub batch: BatchSize,
    /// Bytes that activations may take, for [`Learner::give`](super::learner::Learner::give).
    pub activations: usize,
    /// Rows of logits that exist at once.
    pub logit_rows: usize,
    /// Tokens that the pages hold.
    pub kv_tokens: usize,
    /// Parameters, and those of them that training moves; padding left out.
    pub parameters: [usize; 2],
}

impl Plan {
    /// Plans the memory of a run of `config` on `model`. What the run file leaves open (`optim.activations_mib` and
    /// `rollout.kv_cache_mib` of 0) is chosen: activations of as many layers, and pages for as many of the episodes that run at
    /// once, as there is room for; on the host's cores not more than 2 GiB and 1 GiB, or what is needed at least.
    ///
    /// # Errors
    /// [`Error::Limit`] where it does not fit, with the keys that make it fit and what is needed then, here and on cards of 80 and
    /// 141 GB; and where `optim.activations_mib` is less than the largest batch needs.
    pub fn new(model: &Config, config: &RunConfig, target: Target, work: Work) -> Result<Plan> {
        room::check(config, model, target.float, work)?;
        let plan = Plan::compute(model, config, target, work);
        if plan.fits() { Ok(plan) } else { Err(plan.refusal(model, config, work)) }
    }

    /// The plan, whether it fits or not; where it does not, with the least of all that the run file leaves open.
    pub fn compute(model: &Config, config: &RunConfig, target: Target, work: Work) -> Plan {
        let Target { float, free } = target;
        let (trains, rolls_out) = (work != Work::Rollouts, !matches!(work, Work::Conversations { .. }));
        let freeze = config.model.freeze_vision;
        let [moved, all] = ParamStore::lengths(model, float == DType::F32, freeze);
        let mut bytes = [0; Part::ALL.len()];
        let mut set = |part: Part, n: usize| bytes[part as usize] = n;
        set(Part::Weights, all * float.size());
        set(Part::Headroom, if float == DType::F32 { 0 } else { HEADROOM });

        let sizes = if trains { room::largest(config, model, work) } else { Vec::new() };
        let batch = sizes.iter().copied().fold(BatchSize::default(), BatchSize::max);
        let budget = logit_bytes(float, model.vocab_size);
        let logit_rows = loss::Workspace::rows_within(model.vocab_size, budget);
        if trains {
            let [masters, gradients, moments] = Optimizer::bytes_for(float, moved, config.optim.masters);
            set(Part::Masters, masters);
            set(Part::Gradients, gradients);
            set(Part::Moments, moments);
            let logits = loss::Workspace::bytes_for(float, model.vocab_size, model.hidden_size, budget);
            set(Part::Logits, logits);
            if config.algo.beta != 0.0 && work == Work::Episodes {
                set(Part::Reference, all * float.size());
                set(Part::ReferencePass, MemoryPlan::forward_bytes(model, float, batch) + logits);
            }
        }
        let mut kv = Range::default();
        if rolls_out {
            let r = &config.rollout;
            let options = engine_options(config, model);
            set(Part::VisionCache, options.vision_bytes);
            set(Part::Engine, options.step_bytes(model, float));
            let context = r.context.min(model.max_position_embeddings);
            let one = EngineOptions::kv_bytes_for(model, float, context);
            let episodes = match work {
                Work::Episodes => r.concurrency.min(r.prompts.saturating_mul(r.group_size)),
                _ => r.concurrency,
            };
            kv = match (r.kv_cache_mib, float) {
                (0, DType::F32) => Range { least: one, wish: one.max(HOST_KV) },
                (0, _) => Range { least: one, wish: one.saturating_mul(episodes.max(1)) },
                (mib, _) => Range { least: mib << 20, wish: mib << 20 },
            };
        }

        let everything = MemoryPlan::keep_all(model);
        let everything = MemoryPlan { vision: if freeze { 0 } else { everything.vision }, ..everything };
        let mut activations = Range::default();
        if trains {
            let least = |size: &BatchSize| MemoryPlan::least(model, float, !freeze, *size);
            let least = sizes.iter().map(least).max().unwrap_or(0);
            let all = everything.bytes(model, float, !freeze, batch).max(least);
            activations = match (config.optim.activations_mib, float) {
                (0, DType::F32) => Range { least, wish: all.min(HOST_ACTIVATIONS).max(least) },
                (0, _) => Range { least, wish: all },
                (mib, _) => Range { least: mib << 20, wish: mib << 20 },
            };
        }
        // What lies between the least and the wishes: half of it for pages first, then activations, then pages again.
        let fixed = bytes.iter().fold(0usize, |sum, n| sum.saturating_add(*n));
        let free = free.map_or(usize::MAX, |f| usize::try_from(f).unwrap_or(usize::MAX));
        let spare = free.saturating_sub(fixed).saturating_sub(kv.least).saturating_sub(activations.least);
        let pages = kv.more().min(spare / 2);
        let kept = activations.more().min(spare - pages);
        let pages = kv.more().min(spare - kept);
        let (kv, given) = (kv.least + pages, activations.least + kept);

        let fit = |size: BatchSize| MemoryPlan::fit(model, float, !freeze, size, given).ok();
        let (kept, held) = match fit(batch) {
            Some(plan) => (plan, plan.bytes(model, float, !freeze, batch)),
            // Room for all shapes of batches at once is more than for any of them.
            None => {
                let each = sizes.iter().filter_map(|&size| Some((fit(size)?, size)));
                let each = each.map(|(plan, size)| (plan, plan.bytes(model, float, !freeze, size)));
                each.max_by_key(|(_, bytes)| *bytes).unwrap_or((MemoryPlan { text: 0, vision: 0 }, given))
            }
        };
        bytes[Part::Activations as usize] = if trains { held } else { 0 };
        bytes[Part::KvPages as usize] = kv;
        let page = EngineOptions::kv_bytes_for(model, float, 1);
        Plan {
            target,
            bytes,
            kept: [kept, everything],
            batch,
            activations: given,
            logit_rows,
            kv_tokens: kv / page * BLOCK,
            parameters: ParamStore::counts(model, freeze),
        }
    }

    /// Bytes of a part.
    pub fn bytes(&self, part: Part) -> usize {
        self.bytes[part as usize]
    }

    /// Bytes of all parts.
    pub fn total(&self) -> usize {
        self.bytes.iter().fold(0, |sum, n| sum.saturating_add(*n))
    }

    /// Whether what is free holds it, as far as that is known.
    pub fn fits(&self) -> bool {
        self.target.free.is_none_or(|free| self.total() as u64 <= free)
    }

    /// What stands beside a part's figure.
    fn note(&self, part: Part) -> String {
        let float = if self.target.float == DType::F32 { "f32" } else { "bf16" };
        let millions = |n: usize| format!("{:.1} M", n as f64 / 1e6);
        match part {
            Part::Weights => format!("{float}, {} parameters", millions(self.parameters[0])),
            Part::Masters => "f32, of what training moves".into(),
            Part::Gradients => format!("f32, {} parameters move", millions(self.parameters[1])),
            Part::Moments => "f32, two".into(),
            Part::Reference => format!("{float}, because algo.beta is not 0"),
            Part::ReferencePass => "activations and logits".into(),
            Part::Activations => {
                let [kept, all] = self.kept;
                let vision = if all.vision == 0 {
                    "a frozen vision tower keeps none".into()
                } else {
                    format!("{} of {} vision blocks", kept.vision, all.vision)
                };
                format!(
                    "{} of {} decoder layers kept, {vision}; batches of {} tokens, {} patches",
                    kept.text, all.text, self.batch.rows, self.batch.patches
                )
            }
            Part::Logits => format!("f32, {} rows at a time", self.logit_rows),
            Part::Engine => "activations and logits of one step".into(),
            Part::VisionCache => "encoded images".into(),
            Part::KvPages => format!("{} tokens", self.kv_tokens),
            Part::Headroom => "for the kernels' workspaces".into(),
        }
    }

    /// A line for each part that is not empty, and the sum beside what is free.
    pub fn table(&self) -> String {
        let mut out = String::new();
        for part in Part::ALL.into_iter().filter(|p| self.bytes(*p) > 0) {
            let _ = writeln!(out, "{:<17} {:>12}  {}", part.name(), size(self.bytes(part) as u64), self.note(part));
        }
        let free =
            self.target.free.map_or("it is not known how much is free".into(), |f| format!("of {} free", size(f)));
        let _ = writeln!(out, "{:<17} {:>12}  {free}", "in all", size(self.total() as u64));
        out
    }

    /// The error of a plan that does not fit.
    fn refusal(&self, model: &Config, config: &RunConfig, work: Work) -> Error {
        let parts: Vec<String> = Part::ALL
            .into_iter()
            .filter(|p| self.bytes(*p) > 0)
            .map(|p| format!("{} {}", p.name(), size(self.bytes(p) as u64)))
            .collect();
        let what = format!(
            "this run needs {} of memory, and {} are free: {}",
            size(self.total() as u64),
            size(self.target.free.unwrap_or(0)),
            parts.join(", ")
        );
        let mut mend = ways(model, config, self.target, work).told();
        for (name, free) in CARDS {
            let _ = write!(mend, "\n  on a card of {name}: {}", on_card(model, config, free, work));
        }
        Error::limit(what, mend)
    }
}

/// Whether and how a run fits a card with `free` bytes free, in words.
pub fn on_card(model: &Config, config: &RunConfig, free: u64, work: Work) -> String {
    let target = Target::card(free);
    let plan = Plan::compute(model, config, target, work);
    match plan.fits() {
        true => format!("it fits as it is ({})", size(plan.total() as u64)),
        false => ways(model, config, target, work).told(),
    }
}

/// The least and the most of something.
#[derive(Clone, Copy, Default)]
struct Range {
    least: usize,
    wish: usize,
}

impl Range {
    fn more(self) -> usize {
        self.wish.saturating_sub(self.least)
    }
}

/// The engine of a run file, but for the bytes of its pages.
pub fn engine_options(config: &RunConfig, model: &Config) -> EngineOptions {
    let (r, defaults) = (&config.rollout, EngineOptions::default());
    EngineOptions {
        kv_bytes: EngineOptions::kv_bytes_for(model, DType::F32, r.context.min(model.max_position_embeddings)),
        vision_bytes: r.vision_cache_mib << 20,
        max_context: r.context,
        max_sequences: r.concurrency,
        step_tokens: r.batch_tokens,
        // The largest image that preprocessing makes must fit one step.
        step_patches: (config.model.max_pixels / (PATCH * PATCH)).max(defaults.step_patches),
        forbidden: None,
        tokenizer: None,
    }
}

/// Bytes for a person.
pub fn size(bytes: u64) -> String {
    match bytes {
        b if b >= 1 << 30 => format!("{:.1} GiB", b as f64 / f64::from(1 << 30)),
        b if b >= 1 << 20 => format!("{:.1} MiB", b as f64 / f64::from(1 << 20)),
        b => format!("{:.1} KiB", b as f64 / 1024.0),
    }
}
