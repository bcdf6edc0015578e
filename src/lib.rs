//! varft fine-tunes Qwen2.5-VL into an agent that uses tools, by GRPO, and runs such agents fast.
//!
//! The crate is a house of rooms; a room imports only rooms above it in this list:
//!
//! | room | what it holds |
//! |---|---|
//! | [`device`] | where memory lives and work is launched |
//! | [`ops`] | one file per operation: mathematics, shapes, forward, backward |
//! | [`input`] | what the model reads: tokenizer, chat template, images to patches |
//! | [`model`] | Qwen2.5-VL: config, weights, vision tower, decoder, positions |
//! | [`engine`] | rollouts: sessions, scheduler, paged KV cache, prefix cache, sampler |
//! | [`tools`] | the `python` tool and its warm process |
//! | [`tasks`] | data sets, scoring (F1, EM) |
//! | [`agent`] | protocols, episodes, trajectories, rewards |
//! | [`report`] | metrics, TensorBoard, the HTML view of a run |
//! | [`train`] | SFT and GRPO, optimizer, schedule, checkpoint |
//! | [`cli`] | the commands of the `varft` binary |

mod error;
mod files;

/// `eprintln!` for a terminal that may be gone: what is said in passing must not end a run.
macro_rules! note {
    ($($what:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($what)*);
    }};
}

pub use error::{Error, Result};

pub mod device;
pub mod ops;

pub mod input;

pub mod model;

pub mod engine;

pub mod tools;

pub mod tasks;

pub mod agent;

pub mod report;

pub mod train;

pub mod cli;
