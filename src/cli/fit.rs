//! Whether every question fits the context: asked before the first episode, not when the one that does not fit comes, hours
//! later.

use super::setup::Folder;
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

/// Measures prompts, of whose images nothing is read but their sizes.
pub(super) struct Measure<'a> {
    folder: &'a Folder,
    protocol: CodingProtocol,
    /// Questions repeat, and so does the text around them.
    texts: HashMap<String, usize>,
}

impl Measure<'_> {
    pub fn new<'a>(config: &RunConfig, folder: &'a Folder) -> Measure<'a> {
        Measure { folder, protocol: CodingProtocol { style: config.rollout.prompt }, texts: HashMap::new() }
    }

    /// Tokens of an item's prompt: of its text, and of its image.
    ///
    /// # Errors
    /// What is wrong with the item or its image.
    pub fn of(&mut self, item: &Outline) -> Result<(usize, usize)> {
        let (f, processor) = (self.folder, self.folder.preprocessor.processor());
        let Outline { name, question, size } = item;
        let image = processor.outline(*size, &format!("{name}: its image"))?.tokens();
        if let Some(&text) = self.texts.get(question) {
            return Ok((text, image));
        }
        let any = Arc::new(processor.outline((1, 1), name)?);
        let opening = self.protocol.opening(question);
        let prompt = build_prompt(&f.tokenizer, &f.template, &opening, std::slice::from_ref(&any))?;
        let text = prompt.len() - any.tokens();
        self.texts.insert(question.clone(), text);
        Ok((text, image))
    }
}

/// Checks that the prompt of every one of `items` leaves room for an answer. Images are not read for it, only their sizes.
///
/// # Errors
/// [`Error::Limit`] naming the first item that does not fit, and how many there are; what is wrong with an item or its image.
pub(super) fn check(config: &RunConfig, folder: &Folder, items: impl Iterator<Item = Result<Outline>>) -> Result<()> {
    let most = config.rollout.context.min(folder.config.max_position_embeddings);
    let mut measure = Measure::new(config, folder);
    let (mut first, mut unfit) = (None, 0);
    for item in items {
        let item = item?;
        let (text, image) = measure.of(&item)?;
        if text + image >= most {
            unfit += 1;
            first.get_or_insert((item.name, text, image));
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
