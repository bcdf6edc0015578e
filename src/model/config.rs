//! What a checkpoint says about its shape: the hub's flat `config.json` and the nested one of transformers 5.

use crate::input::Tokenizer;
use crate::ops::patch_embed::{MERGE, PATCH};
use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::path::Path;

/// The shape of a Qwen2.5-VL model.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; `heads` is a multiple of it.
    pub kv_heads: usize,
    /// Epsilon of every RMSNorm of the decoder.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// How the half head dimension is split between time, height and width (M-RoPE).
    pub mrope_section: [usize; 3],
    /// Longest sequence the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// Whether the output head is the embedding table.
    pub tie_word_embeddings: bool,
    /// Ids with a meaning of their own.
    pub tokens: TokenIds,
    /// The vision tower.
    pub vision: VisionConfig,
}

/// Token ids with a meaning of their own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenIds {
    /// Begins a document (`<|endoftext|>`).
    pub bos: Option<u32>,
    /// Ends a turn (`<|im_end|>`).
    pub eos: Option<u32>,
    /// Stands for one token of an image.
    pub image: u32,
    /// Stands for one token of a video.
    pub video: u32,
    /// Precedes an image.
    pub vision_start: u32,
    /// Follows an image.
    pub vision_end: u32,
}

/// The shape of the vision tower.
#[derive(Clone, Debug, PartialEq)]
pub struct VisionConfig {
    /// Transformer blocks.
    pub depth: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated MLP.
    pub intermediate_size: usize,
    /// Attention heads.
    pub heads: usize,
    /// Width of what the merger hands to the decoder; equal to [`Config::hidden_size`].
    pub out_hidden_size: usize,
    /// Side of an attention window, in pixels.
    pub window_size: usize,
    /// Blocks whose attention spans the whole image; the others attend within windows.
    pub full_attention_blocks: Vec<usize>,
}

/// Epsilon of every RMSNorm of the vision tower (fixed by the reference implementation).
pub const VISION_NORM_EPS: f32 = 1e-6;
/// Base of the vision tower's rotary frequencies.
pub const VISION_ROPE_THETA: f32 = 10_000.0;

impl Config {
    /// Width of one attention head of the decoder.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.heads
    }
    /// Columns of the fused query, key and value projection.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim()
    }

    /// Reads `dir/config.json`.
    ///
    /// # Errors
    /// [`Error::Io`] where it cannot be read, and as [`parse`](Self::parse).
    pub fn load(dir: &Path) -> Result<Config> {
        let path = dir.join("config.json");
        let text = crate::files::read_to_string(&path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => Error::input(
                format!("{}: there is no config.json", dir.display()),
                "give the folder of a Qwen2.5-VL checkpoint (config.json, model*.safetensors, tokenizer.json), or make one with `varft init`",
            ),
            _ => Error::io("read the model's config", &path, e),
        })?;
        Self::parse(&text, &path)
    }

    /// Reads the text of a `config.json`; `path` is for messages only.
    ///
    /// # Errors
    /// [`Error::Input`] that names the file and the field: no JSON, another architecture, a missing or contradictory figure.
    pub fn parse(text: &str, path: &Path) -> Result<Config> {
        let root: Value = serde_json::from_str(text).map_err(|e| {
            Error::input(
                format!("{}: not valid JSON: {e}", path.display()),
                "fetch the file again from where the model came from",
            )
        })?;
        let root = Fields { path, section: "", map: object(&root, path, "the file")? };
        let kind = root.get("model_type").and_then(Value::as_str).unwrap_or("(none)");
        if kind != "qwen2_5_vl" {
            return Err(Error::input(
                format!("{}: the architecture is {kind:?}, and only \"qwen2_5_vl\" is known", path.display()),
                "use a Qwen2.5-VL checkpoint; other models, Qwen2-VL and Qwen3-VL among them, are not supported",
            ));
        }
        // The hub's file has the decoder's fields at the top; transformers 5 writes them under `text_config`.
        let text = match root.get("text_config") {
            Some(v) => Fields { path, section: "text_config.", map: object(v, path, "text_config")? },
            None => Fields { path, section: "", map: root.map },
        };
        let vision = root.get("vision_config").ok_or_else(|| root.missing("vision_config"))?;
        let vision = Fields { path, section: "vision_config.", map: object(vision, path, "vision_config")? };
        let rope = ["rope_parameters", "rope_scaling"].iter().find_map(|k| text.get(k).map(|v| (k, v)));
        let Some((rope_name, rope_value)) = rope else { return Err(text.missing("rope_scaling.mrope_section")) };
        let section = format!("{}{rope_name}.", text.section);
        let rope = Fields { path, section: &section, map: object(rope_value, path, rope_name)? };
        let kind = rope.get("rope_type").or_else(|| rope.get("type")).and_then(Value::as_str).unwrap_or("mrope");
        if !matches!(kind, "mrope" | "default") {
            return Err(rope.unsupported("rope_type", kind, "mrope or default"));
        }
        for (fields, name) in [(&text, "hidden_act"), (&vision, "hidden_act")] {
            let act = fields.get(name).and_then(Value::as_str).unwrap_or("silu");
            if act != "silu" {
                return Err(fields.unsupported(name, act, "silu"));
            }
        }
        if text.get("use_sliding_window").and_then(Value::as_bool) == Some(true) {
            return Err(text.unsupported("use_sliding_window", "true", "false"));
        }
        for (name, want) in [("patch_size", PATCH), ("spatial_merge_size", MERGE), ("temporal_patch_size", 2)] {
            let found = vision.size_or(name, want)?;
            if found != want {
                return Err(vision.unsupported(name, &found.to_string(), &want.to_string()));
            }
        }
        let channels = vision.size_or(if vision.get("in_chans").is_some() { "in_chans" } else { "in_channels" }, 3)?;
        if channels != 3 {
            return Err(vision.unsupported("in_channels", &channels.to_string(), "3"));
        }
        let tie = root.get("tie_word_embeddings").or_else(|| text.get("tie_word_embeddings"));
        let either = |name: &str| -> Result<Option<u32>> {
            Ok(match text.id(name)? {
                None => root.id(name)?,
                id => id,
            })
        };
        let needed = |name: &str| either(name)?.ok_or_else(|| root.missing(name));
        let heads = text.size("num_attention_heads")?;
        let config = Config {
            vocab_size: text.size("vocab_size")?,
            hidden_size: text.size("hidden_size")?,
            intermediate_size: text.size("intermediate_size")?,
            layers: text.size("num_hidden_layers")?,
            heads,
            kv_heads: text.size_or("num_key_value_heads", heads)?,
            rms_norm_eps: text.real_or("rms_norm_eps", 1e-6)? as f32,
            rope_theta: match rope.get("rope_theta") {
                Some(_) => rope.real_or("rope_theta", 1e6)? as f32,
                None => text.real_or("rope_theta", 1e6)? as f32,
            },
            mrope_section: rope.triple("mrope_section")?,
            max_position_embeddings: text.size_or("max_position_embeddings", 128_000)?,
            tie_word_embeddings: tie.and_then(Value::as_bool).unwrap_or(false),
            tokens: TokenIds {
                bos: either("bos_token_id")?,
                eos: either("eos_token_id")?,
                image: needed("image_token_id")?,
                video: needed("video_token_id")?,
                vision_start: needed("vision_start_token_id")?,
                vision_end: needed("vision_end_token_id")?,
            },
            vision: VisionConfig {
                depth: vision.size("depth")?,
                hidden_size: vision.size("hidden_size")?,
                intermediate_size: vision.size("intermediate_size")?,
                heads: vision.size("num_heads")?,
                out_hidden_size: vision.size("out_hidden_size")?,
                window_size: vision.size("window_size")?,
                full_attention_blocks: vision.sizes("fullatt_block_indexes")?,
            },
        };
        config.check().map_err(|what| {
            Error::input(
                format!("{}: {what}", path.display()),
                "this config.json does not describe a Qwen2.5-VL model; fetch it again from where the model came from",
            )
        })?;
        Ok(config)
    }

    /// What is contradictory about the figures, if anything.
    pub fn check(&self) -> Result<(), String> {
        let v = &self.vision;
        let divides = |what: &str, a: usize, of: &str, b: usize| match a > 0 && b > 0 && b.is_multiple_of(a) {
            true => Ok(()),
            false => Err(format!("{what} ({a}) does not divide {of} ({b})")),
        };
        // Far beyond any model there is; sizes and sums of them stay whole numbers without a check at every product.
        for (name, n, most) in [
            ("vocab_size", self.vocab_size, 1 << 24),
            ("hidden_size", self.hidden_size, 1 << 20),
            ("intermediate_size", self.intermediate_size, 1 << 20),
            ("num_hidden_layers", self.layers, 1 << 12),
            ("max_position_embeddings", self.max_position_embeddings, 1 << 30),
            ("vision hidden_size", v.hidden_size, 1 << 20),
            ("vision intermediate_size", v.intermediate_size, 1 << 20),
            ("vision depth", v.depth, 1 << 12),
            ("vision window_size", v.window_size, 1 << 30),
        ] {
            match n {
                0 => return Err(format!("{name} is zero")),
                n if n > most => return Err(format!("{name} is {n}, and at most {most} makes sense")),
                _ => {}
            }
        }
        for (name, x) in [("rms_norm_eps", self.rms_norm_eps), ("rope_theta", self.rope_theta)] {
            if !(x > 0.0 && x.is_finite()) {
                return Err(format!("{name} is {x}, and should be a number above zero"));
            }
        }
        divides("num_attention_heads", self.heads, "hidden_size", self.hidden_size)?;
        divides("num_key_value_heads", self.kv_heads, "num_attention_heads", self.heads)?;
        divides("vision num_heads", v.heads, "vision hidden_size", v.hidden_size)?;
        divides("2", 2, "the head dimension", self.head_dim())?;
        divides("4", 4, "the vision head dimension", v.hidden_size / v.heads)?;
        let half = self.mrope_section.iter().fold(0usize, |sum, n| sum.saturating_add(*n));
        if half.saturating_mul(2) != self.head_dim() {
            return Err(format!(
                "mrope_section {:?} adds up to {half}, and half the head dimension is {}",
                self.mrope_section,
                self.head_dim() / 2
            ));
        }
        if v.out_hidden_size != self.hidden_size {
            return Err(format!(
                "the vision tower hands over vectors of {} (out_hidden_size), and the decoder takes {} (hidden_size)",
                v.out_hidden_size, self.hidden_size
            ));
        }
        if v.window_size < PATCH * MERGE {
            return Err(format!("window_size {} is smaller than one merged patch ({})", v.window_size, PATCH * MERGE));
        }
        let t = &self.tokens;
        for (name, id) in [
            ("image_token_id", t.image),
            ("video_token_id", t.video),
            ("vision_start_token_id", t.vision_start),
            ("vision_end_token_id", t.vision_end),
        ] {
            if id as usize >= self.vocab_size {
                return Err(format!("{name} {id} is outside the vocabulary of {}", self.vocab_size));
            }
        }
        Ok(())
    }

    /// That `tokenizer` can have been made for this model: its ids are in the vocabulary, and what stands for an image is the
    /// same in both.
    ///
    /// # Errors
    /// [`Error::Input`] naming the token.
    pub fn check_tokenizer(&self, tokenizer: &Tokenizer) -> Result<()> {
        let mend = "take tokenizer.json and config.json from the same place";
        if tokenizer.vocab_size() > self.vocab_size {
            return Err(Error::input(
                format!(
                    "the tokenizer has {} ids, and the model's vocabulary {}: they do not belong together",
                    tokenizer.vocab_size(),
                    self.vocab_size
                ),
                mend,
            ));
        }
        let (theirs, ours) = (tokenizer.special(), &self.tokens);
        for (name, token, config, field) in [
            ("<|image_pad|>", theirs.image_pad, ours.image, "image_token_id"),
            ("<|video_pad|>", theirs.video_pad, ours.video, "video_token_id"),
            ("<|vision_start|>", theirs.vision_start, ours.vision_start, "vision_start_token_id"),
            ("<|vision_end|>", theirs.vision_end, ours.vision_end, "vision_end_token_id"),
        ] {
            if token != config {
                return Err(Error::input(
                    format!("{name} is {token} in the tokenizer, and {config} in config.json ({field})"),
                    mend,
                ));
            }
        }
        Ok(())
    }

    /// The hub's flat `config.json`, which every version of transformers reads. `dtype`: `float32`, `bfloat16` or `float16`.
    pub fn to_json(&self, dtype: &str) -> Value {
        let (v, t) = (&self.vision, &self.tokens);
        json!({
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "attention_dropout": 0.0,
            "bos_token_id": t.bos,
            "eos_token_id": t.eos,
            "vision_start_token_id": t.vision_start,
            "vision_end_token_id": t.vision_end,
            "image_token_id": t.image,
            "video_token_id": t.video,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "max_window_layers": self.layers,
            "model_type": "qwen2_5_vl",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": shortest(self.rms_norm_eps),
            "rope_theta": shortest(self.rope_theta),
            "sliding_window": 32768,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": dtype,
            "use_cache": true,
            "use_sliding_window": false,
            "vision_config": {
                "depth": v.depth,
                "hidden_act": "silu",
                "hidden_size": v.hidden_size,
                "intermediate_size": v.intermediate_size,
                "num_heads": v.heads,
                "in_chans": 3,
                "out_hidden_size": v.out_hidden_size,
                "patch_size": PATCH,
                "spatial_merge_size": MERGE,
                "spatial_patch_size": PATCH,
                "window_size": v.window_size,
                "fullatt_block_indexes": v.full_attention_blocks,
                "tokens_per_second": 2,
                "temporal_patch_size": 2,
            },
            "rope_scaling": { "type": "mrope", "mrope_section": self.mrope_section },
            "vocab_size": self.vocab_size,
        })
    }
}

/// The decimal that a person wrote, not the binary fraction nearest to it (1e-6, not 9.99999997e-7).
fn shortest(x: f32) -> Value {
    x.to_string().parse::<f64>().map_or(Value::Null, |x| json!(x))
}

fn object<'a>(v: &'a Value, path: &Path, what: &str) -> Result<&'a Map<String, Value>> {
    v.as_object().ok_or_else(|| {
        Error::input(
            format!("{}: {what} is not a JSON object", path.display()),
            "fetch the file again from where the model came from",
        )
    })
}

/// One object of the file, with what messages need to name a field of it.
struct Fields<'a> {
    path: &'a Path,
    section: &'a str,
    map: &'a Map<String, Value>,
}

impl Fields<'_> {
    fn get(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|v| !v.is_null())
    }
    fn missing(&self, name: &str) -> Error {
        Error::input(
            format!("{}: the field {}{name} is missing", self.path.display(), self.section),
            "add it, or fetch the file again from where the model came from",
        )
    }
    fn wrong(&self, name: &str, want: &str) -> Error {
        Error::input(
            format!(
                "{}: {}{name} is {}, and should be {want}",
                self.path.display(),
                self.section,
                self.map.get(name).unwrap_or(&Value::Null)
            ),
            "correct the field, or fetch the file again from where the model came from",
        )
    }
    fn unsupported(&self, name: &str, found: &str, known: &str) -> Error {
        Error::input(
            format!("{}: {}{name} is {found}, and only {known} is supported", self.path.display(), self.section),
            "use a checkpoint of the Qwen2.5-VL family as it was published",
        )
    }
    fn as_size(&self, name: &str, v: &Value) -> Result<usize> {
        v.as_u64().filter(|&n| n < 1 << 40).map(|n| n as usize).ok_or_else(|| self.wrong(name, "a whole number"))
    }
    fn size(&self, name: &str) -> Result<usize> {
        self.as_size(name, self.get(name).ok_or_else(|| self.missing(name))?)
    }
    fn size_or(&self, name: &str, default: usize) -> Result<usize> {
        self.get(name).map_or(Ok(default), |v| self.as_size(name, v))
    }
    fn real_or(&self, name: &str, default: f64) -> Result<f64> {
        self.get(name).map_or(Ok(default), |v| v.as_f64().ok_or_else(|| self.wrong(name, "a number")))
    }
    /// An id; a list of ids (which generation configs allow) counts as its first.
    fn id(&self, name: &str) -> Result<Option<u32>> {
        let Some(v) = self.get(name) else { return Ok(None) };
        let one = v.as_array().map_or(Some(v), |a| a.first());
        match one.and_then(Value::as_u64).and_then(|n| u32::try_from(n).ok()) {
            Some(id) => Ok(Some(id)),
            None => Err(self.wrong(name, "a token id")),
        }
    }
    fn sizes(&self, name: &str) -> Result<Vec<usize>> {
        let v = self.get(name).ok_or_else(|| self.missing(name))?;
        let a = v.as_array().ok_or_else(|| self.wrong(name, "a list of whole numbers"))?;
        a.iter().map(|x| self.as_size(name, x)).collect()
    }
    fn triple(&self, name: &str) -> Result<[usize; 3]> {
        let v = self.sizes(name)?;
        v.try_into().map_err(|_| self.wrong(name, "a list of three whole numbers"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Preset;

    #[test]
    fn what_is_written_reads_back() {
        for p in Preset::ALL {
            let c = p.config();
            assert_eq!(c.check(), Ok(()), "{p}");
            let text = serde_json::to_string(&c.to_json("float32")).unwrap();
            assert_eq!(Config::parse(&text, Path::new("config.json")).unwrap(), c, "{p}");
        }
    }

    #[test]
    fn flat_and_nested_describe_the_same_model() {
        let c = Preset::Tiny.config();
        let flat = c.to_json("float32");
        let mut top = flat.as_object().unwrap().clone();
        let ids = ["image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"];
        let kept = ["model_type", "vision_config", "tie_word_embeddings"];
        let mut text = Map::new();
        for k in top.keys().cloned().collect::<Vec<_>>() {
            if !ids.contains(&k.as_str()) && !kept.contains(&k.as_str()) {
                text.insert(k.clone(), top.remove(&k).unwrap());
            }
        }
        text.remove("rope_scaling");
        let theta = text.remove("rope_theta").unwrap();
        text.insert(
            "rope_parameters".into(),
            json!({"rope_type": "default", "rope_theta": theta, "mrope_section": c.mrope_section}),
        );
        top.insert("text_config".into(), text.into());
        let nested = serde_json::to_string(&top).unwrap();
        assert_eq!(Config::parse(&nested, Path::new("config.json")).unwrap(), c);
    }

    #[test]
    fn a_config_that_cannot_be_used_names_the_field() {
        let base = Preset::Tiny.config().to_json("float32");
        let cases: [(&str, Value, &str); 8] = [
            ("/model_type", json!("qwen3_vl"), "qwen3_vl"),
            ("/num_attention_heads", json!(7), "num_attention_heads (7)"),
            ("/hidden_size", json!("64"), "hidden_size"),
            ("/rope_scaling/mrope_section", json!([2, 3]), "mrope_section"),
            ("/rope_scaling/type", json!("yarn"), "rope_type is yarn"),
            ("/vision_config/patch_size", json!(16), "vision_config.patch_size is 16"),
            ("/vision_config/out_hidden_size", json!(63), "out_hidden_size"),
            ("/image_token_id", json!(1_000_000), "image_token_id 1000000"),
        ];
        for (at, value, says) in cases {
            let mut v = base.clone();
            *v.pointer_mut(at).unwrap() = value;
            let e = Config::parse(&v.to_string(), Path::new("m/config.json")).unwrap_err().to_string();
            assert!(e.contains(says) && e.contains("m/config.json"), "{at}: {e}");
        }
        let mut v = base.clone();
        v.as_object_mut().unwrap().remove("vocab_size");
        let e = Config::parse(&v.to_string(), Path::new("config.json")).unwrap_err().to_string();
        assert!(e.contains("vocab_size is missing"), "{e}");
        assert!(Config::parse("{", Path::new("config.json")).unwrap_err().to_string().contains("not valid JSON"));
    }
}
