//! Sequences packed into one training pass: no padding, and the completions of a group share their prompt's rows.

use super::BatchSize;
use crate::device::{Device, Input, Stream};
use crate::input::{Image, ImageHash, Prompt};
use crate::model::positions::{self, Positions, Span};
use crate::model::{Config, StepBatch, StepInput, StepLimits};
use crate::ops::embedding::NO_TOKEN;
use crate::ops::kv_cache::BLOCK;
use crate::{Error, Result};
use std::collections::HashMap;
use std::sync::Arc;

/// A prompt and what was written after it, any number of times. A sequence on its own is a group without completions.
#[derive(Clone, Debug, Default)]
pub struct Group {
    /// Computed once for the whole group.
    pub prompt: Prompt,
    /// Each goes on from the prompt's end; its image spans count from its own first token.
    pub completions: Vec<Prompt>,
}

/// Where a group's rows are in the packed hidden states.
#[derive(Clone, Debug)]
struct Placed {
    prompt: usize,
    prompt_len: usize,
    completions: Vec<usize>,
}

/// A packed batch on the device.
pub struct TrainBatch {
    pub(super) step: StepBatch,
    /// Each image once, however often it is shown.
    pub(super) images: Vec<Arc<Image>>,
    pub(super) patches: usize,
    pub(super) blocks: usize,
    /// Pages of completions that hold a copy of the prompt's last, partly filled page: (copy, original).
    pub(super) copied_blocks: Vec<(usize, usize)>,
    placed: Vec<Placed>,
}

/// Pages while they are being laid out.
#[derive(Default)]
struct Layout {
    input: StepInput,
    /// Pages of the longest segment.
    widest: usize,
    blocks: u32,
    images: Vec<Arc<Image>>,
    /// First row of an image in the vision output.
    sources: HashMap<ImageHash, u32>,
    image_tokens: u32,
}

impl Layout {
    fn new_blocks(&mut self, n: usize) -> impl Iterator<Item = u32> + use<> {
        let first = self.blocks;
        self.blocks += n as u32;
        first..self.blocks
    }

    /// Appends a segment of `text` after `context` tokens whose next position is `next`; returns the position after it.
    fn segment(&mut self, text: &Prompt, context: usize, next: u32, table: Vec<u32>) -> u32 {
        let first = self.input.ids.len();
        self.input.ids.extend_from_slice(&text.tokens);
        let mut spans = Vec::with_capacity(text.images.len());
        for span in &text.images {
            spans.push(Span { offset: span.offset, grid_h: span.image.grid.h, grid_w: span.image.grid.w });
            let source = *self.sources.entry(span.image.hash).or_insert_with(|| {
                self.images.push(span.image.clone());
                self.image_tokens += span.image.tokens() as u32;
                self.image_tokens - span.image.tokens() as u32
            });
            for i in 0..span.len {
                let row = first + span.offset + i;
                self.input.ids[row] = NO_TOKEN;
                self.input.image_rows.push(row as u32);
                self.input.image_sources.push(source + i as u32);
            }
        }
        let end = positions::extend(next, text.tokens.len(), &spans, &mut self.input.positions);
        let at = |token: usize| table[token / BLOCK] * BLOCK as u32 + (token % BLOCK) as u32;
        self.input.slots.extend((context..context + text.tokens.len()).map(at));
        self.input.cu_seqlens_q.push(self.input.ids.len() as u32);
        self.widest = self.widest.max(table.len());
        self.input.push_table(context + text.tokens.len(), &table);
        end
    }
}

impl TrainBatch {
    /// Packs `groups` and submits their upload.
    ///
    /// # Errors
    /// If a prompt is empty, a token is outside the vocabulary, or an image span does not fit its tokens.
    pub fn pack(config: &Config, device: &Device, s: &Stream, groups: &[Group]) -> Result<TrainBatch> {
        let mut l = Layout::default();
        l.input.cu_seqlens_q.push(0);
        l.input.positions = Positions::default();
        let (mut placed, mut copies, mut copied_blocks) = (Vec::new(), Vec::new(), Vec::new());
        for (g, group) in groups.iter().enumerate() {
            let prompt_len = group.prompt.tokens.len();
            if prompt_len == 0 {
                return Err(Error::input(format!("the prompt of group {g} is empty"), "give it at least one token"));
            }
            std::iter::once(&group.prompt).chain(&group.completions).try_for_each(|p| check(config, p, g))?;
            let table: Vec<u32> = l.new_blocks(prompt_len.div_ceil(BLOCK)).collect();
            let (whole, rest) = (prompt_len / BLOCK, prompt_len % BLOCK);
            let mut at = Placed { prompt: l.input.ids.len(), prompt_len, completions: Vec::new() };
            let next = l.segment(&group.prompt, 0, 0, table.clone());
            for completion in &group.completions {
                at.completions.push(l.input.ids.len());
                if completion.tokens.is_empty() {
                    continue;
                }
                let all = (prompt_len + completion.tokens.len()).div_ceil(BLOCK);
                let mut own = table[..whole].to_vec();
                own.extend(l.new_blocks(all - whole));
                if rest > 0 {
                    let first = own[whole] * BLOCK as u32;
                    copies.push((at.prompt + whole * BLOCK, rest, (first..first + rest as u32).collect::<Vec<u32>>()));
                    copied_blocks.push((own[whole] as usize, table[whole] as usize));
                }
                l.segment(completion, prompt_len, next, own);
            }
            placed.push(at);
        }
        let limits = StepLimits {
            tokens: l.input.ids.len(),
            segments: l.input.kv_lens.len(),
            blocks_per_segment: l.widest,
            logits: 0,
        };
        let mut step = StepBatch::new(device, &limits);
        let slots: Vec<Input> =
            step.upload_with(s, &l.input, None, |i| copies.iter().map(|(.., slots)| i.put_all(slots)).collect());
        step.copies = copies.iter().zip(slots).map(|(&(row, n, _), slots)| (row, n, step.added(slots))).collect();
        Ok(TrainBatch {
            step,
            patches: l.images.iter().map(|i| i.grid.patches()).sum(),
            images: l.images,
            blocks: l.blocks as usize,
            copied_blocks,
            placed,
        })
    }

    /// What decides how much memory its activations take.
    pub fn size(&self) -> BatchSize {
        BatchSize { rows: self.rows(), patches: self.patches, blocks: self.blocks }
    }
    /// Rows of the packed hidden states.
    pub fn rows(&self) -> usize {
        self.step.tokens
    }
    /// Patches of the images, each image counted once.
    pub fn patches(&self) -> usize {
        self.patches
    }
    /// Pages of keys and values.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// The row whose logits predict token `i` (from 1) of a group's prompt.
    pub fn prompt_row(&self, group: usize, i: usize) -> usize {
        let at = &self.placed[group];
        assert!((1..=at.prompt_len).contains(&i), "token {i} of a prompt of {}", at.prompt_len);
        at.prompt + i - 1
    }

    /// The row whose logits predict token `i` (from 0) of a completion. For the first it is the prompt's last, which the
    /// whole group shares.
    pub fn completion_row(&self, group: usize, completion: usize, i: usize) -> usize {
        let at = &self.placed[group];
        if i == 0 { at.prompt + at.prompt_len - 1 } else { at.completions[completion] + i - 1 }
    }
}

fn check(config: &Config, p: &Prompt, group: usize) -> Result<()> {
    if let Some(bad) = p.tokens.iter().find(|&&id| id as usize >= config.vocab_size) {
        return Err(Error::input(
            format!("group {group}: token {bad} is outside the vocabulary of {}", config.vocab_size),
            "use the tokenizer that belongs to this model",
        ));
    }
    p.validate(config.tokens.image).map_err(|e| match e {
        Error::Input { what, mend } => Error::Input { what: format!("group {group}: {what}"), mend },
        other => other,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Preset;

    #[test]
    fn completions_share_the_prompt_and_copy_its_partial_page() {
        let (c, d) = (Preset::Tiny.config(), Device::cpu(1));
        let text = |n: usize| Prompt::from_tokens((0..n as u32).collect());
        let group = Group { prompt: text(BLOCK + 3), completions: vec![text(5), text(0), text(2 * BLOCK)] };
        let s = d.stream();
        let b = TrainBatch::pack(&c, &d, &s, &[group, Group { prompt: text(2), completions: vec![] }]).unwrap();
        assert_eq!(b.rows(), BLOCK + 3 + 5 + 2 * BLOCK + 2);
        assert_eq!((b.blocks(), b.copied_blocks.clone()), (2 + 1 + 3 + 1, vec![(2, 1), (3, 1)]));
        assert_eq!(b.completion_row(0, 0, 0), BLOCK + 2);
        assert_eq!(b.completion_row(0, 2, 0), BLOCK + 2);
        assert_eq!(b.completion_row(0, 2, 1), BLOCK + 8);
        assert_eq!(b.prompt_row(1, 1), b.rows() - 2);
        let slots = s.read::<u32>(&b.step.slots).wait().unwrap();
        assert_eq!(slots[BLOCK + 3], 2 * BLOCK as u32 + 3, "the completion's first token follows the copied rows");
        let bad = Group { prompt: Prompt::from_tokens(vec![544]), completions: vec![] };
        assert!(TrainBatch::pack(&c, &d, &s, &[bad]).is_err());
        assert!(TrainBatch::pack(&c, &d, &s, &[Group::default()]).is_err());
    }
}
