//! What the benches of the model and of its operations share: how they are called, and how peers talk to them.

#![allow(dead_code)] // a bench takes what it needs of it

pub mod operands;

use std::io::{BufRead, Write};
use varft::device::Device;
use varft::{Error, Result};

/// Rounds of a table: whatever is compared takes turns, and the medians count.
pub const ROUNDS: usize = 5;

/// The cores, or `BENCH_THREADS` of them.
pub fn device() -> Device {
    Device::cpu(std::env::var("BENCH_THREADS").ok().and_then(|n| n.parse().ok()).unwrap_or(0))
}

/// What the command line asks for.
pub enum Mode {
    /// Nothing: `cargo test --benches` runs benches too, and what they print would say nothing there.
    Test,
    /// Cases from stdin, for `benches/peers`.
    Worker,
    /// A table, of the cases that this names if it is there.
    Table(Option<String>),
}

impl Mode {
    pub fn of_arguments() -> Mode {
        let arguments: Vec<String> = std::env::args().collect();
        let at = |name: &str| arguments.iter().position(|a| a == name);
        match (at("--bench"), at("--worker")) {
            (None, _) => Mode::Test,
            (_, Some(_)) => Mode::Worker,
            _ => Mode::Table(at("--only").and_then(|i| arguments.get(i + 1)).cloned()),
        }
    }
}

/// Says `ready`, then takes a line `case size` and answers a line of JSON, until stdin ends.
pub fn worker(ready: serde_json::Value, mut run: impl FnMut(&str, &str) -> Result<serde_json::Value>) -> Result<()> {
    let answer = |value: serde_json::Value| {
        println!("{value}");
        std::io::stdout().flush().map_err(|e| Error::io("write to", "stdout", e))
    };
    answer(ready)?;
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(|e| Error::io("read from", "stdin", e))?;
        let (case, size) = line.trim().split_once(' ').unwrap_or((line.trim(), ""));
        answer(run(case, size)?)?;
    }
    Ok(())
}
