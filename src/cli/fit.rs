//! Whether every question fits the context: asked before the first episode, not when the one that does not fit comes, hours
//! later.

use super::setup::Loaded;
use crate::agent::CodingProtocol;
use crate::input::build_prompt;
use crate::tasks::{Examples, Outline};
use crate::train::RunConfig;
use crate::{Error, Result};
use std::collections::HashMap;
use std::sync::Arc;

/// Most items that are looked at. A task that makes its questions may have any number of them, and so many show all of their kinds.
const MOST: u64 = 1 << 20;

/// The first `n` of `items`, for [`check`].
pub(super) fn first(items: &dyn Examples, n: u64) -> impl Iterator<Item = Result<Outline>> + '_ {
    (0..items.len().min(n).min(MOST)).map(move |i| items.outline(i))
}

/// Checks that the prompt of every one of `items` leaves room for an answer. Images are not read for it, only their sizes.
///
/// # Errors
/// [`Error::Limit`] naming the first item that does not fit, and how many there are; what is wrong with an item or its image.
pub(super) fn check(config: &RunConfig, loaded: &Loaded, items: impl Iterator<Item = Result<Outline>>) -> Result<()> {
    let processor = loaded.preprocessor.processor();
    let protocol = CodingProtocol { style: config.rollout.prompt };
    let most = config.rollout.context.min(loaded.model.config.max_position_embeddings);
    // Questions repeat, and so does the text around them.
    let mut texts: HashMap<String, usize> = HashMap::new();
    let (mut first, mut unfit) = (None, 0);
    for item in items {
        let Outline { name, question, size } = item?;
        let image = processor.outline(size, &format!("{name}: its image"))?.tokens();
        let text = match texts.get(&question) {
            Some(&n) => n,
            None => {
                let any = Arc::new(processor.outline((1, 1), &name)?);
                let opening = protocol.opening(&question);
                let prompt = build_prompt(&loaded.tokenizer, &loaded.template, &opening, std::slice::from_ref(&any))?;
                *texts.entry(question).or_insert(prompt.len() - any.tokens())
            }
        };
        if text + image >= most {
            unfit += 1;
            first.get_or_insert((name, text, image));
        }
    }
    let Some((name, text, image)) = first else { return Ok(()) };
    let others = match unfit - 1 {
        0 => String::new(),
        1 => " (and one more item does not fit)".to_owned(),
        n => format!(" (and {n} more items do not fit)"),
    };
    let longer = match most < config.rollout.context {
        true => "",
        false => ", or raise rollout.context",
    };
    Err(Error::limit(
        format!(
            "{name}: the prompt has {} tokens ({image} of them the image), which leaves no room for an answer in a context of \
             {most}{others}",
            text + image
        ),
        format!("shorten the question or leave the item out, lower model.max_pixels{longer}"),
    ))
}
