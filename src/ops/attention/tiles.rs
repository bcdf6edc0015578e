//! What forward and backward share: segments, tiles of rows, and where the keys and values of a cut are.

use super::KV_CUT;
use super::kernels::Kernels;
use super::vector::LANES;
use crate::ops::kv_cache::BLOCK;
use crate::ops::linear::transpose::transpose;
use std::cell::RefCell;

/// Pages of a cut.
pub(super) const PAGES: usize = KV_CUT / BLOCK;
/// Rows (queries times the query heads that share a KV head) of a tile: a whole number of register tiles of any height.
const TILE_ROWS: usize = 96;

/// The heads of a call.
#[derive(Clone, Copy)]
pub(super) struct Heads {
    pub hkv: usize,
    /// Query heads that share a KV head.
    pub group: usize,
    pub hd: usize,
    /// `hd` padded to whole vectors.
    pub padded: usize,
    pub scale: f32,
}

impl Heads {
    pub(super) fn new(hq: usize, hkv: usize, hd: usize, scale: f32) -> Heads {
        assert!(hkv > 0 && hq.is_multiple_of(hkv), "{hq} query heads over {hkv} KV heads");
        assert!(hd > 0, "a head of no width");
        Heads { hkv, group: hq / hkv, hd, padded: hd.next_multiple_of(LANES), scale }
    }

    pub(super) fn hq(&self) -> usize {
        self.hkv * self.group
    }

    /// Queries in a full tile.
    pub(super) fn tile_queries(&self) -> usize {
        (TILE_ROWS / self.group).max(1)
    }

    /// The most rows a tile can have.
    pub(super) fn tile_rows(&self) -> usize {
        self.tile_queries() * self.group
    }
}

/// A run of queries and the keys that they may see.
#[derive(Clone, Copy)]
pub(super) struct Segment {
    /// First row of its queries.
    pub q_row: usize,
    pub q_len: usize,
    pub kv_len: usize,
    /// Its row of the block tables, where keys and values are in pages.
    pub table_row: usize,
    pub causal: bool,
}

impl Segment {
    /// How many keys query `i` sees.
    pub(super) fn visible(&self, i: usize) -> usize {
        if self.causal { self.kv_len - self.q_len + i + 1 } else { self.kv_len }
    }

    /// The first query that sees a key of `cut`.
    pub(super) fn first_query(&self, cut: usize) -> usize {
        if self.causal { (cut * KV_CUT).saturating_sub(self.kv_len - self.q_len) } else { 0 }
    }
}

/// Where keys and values are.
#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    /// In pages, through block tables of `stride` entries.
    Pages { k: &'a [f32], v: &'a [f32], tables: &'a [u32], stride: usize },
    /// In the rows of the queries, at these columns.
    Rows { x: &'a [f32], row: usize, k: usize, v: usize },
}

/// Keys and values of a cut of one head, a pointer a page. Past the segment's last key there may be anything.
#[derive(Clone, Copy)]
pub(super) struct Cut {
    /// Each `[hd, BLOCK]`.
    pub keys: [*const f32; PAGES],
    /// Each `[BLOCK, padded]`.
    pub values: [*const f32; PAGES],
    /// Keys of the segment in this cut.
    pub len: usize,
}

impl Source<'_> {
    /// Floats of scratch that [`Source::cut`] needs.
    pub(super) fn scratch(&self, h: &Heads) -> usize {
        match self {
            Source::Pages { .. } => 0,
            Source::Rows { .. } => KV_CUT * (h.hd + h.padded),
        }
    }

    /// The page of logical block `block` of a segment.
    pub(super) fn page(&self, segment: &Segment, block: usize) -> usize {
        match self {
            Source::Pages { tables, stride, .. } => tables[segment.table_row * stride + block] as usize,
            Source::Rows { .. } => block,
        }
    }

    /// The keys and values of cut `cut` of a segment, for one head.
    ///
    /// # Safety
    /// `scratch` has [`Source::scratch`] floats, which the result may point into; tables, lengths and rows are in bounds.
    pub(super) unsafe fn cut(&self, h: &Heads, seg: &Segment, head: usize, cut: usize, scratch: *mut f32) -> Cut {
        let len = (seg.kv_len - cut * KV_CUT).min(KV_CUT);
        let mut c = Cut { keys: [std::ptr::null(); PAGES], values: [std::ptr::null(); PAGES], len };
        for p in 0..len.div_ceil(BLOCK) {
            match *self {
                Source::Pages { k, v, .. } => {
                    let at = self.page(seg, cut * PAGES + p) * h.hkv + head;
                    c.keys[p] = k[at * h.hd * BLOCK..][..h.hd * BLOCK].as_ptr();
                    c.values[p] = v[at * h.padded * BLOCK..][..h.padded * BLOCK].as_ptr();
                }
                Source::Rows { x, row, k, v } => {
                    let n = (len - p * BLOCK).min(BLOCK);
                    let first = (seg.q_row + cut * KV_CUT + p * BLOCK) * row + head * h.hd;
                    // SAFETY: the scratch is there by contract; the rows are bounds-checked.
                    unsafe {
                        let keys = scratch.add(p * BLOCK * h.hd);
                        let values = scratch.add(KV_CUT * h.hd + p * BLOCK * h.padded);
                        transpose(x[first + k..].as_ptr(), row, n, h.hd, keys, BLOCK);
                        copy_rows(x[first + v..].as_ptr(), row, n, h, values);
                        (c.keys[p], c.values[p]) = (keys, values);
                    }
                }
            }
        }
        c
    }
}

/// Copies rows of `hd` floats to rows of `padded` floats, zeroing the padding.
///
/// # Safety
/// Both ranges are there.
pub(super) unsafe fn copy_rows(from: *const f32, from_row: usize, rows: usize, h: &Heads, to: *mut f32) {
    for i in 0..rows {
        // SAFETY: by contract.
        unsafe {
            let to = to.add(i * h.padded);
            std::ptr::copy_nonoverlapping(from.add(i * from_row), to, h.hd);
            to.add(h.hd).write_bytes(0, h.padded - h.hd);
        }
    }
}

/// A tile: queries `first..first + queries` of a segment, for the query heads of one KV head. Its rows are query-major.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    /// Index of the segment.
    pub s: usize,
    pub head: usize,
    pub first: usize,
    pub queries: usize,
}

impl Tile {
    pub(super) fn rows(&self, h: &Heads) -> usize {
        self.queries * h.group
    }

    /// Row of the query matrix and index of the query head, for row `r` of the tile.
    pub(super) fn place(&self, h: &Heads, seg: &Segment, r: usize) -> (usize, usize) {
        (seg.q_row + self.first + r / h.group, self.head * h.group + r % h.group)
    }

    /// Gathers the tile's rows of `x` (row length `row`, heads side by side) into `[rows, padded]`.
    ///
    /// # Safety
    /// Both ranges are there.
    pub(super) unsafe fn gather(&self, h: &Heads, seg: &Segment, x: *const f32, row: usize, to: *mut f32) {
        for q in 0..self.queries {
            let (r, head) = self.place(h, seg, q * h.group);
            // SAFETY: by contract.
            unsafe { copy_rows(x.add(r * row + head * h.hd), h.hd, h.group, h, to.add(q * h.group * h.padded)) };
        }
    }

    /// How many keys of `cut` each row sees.
    pub(super) fn limits(&self, h: &Heads, seg: &Segment, cut: usize, to: &mut [u32]) {
        for (q, rows) in to[..self.rows(h)].chunks_mut(h.group).enumerate() {
            rows.fill(seg.visible(self.first + q).saturating_sub(cut * KV_CUT).min(KV_CUT) as u32);
        }
    }
}

/// The constants of a call.
#[derive(Clone, Copy)]
pub(super) struct Call<'a> {
    pub kernels: &'static Kernels,
    pub heads: Heads,
    pub segments: &'a [Segment],
    pub source: Source<'a>,
}

/// Calls `f` with `len` floats of this thread's scratch, 64-byte aligned, holding anything.
pub(super) fn with_scratch<R>(len: usize, f: impl FnOnce(*mut f32) -> R) -> R {
    thread_local! { static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) } }
    SCRATCH.with_borrow_mut(|s| {
        if s.len() < len + LANES {
            s.resize(len + LANES, 0.0);
        }
        let p = s.as_mut_ptr();
        // SAFETY: at most 15 floats in, and 16 more than `len` are there.
        f(unsafe { p.add(p.align_offset(64)) })
    })
}
