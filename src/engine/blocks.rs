//! Pages of the KV cache: who holds them, and what they hold.
//!
//! A page is counted: a sequence holds one reference to each of its pages, and a fork shares them. A full page can be
//! *published* under a [`Key`] that stands for everything that decides its contents (the page before it, its tokens,
//! its images and where they lie, the weights); a later sequence with the same beginning then takes the page instead of
//! computing it. Published pages that nobody holds stay findable until their memory is needed, least recently used first.

use crate::input::ImageHash;
use std::collections::HashMap;

/// What a page's keys and values are a function of, in 128 bits of BLAKE3.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key([u8; 16]);

/// An image that overlaps a page: the hash of its contents, and the page's first token relative to the image's first.
pub(super) type ImageMark = (ImageHash, i64);

/// What lies in a page; compared on every hit, so that no collision of keys can hand out another text's page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Content {
    /// Key of the page before this one.
    pub parent: Option<Key>,
    /// Weight epoch under which it was computed.
    pub epoch: u64,
    pub tokens: Box<[u32]>,
    pub images: Box<[ImageMark]>,
}

impl Content {
    pub fn key(&self) -> Key {
        let mut h = blake3::Hasher::new();
        match self.parent {
            Some(Key(k)) => h.update(&[1]).update(&k),
            None => h.update(&[0]),
        };
        h.update(&self.epoch.to_le_bytes());
        h.update(&(self.tokens.len() as u64).to_le_bytes());
        h.update(bytemuck::cast_slice(&self.tokens));
        for (hash, at) in &self.images {
            h.update(&hash.0).update(&at.to_le_bytes());
        }
        let mut key = [0; 16];
        key.copy_from_slice(&h.finalize().as_bytes()[..16]);
        Key(key)
    }
}

/// End of the list of free pages.
const NIL: u32 = u32::MAX;

struct Page {
    refs: u32,
    published: Option<(Key, Content)>,
    /// Neighbours in the list of free pages, while `refs == 0`.
    prev: u32,
    next: u32,
}

/// The pages of one KV cache.
pub(super) struct Blocks {
    pages: Vec<Page>,
    by_key: HashMap<Key, u32>,
    /// Free pages, the next to be handed out first: those that hold nothing, then the published ones by age.
    first: u32,
    last: u32,
    free: usize,
    /// Free pages that are published.
    cached: usize,
}

impl Blocks {
    pub fn new(count: usize) -> Blocks {
        let mut b = Blocks {
            pages: Vec::with_capacity(count),
            by_key: HashMap::new(),
            first: NIL,
            last: NIL,
            free: 0,
            cached: 0,
        };
        for i in 0..count {
            b.pages.push(Page { refs: 0, published: None, prev: NIL, next: NIL });
            b.push_last(i as u32);
        }
        b
    }

    pub fn count(&self) -> usize {
        self.pages.len()
    }

    /// Pages that nobody holds; some may be published.
    pub fn free(&self) -> usize {
        self.free
    }

    /// Published pages that nobody holds.
    pub fn cached(&self) -> usize {
        self.cached
    }

    /// A page to write in, held once. What it had published is forgotten.
    pub fn alloc(&mut self) -> Option<u32> {
        let b = self.first;
        if b == NIL {
            return None;
        }
        self.unlink(b);
        if self.pages[b as usize].published.is_some() {
            self.cached -= 1;
        }
        self.withdraw(b);
        self.pages[b as usize].refs = 1;
        Some(b)
    }

    /// One more holder of a page that is held.
    pub fn retain(&mut self, b: u32) {
        let p = &mut self.pages[b as usize];
        assert!(p.refs > 0, "a page that nobody holds cannot be shared");
        p.refs += 1;
    }

    /// One holder less.
    pub fn release(&mut self, b: u32) {
        let p = &mut self.pages[b as usize];
        assert!(p.refs > 0, "a page was released twice");
        p.refs -= 1;
        if p.refs == 0 {
            if p.published.is_some() {
                self.cached += 1;
                self.push_last(b)
            } else {
                self.push_first(b)
            }
        }
    }

    /// Whether it has another holder: then it must be copied before it is written.
    pub fn shared(&self, b: u32) -> bool {
        self.pages[b as usize].refs > 1
    }

    /// The page with these contents, held once more; `None` if there is none, or if another's key collides.
    pub fn find(&mut self, key: Key, content: &Content) -> Option<u32> {
        let b = *self.by_key.get(&key)?;
        let p = &self.pages[b as usize];
        if !p.published.as_ref().is_some_and(|(_, c)| c == content) {
            return None;
        }
        if p.refs == 0 {
            self.cached -= 1;
            self.unlink(b);
        }
        self.pages[b as usize].refs += 1;
        Some(b)
    }

    /// Makes a full page findable. A page with the same contents that was published first keeps the key.
    pub fn publish(&mut self, b: u32, key: Key, content: Content) {
        assert!(self.pages[b as usize].refs > 0, "a page is published by a holder");
        if self.pages[b as usize].published.is_none() && !self.by_key.contains_key(&key) {
            self.by_key.insert(key, b);
            self.pages[b as usize].published = Some((key, content));
        }
    }

    /// Forgets what a page had published: before it is written again.
    pub fn withdraw(&mut self, b: u32) {
        if let Some((key, _)) = self.pages[b as usize].published.take() {
            self.by_key.remove(&key);
        }
    }

    /// Forgets all that was published: after a change of weights.
    pub fn withdraw_all(&mut self) {
        self.by_key.clear();
        self.cached = 0;
        self.pages.iter_mut().for_each(|p| p.published = None);
    }

    fn push_first(&mut self, b: u32) {
        let next = std::mem::replace(&mut self.first, b);
        (self.pages[b as usize].prev, self.pages[b as usize].next) = (NIL, next);
        if next == NIL {
            self.last = b
        } else {
            self.pages[next as usize].prev = b
        }
        self.free += 1;
    }

    fn push_last(&mut self, b: u32) {
        let prev = std::mem::replace(&mut self.last, b);
        (self.pages[b as usize].prev, self.pages[b as usize].next) = (prev, NIL);
        if prev == NIL {
            self.first = b
        } else {
            self.pages[prev as usize].next = b
        }
        self.free += 1;
    }

    fn unlink(&mut self, b: u32) {
        let Page { prev, next, .. } = self.pages[b as usize];
        if prev == NIL {
            self.first = next
        } else {
            self.pages[prev as usize].next = next
        }
        if next == NIL {
            self.last = prev
        } else {
            self.pages[next as usize].prev = prev
        }
        self.free -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn content(parent: Option<Key>, tokens: &[u32], images: &[ImageMark]) -> Content {
        Content { parent, epoch: 0, tokens: tokens.into(), images: images.into() }
    }

    #[test]
    fn everything_that_decides_a_page_is_in_its_key() {
        let base = content(None, &[1, 2], &[(ImageHash([7; 32]), -1)]);
        let all = [
            base.clone(),
            Content { parent: Some(base.key()), ..base.clone() },
            Content { epoch: 1, ..base.clone() },
            content(None, &[1, 3], &[(ImageHash([7; 32]), -1)]),
            content(None, &[1, 2], &[(ImageHash([8; 32]), -1)]),
            content(None, &[1, 2], &[(ImageHash([7; 32]), 0)]),
            content(None, &[1, 2], &[]),
        ];
        for (i, a) in all.iter().enumerate() {
            for (j, b) in all.iter().enumerate() {
                assert_eq!(a.key() == b.key(), i == j);
            }
        }
    }

    #[test]
    fn a_released_page_is_found_again_until_its_memory_is_needed() {
        let mut b = Blocks::new(2);
        let (p, q) = (b.alloc().unwrap(), b.alloc().unwrap());
        let (cp, cq) = (content(None, &[1], &[]), content(None, &[2], &[]));
        b.publish(p, cp.key(), cp.clone());
        b.publish(q, cq.key(), cq.clone());
        b.release(q);
        b.release(p);
        assert_eq!((b.free(), b.cached()), (2, 2));
        assert_eq!(b.find(cq.key(), &cq), Some(q));
        b.release(q); // now the younger one
        assert_eq!(b.alloc(), Some(p), "the least recently used page goes first");
        assert_eq!(b.find(cp.key(), &cp), None);
        assert_eq!(b.find(cq.key(), &cq), Some(q));
        assert_eq!(b.alloc(), None);
    }

    #[test]
    fn a_colliding_key_is_no_hit() {
        let mut b = Blocks::new(1);
        let p = b.alloc().unwrap();
        let (mine, other) = (content(None, &[1], &[]), content(None, &[2], &[]));
        b.publish(p, mine.key(), mine.clone());
        assert_eq!(b.find(mine.key(), &other), None);
        b.withdraw_all();
        assert_eq!(b.find(mine.key(), &mine), None, "the weights changed");
    }

    proptest! {
        /// Against a model that keeps reference counts in a map.
        #[test]
        fn counts_hold_under_any_sequence_of_calls(ops in proptest::collection::vec((0u8..5, 0usize..8), 1..200)) {
            let mut b = Blocks::new(5);
            let mut held: Vec<u32> = Vec::new();
            for (op, i) in ops {
                match op {
                    0 => match b.alloc() {
                        Some(p) => {
                            prop_assert!(!held.contains(&p), "a held page was handed out");
                            held.push(p);
                        }
                        None => {
                            let mut distinct = held.clone();
                            distinct.sort();
                            distinct.dedup();
                            prop_assert_eq!(distinct.len(), 5);
                        }
                    },
                    1 if !held.is_empty() => {
                        let p = held[i % held.len()];
                        b.retain(p);
                        held.push(p);
                    }
                    2 if !held.is_empty() => {
                        let p = held.swap_remove(i % held.len());
                        b.release(p);
                    }
                    3 if !held.is_empty() => {
                        let c = content(None, &[i as u32], &[]);
                        b.publish(held[i % held.len()], c.key(), c);
                    }
                    4 => {
                        let c = content(None, &[i as u32], &[]);
                        if let Some(p) = b.find(c.key(), &c) {
                            held.push(p);
                        }
                    }
                    _ => {}
                }
                let mut distinct = held.clone();
                distinct.sort();
                distinct.dedup();
                prop_assert_eq!(b.free(), 5 - distinct.len());
                prop_assert!(b.cached() <= b.free());
                for p in distinct {
                    prop_assert_eq!(b.shared(p), held.iter().filter(|&&q| q == p).count() > 1);
                }
            }
        }
    }
}
