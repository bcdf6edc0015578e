//! What makes a run fit where it does not.

use super::{Plan, Target, size};
use crate::device::DType;
use crate::engine::EngineOptions;
use crate::model::Config;
use crate::train::RunConfig;
use crate::train::room::Work;

/// Ways to fit that an error names.
const WAYS: usize = 4;

/// Keys, and what a run needs with them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Way {
    /// As `--set` takes them.
    pub keys: Vec<String>,
    /// Bytes in all.
    pub bytes: usize,
}

/// What makes a run fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ways {
    /// Of which each is enough, and none has a part that is; the fewest keys first.
    pub enough: Vec<Way>,
    /// Everything that makes it smaller, together.
    pub all: Way,
}

impl Ways {
    /// In words, for a person.
    pub fn told(&self) -> String {
        let way = |w: &Way| format!("{} ({})", w.keys.join(" with "), size(w.bytes as u64));
        match (self.enough.as_slice(), self.all.keys.is_empty()) {
            ([], true) => "use a smaller model or a larger machine".into(),
            ([], false) => format!("not even {} is enough: use a smaller model or a larger machine", way(&self.all)),
            (some, _) => format!("set {}", some.iter().map(way).collect::<Vec<_>>().join(", or ")),
        }
    }
}

/// A key or two that make a run smaller, and what they set.
type Lever = (String, Box<dyn Fn(&mut RunConfig)>);

/// What makes a run smaller, what changes it least first.
fn levers(config: &RunConfig, target: Target, work: Work) -> Vec<Lever> {
    let (trains, r, o) = (work != Work::Rollouts, &config.rollout, &config.optim);
    let rolls_out = !matches!(work, Work::Conversations { .. });
    let mut all: Vec<Lever> = Vec::new();
    let mut add = |when: bool, keys: String, set: Box<dyn Fn(&mut RunConfig)>| {
        if when {
            all.push((keys, set));
        }
    };
    add(trains && o.activations_mib > 0, "optim.activations_mib=0".into(), Box::new(|c| c.optim.activations_mib = 0));
    add(rolls_out && r.kv_cache_mib > 0, "rollout.kv_cache_mib=0".into(), Box::new(|c| c.rollout.kv_cache_mib = 0));
    let fewer = (r.concurrency / 4).max(1);
    add(
        rolls_out && fewer < r.concurrency,
        format!("rollout.concurrency={fewer}"),
        Box::new(move |c| c.rollout.concurrency = fewer),
    );
    let step = EngineOptions::default().step_tokens;
    add(
        rolls_out && step < r.batch_tokens,
        format!("rollout.batch_tokens={step}"),
        Box::new(move |c| c.rollout.batch_tokens = step),
    );
    let freeze = Box::new(|c: &mut RunConfig| c.model.freeze_vision = true);
    add(trains && !config.model.freeze_vision, "model.freeze_vision=true".into(), freeze);
    add(
        trains && o.masters && target.float == DType::BF16,
        "optim.masters=false".into(),
        Box::new(|c| c.optim.masters = false),
    );
    let context = (r.context / 4).max(r.max_new_tokens + 1).max(1024);
    let rows = if rolls_out { o.micro_batch_tokens.min(context) } else { (o.micro_batch_tokens / 4).max(1024) };
    let batches = trains && rows < o.micro_batch_tokens;
    let mut keys = Vec::new();
    if rolls_out && context < r.context {
        keys.push(format!("rollout.context={context}"));
    }
    if batches {
        keys.push(format!("optim.micro_batch_tokens={rows}"));
    }
    let (shorter, smaller) = (context.min(r.context), rows.min(o.micro_batch_tokens));
    let set = move |c: &mut RunConfig| (c.rollout.context, c.optim.micro_batch_tokens) = (shorter, smaller);
    add(!keys.is_empty(), keys.join(" with "), Box::new(set));
    let beta = config.algo.beta != 0.0 && work == Work::Episodes;
    add(beta, "algo.beta=0".into(), Box::new(|c| c.algo.beta = 0.0));
    all
}

/// What makes a run of `config` on `model` fit `target`.
pub fn ways(model: &Config, config: &RunConfig, target: Target, work: Work) -> Ways {
    let levers = levers(config, target, work);
    let way = |chosen: usize| {
        let (mut config, mut keys) = (config.clone(), Vec::new());
        for (i, (key, set)) in levers.iter().enumerate() {
            if chosen >> i & 1 == 1 {
                set(&mut config);
                keys.push(key.clone());
            }
        }
        let plan = Plan::compute(model, &config, target, work);
        (Way { keys, bytes: plan.total() }, plan.fits())
    };
    let mut choices: Vec<usize> = (1..1 << levers.len()).collect();
    choices.sort_by_key(|c| c.count_ones());
    let mut found: Vec<usize> = Vec::new();
    let mut enough = Vec::new();
    for choice in choices {
        if found.len() == WAYS || found.iter().any(|f| f & choice == *f) {
            continue;
        }
        if let (way, true) = way(choice) {
            found.push(choice);
            enough.push(way);
        }
    }
    Ways { enough, all: way((1 << levers.len()) - 1).0 }
}
