//! [`varft::ops::sample`].

use super::{Noise, devices, one, pairs, read};
use varft::device::{Buffer, DType, Device, Element};
use varft::ops::sample::{NO_SAMPLE, SampleParams, sample};
use varft::ops::softmax::{forbidden_set, is_forbidden};

#[derive(Clone, Copy, Debug)]
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
    fn column<T: Element>(d: &Device, rows: &[Row], f: impl Fn(&Row) -> T) -> Buffer {
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
    (read(&s, &tokens), read(&s, &logps))
}

/// The uniform number of a row, by the definition of Philox4x32-10.
fn uniform(r: &Row) -> f64 {
    let mut c = [r.position, r.stream as u32, (r.stream >> 32) as u32, 0];
    let (mut low, mut high) = (r.seed as u32, (r.seed >> 32) as u32);
    for _ in 0..10 {
        let (a, b) = (0xD251_1F53u64 * u64::from(c[0]), 0xCD9E_8D57u64 * u64::from(c[2]));
        c = [(b >> 32) as u32 ^ c[1] ^ low, b as u32, (a >> 32) as u32 ^ c[3] ^ high, a as u32];
        (low, high) = (low.wrapping_add(0x9E37_79B9), high.wrapping_add(0xBB67_AE85));
    }
    ((u64::from(c[0]) << 32 | u64::from(c[1])) >> 11) as f64 / (1u64 << 53) as f64
}

/// The ids that are kept, ascending, with their probabilities: a full sort, in f64. `top_p` in the place of the row's.
fn kept(logits: &[f32], forbidden: &[u32], how: &Row, top_p: f64) -> Vec<(usize, f64)> {
    let t = if how.temperature > 0.0 { f64::from(how.temperature) } else { 1.0 };
    let allowed = || (0..logits.len()).filter(|&i| !is_forbidden(forbidden, i));
    let top = allowed().map(|i| logits[i]).fold(f32::MIN, f32::max);
    let mut p: Vec<(usize, f64)> = allowed().map(|i| (i, (f64::from(logits[i] - top) / t).exp())).collect();
    let logit = |i: usize| logits[i] + 0.0; // -0 is 0
    p.sort_by(|a, b| logit(b.0).total_cmp(&logit(a.0)).then(a.0.cmp(&b.0)));
    if how.temperature <= 0.0 {
        p.truncate(1);
    }
    if how.top_k > 0 {
        p.truncate(how.top_k as usize);
    }
    if how.top_p < 1.0 {
        let target = top_p * p.iter().map(|x| x.1).sum::<f64>();
        let mut before = 0.0;
        let reached = p.iter().position(|x| {
            before += x.1;
            before >= target
        });
        p.truncate(reached.map_or(p.len(), |i| i + 1));
    }
    let least = f64::from(how.min_p.min(1.0));
    p.retain(|x| x.1 >= least);
    let whole: f64 = p.iter().map(|x| x.1).sum();
    p.sort_by_key(|x| x.0);
    p.into_iter().map(|(i, x)| (i, x / whole)).collect()
}

/// How far sums in f32 may be from those in f64, relative to the whole.
const ROUNDING: f64 = 2e-6;

/// Whether the token is the one that `u` means, but for rounding: of the nucleus' mass, and of the cumulative sum.
fn is_meant(token: u32, logits: &[f32], forbidden: &[u32], how: &Row) -> bool {
    let u = uniform(how);
    [1.0 - ROUNDING, 1.0, 1.0 + ROUNDING].iter().any(|near| {
        let kept = kept(logits, forbidden, how, f64::from(how.top_p) * near);
        let mut before = 0.0;
        kept.iter().any(|&(id, p)| {
            let from = before;
            before += p;
            id == token as usize && (from - ROUNDING..before + ROUNDING).contains(&u)
        })
    })
}

fn logp(logits: &[f32], forbidden: &[u32], how: &Row, token: u32) -> f64 {
    let t = if how.temperature > 0.0 { f64::from(how.temperature) } else { 1.0 };
    let allowed = || (0..logits.len()).filter(|&i| !is_forbidden(forbidden, i)).map(|i| f64::from(logits[i]) / t);
    let top = allowed().fold(f64::MIN, f64::max);
    f64::from(logits[token as usize]) / t - top - allowed().map(|z| (z - top).exp()).sum::<f64>().ln()
}

/// Rows of every kind.
fn rows(rng: &mut Noise, n: usize, v: usize) -> Vec<Row> {
    let of = |rng: &mut Noise, n: usize| (rng.next() % n as u64) as usize;
    let k = [0, 0, 1, 7, 40, 300, v as u32 / 2, v as u32 + 5];
    (0..n)
        .map(|i| Row {
            temperature: [1.0, 1.0, 0.6, 1.7, 0.0][of(rng, 5)],
            top_k: if i % 3 == 0 { 0 } else { k[of(rng, 8)] },
            top_p: [1.0, 0.95, 0.5, 0.999, 0.0][if i % 3 == 1 { 0 } else { of(rng, 5) }],
            min_p: [0.0, 0.0, 0.01, 0.3, 1.0][of(rng, 5)],
            seed: rng.next(),
            stream: rng.next(),
            position: rng.next() as u32,
        })
        .collect()
}

#[test]
fn a_draw_is_the_one_that_a_full_sort_in_f64_makes() {
    let mut rng = Noise::fresh();
    for d in devices() {
        for (v, b) in [(1, 3), (33, 40), (700, 40), (1024, 30), (1025, 30), (5003, 30), (40_000, 12)] {
            let rows = rows(&mut rng, b, v);
            let scale = [1.0, 8.0, 60.0][(rng.next() % 3) as usize];
            let mut logits = rng.f32s(b * v, scale);
            if rng.next().is_multiple_of(2) {
                logits.iter_mut().for_each(|x| *x = (*x * 4.0).round() / 4.0); // many ties
            }
            if v > 1 {
                let at = (rng.next() % (b * v) as u64) as usize;
                logits[at] = f32::NEG_INFINITY;
            }
            let ids: Vec<u32> = (0..v as u32).filter(|i| i % 5 == 2).collect();
            let forbidden = forbidden_set(v, &ids);
            let (tokens, logps) = run(&d, &logits, v, &forbidden, &rows);
            for (i, how) in rows.iter().enumerate() {
                let x = &logits[i * v..][..v];
                assert!(is_meant(tokens[i], x, &forbidden, how), "{d:?}, {v} ids, {how:?}: {} drawn", tokens[i]);
                let want = logp(x, &forbidden, how, tokens[i]);
                assert!((f64::from(logps[i]) - want).abs() < 4e-6 * (1.0 + want.abs()), "{} not {want}", logps[i]);
            }
        }
    }
}

#[test]
fn the_whole_vocabulary_of_the_model() {
    let mut rng = Noise::fresh();
    let (v, b) = (151_936, 6);
    let logits: Vec<f32> = rng.f32s(b * v, 1.0).into_iter().map(|x| 4.0 / (1.05 - x)).collect();
    let how = |temperature, top_k, top_p, min_p| Row { temperature, top_k, top_p, min_p, seed: 77, ..PLAIN };
    let rows = [
        how(1.0, 0, 1.0, 0.0),
        how(0.8, 50, 1.0, 0.0),
        how(1.0, 0, 0.95, 0.0),
        how(0.7, 2000, 0.9, 0.0),
        how(1.0, 0, 1.0, 0.05),
        how(0.0, 0, 1.0, 0.0),
    ];
    let forbidden = forbidden_set(v, &[151_643, 7]);
    let (tokens, logps) = run(&one(), &logits, v, &forbidden, &rows);
    for (i, how) in rows.iter().enumerate() {
        let x = &logits[i * v..][..v];
        assert!(is_meant(tokens[i], x, &forbidden, how), "{how:?}: {} drawn", tokens[i]);
        let want = logp(x, &forbidden, how, tokens[i]);
        assert!((f64::from(logps[i]) - want).abs() < 4e-6 * (1.0 + want.abs()), "{} not {want}", logps[i]);
    }
}

#[test]
fn truncation_of_equals_keeps_the_lower_ids_exactly() {
    let v = 3000;
    let logits: Vec<f32> = (0..v).map(|i| if i % 3 == 0 { 1.0 } else { -200.0 - i as f32 }).collect();
    let forbidden = forbidden_set(v, &[0, 6]);
    let equals: Vec<u32> = (0..v as u32).filter(|i| i % 3 == 0 && ![0, 6].contains(i)).collect();
    for d in devices() {
        for (top_k, top_p, keeps) in [(4, 1.0, 4), (500, 1.0, 500), (0, 4.5 / equals.len() as f32, 5), (8, 0.5, 4)] {
            let n = 60;
            let rows: Vec<Row> = (0..n).map(|i| Row { top_k, top_p, position: i as u32, ..PLAIN }).collect();
            let (tokens, _) = run(&d, &logits.repeat(n), v, &forbidden, &rows);
            for (token, how) in tokens.iter().zip(&rows) {
                // Of equals, u means its share: the ids go upwards.
                let at = (uniform(how) * keeps as f64) as usize;
                let near =
                    [-1e-3, 1e-3].map(|e| (uniform(how) * keeps as f64 + e).clamp(0.0, keeps as f64 - 1e-9) as usize);
                assert!(near.iter().any(|&i| equals[i] == *token), "{how:?}: {token}, not {}", equals[at]);
            }
        }
    }
}

#[test]
fn a_row_is_sampled_alike_alone_and_in_any_batch_and_order_of_warps() {
    let mut rng = Noise::fresh();
    let (v, b) = (2500, 9);
    let logits = rng.f32s(v * b, 4.0);
    let forbidden = forbidden_set(v, &[0, 77, 2499]);
    let rows = rows(&mut rng, b, v);
    let bits = |(t, l): (Vec<u32>, Vec<f32>)| (t, l.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
    for [first, second] in pairs() {
        let all = bits(run(&first, &logits, v, &forbidden, &rows));
        assert_eq!(bits(run(&second, &logits, v, &forbidden, &rows)), all);
        for i in 0..b {
            let one = bits(run(&first, &logits[i * v..][..v], v, &forbidden, &rows[i..=i]));
            assert_eq!((one.0[0], one.1[0]), (all.0[i], all.1[i]));
        }
        let none = run(&first, &[], v, &forbidden, &[]);
        assert!(none.0.is_empty() && none.1.is_empty());
    }
}

#[test]
fn greedy_is_the_first_of_the_largest() {
    let mut logits = Noise::fresh().f32s(2000, 1.0);
    (logits[1040], logits[1333], logits[1900]) = (3.0, 3.0, 9.0);
    let forbidden = forbidden_set(2000, &[1900]);
    let rows = [
        Row { temperature: 0.0, ..PLAIN },
        Row { temperature: 0.0, top_k: 9, top_p: 0.9, ..PLAIN },
        Row { top_k: 1, ..PLAIN },
        Row { top_p: 0.0, ..PLAIN },
    ];
    for d in devices() {
        assert_eq!(run(&d, &logits.repeat(4), 2000, &forbidden, &rows).0, [1040; 4]);
    }
}

#[test]
fn what_is_not_a_distribution_is_reported_and_only_for_its_row() {
    let v = 70;
    let mut logits = Noise::fresh().f32s(v * 5, 1.0);
    logits[v + 69] = f32::NAN;
    logits[2 * v..3 * v].fill(f32::NEG_INFINITY);
    logits[3 * v] = f32::INFINITY;
    logits[4 * v..4 * v + 69].fill(f32::NEG_INFINITY);
    let (all, some) = (forbidden_set(v, &[]), forbidden_set(v, &[0, 69]));
    for d in devices() {
        for temperature in [0.0, 1.0] {
            for top_k in [0, 3] {
                let rows = [Row { temperature, top_k, ..PLAIN }; 5];
                let (t, l) = run(&d, &logits, v, &all, &rows);
                assert!(t[0] < v as u32 && l[0].is_finite());
                assert!(t[1..4].iter().all(|&t| t == NO_SAMPLE) && l[1..4].iter().all(|l| l.is_nan()));
                assert_eq!((t[4], l[4]), (69, 0.0), "the only id that has any probability");
                let (t, _) = run(&d, &logits, v, &some, &rows);
                assert!(t[1] < 69 && (1..69).contains(&t[3]), "a forbidden id's logit is not looked at");
                assert_eq!(t[4], NO_SAMPLE);
            }
        }
    }
}
