//! The pages of a sequence, and what of them the device knows.

use super::blocks::Blocks;
use crate::model::TableEntry;
use std::ops::Deref;

/// A sequence's pages in order. While it runs it has a row of the device's block tables, which steps keep up to date.
#[derive(Default)]
pub(super) struct PageTable {
    pages: Vec<u32>,
    row: Option<u32>,
    /// The first so many pages are in the row.
    known: usize,
}

impl PageTable {
    pub fn push(&mut self, page: u32) {
        self.pages.push(page);
    }

    pub fn pop(&mut self) -> Option<u32> {
        let page = self.pages.pop();
        self.known = self.known.min(self.pages.len());
        page
    }

    /// Puts another page in the place of page `i`; returns the one that was there.
    pub fn replace(&mut self, i: usize, page: u32) -> u32 {
        self.known = self.known.min(i);
        std::mem::replace(&mut self.pages[i], page)
    }

    /// Takes the first `n` pages of another sequence, which keeps them too.
    pub fn share(&mut self, from: &PageTable, n: usize, blocks: &mut Blocks) {
        self.pages = from.pages[..n].to_vec();
        self.known = 0;
        self.pages.iter().for_each(|&b| blocks.retain(b));
    }

    /// Gives it a row, of which nothing is known.
    pub fn enter(&mut self, row: u32) {
        (self.row, self.known) = (Some(row), 0);
    }

    /// Takes its row back.
    pub fn leave(&mut self) -> Option<u32> {
        self.row.take()
    }

    /// The row, and what it has to be told now that it is to hold all pages: asked again, nothing more. `None`: it has none.
    pub fn update(&mut self) -> Option<(u32, impl Iterator<Item = TableEntry> + '_)> {
        let row = self.row?;
        let known = std::mem::replace(&mut self.known, self.pages.len());
        let new = (known..).zip(&self.pages[known..]);
        Some((row, new.map(move |(i, &page)| TableEntry { row, index: i as u32, page })))
    }
}

impl Deref for PageTable {
    type Target = [u32];
    fn deref(&self) -> &[u32] {
        &self.pages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_told_what_has_changed_and_nothing_twice() {
        let mut t = PageTable::default();
        let told = |t: &mut PageTable| {
            let (row, new) = t.update().unwrap();
            new.inspect(|e| assert_eq!(e.row, row)).map(|e| (e.row, e.index, e.page)).collect::<Vec<_>>()
        };
        assert!(t.update().is_none());
        t.push(7);
        t.push(8);
        t.enter(3);
        assert_eq!(told(&mut t), [(3, 0, 7), (3, 1, 8)]);
        assert_eq!(told(&mut t), []);
        t.push(9);
        assert_eq!(t.replace(1, 5), 8);
        assert_eq!(told(&mut t), [(3, 1, 5), (3, 2, 9)]);
        assert_eq!((t.pop(), t.pop()), (Some(9), Some(5)));
        t.push(9);
        assert_eq!(told(&mut t), [(3, 1, 9)]);
        assert_eq!((t.leave(), t.leave()), (Some(3), None));
        t.enter(0);
        assert_eq!(told(&mut t), [(0, 0, 7), (0, 1, 9)]);
    }
}
