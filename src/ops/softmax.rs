//! The log-sum-exp of a row of logits, over the ids that may be sampled. The sampler and the trainer's loss both take
//! their log-probabilities from here, which makes them equal bit for bit.
//!
//! `logp(id) = (x[id] - max) / T - ln(sum over allowed ids of exp((x - max) / T))`. The sum goes over blocks of 1024
//! ids: 32 f32 lanes ascending within a block, the blocks ascending in f64.

use super::simd::{exp, madd, multiversion, sum_lanes};
use crate::device::{Arg, Buffer, DType, Gpu, Launch};

/// Ids per partial sum.
pub(super) const BLOCK: usize = 1024;
/// Ids per word of the forbidden set, and the number of lanes.
pub(super) const GROUP: usize = 32;

/// The log-softmax of one row at one temperature.
#[derive(Clone, Copy, Debug)]
pub struct LogSumExp {
    /// The largest allowed logit.
    pub max: f32,
    /// One over the temperature.
    pub inv_t: f32,
    /// `ln(sum of exp((x - max) / T))`; not finite if a logit is NaN or +inf, or no id is allowed.
    pub log_sum: f32,
}

impl LogSumExp {
    /// The log-probability of an allowed id whose logit is `x`.
    pub fn logp(&self, x: f32) -> f32 {
        (x - self.max) * self.inv_t - self.log_sum
    }

    /// The log-sum-exp itself: `ln(sum of exp(x / T))`.
    pub fn value(&self) -> f32 {
        self.max * self.inv_t + self.log_sum
    }
}

/// The temperature at which log-probabilities are taken: `t`, or 1 for greedy decoding (`t` = 0).
pub fn scoring_temperature(t: f32) -> f32 {
    if t > 0.0 { t } else { 1.0 }
}

/// Words of a forbidden set over `v` ids: bit `id % 32` of word `id / 32` is set if the id can't be sampled.
pub fn forbidden_words(v: usize) -> usize {
    v.div_ceil(GROUP)
}

/// The set of `ids` over `v` ids, in the words that [`forbidden_words`] describes. Panics if an id is not below `v`.
pub fn forbidden_set(v: usize, ids: &[u32]) -> Vec<u32> {
    let mut words = vec![0; forbidden_words(v)];
    for &id in ids {
        assert!((id as usize) < v, "id {id} of a vocabulary of {v}");
        words[id as usize / GROUP] |= 1 << (id as usize % GROUP);
    }
    words
}

/// Whether `id` is in the set.
pub fn is_forbidden(forbidden: &[u32], id: usize) -> bool {
    forbidden[id / GROUP] >> (id % GROUP) & 1 == 1
}

/// The log-softmax of `row` `[v]` at `temperature` (0: see [`scoring_temperature`]) over the ids not in `forbidden`
/// ([`forbidden_words`]`(v)` words). On the host, one row, one thread.
pub fn log_sum_exp(row: &[f32], temperature: f32, forbidden: &[u32]) -> LogSumExp {
    log_sum_exp_blocks(row, temperature, forbidden, |_| ())
}

/// [`log_sum_exp`]; `each` gets the sum of `exp((x - max) / T)` of every block of [`BLOCK`] ids, ascending.
pub(super) fn log_sum_exp_blocks(
    row: &[f32],
    temperature: f32,
    forbidden: &[u32],
    mut each: impl FnMut(f32),
) -> LogSumExp {
    assert_eq!(forbidden.len(), forbidden_words(row.len()), "a forbidden set over {} ids", row.len());
    let max = largest(row, forbidden);
    let inv_t = 1.0 / scoring_temperature(temperature);
    let mut total = 0.0f64;
    for (x, words) in blocks(row, forbidden) {
        let sum = block_sum(x, words, max, inv_t);
        each(sum);
        total += sum as f64;
    }
    LogSumExp { max, inv_t, log_sum: total.ln() as f32 }
}

/// Blocks of [`BLOCK`] ids in a vocabulary of `v`.
pub(super) fn block_count(v: usize) -> usize {
    v.div_ceil(BLOCK)
}

/// Threads of the first pass's blocks, and blocks of ids that each goes through.
const THREADS: usize = 128;
const AT_A_TIME: usize = THREADS / 32;

/// The first pass over logits on a GPU: of each block of ids of each run (a row at a temperature) the largest logit and the sum,
/// into `sums` f32 `[runs, blocks, 2]`, and what the entropy needs into `moments` `[runs, blocks]`. The row of run r is
/// `rows[r] - first_row`, or r. `temperature` is f32 `[runs]`.
pub(super) fn gpu_blocks(
    gpu: &Gpu,
    logits: &Buffer,
    rows: Option<&Buffer>,
    temperature: &Buffer,
    forbidden: &Buffer,
    sums: &Buffer,
    moments: Option<&Buffer>,
    [runs, first_row, v]: [usize; 3],
) {
    let blocks = block_count(v).div_ceil(AT_A_TIME);
    // Too many for a launch's field are refused by it.
    let launch = Launch { grid: [runs, blocks, 1].map(|n| n as u32), ..Launch::linear(runs, THREADS) };
    gpu.launch(
        "softmax_blocks",
        launch,
        &[
            Arg::Buffer(logits),
            Arg::maybe(rows, DType::U32),
            Arg::Buffer(temperature),
            Arg::Buffer(forbidden),
            Arg::Buffer(sums),
            Arg::maybe(moments, DType::F32),
            Arg::len(first_row),
            Arg::len(v),
        ],
    );
}

/// The entropy, in nats, of the distribution that `lse` describes: `-sum p ln p` over the allowed ids.
pub fn entropy(row: &[f32], forbidden: &[u32], lse: &LogSumExp) -> f32 {
    let moment: f64 = blocks(row, forbidden).map(|(x, w)| block_moment(x, w, lse.max, lse.inv_t) as f64).sum();
    let log_sum = lse.log_sum as f64;
    (log_sum - moment / log_sum.exp()) as f32
}

/// A row and its forbidden set, cut into blocks.
pub(super) fn blocks<'a>(row: &'a [f32], forbidden: &'a [u32]) -> impl Iterator<Item = (&'a [f32], &'a [u32])> {
    row.chunks(BLOCK).zip(forbidden.chunks(BLOCK / GROUP))
}

/// Group `g` of a row, with -inf for forbidden ids and past the end.
#[inline(always)]
pub(super) fn allowed(row: &[f32], words: &[u32], g: usize) -> [f32; GROUP] {
    let x = &row[g * GROUP..row.len().min((g + 1) * GROUP)];
    let mut v = [f32::NEG_INFINITY; GROUP];
    if let Ok(x) = <&[f32; GROUP]>::try_from(x) {
        v = *x;
    } else {
        v[..x.len()].copy_from_slice(x);
    }
    if words[g] != 0 {
        for (i, v) in v.iter_mut().enumerate() {
            if words[g] >> i & 1 == 1 {
                *v = f32::NEG_INFINITY;
            }
        }
    }
    v
}

// Groups go through memory, where registers of AVX-512 were slower (sampling with a temperature by a third): the bodies
// here use AVX2 at most.

/// The largest allowed logit; NaN is passed over (it shows in the sum).
#[inline(always)]
fn largest_body<const FMA: bool>(row: &[f32], forbidden: &[u32]) -> f32 {
    let mut acc = [f32::NEG_INFINITY; GROUP];
    for g in 0..forbidden.len() {
        let v = allowed(row, forbidden, g);
        for i in 0..GROUP {
            acc[i] = if v[i] > acc[i] { v[i] } else { acc[i] };
        }
    }
    acc.into_iter().fold(f32::NEG_INFINITY, f32::max)
}
multiversion!(fn largest(row: &[f32], forbidden: &[u32]) -> f32 = largest_body, "avx2,fma");

#[inline(always)]
fn group_maxima_body<const FMA: bool>(row: &[f32], forbidden: &[u32], tops: &mut [f32]) {
    for (g, top) in tops.iter_mut().enumerate() {
        let mut v = allowed(row, forbidden, g);
        let mut n = GROUP / 2;
        while n > 0 {
            for i in 0..n {
                v[i] = if v[i + n] > v[i] { v[i + n] } else { v[i] };
            }
            n /= 2;
        }
        *top = v[0];
    }
}
multiversion!(
    /// The largest allowed logit of each group; there is no NaN in the row.
    pub(super) fn group_maxima(row: &[f32], forbidden: &[u32], tops: &mut [f32]) = group_maxima_body, "avx2,fma"
);

#[inline(always)]
fn block_sum_body<const FMA: bool>(x: &[f32], words: &[u32], max: f32, inv_t: f32) -> f32 {
    let mut acc = [0.0f32; GROUP];
    for g in 0..words.len() {
        let v = allowed(x, words, g);
        for i in 0..GROUP {
            acc[i] += exp::<FMA>((v[i] - max) * inv_t);
        }
    }
    sum_lanes(acc)
}
multiversion!(fn block_sum(x: &[f32], words: &[u32], max: f32, inv_t: f32) -> f32 = block_sum_body, "avx2,fma");

/// `sum of z exp(z)`, z = (x - max) / T.
#[inline(always)]
fn block_moment_body<const FMA: bool>(x: &[f32], words: &[u32], max: f32, inv_t: f32) -> f32 {
    let mut acc = [0.0f32; GROUP];
    for g in 0..words.len() {
        let v = allowed(x, words, g);
        for i in 0..GROUP {
            let z = (v[i] - max) * inv_t;
            // Where exp(z) is zero z must not be -inf.
            let bounded = if z < -100.0 { -100.0 } else { z };
            acc[i] = madd::<FMA>(exp::<FMA>(z), bounded, acc[i]);
        }
    }
    sum_lanes(acc)
}
multiversion!(fn block_moment(x: &[f32], words: &[u32], max: f32, inv_t: f32) -> f32 = block_moment_body, "avx2,fma");

#[inline(always)]
fn weights_body<const FMA: bool>(x: &[f32], words: &[u32], max: f32, inv_t: f32, out: &mut [f32; BLOCK]) {
    for g in 0..words.len() {
        let v = allowed(x, words, g);
        let out = &mut out[g * GROUP..][..GROUP];
        for i in 0..GROUP {
            out[i] = exp::<FMA>((v[i] - max) * inv_t);
        }
    }
}
multiversion!(
    /// Writes `exp((x - max) / T)` of one block; zero for forbidden ids.
    pub(super) fn weights(x: &[f32], words: &[u32], max: f32, inv_t: f32, out: &mut [f32; BLOCK]) = weights_body, "avx2,fma"
);

#[cfg(test)]
mod tests {
    use super::super::testing::{noise, same_on_every_isa};
    use super::*;

    #[test]
    fn equals_the_f64_sum_over_allowed_ids() {
        for v in [1, 31, 32, 33, 1000, 1024, 5003] {
            for t in [0.3f32, 1.0, 2.5] {
                let row: Vec<f32> = noise(v, 7).iter().map(|x| x * 20.0 + 300.0).collect();
                let ids: Vec<u32> = (0..v as u32).filter(|i| i % 7 == 3).collect();
                let forbidden = forbidden_set(v, &ids);
                assert!((0..v).all(|i| is_forbidden(&forbidden, i) == (i % 7 == 3)));
                let got = log_sum_exp(&row, t, &forbidden);
                let allowed = || (0..v).filter(|&i| !is_forbidden(&forbidden, i)).map(|i| row[i] as f64 / t as f64);
                let top = allowed().fold(f64::MIN, f64::max);
                let lse = allowed().map(|z| (z - top).exp()).sum::<f64>().ln() + top;
                assert!((got.value() as f64 - lse).abs() < 1e-6 * lse.abs(), "{} not {lse}", got.value());
                for i in (0..v).filter(|&i| !is_forbidden(&forbidden, i)) {
                    let want = row[i] as f64 / t as f64 - lse;
                    assert!((got.logp(row[i]) as f64 - want).abs() < 4e-6 * (1.0 + want.abs()));
                }
                let h = -allowed().map(|z| (z - lse) * (z - lse).exp()).sum::<f64>();
                assert!((entropy(&row, &forbidden, &got) as f64 - h).abs() < 1e-5, "entropy at {v}, {t}");
            }
        }
    }

    #[test]
    fn what_is_not_a_distribution_is_not_finite() {
        let good = [1.0f32; 40];
        assert!(log_sum_exp(&good, 1.0, &[0, 0]).log_sum.is_finite());
        assert!(!log_sum_exp(&good, 1.0, &[u32::MAX, 0xFF]).log_sum.is_finite(), "nothing allowed");
        for bad in [f32::NAN, f32::INFINITY] {
            let mut row = good;
            row[35] = bad;
            assert!(!log_sum_exp(&row, 1.0, &[0, 0]).log_sum.is_finite());
            assert!(log_sum_exp(&row, 1.0, &[0, 1 << 3]).log_sum.is_finite(), "a forbidden id is not looked at");
        }
        assert!(!log_sum_exp(&[f32::NEG_INFINITY; 40], 1.0, &[0, 0]).log_sum.is_finite());
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let v = 5003;
        let row: Vec<f32> = noise(v, 7).iter().map(|x| x * 20.0).collect();
        let forbidden: Vec<u32> = noise(forbidden_words(v), 8).iter().map(|x| x.to_bits()).collect();
        same_on_every_isa(|_| {
            let mut results = vec![];
            let lse = log_sum_exp_blocks(&row, 0.7, &forbidden, |sum| results.push(sum));
            let (mut tops, mut w) = (vec![0.0; forbidden.len()], [0.0; BLOCK]);
            group_maxima(&row, &forbidden, &mut tops);
            weights(&row[..BLOCK], &forbidden[..BLOCK / GROUP], lse.max, lse.inv_t, &mut w);
            results.extend([lse.max, lse.log_sum, entropy(&row, &forbidden, &lse)]);
            [results, tops, w.to_vec()].concat()
        });
    }

    #[test]
    fn greedy_is_scored_at_temperature_one() {
        let row = noise(100, 3);
        let (a, b) = (log_sum_exp(&row, 0.0, &[0; 4]), log_sum_exp(&row, 1.0, &[0; 4]));
        assert_eq!(a.logp(row[5]).to_bits(), b.logp(row[5]).to_bits());
    }
}
