//! The host's side of one step: what runs, and the inputs that say so. Vectors are reused from step to step.

use super::sampling::Sampling;
use super::sequence::Sequence;
use crate::input::Image;
use crate::model::StepInput;

use std::sync::Arc;

/// One token to draw.
pub(super) struct Draw {
    pub sequence: u64,
    pub turn: u64,
    /// Row of the batch whose hidden state it is drawn from.
    pub row: u32,
    /// Index of the drawn token in its sequence: the noise is keyed by it.
    pub position: u32,
    pub sampling: Arc<Sampling>,
}

/// What one step computes. Rows are tokens, sequence after sequence.
#[derive(Default)]
pub(super) struct Plan {
    /// Pages to copy before anything else, in this order: (from, to).
    pub copies: Vec<(u32, u32)>,
    /// Images to encode before the decoder runs.
    pub encode: Vec<Arc<Image>>,
    /// Where their tokens go in the vision cache's arena, image after image.
    pub encode_rows: Vec<u32>,
    /// The decoder's rows.
    pub input: StepInput,
    pub draws: Vec<Draw>,
    /// Rows whose id is drawn by the step before, and which of its draws that is.
    pub patch_rows: Vec<u32>,
    pub patch_draws: Vec<u32>,
    /// Rows of prompts, and of what is computed again after preemption.
    pub prefill_tokens: usize,
}

impl Plan {
    pub fn clear(&mut self) {
        self.copies.clear();
        self.encode.clear();
        self.encode_rows.clear();
        self.input.clear();
        self.input.cu_seqlens_q.push(0);
        self.draws.clear();
        self.patch_rows.clear();
        self.patch_draws.clear();
        self.prefill_tokens = 0;
    }

    /// Whether there is nothing to submit.
    pub fn is_empty(&self) -> bool {
        self.rows() == 0 && self.copies.is_empty() && self.encode.is_empty()
    }

    pub fn rows(&self) -> usize {
        self.input.ids.len()
    }

    /// Whether every row is a sequence's only one, is drawn from, and shows no image.
    pub fn decodes(&self) -> bool {
        let (rows, i) = (self.rows(), &self.input);
        rows == i.kv_lens.len() && rows == self.draws.len() && i.image_rows.is_empty()
    }

    /// Appends the tokens `from..to` of a sequence whose pages are all there, and which has a row of the block tables. `image`: the id
    /// of image rows.
    pub fn push_rows(&mut self, s: &mut Sequence, from: usize, to: usize, block: usize, image: u32) {
        let (first, known, i) = (self.rows(), to.min(s.tokens.len()), &mut self.input);
        if from < known {
            i.ids.extend_from_slice(&s.tokens[from..known]);
            for (all, own) in i.positions.iter_mut().zip(&s.positions) {
                all.extend_from_slice(&own[from..known]);
            }
        }
        for _ in known.max(from)..to {
            // When a step is planned, at most one token is under way: the newest.
            self.patch_rows.push(i.ids.len() as u32);
            self.patch_draws.push(s.draw as u32);
            i.ids.push(0);
            i.positions.iter_mut().for_each(|all| all.push(s.next_position));
        }
        for span in s.spans(from, to) {
            let (a, b) = (from.max(span.offset), to.min(span.offset + span.len));
            i.image_rows.extend((a..b).map(|at| (first + at - from) as u32));
            i.ids[first + a - from..first + b - from].fill(image);
        }
        i.slots.extend((from..to).map(|at| s.blocks[at / block] * block as u32 + (at % block) as u32));
        i.cu_seqlens_q.push(i.ids.len() as u32);
        i.kv_lens.push(to as u32);
        if let Some((row, new)) = s.blocks.update() {
            i.table_rows.push(row);
            i.table_changes.extend(new);
        }
    }
}
