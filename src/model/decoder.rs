//! The language model: embeddings with image rows put in, decoder layers over paged keys and values, final norm, head.

use super::Config;
use super::layer::{self, LayerActs, LayerShape, Rope};
use super::params::{LayerParams, TextParams};
use crate::device::{Buffer, DType, Device, Stream};
use crate::ops::attention::{self, Segments};
use crate::ops::embedding::Table;
use crate::ops::kv_cache::{self, KvCache, KvLayer};
use crate::ops::linear::{self, Epilogue};
use crate::ops::{embedding, rms_norm, rope, rows};

impl Config {
    /// The shape of a decoder layer.
    pub fn layer_shape(&self) -> LayerShape {
        LayerShape {
            hidden: self.hidden_size,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim(),
            intermediate: self.intermediate_size,
            eps: self.rms_norm_eps,
        }
    }
}

/// How much one step may hold; buffers are planned for it once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepLimits {
    /// Tokens of all segments together.
    pub tokens: usize,
    /// Segments (sequences).
    pub segments: usize,
    /// KV pages of one sequence: width of a row of the block table.
    pub blocks_per_segment: usize,
    /// Rows of logits.
    pub logits: usize,
}

/// One step's tokens as the host lays them out. Segments follow one another without gaps.
#[derive(Clone, Debug, Default)]
pub struct StepInput {
    /// `[t]`: token ids; [`embedding::NO_TOKEN`] where the row is an image's.
    pub ids: Vec<u32>,
    /// Time, height and width of each token, `[t]` each.
    pub positions: super::positions::Positions,
    /// `[t]`: where each token's key and value go, `block * BLOCK + offset`.
    pub slots: Vec<u32>,
    /// `[i]`: which rows of the step are an image's.
    pub image_rows: Vec<u32>,
    /// `[i]`: which row of the vision output stands there.
    pub image_sources: Vec<u32>,
    /// `[n + 1]`: where each segment begins.
    pub cu_seqlens_q: Vec<u32>,
    /// `[n]`: context of each segment in tokens, this step's included.
    pub kv_lens: Vec<u32>,
    /// `[n]`: pages of each segment's context, in order.
    pub block_tables: Vec<Vec<u32>>,
}

impl StepInput {
    /// Empties all lists and keeps their memory.
    pub fn clear(&mut self) {
        self.ids.clear();
        self.positions.iter_mut().for_each(Vec::clear);
        self.slots.clear();
        self.image_rows.clear();
        self.image_sources.clear();
        self.cu_seqlens_q.clear();
        self.kv_lens.clear();
        self.block_tables.clear();
    }
}

/// One step's tokens on the device.
pub struct StepBatch {
    /// Tokens.
    pub tokens: usize,
    /// Rows that are an image's.
    pub images: usize,
    /// u32 `[t]`
    pub ids: Buffer,
    /// u32 `[3, t]`
    pub positions: Buffer,
    /// u32 `[t]`
    pub slots: Buffer,
    /// u32 `[images]`
    pub image_rows: Buffer,
    /// u32 `[images]`
    pub image_sources: Buffer,
    /// Queries and the pages they attend to.
    pub segments: Segments,
    /// Rows whose keys and values also go to further slots (the shared prompt's last, partly filled page, in training):
    /// first row, count, slots.
    pub(super) copies: Vec<(usize, usize, Buffer)>,
    staging: Vec<u32>,
}

impl StepBatch {
    /// Room for a step within `limits`.
    pub fn new(device: &Device, limits: &StepLimits) -> StepBatch {
        let room = |n: usize| device.zeros(DType::U32, n);
        StepBatch {
            tokens: 0,
            images: 0,
            ids: room(limits.tokens),
            positions: room(3 * limits.tokens),
            slots: room(limits.tokens),
            image_rows: room(limits.tokens),
            image_sources: room(limits.tokens),
            segments: Segments {
                cu_seqlens_q: room(limits.segments + 1),
                kv_lens: room(limits.segments),
                block_tables: room(limits.segments * limits.blocks_per_segment),
                stride: limits.blocks_per_segment,
                n: 0,
                rows: 0,
            },
            copies: Vec::new(),
            staging: Vec::new(),
        }
    }

    /// Submits the upload of `input`.
    ///
    /// # Panics
    /// If it does not fit the limits this batch was made for, or its lists disagree about their lengths.
    pub fn upload(&mut self, s: &Stream, input: &StepInput) {
        let (t, n) = (input.ids.len(), input.kv_lens.len());
        assert!(input.slots.len() == t && input.positions.iter().all(|p| p.len() == t), "lists of {t} tokens");
        assert!(input.cu_seqlens_q.len() == n + 1 && input.block_tables.len() == n, "lists of {n} segments");
        assert_eq!(input.image_rows.len(), input.image_sources.len(), "a source for each image row");
        (self.tokens, self.images) = (t, input.image_rows.len());
        (self.segments.n, self.segments.rows) = (n, t);
        s.write(&self.ids, &input.ids);
        self.staging.clear();
        input.positions.iter().for_each(|p| self.staging.extend_from_slice(p));
        s.write(&self.positions, &self.staging);
        s.write(&self.slots, &input.slots);
        s.write(&self.image_rows, &input.image_rows);
        s.write(&self.image_sources, &input.image_sources);
        s.write(&self.segments.cu_seqlens_q, &input.cu_seqlens_q);
        s.write(&self.segments.kv_lens, &input.kv_lens);
        self.staging.clear();
        for table in &input.block_tables {
            assert!(table.len() <= self.segments.stride, "{} pages of at most {}", table.len(), self.segments.stride);
            self.staging.extend_from_slice(table);
            self.staging.resize(self.staging.len().next_multiple_of(self.segments.stride.max(1)), 0);
        }
        s.write(&self.segments.block_tables, &self.staging);
    }
}

/// Buffers of a forward pass without gradients, planned once.
pub struct Workspace {
    /// `[tokens, hidden]`: the residual stream.
    x: Buffer,
    /// `[tokens, hidden]`: the result.
    hidden: Buffer,
    rope: Rope,
    acts: LayerActs,
    /// `[logits, hidden]`
    last: Buffer,
}

impl Workspace {
    /// Room for steps within `limits`.
    pub fn new(config: &Config, device: &Device, limits: &StepLimits) -> Workspace {
        let (shape, h) = (config.layer_shape(), config.hidden_size);
        let x = device.alloc(device.float(), limits.tokens * h);
        Workspace {
            hidden: device.alloc(device.float(), limits.tokens * h),
            rope: Rope::new(device, limits.tokens, shape.head_dim),
            acts: LayerActs::in_place(device, &shape, limits.tokens, &x),
            last: device.alloc(device.float(), limits.logits * h),
            x,
        }
    }
}

/// Token embeddings into `x`, with rows of `vision` (`[.., hidden]`) where the step has images. `scratch`: as large as `x`.
pub(super) fn embed(
    s: &Stream,
    c: &Config,
    p: &TextParams,
    b: &StepBatch,
    vision: Option<&Buffer>,
    scratch: &Buffer,
    x: &Buffer,
) {
    let h = c.hidden_size;
    embedding::forward(s, &b.ids, table(p), x, b.tokens, h);
    if let (Some(vision), true) = (vision, b.images > 0) {
        rows::gather(s, vision, &b.image_sources, scratch, b.images, h);
        rows::scatter(s, scratch, &b.image_rows, x, b.images, h);
    }
}

/// The embedding table: its own, or the tied head.
pub(super) fn table(p: &TextParams) -> Table<'_> {
    p.embed.as_ref().map_or(Table::Packed(&p.head), Table::Rows)
}

/// Rotary tables for the step's positions.
pub(super) fn rope_tables(s: &Stream, c: &Config, b: &StepBatch, r: &Rope) {
    rope::mrope_tables(s, &b.positions, c.mrope_section, c.rope_theta, c.head_dim(), &r.cos, &r.sin, b.tokens);
}

/// Keys and values of this step into their pages.
pub(super) fn write_pages(s: &Stream, shape: &LayerShape, b: &StepBatch, qkv: &Buffer, cache: &KvCache, kv: &KvLayer) {
    kv_cache::write(s, kv, cache, shape.kv_tokens(qkv, &b.slots, b.tokens));
    for (first, n, slots) in &b.copies {
        let from = qkv.view(first * shape.qkv_width(), n * shape.qkv_width());
        kv_cache::write(s, kv, cache, shape.kv_tokens(&from, slots, *n));
    }
}

/// One decoder layer: `x` to `out`, which may be the same if `a` is [in place](LayerActs::in_place), or left out if it is
/// known already.
pub(super) fn layer(
    s: &Stream,
    shape: &LayerShape,
    p: &LayerParams,
    b: &StepBatch,
    rope: &Rope,
    cache: &KvCache,
    kv: &KvLayer,
    x: &Buffer,
    a: &LayerActs,
    out: Option<&Buffer>,
) {
    layer::before_attention(s, shape, p, rope, x, a, b.tokens);
    write_pages(s, shape, b, &a.qkv, cache, kv);
    attention::paged_forward(
        s,
        &a.qkv,
        shape.qkv_width(),
        kv,
        &b.segments,
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        shape.scale(),
        &a.attn,
        a.lse.as_ref(),
    );
    layer::after_attention(s, shape, p, x, a, out, b.tokens);
}

/// All of the decoder but the head. Returns `[tokens, hidden]` after the final norm, in the workspace: valid until the next
/// call with it.
pub(super) fn forward(
    s: &Stream,
    c: &Config,
    p: &TextParams,
    b: &StepBatch,
    cache: &KvCache,
    vision: Option<&Buffer>,
    ws: &Workspace,
) -> Buffer {
    let shape = c.layer_shape();
    embed(s, c, p, b, vision, &ws.hidden, &ws.x);
    rope_tables(s, c, b, &ws.rope);
    for (p, kv) in p.layers.iter().zip(&cache.layers) {
        layer(s, &shape, p, b, &ws.rope, cache, kv, &ws.x, &ws.acts, Some(&ws.x));
    }
    rms_norm::forward(s, &ws.x, &p.norm, c.rms_norm_eps, &ws.hidden, b.tokens, c.hidden_size);
    ws.hidden.clone()
}

/// Logits `[n, vocab]` of `n` rows of `hidden`; `index`: u32 `[n]`.
pub(super) fn logits(
    s: &Stream,
    c: &Config,
    p: &TextParams,
    hidden: &Buffer,
    index: &Buffer,
    ws: &Workspace,
    out: &Buffer,
    n: usize,
) {
    rows::gather(s, hidden, index, &ws.last, n, c.hidden_size);
    linear::forward(s, &ws.last, &p.head, Epilogue::None, out, n);
}
