//! What goes over rows and reads and writes more than it computes.

use super::{Case, DECODING, IMAGES, PATCHES, ROWS, Work, case};
use crate::harness::operands::ids;
use varft::Result;
use varft::device::{DType, Device};
use varft::model::{Config, LayerShape, ParamStore};
use varft::ops::adamw::{self, AdamW, Params};
use varft::ops::embedding::{self, Table};
use varft::ops::sample::{SampleParams, sample};
use varft::ops::softmax::forbidden_words;
use varft::ops::{gelu, rms_norm, rope, swiglu};

pub(super) fn cases(c: &Config, device: &Device) -> Result<Vec<Case>> {
    let (text, vision) = (c.layer_shape(), c.vision.layer_shape());
    let parameters = ParamStore::new(c, device, false)?.trainable().len();
    let mut all = Vec::from(norms(&text));
    all.extend([rotate("rope_text", &text, ROWS), rotate("rope_vision", &vision, IMAGES * PATCHES)]);
    all.extend(gates(c.intermediate_size));
    // The merger's: a quarter of the patches, four times as wide.
    all.extend(gelus(IMAGES * PATCHES / 4, 4 * c.vision.hidden_size));
    all.extend(embeddings(c.vocab_size, c.hidden_size));
    all.extend(samplers(c.vocab_size));
    all.push(optimizer(parameters));
    Ok(all)
}

/// `[rows, columns]`.
fn norms(t: &LayerShape) -> [Case; 2] {
    let (rows, cols, eps) = (ROWS, t.hidden, t.eps);
    let n = rows * cols;
    [
        case("rms_norm", &[rows, cols], Work::new(0, n, n), move |d| {
            let (s, x, w, y) = (d.stream(), d.random(n), d.random(cols), d.zeros(n));
            move || rms_norm::forward(&s, &x, &w, eps, &y, rows, cols)
        }),
        // dx is added to.
        case("rms_norm_backward", &[rows, cols], Work::new(0, 3 * n, n), move |d| {
            let (s, x, w, dy) = (d.stream(), d.random(n), d.random(cols), d.random(n));
            let (dx, dw) = (d.zeros(n), d.zeros(cols));
            move || rms_norm::backward(&s, &x, &w, eps, &dy, &dx, Some(&dw), rows, cols)
        }),
    ]
}

/// `[rows, heads that turn, head]`: queries and keys, in place, in rows that hold the values too.
fn rotate(op: &'static str, t: &LayerShape, rows: usize) -> Case {
    let (heads, head, stride) = (t.heads + t.kv_heads, t.head_dim, t.qkv_width());
    let n = rows * heads * head;
    case(op, &[rows, heads, head], Work::new(0, n + rows * head, n), move |d| {
        let (s, x) = (d.stream(), d.random(rows * stride));
        // A turn by one angle keeps the length, whatever number of times.
        let (cos, sin) =
            (d.device.upload(&vec![0.8f32; rows * head / 2]), d.device.upload(&vec![0.6f32; rows * head / 2]));
        move || rope::rotate(&s, &x, stride, 0, heads, head, &cos, &sin, rows, false)
    })
}

/// `[rows, intermediate]`.
fn gates(i: usize) -> [Case; 2] {
    let n = ROWS * i;
    [
        case("swiglu", &[ROWS, i], Work::new(0, 2 * n, n), move |d| {
            let (s, x, h) = (d.stream(), d.random(2 * n), d.zeros(n));
            move || swiglu::forward(&s, &x, &h, ROWS, i)
        }),
        case("swiglu_backward", &[ROWS, i], Work::new(0, 3 * n, 2 * n), move |d| {
            let (s, x, dh, dx) = (d.stream(), d.random(2 * n), d.random(n), d.zeros(2 * n));
            move || swiglu::backward(&s, &x, &dh, &dx, ROWS, i)
        }),
    ]
}

/// `[rows, columns]`.
fn gelus(rows: usize, cols: usize) -> [Case; 2] {
    let n = rows * cols;
    [
        case("gelu", &[rows, cols], Work::new(0, n, n), move |d| {
            let (s, x, y) = (d.stream(), d.random(n), d.zeros(n));
            move || gelu::forward(&s, &x, &y, n)
        }),
        case("gelu_backward", &[rows, cols], Work::new(0, 2 * n, n), move |d| {
            let (s, x, dy, dx) = (d.stream(), d.random(n), d.random(n), d.zeros(n));
            move || gelu::backward(&s, &x, &dy, &dx, n)
        }),
    ]
}

/// `[tokens, vocabulary, width]`.
fn embeddings(v: usize, h: usize) -> [Case; 2] {
    let n = ROWS * h;
    [
        case("embedding", &[ROWS, v, h], Work::new(0, n, n), move |d| {
            let (s, ids, table, y) = (d.stream(), d.device.upload(&ids(ROWS, v)), d.random(v * h), d.zeros(n));
            move || embedding::forward(&s, &ids, Table::Rows(&table), &y, ROWS, h)
        }),
        case("embedding_backward", &[ROWS, v, h], Work::new(0, 2 * n, n), move |d| {
            let (s, ids, dy, dtable) = (d.stream(), d.device.upload(&ids(ROWS, v)), d.random(n), d.zeros(v * h));
            move || embedding::backward(&s, &ids, &dy, Table::Rows(&dtable), ROWS, h)
        }),
    ]
}

/// `[rows, vocabulary]`: token and log-probability. Logits between -8 and 8, of which top-p keeps about a seventh.
fn samplers(v: usize) -> [Case; 4] {
    let b = DECODING;
    let sampler = move |op, temperature: f32, top_k: u32, top_p: f32| {
        case(op, &[b, v], Work::new(0, b * v, 2 * b), move |d| {
            let logits = d.random(b * v);
            // SAFETY: nobody else has this buffer yet.
            unsafe { logits.get_mut::<f32>() }.iter_mut().for_each(|x| *x *= 8.0);
            let ids: Vec<u64> = (0..b as u64).collect();
            let params = SampleParams {
                temperature: d.device.upload(&vec![temperature; b]),
                top_k: d.device.upload(&vec![top_k; b]),
                top_p: d.device.upload(&vec![top_p; b]),
                min_p: d.zeros(b),
                seed: d.device.upload(&ids),
                stream_id: d.device.upload(&ids),
                position: d.device.zeros(DType::U32, b),
            };
            let forbidden = d.device.zeros(DType::U32, forbidden_words(v));
            let (s, tokens, logps) = (d.stream(), d.device.zeros(DType::U32, b), d.zeros(b));
            move || sample(&s, &logits, &params, &forbidden, &tokens, &logps, b, v)
        })
    };
    [
        sampler("sample_greedy", 0.0, 0, 1.0),
        sampler("sample_temperature", 0.7, 0, 1.0),
        sampler("sample_top_k_50", 1.0, 50, 1.0),
        sampler("sample_top_p_0.9", 1.0, 0, 0.9),
    ]
}

/// `[parameters]`: the norm that clipping needs, and the step.
fn optimizer(n: usize) -> Case {
    case("norm_and_adamw", &[n], Work::new(0, 5 * n, 3 * n), move |d| {
        let (s, p, g, m, v, norm) = (d.stream(), d.random(n), d.random(n), d.zeros(n), d.zeros(n), d.zeros(1));
        let hyper = AdamW { lr: 1e-6, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 };
        move || {
            adamw::grad_norm(&s, &g, &norm);
            adamw::step(&s, Params::Float(&p), &g, &m, &v, hyper, 1, 1.0);
        }
    })
}
