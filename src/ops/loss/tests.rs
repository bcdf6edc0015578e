use super::super::linear::{pack, packed_len, unpack};
use super::super::sample::{SampleParams, sample};
use super::super::testing::{close, devices, noise};
use super::*;

/// A small batch: rows in no order, three entries on row 4 (two temperatures), one row that nobody scores.
struct Case {
    t: usize,
    h: usize,
    v: usize,
    hidden: Vec<f32>,
    head: Vec<f32>,
    forbidden: Vec<u32>,
    rows: Vec<u32>,
    targets: Vec<u32>,
    temperature: Vec<f32>,
    old: Vec<f32>,
    reference: Vec<f32>,
    advantage: Vec<f32>,
    weight: Vec<f32>,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Nll,
    Grpo { beta: f32 },
}

const LOW: f32 = 0.2;
const HIGH: f32 = 0.28;

fn case() -> Case {
    let (t, h, v) = (7, 12, 1100);
    let rows = vec![4, 0, 6, 4, 1, 5, 4, 3];
    let n = rows.len();
    let mut c = Case {
        t,
        h,
        v,
        hidden: noise(t * h, 1),
        head: noise(v * h, 2),
        forbidden: vec![0; forbidden_words(v)],
        rows,
        targets: vec![10, 1099, 0, 11, 500, 64, 10, 31],
        temperature: vec![1.0, 0.7, 1.3, 1.0, 0.0, 1.0, 0.5, 2.0],
        old: vec![0.0; n],
        reference: vec![],
        advantage: vec![1.0, 0.5, 0.7, -1.2, 2.0, 0.0, 0.3, -0.9],
        weight: noise(n, 3).iter().map(|x| x.abs() + 0.1).collect(),
    };
    (0..v)
        .filter(|i| i % 9 == 5 && !c.targets.contains(&(*i as u32)))
        .for_each(|i| c.forbidden[i / 32] |= 1 << (i % 32));
    // Old log-probabilities around the new ones: some ratios within the clip, some beyond it on each side.
    let lp: Vec<f64> = (0..n).map(|e| score(&c, &f64s(&c.hidden), &f64s(&c.head), e).0).collect();
    let by = [0.05, 0.4, -0.5, 0.6, 0.02, 0.0, -0.1, -0.6];
    c.old = lp.iter().zip(by).map(|(l, d)| (l - d) as f32).collect();
    c.reference = lp.iter().zip(noise(n, 9)).map(|(l, d)| (l + 0.5 * d as f64) as f32).collect();
    c
}

fn f64s(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| x as f64).collect()
}

/// Log-probability and entropy of an entry, in f64.
fn score(c: &Case, hidden: &[f64], head: &[f64], e: usize) -> (f64, f64) {
    let t = if c.temperature[e] == 0.0 { 1.0 } else { c.temperature[e] as f64 };
    let x = &hidden[c.rows[e] as usize * c.h..][..c.h];
    let z: Vec<f64> = (0..c.v).map(|j| x.iter().zip(&head[j * c.h..]).map(|(a, b)| a * b).sum::<f64>() / t).collect();
    let open = || (0..c.v).filter(|&j| !is_forbidden(&c.forbidden, j)).map(|j| z[j]);
    let lse = open().map(f64::exp).sum::<f64>().ln();
    (z[c.targets[e] as usize] - lse, -open().map(|z| (z - lse) * (z - lse).exp()).sum::<f64>())
}

/// (loss, ratio, kl, clipped) of an entry, in f64, by the formulas as published.
fn term(c: &Case, kind: Kind, e: usize, lp: f64) -> (f64, f64, f64, bool) {
    let Kind::Grpo { beta } = kind else { return (-lp, 1.0, 0.0, false) };
    let (r, a) = ((lp - c.old[e] as f64).exp(), c.advantage[e] as f64);
    let bounded = r.max(1.0 - LOW as f64).min(1.0 + HIGH as f64);
    let d = c.reference[e] as f64 - lp;
    let kl = if beta > 0.0 { d.exp() - d - 1.0 } else { 0.0 };
    ((-(r * a).min(bounded * a)) + beta as f64 * kl, r, kl, r * a > bounded * a)
}

fn total(c: &Case, kind: Kind, hidden: &[f64], head: &[f64], only_row: Option<usize>) -> f64 {
    (0..c.rows.len())
        .filter(|&e| only_row.is_none_or(|r| c.rows[e] as usize == r))
        .map(|e| c.weight[e] as f64 * term(c, kind, e, score(c, hidden, head, e).0).0)
        .sum()
}

struct Got {
    logp: Vec<f32>,
    entropy: Vec<f32>,
    loss: Vec<f32>,
    ratio: Vec<f32>,
    kl: Vec<f32>,
    clipped: Vec<f32>,
    dhidden: Vec<f32>,
    dhead: Vec<f32>,
    alone: (Vec<f32>, Vec<f32>),
}

impl Got {
    fn bits(&self) -> Vec<u32> {
        let all =
            [&self.logp, &self.entropy, &self.loss, &self.ratio, &self.kl, &self.clipped, &self.dhidden, &self.dhead];
        all.into_iter().flatten().map(|x| x.to_bits()).collect()
    }
}

/// Gradients start from a base that is not zero: they must be added.
fn base(n: usize) -> Vec<f32> {
    noise(n, 77)
}

fn packed(c: &Case, rows: &[f32]) -> Vec<f32> {
    let mut p = vec![0.0; packed_len(c.v, c.h)];
    pack(rows, c.v, c.h, &mut p);
    p
}

fn run(d: &Device, c: &Case, kind: Kind, budget_rows: usize) -> Got {
    let s = d.stream();
    let n = c.rows.len();
    let head = Weight { data: d.upload(&packed(c, &c.head)), n: c.v, k: c.h };
    let dhead = d.upload(&packed(c, &base(c.v * c.h)));
    let (hidden, dhidden) = (d.upload(&c.hidden), d.upload(&base(c.t * c.h)));
    let (forbidden, weight) = (d.upload(&c.forbidden), d.upload(&c.weight));
    let entries = LossRows::new(&s, &c.rows, &c.targets, &c.temperature);
    let ws = Workspace::new(d, c.v, c.h, 100, budget_rows * c.v * 4);
    assert!(ws.bytes() <= budget_rows * 4 * (c.v + 2 * c.h));
    let (old, reference, advantage) = (d.upload(&c.old), d.upload(&c.reference), d.upload(&c.advantage));
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
    forward_backward(&s, &hidden, &head, &entries, objective, &weight, &forbidden, &ws, &o, &dhidden, Some(&dhead));
    let (lp, ent) = (d.alloc(DType::F32, n), d.alloc(DType::F32, n));
    logprobs(&s, &hidden, &head, &entries, &forbidden, &ws, &lp, Some(&ent));
    let read = |b: &Buffer| s.read::<f32>(b).wait().unwrap();
    let mut dhead_rows = vec![0.0; c.v * c.h];
    unpack(&read(&dhead), c.v, c.h, &mut dhead_rows);
    // With a frozen head the rest is the same.
    let again = d.upload(&base(c.t * c.h));
    forward_backward(&s, &hidden, &head, &entries, objective, &weight, &forbidden, &ws, &o, &again, None);
    assert_eq!(
        read(&again).iter().map(|x| x.to_bits()).collect::<Vec<_>>(),
        read(&dhidden).iter().map(|x| x.to_bits()).collect::<Vec<_>>()
    );
    Got {
        logp: read(&o.logp),
        entropy: read(&o.entropy),
        loss: read(&o.loss),
        ratio: read(&o.ratio),
        kl: read(&o.kl),
        clipped: read(&o.clipped),
        dhidden: read(&dhidden),
        dhead: dhead_rows,
        alone: (read(&lp), read(&ent)),
    }
}

#[test]
fn values_equal_the_formulas_and_gradients_the_finite_differences() {
    let c = case();
    let (hidden, head) = (f64s(&c.hidden), f64s(&c.head));
    let n = c.rows.len();
    let mut clips = 0;
    for kind in [Kind::Nll, Kind::Grpo { beta: 0.0 }, Kind::Grpo { beta: 0.3 }] {
        let got = run(&Device::cpu(2), &c, kind, 3);
        let want: Vec<_> = (0..n).map(|e| score(&c, &hidden, &head, e)).collect();
        let terms: Vec<_> = (0..n).map(|e| term(&c, kind, e, want[e].0)).collect();
        close(&got.logp, &want.iter().map(|w| w.0).collect::<Vec<_>>(), 1e-6);
        close(&got.entropy, &want.iter().map(|w| w.1).collect::<Vec<_>>(), 2e-6);
        close(&got.loss, &terms.iter().map(|t| t.0).collect::<Vec<_>>(), 2e-6);
        close(&got.ratio, &terms.iter().map(|t| t.1).collect::<Vec<_>>(), 4e-6);
        close(&got.kl, &terms.iter().map(|t| t.2).collect::<Vec<_>>(), 4e-6);
        assert_eq!(got.clipped, terms.iter().map(|t| t.3 as u8 as f32).collect::<Vec<_>>());
        clips += terms.iter().filter(|t| t.3).count();

        // Central differences in f64. A hidden state's loss is its own row's; of the head, a sample of rows.
        let step = 1e-5;
        let mut dhidden = f64s(&base(c.t * c.h));
        let mut moved = hidden.clone();
        for i in 0..c.t * c.h {
            let at = |moved: &[f64]| total(&c, kind, moved, &head, Some(i / c.h));
            moved[i] = hidden[i] + step;
            let up = at(&moved);
            moved[i] = hidden[i] - step;
            dhidden[i] += (up - at(&moved)) / (2.0 * step);
            moved[i] = hidden[i];
        }
        close(&got.dhidden, &dhidden, 2e-6);
        let base = f64s(&base(c.v * c.h));
        let mut moved = head.clone();
        for j in [0, 5, 10, 11, 31, 64, 500, 700, 1099] {
            for k in 0..c.h {
                let i = j * c.h + k;
                moved[i] = head[i] + step;
                let up = total(&c, kind, &hidden, &moved, None);
                moved[i] = head[i] - step;
                let want = base[i] + (up - total(&c, kind, &hidden, &moved, None)) / (2.0 * step);
                moved[i] = head[i];
                close(&got.dhead[i..=i], &[want], 2e-6);
            }
        }
        for j in (0..c.v).filter(|&j| is_forbidden(&c.forbidden, j)) {
            close(&got.dhead[j * c.h..][..c.h], &base[j * c.h..][..c.h], 0.0);
        }
    }
    assert!(clips >= 4, "the case must reach the clip from both sides: {clips}");
}

#[test]
fn chunks_threads_and_devices_change_no_bit() {
    let c = case();
    for kind in [Kind::Nll, Kind::Grpo { beta: 0.3 }] {
        let want = run(&Device::cpu(1), &c, kind, 50);
        for d in devices() {
            for rows in [1, 2, 5, 50] {
                let got = run(&d, &c, kind, rows);
                assert_eq!(got.bits(), want.bits(), "{d:?}, chunks of {rows}");
                assert_eq!((&got.logp, &got.entropy), (&got.alone.0, &got.alone.1), "scoring without gradients");
            }
        }
    }
}

#[test]
fn the_sampler_reports_the_same_bits() {
    let mut c = case();
    c.targets = vec![3; c.rows.len()];
    let d = Device::cpu(2);
    let s = d.stream();
    let (n, head) = (c.rows.len(), Weight { data: d.upload(&packed(&c, &c.head)), n: c.v, k: c.h });
    let logits = d.alloc(DType::F32, c.t * c.v);
    linear::forward(&s, &d.upload(&c.hidden), &head, Epilogue::None, &logits, c.t);
    for e in 0..n {
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
        let row = logits.view(c.rows[e] as usize * c.v, c.v);
        sample(&s, &row, &params, &d.upload(&c.forbidden), &token, &logp, 1, c.v);
        c.targets[e] = s.read::<u32>(&token).wait().unwrap()[0];
        let sampled = s.read::<f32>(&logp).wait().unwrap()[0];
        // On policy: the ratio is exactly one, and nothing is clipped.
        c.old[e] = sampled;
    }
    let got = run(&d, &c, Kind::Grpo { beta: 0.0 }, 3);
    assert_eq!(got.logp, c.old);
    assert!(got.ratio.iter().all(|&r| r == 1.0) && got.clipped.iter().all(|&x| x == 0.0));
}

#[test]
fn a_row_that_many_entries_share_goes_through_once() {
    let s = Device::cpu(1).stream();
    let e = LossRows::new(&s, &[3, 9, 3, 3, 1], &[0; 5], &[1.0; 5]);
    assert_eq!((e.len(), e.distinct()), (5, 3));
    let none = LossRows::new(&s, &[], &[], &[]);
    assert_eq!((none.len(), none.distinct()), (0, 0));
}

#[test]
fn what_is_not_finite_shows_and_stays_in_its_row() {
    let mut c = case();
    c.hidden[6 * c.h] = f32::NAN; // entry 2
    c.targets[7] = 5; // forbidden, in a row of its own
    c.forbidden[0] |= 1 << 5;
    let got = run(&Device::cpu(2), &c, Kind::Nll, 4);
    for e in 0..c.rows.len() {
        match e {
            2 => assert!(got.logp[e].is_nan() && got.loss[e].is_nan()),
            7 => assert!(got.logp[e] == f32::NEG_INFINITY && got.loss[e] == f32::INFINITY),
            _ => assert!(got.logp[e].is_finite() && got.loss[e].is_finite()),
        }
    }
    for r in 0..c.t {
        let finite = got.dhidden[r * c.h..][..c.h].iter().all(|x| x.is_finite());
        assert_eq!(finite, r != 6, "gradient of row {r}");
    }
}
