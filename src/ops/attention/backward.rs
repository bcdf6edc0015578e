//! Backward: scores are recomputed from the log-sum-exp, a cut of keys at a time.
//!
//! With `P = exp(S - lse)`, `dP = dO V^T`, `D = rowsum(dO * O)` and `dS = scale * P * (dP - D)`: `dV = P^T dO`,
//! `dK = dS^T Q`, `dQ = dS K`. An item of work is one cut of one head for all segments that share pages: it visits
//! segments and tiles of queries in ascending order, so that the sums into a page have one order. The sums into `dQ` go
//! over cuts in ascending order: in place where cuts run one after the other, through partial results where cuts of a
//! sequence run side by side.

use super::KV_CUT;
use super::kernels::{Exponent, Product};
use super::tiles::{Call, Cut, PAGES, Source, Tile, with_scratch};
use crate::device::{Pool, SendPtr};
use crate::ops::kv_cache::BLOCK;
use crate::ops::linear::transpose::transpose;
use std::collections::HashMap;

/// The most floats that partial results take (256 MiB).
const PARTIAL: usize = 1 << 26;

/// The call, and where its operands are.
pub(super) struct Backward<'a> {
    pub call: Call<'a>,
    pub q: *const f32,
    pub q_row: usize,
    pub out: *const f32,
    pub lse: *const f32,
    pub dout: *const f32,
    /// In rows of `q_row`.
    pub dq: SendPtr<f32>,
    /// In pages as the keys, added to; or in rows as the keys, written.
    pub dk: SendPtr<f32>,
    pub dv: SendPtr<f32>,
}
// SAFETY: items write disjoint ranges (see `run`); everything else is read.
unsafe impl Sync for Backward<'_> {}

/// Segments that share pages, directly or through others, in ascending order.
struct Groups {
    members: Vec<Vec<usize>>,
    /// Whether some page is in two different cuts, so that cuts must not run side by side.
    tangled: bool,
}

/// Scratch of an item, in disjoint parts.
struct Scratch {
    /// Queries, output gradients and query gradients: `[rows, padded]`.
    q: *mut f32,
    dout: *mut f32,
    dq: *mut f32,
    /// Probabilities and score gradients: `[rows, KV_CUT]`.
    p: *mut f32,
    ds: *mut f32,
    /// `[rows]`: keys of the cut that a row sees.
    limits: *mut u32,
    /// Keys `[KV_CUT, padded]`, and values in pages of `[hd, BLOCK]`.
    keys: *mut f32,
    values: *mut f32,
    /// Gradients of keys and values that live in rows, in pages.
    dk: *mut f32,
    dv: *mut f32,
    /// What the source packs.
    pack: *mut f32,
}

impl Backward<'_> {
    /// Floats of an item's scratch.
    fn scratch_len(&self) -> usize {
        let (h, rows) = (&self.call.heads, self.call.heads.tile_rows());
        rows * (3 * h.padded + 2 * KV_CUT + 1) + 2 * KV_CUT * (h.padded + h.hd) + self.call.source.scratch(h)
    }

    /// # Safety
    /// `p` has [`Backward::scratch_len`] floats.
    unsafe fn scratch(&self, p: *mut f32) -> Scratch {
        let (h, rows) = (&self.call.heads, self.call.heads.tile_rows());
        let mut at = 0;
        let mut take = |n: usize| {
            at += n;
            // SAFETY: by contract.
            unsafe { p.add(at - n) }
        };
        let [q, dout, dq] = [(); 3].map(|()| take(rows * h.padded));
        let [p, ds] = [(); 2].map(|()| take(rows * KV_CUT));
        let [keys, dv] = [(); 2].map(|()| take(KV_CUT * h.padded));
        let [values, dk] = [(); 2].map(|()| take(KV_CUT * h.hd));
        let limits = take(rows).cast();
        Scratch { q, dout, dq, p, ds, limits, keys, values, dk, dv, pack: take(0) }
    }

    fn groups(&self) -> Groups {
        let segments = self.call.segments;
        let mut parent: Vec<usize> = (0..segments.len()).collect();
        fn root(parent: &mut [usize], mut i: usize) -> usize {
            while parent[i] != i {
                parent[i] = parent[parent[i]];
                i = parent[i];
            }
            i
        }
        let mut tangled = false;
        if let Source::Pages { .. } = self.call.source {
            let mut seen: HashMap<usize, (usize, usize)> = HashMap::new();
            for (i, s) in segments.iter().enumerate() {
                for block in 0..s.kv_len.div_ceil(BLOCK) {
                    let (first, place) = *seen.entry(self.call.source.page(s, block)).or_insert((i, block));
                    tangled |= place / PAGES != block / PAGES;
                    let (a, b) = (root(&mut parent, first), root(&mut parent, i));
                    parent[a.max(b)] = a.min(b);
                }
            }
        }
        let mut members = vec![Vec::new(); segments.len()];
        for i in 0..segments.len() {
            if segments[i].q_len > 0 {
                members[root(&mut parent, i)].push(i);
            }
        }
        members.retain(|m| !m.is_empty());
        Groups { members, tangled }
    }

    /// Runs the call. An item is (group, head, cut): two items never share a page, nor a row's place in `dq` or in one of
    /// the partial results. How many cuts run side by side changes nothing.
    ///
    /// # Safety
    /// Every range that the segments describe is there; what is written is used by nobody else.
    pub(super) unsafe fn run(&self, pool: &Pool) {
        let (h, segments) = (&self.call.heads, self.call.segments);
        let groups = self.groups();
        let cuts = segments.iter().map(|s| s.kv_len.div_ceil(KV_CUT)).max().unwrap_or(0);
        let items = groups.members.len() * h.hkv;
        let balanced =
            items >= 2 * pool.threads() || (groups.members.len() == 1 && items.is_multiple_of(pool.threads()));
        let rows = segments.iter().map(|s| s.q_row + s.q_len).max().unwrap_or(0);
        let width = h.hq() * h.hd;
        let abreast = if balanced || groups.tangled {
            1
        } else {
            let wanted = (2 * pool.threads()).div_ceil(items.max(1));
            wanted.min(cuts).min(1 + PARTIAL / (rows * width).max(1)).max(1)
        };
        let mut partial = vec![0f32; (abreast - 1) * rows * width];
        let partial = SendPtr(partial.as_mut_ptr());
        for wave in (0..cuts).step_by(abreast) {
            pool.run(items * abreast, |i| {
                let (group, head, lane) = (i / abreast / h.hkv, i / abreast % h.hkv, i % abreast);
                with_scratch(self.scratch_len(), |p| {
                    // SAFETY: by contract; lane l > 0 has part l - 1 of the partial results.
                    unsafe {
                        let s = self.scratch(p);
                        let (to, to_row) = match lane {
                            0 => (self.dq.get(), self.q_row),
                            l => (partial.get().add((l - 1) * rows * width), width),
                        };
                        let add = lane == 0 && wave > 0;
                        for &m in &groups.members[group] {
                            self.segment(m, head, wave + lane, &s, to, to_row, add);
                        }
                    }
                });
            });
            if abreast > 1 {
                pool.run(segments.len(), |i| {
                    for lane in 1..abreast.min(cuts - wave) {
                        let seg = &segments[i];
                        for row in seg.first_query(wave + lane)..seg.q_len {
                            if seg.kv_len <= (wave + lane) * KV_CUT {
                                break;
                            }
                            let row = seg.q_row + row;
                            // SAFETY: by contract; segments have different rows.
                            unsafe {
                                let from = partial.get().add(((lane - 1) * rows + row) * width);
                                let to = self.dq.get().add(row * self.q_row);
                                (0..width).for_each(|j| *to.add(j) += *from.add(j));
                            }
                        }
                    }
                });
            }
        }
    }

    /// One cut of one segment.
    unsafe fn segment(&self, m: usize, head: usize, cut: usize, s: &Scratch, to: *mut f32, to_row: usize, add: bool) {
        let Call { heads: h, segments, source, .. } = &self.call;
        let seg = &segments[m];
        let first = seg.first_query(cut);
        if cut * KV_CUT >= seg.kv_len || first >= seg.q_len {
            return;
        }
        // SAFETY: scratch parts are disjoint; the rest by contract.
        unsafe {
            let view = source.cut(h, seg, head, cut, s.pack);
            let (mut dk, mut dv) = ([std::ptr::null_mut(); PAGES], [std::ptr::null_mut(); PAGES]);
            for page in 0..view.len.div_ceil(BLOCK) {
                let n = (view.len - page * BLOCK).min(BLOCK);
                let keys = s.keys.add(page * BLOCK * h.padded);
                keys.write_bytes(0, BLOCK * h.padded);
                transpose(view.keys[page], BLOCK, h.hd, n, keys, h.padded);
                transpose(view.values[page], h.padded, n, h.hd, s.values.add(page * BLOCK * h.hd), BLOCK);
                (dk[page], dv[page]) = match source {
                    Source::Pages { .. } => {
                        let at = (source.page(seg, cut * PAGES + page) * h.hkv + head) * BLOCK;
                        (self.dk.get().add(at * h.hd), self.dv.get().add(at * h.padded))
                    }
                    Source::Rows { .. } => (s.dk.add(page * BLOCK * h.hd), s.dv.add(page * BLOCK * h.padded)),
                };
            }
            if let Source::Rows { .. } = source {
                s.dk.write_bytes(0, KV_CUT * h.hd);
                s.dv.write_bytes(0, KV_CUT * h.padded);
            }
            for first in (first..seg.q_len).step_by(h.tile_queries()) {
                let t = Tile { s: m, head, first, queries: h.tile_queries().min(seg.q_len - first) };
                self.tile(&t, cut, &view, s, &dk, &dv);
                self.put_dq(&t, s, to, to_row, add);
            }
            if let Source::Rows { row, .. } = source {
                for page in 0..view.len.div_ceil(BLOCK) {
                    let n = (view.len - page * BLOCK).min(BLOCK);
                    let at = (seg.q_row + cut * KV_CUT + page * BLOCK) * row + head * h.hd;
                    transpose(dk[page], BLOCK, h.hd, n, self.dk.get().add(at), *row);
                    for i in 0..n {
                        let to = self.dv.get().add(at + i * row);
                        std::ptr::copy_nonoverlapping(dv[page].add(i * h.padded), to, h.hd);
                    }
                }
            }
        }
    }

    /// One tile against one cut: adds to `dk` and `dv`, leaves the tile's part of `dQ` in the scratch.
    unsafe fn tile(
        &self,
        t: &Tile,
        cut: usize,
        view: &Cut,
        s: &Scratch,
        dk: &[*mut f32; PAGES],
        dv: &[*mut f32; PAGES],
    ) {
        let Call { kernels, heads: h, segments, .. } = &self.call;
        let (seg, rows, hq) = (&segments[t.s], t.rows(h), h.hq());
        let product = |p: Product| {
            // SAFETY: by contract.
            unsafe { (kernels.product)(&p) }
        };
        // SAFETY: by contract.
        unsafe {
            t.gather(h, seg, self.q, self.q_row, s.q);
            t.gather(h, seg, self.dout, hq * h.hd, s.dout);
            t.gather(h, seg, self.out, hq * h.hd, s.dq);
            let limits = std::slice::from_raw_parts_mut(s.limits, rows);
            t.limits(h, seg, cut, limits);
            let limits = &*limits;
            // Rows before this see nothing of the page.
            let start = |page: usize| limits.partition_point(|&l| l as usize <= page * BLOCK);
            let by_rows = |a, b: &*const f32, r: usize, page: usize, c: *mut f32| Product {
                a,
                a_row: h.padded,
                a_col: 1,
                m: rows - r,
                b,
                block: h.hd,
                b_row: BLOCK,
                next: std::ptr::null(),
                k: h.hd,
                limits: std::ptr::null(),
                c: c.add(r * KV_CUT + page * BLOCK),
                c_row: KV_CUT,
                n: BLOCK,
                accumulate: false,
            };
            let live = view.len.div_ceil(BLOCK);
            for page in 0..live {
                let r = start(page);
                let values = s.values.cast_const().add(page * BLOCK * h.hd);
                if r < rows {
                    product(by_rows(s.q.add(r * h.padded), &view.keys[page], r, page, s.p));
                    product(by_rows(s.dout.add(r * h.padded), &values, r, page, s.ds));
                }
            }
            let exponent = Exponent::new(h.scale);
            let padded = (limits[rows - 1] as usize).next_multiple_of(BLOCK);
            for (r, &limit) in limits.iter().enumerate().skip(start(0)) {
                let (row, head) = t.place(h, seg, r);
                let delta = (kernels.dot)(s.dout.add(r * h.padded), s.dq.add(r * h.padded), h.padded);
                let lse = *self.lse.add(row * hq + head);
                let (p, ds) = (s.p.add(r * KV_CUT), s.ds.add(r * KV_CUT));
                (kernels.softmax_backward)(p, ds, limit as usize, padded, exponent, lse, delta, h.scale);
            }
            for page in 0..live {
                let r = start(page);
                if r == rows {
                    break;
                }
                let (dout, ds) =
                    (s.dout.cast_const().add(r * h.padded), s.ds.cast_const().add(r * KV_CUT + page * BLOCK));
                product(Product {
                    a: s.p.add(r * KV_CUT + page * BLOCK),
                    a_row: 1,
                    a_col: KV_CUT,
                    m: (view.len - page * BLOCK).min(BLOCK),
                    b: &dout,
                    block: rows - r,
                    b_row: h.padded,
                    next: std::ptr::null(),
                    k: rows - r,
                    limits: std::ptr::null(),
                    c: dv[page],
                    c_row: h.padded,
                    n: h.padded,
                    accumulate: true,
                });
                product(Product {
                    a: s.q.add(r * h.padded),
                    a_row: 1,
                    a_col: h.padded,
                    m: h.hd,
                    b: &ds,
                    block: rows - r,
                    b_row: KV_CUT,
                    next: std::ptr::null(),
                    k: rows - r,
                    limits: std::ptr::null(),
                    c: dk[page],
                    c_row: BLOCK,
                    n: BLOCK,
                    accumulate: true,
                });
            }
            let (first, keys) = (start(0), s.keys.cast_const());
            product(Product {
                a: s.ds.add(first * KV_CUT),
                a_row: KV_CUT,
                a_col: 1,
                m: rows - first,
                b: &keys,
                block: KV_CUT,
                b_row: h.padded,
                next: std::ptr::null(),
                k: KV_CUT,
                limits: limits.as_ptr().add(first),
                c: s.dq.add(first * h.padded),
                c_row: h.padded,
                n: h.padded,
                accumulate: false,
            });
        }
    }

    /// Writes a tile's part of `dQ`, or adds it.
    unsafe fn put_dq(&self, t: &Tile, s: &Scratch, to: *mut f32, to_row: usize, add: bool) {
        let h = &self.call.heads;
        let seg = &self.call.segments[t.s];
        for r in 0..t.rows(h) {
            let (row, head) = t.place(h, seg, r);
            // SAFETY: by contract.
            unsafe {
                let (from, to) = (s.dq.add(r * h.padded), to.add(row * to_row + head * h.hd));
                if add {
                    (0..h.hd).for_each(|j| *to.add(j) += *from.add(j));
                } else {
                    std::ptr::copy_nonoverlapping(from, to, h.hd);
                }
            }
        }
    }
}
