//! The language model: embeddings with image rows put in, decoder layers over paged keys and values, final norm, head.

use super::Config;
use super::layer::{self, LayerActs, LayerShape, Rope};
use super::params::{LayerParams, TextParams};
use crate::device::{Buffer, DType, Device, Input, Inputs, Stream};
use crate::ops::attention::{self, Segments};
use crate::ops::embedding::{NO_TOKEN, Table};
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
    /// KV pages of one sequence: width of a row of the block tables, which are as many as segments.
    pub blocks_per_segment: usize,
    /// Rows of logits.
    pub logits: usize,
}

/// An entry of a block table: the page of tokens `index * BLOCK..` of the sequence that has row `row`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableEntry {
    /// Row of the block tables.
    pub row: u32,
    /// Place in that row.
    pub index: u32,
    /// The page.
    pub page: u32,
}

/// One step's tokens as the host lays them out. Segments follow one another without gaps.
///
/// Block tables stay on the device from step to step: a step brings the entries that have changed, so that what it costs does
/// not grow with the context.
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
    /// `[n]`: the row of the block tables that each segment has, all different.
    pub table_rows: Vec<u32>,
    /// What has changed in the block tables since the last step with the same [`StepBatch`], each entry once.
    pub table_changes: Vec<TableEntry>,
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
        self.table_rows.clear();
        self.table_changes.clear();
    }

    /// Appends a segment's context, the pages of which become the next row of the block tables: for batches that stand alone.
    pub fn push_table(&mut self, kv_len: usize, pages: &[u32]) {
        let row = self.kv_lens.len() as u32;
        self.kv_lens.push(kv_len as u32);
        self.table_rows.push(row);
        let entries = pages.iter().enumerate().map(|(i, &page)| TableEntry { row, index: i as u32, page });
        self.table_changes.extend(entries);
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
    inputs: Inputs,
    limits: StepLimits,
    reach: Reach,
}

/// One more than the largest index of each kind in a step: a GPU does not check what it reads from memory.
#[derive(Clone, Copy, Default)]
struct Reach {
    ids: usize,
    slots: usize,
    pages: usize,
    image_rows: usize,
    image_sources: usize,
}

/// One more than the largest.
fn reach(indices: impl Iterator<Item = u32>) -> usize {
    indices.max().map_or(0, |i| i as usize + 1)
}

impl StepBatch {
    /// Bytes of room for steps within `limits`.
    pub fn bytes(limits: &StepLimits) -> usize {
        (Self::most_words(limits) + limits.segments * limits.blocks_per_segment) * DType::U32.size()
    }

    /// So many words that no step of an engine outgrows them: seven lists of rows, three of segments, all that the tables hold with
    /// its places, up to twelve that are added for each row of logits, and what lies between lists. A training batch, which may
    /// add more, is sent once.
    fn most_words(limits: &StepLimits) -> usize {
        let StepLimits { tokens, segments, blocks_per_segment, logits } = *limits;
        7 * tokens + 3 * segments + 2 * segments * blocks_per_segment + 12 * logits + 128
    }

    /// Room for steps within `limits`.
    pub fn new(device: &Device, limits: &StepLimits) -> StepBatch {
        let StepLimits { segments, blocks_per_segment, .. } = *limits;
        let mut inputs = Inputs::new(device, size_of::<u32>() * Self::most_words(limits));
        let nothing = inputs.put_all::<u32>(&[]);
        let nothing = inputs.get(nothing);
        StepBatch {
            tokens: 0,
            images: 0,
            ids: nothing.clone(),
            positions: nothing.clone(),
            slots: nothing.clone(),
            image_rows: nothing.clone(),
            image_sources: nothing.clone(),
            segments: Segments {
                cu_seqlens_q: nothing.clone(),
                kv_lens: nothing.clone(),
                block_tables: device.zeros(DType::U32, segments * blocks_per_segment),
                table_rows: nothing,
                stride: blocks_per_segment,
                n: 0,
                rows: 0,
            },
            copies: Vec::new(),
            inputs,
            limits: *limits,
            reach: Reach::default(),
        }
    }

    /// Submits the upload of `input`.
    ///
    /// # Panics
    /// If it does not fit the limits this batch was made for, or its lists disagree about their lengths.
    pub fn upload(&mut self, s: &Stream, input: &StepInput) {
        self.upload_with(s, input, None, |_| ());
    }

    /// Submits the upload of `input` and of the lists that `more` adds, which [`added`](Self::added) gives as buffers. With `size`, a
    /// step in which every segment has one row is filled up to so many rows with ones that are nobody's: steps of one size then
    /// lie where the last one lay, if `more` adds lists of the same lengths.
    ///
    /// # Panics
    /// As [`upload`](Self::upload).
    pub(crate) fn upload_with<R>(
        &mut self,
        s: &Stream,
        input: &StepInput,
        size: Option<usize>,
        more: impl FnOnce(&mut Inputs) -> R,
    ) -> R {
        let (t, n) = (input.ids.len(), input.kv_lens.len());
        assert!(input.slots.len() == t && input.positions.iter().all(|p| p.len() == t), "lists of {t} tokens");
        assert!(input.cu_seqlens_q.len() == n + 1 && input.table_rows.len() == n, "lists of {n} segments");
        assert_eq!(input.image_rows.len(), input.image_sources.len(), "a source for each image row");
        let StepLimits { tokens, segments, blocks_per_segment: stride, .. } = self.limits;
        let (rows, padded) = (size.unwrap_or(t), size.unwrap_or(n));
        assert!(rows <= tokens && padded <= segments, "{rows} rows and {padded} segments in {:?}", self.limits);
        assert!(
            input.table_rows.iter().all(|&row| (row as usize) < segments),
            "a row past the {segments} block tables"
        );
        let place = |e: &TableEntry| {
            let (row, index) = (e.row as usize, e.index as usize);
            assert!(row < segments && index < stride, "{e:?} in {segments} block tables of {stride} pages");
            (row * stride + index) as u32
        };
        let reach_of = |indices: &[u32]| reach(indices.iter().copied());
        self.reach = Reach {
            ids: reach(input.ids.iter().copied().filter(|&id| id != NO_TOKEN)),
            slots: reach_of(&input.slots),
            // The tables keep what earlier steps have put there.
            pages: self.reach.pages.max(reach(input.table_changes.iter().map(|e| e.page))),
            image_rows: reach_of(&input.image_rows),
            image_sources: reach_of(&input.image_sources),
        };
        let i = &mut self.inputs;
        i.clear();
        let ids = i.put(input.ids.iter().copied(), rows, NO_TOKEN);
        let filled = |axis| Iterator::chain(<[u32]>::iter(axis).copied(), std::iter::repeat_n(0, rows - t));
        let positions = i.put(input.positions.iter().flat_map(|axis| filled(axis)), 3 * rows, 0);
        let slots = i.put(input.slots.iter().copied(), rows, kv_cache::NO_SLOT);
        let cu_seqlens_q = i.put(input.cu_seqlens_q.iter().copied(), padded + 1, t as u32);
        let kv_lens = i.put(input.kv_lens.iter().copied(), padded, 0);
        let table_rows = i.put(input.table_rows.iter().copied(), padded, 0);
        let more = more(i);
        let image_rows = i.put_all(&input.image_rows);
        let image_sources = i.put_all(&input.image_sources);
        let changes = input.table_changes.len();
        let places = i.put(input.table_changes.iter().map(place), changes, 0);
        let pages = i.put(input.table_changes.iter().map(|e| e.page), changes, 0);
        i.send(s);
        (self.tokens, self.images) = (rows, input.image_rows.len());
        (self.segments.n, self.segments.rows) = (padded, rows);
        (self.ids, self.positions, self.slots) = (i.get(ids), i.get(positions), i.get(slots));
        (self.image_rows, self.image_sources) = (i.get(image_rows), i.get(image_sources));
        (self.segments.cu_seqlens_q, self.segments.kv_lens) = (i.get(cu_seqlens_q), i.get(kv_lens));
        self.segments.table_rows = i.get(table_rows);
        rows::put(s, changes, &i.get(places), None, &i.get(pages), &self.segments.block_tables);
        more
    }

    /// A list that `more` added to the last upload.
    pub(crate) fn added(&self, input: Input) -> Buffer {
        self.inputs.get(input)
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
    /// Bytes of room for steps within `limits`, where activations are of type `float`.
    pub fn bytes(config: &Config, float: DType, limits: &StepLimits) -> usize {
        let (shape, h) = (config.layer_shape(), config.hidden_size);
        let row = (2 * h + shape.in_place_values(float)) * float.size() + Rope::row_bytes(shape.head_dim);
        limits.tokens * row + limits.logits * h * float.size()
    }

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
    assert!(b.reach.ids <= c.vocab_size, "token {} of a vocabulary of {}", b.reach.ids - 1, c.vocab_size);
    embedding::forward(s, &b.ids, table(p), x, b.tokens, h);
    if let (Some(vision), true) = (vision, b.images > 0) {
        let there = b.reach.image_rows <= b.tokens && b.reach.image_sources * h <= vision.len();
        assert!(there, "an image's row past the {} tokens, or from past the end of {vision:?}", b.tokens);
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

/// Keys and values of this step into their pages: `qkv` as a layer leaves it.
pub(super) fn write_pages(s: &Stream, shape: &LayerShape, b: &StepBatch, qkv: &Buffer, cache: &KvCache, kv: &KvLayer) {
    kv_cache::write(s, kv, cache, shape.kv_tokens(qkv, &b.slots, b.tokens));
    write_copies(s, shape, b, qkv, cache, kv);
}

/// The keys and values that more pages than one hold.
fn write_copies(s: &Stream, shape: &LayerShape, b: &StepBatch, qkv: &Buffer, cache: &KvCache, kv: &KvLayer) {
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
    let (Reach { slots, pages, .. }, blocks) = (b.reach, cache.blocks);
    let there = slots <= blocks * kv_cache::BLOCK && pages <= blocks;
    assert!(there, "slots up to {slots} and pages up to {pages} of a cache of {blocks} pages");
    layer::before_rope(s, shape, p, x, a, b.tokens);
    let tokens = shape.kv_tokens(&a.qkv, &b.slots, b.tokens);
    kv_cache::rotate_and_write(s, kv, cache, tokens, shape.heads, &rope.cos, &rope.sin);
    write_copies(s, shape, b, &a.qkv, cache, kv);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{LoadOptions, Model, Preset};

    #[test]
    fn a_step_that_points_outside_is_refused_before_it_is_launched() {
        let d = Device::cpu(1);
        let model = Model::random(Preset::Tiny.config(), 1, &d, &LoadOptions::default()).unwrap();
        let limits = StepLimits { tokens: 2, segments: 1, blocks_per_segment: 1, logits: 1 };
        let (ws, cache) = (Workspace::new(&model.config, &d, &limits), model.kv_cache(2));
        let vision = d.zeros(d.float(), model.config.hidden_size);
        let refused = |change: fn(&mut StepInput)| {
            let mut input = StepInput {
                ids: vec![1, NO_TOKEN],
                slots: vec![32, 33],
                image_rows: vec![1],
                image_sources: vec![0],
                cu_seqlens_q: vec![0, 2],
                kv_lens: vec![2],
                table_rows: vec![0],
                table_changes: vec![TableEntry { row: 0, index: 0, page: 1 }],
                ..StepInput::default()
            };
            input.positions.iter_mut().for_each(|p| p.extend([0, 1]));
            change(&mut input);
            let mut step = StepBatch::new(&d, &limits);
            step.upload(&d.stream(), &input);
            let forward = || model.forward(&d.stream(), &step, &cache, Some(&vision), &ws);
            let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(forward)).err()?;
            Some(crate::error::panic_message(&*panic).to_string())
        };
        assert_eq!(refused(|_| ()), None);
        let said = |change| refused(change).unwrap();
        assert!(said(|i| i.ids[0] = 1 << 20).contains("token 1048576 of a vocabulary of"));
        assert!(said(|i| i.slots[0] = 64).contains("slots up to 65"));
        assert!(said(|i| i.table_changes[0].page = 2).contains("pages up to 3 of a cache of 2 pages"));
        assert!(said(|i| i.image_rows[0] = 2).contains("an image's row past the 2 tokens"));
        assert!(said(|i| i.image_sources[0] = 1).contains("from past the end"));
    }
}
