//! Shapes to start from without a checkpoint.

use super::config::{Config, TokenIds, VisionConfig};
use crate::{Error, Result};

/// A named shape for a model with random weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preset {
    /// 0.3 M parameters, every architectural feature: for tests and the quick start.
    Tiny,
    /// 43.5 M parameters: for measuring speed on a CPU.
    Mid,
    /// The shape of Qwen2.5-VL-3B.
    B3,
    /// The shape of Qwen2.5-VL-7B.
    B7,
}

impl Preset {
    /// All of them, smallest first.
    pub const ALL: [Preset; 4] = [Preset::Tiny, Preset::Mid, Preset::B3, Preset::B7];

    /// The model's shape.
    pub fn config(self) -> Config {
        // The special tokens follow the vocabulary's last piece in the order of Qwen's tokenizer.
        let base = |first: u32| TokenIds {
            bos: Some(first),
            eos: Some(first + 2),
            vision_start: first + 9,
            vision_end: first + 10,
            image: first + 12,
            video: first + 13,
        };
        // What the published sizes have in common; the 3B's where they differ.
        let published = || Config {
            vocab_size: 151_936,
            hidden_size: 2048,
            intermediate_size: 11_008,
            layers: 36,
            heads: 16,
            kv_heads: 2,
            rms_norm_eps: 1e-6,
            rope_theta: 1e6,
            mrope_section: [16, 24, 24],
            max_position_embeddings: 128_000,
            tie_word_embeddings: true,
            tokens: base(151_643),
            vision: VisionConfig {
                depth: 32,
                hidden_size: 1280,
                intermediate_size: 3420,
                heads: 16,
                out_hidden_size: 2048,
                window_size: 112,
                full_attention_blocks: vec![7, 15, 23, 31],
            },
        };
        match self {
            Preset::Tiny => Config {
                vocab_size: 544,
                hidden_size: 64,
                intermediate_size: 128,
                layers: 4,
                heads: 4,
                kv_heads: 2,
                rms_norm_eps: 1e-6,
                rope_theta: 1e6,
                mrope_section: [2, 3, 3],
                max_position_embeddings: 4096,
                tie_word_embeddings: false,
                tokens: base(512),
                vision: VisionConfig {
                    depth: 4,
                    hidden_size: 32,
                    intermediate_size: 64,
                    heads: 2,
                    out_hidden_size: 64,
                    window_size: 112,
                    full_attention_blocks: vec![1, 3],
                },
            },
            Preset::Mid => Config {
                vocab_size: 8192,
                hidden_size: 512,
                intermediate_size: 1408,
                layers: 8,
                heads: 8,
                kv_heads: 2,
                rms_norm_eps: 1e-6,
                rope_theta: 1e6,
                mrope_section: [8, 12, 12],
                max_position_embeddings: 4096,
                tie_word_embeddings: false,
                tokens: base(8000),
                vision: VisionConfig {
                    depth: 8,
                    hidden_size: 320,
                    intermediate_size: 856,
                    heads: 4,
                    out_hidden_size: 512,
                    window_size: 112,
                    full_attention_blocks: vec![3, 7],
                },
            },
            Preset::B3 => published(),
            Preset::B7 => {
                let b3 = published();
                Config {
                    vocab_size: 152_064,
                    hidden_size: 3584,
                    intermediate_size: 18_944,
                    layers: 28,
                    heads: 28,
                    kv_heads: 4,
                    tie_word_embeddings: false,
                    vision: VisionConfig { out_hidden_size: 3584, ..b3.vision },
                    ..b3
                }
            }
        }
    }
}

impl std::fmt::Display for Preset {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Preset::Tiny => "tiny",
            Preset::Mid => "mid",
            Preset::B3 => "3b",
            Preset::B7 => "7b",
        })
    }
}

impl std::str::FromStr for Preset {
    type Err = Error;
    fn from_str(s: &str) -> Result<Preset> {
        Preset::ALL
            .into_iter()
            .find(|p| p.to_string() == s)
            .ok_or_else(|| Error::input(format!("there is no preset {s:?}"), "choose one of tiny, mid, 3b, 7b"))
    }
}
