//! Attention of the decoder and of the vision tower, and the pages it reads.

use super::{CONTEXT, Case, DECODING, GRID, IMAGES, Maker, PATCHES, ROWS, SEQUENCE, Work, case};
use crate::harness::operands::{paged, random};
use varft::device::DType;
use varft::input::Grid;
use varft::model::{Config, LayerShape, WindowPlan};
use varft::ops::attention::{paged_backward, paged_forward, varlen_backward, varlen_forward};
use varft::ops::kv_cache::{self, KvCache, Tokens};

/// Operations of a visible pair of a query and a key, for each float of a head: two products forward, and five backward,
/// which computes the scores a second time.
const FORWARD: usize = 4;
const BACKWARD: usize = 10;

pub(super) fn cases(c: &Config) -> Vec<Case> {
    let (text, vision) = (c.layer_shape(), c.vision.layer_shape());
    let plan = WindowPlan::new(&[Grid { t: 1, h: GRID, w: GRID }; IMAGES], c.vision.window_size);
    let mut all = causal(&text, "attention_causal", ROWS / SEQUENCE, SEQUENCE, SEQUENCE);
    all.extend(causal(&text, "attention_decode", DECODING, 1, CONTEXT));
    all.extend(packed(&vision, ["attention_windows", "attention_windows_backward"], plan.cu_window_seqlens));
    all.extend(packed(&vision, ["attention_full", "attention_full_backward"], plan.cu_seqlens));
    all.push(write_pages(&text));
    all
}

/// `[sequences, context, heads, kv heads, head]`: `queries` at the end of each sequence. The backward pass where there are
/// as many queries as tokens.
fn causal(t: &LayerShape, op: &'static str, n: usize, queries: usize, context: usize) -> Vec<Case> {
    let LayerShape { heads, kv_heads, head_dim, .. } = *t;
    let (width, stride, scale) = (t.q_width(), t.qkv_width(), t.scale());
    let rows = n * queries;
    let pairs = n * (0..queries).map(|i| context - queries + i + 1).sum::<usize>();
    let kv = 2 * n * context * t.kv_width();
    let shape = [n, context, heads, kv_heads, head_dim];
    let operands = move |d: &Maker| paged(&d.device, &vec![(queries, context); n], kv_heads, head_dim);
    let forward = Work::new(FORWARD * pairs * width, rows * width + kv, rows * width);
    let mut all = vec![case(op, &shape, forward, move |d| {
        let ((seg, cache, _), s, q) = (operands(d), d.stream(), d.random(rows * stride));
        let (out, lse) = (d.zeros(rows * width), d.zeros(rows * heads));
        move || {
            let layer = &cache.layers[0];
            paged_forward(&s, &q, stride, layer, &seg, heads, kv_heads, head_dim, scale, &out, Some(&lse));
        }
    })];
    if queries == context {
        // Queries, outputs, their gradient, keys, values and the sums for these go in.
        let work = Work::new(BACKWARD * pairs * width, 3 * rows * width + 2 * kv, rows * width + kv);
        all.push(case("attention_causal_backward", &shape, work, move |d| {
            let ((seg, cache, _), s, q) = (operands(d), d.stream(), d.random(rows * stride));
            let (out, lse) = (d.zeros(rows * width), d.zeros(rows * heads));
            let (dout, dq) = (d.random(rows * width), d.zeros(rows * stride));
            let dkv = KvCache::new(&d.device, DType::F32, 1, cache.blocks, kv_heads, head_dim);
            paged_forward(&s, &q, stride, &cache.layers[0], &seg, heads, kv_heads, head_dim, scale, &out, Some(&lse));
            move || {
                let (layer, dlayer) = (&cache.layers[0], &dkv.layers[0]);
                paged_backward(
                    &s, &q, stride, layer, &seg, heads, kv_heads, head_dim, scale, &out, &lse, &dout, &dq, dlayer,
                );
            }
        }));
    }
    all
}

/// `[images, patches, heads, head]`, forward and backward: pieces whose rows see each other.
fn packed(t: &LayerShape, [op, backward_op]: [&'static str; 2], cu: Vec<u32>) -> [Case; 2] {
    let LayerShape { heads, head_dim, .. } = *t;
    let (width, scale) = (t.q_width(), t.scale());
    let (rows, n) = (IMAGES * PATCHES, cu.len() - 1);
    let pairs: usize = cu.windows(2).map(|w| ((w[1] - w[0]) as usize).pow(2)).sum();
    let shape = [IMAGES, PATCHES, heads, head_dim];
    let (flops, backward_cu) = (pairs * width, cu.clone());
    [
        case(op, &shape, Work::new(FORWARD * flops, 3 * rows * width, rows * width), move |d| {
            let (s, cu, qkv) = (d.stream(), d.device.upload(&cu), d.random(3 * rows * width));
            let (out, lse) = (d.zeros(rows * width), d.zeros(rows * heads));
            move || varlen_forward(&s, &qkv, &cu, n, heads, head_dim, scale, false, &out, Some(&lse))
        }),
        case(backward_op, &shape, Work::new(BACKWARD * flops, 5 * rows * width, 3 * rows * width), move |d| {
            let (s, cu, qkv) = (d.stream(), d.device.upload(&backward_cu), d.random(3 * rows * width));
            let (out, lse) = (d.zeros(rows * width), d.zeros(rows * heads));
            let (dout, dqkv) = (d.random(rows * width), d.zeros(3 * rows * width));
            varlen_forward(&s, &qkv, &cu, n, heads, head_dim, scale, false, &out, Some(&lse));
            move || varlen_backward(&s, &qkv, &cu, n, heads, head_dim, scale, false, &out, &lse, &dout, &dqkv)
        }),
    ]
}

/// `[tokens, kv heads, head]`: keys and values of training's batch into pages.
fn write_pages(t: &LayerShape) -> Case {
    let LayerShape { kv_heads, head_dim, .. } = *t;
    let (stride, k, v) = (t.qkv_width(), t.q_width(), t.q_width() + t.kv_width());
    let floats = 2 * ROWS * t.kv_width();
    case("kv_cache_write", &[ROWS, kv_heads, head_dim], Work::new(0, floats, floats), move |d| {
        let (_, cache, _) = paged(&d.device, &[(ROWS, ROWS)], kv_heads, head_dim);
        let slots = d.device.upload(&(0..ROWS as u32).collect::<Vec<_>>());
        let (s, rows) = (d.stream(), random(&d.device, ROWS * stride));
        move || {
            let tokens = Tokens { rows: &rows, stride, k, v, slots: &slots, n: ROWS };
            kv_cache::write(&s, &cache.layers[0], &cache, tokens)
        }
    })
}
