//! What a decoder layer and a block of the vision tower have in common: everything but the attention itself.
//!
//! ```text
//! x ─ norm1 ─ qkv + bias ─ rope ─ [attention] ─ out ─(+ x)─ mid ─ norm2 ─ gate, up ─ SwiGLU ─ down ─(+ mid)─ out
//! ```
//!
//! Inference runs it in place, in one set of buffers; training hands each layer that is kept its own. The launches are the
//! same, so the bits are.

use super::params::LayerParams;
use crate::device::{Buffer, DType, Device, Stream};
use crate::ops::kv_cache::Tokens;
use crate::ops::linear::{self, Epilogue};
use crate::ops::{rms_norm, rope, swiglu};

/// The figures of a tower that all its layers share.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerShape {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width of the MLP.
    pub intermediate: usize,
    /// Epsilon of the norms.
    pub eps: f32,
}

impl LayerShape {
    /// Columns of the attention's output: all query heads.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }
    /// Columns of all key heads (and of all value heads).
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
    /// Columns of the fused projection.
    pub fn qkv_width(&self) -> usize {
        self.q_width() + 2 * self.kv_width()
    }
    /// Factor of the attention scores.
    pub fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
    /// The keys and values of `n` tokens in rows `qkv`, `[n, qkv_width]`, with their slots.
    pub fn kv_tokens<'a>(&self, qkv: &'a Buffer, slots: &'a Buffer, n: usize) -> Tokens<'a> {
        let k = self.q_width();
        Tokens { rows: qkv, stride: self.qkv_width(), k, v: k + self.kv_width(), slots, n }
    }
    /// Bytes per row that `LayerActs::new` allocates, where activations are of type `float`.
    pub fn kept_bytes(&self, float: DType) -> usize {
        let values = 3 * self.hidden + self.qkv_width() + self.q_width() + 3 * self.intermediate;
        values * float.size() + self.heads * DType::F32.size()
    }
    /// Values per row that `LayerActs::in_place` allocates where activations are of type `float`.
    pub fn in_place_values(&self, float: DType) -> usize {
        self.hidden + self.qkv_width() + self.q_width() + self.intermediate + self.ungated(float)
    }
    /// Gates and ups per row that exist where no backward pass wants them: on a GPU none, whose product gates them itself.
    fn ungated(&self, float: DType) -> usize {
        if float == DType::F32 { 2 * self.intermediate } else { 0 }
    }
    /// Values per row that `LayerGrads::new` allocates.
    pub fn grad_values(&self) -> usize {
        self.hidden + self.qkv_width() + self.q_width() + 3 * self.intermediate
    }
}

/// Rotary tables, f32 `[rows, head_dim / 2]`.
pub struct Rope {
    /// Cosines.
    pub cos: Buffer,
    /// Sines.
    pub sin: Buffer,
}

impl Rope {
    /// Bytes of a row of tables.
    pub fn row_bytes(head_dim: usize) -> usize {
        head_dim * DType::F32.size()
    }

    /// Tables for `rows` rows.
    pub fn new(device: &Device, rows: usize, head_dim: usize) -> Rope {
        let table = || device.alloc(DType::F32, rows * head_dim / 2);
        Rope { cos: table(), sin: table() }
    }
}

/// What a layer computes on its way, `[rows, ..]` each.
#[allow(missing_docs)] // named as in the diagram above
pub struct LayerActs {
    pub normed1: Buffer,
    /// After rope.
    pub qkv: Buffer,
    pub attn: Buffer,
    /// Log-sum-exp of each query's scores, f32 `[rows, heads]`; the backward pass wants it.
    pub lse: Option<Buffer>,
    pub mid: Buffer,
    pub normed2: Buffer,
    pub gate_up: Buffer,
    pub act: Buffer,
}

impl LayerActs {
    /// A set for training, with nothing shared.
    pub fn new(device: &Device, shape: &LayerShape, rows: usize) -> LayerActs {
        let rows_of = |width: usize| device.alloc(device.float(), rows * width);
        LayerActs {
            normed1: rows_of(shape.hidden),
            qkv: rows_of(shape.qkv_width()),
            attn: rows_of(shape.q_width()),
            lse: Some(device.alloc(DType::F32, rows * shape.heads)),
            mid: rows_of(shape.hidden),
            normed2: rows_of(shape.hidden),
            gate_up: rows_of(2 * shape.intermediate),
            act: rows_of(shape.intermediate),
        }
    }

    /// Whether a backward pass will want what is in between.
    fn kept(&self) -> bool {
        self.lse.is_some()
    }

    /// A set for inference: the residual stream `x` is updated in place.
    pub fn in_place(device: &Device, shape: &LayerShape, rows: usize, x: &Buffer) -> LayerActs {
        let rows_of = |width: usize| device.alloc(device.float(), rows * width);
        let normed = rows_of(shape.hidden);
        LayerActs {
            normed1: normed.clone(),
            qkv: rows_of(shape.qkv_width()),
            attn: rows_of(shape.q_width()),
            lse: None,
            mid: x.clone(),
            normed2: normed,
            gate_up: rows_of(shape.ungated(device.float())),
            act: rows_of(shape.intermediate),
        }
    }
}

/// From the layer's input to queries, keys and values, which are still to be turned.
pub fn before_rope(s: &Stream, shape: &LayerShape, p: &LayerParams, x: &Buffer, a: &LayerActs, rows: usize) {
    rms_norm::forward(s, x, &p.norm1, shape.eps, &a.normed1, rows, shape.hidden);
    linear::forward(s, &a.normed1, &p.qkv, Epilogue::Bias(&p.qkv_bias), &a.qkv, rows);
}

/// Turns queries and keys, which are neighbours in a row.
pub fn rotate(s: &Stream, shape: &LayerShape, r: &Rope, qkv: &Buffer, rows: usize, inverse: bool) {
    let heads = shape.heads + shape.kv_heads;
    rope::rotate(s, qkv, shape.qkv_width(), 0, heads, shape.head_dim, &r.cos, &r.sin, rows, inverse);
}

/// From the attention's output to the layer's. Without `out` the last projection is left out: all that the backward pass
/// wants of a layer whose output is known.
pub fn after_attention(
    s: &Stream,
    shape: &LayerShape,
    p: &LayerParams,
    x: &Buffer,
    a: &LayerActs,
    out: Option<&Buffer>,
    rows: usize,
) {
    linear::forward(s, &a.attn, &p.out, residual(p.out_bias.as_ref(), x), &a.mid, rows);
    rms_norm::forward(s, &a.mid, &p.norm2, shape.eps, &a.normed2, rows, shape.hidden);
    let bias = p.gate_up_bias.as_ref();
    if a.kept() {
        linear::forward(s, &a.normed2, &p.gate_up, bias.map_or(Epilogue::None, Epilogue::Bias), &a.gate_up, rows);
        swiglu::forward(s, &a.gate_up, &a.act, rows, shape.intermediate);
    } else {
        linear::forward_gated(s, &a.normed2, &p.gate_up, bias, &a.gate_up, &a.act, rows);
    }
    if let Some(out) = out {
        linear::forward(s, &a.act, &p.down, residual(p.down_bias.as_ref(), &a.mid), out, rows);
    }
}

fn residual<'a>(bias: Option<&'a Buffer>, x: &'a Buffer) -> Epilogue<'a> {
    bias.map_or(Epilogue::Add(x), |b| Epilogue::BiasAdd(b, x))
}

/// What the backward pass of a layer needs beside the activations, `[rows, ..]` each; reused from layer to layer.
#[allow(missing_docs)]
pub struct LayerGrads {
    pub normed: Buffer,
    pub qkv: Buffer,
    pub attn: Buffer,
    pub gate_up: Buffer,
    pub act: Buffer,
}

impl LayerGrads {
    /// Room for `rows` rows.
    pub fn new(device: &Device, shape: &LayerShape, rows: usize) -> LayerGrads {
        let rows_of = |width: usize| device.alloc(device.float(), rows * width);
        LayerGrads {
            normed: rows_of(shape.hidden),
            qkv: rows_of(shape.qkv_width()),
            attn: rows_of(shape.q_width()),
            gate_up: rows_of(2 * shape.intermediate),
            act: rows_of(shape.intermediate),
        }
    }
}

/// The mirror of [`after_attention`]: `dx` holds the gradient of the layer's output on entry and that of `mid` on return;
/// `d.attn` is the gradient of the attention's output. Adds to the parameters' gradients `g`.
pub fn backward_after_attention(
    s: &Stream,
    shape: &LayerShape,
    p: &LayerParams,
    g: &LayerParams,
    a: &LayerActs,
    d: &LayerGrads,
    dx: &Buffer,
    rows: usize,
) {
    weight_and_bias(s, dx, &a.act, &g.down, g.down_bias.as_ref(), rows);
    linear::backward_input(s, dx, &p.down, &d.act, rows, false);
    swiglu::backward(s, &a.gate_up, &d.act, &d.gate_up, rows, shape.intermediate);
    weight_and_bias(s, &d.gate_up, &a.normed2, &g.gate_up, g.gate_up_bias.as_ref(), rows);
    linear::backward_input(s, &d.gate_up, &p.gate_up, &d.normed, rows, false);
    rms_norm::backward(s, &a.mid, &p.norm2, shape.eps, &d.normed, dx, Some(&g.norm2), rows, shape.hidden);
    weight_and_bias(s, dx, &a.attn, &g.out, g.out_bias.as_ref(), rows);
    linear::backward_input(s, dx, &p.out, &d.attn, rows, false);
}

/// The mirror of [`before_rope`] and [`rotate`]: `d.qkv` holds the gradient of the rotated projections; adds what comes through them
/// to `dx`, which then is the gradient of the layer's input `x`.
pub fn backward_before_attention(
    s: &Stream,
    shape: &LayerShape,
    p: &LayerParams,
    g: &LayerParams,
    rope: &Rope,
    x: &Buffer,
    a: &LayerActs,
    d: &LayerGrads,
    dx: &Buffer,
    rows: usize,
) {
    rotate(s, shape, rope, &d.qkv, rows, true);
    weight_and_bias(s, &d.qkv, &a.normed1, &g.qkv, Some(&g.qkv_bias), rows);
    linear::backward_input(s, &d.qkv, &p.qkv, &d.normed, rows, false);
    rms_norm::backward(s, x, &p.norm1, shape.eps, &d.normed, dx, Some(&g.norm1), rows, shape.hidden);
}

/// Adds a projection's gradients: `dy` `[rows, n]` of its output, `x` `[rows, k]` its input.
pub fn weight_and_bias(s: &Stream, dy: &Buffer, x: &Buffer, dw: &linear::Weight, db: Option<&Buffer>, rows: usize) {
    let (dy, x) = (dy.view(0, rows * dw.n), x.view(0, rows * dw.k));
    linear::backward_weight(s, &dy, &x, &dw.data, rows);
    if let Some(db) = db {
        linear::backward_bias(s, &dy, db, rows);
    }
}
