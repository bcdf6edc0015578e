//! The paged key-value cache.
//!
//! A page holds [`BLOCK`] consecutive tokens of one sequence, for all KV heads of a layer. On the host's cores keys lie
//! transposed, so that attention reads one dimension of many keys in a vector, and values in rows padded to 16 floats; on a GPU
//! both lie as they come:
//!
//! - keys: `[page, kv_head, head_dim, BLOCK]`; on a GPU `[page, kv_head, BLOCK, head_dim]`
//! - values: `[page, kv_head, BLOCK, head_dim padded to 16]`; on a GPU `[page, kv_head, BLOCK, head_dim]`
//!
//! Gradients of keys and values live in pages of the same layout, always f32. A slot is `page * BLOCK + offset`. Slots that no
//! token was written to may hold anything; nothing reads them.

use super::linear::transpose::transpose;
use super::rope;
use super::rows::eights;
use crate::device::{Arg, Backend, Buffer, DType, Device, Gpu, Launch, Pool, SendPtr, Stream};

/// Tokens of a page.
pub const BLOCK: usize = 32;
/// The slot of a token that has no place in the cache: it is left out.
pub const NO_SLOT: u32 = u32::MAX;
/// Tokens that are moved together: few rows to read at a time, side by side, while the page stays in the first cache.
const RUN: usize = 8;

/// The pages of one layer, or their gradients.
#[derive(Clone)]
pub struct KvLayer {
    /// `[blocks, keys of a page]`.
    pub k: Buffer,
    /// `[blocks, values of a page]`.
    pub v: Buffer,
}

/// The pages of all layers. Cloning names the same pages.
#[derive(Clone)]
pub struct KvCache {
    /// One entry per decoder layer.
    pub layers: Vec<KvLayer>,
    /// Pages of each layer.
    pub blocks: usize,
    /// KV heads of a layer.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Elements of a token's values for one head, with the padding.
    value_dim: usize,
    /// What the layers' pages are parts of: `[layers]` of the keys, then the values.
    pages: Buffer,
}

impl KvCache {
    /// A cache of `blocks` pages for each of `layers` layers, of the device's [`float`](Device::float), or f32 for gradients. The
    /// pages hold anything.
    pub fn new(
        device: &Device,
        dtype: DType,
        layers: usize,
        blocks: usize,
        kv_heads: usize,
        head_dim: usize,
    ) -> KvCache {
        let value_dim = if device.packs_weights() { padded(head_dim) } else { head_dim };
        let [keys, values] = [head_dim, value_dim].map(|dim| blocks * kv_heads * BLOCK * dim);
        let pages = device.alloc(dtype, layers * (keys + values));
        let layer = |i: usize| KvLayer {
            k: pages.view(i * (keys + values), keys),
            v: pages.view(i * (keys + values) + keys, values),
        };
        KvCache { layers: (0..layers).map(layer).collect(), blocks, kv_heads, head_dim, value_dim, pages }
    }

    /// Bytes of one page in all of `layers` layers, for elements of type `dtype`.
    pub fn bytes_per_block(dtype: DType, layers: usize, kv_heads: usize, head_dim: usize) -> usize {
        layers * kv_heads * BLOCK * (head_dim + padded(head_dim)) * dtype.size()
    }

    /// Asserts that `layer` has this cache's shape.
    fn check(&self, layer: &KvLayer) {
        let slots = self.blocks * self.kv_heads * BLOCK;
        assert_eq!((layer.k.len(), layer.v.len()), (slots * self.head_dim, slots * self.value_dim));
    }
}

fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(16)
}

/// Tokens whose keys and values lie in rows, and their places in the cache.
#[derive(Clone, Copy)]
pub struct Tokens<'a> {
    /// `[n, stride]`.
    pub rows: &'a Buffer,
    /// Columns of a row.
    pub stride: usize,
    /// The column from which a row holds its token's keys, `[kv_heads, head_dim]`.
    pub k: usize,
    /// The same of its values.
    pub v: usize,
    /// u32 `[n]`, all different, but for [`NO_SLOT`].
    pub slots: &'a Buffer,
    /// How many there are.
    pub n: usize,
}

/// Where tokens' heads are in pages and in rows.
#[derive(Clone, Copy)]
struct Layout {
    kv_heads: usize,
    head_dim: usize,
    row_stride: usize,
    k_offset: usize,
    v_offset: usize,
}

impl Layout {
    /// For every head of the token at `slot`: where its keys and values begin in the row, and where in the pages.
    fn heads(self, slot: usize) -> impl Iterator<Item = [usize; 4]> {
        let (page, at) = (slot / BLOCK, slot % BLOCK);
        (0..self.kv_heads).map(move |head| {
            let (base, column) = (page * self.kv_heads + head, head * self.head_dim);
            let (k, v) = (base * self.head_dim * BLOCK + at, (base * BLOCK + at) * padded(self.head_dim));
            [self.k_offset + column, self.v_offset + column, k, v]
        })
    }
}

/// The pages and the rows of a call's tokens, checked against each other.
struct Move {
    layer: KvLayer,
    blocks: usize,
    rows: Buffer,
    slots: Buffer,
    layout: Layout,
}

impl Move {
    fn new(layer: &KvLayer, cache: &KvCache, tokens: Tokens<'_>) -> Move {
        cache.check(layer);
        let &KvCache { blocks, kv_heads, head_dim, .. } = cache;
        let Tokens { rows, stride, k, v, slots, n } = tokens;
        assert!(stride >= kv_heads * head_dim + k.max(v), "rows of {stride} are too short for keys and values");
        assert!(rows.len() >= n * stride, "{n} rows of {stride} in a buffer of {}", rows.len());
        let layout = Layout { kv_heads, head_dim, row_stride: stride, k_offset: k, v_offset: v };
        Move { layer: layer.clone(), blocks, rows: rows.clone(), slots: slots.view(0, n), layout }
    }

    /// Runs `f(first token, its slot, number)` over runs of up to [`RUN`] tokens in consecutive slots of a page, which
    /// together are all tokens that have a slot, on all threads; asserts that the slots are there.
    ///
    /// # Safety
    /// As [`Buffer::get`], of the slots.
    unsafe fn runs(&self, pool: &Pool, f: impl Fn(usize, usize, usize) + Sync) {
        // SAFETY: by contract.
        let (slots, blocks) = (unsafe { self.slots.get::<u32>() }, self.blocks);
        pool.run(slots.len().div_ceil(BLOCK), |i| {
            let mut token = i * BLOCK;
            let consecutive = |a: &u32, b: &u32| b.wrapping_sub(*a) == 1 && !(*b as usize).is_multiple_of(BLOCK);
            for run in slots[token..].chunks(BLOCK).take(1).flat_map(|s| s.chunk_by(consecutive)) {
                for run in run.chunks(RUN) {
                    let slot = run[0] as usize;
                    if run[0] != NO_SLOT {
                        assert!(slot < blocks * BLOCK, "slot {slot} of a cache of {blocks} pages");
                        f(token, slot, run.len());
                    }
                    token += run.len();
                }
            }
        });
    }

    /// Launches a kernel on these buffers.
    fn launch(&self, gpu: &Gpu, kernel: &str, buffers: [&Buffer; 4]) {
        let Layout { kv_heads, head_dim, row_stride, k_offset, v_offset } = self.layout;
        let n = self.slots.len();
        if n * kv_heads * head_dim > 0 {
            let sizes = [n, row_stride, k_offset, v_offset, kv_heads, head_dim].map(Arg::len);
            gpu.launch(kernel, eights(n * kv_heads, head_dim), &[&buffers.map(Arg::Buffer)[..], &sizes].concat());
        }
    }
}

/// Writes the keys and values of tokens into their pages. `layer` is one of `cache`'s, or has its shape.
pub fn write(s: &Stream, layer: &KvLayer, cache: &KvCache, tokens: Tokens<'_>) {
    let m = Move::new(layer, cache, tokens);
    match s.backend() {
        // SAFETY: launches run one after the other; tokens have different slots, all in bounds, as are the rows.
        Backend::Cpu(s) => s.launch(move |pool| unsafe {
            let layout @ Layout { head_dim: hd, row_stride: stride, .. } = m.layout;
            let (k, v) = (m.layer.k.get_mut::<f32>(), m.layer.v.get_mut::<f32>());
            let (k, v, rows) = (SendPtr(k.as_mut_ptr()), SendPtr(v.as_mut_ptr()), m.rows.get::<f32>());
            m.runs(pool, |i, slot, n| {
                let rows = rows[i * stride..].as_ptr();
                for [from_k, from_v, to_k, to_v] in layout.heads(slot) {
                    transpose(rows.add(from_k), stride, n, hd, k.get().add(to_k), BLOCK);
                    for j in 0..n {
                        let to = v.get().add(to_v + j * padded(hd));
                        to.copy_from_nonoverlapping(rows.add(from_v + j * stride), hd);
                    }
                }
            });
        }),
        Backend::Gpu(gpu) => m.launch(gpu, "kv_cache_write", [&m.rows, &m.slots, &m.layer.k, &m.layer.v]),
    }
}

/// [`rope::rotate`] of the queries and keys of tokens, in place, and [`write()`] of the turned keys and the values: on a GPU in one
/// pass. A row is `heads` heads of queries, then keys, then values; `cos` and `sin`: f32 `[n, head_dim / 2]`.
pub fn rotate_and_write(
    s: &Stream,
    layer: &KvLayer,
    cache: &KvCache,
    tokens: Tokens<'_>,
    heads: usize,
    cos: &Buffer,
    sin: &Buffer,
) {
    let (Tokens { rows, stride, k, v, n, .. }, &KvCache { kv_heads, head_dim: hd, .. }) = (tokens, cache);
    assert_eq!(
        (k, v, stride),
        (heads * hd, (heads + kv_heads) * hd, (heads + 2 * kv_heads) * hd),
        "rows of {heads} heads of queries and {kv_heads} each of keys and values"
    );
    match s.backend() {
        Backend::Cpu(_) => {
            rope::rotate(s, rows, stride, 0, heads + kv_heads, hd, cos, sin, n, false);
            write(s, layer, cache, tokens);
        }
        Backend::Gpu(gpu) => {
            let (m, pairs) = (Move::new(layer, cache, tokens), hd / 2);
            assert!(
                hd.is_multiple_of(2) && cos.len() >= n * pairs && sin.len() >= n * pairs,
                "rope tables of {n} rows"
            );
            if n * pairs > 0 {
                let buffers = [&m.rows, cos, sin, &m.slots, &m.layer.k, &m.layer.v].map(Arg::Buffer);
                let sizes = [n, heads, kv_heads, pairs].map(Arg::len);
                let shape = eights(n * (heads + 2 * kv_heads), pairs);
                gpu.launch("rope_into_pages", shape, &[&buffers[..], &sizes].concat());
            }
        }
    }
}

/// Reads the keys and values of tokens from their pages into rows: the inverse of [`write()`], for gradients.
///
/// Only the columns of keys and values are written.
pub fn gather(s: &Stream, layer: &KvLayer, cache: &KvCache, tokens: Tokens<'_>) {
    let m = Move::new(layer, cache, tokens);
    match s.backend() {
        // SAFETY: launches run one after the other; every token has its own row, in bounds.
        Backend::Cpu(s) => s.launch(move |pool| unsafe {
            let layout @ Layout { head_dim: hd, row_stride: stride, .. } = m.layout;
            let (k, v) = (m.layer.k.get::<f32>(), m.layer.v.get::<f32>());
            let rows = SendPtr(m.rows.get_mut::<f32>().as_mut_ptr());
            m.runs(pool, |i, slot, n| {
                let rows = rows.get().add(i * stride);
                for [to_k, to_v, from_k, from_v] in layout.heads(slot) {
                    transpose(k.as_ptr().add(from_k), BLOCK, hd, n, rows.add(to_k), stride);
                    for j in 0..n {
                        let from = v.as_ptr().add(from_v + j * padded(hd));
                        from.copy_to_nonoverlapping(rows.add(to_v + j * stride), hd);
                    }
                }
            });
        }),
        Backend::Gpu(gpu) => m.launch(gpu, "kv_cache_gather", [&m.layer.k, &m.layer.v, &m.slots, &m.rows]),
    }
}

/// Copies page `from` over another page `to` in every layer: a sequence that forks in the middle of a page gets its own.
pub fn copy_block(s: &Stream, cache: &KvCache, from: usize, to: usize) {
    for_pages(s, "kv_cache_copy_block", cache, from, to, |from, to| to.copy_from_slice(from));
}

/// Adds page `from` to page `to` in every layer, for caches of gradients: the backward of [`copy_block`] with the pages
/// swapped. Slots past the tokens that were copied get values that mean nothing.
pub fn add_block(s: &Stream, gradients: &KvCache, from: usize, to: usize) {
    for_pages(s, "kv_cache_add_block", gradients, from, to, |from, to| {
        to.iter_mut().zip(from).for_each(|(to, from)| *to += from)
    });
}

fn for_pages(s: &Stream, kernel: &str, cache: &KvCache, from: usize, to: usize, f: fn(&[f32], &mut [f32])) {
    assert!(from < cache.blocks && to < cache.blocks && from != to, "pages {from} and {to} of {}", cache.blocks);
    let pairs: Vec<(Buffer, Buffer)> = cache
        .layers
        .iter()
        .flat_map(|l| [&l.k, &l.v])
        .map(|b| {
            let page = b.len() / cache.blocks;
            (b.view(from * page, page), b.view(to * page, page))
        })
        .collect();
    match s.backend() {
        // SAFETY: launches run one after the other; the two pages are different.
        Backend::Cpu(s) => {
            s.launch(move |pool| pool.run(pairs.len(), |i| unsafe { f(pairs[i].0.get(), pairs[i].1.get_mut()) }))
        }
        Backend::Gpu(gpu) => {
            // Keys and values of a page are equally many, and so every buffer of a layer is a plane of `blocks` pages.
            let (page, planes) = (cache.kv_heads * BLOCK * cache.head_dim, 2 * cache.layers.len());
            let row = eights(1, page);
            let shape = Launch { grid: [row.grid[0], planes as u32, 1], ..row };
            let args = [Arg::U32(from as u32), Arg::U32(to as u32), Arg::len(cache.blocks), Arg::len(page)];
            if page * planes > 0 {
                gpu.launch(kernel, shape, &[&[Arg::Buffer(&cache.pages)][..], &args].concat());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{devices, noise};
    use super::*;

    #[test]
    fn what_is_written_is_gathered_and_pages_copy_and_add() {
        for (hd, device) in [(16, Device::cpu(2)), (24, Device::cpu_deferred(1))] {
            let (t, heads, s) = (70, 3, device.stream());
            let cache = KvCache::new(&device, DType::F32, 2, 4, heads, hd);
            assert_eq!(
                cache.layers.iter().map(|l| (l.k.len() + l.v.len()) * 4).sum::<usize>(),
                4 * KvCache::bytes_per_block(DType::F32, 2, heads, hd)
            );
            let (width, layer) = (heads * hd, &cache.layers[1]);
            let stride = 2 * width + 3;
            let x: Vec<f32> = (0..t * stride).map(|i| i as f32).collect();
            // Tokens lie backwards from the end of the cache.
            let slots: Vec<u32> = (0..t as u32).map(|i| 4 * BLOCK as u32 - 1 - i).collect();
            let (x, slots) = (device.upload(&x), device.upload(&slots));
            let tokens = Tokens { rows: &x, stride, k: 1, v: 2 + width, slots: &slots, n: t };
            write(&s, layer, &cache, tokens);
            let rows = device.zeros(DType::F32, t * stride);
            gather(&s, layer, &cache, Tokens { rows: &rows, ..tokens });
            let (got, want) = (s.read::<f32>(&rows).wait().unwrap(), s.read::<f32>(&x).wait().unwrap());
            for (i, (&g, w)) in got.iter().zip(want).enumerate() {
                let column = i % stride;
                let ours = (1..=width).contains(&column) || (2 + width..2 + 2 * width).contains(&column);
                assert_eq!(g, if ours { w } else { 0.0 });
            }
            // Token i of page 3 (slot 3 * BLOCK + i) is token BLOCK - 1 - i of the rows.
            copy_block(&s, &cache, 3, 0);
            add_block(&s, &cache, 3, 0);
            let one = device.upload(&[5u32]);
            let row = device.zeros(DType::F32, stride);
            gather(&s, layer, &cache, Tokens { rows: &row, slots: &one, n: 1, ..tokens });
            let row = s.read::<f32>(&row).wait().unwrap();
            assert_eq!(row[1], 2.0 * ((BLOCK - 6) * stride + 1) as f32);
            assert_eq!(row[2 + width], 2.0 * ((BLOCK - 6) * stride + 2 + width) as f32);
        }
    }

    #[test]
    fn every_element_goes_where_the_layout_says_however_slots_lie() {
        let (t, heads, hd, blocks) = (75, 2, 18, 4);
        let (width, slots) = (heads * hd, blocks * BLOCK);
        let stride = 2 * width + 5;
        // In a row, over the ends of pages; backwards; scattered; in runs that break.
        let orders: [fn(usize) -> usize; 4] =
            [|i| i + 21, |i| 127 - i, |i| i * 37 % 128, |i| (i / 5 * 15 + i % 5) % 128];
        for order in orders {
            for d in devices() {
                let (s, cache) = (d.stream(), KvCache::new(&d, DType::F32, 1, blocks, heads, hd));
                let (layer, x) = (&cache.layers[0], noise(t * stride, 1));
                // The last token has no place.
                let at: Vec<u32> = (0..t).map(|i| if i + 1 == t { NO_SLOT } else { order(i) as u32 }).collect();
                let (rows, at) = (d.upload(&x), d.upload(&at));
                write(&s, layer, &cache, Tokens { rows: &rows, stride, k: 2, v: 3 + width, slots: &at, n: t });
                let (k, v) = (s.read::<f32>(&layer.k).wait().unwrap(), s.read::<f32>(&layer.v).wait().unwrap());
                assert_eq!((k.len(), v.len()), (slots * width, slots * heads * padded(hd)));
                for (i, head, c) in (0..t - 1).flat_map(|i| (0..width).map(move |c| (i, c / hd, c % hd))) {
                    let (base, offset) = (order(i) / BLOCK * heads + head, order(i) % BLOCK);
                    let column = i * stride + head * hd + c;
                    assert_eq!(k[(base * hd + c) * BLOCK + offset], x[column + 2]);
                    assert_eq!(v[(base * BLOCK + offset) * padded(hd) + c], x[column + 3 + width]);
                }
            }
        }
    }
}
