use super::super::softmax::{LogSumExp, group_maxima, is_forbidden, log_sum_exp};
use super::super::testing::{devices, noise};
use super::draw::{Scratch, collect, descending, truncate};
use super::*;
use crate::device::{DType, Device};

#[derive(Clone, Copy)]
struct Row {
    temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    seed: u64,
    stream: u64,
    position: u32,
}
const PLAIN: Row = Row { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 9, stream: 1 << 40, position: 0 };

fn run(d: &Device, logits: &[f32], v: usize, forbidden: &[u32], rows: &[Row]) -> (Vec<u32>, Vec<f32>) {
    let (s, b) = (d.stream(), rows.len());
    fn column<T: crate::device::Element>(d: &Device, rows: &[Row], f: impl Fn(&Row) -> T) -> Buffer {
        d.upload(&rows.iter().map(f).collect::<Vec<T>>())
    }
    let params = SampleParams {
        temperature: column(d, rows, |r| r.temperature),
        top_k: column(d, rows, |r| r.top_k),
        top_p: column(d, rows, |r| r.top_p),
        min_p: column(d, rows, |r| r.min_p),
        seed: column(d, rows, |r| r.seed),
        stream_id: column(d, rows, |r| r.stream),
        position: column(d, rows, |r| r.position),
    };
    let (tokens, logps) = (d.alloc(DType::U32, b), d.alloc(DType::F32, b));
    sample(&s, &d.upload(logits), &params, &d.upload(forbidden), &tokens, &logps, b, v);
    (s.read(&tokens).wait().unwrap(), s.read(&logps).wait().unwrap())
}

/// Many draws from one row of logits.
fn draws(logits: &[f32], forbidden: &[u32], how: Row, n: usize) -> Vec<u32> {
    let rows: Vec<Row> = (0..n).map(|i| Row { position: i as u32, ..how }).collect();
    run(&Device::cpu(2), &logits.repeat(n), logits.len(), forbidden, &rows).0
}

/// The ids kept by a full sort in f64, with their renormalised probabilities: the slower truth.
fn truth(logits: &[f32], forbidden: &[u32], how: Row) -> Vec<(usize, f64)> {
    let mut p: Vec<(usize, f64)> = (0..logits.len())
        .filter(|&i| !is_forbidden(forbidden, i))
        .map(|i| (i, (logits[i] as f64 / how.temperature as f64).exp()))
        .collect();
    p.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if how.top_k > 0 {
        p.truncate(how.top_k as usize);
    }
    let whole: f64 = p.iter().map(|x| x.1).sum();
    let mut before = 0.0;
    let mut keep = 0;
    for x in &p {
        if keep > 0 && before >= how.top_p as f64 * whole {
            break;
        }
        before += x.1;
        keep += 1;
    }
    p.truncate(keep);
    let top = p[0].1;
    p.retain(|x| x.1 >= how.min_p as f64 * top);
    let whole: f64 = p.iter().map(|x| x.1).sum();
    p.into_iter().map(|(i, x)| (i, x / whole)).collect()
}

fn set(v: usize, ids: impl Iterator<Item = usize>) -> Vec<u32> {
    let mut f = vec![0; forbidden_words(v)];
    ids.for_each(|i| f[i / 32] |= 1 << (i % 32));
    f
}

/// Pearson's chi-square; for the seeds fixed here the statistic is a number, not a chance.
#[test]
fn draws_follow_the_distribution() {
    let v = 1300;
    let logits: Vec<f32> = noise(v, 4).iter().map(|x| x * 5.0).collect();
    let forbidden = set(v, (0..v).filter(|i| i % 5 == 2));
    for how in [
        PLAIN,
        Row { temperature: 0.5, ..PLAIN },
        Row { top_k: 40, ..PLAIN },
        Row { top_k: 300, top_p: 0.8, ..PLAIN },
        Row { top_p: 0.6, temperature: 1.7, ..PLAIN },
        Row { min_p: 0.2, ..PLAIN },
    ] {
        let n = 8_000;
        let expected = truth(&logits, &forbidden, how);
        let mut counts = vec![0usize; v];
        draws(&logits, &forbidden, how, n).into_iter().for_each(|t| counts[t as usize] += 1);
        let inside: usize = expected.iter().map(|&(i, _)| counts[i]).sum();
        assert_eq!(inside, n, "an id was drawn that truncation drops");
        // Neighbours are joined until a cell expects ten draws.
        let (mut chi, mut cells, mut e, mut o) = (0.0, 0.0, 0.0, 0.0);
        for &(i, p) in &expected {
            (e, o) = (e + p * n as f64, o + counts[i] as f64);
            if e >= 10.0 {
                chi += (o - e) * (o - e) / e;
                cells += 1.0;
                (e, o) = (0.0, 0.0);
            }
        }
        let deviations = (chi - (cells - 1.0)) / (2.0f64 * cells).sqrt();
        assert!(deviations.abs() < 4.0, "chi-square {chi} over {cells} cells");
    }
}

#[test]
fn truncation_keeps_what_a_full_sort_keeps() {
    for v in [1, 33, 700, 5000] {
        // Coarse values: many ties.
        let logits: Vec<f32> = noise(v, 11).iter().map(|x| (x * 24.0).round() / 4.0).collect();
        let forbidden = set(v, (0..v).filter(|i| i % 3 == 1));
        for (top_k, top_p, min_p) in [
            (1, 1.0, 0.0),
            (7, 1.0, 0.0),
            (500, 0.93, 0.0),
            (0, 0.3, 0.0),
            (0, 0.999, 0.0),
            (0, 0.0, 0.0),
            (0, 0.97, 0.01),
            (v as u32 + 5, 0.5, 0.5),
        ] {
            let how = Row { top_k, top_p, min_p, temperature: 0.8, ..PLAIN };
            let mut want: Vec<usize> = truth(&logits, &forbidden, how).into_iter().map(|x| x.0).collect();
            want.sort();
            let lse = log_sum_exp(&logits, how.temperature, &forbidden);
            let mut scratch = Scratch::default();
            let h = How { temperature: 0.8, top_k: top_k as usize, top_p, min_p, u: 0.0 };
            truncate(&logits, &forbidden, &h, &lse, &mut scratch);
            let got: Vec<usize> = scratch.kept.iter().map(|c| c.id as usize).collect();
            assert_eq!(got, want, "vocabulary {v}, top_k {top_k}, top_p {top_p}, min_p {min_p}");
        }
    }
}

/// What is kept by the definition: all candidates sorted, and cut where the sums of their weights say.
fn kept_of_all(row: &[f32], forbidden: &[u32], how: &How, lse: &LogSumExp) -> Vec<u32> {
    let mut tops = vec![0.0; forbidden.len()];
    group_maxima(row, forbidden, &mut tops);
    let mut kept = vec![];
    collect(row, forbidden, lse, &tops, f32::MIN, &mut kept);
    kept.sort_by(descending);
    let mut whole = (lse.log_sum as f64).exp();
    if (1..row.len()).contains(&how.top_k) {
        kept.truncate(how.top_k);
        whole = kept.iter().map(|c| c.weight as f64).sum();
    }
    if how.top_p < 1.0 {
        let mut before = 0.0;
        let reached = kept.iter().position(|c| {
            before += c.weight as f64;
            before >= how.top_p as f64 * whole
        });
        kept.truncate(reached.map_or(kept.len(), |i| i + 1));
    }
    let last = kept.iter().rposition(|c| c.weight >= how.min_p).unwrap();
    kept.truncate(last + 1);
    let mut ids: Vec<u32> = kept.iter().map(|c| c.id).collect();
    ids.sort();
    ids
}

#[test]
fn truncation_keeps_what_the_definition_keeps() {
    let mut scratch = Scratch::default();
    for i in 0..400 {
        let r = noise(5, 1000 + i);
        let v = 1 + ((r[0] + 1.0) * 1500.0) as usize;
        let spread = (r[1] * 4.0).exp() * 3.0;
        let row: Vec<f32> = noise(v, i).iter().map(|x| x * spread - 40.0).collect();
        let forbidden = set(v, (0..v).filter(|id| id % 5 == 1));
        let how = How {
            temperature: [0.6, 1.0, 1.5][i as usize % 3],
            top_k: [0, 0, 3, 300, v + 1][i as usize % 5],
            top_p: (r[2] + 1.0) / 2.0,
            min_p: [0.0, 0.0, 1e-3][i as usize % 3],
            u: 0.0,
        };
        let lse = log_sum_exp(&row, how.temperature, &forbidden);
        truncate(&row, &forbidden, &how, &lse, &mut scratch);
        let got: Vec<u32> = scratch.kept.iter().map(|c| c.id).collect();
        assert_eq!(got, kept_of_all(&row, &forbidden, &how, &lse), "case {i}");
    }
}

#[test]
fn what_min_p_drops_counts_for_the_nucleus_of_what_top_k_left() {
    let mut logits = vec![-50.0f32; 200];
    logits[..3].copy_from_slice(&[0.0, 0.5f32.ln(), 0.4f32.ln()]);
    logits[3..23].fill(0.09f32.ln());
    let forbidden = set(200, 0..0);
    // The first three weigh 1.9 of 3.7: 0.5 of it needs three of them, where of 1.9 alone it would be one.
    let how = How { temperature: 1.0, top_k: 100, top_p: 0.5, min_p: 0.1, u: 0.0 };
    let mut scratch = Scratch::default();
    truncate(&logits, &forbidden, &how, &log_sum_exp(&logits, 1.0, &forbidden), &mut scratch);
    assert_eq!(scratch.kept.iter().map(|c| c.id).collect::<Vec<_>>(), [0, 1, 2]);
}

#[test]
fn a_row_is_sampled_alike_alone_and_in_any_batch() {
    let (v, b) = (1500, 9);
    let logits: Vec<f32> = noise(v * b, 5).iter().map(|x| x * 3.0).collect();
    let forbidden = set(v, [0, 77, 1499].into_iter());
    let rows: Vec<Row> = (0..b)
        .map(|i| Row {
            temperature: [0.0, 1.0, 0.7][i % 3],
            top_k: [0, 5][i % 2],
            top_p: [1.0, 0.9][i / 2 % 2],
            stream: 100 + i as u64,
            position: 3 * i as u32,
            ..PLAIN
        })
        .collect();
    let bits = |(t, l): (Vec<u32>, Vec<f32>)| (t, l.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
    let all = bits(run(&Device::cpu(1), &logits, v, &forbidden, &rows));
    for d in devices() {
        assert_eq!(bits(run(&d, &logits, v, &forbidden, &rows)), all);
        for i in 0..b {
            let one = bits(run(&d, &logits[i * v..][..v], v, &forbidden, &rows[i..=i]));
            assert_eq!((one.0[0], one.1[0]), (all.0[i], all.1[i]));
            let lse = log_sum_exp(&logits[i * v..][..v], rows[i].temperature, &forbidden);
            assert_eq!(one.1[0], lse.logp(logits[i * v + one.0[0] as usize]).to_bits());
        }
    }
}

#[test]
fn noise_differs_by_seed_stream_and_position() {
    let us = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 1 << 32, 1), (1 << 32, 1, 1)]
        .map(|(a, b, c)| uniform(a, b, c));
    for i in 0..us.len() {
        assert!((0.0..1.0).contains(&us[i]));
        assert!(us[..i].iter().all(|u| *u != us[i]));
    }
}

#[test]
fn greedy_is_the_first_of_the_largest_and_equals_top_k_one() {
    let mut logits = noise(500, 6);
    (logits[40], logits[333], logits[490]) = (3.0, 3.0, 9.0);
    let forbidden = set(500, [490].into_iter());
    for how in [Row { temperature: 0.0, ..PLAIN }, Row { top_k: 1, ..PLAIN }, Row { top_p: 0.0, ..PLAIN }] {
        assert!(draws(&logits, &forbidden, how, 50).iter().all(|&t| t == 40));
    }
    // Equal probability is a tie for min-p, and it keeps both.
    let kept = draws(&logits, &forbidden, Row { min_p: 1.0, ..PLAIN }, 200);
    assert!(kept.contains(&40) && kept.contains(&333) && kept.iter().all(|t| [40, 333].contains(t)));
}

#[test]
fn what_is_not_a_distribution_is_reported_and_only_for_its_row() {
    let v = 70;
    let mut logits = noise(v * 4, 8);
    logits[v + 69] = f32::NAN;
    logits[2 * v..3 * v].fill(f32::NEG_INFINITY);
    logits[3 * v] = f32::INFINITY;
    for temperature in [0.0, 1.0] {
        for top_k in [0, 3] {
            let rows = [Row { temperature, top_k, ..PLAIN }; 4];
            let (t, l) = run(&Device::cpu(2), &logits, v, &set(v, 0..0), &rows);
            assert!(t[0] < v as u32 && l[0].is_finite());
            assert!(t[1..].iter().all(|&t| t == NO_SAMPLE) && l[1..].iter().all(|l| l.is_nan()));
            let (t, _) = run(&Device::cpu(2), &logits, v, &set(v, [0, 69].into_iter()), &rows);
            assert!(t[1] < 69 && (1..69).contains(&t[3]), "a forbidden id's logit is not looked at");
        }
    }
}

#[test]
fn the_ends_of_the_unit_interval_are_ids_with_probability() {
    let mut logits = vec![f32::NEG_INFINITY; 3000];
    (logits[5], logits[1030], logits[2047]) = (0.0, 1.0, 0.5);
    let forbidden = set(3000, 0..0);
    for (u, want) in [(0.0, 5), (1.0 - f64::EPSILON / 2.0, 2047)] {
        for top_k in [0, 3] {
            let how = How { temperature: 1.0, top_k, top_p: 1.0, min_p: 0.0, u };
            assert_eq!(draw(&logits, &forbidden, &how).0, want);
        }
    }
}
