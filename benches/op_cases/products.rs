//! Products with weights, alone and within the patch embedding and the loss.

use super::{Case, GRID, IMAGES, Maker, PATCHES, ROWS, SCORED, Work, case};
use crate::harness::operands::ids;
use varft::device::{Buffer, DType};
use varft::model::Config;
use varft::ops::linear::{self, Epilogue, Weight, packed_len};
use varft::ops::loss::{self, LossRows, Objective, Outputs, Workspace};
use varft::ops::patch_embed::{self, Geometry, INPUTS, Normalize, PATCH};
use varft::ops::softmax::forbidden_words;
use varft::train::memory::logit_bytes;

pub(super) fn cases(c: &Config) -> Vec<Case> {
    let (h, gate_up) = (c.hidden_size, 2 * c.intermediate_size);
    let mut all: Vec<Case> = [1, 8, 32, 300, ROWS].into_iter().map(|m| forward(m, h, gate_up)).collect();
    all.extend([forward(1024, 1024, 1024), backward_input(ROWS, h, gate_up), backward_weight(ROWS, h, gate_up)]);
    all.extend(patches(c.vision.hidden_size));
    all.extend(losses(h, c.vocab_size));
    all
}

fn weight(d: &Maker, n: usize, k: usize) -> Weight {
    Weight { data: d.random(packed_len(n, k)), n, k }
}

/// `[rows, inputs, outputs]`, as of all three.
fn forward(m: usize, k: usize, n: usize) -> Case {
    case("linear", &[m, k, n], Work::new(2 * m * k * n, m * k + k * n, m * n), move |d| {
        let (s, x, w, y) = (d.stream(), d.random(m * k), weight(d, n, k), d.zeros(m * n));
        move || linear::forward(&s, &x, &w, Epilogue::None, &y, m)
    })
}

fn backward_input(m: usize, k: usize, n: usize) -> Case {
    case("linear_backward_input", &[m, k, n], Work::new(2 * m * k * n, m * n + k * n, m * k), move |d| {
        let (s, dy, w, dx) = (d.stream(), d.random(m * n), weight(d, n, k), d.zeros(m * k));
        move || linear::backward_input(&s, &dy, &w, &dx, m, false)
    })
}

fn backward_weight(m: usize, k: usize, n: usize) -> Case {
    case("linear_backward_weight", &[m, k, n], Work::new(2 * m * k * n, m * (n + k) + k * n, k * n), move |d| {
        let (s, dy, x, dw) = (d.stream(), d.random(m * n), d.random(m * k), d.zeros(packed_len(n, k)));
        move || linear::backward_weight(&s, &dy, &x, &dw, m)
    })
}

/// `[images, patches, outputs]`. Pixels count as what they are, bytes.
fn patches(n: usize) -> [Case; 2] {
    let rows = IMAGES * PATCHES;
    let bytes = rows * PATCH * PATCH * 3;
    let shape = [IMAGES, PATCHES, n];
    let images = move |d: &Maker| {
        let pixels: Buffer = d.device.upload(&(0..bytes).map(|i| (i * 7919 % 251) as u8).collect::<Vec<_>>());
        let one = Geometry { offset: 0, grid_h: GRID, grid_w: GRID };
        let all: Vec<_> = (0..IMAGES).map(|i| Geometry { offset: i * one.bytes(), ..one }).collect();
        (pixels, all, Normalize::new([0.5; 3], [0.25; 3]))
    };
    let flops = 2 * rows * INPUTS * n;
    let (pixels, weights) = (bytes / 4, INPUTS * n);
    [
        case("patch_embed", &shape, Work::new(flops, pixels + weights, rows * n), move |d| {
            let ((pixels, all, normalize), s, w, y) = (images(d), d.stream(), weight(d, n, INPUTS), d.zeros(rows * n));
            move || patch_embed::forward(&s, &pixels, &all, &normalize, &w, &y)
        }),
        case("patch_embed_backward_weight", &shape, Work::new(flops, pixels + rows * n + weights, weights), move |d| {
            let ((pixels, all, normalize), s) = (images(d), d.stream());
            let (dy, dw) = (d.random(rows * n), d.zeros(packed_len(n, INPUTS)));
            move || patch_embed::backward_weight(&s, &pixels, &all, &normalize, &dy, &dw)
        }),
    ]
}

/// `[rows, inputs, vocabulary]`: the head's product and what follows. The logits, which need not exist all at once, are
/// no work that must be done in memory.
fn losses(h: usize, v: usize) -> [Case; 3] {
    let m = SCORED;
    let shape = [m, h, v];
    let product = 2 * m * h * v;
    let rows = move |d: &Maker| LossRows::new(&d.device, &ids_of(m), &ids(m, v), &vec![1.0; m]);
    let workspace = move |d: &Maker| Workspace::new(&d.device, v, h, usize::MAX, logit_bytes(d.device.float(), v));
    let forbidden = move |d: &Maker| d.device.zeros(DType::U32, forbidden_words(v));
    let update = move |name, grpo: bool| {
        // The weights, their gradients and the rows' go in, the gradients come out.
        let work = Work::new(3 * product, 2 * h * (m + v), h * (m + v));
        case(name, &shape, work, move |d| {
            let (s, hidden, head, entries) = (d.stream(), d.random(m * h), weight(d, v, h), rows(d));
            let (forbidden, ws, results) = (forbidden(d), workspace(d), Outputs::new(&d.device, m));
            let (old_logp, advantage, each) = (d.random(m), d.random(m), d.random(m));
            let (dhidden, dhead) = (d.zeros(m * h), d.zeros(packed_len(v, h)));
            move || {
                let objective = match grpo {
                    true => Objective::Grpo {
                        old_logp: &old_logp,
                        advantage: &advantage,
                        clip_low: 0.2,
                        clip_high: 0.28,
                        kl: None,
                    },
                    false => Objective::Nll,
                };
                let dhead = Some(&dhead);
                loss::forward_backward(
                    &s, &hidden, &head, &entries, objective, &each, &forbidden, &ws, &results, &dhidden, dhead,
                );
            }
        })
    };
    [
        case("logprobs", &shape, Work::new(product, h * (m + v), m), move |d| {
            let (s, hidden, head, entries) = (d.stream(), d.random(m * h), weight(d, v, h), rows(d));
            let (forbidden, ws, logp) = (forbidden(d), workspace(d), d.zeros(m));
            move || loss::logprobs(&s, &hidden, &head, &entries, &forbidden, &ws, &logp, None)
        }),
        update("nll_forward_backward", false),
        update("grpo_forward_backward", true),
    ]
}

fn ids_of(rows: usize) -> Vec<u32> {
    (0..rows as u32).collect()
}
