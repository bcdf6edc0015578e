//! How much arithmetic a step is, before it is done: floating-point operations, a multiplication and an addition counted as two.
//!
//! Products and attention are counted, all the rest is less than a hundredth of them. Lengths are means: a question's prompt, a
//! completion's tokens.

use super::memory::Plan;
use crate::model::{Config, LayerShape};
use crate::ops::patch_embed::{INPUTS, MERGE, PATCH};

/// Patches that become one token.
const GROUP: f64 = (MERGE * MERGE) as f64;

/// What one update learns from: groups of episodes that share a prompt, each of which shows one image, or conversations.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Batch {
    /// Prompts.
    pub groups: f64,
    /// Completions of each.
    pub samples: f64,
    /// Tokens of a prompt, its images included.
    pub prompt: f64,
    /// Of them, those of images.
    pub prompt_image: f64,
    /// Tokens of a completion, what it is shown and told included.
    pub completion: f64,
    /// Of them, those of images.
    pub completion_image: f64,
    /// Of them, those that the model says.
    pub said: f64,
}

/// Operations of a step, by what they are for.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Flops {
    /// Rollouts: prompts and what episodes are shown and told, many rows at a time.
    pub prefill: f64,
    /// Rollouts: what the model says, a row for each episode in flight at a time.
    pub decode: f64,
    /// The reference's forward pass.
    pub reference: f64,
    /// The forward pass of the updates.
    pub forward: f64,
    /// Their backward pass.
    pub backward: f64,
    /// What is computed a second time because it was not kept.
    pub again: f64,
}

impl Flops {
    /// Of the updates alone, the reference's forward pass included.
    pub fn update(&self) -> f64 {
        self.reference + self.forward + self.backward + self.again
    }
}

/// Products of one row in a layer.
fn products(s: &LayerShape) -> f64 {
    2.0 * (s.hidden * s.qkv_width() + s.q_width() * s.hidden + 3 * s.hidden * s.intermediate) as f64
}

/// Attention of one row to `keys` others in a layer: scores, and the sum of values.
fn attention(s: &LayerShape, keys: f64) -> f64 {
    4.0 * s.q_width() as f64 * keys
}

/// Keys that `rows` tokens after `past` others attend to, all together.
fn keys(past: f64, rows: f64) -> f64 {
    rows * past + rows * (rows + 1.0) / 2.0
}

/// Of `rows` tokens after `past` others: products of all decoder layers, and attention.
fn text(c: &Config, past: f64, rows: f64) -> [f64; 2] {
    let (s, layers) = (c.layer_shape(), c.layers as f64);
    [layers * rows * products(&s), layers * attention(&s, keys(past, rows))]
}

/// Products and attention of the vision tower for an image of `tokens` tokens.
fn vision(c: &Config, tokens: f64) -> [f64; 2] {
    let (v, s, patches) = (&c.vision, c.vision.layer_shape(), tokens * GROUP);
    let whole = v.full_attention_blocks.len().min(v.depth) as f64;
    let side = (v.window_size / PATCH) as f64;
    let windows = (v.depth as f64 - whole) * (side * side).min(patches);
    let merged = GROUP * v.hidden_size as f64;
    let blocks = patches * (2.0 * (INPUTS * v.hidden_size) as f64 + v.depth as f64 * products(&s));
    let merger = tokens * 2.0 * merged * (merged + v.out_hidden_size as f64);
    [blocks + merger, patches * attention(&s, windows + whole * patches)]
}

/// The head of `rows` rows.
fn head(c: &Config, rows: f64) -> f64 {
    2.0 * rows * (c.hidden_size * c.vocab_size) as f64
}

/// Operations of a step whose updates learn from `batch`, `iterations` times, in micro-batches of `micro_batch_tokens`, with the
/// layers kept that `plan` keeps. `rolls_out`: the batch is sampled first. `reference`: another model reads it once.
pub fn step(
    c: &Config,
    plan: &Plan,
    batch: &Batch,
    iterations: usize,
    micro_batch_tokens: usize,
    rolls_out: bool,
    reference: bool,
) -> Flops {
    let b = batch;
    let episodes = b.groups * b.samples;
    let sum = |parts: [f64; 2]| parts[0] + parts[1];
    let mut f = Flops::default();
    if rolls_out {
        // A token that is said attends to all before it; on the average said and heard ones do alike.
        let share = if b.completion > 0.0 { b.said / b.completion } else { 0.0 };
        let all = sum(text(c, b.prompt, b.completion));
        f.decode = episodes * (all * share + head(c, b.said));
        let shown = sum(vision(c, b.prompt_image)) + sum(text(c, 0.0, b.prompt));
        f.prefill = b.groups * shown + episodes * (all * (1.0 - share) + sum(vision(c, b.completion_image)));
    }
    // A group that is spread over several micro-batches has its prompt in each.
    let together = ((micro_batch_tokens as f64 - b.prompt) / b.completion.max(1.0)).floor().max(1.0);
    let prompts = b.groups * (b.samples / together).ceil().max(1.0);
    let add = |a: [f64; 2], b: [f64; 2]| [a[0] + b[0], a[1] + b[1]];
    let times = |n: f64, a: [f64; 2]| [n * a[0], n * a[1]];
    let rows = add(times(prompts, text(c, 0.0, b.prompt)), times(episodes, text(c, b.prompt, b.completion)));
    let seen = add(times(prompts, vision(c, b.prompt_image)), times(episodes, vision(c, b.completion_image)));
    let scored = head(c, episodes * b.said);
    let forward = sum(rows) + sum(seen) + scored;
    // Two products for one: the gradients of the input and of the weight; five for two in attention.
    let back = |[products, attention]: [f64; 2]| 2.0 * products + 2.5 * attention;
    let [kept, all] = plan.kept;
    let mut backward = back(rows) + 2.0 * scored;
    // The last layer is never computed again, and of the others not the projection whose result is known.
    let lost = |layers: usize, kept: usize| layers.saturating_sub(1).saturating_sub(kept) as f64 / layers.max(1) as f64;
    let again = |shape: &LayerShape, [matrices, attention]: [f64; 2]| {
        let known = 2.0 * (shape.hidden * shape.intermediate) as f64 / products(shape);
        matrices * (1.0 - known) + attention
    };
    let mut repeated = lost(c.layers, kept.text) * again(&c.layer_shape(), rows);
    if all.vision > 0 {
        backward += back(seen);
        repeated += lost(c.vision.depth, kept.vision) * again(&c.vision.layer_shape(), seen);
    }
    let n = iterations as f64;
    (f.forward, f.backward, f.again) = (n * forward, n * backward, n * repeated);
    f.reference = if reference { forward } else { 0.0 };
    f
}

#[cfg(test)]
mod tests {
    use super::super::memory::Target;
    use super::super::room::Work;
    use super::*;
    use crate::device::Device;
    use crate::model::{ParamStore, Preset};
    use crate::train::RunConfig;

    fn plan(c: &Config, keys: &[&str]) -> Plan {
        let keys: Vec<String> = keys.iter().map(|k| k.to_string()).collect();
        let config = RunConfig::read(None, &keys).unwrap();
        Plan::compute(c, &config, Target::card(1 << 45), Work::Episodes)
    }

    #[test]
    fn products_are_two_for_each_element_of_a_matrix_and_attention_is_what_a_loop_counts() {
        let c = Preset::Tiny.config();
        let store = ParamStore::new(&c, &Device::cpu(1), false).unwrap();
        let elements = |start: &str| -> f64 {
            let matrices = store.segments().iter().filter(|s| s.name.starts_with(start) && s.k > 1);
            matrices.map(|s| (s.n * s.k) as f64).sum()
        };
        assert_eq!(text(&c, 7.0, 5.0)[0], 5.0 * 2.0 * elements("layers."));
        assert_eq!(head(&c, 3.0), 3.0 * 2.0 * elements("head"));
        let (tokens, patches) = (6.0, 24.0);
        let merger = elements("vision.merger.");
        let each = elements("vision.") - merger;
        assert_eq!(vision(&c, tokens)[0], 2.0 * (patches * each + tokens * merger));
        // Rows 7 to 11 attend to all up to themselves, with 4 heads of 16 elements, in 4 layers.
        let mut counted = 0;
        for row in 7..12 {
            for _key in 0..=row {
                counted += 4 * (4 * 16) * (2 + 2);
            }
        }
        assert_eq!(text(&c, 7.0, 5.0)[1], f64::from(counted));
        // 24 patches are less than a window.
        assert_eq!(vision(&c, tokens)[1], 4.0 * 24.0 * 24.0 * 32.0 * (2.0 + 2.0));
    }

    #[test]
    fn what_is_not_kept_is_computed_again_and_what_is_frozen_has_no_backward_pass() {
        let c = Preset::B3.config();
        let b = Batch {
            groups: 16.0,
            samples: 8.0,
            prompt: 600.0,
            prompt_image: 300.0,
            completion: 1000.0,
            completion_image: 300.0,
            said: 500.0,
        };
        let of = |keys: &[&str]| step(&c, &plan(&c, keys), &b, 1, 16_384, true, false);
        let frozen = of(&[]);
        assert_eq!((frozen.again, frozen.reference), (0.0, 0.0));
        let trained = of(&["model.freeze_vision=false"]);
        assert!(trained.backward > frozen.backward && trained.forward == frozen.forward);
        // Two products for one, and five for two in attention.
        let ratio = trained.backward / trained.forward;
        assert!(ratio > 2.0 && ratio < 2.5, "{trained:?}");
        let least = of(&["optim.activations_mib=7000"]);
        assert!(least.again > 0.2 * least.forward && least.again < least.forward, "{least:?}");
        // Prompts once for a group, and every token of a completion once.
        let parts = frozen.prefill + frozen.decode;
        assert!((parts - frozen.forward).abs() < 1e-6 * parts, "{parts} {}", frozen.forward);
        // About two operations for each parameter and token, and no more than half as many again for attention.
        let tokens = 16.0 * 600.0 + 128.0 * 1000.0;
        let rough = 2.0 * 3.1e9 * tokens;
        assert!(frozen.forward > rough && frozen.forward < 1.5 * rough, "{} {rough}", frozen.forward);
        let twice = step(&c, &plan(&c, &[]), &b, 2, 16_384, false, true);
        assert_eq!((twice.forward, twice.reference, twice.decode), (2.0 * frozen.forward, frozen.forward, 0.0));
        // A group that does not fit one micro-batch pays for its prompt in each.
        let spread = step(&c, &plan(&c, &[]), &b, 1, 4096, false, false);
        assert!(spread.forward > frozen.forward);
    }
}
