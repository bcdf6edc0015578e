//! Every operation of `benches/work.toml` on any device, beside what the device can do.
//!
//! ```text
//! cargo bench --bench ops                                # criterion's statistics, and each operation's distance to its limit
//! cargo bench --bench ops -- rms_norm                    # those whose name has this in it
//! VARFT_BENCH_DEVICE=emulated cargo bench --bench ops    # on cpu, cuda or emulated; without it on a card where there is one
//! cargo bench --bench ops -- --worker                    # cases from stdin, for benches/peers
//! ```
//!
//! The limit of an operation is its multiply-adds over the rate of a large matrix product (on the host's cores: of independent
//! ones in registers), or its bytes over the rate of copies (on the cores: of plain reads and copies), whichever takes longer.
//! The rates are measured at the start; a worker on the cores measures them in turn with the operations.

mod harness;
mod limits;
mod op_cases;

use criterion::{BenchmarkId, Criterion, Throughput};
use harness::Mode;
use limits::{Limits, Rates, median};
use op_cases::{Case, Cases, Prepared};
use serde_json::json;
use std::time::Duration;
use varft::device::Device;
use varft::{Error, Result};

const SAMPLES: usize = 15;

/// Criterion's statistics of a case, then its line.
fn statistics(c: &mut Criterion, cases: &Cases, case: &Case, rates: &Rates) {
    let mut group = c.benchmark_group(&case.op);
    group.throughput(match (case.work.flops as u64, case.work.bytes() as u64) {
        (0, bytes) => Throughput::Bytes(bytes),
        (flops, bytes) => Throughput::ElementsAndBytes { elements: flops, bytes },
    });
    let mut times = Vec::new();
    group.bench_function(BenchmarkId::from_parameter(&case.shape), |b| {
        // Operands are made only for what the command line has not filtered out.
        let mut ready = cases.prepare(case, false).expect("operands fit the device");
        b.iter_custom(|runs| {
            let seconds = ready.time(runs).expect("the device does its work");
            times.push(seconds / runs as f64);
            Duration::from_secs_f64(seconds)
        });
    });
    group.finish();
    if !times.is_empty() {
        // The first ones were the warm-up.
        let seconds = median(times.split_off(times.len().saturating_sub(SAMPLES)));
        let limit = case.work.limit(rates);
        println!(
            "{} {}: {:.4} ms; the limit {:.4} ms ({}); {:.0}% of the limit\n",
            case.op,
            case.shape,
            1e3 * seconds,
            1e3 * limit,
            case.work.name(rates),
            100.0 * limit / seconds
        );
    }
}

fn measure(device: &Device, cases: &Cases) -> Result<()> {
    let rates = Limits::measure(device)?.rates();
    println!("{device:?}: {rates}\n");
    let mut c = Criterion::default()
        .sample_size(SAMPLES)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800))
        .configure_from_args();
    for case in &cases.all {
        statistics(&mut c, cases, case, &rates);
    }
    c.final_summary();
    Ok(())
}

/// Every case once.
fn test(cases: &Cases) -> Result<()> {
    for case in &cases.all {
        cases.prepare(case, true)?.time(1)?;
        println!("{} {}: ok", case.op, case.shape);
    }
    Ok(())
}

/// A line `op shape` in; the seconds of one run and those of its limit out.
fn worker(device: &Device, cases: &Cases) -> Result<()> {
    let mut limits = Limits::measure(device)?;
    let all: Vec<_> = cases.all.iter().map(|c| format!("{}:{}", c.op, c.shape)).collect();
    let Rates { flops, copies, .. } = limits.rates();
    let ready = json!({
        "ready": true, "device": format!("{device:?}"), "threads": device.threads(), "cases": all, "flops": flops, "copies": copies
    });
    let mut held: Option<(String, Prepared)> = None;
    harness::worker(ready, |op, shape| {
        let case = cases.find(op, shape).ok_or_else(|| {
            Error::input(format!("there is no operation {op:?} of shape {shape:?}"), "see benches/work.toml")
        })?;
        let name = format!("{op} {shape}");
        let ready = match held.take().filter(|(is, _)| *is == name) {
            Some(ready) => held.insert(ready),
            // What was held is free by now.
            None => held.insert((name, cases.prepare(case, false)?)),
        };
        let rates = limits.rates();
        Ok(json!({
            "case": op, "shape": shape, "seconds": ready.1.seconds()?, "limit": case.work.limit(&rates),
            "work": case.work.name(&rates), "flops": case.work.flops, "bytes": case.work.bytes(),
        }))
    })
}

fn main() -> Result<()> {
    let device = harness::device()?;
    let cases = Cases::new(&device)?;
    match Mode::of_arguments() {
        Mode::Test => test(&cases),
        Mode::Worker => worker(&device, &cases),
        Mode::Measure => measure(&device, &cases),
    }
}
