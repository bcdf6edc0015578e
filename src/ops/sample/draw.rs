//! A draw on the host: one row, one thread.

use super::super::softmax::{BLOCK, GROUP, LogSumExp, allowed, blocks, group_maxima, log_sum_exp_blocks, weights};
use super::NO_SAMPLE;
use std::cell::RefCell;
use std::cmp::Ordering;

/// The parameters of one row; `u` is its uniform number.
pub(super) struct How {
    pub temperature: f32,
    pub top_k: usize,
    pub top_p: f32,
    pub min_p: f32,
    pub u: f64,
}

#[derive(Clone, Copy, Default)]
pub(super) struct Candidate {
    x: f32,
    /// `exp((x - max) / T)`
    pub weight: f32,
    pub id: u32,
}

#[derive(Default)]
pub(super) struct Scratch {
    /// Sums of the blocks of a row.
    sums: Vec<f32>,
    /// The largest allowed logit of each group of 32 ids.
    tops: Vec<f32>,
    sorted_tops: Vec<f32>,
    /// What truncation has left, ascending.
    pub kept: Vec<Candidate>,
    /// Those among which a cut is looked for, in any order.
    mixed: Vec<Candidate>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

pub(super) fn draw(row: &[f32], forbidden: &[u32], how: &How) -> (u32, f32) {
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
pub(super) fn truncate(row: &[f32], forbidden: &[u32], how: &How, lse: &LogSumExp, scratch: &mut Scratch) {
    let Scratch { tops, sorted_tops, kept, mixed, .. } = scratch;
    let top_k = if how.top_k == 0 { usize::MAX } else { how.top_k };
    tops.resize(forbidden.len(), 0.0);
    group_maxima(row, forbidden, tops);
    // min-p is a bound by itself: exp((x - max) / T) >= min_p. An id at the bound is decided exactly below. But what min-p drops
    // counts for a nucleus of what top-k leaves.
    let of_top_k = how.top_p < 1.0 && top_k < row.len();
    let mut floor = if of_top_k { f32::MIN } else { lse.max + how.min_p.min(1.0).ln() / lse.inv_t };
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
pub(super) fn collect(
    row: &[f32],
    forbidden: &[u32],
    lse: &LogSumExp,
    tops: &[f32],
    floor: f32,
    out: &mut Vec<Candidate>,
) {
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
pub(super) fn descending(a: &Candidate, b: &Candidate) -> Ordering {
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
