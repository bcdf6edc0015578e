//! One file per operation: its mathematics and shapes, the CPU path, and the backward where training needs one.
//!
//! Every op is a free function that takes the [`Stream`](crate::device::Stream) first, checks its shapes, and submits
//! one launch. Matrices are row-major `[rows, cols]` f32 unless said otherwise. Nothing here knows a model.
//!
//! **The order of additions.** For a given weight shape no op's result for a row depends on how many rows there are,
//! which other rows there are, or how many threads run: reductions go over ascending indices in an order fixed by the
//! shape alone. The log-probability that sampled a token is therefore the one that the trainer computes, bit for bit.

pub mod adamw;
pub mod attention;
pub mod cast;
pub mod embedding;
pub mod gelu;
pub mod kv_cache;
pub mod linear;
pub mod loss;
pub mod patch_embed;
mod philox;
pub mod rms_norm;
pub mod rope;
pub mod rows;
pub mod sample;
pub(crate) mod simd;
pub mod softmax;
pub mod swiglu;
#[cfg(test)]
pub(crate) mod testing;
