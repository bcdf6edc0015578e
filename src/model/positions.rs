//! M-RoPE positions (Qwen2-VL, arXiv 2409.12191, section 2.1): three indices for each token, for time, height and width.
//!
//! Text counts on with all three equal. An image that starts at position `p` has time `p`, height `p + row`, width
//! `p + column` of its merged patches, and the text after it resumes at `p + max(rows, columns)`.

use crate::ops::patch_embed::MERGE;

/// An image's place among a sequence's tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Index of its first token, counted from the first of the tokens it was given with.
    pub offset: usize,
    /// Height of its grid, in patches.
    pub grid_h: usize,
    /// Width of its grid, in patches.
    pub grid_w: usize,
}

impl Span {
    /// Tokens that the image takes.
    pub fn tokens(&self) -> usize {
        (self.grid_h / MERGE) * (self.grid_w / MERGE)
    }
}

/// Positions of a run of tokens: one vector for time, height and width each.
pub type Positions = [Vec<u32>; 3];

/// Appends the positions of `tokens` further tokens of a sequence whose next position is `next`, and returns the position
/// after them. `spans` are ascending, whole, and counted from the first of these tokens. The first call of a sequence
/// has `next` 0; decoding goes on from what the last call returned.
///
/// # Panics
/// If spans overlap or reach past the end.
pub fn extend(next: u32, tokens: usize, spans: &[Span], out: &mut Positions) -> u32 {
    let (mut at, mut next) = (0, next);
    for s in spans {
        next = text(next, at, s.offset, out);
        let (rows, columns) = (s.grid_h / MERGE, s.grid_w / MERGE);
        for row in 0..rows as u32 {
            for column in 0..columns as u32 {
                out[0].push(next);
                out[1].push(next + row);
                out[2].push(next + column);
            }
        }
        next += rows.max(columns) as u32;
        at = s.offset + s.tokens();
    }
    text(next, at, tokens, out)
}

/// Positions of the text tokens `[from, to)`; returns the position after them.
fn text(next: u32, from: usize, to: usize, out: &mut Positions) -> u32 {
    assert!(from <= to, "image spans overlap or reach past the tokens");
    let end = next + (to - from) as u32;
    for axis in out.iter_mut() {
        axis.extend(next..end);
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn text_resumes_after_the_longer_side_of_an_image() {
        let mut p = Positions::default();
        let spans = [Span { offset: 2, grid_h: 4, grid_w: 6 }];
        assert_eq!(extend(0, 10, &spans, &mut p), 7);
        assert_eq!(p[0], [0, 1, 2, 2, 2, 2, 2, 2, 5, 6]);
        assert_eq!(p[1], [0, 1, 2, 2, 2, 3, 3, 3, 5, 6]);
        assert_eq!(p[2], [0, 1, 2, 3, 4, 2, 3, 4, 5, 6]);
    }

    proptest! {
        #[test]
        fn appending_in_turns_equals_all_at_once(parts in prop::collection::vec((0usize..5, 1usize..4, 1usize..4, 0usize..5), 0..6)) {
            let (mut all, mut spans, mut len) = (Positions::default(), Vec::new(), 0);
            let (mut turns, mut next) = (Positions::default(), 0);
            for &(before, h, w, after) in &parts {
                let span = Span { offset: before, grid_h: 2 * h, grid_w: 2 * w };
                let n = before + h * w + after;
                spans.push(Span { offset: len + before, ..span });
                len += n;
                next = extend(next, n, &[span], &mut turns);
            }
            prop_assert_eq!(extend(0, len, &spans, &mut all), next);
            prop_assert_eq!(all, turns);
        }
    }
}
