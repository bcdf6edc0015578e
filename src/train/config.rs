//! The run file: everything that decides what a run does, in one TOML file, every key with a default.
//!
//! ```toml
//! [model]
//! path = "Qwen2.5-VL-3B-Instruct"
//!
//! [algo]
//! beta = 0.04
//! ```
//!
//! Any key can be given on the command line instead (`--set algo.beta=0.04`). The file that a run writes into its own
//! folder holds every key as it was resolved.

use super::schedule::Decay;
use crate::agent::{Accuracy, PromptStyle};
use crate::tasks::scorer::Scorer;
use crate::tasks::synthetic;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// A run, completely.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunConfig {
    /// Its name, its place, its seed.
    pub run: Run,
    /// What is trained.
    pub model: Model,
    /// On which questions.
    pub task: Task,
    /// How episodes are rolled out.
    pub rollout: Rollout,
    /// What the agent may call.
    pub tools: Tools,
    /// What an episode is worth.
    pub reward: Reward,
    /// Supervised fine-tuning (`varft sft`).
    pub sft: Sft,
    /// Reinforcement learning (`varft train`).
    pub algo: Algo,
    /// Steps and their size, for both.
    pub optim: Optim,
    /// What is written down, and when.
    pub log: Log,
}

macro_rules! section {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $field:ident: $ty:ty = $default:expr,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct $name {
            $($(#[$doc])* pub $field: $ty,)*
        }
        impl Default for $name {
            fn default() -> Self {
                $name { $($field: $default,)* }
            }
        }
    };
}

/// What a run computes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// NVIDIA's first card where it can be used, else the host's cores. What it came to is what a run writes down.
    Auto,
    /// The host's cores, in f32.
    Cpu,
    /// NVIDIA's first card, in bf16.
    Cuda,
    /// The CUDA kernels on the host's cores, under the emulator's checks.
    Emulated,
}

section! {
    /// `[run]`
    Run {
        /// The run's folder is `dir/name`.
        name: String = "run".into(),
        /// Where runs lie.
        dir: String = "runs".into(),
        /// Decides what is random in the run: the order of the questions, and what is sampled.
        seed: u64 = 0,
        /// `cpu`, `cuda` (NVIDIA's first card; no card has run it yet), `emulated` (the CUDA kernels on the host under checks,
        /// hundreds of times slower: for tests), or `auto`: `cuda` where there is a card that can be used, else `cpu`; the
        /// `config.toml` in a run's folder says which it was. The same as `--device`.
        device: Place = Place::Auto,
        /// Threads of the device; 0 means all cores that the process may use. Changes no result.
        threads: usize = 0,
    }
}

section! {
    /// `[model]`
    Model {
        /// A Hugging Face folder (config.json, safetensors, tokenizer).
        path: String = String::new(),
        /// Keeps the vision tower as it is.
        freeze_vision: bool = true,
        /// An image is scaled up to at least this many pixels.
        min_pixels: usize = 3136,
        /// An image is scaled down to at most this many pixels; 28 x 28 of them are one token.
        max_pixels: usize = 401_408,
    }
}

/// Where questions come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskKind {
    /// Images that the program makes and degrades.
    Synthetic,
    /// Files in MAT-Coding's row format.
    Mat,
}

section! {
    /// `[task]`
    Task {
        /// `synthetic` or `mat`.
        kind: TaskKind = TaskKind::Synthetic,
        /// `mat`: the JSON file of training rows.
        train: String = String::new(),
        /// `mat`: the JSON file of held-out rows.
        eval: String = String::new(),
        /// `mat`: the folder that image paths start from.
        images: String = String::new(),
        /// `synthetic`: decides images and questions; runs with the same one are asked the same.
        seed: u64 = 0,
        /// `synthetic`: how many different training questions there are.
        train_items: usize = 4096,
        /// How many held-out questions are asked (`mat`: at most; 0 for all).
        eval_items: usize = 300,
        /// `synthetic`: uses photographs under free licences as backgrounds (downloaded on first use), unless
        /// `synthetic.photographs` names a folder of others.
        photographs: bool = false,
        /// `[task.synthetic]`: what the images and questions are like.
        synthetic: synthetic::Config = synthetic::Config::default(),
    }
}

section! {
    /// `[rollout]`
    Rollout {
        /// Questions per step.
        prompts: usize = 16,
        /// Completions per question: the group over which advantages are taken.
        group_size: usize = 8,
        /// How much the system prompt explains: `full` for a pretrained model, `brief` for one that learned the steps.
        prompt: PromptStyle = PromptStyle::Full,
        /// An episode may call its tool and go on so often before it must have answered.
        max_turns: usize = 5,
        /// Tokens that one turn may have.
        max_new_tokens: usize = 1024,
        /// Tokens that an episode may have, prompt and images included.
        context: usize = 8192,
        /// Sampling temperature in training; log-probabilities are those at this temperature.
        temperature: f64 = 1.0,
        /// Samples among the k likeliest tokens; 0 among all. Log-probabilities are those before this and the next two cut
        /// anything, so training with them takes samples of another distribution than the one it corrects for: a bias that
        /// grows with what is cut. Leave all three off for training unless you mean it.
        top_k: usize = 0,
        /// Samples among the likeliest tokens that together reach this probability; 1 among all.
        top_p: f64 = 1.0,
        /// Samples among tokens at least this likely relative to the likeliest; 0 among all.
        min_p: f64 = 0.0,
        /// Sampling temperature in evaluation; 0 takes the likeliest token.
        eval_temperature: f64 = 0.0,
        /// Episodes in flight at once; more wait. Changes no result.
        concurrency: usize = 64,
        /// Characters of a program's output that the model is shown, from its end.
        output_chars: usize = 2000,
        /// Tokens in one forward pass of the engine, decoding and prompts together.
        batch_tokens: usize = 1024,
        /// Memory for keys and values, in MiB. 0 for what the memory plan gives: on a GPU room for all episodes in flight, as far as
        /// there is any; on the host's cores 1024, or what an episode needs where that is more.
        kv_cache_mib: usize = 0,
        /// Memory for the vision tower's outputs, in MiB.
        vision_cache_mib: usize = 256,
    }
}

/// `[tools]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tools {
    /// The `python` tool.
    pub python: Python,
}

section! {
    /// `[tools.python]`
    Python {
        /// The interpreter; empty for the environment under the user's cache folder.
        interpreter: String = String::new(),
        /// Makes that environment if it is missing.
        install: bool = true,
        /// Calls that run at once; 0 for as many as there are cores.
        concurrency: usize = 0,
        /// Processor seconds of a call.
        cpu_s: f64 = 10.0,
        /// Memory of a call, in MiB.
        memory_mib: u64 = 1024,
        /// Size of a file that a call writes, in MiB; all its files together may have four times that.
        file_mib: u64 = 64,
        /// What a call may print, in KiB.
        output_kib: usize = 64,
        /// Shows the agent the image that its program made. Without it the agent gets its original again: a test of
        /// whether it sees with its tool.
        show_image: bool = true,
    }
}

section! {
    /// `[reward]`: the sum of weighted parts.
    Reward {
        /// Weight of the answer's score.
        answer: f64 = 1.0,
        /// Which score: `f1`, or `em` for exact match.
        accuracy: Accuracy = Accuracy::F1,
        /// Weight of an episode that keeps to the format throughout.
        format: f64 = 0.2,
        /// How answers are compared: `squad` or `reference`.
        scorer: Scorer = Scorer::Squad,
    }
}

section! {
    /// `[sft]`
    Sft {
        /// Conversations to learn from, one JSON object per line; empty for the synthetic task's own demonstrations.
        data: String = String::new(),
        /// Conversations per step.
        batch_size: usize = 16,
    }
}

/// How the tokens of a batch are weighted in its loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossKind {
    /// The mean over completions of each one's mean over tokens (DeepSeekMath, arXiv 2402.03300, equation 3).
    Grpo,
    /// The mean over all tokens of the batch (DAPO, arXiv 2503.14476, section 3.3).
    Dapo,
    /// The sum over tokens divided by a constant (Dr. GRPO, arXiv 2503.20783, section 3.2).
    DrGrpo,
}

impl LossKind {
    /// What its paper does with rewards: what a run file means that gives no `algo.scale`.
    pub(super) fn scale(self) -> AdvantageScale {
        match self {
            LossKind::Grpo | LossKind::Dapo => AdvantageScale::Group,
            LossKind::DrGrpo => AdvantageScale::None,
        }
    }
}

/// How rewards become advantages within a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdvantageScale {
    /// (r - mean) / (standard deviation + 1e-4)  (DeepSeekMath, section 4.1.2).
    Group,
    /// r - mean  (Dr. GRPO, section 3.2).
    None,
}

section! {
    /// `[algo]`
    Algo {
        /// `grpo`, `dapo` or `dr_grpo`.
        loss: LossKind = LossKind::Dapo,
        /// `group` divides by the group's standard deviation, `none` does not. Not given: `none` for `dr_grpo`, `group` for
        /// the others.
        scale: AdvantageScale = AdvantageScale::Group,
        /// The ratio of new to old probability is clipped below at 1 - clip_low.
        clip_low: f64 = 0.2,
        /// And above at 1 + clip_high.
        clip_high: f64 = 0.28,
        /// Weight of the KL divergence to the model that the run began with; 0 holds no such model in memory.
        beta: f64 = 0.0,
        /// Leaves out groups whose rewards are all the same: they say nothing. Not where `beta` is not 0: the divergence
        /// still says something then.
        drop_zero_variance: bool = true,
        /// Leaves episodes that were cut short out of the loss: they show no end to learn from.
        mask_truncated: bool = true,
        /// Passes over each batch of episodes.
        iterations: usize = 1,
        /// Updates per pass: the batch is split into so many parts.
        minibatches: usize = 1,
    }
}

section! {
    /// `[optim]`
    Optim {
        /// Steps of the run; one step of `train` rolls out one batch. With the schedule `constant` a run that is complete can go on
        /// with more of them (`--resume --set optim.steps=...`).
        steps: u64 = 200,
        /// Peak learning rate.
        lr: f64 = 1e-6,
        /// `constant`, `linear` or `cosine`, after the warm-up. The last two end with `optim.steps`, which cannot change afterwards.
        schedule: Decay = Decay::Constant,
        /// Steps over which the learning rate rises to its peak.
        warmup_steps: u64 = 0,
        /// What the schedule ends at, as a share of the peak.
        final_lr: f64 = 0.0,
        /// AdamW's decay of the mean of gradients.
        beta1: f64 = 0.9,
        /// AdamW's decay of the mean of their squares.
        beta2: f64 = 0.999,
        /// AdamW's epsilon.
        eps: f64 = 1e-8,
        /// AdamW's weight decay, on matrices only.
        weight_decay: f64 = 0.0,
        /// Gradients are scaled down to at most this norm; 0 leaves them as they are.
        max_grad_norm: f64 = 1.0,
        /// Tokens in one forward and backward pass; gradients accumulate over as many passes as the batch needs. An episode
        /// is never cut: a longer one has a pass of its own.
        micro_batch_tokens: usize = 4096,
        /// Memory for what the forward pass keeps for the backward pass, in MiB; the rest is computed again. Changes no result.
        /// 0 for what the memory plan gives: on a GPU as much as there is room for; on the host's cores 2048, or what the
        /// largest batch needs with everything computed again where that is more (6.0 GiB for an episode of 8192 tokens with five images
        /// on a 3B, 8.9 GiB on a 7B).
        activations_mib: usize = 0,
        /// Keeps f32 masters of weights that are bf16, which they are on a GPU: 4 bytes a parameter. Without them an updated weight is
        /// rounded up or down at random, to the nearer number the likelier, so that updates too small to move it by themselves
        /// move it in the mean.
        masters: bool = true,
    }
}

section! {
    /// `[log]`
    Log {
        /// Writes TensorBoard events beside metrics.jsonl.
        tensorboard: bool = true,
        /// Asks the held-out questions every so many steps, and before the first and after the last; 0 never.
        eval_every: u64 = 50,
        /// Writes a checkpoint every so many steps, and after the last; 0 only then.
        checkpoint_every: u64 = 50,
        /// Checkpoints that are kept, the newest first; 0 for all.
        keep_last: usize = 2,
        /// Episodes per step that are written down with their images.
        trajectories: usize = 16,
    }
}

impl RunConfig {
    /// Whether the figures make sense, each by itself and together.
    ///
    /// # Errors
    /// [`Error::Input`] naming the key.
    pub fn check(&self) -> Result<()> {
        let share = |v: f64| (0.0..=1.0).contains(&v);
        let positive = |v: f64| v.is_finite() && v > 0.0;
        let not_negative = |v: f64| v.is_finite() && v >= 0.0;
        let (r, a, o, p) = (&self.rollout, &self.algo, &self.optim, &self.tools.python);
        let name = &self.run.name;
        // What is counted in MiB is handed on in bytes.
        let size = |mib: usize| (1..=1 << 40).contains(&mib);
        let rules: &[(bool, &str, &str)] = &[
            (
                !name.is_empty()
                    && !name.starts_with('.')
                    && !name.contains(|c: char| "/\\".contains(c) || c.is_control()),
                "run.name",
                "a folder's name",
            ),
            (self.model.min_pixels >= 784, "model.min_pixels", "at least 784 (one token)"),
            (self.model.max_pixels >= self.model.min_pixels, "model.max_pixels", "at least model.min_pixels"),
            (self.task.train_items > 0, "task.train_items", "at least 1"),
            ((1..=1 << 20).contains(&r.prompts), "rollout.prompts", "1 to 1048576"),
            ((1..=1 << 16).contains(&r.group_size), "rollout.group_size", "1 to 65536"),
            (r.max_turns > 0, "rollout.max_turns", "at least 1"),
            (r.max_new_tokens > 0, "rollout.max_new_tokens", "at least 1"),
            (
                r.context > r.max_new_tokens && r.context <= 1 << 30,
                "rollout.context",
                "more than rollout.max_new_tokens, and at most 2^30",
            ),
            (self.run.threads <= 1024, "run.threads", "at most 1024 (0 for all cores)"),
            // The kernels divide by it in f32.
            (
                r.temperature > 0.0 && (r.temperature as f32).is_normal(),
                "rollout.temperature",
                "more than 0 (training needs chance), from 1e-37 to 1e38",
            ),
            (r.top_k <= u32::MAX as usize, "rollout.top_k", "less than 2^32"),
            (
                r.eval_temperature == 0.0 || r.eval_temperature > 0.0 && (r.eval_temperature as f32).is_normal(),
                "rollout.eval_temperature",
                "0, or from 1e-37 to 1e38",
            ),
            (share(r.top_p) && r.top_p > 0.0, "rollout.top_p", "more than 0 and at most 1"),
            (share(r.min_p) && r.min_p < 1.0, "rollout.min_p", "at least 0 and less than 1"),
            (r.concurrency > 0 && r.concurrency <= 4096, "rollout.concurrency", "from 1 to 4096"),
            (r.batch_tokens > 0, "rollout.batch_tokens", "at least 1"),
            (r.kv_cache_mib <= 1 << 40, "rollout.kv_cache_mib", "at most 2^40 (0 for what the memory plan gives)"),
            (r.vision_cache_mib <= 1 << 40, "rollout.vision_cache_mib", "at most 2^40"),
            (p.concurrency <= 1024, "tools.python.concurrency", "at most 1024 (0 for as many as there are cores)"),
            (positive(p.cpu_s) && p.cpu_s <= 1e6, "tools.python.cpu_s", "more than 0 and at most 1,000,000"),
            (size(p.memory_mib as usize), "tools.python.memory_mib", "from 1 to 2^40"),
            (size(p.file_mib as usize), "tools.python.file_mib", "from 1 to 2^40"),
            (size(p.output_kib), "tools.python.output_kib", "from 1 to 2^40"),
            (
                // All of them are held in memory.
                self.task.kind == TaskKind::Mat || (1..=1 << 16).contains(&self.task.eval_items),
                "task.eval_items",
                "from 1 to 65536 for the synthetic task",
            ),
            (self.reward.answer.is_finite(), "reward.answer", "a number"),
            (self.reward.format.is_finite(), "reward.format", "a number"),
            ((1..=1 << 20).contains(&self.sft.batch_size), "sft.batch_size", "1 to 1048576"),
            (share(a.clip_low), "algo.clip_low", "between 0 and 1"),
            (not_negative(a.clip_high), "algo.clip_high", "0 or more"),
            (not_negative(a.beta), "algo.beta", "0 or more"),
            ((1..=1024).contains(&a.iterations), "algo.iterations", "from 1 to 1024"),
            (a.minibatches > 0 && a.minibatches <= r.prompts, "algo.minibatches", "1 to rollout.prompts"),
            (not_negative(o.lr), "optim.lr", "0 or more"),
            (share(o.final_lr), "optim.final_lr", "between 0 and 1"),
            (share(o.beta1) && o.beta1 < 1.0, "optim.beta1", "at least 0 and less than 1"),
            (share(o.beta2) && o.beta2 < 1.0, "optim.beta2", "at least 0 and less than 1"),
            (positive(o.eps), "optim.eps", "more than 0"),
            (not_negative(o.weight_decay), "optim.weight_decay", "0 or more"),
            (not_negative(o.max_grad_norm), "optim.max_grad_norm", "0 or more"),
            ((1..=1 << 30).contains(&o.micro_batch_tokens), "optim.micro_batch_tokens", "from 1 to 2^30"),
            (o.activations_mib <= 1 << 40, "optim.activations_mib", "at most 2^40 (0 for what is needed)"),
        ];
        if o.warmup_steps > o.steps {
            return Err(Error::input(
                format!(
                    "`optim.warmup_steps` is {}, and with `optim.steps` = {} the rate would never reach its peak",
                    o.warmup_steps, o.steps
                ),
                format!("set optim.warmup_steps to {} or less, or take more steps", o.steps),
            ));
        }
        match rules.iter().find(|r| !r.0) {
            Some((_, key, rule)) => Err(Error::input(
                format!("`{key}` must be {rule}"),
                format!("correct `{key}` in the run file or on the command line"),
            )),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_out_of_all_proportion_are_refused_by_name() {
        for (key, bad, good) in [
            ("rollout.temperature", &["1e-50", "1e39", "0.0", "-1.0", "nan"][..], "1e-3"),
            ("rollout.eval_temperature", &["1e-50", "1e39", "-1.0", "inf"], "0.0"),
            ("tools.python.concurrency", &["1000000000000"], "1024"),
            ("task.eval_items", &["0", "65537"], "65536"),
            ("run.name", &["a\nb", "a\u{7}", ".", "a/b"], "a b"),
            ("algo.iterations", &["0", "1000000000000"], "1024"),
        ] {
            let read = |value| RunConfig::read(None, &[format!("{key}={value}")]).and_then(|c| c.check());
            for value in bad {
                let text = read(*value).unwrap_err().to_string();
                assert!(text.contains(key), "{key} = {value}: {text}");
            }
            read(good).unwrap();
        }
    }

    #[test]
    fn the_scale_of_advantages_follows_the_loss_unless_it_is_given() {
        for (keys, want) in [
            (&[][..], AdvantageScale::Group),
            (&["algo.loss=grpo"], AdvantageScale::Group),
            (&["algo.loss=dr_grpo"], AdvantageScale::None),
            (&["algo.scale=group", "algo.loss=dr_grpo"], AdvantageScale::Group),
            (&["algo.scale=none"], AdvantageScale::None),
        ] {
            let keys: Vec<String> = keys.iter().map(|k| k.to_string()).collect();
            let config = RunConfig::read(None, &keys).unwrap();
            assert_eq!(config.algo.scale, want, "{keys:?}");
            // Whoever reads the written file need not know the rule.
            let written = config.to_toml().unwrap();
            assert!(written.contains(&format!("scale = \"{want:?}\"").to_lowercase()), "{written}");
        }
    }
}
