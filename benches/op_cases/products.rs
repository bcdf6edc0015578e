//! Products with weights, alone and within the patch embedding and the loss.

use super::{Make, Maker, ids, made};
use varft::device::{Buffer, DType};
use varft::ops::linear::{self, Epilogue, Weight, packed_len};
use varft::ops::loss::{self, LossRows, Objective, Outputs, Workspace};
use varft::ops::patch_embed::{self, Geometry, INPUTS, Normalize};
use varft::ops::softmax::forbidden_words;
use varft::train::memory::logit_bytes;

pub(super) fn maker(op: &str, shape: &[usize]) -> Option<Make> {
    match op {
        "linear" => made(shape, forward),
        "linear_gated" => made(shape, gated),
        "linear_backward_input" => made(shape, backward_input),
        "linear_backward_weight" => made(shape, backward_weight),
        "linear_backward_bias" => made(shape, backward_bias),
        "patch_embed" => made(shape, patch_embed),
        "patch_embed_backward_weight" => made(shape, patch_embed_backward_weight),
        "logprobs" => made(shape, logprobs),
        "nll_forward_backward" => made(shape, |d, shape| update(d, shape, false)),
        "grpo_forward_backward" => made(shape, |d, shape| update(d, shape, true)),
        _ => None,
    }
}

/// Elements of a weight as it is stored.
fn stored(d: &Maker, n: usize, k: usize) -> usize {
    if d.device.packs_weights() { packed_len(n, k) } else { n * k }
}

fn weight(d: &Maker, n: usize, k: usize) -> Weight {
    Weight { data: d.random(stored(d, n, k)), n, k }
}

fn forward(d: &Maker, [m, k, n]: [usize; 3]) -> impl Fn() + use<> {
    let (s, x, w, y) = (d.stream(), d.random(m * k), weight(d, n, k), d.zeros(m * n));
    move || linear::forward(&s, &x, &w, Epilogue::None, &y, m)
}

fn gated(d: &Maker, [m, k, n]: [usize; 3]) -> impl Fn() + use<> {
    let (s, x, w, h) = (d.stream(), d.random(m * k), weight(d, 2 * n, k), d.zeros(m * n));
    let gate_up = d.zeros(if d.device.packs_weights() { 2 * m * n } else { 0 });
    move || linear::forward_gated(&s, &x, &w, None, &gate_up, &h, m)
}

fn backward_input(d: &Maker, [m, k, n]: [usize; 3]) -> impl Fn() + use<> {
    let (s, dy, w, dx) = (d.stream(), d.random(m * n), weight(d, n, k), d.zeros(m * k));
    move || linear::backward_input(&s, &dy, &w, &dx, m, false)
}

fn backward_weight(d: &Maker, [m, k, n]: [usize; 3]) -> impl Fn() + use<> {
    let (s, dy, x, dw) = (d.stream(), d.random(m * n), d.random(m * k), d.zeros_f32(stored(d, n, k)));
    move || linear::backward_weight(&s, &dy, &x, &dw, m)
}

fn backward_bias(d: &Maker, [m, n]: [usize; 2]) -> impl Fn() + use<> {
    let (s, dy, db) = (d.stream(), d.random(m * n), d.zeros_f32(n));
    move || linear::backward_bias(&s, &dy, &db, m)
}

/// Square images of any pixels.
fn images(d: &Maker, images: usize, side: usize) -> (Buffer, Vec<Geometry>, Normalize) {
    let one = Geometry { offset: 0, grid_h: side, grid_w: side };
    let pixels: Vec<u8> = (0..images * one.bytes()).map(|i| (i * 7919 % 251) as u8).collect();
    let all = (0..images).map(|i| Geometry { offset: i * one.bytes(), ..one }).collect();
    (d.device.upload(&pixels), all, Normalize::new([0.5; 3], [0.25; 3]))
}

fn patch_embed(d: &Maker, [n, side, outputs]: [usize; 3]) -> impl Fn() + use<> {
    let ((pixels, all, normalize), s, w) = (images(d, n, side), d.stream(), weight(d, outputs, INPUTS));
    let y = d.zeros(n * side * side * outputs);
    move || patch_embed::forward(&s, &pixels, &all, &normalize, &w, &y)
}

fn patch_embed_backward_weight(d: &Maker, [n, side, outputs]: [usize; 3]) -> impl Fn() + use<> {
    let ((pixels, all, normalize), s) = (images(d, n, side), d.stream());
    let (dy, dw) = (d.random(n * side * side * outputs), d.zeros_f32(stored(d, outputs, INPUTS)));
    move || patch_embed::backward_weight(&s, &pixels, &all, &normalize, &dy, &dw)
}

/// Every row is scored once.
fn scored(d: &Maker, rows: usize, h: usize, v: usize) -> (LossRows, Buffer, Workspace) {
    let each: Vec<u32> = (0..rows as u32).collect();
    let entries = LossRows::new(&d.device.stream(), &each, &ids(rows, v), &vec![1.0; rows]);
    let forbidden = d.device.zeros(DType::U32, forbidden_words(v));
    (entries, forbidden, Workspace::new(&d.device, v, h, usize::MAX, logit_bytes(d.device.float(), v)))
}

fn logprobs(d: &Maker, [m, h, v]: [usize; 3]) -> impl Fn() + use<> {
    let (s, hidden, head, logp) = (d.stream(), d.random(m * h), weight(d, v, h), d.zeros_f32(m));
    let (entries, forbidden, ws) = scored(d, m, h, v);
    move || loss::logprobs(&s, &hidden, &head, &entries, &forbidden, &ws, &logp, None)
}

fn update(d: &Maker, [m, h, v]: [usize; 3], grpo: bool) -> impl Fn() + use<> {
    let (s, hidden, head, results) = (d.stream(), d.random(m * h), weight(d, v, h), Outputs::new(&d.device, m));
    let (entries, forbidden, ws) = scored(d, m, h, v);
    let (old_logp, advantage, each) = (d.random_f32(m), d.random_f32(m), d.random_f32(m));
    let (dhidden, dhead) = (d.zeros(m * h), d.zeros_f32(stored(d, v, h)));
    move || {
        let (old_logp, advantage) = (&old_logp, &advantage);
        let objective = match grpo {
            true => Objective::Grpo { old_logp, advantage, clip_low: 0.2, clip_high: 0.28, kl: None },
            false => Objective::Nll,
        };
        let dhead = Some(&dhead);
        loss::forward_backward(
            &s, &hidden, &head, &entries, objective, &each, &forbidden, &ws, &results, &dhidden, dhead,
        );
    }
}
