//! Attention of the decoder and of the vision tower, and the pages it reads.

use super::{Make, Maker, made};
use varft::device::{DType, Device};
use varft::input::Grid;
use varft::model::WindowPlan;
use varft::ops::attention::{Segments, paged_backward, paged_forward, varlen_backward, varlen_forward};
use varft::ops::kv_cache::{self, BLOCK, KvCache, Tokens};

/// Pixels of a window's side, as the vision tower has them: 8 patches.
const WINDOW: usize = 112;

pub(super) fn maker(op: &str, shape: &[usize]) -> Option<Make> {
    match op {
        "attention_causal" => made(shape, |d, [n, c, hq, hkv, hd]| paged(d, [n, c, c, hq, hkv, hd])),
        "attention_causal_backward" => made(shape, backward),
        "attention_prefill" => made(shape, paged),
        "attention_decode" => made(shape, |d, [n, c, hq, hkv, hd]| paged(d, [n, 1, c, hq, hkv, hd])),
        "attention_windows" => made(shape, |d, shape| packed(d, shape, true)),
        "attention_windows_backward" => made(shape, |d, shape| packed_backward(d, shape, true)),
        "attention_full" => made(shape, |d, shape| packed(d, shape, false)),
        "attention_full_backward" => made(shape, |d, shape| packed_backward(d, shape, false)),
        "kv_cache_write" => made(shape, write),
        "kv_cache_gather" => made(shape, gather),
        "rope_into_pages" => made(shape, rotate_and_write),
        _ => None,
    }
}

fn scale(head_dim: usize) -> f32 {
    1.0 / (head_dim as f32).sqrt()
}

/// A cache of one layer with `pages` pages of random keys and values.
fn pages(d: &Maker, pages: usize, kv_heads: usize, head_dim: usize) -> KvCache {
    let mut cache = KvCache::new(&d.device, d.device.float(), 1, pages, kv_heads, head_dim);
    let layer = &mut cache.layers[0];
    (layer.k, layer.v) = (d.random(layer.k.len()), d.random(layer.v.len()));
    cache
}

/// `n` segments of so many queries at the end of a context, each with pages of its own.
fn segments(d: &Device, n: usize, queries: usize, context: usize) -> Segments {
    let stride = context.div_ceil(BLOCK);
    let starts: Vec<u32> = (0..=n).map(|i| (i * queries) as u32).collect();
    let tables: Vec<u32> = (0..(n * stride) as u32).collect();
    Segments {
        cu_seqlens_q: d.upload(&starts),
        kv_lens: d.upload(&vec![context as u32; n]),
        block_tables: d.upload(&tables),
        table_rows: d.upload(&(0..n as u32).collect::<Vec<_>>()),
        stride,
        n,
        rows: n * queries,
    }
}

fn paged(d: &Maker, [n, queries, context, hq, hkv, hd]: [usize; 6]) -> impl Fn() + use<> {
    let (rows, stride) = (n * queries, (hq + 2 * hkv) * hd);
    let (seg, cache) = (segments(&d.device, n, queries, context), pages(d, n * context.div_ceil(BLOCK), hkv, hd));
    let (s, q, out, lse) = (d.stream(), d.random(rows * stride), d.zeros(rows * hq * hd), d.zeros_f32(rows * hq));
    move || {
        let layer = &cache.layers[0];
        paged_forward(&s, &q, stride, layer, &seg, hq, hkv, hd, scale(hd), &out, Some(&lse));
    }
}

fn backward(d: &Maker, [n, context, hq, hkv, hd]: [usize; 5]) -> impl Fn() + use<> {
    let (rows, stride) = (n * context, (hq + 2 * hkv) * hd);
    let (seg, cache) = (segments(&d.device, n, context, context), pages(d, n * context.div_ceil(BLOCK), hkv, hd));
    let (s, q, out, lse) = (d.stream(), d.random(rows * stride), d.zeros(rows * hq * hd), d.zeros_f32(rows * hq));
    let (dout, dq) = (d.random(rows * hq * hd), d.zeros(rows * stride));
    let gradients = KvCache::new(&d.device, DType::F32, 1, cache.blocks, hkv, hd);
    let dkv = &gradients.layers[0];
    s.zero(&dkv.k);
    s.zero(&dkv.v);
    paged_forward(&s, &q, stride, &cache.layers[0], &seg, hq, hkv, hd, scale(hd), &out, Some(&lse));
    move || {
        let (layer, dkv) = (&cache.layers[0], &gradients.layers[0]);
        paged_backward(&s, &q, stride, layer, &seg, hq, hkv, hd, scale(hd), &out, &lse, &dout, &dq, dkv);
    }
}

/// Where the pieces whose rows see each other begin and end: windows, or whole images.
fn pieces(images: usize, side: usize, windows: bool) -> Vec<u32> {
    let plan = WindowPlan::new(&vec![Grid { t: 1, h: side, w: side }; images], WINDOW);
    if windows { plan.cu_window_seqlens } else { plan.cu_seqlens }
}

fn packed(d: &Maker, [images, side, heads, hd]: [usize; 4], windows: bool) -> impl Fn() + use<> {
    let (rows, width, cu) = (images * side * side, heads * hd, pieces(images, side, windows));
    let (s, n, cu, qkv) = (d.stream(), cu.len() - 1, d.device.upload(&cu), d.random(3 * rows * width));
    let (out, lse) = (d.zeros(rows * width), d.zeros_f32(rows * heads));
    move || varlen_forward(&s, &qkv, &cu, n, heads, hd, scale(hd), false, &out, Some(&lse))
}

fn packed_backward(d: &Maker, [images, side, heads, hd]: [usize; 4], windows: bool) -> impl Fn() + use<> {
    let (rows, width, cu) = (images * side * side, heads * hd, pieces(images, side, windows));
    let (s, n, cu, qkv) = (d.stream(), cu.len() - 1, d.device.upload(&cu), d.random(3 * rows * width));
    let (out, lse) = (d.zeros(rows * width), d.zeros_f32(rows * heads));
    let (dout, dqkv) = (d.random(rows * width), d.zeros(3 * rows * width));
    varlen_forward(&s, &qkv, &cu, n, heads, hd, scale(hd), false, &out, Some(&lse));
    move || varlen_backward(&s, &qkv, &cu, n, heads, hd, scale(hd), false, &out, &lse, &dout, &dqkv)
}

/// Keys and values of a batch into pages, from rows of so many heads.
fn write(d: &Maker, [n, held, hkv, hd]: [usize; 4]) -> impl Fn() + use<> {
    let (cache, stride) = (pages(d, n.div_ceil(BLOCK), hkv, hd), held * hd);
    let slots = d.device.upload(&(0..n as u32).collect::<Vec<_>>());
    let (s, rows) = (d.stream(), d.random(n * stride));
    move || {
        let tokens = Tokens { rows: &rows, stride, k: (held - 2 * hkv) * hd, v: (held - hkv) * hd, slots: &slots, n };
        kv_cache::write(&s, &cache.layers[0], &cache, tokens)
    }
}

/// The same with queries and keys turned on the way, by one angle, which keeps their length.
fn rotate_and_write(d: &Maker, [n, hq, hkv, hd]: [usize; 4]) -> impl Fn() + use<> {
    let (cache, stride) = (pages(d, n.div_ceil(BLOCK), hkv, hd), (hq + 2 * hkv) * hd);
    let slots = d.device.upload(&(0..n as u32).collect::<Vec<_>>());
    let (s, rows) = (d.stream(), d.random(n * stride));
    let table = |value: f32| d.device.upload(&vec![value; n * hd / 2]);
    let (cos, sin) = (table(0.8), table(0.6));
    move || {
        let tokens = Tokens { rows: &rows, stride, k: hq * hd, v: (hq + hkv) * hd, slots: &slots, n };
        kv_cache::rotate_and_write(&s, &cache.layers[0], &cache, tokens, hq, &cos, &sin)
    }
}

/// Gradients from their pages, in f32, into rows.
fn gather(d: &Maker, [n, held, hkv, hd]: [usize; 4]) -> impl Fn() + use<> {
    let mut cache = KvCache::new(&d.device, DType::F32, 1, n.div_ceil(BLOCK), hkv, hd);
    let layer = &mut cache.layers[0];
    (layer.k, layer.v) = (d.random_f32(layer.k.len()), d.random_f32(layer.v.len()));
    let (stride, slots) = (held * hd, d.device.upload(&(0..n as u32).collect::<Vec<_>>()));
    let (s, rows) = (d.stream(), d.zeros(n * stride));
    move || {
        let tokens = Tokens { rows: &rows, stride, k: (held - 2 * hkv) * hd, v: (held - hkv) * hd, slots: &slots, n };
        kv_cache::gather(&s, &cache.layers[0], &cache, tokens)
    }
}
