//! Checkpoints, configs and tokenizers that are broken, or do not belong together.

use super::tiny::model;
use super::{Folder, options, says};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use varft::Error;
use varft::device::Device;
use varft::engine::{Engine, EngineOptions};
use varft::input::Tokenizer;
use varft::model::{Config, LoadOptions, Model, Preset, SaveOptions};

/// The header of a safetensors file, and what follows it.
fn split(file: &[u8]) -> (Value, &[u8]) {
    let n = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&file[8..8 + n]).unwrap(), &file[8 + n..])
}

#[test]
fn a_checkpoint_that_is_not_whole_is_named_by_the_binary() {
    let f = Folder::new();
    assert!(f.inspect().status.success());
    fs::remove_file(f.path("out")).unwrap();
    let whole = f.weights();

    fs::write(f.path("model/model.safetensors"), &whole[..whole.len() / 2]).unwrap();
    f.refused(&["model/model.safetensors", "cut short", "to mend it"]);
    fs::remove_file(f.path("model/model.safetensors")).unwrap();
    f.refused(&["model: ", "no weights", "to mend it"]);
    fs::create_dir(f.path("model/model.safetensors")).unwrap();
    f.refused(&["model/model.safetensors"]);
    fs::remove_dir(f.path("model/model.safetensors")).unwrap();

    fs::write(f.path("model/model.safetensors"), &whole).unwrap();
    let m = f.load().unwrap();
    let shards = SaveOptions { shard_bytes: 500_000, ..SaveOptions::default() };
    m.save(&m.device().stream(), &f.path("model"), &shards).unwrap();
    let shard = "model-00002-of-00003.safetensors";
    let bytes = fs::read(f.path("model").join(shard)).unwrap();
    fs::write(f.path("model").join(shard), &bytes[..bytes.len() - 1]).unwrap();
    f.refused(&[shard, "cut short", "to mend it"]);
    fs::remove_file(f.path("model").join(shard)).unwrap();
    f.refused(&[shard, "missing", "to mend it"]);
    // A list that leaves a shard out: its tensors are missing, though nothing that is named is.
    let index = fs::read_to_string(f.path("model/model.safetensors.index.json")).unwrap();
    fs::write(f.path("model/model.safetensors.index.json"), index.replace(shard, "model-00001-of-00003.safetensors"))
        .unwrap();
    f.refused(&["the tensor", "missing", "to mend it"]);
    fs::write(f.path("model/model.safetensors.index.json"), &index[..index.len() / 2]).unwrap();
    f.refused(&["index.json", "to mend it"]);
}

#[test]
fn a_wild_header_is_refused_before_it_is_believed() {
    let f = Folder::new();
    let whole = f.weights();
    let (header, data) = split(&whole);
    let name = "model.layers.1.mlp.up_proj.weight";
    let refuse = |expected: &[&str]| {
        let Err(e) = f.load() else { panic!("it loads") };
        says(e, &[&["model.safetensors"], expected].concat());
    };
    for length in [u64::MAX, 1 << 62, 1 << 40, whole.len() as u64, 0] {
        fs::write(f.path("model/model.safetensors"), [&length.to_le_bytes(), &whole[8..]].concat()).unwrap();
        refuse(&["not a whole safetensors file"]);
    }
    let edited = |edit: &dyn Fn(&mut Value)| {
        let mut h = header.clone();
        edit(&mut h);
        f.set_weights(h.to_string().as_bytes(), data);
    };
    let offsets = |h: &Value| h[name]["data_offsets"].clone();
    edited(&|h| h["model.norm.weight"]["data_offsets"] = offsets(h)); // two tensors in one place, and a hole
    refuse(&[]);
    for [a, b] in [[0, u64::MAX], [u64::MAX, 0], [u64::MAX - 4, u64::MAX]] {
        edited(&|h| h[name]["data_offsets"] = json!([a, b]));
        refuse(&[]);
    }
    edited(&|h| h[name]["shape"] = json!([u64::MAX, 2]));
    refuse(&[]);
    edited(&|h| h[name]["shape"] = json!([1u64 << 32, 1u64 << 32]));
    refuse(&[]);
    edited(&|h| h[name]["dtype"] = json!("F8_E9"));
    refuse(&[]);
    for text in ["", "[]", "{\"a\": 1}", "\"x\"", "{\"a\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]}}"] {
        f.set_weights(text.as_bytes(), data);
        refuse(&[]);
    }
}

#[test]
fn weights_that_are_no_numbers_are_refused_by_name() {
    for bad in [f32::NAN, f32::INFINITY] {
        let f = Folder::new();
        let mut file = f.weights();
        let (header, data) = split(&file);
        let name = "model.layers.2.self_attn.k_proj.weight";
        let at = file.len() - data.len() + header[name]["data_offsets"][0].as_u64().unwrap() as usize + 4 * 77;
        file[at..at + 4].copy_from_slice(&bad.to_le_bytes());
        fs::write(f.path("model/model.safetensors"), file).unwrap();
        f.refused(&["model.safetensors", name, "element 77", &bad.to_string(), "to mend it"]);
    }
}

#[test]
fn a_config_that_cannot_be_is_refused_by_field() {
    let f = Folder::new();
    let good = f.config();
    let mut edits: Vec<(&str, Value, &str)> = Vec::new();
    for field in ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"] {
        for (value, says) in [
            (json!(0), ""),
            (json!(-64), "a whole number"),
            (json!("64"), "a whole number"),
            (json!(6.5), "a whole number"),
            (json!(1u64 << 39), ""),
            (json!(u64::MAX), "a whole number"),
            (json!([]), "a whole number"),
        ] {
            edits.push((field, value, says));
        }
    }
    edits.extend([
        ("num_key_value_heads", json!(0), "num_key_value_heads"),
        ("num_key_value_heads", json!(3), "num_key_value_heads (3)"),
        ("rms_norm_eps", json!(-1e-6), "rms_norm_eps"),
        ("rms_norm_eps", json!("small"), "a number"),
        ("rope_theta", json!(0), "rope_theta"),
        ("rope_theta", json!(1e300), "rope_theta"),
        ("max_position_embeddings", json!(0), "max_position_embeddings"),
        ("image_token_id", json!(1_000_000), "outside the vocabulary"),
        ("image_token_id", json!(-1), "a token id"),
        ("image_token_id", json!(u64::MAX), "a token id"),
        ("vision_config", json!([]), "vision_config is not a JSON object"),
        ("rope_scaling", json!({"mrope_section": [2, 3]}), "three whole numbers"),
        ("rope_scaling", json!({"mrope_section": [1u64 << 39, 1u64 << 39, 1u64 << 39]}), "mrope_section"),
        ("rope_scaling", json!({"type": "yarn", "mrope_section": [2, 3, 3]}), "yarn"),
        ("model_type", json!("qwen2_vl"), "only \"qwen2_5_vl\" is known"),
        ("model_type", json!(7), "(none)"),
        ("hidden_act", json!("gelu"), "only silu is supported"),
        // As a model of this many layers might be; its tensors are not there, and nothing is allocated for them.
        ("num_hidden_layers", json!(4096), "model.layers.4."),
        ("vocab_size", json!(1 << 24), "should have [16777216, 64]"),
    ]);
    for (field, value, expected) in edits {
        let mut c = good.clone();
        c[field] = value.clone();
        f.set_config(&c);
        let Err(e) = f.load() else { panic!("{field} = {value} loads") };
        says(e, &["config.json", expected]);
    }
    for (field, value) in [
        ("depth", json!(1u64 << 38)),
        ("hidden_size", json!(1u64 << 38)),
        ("num_heads", json!(0)),
        ("window_size", json!(0)),
        ("window_size", json!(1u64 << 39)),
        ("patch_size", json!(16)),
        ("out_hidden_size", json!(63)),
        ("fullatt_block_indexes", json!("all")),
    ] {
        let mut c = good.clone();
        c["vision_config"][field] = value.clone();
        f.set_config(&c);
        let Err(e) = f.load() else { panic!("vision {field} = {value} loads") };
        says(e, &["config.json"]);
    }
    for text in ["", "[]", "null", "{\"model_type\": \"qwen2_5_vl\"", "\u{0}"] {
        fs::write(f.path("model/config.json"), text).unwrap();
        says(f.load().err().unwrap(), &["config.json"]);
    }
    fs::write(f.path("model/config.json"), [0xFF, 0xFE, 0]).unwrap();
    assert!(f.load().err().unwrap().to_string().contains("config.json"));
    let mut c = good;
    c["model_type"] = json!("llava");
    f.set_config(&c);
    f.refused(&["model/config.json", "\"llava\"", "to mend it"]);
    c["model_type"] = json!("qwen2_5_vl");
    c["intermediate_size"] = json!(144);
    f.set_config(&c);
    f.refused(&["model.safetensors", "config.json", "128", "144", "to mend it"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(120))]

    /// Any value in any field of a config is a model that loads, or an error.
    #[test]
    fn wild_configs_never_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), 0usize..9, any::<u64>(), any::<bool>()), 1..4),
    ) {
        let mut c = Preset::Tiny.config().to_json("float32");
        for (which, kind, number, vision) in changes {
            let map = if vision { c["vision_config"].as_object_mut() } else { c.as_object_mut() };
            let Some(map) = map.filter(|m| !m.is_empty()) else { continue };
            let key = which.get(&map.keys().cloned().collect::<Vec<_>>()).clone();
            map[&key] = match kind {
                0 => json!(number),
                1 => json!(number % 8),
                2 => json!(number % 5000),
                3 => json!(-(number as f64)),
                4 => json!("text"),
                5 => Value::Null,
                6 => json!([number, 3, 3]),
                7 => json!({}),
                _ => json!(f64::from_bits(number)),
            };
        }
        if let Ok(c) = Config::parse(&c.to_string(), Path::new("config.json")) {
            prop_assert!(c.check().is_ok() && c.head_dim() * c.heads == c.hidden_size);
        }
    }

    /// A header with any bytes changed is a file that loads, or an error that names the file.
    #[test]
    fn damaged_headers_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5)) {
        let dir = tempfile::tempdir().unwrap();
        let from = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/reference/models/tiny");
        fs::copy(from.join("config.json"), dir.path().join("config.json")).unwrap();
        let mut file = fs::read(from.join("model.safetensors")).unwrap();
        let header = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        for (at, byte) in changes {
            file[at.index(header)] = byte;
        }
        fs::write(dir.path().join("model.safetensors"), file).unwrap();
        if let Err(e) = Model::load(dir.path(), &Device::cpu(1), &LoadOptions::default()) {
            prop_assert!(e.to_string().contains("model.safetensors") || e.to_string().contains("config.json"), "{e}");
        }
    }
}

#[test]
fn a_model_larger_than_the_machine_is_refused_not_killed() {
    let mut c = Preset::B7.config();
    c.layers = 4096;
    let e = Model::random(c, 1, &Device::cpu(1), &LoadOptions::default()).err().unwrap();
    assert!(matches!(e, Error::Limit { .. }));
    says(e, &["weights", "MiB"]);
}

#[test]
fn a_tokenizer_that_is_missing_or_another_models_is_named() {
    let f = Folder::new();
    let path = f.path("model/tokenizer.json");
    let own = fs::read_to_string(&path).unwrap();
    let good = f.config();
    let mut c = good.clone();
    (c["image_token_id"], c["video_token_id"]) = (good["video_token_id"].clone(), good["image_token_id"].clone());
    f.set_config(&c);
    f.refused(&["<|image_pad|>", "image_token_id", "config.json", "to mend it"]);
    f.set_config(&good);
    let mut large: Value = serde_json::from_str(&own).unwrap();
    for i in 0..60 {
        let mut token = large["added_tokens"][0].clone();
        (token["id"], token["content"]) = (json!(530 + i), json!(format!("<|more_{i}|>")));
        large["added_tokens"].as_array_mut().unwrap().push(token);
    }
    let large = large.to_string();
    fs::write(&path, &large).unwrap();
    f.refused(&["the tokenizer has", "544", "to mend it"]);
    let m = model(&Device::cpu(1));
    let tokenizer = Some(Arc::new(Tokenizer::from_bytes(large.as_bytes(), "large").unwrap()));
    let refused = Engine::start(m.clone(), EngineOptions { tokenizer, ..options(&m) }).err().unwrap();
    says(refused, &["the tokenizer has", "544"]);
    fs::write(&path, &own[..own.len() / 2]).unwrap();
    f.refused(&["model/tokenizer.json", "to mend it"]);
    fs::remove_file(&path).unwrap();
    f.refused(&["model/tokenizer.json", "no tokenizer", "to mend it"]);
}
