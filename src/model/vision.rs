//! The vision tower: u8 pixels to one vector of the decoder's width for each 2x2 group of patches
//! (Qwen2.5-VL, arXiv 2502.13923, section 2.1.1).
//!
//! Several images go through in one call; attention never crosses from one to another, so the bits of an image's output do
//! not depend on its company.

use super::config::{VISION_NORM_EPS, VISION_ROPE_THETA};
use super::layer::{self, LayerActs, LayerShape, Rope};
use super::params::{LayerParams, VisionParams};
use super::window::WindowPlan;
use super::{Config, VisionConfig};
use crate::device::{Buffer, DType, Device, Stream};
use crate::input::Image;
use crate::ops::linear::{self, Epilogue};
use crate::ops::patch_embed::{Geometry, MERGE, Normalize, PATCH};
use crate::ops::{attention, gelu, patch_embed, rms_norm, rope, rows};
use crate::{Error, Result};

/// Patches that the merger joins.
pub(super) const GROUP: usize = MERGE * MERGE;

impl VisionConfig {
    /// The shape of a block.
    pub fn layer_shape(&self) -> LayerShape {
        LayerShape {
            hidden: self.hidden_size,
            heads: self.heads,
            kv_heads: self.heads,
            head_dim: self.hidden_size / self.heads,
            intermediate: self.intermediate_size,
            eps: VISION_NORM_EPS,
        }
    }
}

/// Images on the device, and how the tower reads them.
pub(super) struct VisionBatch {
    pub plan: WindowPlan,
    pub geometry: Vec<Geometry>,
    /// u8: resized RGB pixels, image after image.
    pub pixels: Buffer,
    /// u32 `[groups]`
    pub window_index: Buffer,
    /// u32 `[windows + 1]`
    pub cu_window_seqlens: Buffer,
    /// u32 `[images + 1]`
    pub cu_seqlens: Buffer,
    /// u32 `[patches, 2]`
    pub pos_hw: Buffer,
}

impl VisionBatch {
    /// Bytes of room for `patches` patches.
    pub fn bytes(patches: usize) -> usize {
        let lists = 3 * (patches / GROUP) + 2 + 2 * patches;
        patches * PATCH * PATCH * 3 + lists * DType::U32.size()
    }

    /// Room for `patches` patches.
    pub fn new(device: &Device, patches: usize) -> VisionBatch {
        let room = |n: usize| device.zeros(DType::U32, n);
        let groups = patches / GROUP;
        VisionBatch {
            plan: WindowPlan::default(),
            geometry: Vec::new(),
            pixels: device.zeros(DType::U8, patches * PATCH * PATCH * 3),
            window_index: room(groups),
            // A window and an image hold at least one group.
            cu_window_seqlens: room(groups + 1),
            cu_seqlens: room(groups + 1),
            pos_hw: room(2 * patches),
        }
    }

    /// Submits the upload of `images`, which must fit.
    pub fn upload(&mut self, s: &Stream, c: &VisionConfig, images: &[&Image]) {
        let grids: Vec<_> = images.iter().map(|i| i.grid).collect();
        self.plan = WindowPlan::new(&grids, c.window_size);
        self.geometry.clear();
        let mut offset = 0;
        for image in images {
            self.geometry.push(Geometry { offset, grid_h: image.grid.h, grid_w: image.grid.w });
            s.write(&self.pixels.view(offset, image.pixels.len()), &image.pixels);
            offset += image.pixels.len();
        }
        s.write(&self.window_index, &self.plan.window_index);
        s.write(&self.cu_window_seqlens, &self.plan.cu_window_seqlens);
        s.write(&self.cu_seqlens, &self.plan.cu_seqlens);
        s.write(&self.pos_hw, &self.plan.pos_hw);
    }
}

/// The merger's buffers, `[tokens, ..]` each.
pub(super) struct MergerActs {
    /// `[patches, hidden]`, which is `[tokens, 4 * hidden]`.
    pub normed: Buffer,
    pub fc1: Buffer,
    pub act: Buffer,
    /// `[tokens, out_hidden]`, in window order.
    pub out: Buffer,
}

impl MergerActs {
    /// Bytes of room for `patches` patches.
    pub fn bytes(c: &VisionConfig, float: DType, patches: usize) -> usize {
        (3 * patches * c.hidden_size + patches / GROUP * c.out_hidden_size) * float.size()
    }

    pub fn new(device: &Device, c: &VisionConfig, patches: usize) -> MergerActs {
        let room = |n: usize| device.alloc(device.float(), n);
        MergerActs {
            normed: room(patches * c.hidden_size),
            fc1: room(patches * c.hidden_size),
            act: room(patches * c.hidden_size),
            out: room(patches / GROUP * c.out_hidden_size),
        }
    }
}

/// Buffers for encoding images without gradients, planned once.
pub struct VisionWorkspace {
    patches: usize,
    batch: VisionBatch,
    x: Buffer,
    rope: Rope,
    acts: LayerActs,
    merger: MergerActs,
}

impl VisionWorkspace {
    /// Bytes of room for images of together `patches` patches, where activations are of type `float`.
    pub fn bytes(config: &Config, float: DType, patches: usize) -> usize {
        let (c, shape) = (&config.vision, config.vision.layer_shape());
        let row = (shape.hidden + shape.in_place_values(float)) * float.size() + Rope::row_bytes(shape.head_dim);
        VisionBatch::bytes(patches) + patches * row + MergerActs::bytes(c, float, patches)
    }

    /// Room for images of together `patches` patches (four times their tokens).
    pub fn new(config: &Config, device: &Device, patches: usize) -> VisionWorkspace {
        let (c, shape) = (&config.vision, config.vision.layer_shape());
        let x = device.alloc(device.float(), patches * shape.hidden);
        VisionWorkspace {
            patches,
            batch: VisionBatch::new(device, patches),
            rope: Rope::new(device, patches, shape.head_dim),
            acts: LayerActs::in_place(device, &shape, patches, &x),
            merger: MergerActs::new(device, c, patches),
            x,
        }
    }

    /// How many patches fit.
    pub fn patches(&self) -> usize {
        self.patches
    }
}

/// Patches embedded and put in window order: `x` `[patches, hidden]`. `scratch`: as large.
pub(super) fn embed(
    s: &Stream,
    c: &VisionConfig,
    p: &VisionParams,
    b: &VisionBatch,
    norm: &Normalize,
    scratch: &Buffer,
    x: &Buffer,
) {
    patch_embed::forward(s, &b.pixels, &b.geometry, norm, &p.patch_embed, scratch);
    rows::gather(s, scratch, &b.window_index, x, b.plan.tokens(), GROUP * c.hidden_size);
}

/// Rotary tables in window order.
pub(super) fn rope_tables(s: &Stream, shape: &LayerShape, b: &VisionBatch, r: &Rope) {
    rope::vision_tables(s, &b.pos_hw, VISION_ROPE_THETA, shape.head_dim, &r.cos, &r.sin, b.plan.patches());
}

/// Where attention of block `i` is cut: offsets and how many pieces.
pub(super) fn cuts<'a>(c: &VisionConfig, b: &'a VisionBatch, i: usize) -> (&'a Buffer, usize) {
    if c.full_attention_blocks.contains(&i) {
        (&b.cu_seqlens, b.plan.cu_seqlens.len() - 1)
    } else {
        (&b.cu_window_seqlens, b.plan.cu_window_seqlens.len() - 1)
    }
}

/// One block: `x` to `out`, which may be the same if `a` is [in place](LayerActs::in_place), or left out if it is known
/// already.
pub(super) fn block(
    s: &Stream,
    shape: &LayerShape,
    p: &LayerParams,
    (cu_seqlens, n): (&Buffer, usize),
    rope: &Rope,
    x: &Buffer,
    a: &LayerActs,
    out: Option<&Buffer>,
    patches: usize,
) {
    layer::before_rope(s, shape, p, x, a, patches);
    layer::rotate(s, shape, rope, &a.qkv, patches, false);
    attention::varlen_forward(
        s,
        &a.qkv,
        cu_seqlens,
        n,
        shape.heads,
        shape.head_dim,
        shape.scale(),
        false,
        &a.attn,
        a.lse.as_ref(),
    );
    layer::after_attention(s, shape, p, x, a, out, patches);
}

/// Groups of four patches to vectors of the decoder's width, put back in row-major order: `out` `[tokens, out_hidden]`.
pub(super) fn merge(
    s: &Stream,
    c: &VisionConfig,
    p: &VisionParams,
    b: &VisionBatch,
    x: &Buffer,
    m: &MergerActs,
    out: &Buffer,
) {
    let (patches, tokens) = (b.plan.patches(), b.plan.tokens());
    rms_norm::forward(s, x, &p.ln_q, VISION_NORM_EPS, &m.normed, patches, c.hidden_size);
    linear::forward(s, &m.normed, &p.fc1, Epilogue::Bias(&p.fc1_bias), &m.fc1, tokens);
    gelu::forward(s, &m.fc1, &m.act, patches * c.hidden_size);
    linear::forward(s, &m.act, &p.fc2, Epilogue::Bias(&p.fc2_bias), &m.out, tokens);
    rows::scatter(s, &m.out, &b.window_index, out, tokens, c.out_hidden_size);
}

/// Encodes `images` into `out` `[tokens, out_hidden]`, image after image.
pub(super) fn encode(
    s: &Stream,
    config: &Config,
    p: &VisionParams,
    norm: &Normalize,
    images: &[&Image],
    ws: &mut VisionWorkspace,
    out: &Buffer,
) -> Result<()> {
    let patches: usize = images.iter().map(|i| i.grid.patches()).sum();
    if patches > ws.patches {
        return Err(Error::limit(
            format!("images of {patches} patches in one call, and there is room for {}", ws.patches),
            "encode fewer images at a time, or plan for larger ones (max_pixels)",
        ));
    }
    if images.is_empty() {
        return Ok(());
    }
    let (c, shape) = (&config.vision, config.vision.layer_shape());
    ws.batch.upload(s, c, images);
    let b = &ws.batch;
    embed(s, c, p, b, norm, &ws.merger.normed, &ws.x);
    rope_tables(s, &shape, b, &ws.rope);
    for (i, p) in p.blocks.iter().enumerate() {
        block(s, &shape, p, cuts(c, b, i), &ws.rope, &ws.x, &ws.acts, Some(&ws.x), patches);
    }
    merge(s, c, p, b, &ws.x, &ws.merger, out);
    Ok(())
}
