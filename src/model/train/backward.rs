//! The backward pass: read it beside [`super::forward`], from the bottom up.

use super::memory::{GradStore, TowerGrads};
use super::{Activations, TrainBatch, TrainedVision, VisionPass};
use crate::device::{Buffer, Stream};
use crate::model::config::VISION_NORM_EPS;
use crate::model::vision::{self, GROUP};
use crate::model::{Model, VisionParams, decoder, layer};
use crate::ops::attention;
use crate::ops::embedding::{self, Table};
use crate::ops::{gelu, kv_cache, linear, patch_embed, rms_norm, rows};
use crate::{Error, Result};

/// Submits the backward pass of the batch that `acts` holds the forward pass of: `dhidden` is the loss's gradient for the
/// hidden states, `[rows, hidden]`. Adds to `grads`, so that micro-batches accumulate; the head's own gradient is the
/// loss's business ([`GradStore::head`]).
///
/// # Errors
/// [`Error::Internal`] if the activations were made for forward passes alone.
pub fn backward(
    model: &Model,
    s: &Stream,
    batch: &TrainBatch,
    acts: &Activations,
    dhidden: &Buffer,
    grads: &GradStore,
) -> Result<()> {
    let (Some(TowerGrads { layer: d, dx }), Some(dcache)) = (&acts.text.backward, &acts.dcache) else {
        return Err(Error::internal("a backward pass over activations that were made for forward passes alone"));
    };
    let (c, b, p, text) = (&model.config, &batch.step, &model.text, &acts.text);
    let (shape, h, t) = (c.layer_shape(), c.hidden_size, batch.rows());
    let (kv, dkv) = (&acts.cache.layers[0], &dcache.layers[0]);
    s.zero(&dx.view(0, t * h));
    rms_norm::backward(s, text.output(), &p.norm, c.rms_norm_eps, dhidden, dx, Some(&grads.text.norm), t, h);
    for i in (0..text.layers()).rev() {
        let (p, g, x, a) = (&p.layers[i], &grads.text.layers[i], &text.inputs[i], text.acts(i));
        if text.is_lost(i) {
            decoder::layer(s, &shape, p, b, &acts.rope, &acts.cache, kv, x, a, None);
        } else {
            decoder::write_pages(s, &shape, b, &a.qkv, &acts.cache, kv);
        }
        layer::backward_after_attention(s, &shape, p, g, a, d, dx, t);
        let lse = a.lse.as_ref().ok_or_else(|| Error::internal("the forward pass kept no log-sum-exp"))?;
        let (width, hq, hkv, hd) = (shape.qkv_width(), shape.heads, shape.kv_heads, shape.head_dim);
        s.zero(&dkv.k);
        s.zero(&dkv.v);
        attention::paged_backward(
            s,
            &a.qkv,
            width,
            kv,
            &b.segments,
            hq,
            hkv,
            hd,
            shape.scale(),
            &a.attn,
            lse,
            &d.attn,
            &d.qkv,
            dkv,
        );
        // A copied page's gradient belongs to the prompt's rows that it was copied from.
        for &(copy, original) in &batch.copied_blocks {
            kv_cache::add_block(s, dcache, copy, original);
        }
        kv_cache::gather(s, dkv, dcache, shape.kv_tokens(&d.qkv, &b.slots, t));
        layer::backward_before_attention(s, &shape, p, g, &acts.rope, x, a, d, dx, t);
    }
    let dtable = grads.text.embed.as_ref().map_or(Table::Packed(&grads.text.head), Table::Rows);
    embedding::backward(s, &b.ids, dx, dtable, t, h);
    if let (VisionPass::Trained(v), Some(g), true) = (&acts.vision, &grads.vision, b.images > 0) {
        // `hidden` and `vision_out` have served; they take the gradients of the image rows and of the tower's output.
        let tokens = v.batch.plan.tokens();
        rows::gather(s, dx, &b.image_rows, &acts.hidden, b.images, h);
        s.zero(&acts.vision_out.view(0, tokens * h));
        rows::scatter_add(s, &acts.hidden, &b.image_sources, &acts.vision_out, b.images, h);
        v.backward(model, s, g, &acts.vision_out)?;
    }
    Ok(())
}

impl GradStore {
    /// The gradient of the output head, packed as the head is: what the loss adds to. Tied models collect the embedding's
    /// in it too.
    pub fn head(&self) -> &linear::Weight {
        &self.text.head
    }
}

impl TrainedVision {
    fn backward(&self, model: &Model, s: &Stream, g: &VisionParams, dout: &Buffer) -> Result<()> {
        let (c, p, b, tower, m) = (&model.config.vision, &model.vision, &self.batch, &self.tower, &self.merger);
        let Some(TowerGrads { layer: d, dx }) = &tower.backward else {
            return Err(Error::internal("a backward pass over a vision tower that was run forward only"));
        };
        let (shape, h, patches, tokens) = (c.layer_shape(), c.hidden_size, b.plan.patches(), b.plan.tokens());

        // The merger, whose own buffers take the gradients once they have served.
        let (dmerged, dact) = (&m.out, &d.normed);
        rows::gather(s, dout, &b.window_index, dmerged, tokens, c.out_hidden_size);
        layer::weight_and_bias(s, dmerged, &m.act, &g.fc2, Some(&g.fc2_bias), tokens);
        linear::backward_input(s, dmerged, &p.fc2, dact, tokens, false);
        gelu::backward(s, &m.fc1, dact, &m.act, patches * h);
        layer::weight_and_bias(s, &m.act, &m.normed, &g.fc1, Some(&g.fc1_bias), tokens);
        linear::backward_input(s, &m.act, &p.fc1, &m.normed, tokens, false);
        s.zero(&dx.view(0, patches * h));
        rms_norm::backward(s, tower.output(), &p.ln_q, VISION_NORM_EPS, &m.normed, dx, Some(&g.ln_q), patches, h);

        for i in (0..tower.layers()).rev() {
            let (p, g, x, a) = (&p.blocks[i], &g.blocks[i], &tower.inputs[i], tower.acts(i));
            let (cu_seqlens, n) = vision::cuts(c, b, i);
            if tower.is_lost(i) {
                vision::block(s, &shape, p, (cu_seqlens, n), &self.rope, x, a, None, patches);
            }
            layer::backward_after_attention(s, &shape, p, g, a, d, dx, patches);
            let lse = a.lse.as_ref().ok_or_else(|| Error::internal("the forward pass kept no log-sum-exp"))?;
            let (heads, hd, scale) = (shape.heads, shape.head_dim, shape.scale());
            attention::varlen_backward(
                s, &a.qkv, cu_seqlens, n, heads, hd, scale, false, &a.attn, lse, &d.attn, &d.qkv,
            );
            layer::backward_before_attention(s, &shape, p, g, &self.rope, x, a, d, dx, patches);
        }
        rows::scatter(s, dx, &b.window_index, &d.normed, tokens, GROUP * h);
        let dy = d.normed.view(0, patches * h);
        patch_embed::backward_weight(s, &b.pixels, &b.geometry, &model.normalize, &dy, &g.patch_embed.data);
        Ok(())
    }
}
