//! Outputs of the vision tower, kept by what the image shows: an image is encoded once for a group of samples, for all
//! turns of a session, and for whoever else asks about it.
//!
//! One arena of rows (one row per image token, as wide as the decoder) is cut into pages; an image takes whole pages,
//! which need not be neighbours, because the decoder gathers rows by index. When no page is free the least recently used
//! image gives way. Every key holds the epoch of the vision tower's weights: where training leaves the tower as it is, images
//! stay for the whole run, and where it moves, what was encoded before is not found any more.

use crate::input::ImageHash;
use std::collections::{BTreeMap, HashMap};

/// Rows of one page.
pub(super) const PAGE: usize = 32;

struct Entry {
    pages: Box<[u32]>,
    used: u64,
}

/// The epoch of the vision weights, and the image.
type Key = (u64, ImageHash);

/// Which image lies where in the arena. The rows themselves are the runner's.
pub(super) struct VisionCache {
    entries: HashMap<Key, Entry>,
    /// Oldest first: (when it was used, which).
    by_age: BTreeMap<u64, Key>,
    /// Rises when the vision tower's weights change.
    epoch: u64,
    free: Vec<u32>,
    pages: usize,
    clock: u64,
    /// Entries used at or after this moment belong to the step being planned and stay.
    step: u64,
}

/// Whether an image's rows are there.
pub(super) enum Lookup {
    /// They are, or will be when this step runs.
    Ready,
    /// They are to be encoded in this step; their place is reserved.
    Encode,
    /// No room while this step's other images need theirs.
    Full,
}

impl VisionCache {
    /// A cache of `rows` rows, rounded up to whole pages.
    pub fn new(rows: usize) -> VisionCache {
        let pages = rows.div_ceil(PAGE);
        VisionCache {
            entries: HashMap::new(),
            by_age: BTreeMap::new(),
            epoch: 0,
            free: (0..pages as u32).rev().collect(),
            pages,
            clock: 0,
            step: 0,
        }
    }

    /// Rows in all.
    pub fn rows(&self) -> usize {
        self.pages * PAGE
    }

    /// Rows taken.
    pub fn used_rows(&self) -> usize {
        (self.pages - self.free.len()) * PAGE
    }

    /// Images kept.
    pub fn images(&self) -> usize {
        self.entries.len()
    }

    /// Begins planning a step: what it uses from now on cannot give way before the next call.
    pub fn begin_step(&mut self) {
        self.clock += 1;
        self.step = self.clock;
    }

    /// Looks for an image of `tokens` rows. With `encode`, makes room for it if it is not there.
    pub fn lookup(&mut self, image: &ImageHash, tokens: usize, encode: bool) -> Lookup {
        self.clock += 1;
        let key = (self.epoch, *image);
        if let Some(e) = self.entries.get_mut(&key) {
            self.by_age.remove(&e.used);
            e.used = self.clock;
            self.by_age.insert(self.clock, key);
            return Lookup::Ready;
        }
        let need = tokens.div_ceil(PAGE);
        if !encode {
            return Lookup::Full;
        }
        while self.free.len() < need {
            match self.by_age.first_key_value() {
                Some((&used, &oldest)) if used < self.step => {
                    self.by_age.remove(&used);
                    if let Some(e) = self.entries.remove(&oldest) {
                        self.free.extend(e.pages);
                    }
                }
                _ => return Lookup::Full,
            }
        }
        let pages = self.free.split_off(self.free.len() - need).into_boxed_slice();
        self.entries.insert(key, Entry { pages, used: self.clock });
        self.by_age.insert(self.clock, key);
        Lookup::Encode
    }

    /// The arena's rows of an image that [`VisionCache::lookup`] found or placed in this step: its tokens `from..to`.
    ///
    /// # Panics
    /// If the image is not there.
    pub fn rows_of(&self, image: &ImageHash, from: usize, to: usize) -> impl Iterator<Item = u32> + '_ {
        let pages = &self.entries[&(self.epoch, *image)].pages;
        (from..to).map(|i| pages[i / PAGE] * PAGE as u32 + (i % PAGE) as u32)
    }

    /// The vision tower's weights changed: all that is here was encoded by others, and its room is free at once.
    pub fn change_epoch(&mut self) {
        self.epoch += 1;
        for (_, e) in self.entries.drain() {
            self.free.extend(e.pages);
        }
        self.by_age.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(i: usize) -> ImageHash {
        let mut h = [0; 32];
        h[..8].copy_from_slice(&i.to_le_bytes());
        ImageHash(h)
    }

    #[test]
    fn the_least_recently_used_image_gives_way_but_never_one_of_this_step() {
        let mut c = VisionCache::new(4 * PAGE);
        c.begin_step();
        assert!(matches!(c.lookup(&id(0), 2 * PAGE, true), Lookup::Encode));
        assert!(matches!(c.lookup(&id(1), PAGE + 1, true), Lookup::Encode));
        assert!(matches!(c.lookup(&id(2), 1, true), Lookup::Full), "both are used by this step");
        c.begin_step();
        assert!(matches!(c.lookup(&id(0), 2 * PAGE, true), Lookup::Ready));
        assert!(matches!(c.lookup(&id(2), 1, true), Lookup::Encode));
        assert!(matches!(c.lookup(&id(1), PAGE + 1, false), Lookup::Full), "it was the oldest");
        assert!(matches!(c.lookup(&id(0), 2 * PAGE, false), Lookup::Ready));
        assert_eq!((c.images(), c.used_rows()), (2, 3 * PAGE));
        c.change_epoch();
        assert_eq!((c.images(), c.used_rows()), (0, 0));
        c.begin_step();
        assert!(matches!(c.lookup(&id(0), 2 * PAGE, true), Lookup::Encode), "its rows are of other weights");
    }

    #[test]
    fn no_two_images_share_a_row_and_memory_stays_bounded() {
        let mut c = VisionCache::new(10 * PAGE);
        for i in 0..500usize {
            c.begin_step();
            let mut rows = Vec::new();
            for (image, tokens) in [(i, 1 + i * 37 % 120), (i / 2, 1 + (i / 2) * 37 % 120)] {
                if !matches!(c.lookup(&id(image), tokens, true), Lookup::Full) {
                    let mine: Vec<u32> = c.rows_of(&id(image), 0, tokens).collect();
                    assert_eq!(mine.len(), tokens);
                    if i > 0 {
                        rows.extend(mine);
                    }
                }
            }
            let n = rows.len();
            rows.sort();
            rows.dedup();
            assert_eq!(rows.len(), n);
            assert!(rows.iter().all(|&r| (r as usize) < c.rows()));
            assert!(c.images() <= 10);
        }
    }
}
