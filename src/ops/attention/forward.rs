//! Forward: each tile of rows goes over the cuts of its keys in ascending order.

use super::KV_CUT;
use super::kernels::{Exponent, Product};
use super::tiles::{Call, PAGES, Source, Tile, with_scratch};
use crate::device::{Pool, SendPtr};
use crate::ops::kv_cache::BLOCK;

/// A tile's running result: `max` and `sum` per row, and the weighted values `[rows, padded]`.
struct State {
    max: *mut f32,
    sum: *mut f32,
    out: *mut f32,
}

impl State {
    /// Floats of a state of `rows` rows.
    fn len(rows: usize, padded: usize) -> usize {
        rows * (padded + 2)
    }
    /// # Safety
    /// `p` has [`State::len`] floats.
    unsafe fn at(p: *mut f32, rows: usize, padded: usize) -> State {
        // SAFETY: by contract.
        unsafe { State { out: p, max: p.add(rows * padded), sum: p.add(rows * (padded + 1)) } }
    }
}

/// The call, and where its operands are.
pub(super) struct Forward<'a> {
    pub call: Call<'a>,
    pub q: *const f32,
    pub q_row: usize,
    pub out: SendPtr<f32>,
    pub lse: Option<SendPtr<f32>>,
}
// SAFETY: each tile writes its own rows; everything else is read.
unsafe impl Sync for Forward<'_> {}

impl Forward<'_> {
    /// Runs the call. Whether a tile's cuts run one after the other or spread over threads changes nothing: a cut starts
    /// fresh, and cuts are combined in ascending order.
    ///
    /// # Safety
    /// Every range that the segments describe is there; `out` and `lse` are written by nobody else.
    pub(super) unsafe fn run(&self, pool: &Pool) {
        let h = &self.call.heads;
        let mut tiles = Vec::new();
        for (s, seg) in self.call.segments.iter().enumerate() {
            // The last tiles of a causal segment see the most keys: they go first.
            for first in (0..seg.q_len).step_by(h.tile_queries()).rev() {
                let queries = h.tile_queries().min(seg.q_len - first);
                tiles.extend((0..h.hkv).map(|head| Tile { s, head, first, queries }));
            }
        }
        let most = tiles.iter().map(|t| self.cuts(t)).max().unwrap_or(0);
        let even = tiles.len() >= 4 * pool.threads() || tiles.len().is_multiple_of(pool.threads());
        if even || most < 2 {
            // SAFETY: by contract; tiles are disjoint.
            pool.run(tiles.len(), |i| unsafe { self.whole(&tiles[i]) });
        } else {
            // SAFETY: by contract.
            unsafe { self.spread(pool, &tiles, most) };
        }
    }

    /// Cuts that a tile sees.
    fn cuts(&self, t: &Tile) -> usize {
        self.call.segments[t.s].visible(t.first + t.queries - 1).div_ceil(KV_CUT)
    }

    /// Floats of scratch that a cut of a tile needs.
    fn scratch(&self) -> usize {
        let (h, rows) = (&self.call.heads, self.call.heads.tile_rows());
        rows * (h.padded + KV_CUT + 1) + self.call.source.scratch(h)
    }

    /// One item per tile.
    unsafe fn whole(&self, t: &Tile) {
        let h = &self.call.heads;
        let rows = t.rows(h);
        let state = State::len(rows, h.padded);
        with_scratch(self.scratch() + 2 * state, |p| {
            // SAFETY: the scratch is cut into disjoint parts; the rest by contract.
            unsafe {
                let (total, one) = (State::at(p, rows, h.padded), State::at(p.add(state), rows, h.padded));
                let rest = p.add(2 * state);
                self.load(t, rest);
                self.clear(t, &total);
                for cut in 0..self.cuts(t) {
                    let next = if cut + 1 < self.cuts(t) { self.first_key(t, cut + 1) } else { std::ptr::null() };
                    self.cut(t, cut, rest, &one, next);
                    self.combine(t, cut, &total, &one);
                }
                self.finish(t, &total);
            }
        });
    }

    /// One item per tile and cut, then one per tile that combines: for few tiles on many threads.
    unsafe fn spread(&self, pool: &Pool, tiles: &[Tile], most: usize) {
        let h = &self.call.heads;
        let state = State::len(h.tile_rows(), h.padded);
        let mut parts = vec![0f32; tiles.len() * most * state];
        let parts = SendPtr(parts.as_mut_ptr());
        // SAFETY: each tile and cut has its own part; the rest by contract.
        let part = |i: usize, cut: usize, t: &Tile| unsafe {
            State::at(parts.get().add((i * most + cut) * state), t.rows(h), h.padded)
        };
        pool.run(tiles.len() * most, |n| {
            let (i, cut) = (n / most, n % most);
            let t = &tiles[i];
            if cut < self.cuts(t) {
                // SAFETY: as above.
                with_scratch(self.scratch(), |p| unsafe {
                    self.load(t, p);
                    self.cut(t, cut, p, &part(i, cut, t), std::ptr::null());
                });
            }
        });
        pool.run(tiles.len(), |i| {
            let t = &tiles[i];
            // SAFETY: as above.
            with_scratch(state, |p| unsafe {
                let total = State::at(p, t.rows(h), h.padded);
                self.clear(t, &total);
                for cut in 0..self.cuts(t) {
                    self.combine(t, cut, &total, &part(i, cut, t));
                }
                self.finish(t, &total);
            });
        });
    }

    /// Gathers a tile's queries to the front of its scratch.
    unsafe fn load(&self, t: &Tile, scratch: *mut f32) {
        // SAFETY: by contract.
        unsafe { t.gather(&self.call.heads, &self.call.segments[t.s], self.q, self.q_row, scratch) };
    }

    unsafe fn clear(&self, t: &Tile, total: &State) {
        let rows = t.rows(&self.call.heads);
        // SAFETY: by contract.
        unsafe {
            std::slice::from_raw_parts_mut(total.max, rows).fill(f32::NEG_INFINITY);
            total.sum.write_bytes(0, rows);
            total.out.write_bytes(0, rows * self.call.heads.padded);
        }
    }

    /// Where the keys of a cut begin, as far as they lie in pages.
    fn first_key(&self, t: &Tile, cut: usize) -> *const f32 {
        let h = &self.call.heads;
        match self.call.source {
            Source::Pages { k, .. } => {
                let page = self.call.source.page(&self.call.segments[t.s], cut * PAGES);
                k.as_ptr().wrapping_add((page * h.hkv + t.head) * h.hd * BLOCK)
            }
            Source::Rows { .. } => std::ptr::null(),
        }
    }

    /// One cut of a tile, from nothing. `next`: what is read after it, or null.
    unsafe fn cut(&self, t: &Tile, cut: usize, scratch: *mut f32, to: &State, next: *const f32) {
        let Call { kernels, heads: h, segments, source } = &self.call;
        let (seg, rows) = (&segments[t.s], t.rows(h));
        // SAFETY: the scratch is cut into disjoint parts (queries, scores, limits, packed keys); the rest by contract.
        unsafe {
            let scores = scratch.add(h.tile_rows() * h.padded);
            let limits = scores.add(h.tile_rows() * KV_CUT).cast::<u32>();
            let pack = limits.add(h.tile_rows()).cast::<f32>();
            let view = source.cut(h, seg, t.head, cut, pack);
            let limits = std::slice::from_raw_parts_mut(limits, rows);
            t.limits(h, seg, cut, limits);
            for page in 0..PAGES {
                let r = limits.partition_point(|&l| l as usize <= page * BLOCK);
                if r == rows {
                    break;
                }
                (kernels.product)(&Product {
                    a: scratch.add(r * h.padded),
                    a_row: h.padded,
                    a_col: 1,
                    m: rows - r,
                    b: &view.keys[page],
                    block: h.hd,
                    b_row: BLOCK,
                    next: view.keys.get(page + 1).copied().filter(|k| !k.is_null()).unwrap_or(view.values[0]),
                    k: h.hd,
                    limits: std::ptr::null(),
                    c: scores.add(r * KV_CUT + page * BLOCK),
                    c_row: KV_CUT,
                    n: BLOCK,
                    accumulate: false,
                });
            }
            let first = limits.partition_point(|&l| l == 0);
            let widest = (limits[rows - 1] as usize).next_multiple_of(super::vector::LANES);
            let exponent = Exponent::new(h.scale);
            for (r, &valid) in limits.iter().enumerate().skip(first) {
                let row = scores.add(r * KV_CUT);
                let (max, sum) = (kernels.softmax_cut)(row, valid as usize, widest, exponent);
                *to.max.add(r) = max;
                *to.sum.add(r) = sum;
            }
            (kernels.product)(&Product {
                a: scores.add(first * KV_CUT),
                a_row: KV_CUT,
                a_col: 1,
                m: rows - first,
                b: view.values.as_ptr(),
                block: BLOCK,
                b_row: h.padded,
                next,
                k: KV_CUT,
                limits: limits.as_ptr().add(first),
                c: to.out.add(first * h.padded),
                c_row: h.padded,
                n: h.padded,
                accumulate: false,
            });
        }
    }

    /// Adds a cut to what the cuts before it gave.
    unsafe fn combine(&self, t: &Tile, cut: usize, total: &State, one: &State) {
        let (h, k) = (&self.call.heads, self.call.kernels);
        let skip = self.call.segments[t.s].first_query(cut).saturating_sub(t.first) * h.group;
        for r in skip..t.rows(h) {
            // SAFETY: by contract.
            unsafe {
                let (was, new) = (*total.max.add(r), *one.max.add(r));
                let max = if was > new { was } else { new };
                let (keep, take) = ((k.exp2)(was - max), (k.exp2)(new - max));
                *total.max.add(r) = max;
                *total.sum.add(r) = *total.sum.add(r) * keep + *one.sum.add(r) * take;
                (k.combine)(total.out.add(r * h.padded), one.out.add(r * h.padded), h.padded, keep, take);
            }
        }
    }

    /// Divides by the sums, and writes the rows and their log-sum-exp.
    unsafe fn finish(&self, t: &Tile, total: &State) {
        let h = &self.call.heads;
        let seg = &self.call.segments[t.s];
        for r in 0..t.rows(h) {
            let (row, head) = t.place(h, seg, r);
            // SAFETY: by contract.
            unsafe {
                let (max, sum) = (*total.max.add(r), *total.sum.add(r));
                let inverse = 1.0 / sum;
                let to = self.out.get().add((row * h.hq() + head) * h.hd);
                for d in 0..h.hd {
                    *to.add(d) = *total.out.add(r * h.padded + d) * inverse;
                }
                if let Some(lse) = self.lse {
                    *lse.get().add(row * h.hq() + head) = (max + sum.log2()) * std::f32::consts::LN_2;
                }
            }
        }
    }
}
