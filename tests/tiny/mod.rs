//! A small random model, and images and prompts for it.

use std::sync::Arc;
use varft::device::Device;
use varft::input::Image;
use varft::model::{LoadOptions, Model, Preset};
use varft::ops::kv_cache::KvCache;

pub fn model(device: &Device) -> Arc<Model> {
    let options = LoadOptions::default();
    Arc::new(Model::random(Preset::Tiny.config(), 7, device, &options).expect("a random model"))
}

/// An image of `h` x `w` tokens, different for each `kind`.
pub fn image(kind: usize, h: usize, w: usize) -> Arc<Image> {
    let mut rng = Rng(kind as u64 + 1);
    let pixels = (0..h * w * 28 * 28 * 3).map(|_| rng.next() as u8).collect();
    Arc::new(Image::from_resized(pixels, h * 28, w * 28, 14, (w * 28, h * 28)).expect("a whole number of patches"))
}

/// SplitMix64.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

/// `n` tokens of text that `kind` decides; texts of one kind begin alike.
pub fn text(kind: usize, n: usize) -> Vec<u32> {
    let mut rng = Rng(1000 + kind as u64);
    (0..n).map(|_| rng.below(500) as u32).collect()
}

/// Bytes of `pages` pages of the KV cache.
pub fn kv_bytes(model: &Model, pages: usize) -> usize {
    let c = &model.config;
    pages * KvCache::bytes_per_block(model.device().float(), c.layers, c.kv_heads, c.head_dim())
}
