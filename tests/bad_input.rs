//! Whatever a person gets wrong ends in one message that names the thing and its mend, through the library and through the
//! binary; nothing panics, and what was on the disk stays.
//!
//! | what | tests |
//! |---|---|
//! | a missing or truncated shard | here; `model_io.rs` (every kind of file, in the library) |
//! | wild safetensors headers, weights that are not numbers | here |
//! | a config that does not fit its tensors | here; `model_io.rs` (wider, deeper, shallower) |
//! | an unknown architecture, wild configs | here; `src/model/config.rs` (each field's message) |
//! | a missing or foreign tokenizer | here; `input.rs` (broken ones) |
//! | broken, zero-sized and oversized images | here; `input.rs` (every limit, damage at random) |
//! | images of odd kinds (16 bits, CMYK, animated, EXIF) | `input.rs`, against Pillow; odd shapes through the engine: here |
//! | a prompt longer than the context | here; `engine.rs` |
//! | a run file with a misspelt key, or a bad value | here; `src/train/config_file.rs` |
//! | a full disk | here (a run's checkpoint, `init`); `model_io.rs`, `src/train/checkpoint.rs` (each write) |
//! | sampling settings, engine budgets, handles | here; `engine.rs` |
//! | weights that give no distribution | `engine.rs`; a turn's text here |

mod tiny;

use proptest::prelude::*;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use tempfile::TempDir;
use tiny::{image, kv_bytes, model, text};
use varft::Error;
use varft::device::Device;
use varft::engine::{Engine, EngineOptions, Finish, Request, Sampling};
use varft::input::{Image, ImageProcessor, ImageSource, Picture, Preprocessor, Prompt, Tokenizer};
use varft::model::train::{Group, TrainBatch};
use varft::model::{Config, LoadOptions, Model, Preset, SaveOptions};

fn varft(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_varft")).args(args).output().unwrap()
}

/// The binary fails as it should: status 1, one message that names each of `says` and a mend, no panic.
fn fails(args: &[&str], says: &[&str]) {
    refused(&varft(args), says);
}

fn refused(o: &Output, says: &[&str]) {
    let e = String::from_utf8(o.stderr.clone()).unwrap();
    assert_eq!(o.status.code(), Some(1), "{e}");
    let message = e.split_once("error: ").unwrap_or_else(|| panic!("no message in {e:?}")).1;
    for s in says {
        assert!(message.contains(s), "{s:?} is not in: {message}");
    }
    assert!(!e.contains("panicked") && !e.contains("RUST_BACKTRACE"), "{e}");
}

/// A message that says what to do, and names each of `says`.
fn says(e: Error, says: &[&str]) {
    let text = e.to_string();
    for s in says.iter().chain(&["to mend it"]) {
        assert!(text.contains(s), "{s:?} is not in: {text}");
    }
}

/// A folder with a small model, its tokenizer and a conversation about a picture.
struct Folder(TempDir);

impl Folder {
    fn new() -> Folder {
        let f = Folder(tempfile::tempdir().unwrap());
        let o = varft(&["init", "tiny", &f.at("model")]);
        assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
        image::RgbImage::from_fn(60, 40, |x, y| image::Rgb([x as u8, y as u8, 9])).save(f.path("a.png")).unwrap();
        f.ask("a.png", "What is this?");
        f
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn at(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn ask(&self, picture: &str, question: &str) {
        let parts = json!([{"type": "image", "image": picture}, {"type": "text", "text": question}]);
        fs::write(self.path("talk.json"), json!([{"role": "user", "content": parts}]).to_string()).unwrap();
    }

    fn inspect(&self) -> Output {
        varft(&["inspect", "--model", &self.at("model"), &self.at("talk.json"), "--out", &self.at("out")])
    }

    /// `varft inspect` fails, with a message that names each of `says`, and writes nothing.
    fn refused(&self, says: &[&str]) {
        refused(&self.inspect(), says);
        assert!(!self.path("out").exists());
    }

    fn load(&self) -> varft::Result<Model> {
        Model::load(&self.path("model"), &Device::cpu(1), &LoadOptions::default())
    }

    fn config(&self) -> Value {
        serde_json::from_slice(&fs::read(self.path("model/config.json")).unwrap()).unwrap()
    }

    fn set_config(&self, config: &Value) {
        fs::write(self.path("model/config.json"), config.to_string()).unwrap();
    }

    fn weights(&self) -> Vec<u8> {
        fs::read(self.path("model/model.safetensors")).unwrap()
    }

    /// Writes a safetensors file with this header before `data`.
    fn set_weights(&self, header: &[u8], data: &[u8]) {
        let length = (header.len() as u64).to_le_bytes();
        fs::write(self.path("model/model.safetensors"), [&length, header, data].concat()).unwrap();
    }
}

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

/// A PNG whose header claims these sides.
fn png(width: u32, height: u32) -> Vec<u8> {
    let mut file = std::io::Cursor::new(Vec::new());
    image::RgbImage::new(4, 4).write_to(&mut file, image::ImageFormat::Png).unwrap();
    let mut file = file.into_inner();
    file[16..20].copy_from_slice(&width.to_be_bytes());
    file[20..24].copy_from_slice(&height.to_be_bytes());
    let crc = !file[12..29].iter().fold(u32::MAX, |crc, &b| {
        (0..8).fold(crc ^ u32::from(b), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xEDB8_8320 } else { crc >> 1 })
    });
    file[29..33].copy_from_slice(&crc.to_be_bytes());
    file
}

#[test]
fn a_picture_that_cannot_be_shown_is_named_by_the_binary() {
    let f = Folder::new();
    let whole = fs::read(f.path("a.png")).unwrap();
    let strip = |file: &str, width, height| image::GrayImage::new(width, height).save(f.path(file)).unwrap();
    strip("wide.png", 20_000, 2);
    strip("thin.png", 250, 1);
    for (name, bytes, expected) in [
        ("half.png", Some(whole[..whole.len() / 2].to_vec()), "cannot be decoded"),
        ("empty.png", Some(vec![]), "empty"),
        ("text.png", Some(b"not a picture at all".to_vec()), "neither PNG, JPEG nor WebP"),
        ("flat.png", Some(png(0, 5)), "0x5 pixels"),
        ("claims.png", Some(png(30_000, 30_000)), "30000x30000"),
        ("wide.png", None, "20000x2 pixels; a side may have 16384"),
        ("thin.png", None, "200 times"),
    ] {
        if let Some(bytes) = bytes {
            fs::write(f.path(name), bytes).unwrap();
        }
        f.ask(name, "What is this?");
        f.refused(&[name, expected, "to mend it"]);
    }
    f.ask("gone.png", "What is this?");
    f.refused(&["gone.png", "check the path"]);
    f.ask("a.png", &"long ".repeat(5000));
    f.refused(&["talk.json", "context is 4096", "to mend it"]);
}

#[test]
fn pictures_of_odd_shapes_go_through_the_engine() {
    let m = model(&Device::cpu(2));
    let engine = Engine::start(m.clone(), options(&m)).unwrap();
    let processor = ImageProcessor { max_pixels: 16 * 28 * 28, ..ImageProcessor::default() };
    let images = Preprocessor::new(processor, 2, 0).unwrap();
    for (height, width) in [(1, 1), (28, 28), (1, 200), (200, 1), (100, 400), (27, 29), (2000, 3000), (13, 2000)] {
        let pixels = (0..height * width * 3).map(|i| (i * 31) as u8).collect();
        let picture = Arc::new(Picture { pixels, height, width });
        let image = images.submit(ImageSource::Picture { picture, name: "odd".into() }).wait().unwrap();
        let mut prompt = Prompt::default();
        prompt.push_image(image.clone(), m.config.tokens.image); // nothing but the picture
        prompt.push_image(image, m.config.tokens.image);
        let request = Request { prompt, sampling: Sampling { max_tokens: 2, ..Sampling::default() }, n: 1 };
        let c = engine.generate(request).unwrap().remove(0).wait().unwrap();
        assert_eq!((c.tokens.len(), c.finish), (2, Finish::Length), "{width}x{height}");
    }
    for (height, width) in [(1, 201), (4, 1000), (0, 5)] {
        let picture = Arc::new(Picture { pixels: vec![0; height * width * 3], height, width });
        says(images.submit(ImageSource::Picture { picture, name: "odd".into() }).wait().unwrap_err(), &["odd"]);
    }
}

#[test]
fn image_settings_that_do_not_fit_the_tower_are_refused() {
    let f = Folder::new();
    let path = f.path("model/preprocessor_config.json");
    for (text, field) in [
        (r#"{"patch_size": 16}"#, "patch_size"),
        (r#"{"merge_size": 4}"#, "merge_size"),
        (r#"{"min_pixels": "many"}"#, "min_pixels"),
        (r#"{"min_pixels": 99999, "max_pixels": 10}"#, "min_pixels"),
        (r#"{"image_std": [0, 1, 1]}"#, "image_std"),
        (r#"{"image_mean": [1]}"#, "image_mean"),
        ("[", "not valid JSON"),
    ] {
        fs::write(&path, text).unwrap();
        f.refused(&["preprocessor_config.json", field, "to mend it"]);
    }
}

/// Small budgets: a test engine starts at once.
fn options(model: &Model) -> EngineOptions {
    EngineOptions {
        kv_bytes: kv_bytes(model, 64),
        vision_bytes: 128 << 10,
        max_context: 512,
        max_sequences: 8,
        step_tokens: 96,
        step_patches: 256,
        ..EngineOptions::default()
    }
}

#[test]
fn an_engine_with_impossible_budgets_does_not_start() {
    let m = model(&Device::cpu(1));
    let with = |edit: &dyn Fn(&mut EngineOptions)| {
        let mut o = options(&m);
        edit(&mut o);
        Engine::start(m.clone(), o)
    };
    let page = kv_bytes(&m, 1);
    let refused: [&dyn Fn(&mut EngineOptions); 15] = [
        &|o| o.kv_bytes = 0,
        &|o| o.kv_bytes = page - 1,
        &|o| o.kv_bytes = usize::MAX,
        &|o| o.vision_bytes = usize::MAX,
        &|o| o.max_context = 0,
        &|o| o.max_context = 1,
        &|o| o.max_sequences = 0,
        &|o| o.max_sequences = usize::MAX,
        &|o| o.step_tokens = 0,
        &|o| o.step_tokens = usize::MAX,
        &|o| o.step_patches = usize::MAX,
        &|o| o.step_patches = usize::MAX / 4,
        &|o| (o.kv_bytes, o.vision_bytes) = (usize::MAX, usize::MAX),
        &|o| o.forbidden = Some(vec![u32::MAX]),
        &|o| o.forbidden = Some((0..544).collect()),
    ];
    for (i, edit) in refused.iter().enumerate() {
        let Err(e) = with(edit) else { panic!("engine {i} starts") };
        says(e, &[]);
    }
    // What is small but enough works; what only pictures need does not keep text out.
    let accepted: [&dyn Fn(&mut EngineOptions); 5] = [
        &|o| o.kv_bytes = page,
        &|o| (o.vision_bytes, o.step_patches) = (0, 0),
        &|o| (o.max_sequences, o.step_tokens) = (1, 1),
        &|o| o.max_context = usize::MAX,
        &|o| o.forbidden = Some(vec![]),
    ];
    for edit in accepted {
        let engine = with(edit).unwrap();
        let request = Request { prompt: Prompt::from_tokens(text(1, 9)), sampling: Sampling::greedy(usize::MAX), n: 2 };
        for g in engine.generate(request).unwrap() {
            let c = g.wait().unwrap();
            assert_eq!((c.finish, 9 + c.tokens.len()), (Finish::Context, engine.max_context()));
        }
    }
    let engine = with(&|o| o.vision_bytes = 0).unwrap();
    let mut prompt = Prompt::default();
    prompt.push_image(image(1, 1, 1), m.config.tokens.image);
    let request = Request { prompt, sampling: Sampling::default(), n: 1 };
    says(engine.generate(request).err().unwrap(), &["vision_bytes"]);
}

#[test]
fn wild_requests_are_answered_or_refused() {
    let m = model(&Device::cpu(1));
    let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/input/tokenizer_tiny.json");
    let tokenizer = Some(Arc::new(Tokenizer::load(fixture).unwrap()));
    let engine = Engine::start(m.clone(), EngineOptions { tokenizer, ..options(&m) }).unwrap();
    let ask = |sampling: Sampling, n| engine.generate(Request { prompt: Prompt::from_tokens(text(1, 9)), sampling, n });
    let base = Sampling { max_tokens: 4, ..Sampling::default() };

    for (bad, word) in [
        (Sampling { temperature: f32::NAN, ..base.clone() }, "temperature"),
        (Sampling { temperature: f32::INFINITY, ..base.clone() }, "temperature"),
        (Sampling { temperature: -0.5, ..base.clone() }, "temperature"),
        (Sampling { temperature: f32::from_bits(1), ..base.clone() }, "temperature"),
        (Sampling { top_p: 0.0, ..base.clone() }, "top_p"),
        (Sampling { top_p: f32::NAN, ..base.clone() }, "top_p"),
        (Sampling { min_p: -0.1, ..base.clone() }, "min_p"),
        (Sampling { min_p: f32::NAN, ..base.clone() }, "min_p"),
        (Sampling { stop_strings: vec!["a".into(), String::new()], ..base.clone() }, "stop string"),
    ] {
        says(ask(bad, 1).err().unwrap(), &[word]);
    }
    for n in [usize::MAX, 1 << 40] {
        says(ask(base.clone(), n).err().unwrap(), &["samples", "65536"]);
    }
    assert!(ask(base.clone(), 0).unwrap().is_empty(), "no samples are no samples");
    for good in [
        Sampling { temperature: f32::MIN_POSITIVE, ..base.clone() },
        Sampling { temperature: f32::MAX, ..base.clone() },
        Sampling { temperature: 1e-30, top_p: 0.5, ..base.clone() },
        Sampling { top_k: u32::MAX, ..base.clone() },
        Sampling { top_p: f32::MIN_POSITIVE, ..base.clone() },
        Sampling { min_p: 1.0, ..base.clone() },
        Sampling { top_k: 1, top_p: f32::MIN_POSITIVE, min_p: 1.0, temperature: f32::MAX, ..base.clone() },
        Sampling { seed: u64::MAX, stream: u64::MAX, ..base.clone() },
        Sampling { stop_ids: vec![u32::MAX; 1000], ..base.clone() },
        Sampling { stop_strings: vec!["x".repeat(10 << 20)], ..base.clone() },
        Sampling { stop_strings: vec!["\u{1F980}".into(); 500], ..base.clone() },
    ] {
        let what = format!("{:?}", Sampling { stop_strings: vec![], stop_ids: vec![], ..good.clone() });
        for g in ask(good, 2).unwrap() {
            let c = g.wait().unwrap();
            assert_eq!((c.tokens.len(), c.finish), (4, Finish::Length), "{what}");
            assert!(c.logprobs.iter().all(|l| *l <= 0.0 && !l.is_nan()), "{what}: {:?}", c.logprobs);
        }
    }
    let none = ask(Sampling { max_tokens: 0, ..base.clone() }, 3).unwrap();
    assert!(none.into_iter().all(|g| g.wait().unwrap().tokens.is_empty()));
    let single = Request { prompt: Prompt::from_tokens(vec![0]), sampling: base, n: 1 };
    assert_eq!(engine.generate(single).unwrap().remove(0).wait().unwrap().tokens.len(), 4);
}

#[test]
fn prompts_that_contradict_themselves_are_refused_by_engine_and_trainer() {
    let m = model(&Device::cpu(1));
    let engine = Engine::start(m.clone(), options(&m)).unwrap();
    let pad = m.config.tokens.image;
    let mut good = Prompt::from_tokens(vec![1]);
    good.push_image(image(1, 2, 2), pad);
    good.tokens.push(2);
    let s = m.device().stream();
    let edits: [&dyn Fn(&mut Prompt); 10] = [
        &|p| p.tokens[0] = pad,
        &|p| p.tokens[2] = 7,
        &|p| p.tokens[0] = 544,
        &|p| p.tokens.truncate(3),
        &|p| p.images[0].offset = usize::MAX,
        &|p| p.images[0].len = usize::MAX,
        &|p| p.images.clear(),
        &|p| p.images.push(p.images[0].clone()),
        // Pixels and grid are fields that anybody may set.
        &|p| Arc::make_mut(&mut p.images[0].image).pixels.truncate(10),
        &|p| {
            let mut one = Image::clone(&p.images[0].image);
            (one.grid.t, one.grid.h) = (4, 1);
            p.images[0].image = Arc::new(one);
        },
    ];
    for (i, edit) in edits.iter().enumerate() {
        let mut bad = good.clone();
        edit(&mut bad);
        let request = Request { prompt: bad.clone(), sampling: Sampling::greedy(1), n: 1 };
        let Err(e) = engine.generate(request) else { panic!("the engine takes prompt {i}") };
        says(e, &[]);
        let mut session = engine.session();
        assert!(session.append(bad.clone()).is_err() && session.tokens().unwrap().is_empty());
        let group = Group { prompt: good.clone(), completions: vec![bad] };
        let Err(e) = TrainBatch::pack(&m.config, m.device(), &s, &[group]) else { panic!("the trainer takes {i}") };
        says(e, &["group 0"]);
    }
    // Nobody was disturbed.
    let request = Request { prompt: good, sampling: Sampling::greedy(3), n: 1 };
    assert_eq!(engine.generate(request).unwrap().remove(0).wait().unwrap().tokens.len(), 3);
}

#[test]
fn two_engines_share_a_model_and_each_may_go_first() {
    let m = model(&Device::cpu(2));
    let start = || Engine::start(m.clone(), options(&m)).unwrap();
    let request = || {
        let mut prompt = Prompt::from_tokens(text(2, 20));
        prompt.push_image(image(1, 2, 2), m.config.tokens.image);
        prompt.tokens.push(3);
        Request { prompt, sampling: Sampling { max_tokens: 30, ..Sampling::default() }, n: 3 }
    };
    let (a, b) = (start(), start());
    let (from_a, from_b) = (a.generate(request()).unwrap(), b.generate(request()).unwrap());
    for (x, y) in from_a.into_iter().zip(from_b) {
        assert_eq!(x.wait().unwrap(), y.wait().unwrap());
    }
    // One ends amid its work, with sessions, a fork and handles still about; the other does not notice.
    let mut session = a.session();
    session.append(request().prompt).unwrap();
    let mut fork = session.fork().unwrap();
    let running = session.generate(Sampling { max_tokens: 400, ..Sampling::default() }).unwrap();
    let of_fork = fork.generate(Sampling { max_tokens: 400, ..Sampling::default() }).unwrap();
    let samples = a.generate(request()).unwrap();
    drop(a);
    for g in samples.into_iter().chain([running, of_fork]) {
        assert!(matches!(g.wait(), Ok(_) | Err(Error::Cancelled(_))));
    }
    assert!(session.generate(Sampling::default()).is_err() && session.fork().is_err() && session.tokens().is_err());
    drop((session, fork));
    let c = b.generate(request()).unwrap().remove(0).wait().unwrap();
    assert_eq!(c.tokens.len(), 30);
}

#[test]
fn a_folder_that_cannot_be_written_or_read_is_named() {
    let f = Folder::new();
    fs::write(f.path("file"), "").unwrap();
    fails(&["init", "tiny", &f.at("file/model")], &["file/model"]);
    fails(&["init", "tiny", &f.at("other"), "--tokenizer", &f.at("none.json")], &["none.json", "check the path"]);
    assert!(!f.path("other").exists(), "nothing half made");
    fails(&["report", &f.at("file")], &["file"]);
    fails(&["report", &f.at("nowhere")], &["nowhere"]);
    let o = varft(&["inspect", "--model", &f.at("model"), &f.at("talk.json"), "--out", &f.at("no/such/out")]);
    refused(&o, &["no/such/out"]);
}

/// Runs the binary where no file may grow beyond half a megabyte, which stands for a disk without room: the system
/// refuses what is written past it.
fn without_room(args: &[&str]) -> Output {
    let script = r#"trap "" XFSZ; ulimit -S -f 500; exec "$0" "$@""#;
    Command::new("sh").args(["-c", script, env!("CARGO_BIN_EXE_varft")]).args(args).output().unwrap()
}

#[test]
fn a_disk_without_room_leaves_the_model_that_was_there() {
    let f = Folder::new();
    let before = f.weights();
    let o = without_room(&["init", "tiny", &f.at("model"), "--seed", "5", "--force"]);
    refused(&o, &["model/model.safetensors", "write", "make room"]);
    assert_eq!(f.weights(), before);
    let left: Vec<_> = fs::read_dir(f.path("model")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.iter().all(|n| !n.to_string_lossy().contains("tmp")), "{left:?}");
    assert!(f.inspect().status.success());
}

/// A run of a few small steps that needs no download but the tool's environment.
const RUN: &str = r#"
[rollout]
prompts = 1
group_size = 2
max_new_tokens = 12
context = 1500
kv_cache_mib = 16
vision_cache_mib = 4
concurrency = 2
prompt = "brief"
[task]
train_items = 4
[optim]
schedule = "constant"
[log]
eval_every = 0
checkpoint_every = 1
keep_last = 0
"#;

#[test]
fn a_disk_without_room_at_a_checkpoint_leaves_the_run_to_go_on_with() {
    let f = Folder::new();
    fs::write(f.path("run.toml"), RUN).unwrap();
    let run = f.path("r");
    let (dir, model) = (format!("run.dir={}", f.at("")), format!("model.path={}", f.at("model")));
    let (file, at) = (f.at("run.toml"), f.at("r"));
    let o = varft(&["train", &file, "--set", &dir, "--set", "run.name=r", "--set", &model, "--set", "optim.steps=1"]);
    assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
    let files = |step: u64| -> Vec<(PathBuf, Vec<u8>)> {
        let entries = fs::read_dir(run.join(format!("checkpoints/step-{step}"))).unwrap();
        let mut all: Vec<_> = entries.map(|e| e.unwrap().path()).map(|p| (p.clone(), fs::read(p).unwrap())).collect();
        all.sort();
        all
    };
    let before = files(1);

    let o = without_room(&["train", &at, "--resume", "--set", "optim.steps=3"]);
    refused(&o, &["checkpoints/", "model.safetensors", "make room"]);
    assert!(String::from_utf8_lossy(&o.stderr).contains("--resume"), "how to go on");
    assert_eq!(files(1), before);
    let left: Vec<_> = fs::read_dir(run.join("checkpoints")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["step-1"]);

    let o = varft(&["train", &at, "--resume", "--set", "optim.steps=3"]);
    assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
    assert_eq!(files(1), before);
    assert!(run.join("checkpoints/step-3/train_state.json").is_file());
    let metrics = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let steps: Vec<Value> =
        metrics.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()["step"].clone()).collect();
    assert!(steps.windows(2).all(|w| w[0].as_u64() <= w[1].as_u64()), "each step's figures once, in order: {steps:?}");
}

#[test]
fn a_run_file_with_a_mistake_is_refused_by_line_and_nothing_begins() {
    let f = Folder::new();
    let file = f.at("run.toml");
    let dir = format!("run.dir={}", f.at("runs"));
    let with = |text: &str, set: &[&str], expected: &[&str]| {
        fs::write(f.path("run.toml"), text).unwrap();
        let set: Vec<&str> = set.iter().flat_map(|s| ["--set", s]).collect();
        fails(&[&["train", &file, "--set", &dir], &set[..]].concat(), expected);
        assert!(!f.path("runs/run/checkpoints").exists());
    };
    let mend = "to mend it";
    with("[algo]\n\nbetta = 0.1\n", &[], &["run.toml, line 3", "`algo.betta`", "`algo.beta`", mend]);
    with("[algos]\nbeta = 0.1\n", &[], &["run.toml, line 1", "`algos`", "`algo`", mend]);
    with("[algo\n", &[], &["run.toml, line 1", mend]);
    with("[algo]\nbeta = \"x\"\n", &[], &["run.toml, line 2", "f64", mend]);
    with("", &["algo.betta=1"], &["the command line", "`algo.beta`", mend]);
    with("", &["rollout.temperature=nan"], &["`rollout.temperature`", mend]);
    with("", &["tools.python.cpu_s=1e300"], &["`tools.python.cpu_s`", mend]);
    with("", &["rollout.kv_cache_mib=9000000000000000000"], &["`rollout.kv_cache_mib`", mend]);
    with("", &["rollout.concurrency=1000000"], &["`rollout.concurrency`", mend]);
    with("", &["run.threads=1000000"], &["`run.threads`", mend]);
    with("", &["rollout.group_size=-1"], &["group_size", mend]);
    with("", &[], &["`model.path` is not set", "varft init", mend]);
    with("", &["model.path=/no/such/model"], &["/no/such/model", mend]);
    with("[task]\nkind = \"mat\"\n", &[&format!("model.path={}", f.at("model"))], &["task.train", mend]);
    fails(&["train", &f.at("none.toml")], &["none.toml", "check the path"]);
    fails(&["train", &f.at("model")], &["no run in this folder", mend]);
}

#[test]
fn a_reader_that_goes_away_is_no_panic() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_varft"))
        .args(["doctor", "--dir", "."])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let o = child.wait_with_output().unwrap();
    assert!(!String::from_utf8_lossy(&o.stderr).contains("panicked"), "{}", String::from_utf8_lossy(&o.stderr));
}
