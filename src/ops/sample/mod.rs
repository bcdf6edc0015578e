//! Drawing the next token of each sequence from its logits.
//!
//! **What is drawn.** Temperature first, ids that are forbidden are left out, then top-k, then top-p (the nucleus of
//! Holtzman et al. 2020, arXiv 1904.09751) of what top-k left, then min-p (arXiv 2407.01082); the token is drawn from what
//! remains. Temperature 0 takes the largest logit, the first of equals.
//!
//! **What is reported.** The log-probability after temperature and forbidden ids and before top-k, top-p and min-p: what
//! the trainer computes for the same logits, to the bit ([`softmax`]). For temperature 0 it is the one at
//! temperature 1.
//!
//! **Noise.** One uniform number u in [0, 1) of 53 bits per token, from Philox4x32-10 (Salmon et al. 2011) with the
//! seed as key and (position, stream) as counter: nothing about the batch enters. The token is the first id, in ascending
//! order, whose cumulative probability exceeds u. (Gumbel noise for each id would give the same distribution at the
//! price of a random number and two logarithms for every id of the vocabulary.)

mod draw;
#[cfg(test)]
mod tests;

use super::philox::philox;
use super::softmax::{self, block_count, forbidden_words};
use crate::device::{Arg, Backend, Buffer, DType, Launch, SendPtr, Stream};
use draw::{How, draw};

/// Threads of the kernel's blocks, one for each row.
const THREADS: usize = 512;

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
        Backend::Gpu(gpu) if b > 0 => {
            let blocks = block_count(v);
            let [sums] = gpu.scratch([(DType::F32, b * blocks * 2)]);
            softmax::gpu_blocks(gpu, &logits, None, &p.temperature, &forbidden, &sums, None, [b, 0, v]);
            let args = [
                &logits,
                &sums,
                &p.temperature,
                &p.top_k,
                &p.top_p,
                &p.min_p,
                &p.seed,
                &p.stream_id,
                &p.position,
                &forbidden,
                &tokens,
                &logps,
            ];
            let args: Vec<Arg<'_>> = args.into_iter().map(Arg::Buffer).chain([Arg::len(v)]).collect();
            // A block of ids has a mass in f64 and a largest logit in f32.
            gpu.launch("sample", Launch::linear(b, THREADS).shared(blocks * 12), &args);
        }
        Backend::Gpu(_) => {}
    }
}

/// A number in [0, 1) of 53 bits that depends on these three alone.
fn uniform(seed: u64, stream: u64, position: u32) -> f64 {
    let r = philox([position, stream as u32, (stream >> 32) as u32, 0], [seed as u32, (seed >> 32) as u32]);
    let bits = ((r[0] as u64) << 32 | r[1] as u64) >> 11;
    bits as f64 / (1u64 << 53) as f64
}
