//! The packed products beside what the machine can do: multiply-adds per second, and bytes read per second.
//!
//! First a table: each product alternates with the machine's limits, the best of many short runs of each counts, so that
//! the percentages hold on a machine that is doing other things too. Then criterion's statistics of the same products.
//! The shapes are those of preset `mid`: attention output, qkv, gate and up, down, head.

mod limits;

use criterion::{BenchmarkId, Criterion, Throughput};
use limits::seconds;
use std::time::{Duration, Instant};
use varft::device::{Buffer, Device, Pool, Stream};
use varft::ops::linear::{Epilogue, Weight, backward_input, backward_weight, forward, packed_len};

/// `[n, k]`: outputs and inputs.
const MID: [[usize; 2]; 5] = [[512, 512], [768, 512], [2816, 512], [512, 1408], [8192, 512]];
const ROWS: [usize; 5] = [1, 8, 32, 300, 2048];
/// A weight that no cache holds: 256 MiB.
const LARGE: [usize; 2] = [16384, 4096];

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Forward,
    BackwardInput,
    BackwardWeight,
}

struct Case {
    kind: Kind,
    m: usize,
    weight: Weight,
    x: Buffer,
    y: Buffer,
    stream: Stream,
}

impl Case {
    fn new(device: &Device, kind: Kind, m: usize, n: usize, k: usize) -> Case {
        let data =
            |len: usize| device.upload(&(0..len).map(|i| (i * 7919 % 1000) as f32 / 1000.0 - 0.5).collect::<Vec<_>>());
        let weight = Weight { data: data(packed_len(n, k)), n, k };
        Case { kind, m, weight, x: data(m * k), y: data(m * n), stream: device.stream() }
    }

    fn name(&self) -> String {
        let kind = match self.kind {
            Kind::Forward => "forward",
            Kind::BackwardInput => "backward_input",
            Kind::BackwardWeight => "backward_weight",
        };
        format!("{kind} m={} n={} k={}", self.m, self.weight.n, self.weight.k)
    }

    fn run(&self) {
        let Case { m, weight, x, y, stream, .. } = self;
        match self.kind {
            Kind::Forward => forward(stream, x, weight, Epilogue::None, y, *m),
            Kind::BackwardInput => backward_input(stream, y, weight, x, *m, false),
            Kind::BackwardWeight => backward_weight(stream, y, x, &weight.data, *m),
        }
    }

    fn flops(&self) -> f64 {
        2.0 * (self.m * self.weight.n * self.weight.k) as f64
    }

    fn weight_bytes(&self) -> f64 {
        4.0 * (self.weight.n * self.weight.k) as f64
    }
}

fn cases(device: &Device) -> Vec<Case> {
    let forward = |m, [n, k]: [usize; 2]| Case::new(device, Kind::Forward, m, n, k);
    let mut all = vec![forward(1, LARGE), forward(1024, [1024, 1024])];
    all.extend(ROWS.iter().flat_map(|&m| MID.iter().map(move |&shape| forward(m, shape))));
    for kind in [Kind::BackwardInput, Kind::BackwardWeight] {
        all.extend(
            [[1024, 1024, 1024], [300, 2816, 512], [2048, 512, 1408]].map(|[m, n, k]| Case::new(device, kind, m, n, k)),
        );
    }
    all
}

/// Runs each product and the limits by turns, and prints the best of each.
fn table(cases: &[Case], pool: &Pool) {
    println!("{:40} {:>10} {:>8} {:>9} {:>7} {:>9}", "product", "us", "GFLOP/s", "of peak", "GB/s", "of reads");
    for case in cases {
        // SAFETY: nothing writes the weight between the products.
        let weight = unsafe { case.weight.data.get::<f32>() };
        let bandwidth = case.m == 1;
        let [mut time, mut peak, mut reads] = [f64::INFINITY; 3];
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(700) {
            peak = peak.min(seconds(|| limits::arithmetic(pool)));
            if bandwidth {
                for streams in [1, 4] {
                    reads = reads.min(seconds(|| limits::reads(pool, weight, streams)));
                }
            }
            time = time.min(seconds(|| case.run()));
        }
        let peak = limits::arithmetic_flops(pool) as f64 / peak;
        print!(
            "{:40} {:10.1} {:8.1} {:8.1}%",
            case.name(),
            time * 1e6,
            case.flops() / time / 1e9,
            100.0 * case.flops() / time / peak
        );
        if bandwidth {
            print!(" {:7.1} {:8.1}%", case.weight_bytes() / time / 1e9, 100.0 * reads / time);
        }
        println!();
    }
}

fn statistics(c: &mut Criterion, cases: &[Case], pool: &Pool) {
    let mut group = c.benchmark_group("limits");
    group.throughput(Throughput::Elements(limits::arithmetic_flops(pool) as u64));
    group.bench_function("multiply-adds", |b| b.iter(|| limits::arithmetic(pool)));
    // SAFETY: nothing writes this weight meanwhile.
    let weight = unsafe { cases[0].weight.data.get::<f32>() };
    group.throughput(Throughput::Bytes(4 * weight.len() as u64));
    for streams in [1, 4] {
        group.bench_function(BenchmarkId::new("reads", streams), |b| {
            b.iter(|| limits::reads(pool, weight, streams));
        });
    }
    group.finish();
    let mut products = c.benchmark_group("linear");
    for case in cases {
        products.throughput(match case.m {
            1 => Throughput::Bytes(case.weight_bytes() as u64),
            _ => Throughput::Elements(case.flops() as u64),
        });
        products.bench_function(case.name(), |b| b.iter(|| case.run()));
    }
    products.finish();
}

fn main() {
    let device = Device::cpu(0);
    let pool = Pool::new(device.threads());
    let cases = cases(&device);
    // Under `cargo test --benches` criterion runs everything once, and a table of that would say nothing.
    if std::env::args().any(|a| a == "--bench") {
        table(&cases, &pool);
    }
    let mut c = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(1))
        .configure_from_args();
    statistics(&mut c, &cases, &pool);
    c.final_summary();
}
