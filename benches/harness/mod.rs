//! What the benches of the model and of its operations share: how they are called, and how peers talk to them.

#![allow(dead_code)] // a bench takes what it needs of it

use std::io::{BufRead, Write};
use varft::device::Device;
use varft::{Error, Result};

/// The device that `VARFT_BENCH_DEVICE` names: `cpu` (all cores, or `BENCH_THREADS` of them), `cuda` or `emulated`. Without it a
/// card where there is one, and else the cores.
///
/// # Errors
/// What is missing of the device that was asked for.
pub fn device() -> Result<Device> {
    let cores = || Device::cpu(std::env::var("BENCH_THREADS").ok().and_then(|n| n.parse().ok()).unwrap_or(0));
    match std::env::var("VARFT_BENCH_DEVICE").as_deref() {
        Ok("cpu") => Ok(cores()),
        Ok("cuda") => Device::cuda(0),
        Ok("emulated") => Device::emulated(0),
        Ok(other) => Err(Error::input(
            format!("VARFT_BENCH_DEVICE is {other:?}"),
            "set it to cpu, cuda or emulated, or leave it out",
        )),
        Err(_) => Ok(Device::cuda(0).unwrap_or_else(|_| cores())),
    }
}

/// What kind of device it is, and so which shapes it gets.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Place {
    Cpu,
    Cuda,
    Emulated,
}

impl Place {
    pub fn of(device: &Device) -> Place {
        match device.card() {
            Some(_) => Place::Cuda,
            None if device.packs_weights() => Place::Cpu,
            None => Place::Emulated,
        }
    }
}

/// What the command line asks for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Each case once, and no figures: `cargo test --benches`.
    Test,
    /// Cases from stdin, for `benches/peers`.
    Worker,
    /// Criterion's statistics, and a line for each case that sets it beside its limit.
    Measure,
}

impl Mode {
    pub fn of_arguments() -> Mode {
        let given = |name: &str| std::env::args().any(|a| a == name);
        match (given("--worker"), given("--bench") && !given("--test")) {
            (true, _) => Mode::Worker,
            (false, true) => Mode::Measure,
            (false, false) => Mode::Test,
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
