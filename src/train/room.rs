//! The largest batches that a run file allows: asked about before the first episode, not when the first long one comes.

use super::config::RunConfig;
use crate::device::DType;
use crate::model::Config;
use crate::model::train::{BatchSize, MemoryPlan};
use crate::ops::kv_cache::BLOCK;
use crate::ops::patch_embed::{MERGE, PATCH};
use crate::{Error, Result};

/// What a run does with its model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Learns from its own episodes (`varft train`).
    Episodes,
    /// Learns from conversations (`varft sft`), whose length nothing in the run file bounds.
    Conversations {
        /// Tokens of the longest one, as far as that is known; 0 where it is not.
        longest: usize,
    },
    /// Learns nothing (`varft eval`, `varft rollout`, `varft chat`).
    Rollouts,
}

/// Checks that the activations of the largest batch that a run of `config` on `model` makes fit `optim.activations_mib`, where it is
/// given. `float`: as [`Device::float`](crate::device::Device::float).
///
/// # Errors
/// [`Error::Limit`] naming the key and the least value that does.
pub(super) fn check(config: &RunConfig, model: &Config, float: DType, work: Work) -> Result<()> {
    let least = |size: &BatchSize| MemoryPlan::least(model, float, !config.model.freeze_vision, *size);
    let size = largest(config, model, work).into_iter().max_by_key(least).unwrap_or_default();
    let (mib, budget) = (least(&size).div_ceil(1 << 20), config.optim.activations_mib);
    if budget == 0 || budget >= mib || work == Work::Rollouts {
        return Ok(());
    }
    let smaller = match work {
        Work::Conversations { .. } => "optim.micro_batch_tokens",
        _ => "optim.micro_batch_tokens and rollout.context",
    };
    Err(Error::limit(
        format!(
            "`optim.activations_mib` is {budget}, and the largest batch that the run file allows ({} tokens, {} image patches) \
             needs {mib} even when every layer is computed twice",
            size.rows, size.patches
        ),
        format!("set optim.activations_mib to {mib} or more, or to 0 for what is needed; or lower {smaller}"),
    ))
}

/// The sizes of which every micro-batch fits one: of several episodes, and of one, which is never cut.
pub(super) fn largest(config: &RunConfig, model: &Config, work: Work) -> Vec<BatchSize> {
    let (r, o) = (&config.rollout, &config.optim);
    let image = config.model.max_pixels / (PATCH * PATCH);
    let size = |rows: usize, images: usize, sequences: usize| BatchSize {
        rows,
        // The tokens of an image are rows too.
        patches: (MERGE * MERGE * rows).min(images.saturating_mul(image)),
        // A sequence may leave its first page and its last partly empty.
        blocks: rows.div_ceil(BLOCK) + 2 * sequences,
    };
    match work {
        Work::Episodes => {
            let (context, episodes) = (r.context.min(model.max_position_embeddings), r.prompts * r.group_size);
            // A question shows one image, and so does what follows each turn but the last.
            let images = r.prompts.saturating_add(episodes.saturating_mul(r.max_turns - 1));
            let rows = o.micro_batch_tokens.min(episodes.saturating_mul(context));
            vec![size(rows, images, r.prompts + episodes), size(context, r.max_turns, 2)]
        }
        Work::Conversations { longest } => {
            vec![size(o.micro_batch_tokens, usize::MAX, 2 * config.sft.batch_size), size(longest, usize::MAX, 2)]
        }
        Work::Rollouts => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Preset;

    #[test]
    fn published_sizes_train_on_default_keys() {
        for (preset, float, gib) in [
            (Preset::B3, DType::F32, 5.9..6.0),
            (Preset::B7, DType::F32, 8.8..8.9),
            (Preset::B3, DType::BF16, 2.8..2.9),
            (Preset::B7, DType::BF16, 4.3..4.4),
        ] {
            let (model, mut config) = (preset.config(), RunConfig::default());
            let least = |vision: bool| {
                let all = largest(&config, &model, Work::Episodes);
                all.into_iter().map(|s| MemoryPlan::least(&model, float, vision, s)).max().unwrap()
            };
            let needs = least(false);
            assert!(gib.contains(&(needs as f64 / f64::from(1 << 30))), "{preset} {float:?}: {needs} bytes");
            assert!(least(true) > needs);
            for work in [Work::Episodes, Work::Conversations { longest: 0 }, Work::Rollouts] {
                check(&config, &model, float, work).unwrap();
            }
            // The least value that works is the one that the error names.
            let mib = needs.div_ceil(1 << 20);
            config.optim.activations_mib = mib - 1;
            let e = check(&config, &model, float, Work::Episodes).unwrap_err().to_string();
            assert!(e.contains("8192 tokens") && e.contains(&format!("optim.activations_mib to {mib} or more")), "{e}");
            config.optim.activations_mib = mib;
            check(&config, &model, float, Work::Episodes).unwrap();
            for size in largest(&config, &model, Work::Episodes) {
                MemoryPlan::fit(&model, float, false, size, mib << 20).unwrap();
            }
        }
    }

    #[test]
    fn a_batch_is_no_larger_than_its_episodes() {
        let (model, mut config) = (Preset::Tiny.config(), RunConfig::default());
        (config.rollout.prompts, config.rollout.group_size, config.rollout.max_turns) = (2, 3, 1);
        (config.rollout.context, config.optim.micro_batch_tokens) = (1 << 20, 1 << 30);
        let [packed, longest] = largest(&config, &model, Work::Episodes).try_into().unwrap();
        let rows = model.max_position_embeddings;
        assert_eq!((packed.rows, packed.patches), (6 * rows, 2 * 2048), "two questions, an image each");
        assert_eq!((longest.rows, longest.patches), (rows, 2048));
        config.optim.micro_batch_tokens = 300;
        let [packed, _] = largest(&config, &model, Work::Episodes).try_into().unwrap();
        assert_eq!((packed.rows, packed.patches), (300, 1200));
    }
}
