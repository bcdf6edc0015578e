//! [`varft::ops::loss`].

use super::{Noise, as_good_as_bf16, devices, one, read, round, wide, wide32};
use half::bf16;
use varft::device::{Buffer, DType, Device};
use varft::ops::linear::{self, Epilogue, Weight};
use varft::ops::loss::{self, Kl, LossRows, Objective, Outputs, Workspace};
use varft::ops::sample::{SampleParams, sample};
use varft::ops::softmax::{forbidden_set, is_forbidden};

const LOW: f32 = 0.2;
const HIGH: f32 = 0.28;

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Nll,
    Grpo { beta: f32 },
}
const KINDS: [Kind; 3] = [Kind::Nll, Kind::Grpo { beta: 0.0 }, Kind::Grpo { beta: 0.3 }];

/// A batch: rows in no order, some with several entries, of several temperatures and of one target, one that nobody scores.
struct Case {
    t: usize,
    h: usize,
    v: usize,
    hidden: Vec<bf16>,
    head: Vec<bf16>,
    forbidden: Vec<u32>,
    rows: Vec<u32>,
    targets: Vec<u32>,
    temperature: Vec<f32>,
    old: Vec<f32>,
    reference: Vec<f32>,
    advantage: Vec<f32>,
    weight: Vec<f32>,
    /// What the gradients are added to.
    dhidden: Vec<bf16>,
    dhead: Vec<f32>,
}

fn case(rng: &mut Noise, v: usize, h: usize) -> Case {
    let t = 7;
    let rows = vec![4, 0, 6, 4, 1, 5, 4, 3, 4];
    let n = rows.len();
    let mut targets: Vec<u32> = [10, v - 1, 0, 11, v / 2, 64, 10, 31, 10].map(|x| x as u32).to_vec();
    targets.iter_mut().for_each(|x| *x = (*x).min(v as u32 - 1));
    let ids: Vec<u32> = (0..v as u32).filter(|i| i % 9 == 5 && !targets.contains(i)).collect();
    let mut c = Case {
        t,
        h,
        v,
        hidden: rng.bf16s(t * h, 1.0),
        head: rng.bf16s(v * h, 1.0),
        forbidden: forbidden_set(v, &ids),
        rows,
        targets,
        temperature: vec![1.0, 0.7, 1.3, 1.0, 0.0, 1.0, 0.5, 2.0, 1.0],
        old: vec![],
        reference: vec![],
        advantage: vec![1.0, 0.5, 0.7, -1.2, 2.0, 0.0, 0.3, -0.9, 0.8],
        weight: rng.f32s(n, 1.0).iter().map(|x| x.abs() + 0.1).collect(),
        dhidden: rng.bf16s(t * h, 0.5),
        dhead: rng.f32s(v * h, 0.5),
    };
    // Old log-probabilities around the new ones: some ratios within the clip, some beyond it on each side.
    let lp: Vec<f64> = (0..n).map(|e| score(&c, e).logp).collect();
    let by = [0.05, 0.4, -0.5, 0.6, 0.02, 0.0, -0.1, -0.6, 0.1];
    c.old = lp.iter().zip(by).map(|(l, d)| (l - d) as f32).collect();
    c.reference = lp.iter().zip(rng.f32s(n, 0.5)).map(|(l, d)| (l + f64::from(d)) as f32).collect();
    c
}

/// An entry's distribution, in f64.
struct Score {
    logp: f64,
    entropy: f64,
    /// Of every id.
    p: Vec<f64>,
    t: f64,
}

fn score(c: &Case, e: usize) -> Score {
    let t = if c.temperature[e] == 0.0 { 1.0 } else { f64::from(c.temperature[e]) };
    let x = &c.hidden[c.rows[e] as usize * c.h..][..c.h];
    let logit = |j: usize| x.iter().zip(&c.head[j * c.h..]).map(|(a, b)| a.to_f64() * b.to_f64()).sum::<f64>() / t;
    let z: Vec<f64> =
        (0..c.v).map(|j| if is_forbidden(&c.forbidden, j) { f64::NEG_INFINITY } else { logit(j) }).collect();
    let top = z.iter().copied().fold(f64::MIN, f64::max);
    let lse = top + z.iter().map(|z| (z - top).exp()).sum::<f64>().ln();
    let p: Vec<f64> = z.iter().map(|z| (z - lse).exp()).collect();
    let entropy = -z.iter().zip(&p).filter(|(_, p)| **p > 0.0).map(|(z, p)| (z - lse) * p).sum::<f64>();
    Score { logp: z[c.targets[e] as usize] - lse, entropy, p, t }
}

/// (loss, d loss / d logp, ratio, kl, clipped) of an entry by the formulas as published, in f64.
fn term(c: &Case, kind: Kind, e: usize, lp: f64) -> (f64, f64, f64, f64, bool) {
    let Kind::Grpo { beta } = kind else { return (-lp, -1.0, 1.0, 0.0, false) };
    let (r, a, beta) = ((lp - f64::from(c.old[e])).exp(), f64::from(c.advantage[e]), f64::from(beta));
    let bounded = r.max(1.0 - f64::from(LOW)).min(1.0 + f64::from(HIGH));
    let clipped = r * a > bounded * a;
    let d = f64::from(c.reference[e]) - lp;
    let kl = if beta > 0.0 { d.exp() - d - 1.0 } else { 0.0 };
    let slope = if clipped { 0.0 } else { -r * a };
    (-(r * a).min(bounded * a) + beta * kl, slope + beta * (1.0 - d.exp()), r, kl, clipped)
}

/// d(total loss) / d(logits) of every row, in f64.
fn logit_gradient(c: &Case, kind: Kind) -> Vec<f64> {
    let mut d = vec![0.0; c.t * c.v];
    for e in 0..c.rows.len() {
        let s = score(c, e);
        let slope = term(c, kind, e, s.logp).1 * f64::from(c.weight[e]) / s.t;
        let row = &mut d[c.rows[e] as usize * c.v..][..c.v];
        row.iter_mut().zip(&s.p).for_each(|(d, p)| *d -= slope * p);
        row[c.targets[e] as usize] += slope;
    }
    d
}

/// The gradients of hidden states and head that follow, added to what is there; `store` rounds a product of the hidden states.
fn products(c: &Case, d: &[f64], store: fn(f64) -> f64) -> (Vec<f64>, Vec<f64>) {
    let (mut dhidden, mut dhead) = (wide(&c.dhidden), wide32(&c.dhead));
    let (hidden, head) = (wide(&c.hidden), wide(&c.head));
    for r in 0..c.t {
        let mut row = vec![0.0; c.h];
        for j in 0..c.v {
            let g = d[r * c.v + j];
            for k in 0..c.h {
                row[k] += g * head[j * c.h + k];
                dhead[j * c.h + k] += g * hidden[r * c.h + k];
            }
        }
        if c.rows.contains(&(r as u32)) {
            dhidden[r * c.h..][..c.h].iter_mut().zip(row).for_each(|(d, x)| *d = store(*d + store(x)));
        }
    }
    (dhidden, dhead)
}

struct Got {
    /// logp, entropy, loss, ratio, kl, clipped.
    entries: [Vec<f32>; 6],
    dhidden: Vec<bf16>,
    dhead: Vec<f32>,
    /// From `logprobs`.
    alone: [Vec<f32>; 2],
}

fn head(d: &Device, c: &Case) -> Weight {
    Weight { data: d.upload(&c.head), n: c.v, k: c.h }
}

fn run(d: &Device, c: &Case, kind: Kind, rows_at_a_time: usize) -> Got {
    let (s, n, head) = (d.stream(), c.rows.len(), head(d, c));
    let (hidden, dhidden, dhead) = (d.upload(&c.hidden), d.upload(&c.dhidden), d.upload(&c.dhead));
    let (forbidden, weight) = (d.upload(&c.forbidden), d.upload(&c.weight));
    let entries = LossRows::new(&s, &c.rows, &c.targets, &c.temperature);
    let ws = Workspace::new(d, c.v, c.h, 100, rows_at_a_time * c.v * 4);
    let [old, reference, advantage] = [&c.old, &c.reference, &c.advantage].map(|x| d.upload(x));
    let objective = match kind {
        Kind::Nll => Objective::Nll,
        Kind::Grpo { beta } => Objective::Grpo {
            old_logp: &old,
            advantage: &advantage,
            clip_low: LOW,
            clip_high: HIGH,
            kl: (beta > 0.0).then_some(Kl { ref_logp: &reference, beta }),
        },
    };
    let o = Outputs::new(d, n);
    let update = |dhidden: &Buffer, dhead: Option<&Buffer>| {
        loss::forward_backward(&s, &hidden, &head, &entries, objective, &weight, &forbidden, &ws, &o, dhidden, dhead);
    };
    update(&dhidden, Some(&dhead));
    let frozen = d.upload(&c.dhidden);
    update(&frozen, None);
    let bits16 = |b: &Buffer| read::<bf16>(&s, b).into_iter().map(bf16::to_bits).collect::<Vec<_>>();
    assert_eq!(bits16(&frozen), bits16(&dhidden), "a frozen head");
    let (lp, entropy, only) = (d.alloc(DType::F32, n), d.alloc(DType::F32, n), d.alloc(DType::F32, n));
    loss::logprobs(&s, &hidden, &head, &entries, &forbidden, &ws, &lp, Some(&entropy));
    loss::logprobs(&s, &hidden, &head, &entries, &forbidden, &ws, &only, None);
    let bits = |b: &Buffer| read::<f32>(&s, b).into_iter().map(f32::to_bits).collect::<Vec<_>>();
    assert_eq!(bits(&only), bits(&lp), "without entropies");
    Got {
        entries: [&o.logp, &o.entropy, &o.loss, &o.ratio, &o.kl, &o.clipped].map(|b| read(&s, b)),
        dhidden: read(&s, &dhidden),
        dhead: read(&s, &dhead),
        alone: [read(&s, &lp), read(&s, &entropy)],
    }
}

#[track_caller]
fn close(what: &str, got: &[f32], want: &[f64]) {
    for (e, (&g, &w)) in got.iter().zip(want).enumerate() {
        assert!((f64::from(g) - w).abs() <= 8e-6 * (1.0 + w.abs()), "{what} of entry {e}: {g}, not {w}");
    }
}

fn check(what: &str, c: &Case, kind: Kind, got: &Got) {
    let scores: Vec<Score> = (0..c.rows.len()).map(|e| score(c, e)).collect();
    let terms: Vec<_> = scores.iter().enumerate().map(|(e, s)| term(c, kind, e, s.logp)).collect();
    close("logp", &got.entries[0], &scores.iter().map(|s| s.logp).collect::<Vec<_>>());
    close("entropy", &got.entries[1], &scores.iter().map(|s| s.entropy).collect::<Vec<_>>());
    close("loss", &got.entries[2], &terms.iter().map(|t| t.0).collect::<Vec<_>>());
    close("ratio", &got.entries[3], &terms.iter().map(|t| t.2).collect::<Vec<_>>());
    close("kl", &got.entries[4], &terms.iter().map(|t| t.3).collect::<Vec<_>>());
    assert_eq!(got.entries[5], terms.iter().map(|t| f32::from(u8::from(t.4))).collect::<Vec<_>>());
    assert_eq!(got.alone[..], got.entries[..2], "scoring without gradients");
    let d = logit_gradient(c, kind);
    let rounded: Vec<f64> = d.iter().map(|&d| round(d)).collect();
    let ((dhidden, dhead), (plain, plain_head)) = (products(c, &d, |x| x), products(c, &rounded, round));
    as_good_as_bf16(&format!("{what}, hidden"), &wide(&got.dhidden), &plain, &dhidden);
    as_good_as_bf16(&format!("{what}, head"), &wide32(&got.dhead), &plain_head, &dhead);
    // A forbidden id's row of the head gets nothing.
    for j in (0..c.v).filter(|&j| is_forbidden(&c.forbidden, j)) {
        assert_eq!(got.dhead[j * c.h..][..c.h], c.dhead[j * c.h..][..c.h]);
    }
}

#[test]
fn values_and_gradients_equal_the_formulas_in_f64() {
    let mut rng = Noise::fresh();
    for d in devices() {
        // One block of ids, a part of one, an odd number, more steps of the gradient's block than one.
        for (v, h) in [(1100, 16), (1024, 24), (37, 8), (1101, 16), (9000, 8)] {
            let c = case(&mut rng, v, h);
            for kind in KINDS {
                check(&format!("{d:?} [{v}, {h}]"), &c, kind, &run(&d, &c, kind, 3));
            }
        }
    }
}

#[test]
fn the_whole_vocabulary_of_the_model() {
    let mut rng = Noise::fresh();
    let c = case(&mut rng, 151_936, 16);
    let kind = Kind::Grpo { beta: 0.3 };
    check("the vocabulary", &c, kind, &run(&one(), &c, kind, 4));
}

#[test]
fn chunks_and_orders_of_warps_change_no_bit_of_what_an_entry_gets() {
    let mut rng = Noise::fresh();
    let c = case(&mut rng, 1500, 16);
    let kind = Kind::Grpo { beta: 0.3 };
    let of = |d: &Device, rows| {
        let got = run(d, &c, kind, rows);
        let entries: Vec<u32> = got.entries.iter().flatten().map(|x| x.to_bits()).collect();
        (entries, got.dhidden, got.dhead)
    };
    for d in devices() {
        let whole = of(&d, 50);
        for rows in [1, 2, 5] {
            let (entries, dhidden, dhead) = of(&d, rows);
            assert_eq!((&entries, &dhidden), (&whole.0, &whole.1), "chunks of {rows}");
            // The head's gradient is added to once a chunk.
            assert!(dhead.iter().zip(&whole.2).all(|(a, b)| (a - b).abs() <= 1e-5 * (1.0 + b.abs())));
        }
    }
    let none = LossRows::new(&one().stream(), &[], &[], &[]);
    assert_eq!((none.len(), none.distinct()), (0, 0));
}

#[test]
fn the_sampler_reports_the_same_bits() {
    let mut rng = Noise::fresh();
    for d in devices() {
        let mut c = case(&mut rng, 1100, 16);
        let (s, n, head) = (d.stream(), c.rows.len(), head(&d, &c));
        // Each entry's row by itself: another number of rows than the loss has.
        let logits = d.alloc(DType::F32, c.v);
        for e in 0..n {
            let hidden = d.upload(&c.hidden[c.rows[e] as usize * c.h..][..c.h]);
            linear::forward(&s, &hidden, &head, Epilogue::None, &logits, 1);
            let (token, logp) = (d.alloc(DType::U32, 1), d.alloc(DType::F32, 1));
            let params = SampleParams {
                temperature: d.upload(&c.temperature[e..=e]),
                top_k: d.upload(&[4u32]),
                top_p: d.upload(&[0.9f32]),
                min_p: d.upload(&[0.0f32]),
                seed: d.upload(&[5u64]),
                stream_id: d.upload(&[e as u64]),
                position: d.upload(&[1u32]),
            };
            sample(&s, &logits, &params, &d.upload(&c.forbidden), &token, &logp, 1, c.v);
            c.targets[e] = read::<u32>(&s, &token)[0];
            c.old[e] = read::<f32>(&s, &logp)[0];
        }
        let [logp, _, _, ratio, _, clipped] = run(&d, &c, Kind::Grpo { beta: 0.0 }, 3).entries;
        assert_eq!(logp, c.old);
        assert!(ratio.iter().all(|&r| r == 1.0) && clipped.iter().all(|&x| x == 0.0), "on policy");
    }
}

#[test]
fn what_is_not_finite_shows_and_stays_in_its_row() {
    let mut rng = Noise::fresh();
    for d in devices() {
        let mut c = case(&mut rng, 1100, 16);
        c.hidden[6 * c.h] = bf16::NAN; // entry 2
        c.targets[7] = 5; // forbidden, in a row of its own
        let got = run(&d, &c, Kind::Nll, 4);
        for e in 0..c.rows.len() {
            let (logp, loss) = (got.entries[0][e], got.entries[2][e]);
            match e {
                2 => assert!(logp.is_nan() && loss.is_nan()),
                7 => assert!(logp == f32::NEG_INFINITY && loss == f32::INFINITY),
                _ => assert!(logp.is_finite() && loss.is_finite()),
            }
        }
        for r in 0..c.t {
            let finite = got.dhidden[r * c.h..][..c.h].iter().all(|x| x.is_finite());
            assert_eq!(finite, r != 6, "gradient of row {r}");
        }
    }
}
