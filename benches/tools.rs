//! What a call of the `python` tool costs, beside a fresh interpreter that does the same work: `cargo bench --bench tools`.
//!
//! `nothing` is the floor (fork, limits, result); `rotate` is a typical call on a 512 x 512 image that goes in and comes back;
//! `at_once` has two calls in flight, as on two cores. The fresh interpreter imports what the call needs and reads and
//! writes the image as files, as tools without a warm process do.

use std::process::Command;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use image::{Rgb, RgbImage};
use varft::tools::{PythonOptions, PythonTool, Tool, ToolCall};

fn picture() -> Arc<RgbImage> {
    Arc::new(RgbImage::from_fn(512, 512, |x, y| Rgb([(x / 2) as u8, (y / 2) as u8, (x ^ y) as u8])))
}

fn tools(c: &mut Criterion) {
    let tool = match PythonTool::new(PythonOptions { concurrency: 2, ..PythonOptions::default() }) {
        Ok(tool) => tool,
        Err(e) => return eprintln!("nothing measured: {e}"),
    };
    let run = |call: ToolCall| tool.run(call).map(|r| (r.outcome, r.image)).map_err(|e| eprintln!("{e}"));
    let rotate = ToolCall::new("image = cv2.rotate(image, cv2.ROTATE_180)").image(picture());
    let mut group = c.benchmark_group("python_tool");
    group.sample_size(60).throughput(Throughput::Elements(1));
    group.bench_function("nothing", |b| b.iter(|| run(ToolCall::new("pass"))));
    group.bench_function("rotate", |b| b.iter(|| run(rotate.clone())));
    group.throughput(Throughput::Elements(16));
    group.sample_size(20);
    group.bench_function("at_once", |b| {
        b.iter(|| {
            std::thread::scope(|scope| {
                for _ in 0..2 {
                    scope.spawn(|| (0..8).for_each(|_| drop(run(rotate.clone()))));
                }
            })
        })
    });
    group.throughput(Throughput::Elements(1));
    group.sample_size(10);
    let (from, to) =
        (std::env::temp_dir().join("varft-bench-in.png"), std::env::temp_dir().join("varft-bench-out.png"));
    if let Err(e) = picture().save(&from) {
        return eprintln!("the fresh interpreter is not measured: {e}");
    }
    let code = format!("import cv2\ncv2.imwrite({to:?}, cv2.rotate(cv2.imread({from:?}), cv2.ROTATE_180))");
    group.bench_function("rotate_fresh_interpreter", |b| {
        b.iter(|| {
            let status = Command::new(tool.interpreter()).args(["-c", &code]).status();
            (status.map_err(|e| eprintln!("{e}")), image::open(&to).map_err(|e| eprintln!("{e}")))
        })
    });
    group.finish();
    for file in [from, to] {
        let _ = std::fs::remove_file(file);
    }
}

criterion_group!(benches, tools);
criterion_main!(benches);
