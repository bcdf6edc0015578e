//! The launches of `kernels/attention/`.
//!
//! Grids come from what the host knows, the numbers of rows and segments: blocks find their rows in `cu_seqlens`, and those
//! that find none are done. Which kernel serves a call, and over how many blocks a tile's keys are spread, changes no bit.

use super::tiles::Heads;
use super::{KV_CUT, Paged};
use crate::Error;
use crate::device::{Arg, Buffer, DType, Gpu, Launch};
use crate::ops::kv_cache::{BLOCK, KvLayer};

/// What the kernels are made for: `HD` of their names.
/// Elements of the heads that there are kernels for.
pub const HEAD_DIMS: [usize; 4] = [16, 64, 80, 128];
const THREADS: usize = 128;
/// Rows (queries times query heads of a KV head) of a tile, and of a tile of decoding.
const TILE: usize = 64;
const DECODE_TILE: usize = 16;
/// Keys that a block of the backward owns.
const KEYS: usize = 64;
/// Blocks of decoding that a multiprocessor should have to keep its memory busy.
const BLOCKS_ABREAST: usize = 3;
/// The most bytes that results of cuts may take. Where they would need more, a block has all cuts of its tile.
const PARTS: usize = 256 << 20;

/// The gradients' operands: what the forward gave, and the gradient of its output.
pub(super) struct Given<'a> {
    pub out: &'a Buffer,
    pub lse: &'a Buffer,
    pub dout: &'a Buffer,
}

/// Whether there are kernels for these heads. Where not, the stream keeps that as its failure.
fn served(gpu: &Gpu, heads: &Heads) -> bool {
    let served = HEAD_DIMS.contains(&heads.hd);
    if !served {
        gpu.refuse(Error::limit(
            format!("there is no attention kernel for heads of {} elements", heads.hd),
            format!("use a model with heads of {HEAD_DIMS:?} elements, or the processor (--device cpu)"),
        ));
    }
    served
}

/// The grid of a kernel whose tiles have so many rows: places for `rows` rows of `n` segments.
fn grid(rows: usize, tile: usize, n: usize, heads: usize, shared_bytes: usize) -> Launch {
    let places = Launch::linear(rows / tile + n, THREADS);
    let [x, ..] = places.grid;
    // Too many heads for the field are too many for a launch, which refuses them.
    Launch { grid: [x, u32::try_from(heads).unwrap_or(u32::MAX), 1], ..places }.shared(shared_bytes)
}

/// Bytes of `rows` rows of heads in shared memory.
fn shared(rows: usize, heads: &Heads) -> usize {
    rows * heads.hd * DType::BF16.size()
}

/// Asserts that buffers hold `rows` rows: `strided` rows of `q_stride`, `wide` of all heads, `narrow` of one float a head.
fn check(heads: &Heads, rows: usize, q_stride: usize, strided: &[&Buffer], wide: &[&Buffer], narrow: &[&Buffer]) {
    let width = heads.hq() * heads.hd;
    for (buffers, needed) in
        [(strided, (rows.max(1) - 1) * q_stride + width), (wide, rows * width), (narrow, rows * heads.hq())]
    {
        for b in buffers {
            assert!(rows == 0 || b.len() >= needed, "{rows} rows of attention need {needed} elements, not {b:?}");
        }
    }
}

impl Paged {
    /// The arguments that every kernel over pages begins with.
    fn args<'a>(&'a self, q: &'a Buffer, q_stride: usize) -> [Arg<'a>; 12] {
        let s = &self.segments;
        [
            Arg::Buffer(q),
            Arg::len(q_stride),
            Arg::Buffer(&self.kv.k),
            Arg::Buffer(&self.kv.v),
            Arg::Buffer(&s.cu_seqlens_q),
            Arg::Buffer(&s.kv_lens),
            Arg::Buffer(&s.block_tables),
            Arg::Buffer(&s.table_rows),
            Arg::len(s.stride),
            Arg::len(s.n),
            Arg::len(self.heads.group),
            Arg::F32(self.heads.scale),
        ]
    }

    /// Whether pages can be copied 16 bytes at a time, and two elements of rows read and written at once.
    fn aligned(&self, gpu: &Gpu, rows: &[&Buffer]) -> bool {
        gpu.require_alignment(16, &[&self.kv.k, &self.kv.v]) && gpu.require_alignment(4, rows)
    }

    pub(super) fn forward_gpu(&self, gpu: &Gpu, q: &Buffer, q_stride: usize, out: &Buffer, lse: Option<&Buffer>) {
        let (s, heads) = (&self.segments, &self.heads);
        check(heads, s.rows, q_stride, &[q], &[out], lse.as_slice());
        if s.rows == 0 || !served(gpu, heads) || !self.aligned(gpu, &[q, out]) {
            return;
        }
        let lse = Arg::maybe(lse, DType::F32);
        let mut args = self.args(q, q_stride).to_vec();
        args.extend([Arg::Buffer(out), lse]);
        let rows = s.rows * heads.group;
        if rows > DECODE_TILE * s.n {
            let launch = grid(rows, TILE, s.n, heads.hkv, shared(2 * KV_CUT + TILE, heads));
            return gpu.launch(&format!("attention_paged_forward_{}", heads.hd), launch, &args);
        }
        let cuts = (s.stride * BLOCK).div_ceil(KV_CUT);
        let parts = s.rows * heads.hq() * cuts;
        let wanted = (BLOCKS_ABREAST * gpu.multiprocessors()).div_ceil(s.n * heads.hkv).min(cuts);
        let spread = if parts * (heads.hd + 2) * DType::F32.size() > PARTS { 1 } else { wanted };
        let mut launch = grid(rows, DECODE_TILE, s.n, heads.hkv, shared(2 * KV_CUT + DECODE_TILE, heads));
        launch.grid[2] = spread as u32;
        let kernel = format!("attention_decode_{}", heads.hd);
        if spread == 1 {
            args.extend([Arg::Null(DType::F32), Arg::Null(DType::F32), Arg::len(cuts)]);
            return gpu.launch(&kernel, launch, &args);
        }
        let [values, sums] = gpu.scratch([(DType::F32, parts * heads.hd), (DType::F32, parts * 2)]);
        let (values, sums) = (Arg::Buffer(&values), Arg::Buffer(&sums));
        args.extend([values, sums, Arg::len(cuts)]);
        gpu.launch(&kernel, launch, &args);
        let args = [
            values,
            sums,
            Arg::Buffer(&s.cu_seqlens_q),
            Arg::Buffer(&s.kv_lens),
            Arg::len(s.n),
            Arg::len(heads.hq()),
            Arg::len(heads.hd),
            Arg::len(cuts),
            Arg::Buffer(out),
            lse,
        ];
        gpu.launch("attention_decode_combine", Launch::linear(s.rows * heads.hq(), THREADS), &args);
    }

    pub(super) fn backward_gpu(
        &self,
        gpu: &Gpu,
        q: &Buffer,
        q_stride: usize,
        given: &Given<'_>,
        dq: &Buffer,
        dkv: &KvLayer,
    ) {
        let (s, heads) = (&self.segments, &self.heads);
        let Given { out, lse, dout } = *given;
        check(heads, s.rows, q_stride, &[q, dq], &[out, dout], &[lse]);
        if s.rows == 0 || !served(gpu, heads) || !self.aligned(gpu, &[q, dq, out, dout]) {
            return;
        }
        let [delta] = gpu.scratch([(DType::F32, s.rows * heads.hq())]);
        let mut args = self.args(q, q_stride).to_vec();
        args.extend([out, lse, dout, dq, &delta].map(Arg::Buffer));
        let launch = grid(s.rows * heads.group, TILE, s.n, heads.hkv, shared(4 * KEYS, heads));
        gpu.launch(&format!("attention_paged_backward_queries_{}", heads.hd), launch, &args);
        let mut args = self.args(q, q_stride).to_vec();
        args.extend([lse, dout, &delta, &dkv.k, &dkv.v].map(Arg::Buffer));
        let tiles = s.n * (s.stride * BLOCK).div_ceil(KEYS);
        let launch = grid(tiles, 1, 0, heads.hkv, shared(4 * KEYS, heads));
        gpu.launch(&format!("attention_paged_backward_keys_{}", heads.hd), launch, &args);
    }
}

/// Packed windows: `qkv` `[_, 3 * h * hd]`, `n` windows.
pub(super) struct Windows<'a> {
    pub qkv: &'a Buffer,
    pub cu_seqlens: &'a Buffer,
    pub n: usize,
    pub heads: Heads,
    pub causal: bool,
}

impl Windows<'_> {
    fn args(&self) -> [Arg<'_>; 5] {
        [
            Arg::Buffer(self.qkv),
            Arg::Buffer(self.cu_seqlens),
            Arg::len(self.n),
            Arg::F32(self.heads.scale),
            Arg::I32(i32::from(self.causal)),
        ]
    }

    /// Whole rows in buffers of all heads, of `qkv`, and of one float a head: no window goes past them.
    fn rows(&self, wide: &[&Buffer], triple: &[&Buffer], narrow: &[&Buffer]) -> usize {
        let width = self.heads.hq() * self.heads.hd;
        let each = [(wide, width), (triple, 3 * width), (narrow, self.heads.hq())];
        each.iter().flat_map(|(buffers, width)| buffers.iter().map(move |b| b.len() / width)).min().unwrap_or(0)
    }

    pub(super) fn forward(&self, gpu: &Gpu, out: &Buffer, lse: Option<&Buffer>) {
        let rows = self.rows(&[out], &[self.qkv], lse.as_slice());
        if rows * self.n == 0 || !served(gpu, &self.heads) || !gpu.require_alignment(4, &[self.qkv, out]) {
            return;
        }
        let mut args = self.args().to_vec();
        args.extend([Arg::Buffer(out), Arg::maybe(lse, DType::F32)]);
        let launch = grid(rows, TILE, self.n, self.heads.hkv, shared(2 * KV_CUT + TILE, &self.heads));
        gpu.launch(&format!("attention_varlen_forward_{}", self.heads.hd), launch, &args);
    }

    pub(super) fn backward(&self, gpu: &Gpu, given: &Given<'_>, dqkv: &Buffer) {
        let Given { out, lse, dout } = *given;
        let (heads, rows) = (&self.heads, self.rows(&[out, dout], &[self.qkv, dqkv], &[lse]));
        let buffers = [self.qkv, dqkv, out, dout];
        if rows * self.n == 0 || !served(gpu, heads) || !gpu.require_alignment(4, &buffers) {
            return;
        }
        let [delta] = gpu.scratch([(DType::F32, rows * heads.hq())]);
        let launch = grid(rows, TILE, self.n, heads.hkv, shared(4 * KEYS, heads));
        let mut args = self.args().to_vec();
        args.extend([out, lse, dout, dqkv, &delta].map(Arg::Buffer));
        gpu.launch(&format!("attention_varlen_backward_queries_{}", heads.hd), launch, &args);
        let mut args = self.args().to_vec();
        args.extend([lse, dout, &delta, dqkv].map(Arg::Buffer));
        gpu.launch(&format!("attention_varlen_backward_keys_{}", heads.hd), launch, &args);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_has_the_shared_memory_that_it_takes() {
        for hd in HEAD_DIMS {
            let heads = Heads::new(1, 1, hd, 1.0);
            let most = [2 * KV_CUT + TILE, 2 * KV_CUT + DECODE_TILE, 4 * KEYS].map(|rows| shared(rows, &heads));
            // Beside it decoding has powers, maxima and sums of its own, of fixed size: less than 6 KiB.
            assert!(
                most.iter().all(|bytes| bytes + (6 << 10) <= 99 << 10),
                "sm_86 and sm_89 give a block 99 KiB: {most:?}"
            );
        }
    }
}
