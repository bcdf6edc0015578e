//! Checkpoints in and out: what is saved loads again, in every layout; what is broken says which file, and what to do.

use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use varft::device::{DType, Device};
use varft::model::{LoadOptions, Model, Preset, SaveOptions};

fn device() -> Device {
    Device::cpu(0)
}

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/reference/models").join(name)
}

fn load(dir: &Path) -> varft::Result<Model> {
    Model::load(dir, &device(), &LoadOptions::default())
}

fn weights(m: &Model) -> Vec<f32> {
    m.device().stream().read(&m.params.flat).wait().unwrap()
}

fn save(m: &Model, dir: &Path, options: &SaveOptions) -> varft::Result<()> {
    m.save(&m.device().stream(), dir, options)
}

/// A folder with a copy of the untied model.
fn copy() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(fixture("tiny").join(name), dir.path().join(name)).unwrap();
    }
    dir
}

/// Rewrites a checkpoint's tensors: `f` gets name, type, shape and bytes, and says what becomes of them.
type Rewritten = Option<(String, Dtype, Vec<usize>, Vec<u8>)>;
fn rewrite(dir: &Path, f: impl Fn(&str, Dtype, &[usize], &[u8]) -> Rewritten) {
    let path = dir.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let all = SafeTensors::deserialize(&bytes).unwrap();
    let new: Vec<_> = all.tensors().iter().filter_map(|(n, t)| f(n, t.dtype(), t.shape(), t.data())).collect();
    let views = new.iter().map(|(n, d, s, b)| (n.clone(), TensorView::new(*d, s.clone(), b).unwrap()));
    fs::write(&path, serialize(views, None).unwrap()).unwrap();
}

#[test]
fn what_is_saved_loads_again_to_the_bit() {
    for name in ["tiny", "tiny_tied_odd"] {
        let m = load(&fixture(name)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = dir.path().join("from/tokenizer.json");
        fs::create_dir(tokenizer.parent().unwrap()).unwrap();
        fs::write(&tokenizer, "{}").unwrap();
        // First in pieces, then whole over the pieces: nothing of them stays.
        let out = dir.path().join("out");
        for shard_bytes in [100_000, usize::MAX] {
            let options = SaveOptions { shard_bytes, copy: vec![tokenizer.clone()], ..SaveOptions::default() };
            save(&m, &out, &options).unwrap();
            let files: Vec<String> =
                fs::read_dir(&out).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
            assert_eq!(files.iter().any(|f| f.ends_with(".index.json")), shard_bytes == 100_000, "{files:?}");
            assert_eq!(files.iter().any(|f| f == "model.safetensors"), shard_bytes > 100_000, "{files:?}");
            assert!(files.iter().any(|f| f == "tokenizer.json") && files.iter().all(|f| !f.ends_with("tmp")));
            let again = load(&out).unwrap();
            assert_eq!(again.config, m.config);
            assert_eq!(weights(&again), weights(&m), "{name}, shards of {shard_bytes}");
        }
    }
}

#[test]
fn halves_round_once() {
    let m = load(&fixture("tiny")).unwrap();
    type Round = fn(f32) -> f32;
    let kinds: [(DType, Round); 2] =
        [(DType::BF16, |x| half::bf16::from_f32(x).to_f32()), (DType::F16, |x| half::f16::from_f32(x).to_f32())];
    for (dtype, round) in kinds {
        let dir = tempfile::tempdir().unwrap();
        save(&m, dir.path(), &SaveOptions { dtype, ..SaveOptions::default() }).unwrap();
        let got = weights(&load(dir.path()).unwrap());
        assert_eq!(got, weights(&m).into_iter().map(round).collect::<Vec<_>>(), "{dtype:?}");
    }
}

#[test]
fn both_naming_schemes_and_frozen_towers_hold_the_same_weights() {
    let dir = copy();
    let text = fs::read_to_string(fixture("names.json")).unwrap();
    let names: Value = serde_json::from_str(&text).unwrap();
    let list = |key: &str| -> Vec<String> { serde_json::from_value(names[key].clone()).unwrap() };
    let (hub, module) = (list("hub"), list("module"));
    rewrite(dir.path(), |name, d, s, b| {
        assert!(hub.iter().any(|n| n == name), "{name}");
        let new = if let Some(rest) = name.strip_prefix("visual.") {
            format!("model.visual.{rest}")
        } else if let Some(rest) = name.strip_prefix("model.") {
            format!("model.language_model.{rest}")
        } else {
            name.to_string()
        };
        assert!(module.contains(&new), "{new}");
        Some((new, d, s.to_vec(), b.to_vec()))
    });
    let (a, b) = (load(&fixture("tiny")).unwrap(), load(dir.path()).unwrap());
    assert_eq!(weights(&a), weights(&b));
    let frozen = LoadOptions { freeze_vision: true, progress: false };
    let c = Model::load(dir.path(), &device(), &frozen).unwrap();
    assert!(a.trains_vision() && !c.trains_vision());
    let s = c.device().stream();
    for name in a.params.names() {
        let of = |m: &Model| m.params.read(&s, &m.params.flat, name).unwrap();
        assert_eq!(of(&a), of(&c), "{name}");
    }
    let gradients = c.params.mirror(c.device());
    let e = c.params.read(&s, &gradients, "visual.merger.ln_q.weight").unwrap_err().to_string();
    assert!(e.contains("frozen"), "{e}");
}

#[test]
fn a_tied_model_may_carry_its_head() {
    let dir = copy();
    fs::copy(fixture("tiny_tied_odd").join("config.json"), dir.path().join("config.json")).unwrap();
    fs::copy(fixture("tiny_tied_odd").join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    let bytes = fs::read(dir.path().join("model.safetensors")).unwrap();
    let all = SafeTensors::deserialize(&bytes).unwrap();
    let table = all.tensor("model.embed_tokens.weight").unwrap();
    let mut tensors = all.tensors();
    tensors.push(("lm_head.weight".into(), table));
    fs::write(dir.path().join("model.safetensors"), serialize(tensors, None).unwrap()).unwrap();
    assert_eq!(weights(&load(dir.path()).unwrap()), weights(&load(&fixture("tiny_tied_odd")).unwrap()));
}

/// The message of loading `dir`; it must name each of `says`.
fn refused(dir: &Path, says: &[&str]) {
    let Err(e) = load(dir) else { panic!("{} loads", dir.display()) };
    let e = e.to_string();
    for s in says.iter().chain(&["to mend it"]) {
        assert!(e.contains(s), "{s:?} is not in: {e}");
    }
}

#[test]
fn a_missing_file_is_named() {
    let empty = tempfile::tempdir().unwrap();
    refused(empty.path(), &["config.json", "varft init"]);
    let dir = copy();
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    refused(dir.path(), &["model.safetensors", "varft init"]);
    let m = load(&fixture("tiny")).unwrap();
    save(&m, dir.path(), &SaveOptions { shard_bytes: 500_000, ..SaveOptions::default() }).unwrap();
    let shard = "model-00002-of-00003.safetensors";
    fs::remove_file(dir.path().join(shard)).unwrap();
    refused(dir.path(), &[shard, "missing"]);
    fs::write(dir.path().join("model.safetensors.index.json"), r#"{"weight_map": {"a": "../elsewhere"}}"#).unwrap();
    refused(dir.path(), &["index.json", "../elsewhere"]);
    fs::write(dir.path().join("model.safetensors.index.json"), "{}").unwrap();
    refused(dir.path(), &["index.json", "weight_map"]);
}

#[test]
fn a_truncated_file_is_named() {
    let dir = copy();
    let path = dir.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    for bytes in [0, 7, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&path, &whole[..bytes]).unwrap();
        refused(dir.path(), &["model.safetensors", "cut short"]);
    }
}

#[test]
fn a_config_that_does_not_fit_its_tensors_names_both() {
    let change = |from: &str, to: &str| {
        let dir = copy();
        let path = dir.path().join("config.json");
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from));
        fs::write(&path, text.replace(from, to)).unwrap();
        dir
    };
    let wider = change("\"intermediate_size\": 128", "\"intermediate_size\": 144");
    refused(wider.path(), &["model.safetensors", "config.json", "_proj.weight", "128", "144"]);
    let deeper = change("\"num_hidden_layers\": 4", "\"num_hidden_layers\": 5");
    refused(deeper.path(), &["model.layers.4.", "missing"]);
    let shallower = change("\"num_hidden_layers\": 4", "\"num_hidden_layers\": 3");
    refused(shallower.path(), &["model.layers.3.", "no place"]);
    let other = change("\"model_type\": \"qwen2_5_vl\"", "\"model_type\": \"llama\"");
    refused(other.path(), &["llama", "qwen2_5_vl"]);
}

#[test]
fn a_tensor_that_cannot_be_used_is_named() {
    let name = "model.layers.2.mlp.up_proj.weight";
    let dir = copy();
    rewrite(dir.path(), |n, d, s, b| (n != name).then(|| (n.to_string(), d, s.to_vec(), b.to_vec())));
    refused(dir.path(), &[name, "missing", "model.safetensors"]);
    let dir = copy();
    rewrite(dir.path(), |n, d, s, b| {
        let d = if n == name { Dtype::I32 } else { d };
        Some((n.to_string(), d, s.to_vec(), b.to_vec()))
    });
    refused(dir.path(), &[name, "I32", "BF16"]);
    let dir = copy();
    rewrite(dir.path(), |n, d, s, b| {
        let s: Vec<usize> = if n == name { s.iter().rev().copied().collect() } else { s.to_vec() };
        Some((n.to_string(), d, s, b.to_vec()))
    });
    refused(dir.path(), &[name, "[64, 128]", "[128, 64]"]);
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_while_saving_keeps_what_was_there() {
    let m = load(&fixture("tiny")).unwrap();
    let dir = copy();
    let before = weights(&load(dir.path()).unwrap());
    // The temporary file's name leads to a device that is always full.
    let temporary = dir.path().join(format!("model.safetensors.{}.tmp", std::process::id()));
    std::os::unix::fs::symlink("/dev/full", &temporary).unwrap();
    let e = save(&m, dir.path(), &SaveOptions::default()).unwrap_err().to_string();
    assert!(e.contains("model.safetensors") && e.contains("free some space"), "{e}");
    assert!(!temporary.is_symlink(), "nothing half-written is left");
    assert_eq!(weights(&load(dir.path()).unwrap()), before);
}

#[test]
fn a_random_model_of_a_preset_saves_and_loads() {
    let m = Model::random(Preset::Tiny.config(), 7, &device(), &LoadOptions::default()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    save(&m, dir.path(), &SaveOptions::default()).unwrap();
    assert_eq!(weights(&load(dir.path()).unwrap()), weights(&m));
    assert_eq!("mid".parse::<Preset>().unwrap(), Preset::Mid);
    assert!("large".parse::<Preset>().unwrap_err().to_string().contains("tiny, mid, 3b, 7b"));
}
