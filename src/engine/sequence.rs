//! One sequence of tokens and what of it lies in the KV cache.

use super::blocks::{Blocks, Content, ImageMark, Key};
use super::generation::Writer;
use super::sampling::{Sampling, StopStrings};
use super::table::PageTable;
use crate::input::{ImageSpan, Prompt};
use crate::model::positions::{self, Positions};
use std::sync::Arc;

/// What a sequence is sampling.
pub(super) struct Turn {
    /// Tells the draws of this turn from those of one that ended while its last draw was under way.
    pub id: u64,
    pub sampling: Arc<Sampling>,
    pub writer: Writer,
    /// Tokens of the sequence when the turn began.
    pub start: usize,
    pub stop_strings: StopStrings,
}

/// A session, or one sample of a request.
#[derive(Default)]
pub(super) struct Sequence {
    pub tokens: Vec<u32>,
    /// Spans counted from the sequence's first token.
    pub images: Vec<ImageSpan>,
    pub positions: Positions,
    /// M-RoPE position of the next token.
    pub next_position: u32,
    /// Pages, in order; together they hold `computed` tokens.
    pub blocks: PageTable,
    /// Keys of the first pages.
    keys: Vec<Key>,
    /// Pages that have been offered to other sequences.
    published: usize,
    /// Tokens whose keys and values are in the cache, or will be when what is planned has run.
    pub computed: usize,
    /// Tokens drawn by steps whose results are still to be read.
    pub unsettled: usize,
    /// Where the last draw stands among those of its step.
    pub draw: usize,
    /// `None`: parked, waiting for its owner.
    pub turn: Option<Turn>,
    /// It goes with its turn.
    pub ephemeral: bool,
    /// Waits for this sequence to compute the prompt that both share.
    pub leader: Option<u64>,
    /// When it was parked, while it is parked and holds pages.
    pub parked: Option<u64>,
}

impl Sequence {
    pub fn append(&mut self, prompt: &Prompt) {
        let base = self.tokens.len();
        let spans: Vec<positions::Span> = prompt
            .images
            .iter()
            .map(|s| positions::Span { offset: s.offset, grid_h: s.image.grid.h, grid_w: s.image.grid.w })
            .collect();
        self.next_position = positions::extend(self.next_position, prompt.tokens.len(), &spans, &mut self.positions);
        self.tokens.extend_from_slice(&prompt.tokens);
        self.images.extend(prompt.images.iter().map(|s| ImageSpan { offset: s.offset + base, ..s.clone() }));
    }

    /// Appends a sampled token.
    pub fn push(&mut self, token: u32) {
        self.tokens.push(token);
        for axis in &mut self.positions {
            axis.push(self.next_position);
        }
        self.next_position += 1;
    }

    /// Tokens, those under way included.
    pub fn total(&self) -> usize {
        self.tokens.len() + self.unsettled
    }

    /// Tokens to compute before the turn can draw (or, where it draws nothing, before it ends).
    pub fn target(&self) -> usize {
        match &self.turn {
            // A turn that draws nothing leaves the last token to the turn that will draw from it.
            Some(t) if t.sampling.max_tokens == 0 => self.total().saturating_sub(1),
            _ => self.total(),
        }
    }

    /// Tokens still to compute.
    pub fn remaining(&self) -> usize {
        self.target().saturating_sub(self.computed)
    }

    /// Tokens of this turn, those under way included.
    pub fn drawn(&self) -> usize {
        self.turn.as_ref().map_or(0, |t| self.total() - t.start)
    }

    /// A sequence with the same tokens that shares the pages of the first `computed` of them.
    pub fn fork(&self, blocks: &mut Blocks, block: usize) -> Sequence {
        let mut child = Sequence {
            tokens: self.tokens.clone(),
            images: self.images.clone(),
            positions: self.positions.clone(),
            next_position: self.next_position,
            ..Sequence::default()
        };
        child.share(self, self.computed, blocks, block);
        child
    }

    /// Takes the pages of the first `computed` tokens of a sequence that begins with the same tokens.
    pub fn share(&mut self, from: &Sequence, computed: usize, blocks: &mut Blocks, block: usize) {
        self.drop_pages(blocks);
        self.blocks.share(&from.blocks, computed.div_ceil(block), blocks);
        self.keys = from.keys[..from.keys.len().min(computed / block)].to_vec();
        self.published = from.published.min(computed / block);
        self.computed = computed;
    }

    /// Gives all pages back.
    pub fn drop_pages(&mut self, blocks: &mut Blocks) {
        // The last page first: the beginning of a text is the likeliest to be asked for again.
        while let Some(b) = self.blocks.pop() {
            blocks.release(b);
        }
        (self.computed, self.published) = (0, 0);
    }

    /// As [`Sequence::drop_pages`], and forgets what depends on the weights.
    pub fn change_epoch(&mut self, blocks: &mut Blocks) {
        self.drop_pages(blocks);
        self.keys.clear();
    }

    /// Gives the last page back.
    pub fn drop_last_page(&mut self, blocks: &mut Blocks, block: usize) {
        self.computed = self.computed.min(self.blocks.len().saturating_sub(1) * block);
        self.truncate_pages(blocks, block);
    }

    /// Forgets the last computed token, so that it can be computed again and drawn from.
    pub fn rewind(&mut self, blocks: &mut Blocks, block: usize) {
        if self.computed >= self.tokens.len() {
            self.computed = self.tokens.len().saturating_sub(1);
            self.truncate_pages(blocks, block);
        }
    }

    fn truncate_pages(&mut self, blocks: &mut Blocks, block: usize) {
        while self.blocks.len() > self.computed.div_ceil(block) {
            self.blocks.pop().into_iter().for_each(|b| blocks.release(b));
        }
        self.published = self.published.min(self.computed / block);
    }

    /// Takes published pages that hold this sequence's next tokens; returns how many tokens that saved. The last token is
    /// never taken: it has to be computed to draw from it. What was found may end within an image: the forward can begin
    /// anywhere, since it reads image rows from the vision cache.
    pub fn find_prefix(&mut self, blocks: &mut Blocks, block: usize, epoch: u64) -> usize {
        let before = self.computed;
        if before != self.blocks.len() * block {
            return 0; // amid a page of its own
        }
        let pages = self.tokens.len().saturating_sub(1) / block;
        while self.blocks.len() < pages {
            let i = self.blocks.len();
            let (key, content) = self.content(i, block, epoch);
            match blocks.find(key, &content) {
                Some(b) => self.blocks.push(b),
                None => break,
            }
        }
        self.computed = self.blocks.len() * block;
        self.published = self.blocks.len();
        self.computed - before
    }

    /// Offers the pages that have become full.
    pub fn publish(&mut self, blocks: &mut Blocks, block: usize, epoch: u64) {
        let full = self.computed.min(self.tokens.len()) / block;
        while self.published < full {
            let (key, content) = self.content(self.published, block, epoch);
            blocks.publish(self.blocks[self.published], key, content);
            self.published += 1;
        }
    }

    /// The page that tokens from `computed` on are written into is about to change.
    pub fn unpublish_last(&mut self, blocks: &mut Blocks, block: usize) {
        blocks.withdraw(self.blocks[self.computed / block]);
        self.published = self.published.min(self.computed / block);
    }

    /// Key and contents of full page `i`.
    fn content(&mut self, i: usize, block: usize, epoch: u64) -> (Key, Content) {
        while self.keys.len() < i {
            let key = self.content_of(self.keys.len(), block, epoch).key();
            self.keys.push(key);
        }
        let content = self.content_of(i, block, epoch);
        if self.keys.len() == i {
            self.keys.push(content.key());
        }
        (self.keys[i], content)
    }

    fn content_of(&self, i: usize, block: usize, epoch: u64) -> Content {
        let (start, end) = (i * block, (i + 1) * block);
        let images = self
            .spans(start, end)
            .map(|s| (s.image.hash, start as i64 - s.offset as i64))
            .collect::<Box<[ImageMark]>>();
        Content {
            parent: i.checked_sub(1).map(|p| self.keys[p]),
            epoch,
            tokens: self.tokens[start..end].into(),
            images,
        }
    }

    /// The images that have tokens in `[start, end)`.
    pub fn spans(&self, start: usize, end: usize) -> impl Iterator<Item = &ImageSpan> + '_ {
        let first = self.images.partition_point(|s| s.offset + s.len <= start);
        self.images[first..].iter().take_while(move |s| s.offset < end)
    }
}
