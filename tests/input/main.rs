//! What the model reads, against Pillow, transformers and the tokenizer's own cases (fixtures/input/make_fixtures.py).

mod chat;
mod images;
#[path = "../pictures/mod.rs"]
mod pictures;
mod preprocessor;
mod tokenizer;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use varft::input::{Picture, Tokenizer};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/input").join(name)
}

fn read_json<T: serde::de::DeserializeOwned>(name: &str) -> T {
    serde_json::from_slice(&std::fs::read(fixture(name)).unwrap()).unwrap()
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
}

fn tiny_tokenizer() -> Tokenizer {
    Tokenizer::load(fixture("tokenizer_tiny.json")).unwrap()
}

fn mix(i: u64) -> u64 {
    let z = i.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The fixtures' pixels: 0 noise, 1 blocks of black and white, 2 a gradient with some noise.
fn pixels(height: usize, width: usize, seed: u64, kind: u64) -> Vec<u8> {
    (0..height * width * 3)
        .map(|i| {
            let (x, y, n) = ((i / 3 % width) as u64, (i / 3 / width) as u64, mix(i as u64 + (seed << 32)));
            match kind {
                0 => (n >> 56) as u8,
                1 => ((x / 3 + y / 5) % 2 * 255) as u8,
                _ => ((x * 3 + y * 2) % 200 + (n >> 59)) as u8,
            }
        })
        .collect()
}

#[derive(Deserialize)]
struct PictureCase {
    name: String,
    file: String,
    width: usize,
    height: usize,
    rgb: String,
    tolerance: u8,
}

fn picture_cases() -> Vec<PictureCase> {
    read_json("pictures.json")
}

fn picture(height: usize, width: usize, seed: u64) -> Arc<Picture> {
    Arc::new(Picture { pixels: pixels(height, width, seed, 0), height, width })
}
