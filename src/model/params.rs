//! The parameters: one flat buffer, made of segments, with a name for each tensor in it.
//!
//! ```text
//! flat  [ trainable, decayed | trainable, not decayed | frozen ]
//! ```
//!
//! Gradients, moments and checkpoints mirror the trainable front of the buffer element for element, so clipping and AdamW
//! are passes over flat ranges. Matrices are in [`linear`]'s packed layout; the projections that are always computed
//! together (query, key, value; gate, up) are one matrix, whose row ranges keep the names they have in a checkpoint.

use super::config::Config;
use crate::device::{Buffer, DType, Device, Stream};
use crate::ops::linear::{self, PANEL, Weight};
use crate::ops::patch_embed::{INPUTS, PATCH};
use crate::{Error, Result};
use std::collections::HashMap;
use std::ops::Range;

/// Segments begin at multiples of this many elements: 64 bytes of f32, 32 of bf16.
const ALIGN: usize = 16;
/// Elements of a stripe: 4 MB, so that a stripe being converted stays near a core.
const STRIPE: usize = 1 << 20;

/// How a segment's `[n, k]` elements lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Row-major.
    Plain,
    /// [`linear`]'s panels, on the host's cores; lanes past `n` are zero, and so are their gradients.
    Packed,
}

/// A tensor as a checkpoint has it: a range of rows of a segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Its name on the hub, such as `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// Its shape in the file; the product is `rows.len() * k` of the segment.
    pub shape: Vec<usize>,
    /// Its rows within the segment.
    pub rows: Range<usize>,
}

/// A contiguous piece of the flat buffer that one op reads.
#[derive(Clone, Debug)]
pub struct Segment {
    /// What the model calls it, such as `layers.0.qkv.weight`.
    pub name: String,
    /// First element in the flat buffer.
    pub offset: usize,
    /// Rows (outputs of a matrix; elements of a vector).
    pub n: usize,
    /// Columns (inputs of a matrix; 1 for a vector).
    pub k: usize,
    /// How the elements lie.
    pub layout: Layout,
    /// Whether weight decay applies (matrices, not biases and norms).
    pub decay: bool,
    /// Whether training moves it.
    pub trainable: bool,
    /// What it starts from in a random model.
    pub init: Init,
    /// The tensors it holds; their rows partition `0..n`.
    pub tensors: Vec<Tensor>,
}

/// The start of a parameter in a random model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Every element the same: 1 for a norm, 0 for a bias.
    Constant(f32),
    /// Normally distributed around 0 with this standard deviation.
    Normal(f32),
}

impl Segment {
    /// Elements in the flat buffer, padding of the packed layout included.
    pub fn stored(&self) -> usize {
        match self.layout {
            Layout::Plain => self.n * self.k,
            Layout::Packed => linear::packed_len(self.n, self.k),
        }
    }

    /// The row-major elements of `rows`, which begin at a multiple of [`PANEL`] if the layout is packed.
    fn place(&self, rows: &Range<usize>) -> Range<usize> {
        let start = self.offset + rows.start * self.k;
        match self.layout {
            Layout::Plain => start..start + rows.len() * self.k,
            Layout::Packed => start..start + linear::packed_len(rows.len(), self.k),
        }
    }

    /// Its rows in stripes of about four megabytes of f32, which begin where [`read`](Self::read) and [`write`](Self::write) can:
    /// what moves between the device and a file at a time.
    pub(crate) fn stripes(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let rows = match self.layout {
            Layout::Plain => (STRIPE / self.k).max(1),
            Layout::Packed => (STRIPE / self.k / PANEL).max(1) * PANEL,
        };
        let n = self.n;
        (0..n).step_by(rows).map(move |first| first..n.min(first + rows))
    }

    /// Writes row-major `values` of `rows` (whole panels, or up to the last row) into `flat`, f32 or bf16.
    pub(crate) fn write(&self, s: &Stream, flat: &Buffer, rows: Range<usize>, values: &[f32]) {
        let place = self.place(&rows);
        let to = flat.view(place.start, place.len());
        match self.layout {
            Layout::Plain => s.write_floats(&to, values),
            Layout::Packed => {
                let mut packed = vec![0.0; place.len()];
                linear::pack(values, rows.len(), self.k, &mut packed);
                s.write_floats(&to, &packed);
            }
        }
    }

    /// The row-major values of `rows`, any range, out of `flat`.
    pub(crate) fn read(&self, s: &Stream, flat: &Buffer, rows: Range<usize>) -> Result<Vec<f32>> {
        let first = match self.layout {
            Layout::Plain => rows.start,
            Layout::Packed => rows.start / PANEL * PANEL,
        };
        let whole = first..rows.end;
        let place = self.place(&whole);
        let stored = s.read_floats(&flat.view(place.start, place.len()))?;
        Ok(match self.layout {
            Layout::Plain => stored,
            Layout::Packed => {
                let mut out = vec![0.0; whole.len() * self.k];
                linear::unpack(&stored, whole.len(), self.k, &mut out);
                out.drain(..(rows.start - first) * self.k);
                out
            }
        })
    }
}

/// All parameters of a model.
pub struct ParamStore {
    /// `[trainable, decayed | trainable, not decayed | frozen]`, of the device's [`float`](Device::float).
    pub flat: Buffer,
    segments: Vec<Segment>,
    /// Hub name -> (segment, tensor).
    names: HashMap<String, (usize, usize)>,
    decayed: usize,
    trainable: usize,
}

impl ParamStore {
    /// The segments of `config`'s shape, all zero.
    ///
    /// # Errors
    /// [`Error::Limit`] if they do not fit the device's memory.
    pub fn new(config: &Config, device: &Device, freeze_vision: bool) -> Result<ParamStore> {
        let (segments, [decayed, trainable, end]) = placed(config, device.packs_weights(), freeze_vision);
        let names = segments.iter().enumerate();
        let names = names.flat_map(|(i, s)| s.tensors.iter().enumerate().map(move |(j, t)| (t.name.clone(), (i, j))));
        let names = names.collect();
        device.check_room(
            end * device.float().size(),
            "the model's weights",
            "use a smaller model, or a larger machine",
        )?;
        Ok(ParamStore { flat: device.zeros(device.float(), end), segments, names, decayed, trainable })
    }

    /// Elements of the flat buffer for `config`'s shape, padding included: those that training moves, and all. `packs_weights`: as
    /// [`Device::packs_weights`].
    pub fn lengths(config: &Config, packs_weights: bool, freeze_vision: bool) -> [usize; 2] {
        let (_, [_, trainable, all]) = placed(config, packs_weights, freeze_vision);
        [trainable, all]
    }

    /// Parameters of `config`'s shape, padding left out: all, and those that training moves.
    pub fn counts(config: &Config, freeze_vision: bool) -> [usize; 2] {
        let (segments, _) = placed(config, false, freeze_vision);
        let count = |frozen: bool| segments.iter().filter(|s| frozen || s.trainable).map(|s| s.n * s.k).sum();
        [count(true), count(false)]
    }

    /// The segments, in the order in which they lie.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }
    /// The flat elements that training moves and weight decay shrinks.
    pub fn decayed(&self) -> Range<usize> {
        0..self.decayed
    }
    /// The flat elements that training moves and weight decay leaves alone.
    pub fn not_decayed(&self) -> Range<usize> {
        self.decayed..self.trainable
    }
    /// The flat elements that training moves.
    pub fn trainable(&self) -> Range<usize> {
        0..self.trainable
    }
    /// Parameters of the model, padding left out.
    pub fn count(&self) -> usize {
        self.segments.iter().map(|s| s.n * s.k).sum()
    }
    /// Names of the tensors as the hub has them, in the order in which they lie.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.segments.iter().flat_map(|s| s.tensors.iter().map(|t| t.name.as_str()))
    }
    /// The segment and the tensor of a hub name.
    pub fn tensor(&self, name: &str) -> Option<(&Segment, &Tensor)> {
        let &(i, j) = self.names.get(name)?;
        Some((&self.segments[i], &self.segments[i].tensors[j]))
    }

    /// The tensor of a hub name, row-major, read from `flat`: this store's own buffer, or one that mirrors its front
    /// (gradients, moments).
    pub fn read(&self, s: &Stream, flat: &Buffer, name: &str) -> Result<Vec<f32>> {
        let Some((segment, tensor)) = self.tensor(name) else {
            return Err(Error::input(
                format!("the model has no tensor named {name:?}"),
                "use a name from the checkpoint",
            ));
        };
        if segment.offset + segment.stored() > flat.len() {
            return Err(Error::input(
                format!("{name:?} is frozen: nothing mirrors it"),
                "load the model without freezing the vision tower",
            ));
        }
        segment.read(s, flat, tensor.rows.clone())
    }

    /// A buffer for gradients or moments, f32: as long as the trainable front, all zero.
    pub fn mirror(&self, device: &Device) -> Buffer {
        device.zeros(DType::F32, self.trainable)
    }

    fn views<'a>(&'a self, flat: &'a Buffer) -> Views<'a> {
        Views { by_name: self.segments.iter().map(|s| (s.name.as_str(), s)).collect(), flat }
    }
    /// The decoder's parameters as the forward pass wants them, within `flat` (weights or gradients).
    pub fn text(&self, config: &Config, flat: &Buffer) -> TextParams {
        let v = self.views(flat);
        TextParams {
            embed: (!config.tie_word_embeddings).then(|| v.vector("embed")),
            layers: (0..config.layers).map(|i| v.layer(&format!("layers.{i}"))).collect(),
            norm: v.vector("norm"),
            head: v.matrix("head"),
        }
    }
    /// The vision tower's parameters within `flat`; `None` if it is frozen and `flat` mirrors the trainable front only.
    pub fn vision(&self, config: &Config, flat: &Buffer) -> Option<VisionParams> {
        let v = self.views(flat);
        let last = self.segments.iter().filter(|s| s.name.starts_with("vision.")).map(|s| s.offset + s.stored()).max();
        if last.is_none_or(|end| end > flat.len()) {
            return None;
        }
        Some(VisionParams {
            patch_embed: v.matrix("vision.patch_embed.weight"),
            blocks: (0..config.vision.depth).map(|i| v.layer(&format!("vision.blocks.{i}"))).collect(),
            ln_q: v.vector("vision.merger.ln_q"),
            fc1: v.matrix("vision.merger.fc1.weight"),
            fc1_bias: v.vector("vision.merger.fc1.bias"),
            fc2: v.matrix("vision.merger.fc2.weight"),
            fc2_bias: v.vector("vision.merger.fc2.bias"),
        })
    }
}

struct Views<'a> {
    by_name: HashMap<&'a str, &'a Segment>,
    flat: &'a Buffer,
}

impl Views<'_> {
    fn vector(&self, name: &str) -> Buffer {
        let s = self.by_name[name];
        self.flat.view(s.offset, s.stored())
    }
    fn matrix(&self, name: &str) -> Weight {
        let s = self.by_name[name];
        Weight { data: self.flat.view(s.offset, s.stored()), n: s.n, k: s.k }
    }
    fn maybe(&self, name: &str) -> Option<Buffer> {
        self.by_name.contains_key(name).then(|| self.vector(name))
    }
    fn layer(&self, prefix: &str) -> LayerParams {
        LayerParams {
            norm1: self.vector(&format!("{prefix}.norm1")),
            qkv: self.matrix(&format!("{prefix}.qkv.weight")),
            qkv_bias: self.vector(&format!("{prefix}.qkv.bias")),
            out: self.matrix(&format!("{prefix}.out.weight")),
            out_bias: self.maybe(&format!("{prefix}.out.bias")),
            norm2: self.vector(&format!("{prefix}.norm2")),
            gate_up: self.matrix(&format!("{prefix}.gate_up.weight")),
            gate_up_bias: self.maybe(&format!("{prefix}.gate_up.bias")),
            down: self.matrix(&format!("{prefix}.down.weight")),
            down_bias: self.maybe(&format!("{prefix}.down.bias")),
        }
    }
}

/// The decoder's parameters (or their gradients).
#[allow(missing_docs)] // the names are those of the architecture
pub struct TextParams {
    /// `[vocab, hidden]`; `None` if the head is the table.
    pub embed: Option<Buffer>,
    pub layers: Vec<LayerParams>,
    pub norm: Buffer,
    /// `[vocab, hidden]`, packed.
    pub head: Weight,
}

/// One layer's parameters (or their gradients): a decoder layer, or a block of the vision tower, whose projections have
/// biases.
#[allow(missing_docs)]
pub struct LayerParams {
    pub norm1: Buffer,
    /// Rows: query heads, key heads, value heads.
    pub qkv: Weight,
    pub qkv_bias: Buffer,
    pub out: Weight,
    pub out_bias: Option<Buffer>,
    pub norm2: Buffer,
    /// Rows: gate, then up.
    pub gate_up: Weight,
    pub gate_up_bias: Option<Buffer>,
    pub down: Weight,
    pub down_bias: Option<Buffer>,
}

/// The vision tower's parameters (or their gradients).
#[allow(missing_docs)]
pub struct VisionParams {
    /// `[hidden, 3 * 2 * 14 * 14]`
    pub patch_embed: Weight,
    pub blocks: Vec<LayerParams>,
    pub ln_q: Buffer,
    pub fc1: Weight,
    pub fc1_bias: Buffer,
    pub fc2: Weight,
    pub fc2_bias: Buffer,
}

/// The segments of a shape as they lie, and where those that decay, those that are trained, and all end.
fn placed(config: &Config, packs_weights: bool, freeze_vision: bool) -> (Vec<Segment>, [usize; 3]) {
    let mut segments = plan(config);
    for s in &mut segments {
        s.trainable = !(freeze_vision && s.name.starts_with("vision."));
        if !packs_weights {
            s.layout = Layout::Plain;
        }
    }
    segments.sort_by_key(|s| (!s.trainable, s.trainable && !s.decay));
    let (mut end, mut decayed, mut trainable) = (0, 0, 0);
    for s in &mut segments {
        s.offset = end;
        end += s.stored().next_multiple_of(ALIGN);
        if s.trainable {
            trainable = end;
            decayed = if s.decay { end } else { decayed };
        }
    }
    (segments, [decayed, trainable, end])
}

/// The segments of a shape, in the architecture's order; offsets are not set yet.
pub(super) fn plan(c: &Config) -> Vec<Segment> {
    let mut out = Vec::new();
    let mut add = |name: String, k: usize, layout: Layout, init: Init, parts: &[(String, Vec<usize>, usize)]| {
        let mut n = 0;
        let tensors = parts.iter().map(|(name, shape, rows)| {
            n += rows;
            Tensor { name: name.clone(), shape: shape.clone(), rows: n - rows..n }
        });
        let tensors: Vec<Tensor> = tensors.collect();
        let decay = matches!(init, Init::Normal(_));
        out.push(Segment { name, offset: 0, n, k, layout, decay, trainable: true, init, tensors });
    };
    let normal = Init::Normal(0.02);
    let rows = |name: String, n: usize, k: usize| (name, vec![n, k], n);
    let elements = |name: String, n: usize| (name, vec![n], n);
    use Layout::{Packed, Plain};
    let (h, i, q, kv) = (c.hidden_size, c.intermediate_size, c.heads * c.head_dim(), c.kv_heads * c.head_dim());
    let embed = rows("model.embed_tokens.weight".into(), c.vocab_size, h);
    if c.tie_word_embeddings {
        add("head".into(), h, Packed, normal, &[embed]);
    } else {
        add("embed".into(), h, Plain, normal, &[embed]);
        add("head".into(), h, Packed, normal, &[rows("lm_head.weight".into(), c.vocab_size, h)]);
    }
    for l in 0..c.layers {
        let (own, hub) = (format!("layers.{l}."), format!("model.layers.{l}."));
        let weights = ["q", "k", "v"].map(|p| format!("{hub}self_attn.{p}_proj.weight"));
        let biases = ["q", "k", "v"].map(|p| format!("{hub}self_attn.{p}_proj.bias"));
        let widths = [q, kv, kv];
        let weights: Vec<_> = weights.into_iter().zip(widths).map(|(name, n)| rows(name, n, h)).collect();
        let biases: Vec<_> = biases.into_iter().zip(widths).map(|(name, n)| elements(name, n)).collect();
        let norm = |name: &str| elements(format!("{hub}{name}.weight"), h);
        add(format!("{own}norm1"), 1, Plain, Init::Constant(1.0), &[norm("input_layernorm")]);
        add(format!("{own}qkv.weight"), h, Packed, normal, &weights);
        add(format!("{own}qkv.bias"), 1, Plain, Init::Constant(0.0), &biases);
        add(format!("{own}out.weight"), q, Packed, normal, &[rows(format!("{hub}self_attn.o_proj.weight"), h, q)]);
        add(format!("{own}norm2"), 1, Plain, Init::Constant(1.0), &[norm("post_attention_layernorm")]);
        let gate_up = ["gate", "up"].map(|p| rows(format!("{hub}mlp.{p}_proj.weight"), i, h));
        add(format!("{own}gate_up.weight"), h, Packed, normal, &gate_up);
        add(format!("{own}down.weight"), i, Packed, normal, &[rows(format!("{hub}mlp.down_proj.weight"), h, i)]);
    }
    add("norm".into(), 1, Plain, Init::Constant(1.0), &[elements("model.norm.weight".into(), h)]);

    let v = &c.vision;
    let (h, i) = (v.hidden_size, v.intermediate_size);
    let shape = vec![h, 3, 2, PATCH, PATCH];
    let patch = ("visual.patch_embed.proj.weight".to_string(), shape, h);
    add("vision.patch_embed.weight".into(), INPUTS, Packed, normal, &[patch]);
    for b in 0..v.depth {
        let (own, hub) = (format!("vision.blocks.{b}."), format!("visual.blocks.{b}."));
        let mut affine = |own_name: &str, hub_names: &[&str], n: usize, k: usize| {
            let w: Vec<_> = hub_names.iter().map(|p| rows(format!("{hub}{p}.weight"), n, k)).collect();
            add(format!("{own}{own_name}.weight"), k, Packed, normal, &w);
            let b: Vec<_> = hub_names.iter().map(|p| elements(format!("{hub}{p}.bias"), n)).collect();
            add(format!("{own}{own_name}.bias"), 1, Plain, Init::Constant(0.0), &b);
        };
        affine("qkv", &["attn.qkv"], 3 * h, h);
        affine("out", &["attn.proj"], h, h);
        affine("gate_up", &["mlp.gate_proj", "mlp.up_proj"], i, h);
        affine("down", &["mlp.down_proj"], h, i);
        for name in ["norm1", "norm2"] {
            let norm = elements(format!("{hub}{name}.weight"), h);
            add(format!("{own}{name}"), 1, Plain, Init::Constant(1.0), &[norm]);
        }
    }
    let (merged, out_h) = (4 * h, v.out_hidden_size);
    add("vision.merger.ln_q".into(), 1, Plain, Init::Constant(1.0), &[elements("visual.merger.ln_q.weight".into(), h)]);
    for (own, hub, n) in [("fc1", "0", merged), ("fc2", "2", out_h)] {
        let hub = format!("visual.merger.mlp.{hub}");
        add(format!("vision.merger.{own}.weight"), merged, Packed, normal, &[rows(format!("{hub}.weight"), n, merged)]);
        let bias = elements(format!("{hub}.bias"), n);
        add(format!("vision.merger.{own}.bias"), 1, Plain, Init::Constant(0.0), &[bias]);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Preset;

    #[test]
    fn segments_tile_the_buffer_and_frozen_ones_come_last() {
        let d = Device::cpu(1);
        for (preset, freeze) in [(Preset::Tiny, false), (Preset::Tiny, true), (Preset::Mid, true)] {
            let c = preset.config();
            let p = ParamStore::new(&c, &d, freeze).unwrap();
            let mut end = 0;
            for s in p.segments() {
                assert_eq!(s.offset, end, "{}", s.name);
                end += s.stored().next_multiple_of(ALIGN);
                let range = if !s.trainable {
                    p.trainable().end..p.flat.len()
                } else if s.decay {
                    p.decayed()
                } else {
                    p.not_decayed()
                };
                assert!(range.contains(&s.offset) && end <= range.end, "{}", s.name);
                let mut row = 0;
                for t in &s.tensors {
                    assert_eq!(t.rows.start, row);
                    assert_eq!(t.shape.iter().product::<usize>(), t.rows.len() * s.k, "{}", t.name);
                    row = t.rows.end;
                }
                assert_eq!(row, s.n, "{}", s.name);
            }
            assert_eq!(end, p.flat.len());
            assert_eq!(p.vision(&c, &p.mirror(&d)).is_none(), freeze);
        }
        assert_eq!(ParamStore::new(&Preset::Mid.config(), &d, false).unwrap().count() / 100_000, 435);
    }

    #[test]
    fn rows_of_a_fused_matrix_are_found_by_name() {
        let mut c = Preset::Tiny.config();
        c.vision.intermediate_size = 68; // not a multiple of a panel
        let d = Device::cpu(1);
        let s = d.stream();
        let p = ParamStore::new(&c, &d, false).unwrap();
        let (segment, _) = p.tensor("visual.blocks.1.mlp.up_proj.weight").unwrap();
        let values: Vec<f32> = (0..segment.n * segment.k).map(|i| i as f32).collect();
        segment.write(&s, &p.flat, 0..segment.n, &values);
        let up = p.read(&s, &p.flat, "visual.blocks.1.mlp.up_proj.weight").unwrap();
        assert_eq!(up, values[68 * 32..]);
        let gate = p.read(&s, &p.flat, "visual.blocks.1.mlp.gate_proj.weight").unwrap();
        assert_eq!(gate, values[..68 * 32]);
    }
}
