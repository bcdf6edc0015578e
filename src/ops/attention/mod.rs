//! Attention without a matrix of scores (Dao et al., arXiv 2205.14135), over pages and over packed rows.
//!
//! **The order of additions.** Keys are cut at logical positions that are multiples of [`KV_CUT`]. Each cut starts fresh,
//! with its own maximum, sum and accumulators, in an order fixed by positions within the cut; cuts are then combined in
//! ascending order. A query's result is therefore a function of the query and its context alone: the same to the bit
//! for one query at a time, for any chunking of a prompt, packed for training with pages shared between segments, and on
//! any number of threads. The backward recomputes scores from the log-sum-exp and adds in an order fixed by the batch.
//!
//! Query heads that share a KV head are rows of one tile, so that a key is read once for all of them.

mod backward;
mod forward;
mod gpu;
mod kernels;
#[cfg(test)]
mod tests;
mod tiles;
mod vector;

pub use gpu::HEAD_DIMS;

use crate::device::{Backend, Buffer, SendPtr, Stream};
use crate::ops::kv_cache::{BLOCK, KvLayer};
use backward::Backward;
use forward::Forward;
use gpu::{Given, Windows};
use tiles::{Call, Heads, Segment, Source};

/// Keys of a cut: where the sum over keys starts fresh. A multiple of [`BLOCK`].
pub const KV_CUT: usize = 128;

/// Which queries belong to which sequence, and where its pages are.
///
/// Query i of a segment with `q_len` queries has position `kv_len - q_len + i` and sees keys `0..=position`.
/// Block tables may share pages (a common prompt); a page has the same logical place in all that share it.
#[derive(Clone)]
pub struct Segments {
    /// u32 `[n + 1]`: segment i's queries are rows `cu_seqlens_q[i]..cu_seqlens_q[i + 1]`.
    pub cu_seqlens_q: Buffer,
    /// u32 `[n]`: tokens of context, the segment's own queries included.
    pub kv_lens: Buffer,
    /// u32 `[_, stride]`: the pages of each segment in order; `kv_len / BLOCK` of them, rounded up, are read.
    pub block_tables: Buffer,
    /// u32 `[n]`: which row of the block tables is each segment's.
    pub table_rows: Buffer,
    /// Entries of a segment's block table.
    pub stride: usize,
    /// Segments.
    pub n: usize,
    /// Queries of all segments: `cu_seqlens_q[n]`. A GPU's grids are made for so many.
    pub rows: usize,
}

/// The pages and the segments of a call.
struct Paged {
    kv: KvLayer,
    /// How many pages there are.
    pages: usize,
    segments: Segments,
    heads: Heads,
}

impl Paged {
    /// Asserts that the pages are whole, and that queries of `q_stride` floats have room for their heads.
    fn new(kv: &KvLayer, segments: &Segments, heads: Heads, q_stride: usize) -> Paged {
        let (Heads { hkv, hd, padded, .. }, hq) = (heads, heads.hq());
        let pages = kv.k.len() / (hkv * hd * BLOCK);
        assert_eq!(
            (kv.k.len(), kv.v.len()),
            (pages * hkv * hd * BLOCK, pages * hkv * padded * BLOCK),
            "pages of {hkv} heads of {hd}"
        );
        assert!(hq * hd <= q_stride, "{hq} heads of {hd} in rows of {q_stride}");
        Paged { kv: kv.clone(), pages, segments: segments.clone(), heads }
    }

    /// Reads the segments; asserts that they fit the rows and the pages.
    ///
    /// # Safety
    /// As [`Buffer::get`].
    unsafe fn segments(&self, rows: usize) -> Vec<Segment> {
        let Segments { cu_seqlens_q, kv_lens, block_tables, table_rows, stride, n, .. } = &self.segments;
        // SAFETY: by contract.
        let [cu, kv_lens, tables, table_rows] =
            unsafe { [cu_seqlens_q, kv_lens, block_tables, table_rows].map(|b| b.get::<u32>()) };
        let mut segments = Vec::with_capacity(*n);
        for (i, (cu, &kv_len)) in cu[..=*n].windows(2).zip(&kv_lens[..*n]).enumerate() {
            let (from, to, kv_len) = (cu[0] as usize, cu[1] as usize, kv_len as usize);
            assert!(
                from <= to && to <= rows && to - from <= kv_len,
                "segment {i}: queries {from}..{to} of {rows}, {kv_len} keys"
            );
            assert!(kv_len <= stride * BLOCK, "segment {i}: {kv_len} keys in a table of {stride} pages");
            let table_row = table_rows[i] as usize;
            let table = &tables[table_row * stride..][..kv_len.div_ceil(BLOCK)];
            assert!(
                table.iter().all(|&p| (p as usize) < self.pages),
                "segment {i}: a page past the cache's {}",
                self.pages
            );
            segments.push(Segment { q_row: from, q_len: to - from, kv_len, table_row, causal: true });
        }
        segments
    }

    /// # Safety
    /// As [`Buffer::get`].
    unsafe fn call<'a>(&'a self, segments: &'a [Segment]) -> Call<'a> {
        let tables = &self.segments.block_tables;
        // SAFETY: by contract.
        let (k, v, tables) = unsafe { (self.kv.k.get(), self.kv.v.get(), tables.get()) };
        let source = Source::Pages { k, v, tables, stride: self.segments.stride };
        Call { kernels: kernels::best(), heads: self.heads, segments, source }
    }
}

/// Reads packed windows of rows that see each other; asserts that they fit.
fn read_windows(cu_seqlens: &[u32], rows: usize, causal: bool) -> Vec<Segment> {
    cu_seqlens
        .windows(2)
        .map(|w| {
            let (from, to) = (w[0] as usize, w[1] as usize);
            assert!(from <= to && to <= rows, "window {from}..{to} of {rows} rows");
            Segment { q_row: from, q_len: to - from, kv_len: to - from, table_row: 0, causal }
        })
        .collect()
}

/// A call on windows of the rows `x`: `[_, 3 * h * hd]`.
fn windows_call<'a>(x: &'a [f32], heads: Heads, segments: &'a [Segment]) -> Call<'a> {
    let width = heads.hq() * heads.hd;
    Call {
        kernels: kernels::best(),
        heads,
        segments,
        source: Source::Rows { x, row: 3 * width, k: width, v: 2 * width },
    }
}

/// Causal attention over pages: decode, prefill in chunks, and training are this one function.
///
/// `q`: rows of `q_stride` floats that start with `[hq, hd]` queries; `kv`: the layer's pages, this call's tokens
/// already written; `out`: `[t, hq * hd]` for the `t` rows of the segments; `lse`: the natural log-sum-exp of the scaled
/// scores, `[t, hq]`, which [`paged_backward`] needs. `hq` is a multiple of `hkv`.
pub fn paged_forward(
    s: &Stream,
    q: &Buffer,
    q_stride: usize,
    kv: &KvLayer,
    seg: &Segments,
    hq: usize,
    hkv: usize,
    hd: usize,
    scale: f32,
    out: &Buffer,
    lse: Option<&Buffer>,
) {
    let paged = Paged::new(kv, seg, Heads::new(hq, hkv, hd, scale), q_stride);
    let (q, out, lse) = (q.clone(), out.clone(), lse.cloned());
    match s.backend() {
        // SAFETY: launches run one after the other; shapes are asserted against every buffer.
        Backend::Cpu(s) => s.launch(move |pool| unsafe {
            let (out, lse) = (out.get_mut::<f32>(), lse.as_ref().map(|l| l.get_mut::<f32>()));
            let rows = rows_of(q.len(), q_stride, hq * hd)
                .min(out.len() / (hq * hd))
                .min(lse.as_ref().map_or(usize::MAX, |l| l.len() / hq));
            let segments = paged.segments(rows);
            let lse = lse.map(|l| SendPtr(l.as_mut_ptr()));
            let (call, q) = (paged.call(&segments), q.get::<f32>().as_ptr());
            Forward { call, q, q_row: q_stride, out: SendPtr(out.as_mut_ptr()), lse }.run(pool);
        }),
        Backend::Gpu(gpu) => paged.forward_gpu(gpu, &q, q_stride, &out, lse.as_ref()),
    }
}

/// Whole rows in a buffer of `len` floats whose last row may end after its first `width`.
fn rows_of(len: usize, stride: usize, width: usize) -> usize {
    if len < width { 0 } else { (len - width) / stride + 1 }
}

/// The backward of [`paged_forward`].
///
/// `out`, `lse`: what the forward gave; `dout`: `[t, hq * hd]`; `dq`: written, in rows of `q_stride` as `q` and apart from
/// it (other columns are left alone); `dkv`: pages of gradients in the layout of `kv`, **added to**. Segments may share
/// pages; what they add to a page is added in the order of the segments.
pub fn paged_backward(
    s: &Stream,
    q: &Buffer,
    q_stride: usize,
    kv: &KvLayer,
    seg: &Segments,
    hq: usize,
    hkv: usize,
    hd: usize,
    scale: f32,
    out: &Buffer,
    lse: &Buffer,
    dout: &Buffer,
    dq: &Buffer,
    dkv: &KvLayer,
) {
    let paged = Paged::new(kv, seg, Heads::new(hq, hkv, hd, scale), q_stride);
    assert_eq!((kv.k.len(), kv.v.len()), (dkv.k.len(), dkv.v.len()), "gradient pages of another shape");
    let (q, out, lse) = (q.clone(), out.clone(), lse.clone());
    let (dout, dq, dkv) = (dout.clone(), dq.clone(), dkv.clone());
    match s.backend() {
        // SAFETY: launches run one after the other; shapes are asserted against every buffer.
        Backend::Cpu(s) => s.launch(move |pool| unsafe {
            let rows = rows_of(q.len().min(dq.len()), q_stride, hq * hd)
                .min(out.len().min(dout.len()) / (hq * hd))
                .min(lse.len() / hq);
            let segments = paged.segments(rows);
            Backward {
                call: paged.call(&segments),
                q: q.get::<f32>().as_ptr(),
                q_row: q_stride,
                out: out.get::<f32>().as_ptr(),
                lse: lse.get::<f32>().as_ptr(),
                dout: dout.get::<f32>().as_ptr(),
                dq: SendPtr(dq.get_mut::<f32>().as_mut_ptr()),
                dk: SendPtr(dkv.k.get_mut::<f32>().as_mut_ptr()),
                dv: SendPtr(dkv.v.get_mut::<f32>().as_mut_ptr()),
            }
            .run(pool);
        }),
        Backend::Gpu(gpu) => {
            paged.backward_gpu(gpu, &q, q_stride, &Given { out: &out, lse: &lse, dout: &dout }, &dq, &dkv);
        }
    }
}

/// Attention within packed windows, for the vision tower.
///
/// `qkv`: `[t, 3 * h * hd]` (all query heads, all key heads, all value heads); `cu_seqlens`: u32 `[n + 1]`, window i is
/// rows `cu_seqlens[i]..cu_seqlens[i + 1]`; `out`: `[t, h * hd]`; `lse`: `[t, h]`, for [`varlen_backward`].
pub fn varlen_forward(
    s: &Stream,
    qkv: &Buffer,
    cu_seqlens: &Buffer,
    n: usize,
    h: usize,
    hd: usize,
    scale: f32,
    causal: bool,
    out: &Buffer,
    lse: Option<&Buffer>,
) {
    let heads = Heads::new(h, h, hd, scale);
    let (qkv, cu_seqlens, out, lse) = (qkv.clone(), cu_seqlens.view(0, n + 1), out.clone(), lse.cloned());
    match s.backend() {
        // SAFETY: launches run one after the other; shapes are asserted against every buffer.
        Backend::Cpu(s) => s.launch(move |pool| unsafe {
            let (x, width) = (qkv.get::<f32>(), h * hd);
            let (out, lse) = (out.get_mut::<f32>(), lse.as_ref().map(|l| l.get_mut::<f32>()));
            let rows =
                (x.len() / (3 * width)).min(out.len() / width).min(lse.as_ref().map_or(usize::MAX, |l| l.len() / h));
            let segments = read_windows(cu_seqlens.get::<u32>(), rows, causal);
            let call = windows_call(x, heads, &segments);
            let lse = lse.map(|l| SendPtr(l.as_mut_ptr()));
            Forward { call, q: x.as_ptr(), q_row: 3 * width, out: SendPtr(out.as_mut_ptr()), lse }.run(pool);
        }),
        Backend::Gpu(gpu) => {
            Windows { qkv: &qkv, cu_seqlens: &cu_seqlens, n, heads, causal }.forward(gpu, &out, lse.as_ref());
        }
    }
}

/// The backward of [`varlen_forward`]: `dqkv`, `[t, 3 * h * hd]`, is written for the rows of the windows.
///
/// `out`, `lse`: what the forward gave; `dout`: `[t, h * hd]`.
pub fn varlen_backward(
    s: &Stream,
    qkv: &Buffer,
    cu_seqlens: &Buffer,
    n: usize,
    h: usize,
    hd: usize,
    scale: f32,
    causal: bool,
    out: &Buffer,
    lse: &Buffer,
    dout: &Buffer,
    dqkv: &Buffer,
) {
    let heads = Heads::new(h, h, hd, scale);
    let (qkv, cu_seqlens, out, lse) = (qkv.clone(), cu_seqlens.view(0, n + 1), out.clone(), lse.clone());
    let (dout, dqkv) = (dout.clone(), dqkv.clone());
    match s.backend() {
        // SAFETY: launches run one after the other; shapes are asserted against every buffer.
        Backend::Cpu(s) => s.launch(move |pool| unsafe {
            let (x, width) = (qkv.get::<f32>(), h * hd);
            let rows =
                (x.len().min(dqkv.len()) / (3 * width)).min(out.len().min(dout.len()) / width).min(lse.len() / h);
            let segments = read_windows(cu_seqlens.get::<u32>(), rows, causal);
            let dx = SendPtr(dqkv.get_mut::<f32>().as_mut_ptr());
            Backward {
                call: windows_call(x, heads, &segments),
                q: x.as_ptr(),
                q_row: 3 * width,
                out: out.get::<f32>().as_ptr(),
                lse: lse.get::<f32>().as_ptr(),
                dout: dout.get::<f32>().as_ptr(),
                dq: dx,
                dk: SendPtr(dx.get().wrapping_add(width)),
                dv: SendPtr(dx.get().wrapping_add(2 * width)),
            }
            .run(pool);
        }),
        Backend::Gpu(gpu) => {
            let given = Given { out: &out, lse: &lse, dout: &dout };
            Windows { qkv: &qkv, cu_seqlens: &cu_seqlens, n, heads, causal }.backward(gpu, &given, &dqkv);
        }
    }
}
