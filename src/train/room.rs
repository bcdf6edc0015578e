//! Whether the largest batches that a run file allows fit: asked before the first episode, not when the first long one comes.

use super::config::RunConfig;
use super::learner::MAKE_ROOM;
use crate::model::train::{BatchSize, MemoryPlan};
use crate::model::{Config, Model};
use crate::ops::kv_cache::BLOCK;
use crate::ops::patch_embed::{MERGE, PATCH};
use crate::{Error, Result};

/// What a run learns from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Its own episodes (`varft train`).
    Episodes,
    /// Conversations (`varft sft`). Nothing in the run file bounds the length of one: only batches of several are known.
    Conversations,
}

/// Checks that the activations of the largest batch that a run of `config` on `model` makes fit `optim.activations_mib` and the
/// memory that is free.
///
/// # Errors
/// [`Error::Limit`] naming the key and the least value that does.
pub fn check(config: &RunConfig, model: &Model, source: Source) -> Result<()> {
    let needed = needed(config, &model.config, model.trains_vision(), source)?;
    model.device().check_room(needed, "activations of the largest batch that the run file allows", MAKE_ROOM)
}

/// Bytes of activations that the largest batch needs with every layer computed twice.
fn needed(config: &RunConfig, model: &Config, trains_vision: bool, source: Source) -> Result<usize> {
    let least = |size: &BatchSize| MemoryPlan::least(model, trains_vision, *size);
    let size = largest(config, model, source).into_iter().max_by_key(least).unwrap_or_default();
    let (needed, budget) = (least(&size), config.optim.activations_mib);
    let mib = needed.div_ceil(1 << 20);
    if budget != 0 && budget < mib {
        let smaller = match source {
            Source::Episodes => "optim.micro_batch_tokens and rollout.context",
            Source::Conversations => "optim.micro_batch_tokens",
        };
        return Err(Error::limit(
            format!(
                "`optim.activations_mib` is {budget}, and the largest batch that the run file allows ({} tokens, {} image patches) \
                 needs {mib} even when every layer is computed twice",
                size.rows, size.patches
            ),
            format!("set optim.activations_mib to {mib} or more, or to 0 for what is needed; or lower {smaller}"),
        ));
    }
    Ok(needed)
}

/// The sizes of which every micro-batch fits one: of several episodes, and of one, which is never cut.
fn largest(config: &RunConfig, model: &Config, source: Source) -> Vec<BatchSize> {
    let (r, o) = (&config.rollout, &config.optim);
    let image = config.model.max_pixels / (PATCH * PATCH);
    let size = |rows: usize, images: usize, sequences: usize| BatchSize {
        rows,
        // The tokens of an image are rows too.
        patches: (MERGE * MERGE * rows).min(images.saturating_mul(image)),
        // A sequence may leave its first page and its last partly empty.
        blocks: rows.div_ceil(BLOCK) + 2 * sequences,
    };
    match source {
        Source::Episodes => {
            let (context, episodes) = (r.context.min(model.max_position_embeddings), r.prompts * r.group_size);
            // A question shows one image, and so does what follows each turn but the last.
            let images = r.prompts.saturating_add(episodes.saturating_mul(r.max_turns - 1));
            let rows = o.micro_batch_tokens.min(episodes.saturating_mul(context));
            vec![size(rows, images, r.prompts + episodes), size(context, r.max_turns, 2)]
        }
        Source::Conversations => vec![size(o.micro_batch_tokens, usize::MAX, 2 * config.sft.batch_size)],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Preset;

    #[test]
    fn published_sizes_train_on_default_keys() {
        for (preset, gib) in [(Preset::B3, 5.9..6.0), (Preset::B7, 8.8..8.9)] {
            let (model, mut config) = (preset.config(), RunConfig::default());
            for source in [Source::Episodes, Source::Conversations] {
                needed(&config, &model, false, source).unwrap();
            }
            let needs = needed(&config, &model, false, Source::Episodes).unwrap();
            assert!(gib.contains(&(needs as f64 / f64::from(1 << 30))), "{preset}: {needs} bytes");
            assert!(needed(&config, &model, true, Source::Episodes).unwrap() > needs);
            // The least value that works is the one that the error names.
            let mib = needs.div_ceil(1 << 20);
            config.optim.activations_mib = mib - 1;
            let e = needed(&config, &model, false, Source::Episodes).unwrap_err().to_string();
            assert!(e.contains("8192 tokens") && e.contains(&format!("optim.activations_mib to {mib} or more")), "{e}");
            config.optim.activations_mib = mib;
            needed(&config, &model, false, Source::Episodes).unwrap();
            for size in largest(&config, &model, Source::Episodes) {
                MemoryPlan::fit(&model, false, size, mib << 20).unwrap();
            }
        }
    }

    #[test]
    fn a_batch_is_no_larger_than_its_episodes() {
        let (model, mut config) = (Preset::Tiny.config(), RunConfig::default());
        (config.rollout.prompts, config.rollout.group_size, config.rollout.max_turns) = (2, 3, 1);
        (config.rollout.context, config.optim.micro_batch_tokens) = (1 << 20, 1 << 30);
        let [packed, longest] = largest(&config, &model, Source::Episodes).try_into().unwrap();
        let rows = model.max_position_embeddings;
        assert_eq!((packed.rows, packed.patches), (6 * rows, 2 * 2048), "two questions, an image each");
        assert_eq!((longest.rows, longest.patches), (rows, 2048));
        config.optim.micro_batch_tokens = 300;
        let [packed, _] = largest(&config, &model, Source::Episodes).try_into().unwrap();
        assert_eq!((packed.rows, packed.patches), (300, 1200));
    }
}
