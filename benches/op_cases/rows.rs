//! What goes over rows and reads and writes more than it computes.

use super::{Make, Maker, ids, made, random};
use varft::device::DType;
use varft::ops::adamw::{self, AdamW, Params};
use varft::ops::cast::cast;
use varft::ops::embedding::{self, Table};
use varft::ops::sample::{SampleParams, sample};
use varft::ops::softmax::forbidden_words;
use varft::ops::{gelu, rms_norm, rope, rows, swiglu};

const EPS: f32 = 1e-6;

pub(super) fn maker(op: &str, shape: &[usize]) -> Option<Make> {
    match op {
        "rms_norm" => made(shape, norm_forward),
        "rms_norm_backward" => made(shape, norm_backward),
        "rope" => made(shape, rotate),
        "rope_tables" => made(shape, tables),
        "swiglu" => made(shape, swiglu_forward),
        "swiglu_backward" => made(shape, swiglu_backward),
        "gelu" => made(shape, gelu_forward),
        "gelu_backward" => made(shape, gelu_backward),
        "embedding" => made(shape, embedding_forward),
        "embedding_backward" => made(shape, embedding_backward),
        "rows_gather" => made(shape, gather),
        "rows_scatter_add" => made(shape, scatter_add),
        "cast" => made(shape, round),
        "sample_greedy" => made(shape, |d, shape| sampler(d, shape, 0.0, 0, 1.0)),
        "sample_temperature" => made(shape, |d, shape| sampler(d, shape, 0.7, 0, 1.0)),
        "sample_top_k_50" => made(shape, |d, shape| sampler(d, shape, 1.0, 50, 1.0)),
        "sample_top_p_0.9" => made(shape, |d, shape| sampler(d, shape, 1.0, 0, 0.9)),
        "norm" => made(shape, norm),
        "adamw" => made(shape, step),
        _ => None,
    }
}

fn norm_forward(d: &Maker, [rows, cols]: [usize; 2]) -> impl Fn() + use<> {
    let n = rows * cols;
    let (s, x, w, y) = (d.stream(), d.random(n), d.random(cols), d.zeros(n));
    move || rms_norm::forward(&s, &x, &w, EPS, &y, rows, cols)
}

fn norm_backward(d: &Maker, [rows, cols]: [usize; 2]) -> impl Fn() + use<> {
    let n = rows * cols;
    let (s, x, w, dy) = (d.stream(), d.random(n), d.random(cols), d.random(n));
    let (dx, dw) = (d.zeros(n), d.zeros_f32(cols));
    move || rms_norm::backward(&s, &x, &w, EPS, &dy, &dx, Some(&dw), rows, cols)
}

fn rotate(d: &Maker, [rows, turned, held, hd]: [usize; 4]) -> impl Fn() + use<> {
    let (stride, s) = (held * hd, d.stream());
    let x = d.random(rows * stride);
    // A turn by one angle keeps the length, whatever number of times.
    let table = |value: f32| d.device.upload(&vec![value; rows * hd / 2]);
    let (cos, sin) = (table(0.8), table(0.6));
    move || rope::rotate(&s, &x, stride, 0, turned, hd, &cos, &sin, rows, false)
}

fn tables(d: &Maker, [rows, hd]: [usize; 2]) -> impl Fn() + use<> {
    let positions: Vec<u32> = (0..3 * rows).map(|i| (i % rows) as u32).collect();
    let (s, positions) = (d.stream(), d.device.upload(&positions));
    let (cos, sin) = (d.zeros_f32(rows * hd / 2), d.zeros_f32(rows * hd / 2));
    let [height, width] = [3 * hd / 16; 2];
    move || rope::mrope_tables(&s, &positions, [hd / 2 - height - width, height, width], 1e6, hd, &cos, &sin, rows)
}

fn swiglu_forward(d: &Maker, [rows, i]: [usize; 2]) -> impl Fn() + use<> {
    let (s, x, h) = (d.stream(), d.random(2 * rows * i), d.zeros(rows * i));
    move || swiglu::forward(&s, &x, &h, rows, i)
}

fn swiglu_backward(d: &Maker, [rows, i]: [usize; 2]) -> impl Fn() + use<> {
    let (s, x, dh, dx) = (d.stream(), d.random(2 * rows * i), d.random(rows * i), d.zeros(2 * rows * i));
    move || swiglu::backward(&s, &x, &dh, &dx, rows, i)
}

fn gelu_forward(d: &Maker, [rows, cols]: [usize; 2]) -> impl Fn() + use<> {
    let n = rows * cols;
    let (s, x, y) = (d.stream(), d.random(n), d.zeros(n));
    move || gelu::forward(&s, &x, &y, n)
}

fn gelu_backward(d: &Maker, [rows, cols]: [usize; 2]) -> impl Fn() + use<> {
    let n = rows * cols;
    let (s, x, dy, dx) = (d.stream(), d.random(n), d.random(n), d.zeros(n));
    move || gelu::backward(&s, &x, &dy, &dx, n)
}

fn embedding_forward(d: &Maker, [t, v, h]: [usize; 3]) -> impl Fn() + use<> {
    let (s, ids, table, y) = (d.stream(), d.device.upload(&ids(t, v)), d.random(v * h), d.zeros(t * h));
    move || embedding::forward(&s, &ids, Table::Rows(&table), &y, t, h)
}

fn embedding_backward(d: &Maker, [t, v, h]: [usize; 3]) -> impl Fn() + use<> {
    let (s, ids, dy, dtable) = (d.stream(), d.device.upload(&ids(t, v)), d.random(t * h), d.zeros_f32(v * h));
    move || embedding::backward(&s, &ids, &dy, Table::Rows(&dtable), t, h)
}

fn gather(d: &Maker, [n, w]: [usize; 2]) -> impl Fn() + use<> {
    let (s, from, index, to) = (d.stream(), d.random(n * w), d.device.upload(&ids(n, n)), d.zeros(n * w));
    move || rows::gather(&s, &from, &index, &to, n, w)
}

fn scatter_add(d: &Maker, [n, w]: [usize; 2]) -> impl Fn() + use<> {
    let (s, from, to) = (d.stream(), d.random(n * w), d.zeros(n * w));
    let index = d.device.upload(&(0..n as u32).rev().collect::<Vec<_>>());
    move || rows::scatter_add(&s, &from, &index, &to, n, w)
}

fn round(d: &Maker, [n]: [usize; 1]) -> impl Fn() + use<> {
    let (s, from, to) = (d.stream(), d.random_f32(n), d.device.alloc(DType::BF16, n));
    move || cast(&s, &from, &to, n)
}

fn sampler(d: &Maker, [b, v]: [usize; 2], temperature: f32, top_k: u32, top_p: f32) -> impl Fn() + use<> {
    let logits: Vec<f32> = random(b * v).into_iter().map(|x| 8.0 * x).collect();
    let ids: Vec<u64> = (0..b as u64).collect();
    let params = SampleParams {
        temperature: d.device.upload(&vec![temperature; b]),
        top_k: d.device.upload(&vec![top_k; b]),
        top_p: d.device.upload(&vec![top_p; b]),
        min_p: d.zeros_f32(b),
        seed: d.device.upload(&ids),
        stream_id: d.device.upload(&ids),
        position: d.device.zeros(DType::U32, b),
    };
    let (logits, forbidden) = (d.device.upload(&logits), d.device.zeros(DType::U32, forbidden_words(v)));
    let (s, tokens, logps) = (d.stream(), d.device.zeros(DType::U32, b), d.zeros_f32(b));
    move || sample(&s, &logits, &params, &forbidden, &tokens, &logps, b, v)
}

fn norm(d: &Maker, [n]: [usize; 1]) -> impl Fn() + use<> {
    let (s, g, norm) = (d.stream(), d.random_f32(n), d.zeros_f32(1));
    move || adamw::grad_norm(&s, &g, &norm)
}

fn step(d: &Maker, [n]: [usize; 1]) -> impl Fn() + use<> {
    let (s, p, g, m, v) = (d.stream(), d.random_f32(n), d.random_f32(n), d.zeros_f32(n), d.zeros_f32(n));
    let weights = (d.device.float() == DType::BF16).then(|| d.zeros(n));
    let hyper = AdamW { lr: 1e-6, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 };
    move || {
        let params = weights.as_ref().map_or(Params::Float(&p), |w| Params::Masters(&p, w));
        adamw::step(&s, params, &g, &m, &v, hyper, 1, 1.0);
    }
}
