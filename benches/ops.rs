//! Every operation at the shapes of preset `mid`, in f32, beside what the machine can do.
//!
//! ```text
//! cargo bench --bench ops                          # every operation: work, floor, time, distance to the floor
//! cargo bench --bench ops -- --only rms_norm       # those of one name
//! cargo bench --bench ops -- --worker              # cases from stdin, for benches/peers/ops.py
//! ```
//!
//! The floor of an operation is its multiply-adds over the rate of independent ones in registers, or its bytes over the
//! rate of plain reads and copies, whichever takes longer: `op_cases` says what is counted. The rates are measured in
//! turn with the operation, on the same threads.

mod harness;
mod limits;
mod op_cases;

use harness::{Mode, ROUNDS};
use limits::{Probe, Rates, median};
use op_cases::{Cases, Prepared};
use serde_json::json;
use varft::device::Device;
use varft::{Error, Result};

fn table(device: &Device, cases: &Cases, only: Option<&str>) {
    let mut probe = Probe::new(device);
    println!("| op | shape | work | floor ms | ours ms | of the floor |\n|---|---|---|---|---|---|");
    let mut all_rates = Vec::new();
    for case in cases.all.iter().filter(|c| only.is_none_or(|only| c.op == only)) {
        let mut ready = cases.prepare(case);
        let mut rates = Vec::new();
        let [mut floors, mut times, mut shares] = [const { Vec::new() }; 3];
        for _ in 0..ROUNDS {
            let now = probe.rates();
            let (floor, time) = (case.work.floor(&now), ready.seconds());
            rates.push(now);
            floors.push(floor);
            times.push(time);
            shares.push(floor / time);
        }
        let [floor, time, share] = [floors, times, shares].map(median);
        println!(
            "| {} | {} | {} | {:.3} | {:.3} | {:.0}% |",
            case.op,
            case.shape,
            case.work.name(&Rates::median(&rates)),
            1e3 * floor,
            1e3 * time,
            100.0 * share
        );
        all_rates.extend(rates);
    }
    if !all_rates.is_empty() {
        let Rates { flops, reads, copies } = Rates::median(&all_rates);
        let [flops, reads, copies] = [flops, reads, copies].map(|r| r / 1e9);
        println!("\nMedians: {flops:.0} GFLOP/s, reads {reads:.1} GB/s, copies {copies:.1} GB/s (read and written).");
    }
}

/// A line `op shape` in; the seconds of one run and those of its floor out.
fn worker(device: &Device, cases: &Cases) -> Result<()> {
    let mut probe = Probe::new(device);
    let all: Vec<_> = cases.all.iter().map(|c| format!("{}:{}", c.op, c.shape)).collect();
    let mut ready: Option<(String, Prepared)> = None;
    harness::worker(json!({ "ready": true, "threads": device.threads(), "cases": all }), |op, shape| {
        let case = cases.find(op, shape).ok_or_else(|| {
            Error::input(format!("there is no operation {op:?} of shape {shape:?}"), "see benches/op_cases")
        })?;
        let name = format!("{op} {shape}");
        if ready.as_ref().is_none_or(|(is, _)| *is != name) {
            ready = None; // frees the old operands first
        }
        let (_, prepared) = ready.get_or_insert_with(|| (name, cases.prepare(case)));
        let floor = case.work.floor(&probe.rates());
        Ok(json!({ "case": op, "shape": shape, "floor": floor, "seconds": prepared.seconds() }))
    })
}

fn main() -> Result<()> {
    let mode = Mode::of_arguments();
    if matches!(mode, Mode::Test) {
        return Ok(());
    }
    let device = harness::device();
    let cases = Cases::new(&device)?;
    match mode {
        Mode::Table(only) => table(&device, &cases, only.as_deref()),
        _ => worker(&device, &cases)?,
    }
    Ok(())
}
