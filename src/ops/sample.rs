//! Drawing the next token of each sequence from its logits.
//!
//! **What is drawn.** Temperature first, ids that are forbidden are left out, then top-k, then top-p (the nucleus of
//! Holtzman et al. 2020, arXiv 1904.09751) of what top-k left, then min-p (arXiv 2407.01082); the token is drawn from what
//! remains. Temperature 0 takes the largest logit, the first of equals.
//!
//! **What is reported.** The log-probability after temperature and forbidden ids and before top-k, top-p and min-p: what
//! the trainer computes for the same logits, to the bit ([`softmax`](super::softmax)). For temperature 0 it is the one at
//! temperature 1.
//!
//! **Noise.** One uniform number u in [0, 1) of 53 bits per token, from Philox4x32-10 (Salmon et al. 2011) with the
//! seed as key and (position, stream) as counter: nothing about the batch enters. The token is the first id, in ascending
//! order, whose cumulative probability exceeds u. (Gumbel noise for each id would give the same distribution at the
//! price of a random number and two logarithms for every id of the vocabulary.)

use super::softmax::{
    BLOCK, GROUP, LogSumExp, allowed, blocks, forbidden_words, group_maxima, log_sum_exp_blocks, weights,
};
use crate::device::{Backend, Buffer, SendPtr, Stream};
use std::cell::RefCell;
use std::cmp::Ordering;

/// The token reported for a row that is not a distribution: a NaN or infinite logit, or no id that may be sampled.
pub const NO_SAMPLE: u32 = u32::MAX;

/// How to sample each of `b` rows; every buffer has at least `b` elements.
#[derive(Clone)]
pub struct SampleParams {
    /// f32; 0 is greedy.
    pub temperature: Buffer,
    /// u32; the number of ids to keep, exactly (of equal logits the lower ids); 0 keeps all.
    pub top_k: Buffer,
    /// f32; keeps the fewest ids whose probability reaches this, at least one; 1 keeps all.
    pub top_p: Buffer,
    /// f32; keeps ids of at least this times the largest probability; 0 keeps all.
    pub min_p: Buffer,
    /// u64.
    pub seed: Buffer,
    /// u64; which sequence this is (an episode), whatever its place in the batch.
    pub stream_id: Buffer,
    /// u32; which token of the sequence is drawn.
    pub position: Buffer,
}

/// Draws a token for each row of `logits` `[b, v]` into `tokens` u32 `[b]`, and its log-probability into `logps` f32
/// `[b]`. `forbidden`: u32 words, see [`forbidden_words`]. A row that can't be sampled gives [`NO_SAMPLE`] and
/// NaN.
pub fn sample(
    s: &Stream,
    logits: &Buffer,
    params: &SampleParams,
    forbidden: &Buffer,
    tokens: &Buffer,
    logps: &Buffer,
    b: usize,
    v: usize,
) {
    let p = params.clone();
    let per_row = [&p.temperature, &p.top_k, &p.top_p, &p.min_p, &p.seed, &p.stream_id, &p.position, tokens, logps];
    assert!(per_row.iter().all(|x| x.len() >= b), "parameters and results of {b} rows");
    assert!(logits.len() >= b * v && forbidden.len() == forbidden_words(v), "logits of [{b}, {v}] and their set");
    let (logits, forbidden, tokens, logps) = (logits.clone(), forbidden.clone(), tokens.clone(), logps.clone());
    match s.backend() {
        Backend::Cpu(s) => s.launch(move |pool| {
            // SAFETY: launches of one stream run in order; the results are not inputs.
            let (logits, forbidden, tokens, logps) = unsafe {
                (logits.get::<f32>(), forbidden.get::<u32>(), tokens.get_mut::<u32>(), logps.get_mut::<f32>())
            };
            // SAFETY: as above.
            let (temperature, top_k, top_p, min_p) = unsafe {
                (p.temperature.get::<f32>(), p.top_k.get::<u32>(), p.top_p.get::<f32>(), p.min_p.get::<f32>())
            };
            // SAFETY: as above.
            let (seed, stream, position) =
                unsafe { (p.seed.get::<u64>(), p.stream_id.get::<u64>(), p.position.get::<u32>()) };
            let logps = SendPtr(logps.as_mut_ptr());
            pool.chunks_mut(&mut tokens[..b], 1, |i, token| {
                let how = How {
                    temperature: temperature[i],
                    top_k: top_k[i] as usize,
                    top_p: top_p[i],
                    min_p: min_p[i],
                    u: uniform(seed[i], stream[i], position[i]),
                };
                let (id, logp) = draw(&logits[i * v..][..v], forbidden, &how);
                token[0] = id;
                // SAFETY: element i belongs to this item.
                unsafe { *logps.get().add(i) = logp };
            });
        }),
        Backend::Gpu(gpu) => gpu.missing("sample"),
    }
}

/// The parameters of one row; `u` is its uniform number.
struct How {
    temperature: f32,
    top_k: usize,
    top_p: f32,
    min_p: f32,
    u: f64,
}

#[derive(Clone, Copy, Default)]
struct Candidate {
    x: f32,
    /// `exp((x - max) / T)`
    weight: f32,
    id: u32,
}

#[derive(Default)]
struct Scratch {
    /// Sums of the blocks of a row.
    sums: Vec<f32>,
    /// The largest allowed logit of each group of 32 ids.
    tops: Vec<f32>,
    sorted_tops: Vec<f32>,
    /// What truncation has left, ascending.
    kept: Vec<Candidate>,
    /// Those among which a cut is looked for, in any order.
    mixed: Vec<Candidate>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

fn draw(row: &[f32], forbidden: &[u32], how: &How) -> (u32, f32) {
    SCRATCH.with_borrow_mut(|scratch| {
        let sums = &mut scratch.sums;
        sums.clear();
        let lse = log_sum_exp_blocks(row, how.temperature, forbidden, |x| sums.push(x));
        if !lse.log_sum.is_finite() {
            return (NO_SAMPLE, f32::NAN);
        }
        let truncated = how.top_k > 0 && how.top_k < row.len() || how.top_p < 1.0 || how.min_p > 0.0;
        let id = if how.temperature <= 0.0 {
            first_at_least(row, forbidden, lse.max)
        } else if truncated {
            truncate(row, forbidden, how, &lse, scratch);
            let kept = &scratch.kept;
            let total: f64 = kept.iter().map(|c| c.weight as f64).sum();
            kept[walk(kept.iter().map(|c| c.weight), how.u * total)].id as usize
        } else {
            invert(row, forbidden, &lse, sums, how.u)
        };
        (id as u32, lse.logp(row[id]))
    })
}

/// The first allowed id whose logit is at least `floor`. There is one.
fn first_at_least(row: &[f32], forbidden: &[u32], floor: f32) -> usize {
    let mut at = 0;
    for g in 0..forbidden.len() {
        if let Some(i) = allowed(row, forbidden, g).iter().position(|&x| x >= floor) {
            at = g * GROUP + i;
            break;
        }
    }
    at
}

/// The first id whose cumulative probability exceeds `u`: first the block, by the sums that made the log-sum-exp, then
/// the id in it.
fn invert(row: &[f32], forbidden: &[u32], lse: &LogSumExp, sums: &[f32], u: f64) -> usize {
    let mut rest = u * sums.iter().map(|&x| x as f64).sum::<f64>();
    // Rounding may carry `rest` past the last sum: the last block that has any probability takes what is left.
    let last = sums.iter().rposition(|&sum| sum > 0.0).unwrap_or(0);
    let mut block = 0;
    while block < last && rest >= sums[block] as f64 {
        rest -= sums[block] as f64;
        block += 1;
    }
    let mut w = [0.0; BLOCK];
    let x = &row[block * BLOCK..row.len().min((block + 1) * BLOCK)];
    let words = &forbidden[block * (BLOCK / GROUP)..forbidden.len().min((block + 1) * (BLOCK / GROUP))];
    weights(x, words, lse.max, lse.inv_t, &mut w);
    block * BLOCK + walk(w[..x.len()].iter().copied(), rest)
}

/// The first index at which the running sum of the weights exceeds `rest`, else the last one with any weight.
fn walk(weights: impl Iterator<Item = f32>, mut rest: f64) -> usize {
    let mut last = 0;
    for (i, w) in weights.enumerate().filter(|(_, w)| *w > 0.0) {
        last = i;
        rest -= w as f64;
        if rest < 0.0 {
            break;
        }
    }
    last
}

/// Leaves in `kept` the ids that top-k, top-p and min-p keep, ascending.
///
/// Nothing is sorted: a lower bound on the smallest logit that can survive drops most of the vocabulary, and selections
/// among the rest, or a part of it, find the exact cuts.
fn truncate(row: &[f32], forbidden: &[u32], how: &How, lse: &LogSumExp, scratch: &mut Scratch) {
    let Scratch { tops, sorted_tops, kept, mixed, .. } = scratch;
    let top_k = if how.top_k == 0 { usize::MAX } else { how.top_k };
    tops.resize(forbidden.len(), 0.0);
    group_maxima(row, forbidden, tops);
    // min-p is a bound by itself: exp((x - max) / T) >= min_p. An id at the bound is decided exactly below.
    let mut floor = lse.max + how.min_p.min(1.0).ln() / lse.inv_t;
    if top_k < tops.len() {
        // k groups have a largest logit of at least the k-th of the groups' largest, so k ids have too.
        sorted_tops.clone_from(tops);
        let (_, kth, _) = sorted_tops.select_nth_unstable_by(top_k - 1, |a, b| b.total_cmp(a));
        floor = floor.max(*kth);
    } else if how.top_p < 1.0 && top_k >= row.len() {
        // If all ids below the bound together weigh less than (1 - top_p) of the total, the nucleus is above it.
        let spare = (1.0 - how.top_p.max(0.0)) as f64 * lse.log_sum.exp() as f64 / row.len() as f64;
        floor = floor.max(lse.max + ((spare * 0.999).ln() as f32).min(0.0) / lse.inv_t);
    }
    // Room for rounding.
    floor -= 1e-3 * (1.0 + floor.abs());
    collect(row, forbidden, lse, tops, floor, kept);
    if top_k < kept.len() {
        keep_largest(kept, mixed, lse, |_| 1.0, top_k as f64);
    }
    if how.top_p < 1.0 {
        // After top-k what is left is the whole; without it the whole is the vocabulary, dropped ids included.
        let whole =
            if top_k < row.len() { kept.iter().map(|c| c.weight as f64).sum() } else { (lse.log_sum as f64).exp() };
        keep_largest(kept, mixed, lse, |c| c.weight as f64, how.top_p.max(0.0) as f64 * whole);
    }
    if how.min_p > 0.0 {
        let bound = how.min_p.min(1.0);
        let last = kept.iter().filter(|c| c.weight >= bound).max_by(|a, b| descending(a, b)).copied();
        if let Some(last) = last {
            keep_down_to(&last, kept);
        }
    }
}

/// The allowed ids whose logit is at least `floor` (and has any probability), ascending.
fn collect(row: &[f32], forbidden: &[u32], lse: &LogSumExp, tops: &[f32], floor: f32, out: &mut Vec<Candidate>) {
    out.clear();
    let floor = floor.max(f32::MIN);
    let mut w = [0.0; BLOCK];
    for (b, (x, words)) in blocks(row, forbidden).enumerate() {
        let tops = &tops[b * (BLOCK / GROUP)..][..words.len()];
        if tops.iter().all(|&top| top < floor) {
            continue;
        }
        weights(x, words, lse.max, lse.inv_t, &mut w);
        for g in (0..words.len()).filter(|&g| tops[g] >= floor) {
            let at = g * GROUP;
            // Each takes a place that the next overwrites unless it counts: there is no branch to guess.
            let (mut group, mut n) = ([Candidate::default(); GROUP], 0);
            for (i, x) in allowed(x, words, g).into_iter().enumerate() {
                group[n % GROUP] = Candidate { x, weight: w[at + i], id: (b * BLOCK + at + i) as u32 };
                n += usize::from(x >= floor);
            }
            out.extend_from_slice(&group[..n]);
        }
    }
}

/// Larger logits first, of equals the lower id. None is NaN: the log-sum-exp was finite.
fn descending(a: &Candidate, b: &Candidate) -> Ordering {
    b.x.partial_cmp(&a.x).unwrap_or(Ordering::Equal).then(a.id.cmp(&b.id))
}

/// Drops all but the fewest of the largest candidates whose sizes reach `mass`; all stay if together they don't.
///
/// Sizes are summed by bins of the distance to the largest logit, which tells the bin of the cut; only that bin's
/// candidates (in `mixed`) are compared with each other.
fn keep_largest(
    kept: &mut Vec<Candidate>,
    mixed: &mut Vec<Candidate>,
    lse: &LogSumExp,
    size: impl Fn(&Candidate) -> f64,
    mass: f64,
) {
    const BINS: usize = 1024;
    /// Bins for a factor of e in weight; all of them go down to e^-32.
    const PER_NAT: f32 = 32.0;
    // Rounding keeps the order: a larger logit is in no later bin.
    let bin = |c: &Candidate| (((lse.max - c.x) * lse.inv_t * PER_NAT) as usize).min(BINS - 1);
    let mut sums = [0.0f64; BINS];
    kept.iter().for_each(|c| sums[bin(c)] += size(c));
    let (mut before, mut cut) = (0.0, 0);
    while cut < BINS && before + sums[cut] < mass {
        before += sums[cut];
        cut += 1;
    }
    mixed.clear();
    mixed.extend(kept.iter().filter(|c| bin(c) == cut));
    // The answer is in lo + 1..=hi, and `before` is the size of all that are larger than mixed[lo..].
    let (mut lo, mut hi) = (0, mixed.len());
    while hi - lo > 1 {
        let half = (hi - lo) / 2;
        mixed[lo..hi].select_nth_unstable_by(half, descending);
        let upper: f64 = mixed[lo..lo + half].iter().map(&size).sum();
        if before + upper >= mass {
            hi = lo + half;
        } else {
            before += upper;
            lo += half;
        }
    }
    if let Some(last) = mixed.get(lo) {
        keep_down_to(last, kept);
    }
}

/// Drops what comes after `last` in [`descending`] order.
fn keep_down_to(last: &Candidate, kept: &mut Vec<Candidate>) {
    // Every candidate moves to the next free place, and keeps it if it stays: there is no branch to guess.
    let mut n = 0;
    for i in 0..kept.len() {
        let c = kept[i];
        kept[n] = c;
        n += usize::from((c.x > last.x) | ((c.x == last.x) & (c.id <= last.id)));
    }
    kept.truncate(n);
}

/// A number in [0, 1) of 53 bits that depends on these three alone.
fn uniform(seed: u64, stream: u64, position: u32) -> f64 {
    let r = philox([position, stream as u32, (stream >> 32) as u32, 0], [seed as u32, (seed >> 32) as u32]);
    let bits = ((r[0] as u64) << 32 | r[1] as u64) >> 11;
    bits as f64 / (1u64 << 53) as f64
}

/// Philox4x32-10: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011.
fn philox(mut c: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = 0xD251_1F53u64 * c[0] as u64;
        let b = 0xCD9E_8D57u64 * c[2] as u64;
        c = [(b >> 32) as u32 ^ c[1] ^ key[0], b as u32, (a >> 32) as u32 ^ c[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    c
}

#[cfg(test)]
mod tests {
    use super::super::softmax::{is_forbidden, log_sum_exp};
    use super::super::testing::{devices, noise};
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
    const PLAIN: Row =
        Row { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 9, stream: 1 << 40, position: 0 };

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

    #[test]
    fn philox_gives_the_published_numbers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
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
}
