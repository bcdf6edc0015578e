//! The paged key-value cache.
//!
//! A page holds [`BLOCK`] consecutive tokens of one sequence, for all KV heads of a layer. Keys lie transposed, so that
//! attention reads one dimension of many keys in a vector; values lie in rows padded to 16 floats:
//!
//! - keys: `[page, kv_head, head_dim, BLOCK]`
//! - values: `[page, kv_head, BLOCK, head_dim padded to 16]`
//!
//! Gradients of keys and values live in pages of the same layout. A slot is `page * BLOCK + offset`. Slots that no token
//! was written to may hold anything; nothing reads them.

use crate::device::{Backend, Buffer, DType, Device, Pool, SendPtr, Stream};

/// Tokens of a page.
pub const BLOCK: usize = 32;

/// The pages of one layer, or their gradients.
#[derive(Clone)]
pub struct KvLayer {
    /// `[blocks, kv_heads, head_dim, BLOCK]` f32.
    pub k: Buffer,
    /// `[blocks, kv_heads, BLOCK, head_dim padded to 16]` f32.
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
    /// Floats of a head.
    pub head_dim: usize,
}

impl KvCache {
    /// A cache of `blocks` pages for each of `layers` layers. The pages hold anything.
    pub fn new(device: &Device, layers: usize, blocks: usize, kv_heads: usize, head_dim: usize) -> KvCache {
        let page = |width: usize| device.alloc(DType::F32, blocks * kv_heads * BLOCK * width);
        let layers = (0..layers).map(|_| KvLayer { k: page(head_dim), v: page(padded(head_dim)) }).collect();
        KvCache { layers, blocks, kv_heads, head_dim }
    }

    /// Bytes of one page in all of `layers` layers.
    pub fn bytes_per_block(layers: usize, kv_heads: usize, head_dim: usize) -> usize {
        layers * kv_heads * BLOCK * (head_dim + padded(head_dim)) * DType::F32.size()
    }

    /// Asserts that `layer` has this cache's shape.
    fn check(&self, layer: &KvLayer) {
        let slots = self.blocks * self.kv_heads * BLOCK;
        assert_eq!((layer.k.len(), layer.v.len()), (slots * self.head_dim, slots * padded(self.head_dim)));
    }
}

fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(16)
}

/// Where one token's heads are in pages and in rows.
#[derive(Clone, Copy)]
struct Layout {
    kv_heads: usize,
    head_dim: usize,
    row_stride: usize,
    k_offset: usize,
    v_offset: usize,
}

impl Layout {
    /// Calls `f(column of the row, index into keys or values, true for keys)` for every element of a token.
    #[inline(always)]
    fn each(&self, slot: usize, mut f: impl FnMut(usize, usize, bool)) {
        let (page, at) = (slot / BLOCK, slot % BLOCK);
        for head in 0..self.kv_heads {
            let (base, column) = (page * self.kv_heads + head, head * self.head_dim);
            for d in 0..self.head_dim {
                f(self.k_offset + column + d, (base * self.head_dim + d) * BLOCK + at, true);
            }
            for d in 0..self.head_dim {
                f(self.v_offset + column + d, (base * BLOCK + at) * padded(self.head_dim) + d, false);
            }
        }
    }
}

/// The pages and the rows of a call's tokens, checked against each other.
struct Tokens {
    layer: KvLayer,
    blocks: usize,
    rows: Buffer,
    slots: Buffer,
    layout: Layout,
}

impl Tokens {
    fn new(
        layer: &KvLayer,
        cache: &KvCache,
        rows: &Buffer,
        row_stride: usize,
        k_offset: usize,
        v_offset: usize,
        slots: &Buffer,
        t: usize,
    ) -> Tokens {
        cache.check(layer);
        let &KvCache { blocks, kv_heads, head_dim, .. } = cache;
        assert!(
            row_stride >= kv_heads * head_dim + k_offset.max(v_offset),
            "rows of {row_stride} floats are too short for keys and values"
        );
        assert!(rows.len() >= t * row_stride, "{t} rows of {row_stride} in a buffer of {}", rows.len());
        let layout = Layout { kv_heads, head_dim, row_stride, k_offset, v_offset };
        Tokens { layer: layer.clone(), blocks, rows: rows.clone(), slots: slots.view(0, t), layout }
    }

    /// Runs `f(token, slot)` over all tokens, on all threads; asserts that the slots are there.
    ///
    /// # Safety
    /// As [`Buffer::get`], of the slots.
    unsafe fn each(&self, pool: &Pool, f: impl Fn(usize, usize) + Sync) {
        // SAFETY: by contract.
        let (slots, blocks) = (unsafe { self.slots.get::<u32>() }, self.blocks);
        pool.run(slots.len().div_ceil(BLOCK), |i| {
            for (j, &slot) in slots[i * BLOCK..].iter().take(BLOCK).enumerate() {
                assert!((slot as usize) < blocks * BLOCK, "slot {slot} of a cache of {blocks} pages");
                f(i * BLOCK + j, slot as usize);
            }
        });
    }
}

/// Writes the keys and values of `t` tokens into their pages.
///
/// `rows`: `[t, row_stride]` with a token's keys (`[kv_heads, head_dim]`) from column `k_offset` and its values from
/// column `v_offset`; `slots`: u32 `[t]`, all different. `layer` is one of `cache`'s, or has its shape.
pub fn write(
    s: &Stream,
    layer: &KvLayer,
    cache: &KvCache,
    rows: &Buffer,
    row_stride: usize,
    k_offset: usize,
    v_offset: usize,
    slots: &Buffer,
    t: usize,
) {
    let tokens = Tokens::new(layer, cache, rows, row_stride, k_offset, v_offset, slots, t);
    match s.backend() {
        // SAFETY: launches run one after the other; tokens have different slots, all in bounds.
        Backend::Cpu(s) => s.launch(move |pool| unsafe {
            let layout = tokens.layout;
            let (k, v) = (tokens.layer.k.get_mut::<f32>(), tokens.layer.v.get_mut::<f32>());
            let (k, v, rows) = (SendPtr(k.as_mut_ptr()), SendPtr(v.as_mut_ptr()), tokens.rows.get::<f32>());
            tokens.each(pool, |i, slot| {
                let row = &rows[i * layout.row_stride..][..layout.row_stride];
                layout.each(slot, |from, to, key| *(if key { k.get() } else { v.get() }).add(to) = row[from]);
            });
        }),
    }
}

/// Reads the keys and values of `t` tokens from their pages into rows: the inverse of [`write()`], for gradients.
///
/// Only the columns of keys and values are written.
pub fn gather(
    s: &Stream,
    layer: &KvLayer,
    cache: &KvCache,
    rows: &Buffer,
    row_stride: usize,
    k_offset: usize,
    v_offset: usize,
    slots: &Buffer,
    t: usize,
) {
    let tokens = Tokens::new(layer, cache, rows, row_stride, k_offset, v_offset, slots, t);
    match s.backend() {
        // SAFETY: launches run one after the other; every token has its own row, in bounds.
        Backend::Cpu(s) => s.launch(move |pool| unsafe {
            let layout = tokens.layout;
            let (k, v) = (tokens.layer.k.get::<f32>(), tokens.layer.v.get::<f32>());
            let rows = SendPtr(tokens.rows.get_mut::<f32>().as_mut_ptr());
            tokens.each(pool, |i, slot| {
                let row = rows.get().add(i * layout.row_stride);
                layout.each(slot, |to, from, key| *row.add(to) = if key { k[from] } else { v[from] });
            });
        }),
    }
}

/// Copies page `from` over another page `to` in every layer: a sequence that forks in the middle of a page gets its own.
pub fn copy_block(s: &Stream, cache: &KvCache, from: usize, to: usize) {
    for_pages(s, cache, from, to, |from, to| to.copy_from_slice(from));
}

/// Adds page `from` to page `to` in every layer, for caches of gradients: the backward of [`copy_block`] with the pages
/// swapped. Slots past the tokens that were copied get values that mean nothing.
pub fn add_block(s: &Stream, gradients: &KvCache, from: usize, to: usize) {
    for_pages(s, gradients, from, to, |from, to| to.iter_mut().zip(from).for_each(|(to, from)| *to += from));
}

fn for_pages(s: &Stream, cache: &KvCache, from: usize, to: usize, f: fn(&[f32], &mut [f32])) {
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
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_gathered_and_pages_copy_and_add() {
        for (hd, device) in [(16, Device::cpu(2)), (24, Device::cpu_deferred(1))] {
            let (t, heads, s) = (70, 3, device.stream());
            let cache = KvCache::new(&device, 2, 4, heads, hd);
            assert_eq!(
                cache.layers.iter().map(|l| (l.k.len() + l.v.len()) * 4).sum::<usize>(),
                4 * KvCache::bytes_per_block(2, heads, hd)
            );
            let (width, layer) = (heads * hd, &cache.layers[1]);
            let stride = 2 * width + 3;
            let x: Vec<f32> = (0..t * stride).map(|i| i as f32).collect();
            // Tokens lie backwards from the end of the cache.
            let slots: Vec<u32> = (0..t as u32).map(|i| 4 * BLOCK as u32 - 1 - i).collect();
            let (x, slots) = (device.upload(&x), device.upload(&slots));
            write(&s, layer, &cache, &x, stride, 1, 2 + width, &slots, t);
            let rows = device.zeros(DType::F32, t * stride);
            gather(&s, layer, &cache, &rows, stride, 1, 2 + width, &slots, t);
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
            gather(&s, layer, &cache, &row, stride, 1, 2 + width, &one, 1);
            let row = s.read::<f32>(&row).wait().unwrap();
            assert_eq!(row[1], 2.0 * ((BLOCK - 6) * stride + 1) as f32);
            assert_eq!(row[2 + width], 2.0 * ((BLOCK - 6) * stride + 2 + width) as f32);
        }
    }
}
