//! Where tests find the repository, the program, and a card.
//!
//! They are where cargo built them, and elsewhere where these variables of its own say, for tests that run on another machine than
//! the one that built them: `CARGO_MANIFEST_DIR` and `CARGO_BIN_EXE_varft`.

#![allow(dead_code)] // a file of tests takes what it needs of it

use std::env;
use std::path::PathBuf;
use varft::device::Device;

/// The repository's folder.
pub fn repository() -> PathBuf {
    env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from)
}

/// The binary.
pub fn program() -> PathBuf {
    env::var_os("CARGO_BIN_EXE_varft").map_or_else(|| env!("CARGO_BIN_EXE_varft").into(), PathBuf::from)
}

/// Whether tests that run on several kinds of GPU run on the emulated one too: not where `VARFT_TEST_DEVICE` is `cuda`.
pub fn emulates() -> bool {
    let emulates = env::var_os("VARFT_TEST_DEVICE").is_none_or(|only| only != "cuda");
    if !emulates {
        println!("not on the emulated device: VARFT_TEST_DEVICE is cuda");
    }
    emulates
}

/// A card, where there is one. Where `VARFT_TEST_DEVICE` is `cuda` there must be.
pub fn card() -> Option<Device> {
    match Device::cuda(0) {
        Ok(card) => Some(card),
        Err(e) if emulates() => {
            println!("no card: {e}");
            None
        }
        Err(e) => panic!("no card: {e}"),
    }
}
