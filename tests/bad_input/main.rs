//! Whatever a person gets wrong ends in one message that names the thing and its mend, through the library and through the
//! binary; nothing panics, and what was on the disk stays.
//!
//! | what | tests |
//! |---|---|
//! | a missing or truncated shard | `model`; `model_io.rs` (every kind of file, in the library) |
//! | wild safetensors headers, weights that are not numbers | `model` |
//! | a config that does not fit its tensors | `model`; `model_io.rs` (wider, deeper, shallower) |
//! | an unknown architecture, wild configs | `model`; `src/model/config.rs` (each field's message) |
//! | a missing or foreign tokenizer | `model`; `input/` (broken ones) |
//! | broken, zero-sized and oversized images | `images`; `input/` (every limit, damage at random) |
//! | a pipe, a device or a folder in place of a file | `images`; written over: `runs`; `src/files.rs`, `src/train/checkpoint.rs` |
//! | images of odd kinds (16 bits, CMYK, animated, EXIF) | `input/`, against Pillow; odd shapes through the engine: `images` |
//! | a prompt longer than the context | `images`; `engine.rs` |
//! | a run file with a misspelt key, or a bad value | `runs`; `src/train/config_file.rs` |
//! | a full disk | `runs` (a run's checkpoint, `init`); `model_io.rs`, `src/train/checkpoint.rs` (each write) |
//! | sampling settings, engine budgets, handles | `requests`; `engine.rs` |
//! | weights that give no distribution | `engine.rs` |

mod images;
mod model;
#[path = "../pictures/mod.rs"]
mod pictures;
mod requests;
mod runs;
#[path = "../tiny/mod.rs"]
mod tiny;

use serde_json::{Value, json};
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};
use tempfile::TempDir;
use tiny::kv_bytes;
use varft::Error;
use varft::device::Device;
use varft::engine::EngineOptions;
use varft::model::{LoadOptions, Model};

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
