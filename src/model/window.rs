//! The order in which the vision tower reads an image's patches, and the windows its attention is cut into
//! (Qwen2.5-VL, arXiv 2502.13923, section 2.1.1).
//!
//! Patches come in groups of 2x2 (what the merger makes into one token). Groups are permuted so that those of one window
//! are neighbours: windows row by row, groups row by row inside, windows at the right and lower edge as small as they
//! fall. One image's groups stay together, so an image's result does not depend on its neighbours.

use crate::input::Grid;
use crate::ops::patch_embed::{MERGE, PATCH};

/// The layout of a few images that go through the vision tower together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WindowPlan {
    /// `[groups]`: which group (in row-major order of groups, image after image) stands at each place of the window order.
    pub window_index: Vec<u32>,
    /// `[windows + 1]`: where each window begins, in patches.
    pub cu_window_seqlens: Vec<u32>,
    /// `[images + 1]`: where each image begins, in patches.
    pub cu_seqlens: Vec<u32>,
    /// `[patches, 2]`: row and column of each patch in its image, in window order.
    pub pos_hw: Vec<u32>,
}

impl WindowPlan {
    /// `window_size`: side of a window in pixels.
    pub fn new(images: &[Grid], window_size: usize) -> WindowPlan {
        let side = window_size / MERGE / PATCH;
        let mut plan = WindowPlan { cu_window_seqlens: vec![0], cu_seqlens: vec![0], ..WindowPlan::default() };
        let (mut first_group, mut patches) = (0, 0);
        for image in images {
            let (rows, columns) = (image.h / MERGE, image.w / MERGE);
            for top in (0..rows).step_by(side) {
                for left in (0..columns).step_by(side) {
                    for y in top..rows.min(top + side) {
                        for x in left..columns.min(left + side) {
                            plan.window_index.push((first_group + y * columns + x) as u32);
                            for (dy, dx) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                                plan.pos_hw.extend([(MERGE * y + dy) as u32, (MERGE * x + dx) as u32]);
                            }
                            patches += MERGE * MERGE;
                        }
                    }
                    plan.cu_window_seqlens.push(patches as u32);
                }
            }
            first_group += rows * columns;
            plan.cu_seqlens.push(patches as u32);
        }
        plan
    }

    /// Patches of all images.
    pub fn patches(&self) -> usize {
        self.pos_hw.len() / 2
    }
    /// Tokens of all images.
    pub fn tokens(&self) -> usize {
        self.window_index.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn windows_are_row_major_and_ragged_at_the_edges() {
        // 3 x 5 groups in windows of 2 x 2 groups (56 pixels).
        let p = WindowPlan::new(&[Grid { t: 1, h: 6, w: 10 }], 56);
        assert_eq!(p.window_index, [0, 1, 5, 6, 2, 3, 7, 8, 4, 9, 10, 11, 12, 13, 14]);
        assert_eq!(p.cu_window_seqlens, [0, 16, 32, 40, 48, 56, 60]);
        assert_eq!(p.cu_seqlens, [0, 60]);
        // The ninth place holds group 4: first row of groups, last column.
        assert_eq!(p.pos_hw[64..72], [0, 8, 0, 9, 1, 8, 1, 9]);
    }

    proptest! {
        #[test]
        fn every_group_stands_once_and_images_do_not_mix(
            sizes in prop::collection::vec((1usize..12, 1usize..12), 1..4), side in 1usize..5,
        ) {
            let grids: Vec<Grid> = sizes.iter().map(|&(h, w)| Grid { t: 1, h: 2 * h, w: 2 * w }).collect();
            let all = WindowPlan::new(&grids, side * 28);
            let (mut groups, mut windows) = (0u32, vec![0u32]);
            for g in &grids {
                let one = WindowPlan::new(&[*g], side * 28);
                let n = g.tokens() as u32;
                let part = &all.window_index[groups as usize..(groups + n) as usize];
                prop_assert_eq!(part, one.window_index.iter().map(|i| i + groups).collect::<Vec<_>>());
                let mut sorted = one.window_index.clone();
                sorted.sort_unstable();
                prop_assert_eq!(sorted, (0..n).collect::<Vec<_>>());
                windows.extend(one.cu_window_seqlens[1..].iter().map(|c| c + 4 * groups));
                groups += n;
            }
            prop_assert_eq!(&all.cu_window_seqlens, &windows);
            prop_assert!(windows.windows(2).all(|w| w[0] < w[1]), "an empty window");
        }
    }
}
