//! The whole model on any device, beside what the device can do: rollouts, vision, training.
//!
//! ```text
//! cargo bench --bench steps                              # criterion's statistics, and each case's distance to its limit
//! cargo bench --bench steps -- decode                    # those whose name has this in it
//! VARFT_BENCH_DEVICE=emulated cargo bench --bench steps  # on cpu, cuda or emulated; without it on a card where there is one
//! cargo bench --bench steps -- --worker                  # cases from stdin, for benches/peers
//! ```
//!
//! | case | what is timed |
//! |---|---|
//! | `decode B` | B prompts with an image each, greedy: the tokens after the first few, that is the whole minus a shorter run |
//! | `prompt B` | the same prompts and one new token, images included |
//! | `vision B` | the vision tower on B such images |
//! | `train B` | forward and backward pass of B sequences with an image each, vision tower included |
//! | `grpo B` | one update (forward, backward, clipping, AdamW): B completions on one prompt with an image |
//! | `text-decode B`, `text-prompt B` | without images, as llama.cpp has them |
//!
//! On the host's cores the model is preset `mid`, on a card Qwen2.5-VL-7B for rollouts and 3B for training (its vision tower
//! frozen), on the emulated device `tiny`; weights are random. [`Sizes`] has lengths. No run finds anything of another in a cache:
//! every one has its own random tokens and pixels.

mod harness;
mod limits;

use criterion::{BenchmarkId, Criterion, Throughput};
use harness::{Mode, Place};
use limits::{Limits, Rates, median};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use varft::Result;
use varft::device::{Buffer, Device};
use varft::engine::{Engine, EngineOptions, Request, Sampling, placeholders};
use varft::input::{Image, Prompt};
use varft::model::train::Group;
use varft::model::{Config, LayerShape, LoadOptions, Model, Preset, VisionWorkspace};
use varft::train::batch::{Entry, MicroBatch};
use varft::train::config::Optim;
use varft::train::learner::{Goal, Learner};

const SAMPLES: usize = 10;
/// Tokens of a prompt before its image.
const IMAGE_AT: usize = 20;

/// What runs on a kind of device. Lengths in tokens.
#[derive(Clone, Copy)]
struct Sizes {
    /// Of rollouts, and of training.
    presets: [Preset; 2],
    freeze_vision: bool,
    prompt: usize,
    /// New tokens, and those of the shorter run: until then all prompts are through.
    new: [usize; 2],
    /// Pixels of an image's side.
    side: usize,
    /// Of a sequence of `train`, and of a completion of `grpo`.
    train: [usize; 2],
    most_images: usize,
    kv_bytes: usize,
    step_tokens: usize,
    cases: &'static [(&'static str, usize)],
}

impl Sizes {
    fn of(device: &Device) -> Sizes {
        match Place::of(device) {
            Place::Cpu => Sizes {
                presets: [Preset::Mid; 2],
                freeze_vision: false,
                prompt: 300,
                new: [128, 1],
                side: 280,
                train: [512, 128],
                most_images: 32,
                kv_bytes: 256 << 20,
                step_tokens: 512,
                cases: &[
                    ("decode", 1),
                    ("decode", 8),
                    ("decode", 32),
                    ("prompt", 1),
                    ("prompt", 8),
                    ("vision", 1),
                    ("vision", 8),
                    ("train", 4),
                    ("grpo", 8),
                ],
            },
            Place::Cuda => Sizes {
                presets: [Preset::B7, Preset::B3],
                freeze_vision: true,
                prompt: 512,
                new: [128, 32],
                side: 280,
                train: [1024, 1024],
                most_images: 64,
                kv_bytes: 8 << 30,
                step_tokens: 4096,
                cases: &[("decode", 64), ("decode", 1), ("prompt", 64), ("vision", 64), ("train", 8), ("grpo", 8)],
            },
            Place::Emulated => Sizes {
                presets: [Preset::Tiny; 2],
                freeze_vision: false,
                prompt: 32,
                new: [3, 1],
                side: 56,
                train: [32, 6],
                most_images: 2,
                kv_bytes: 8 << 20,
                step_tokens: 512,
                cases: &[("decode", 2), ("vision", 1), ("train", 1), ("grpo", 2)],
            },
        }
    }

    fn image_tokens(&self) -> usize {
        (self.side / 28).pow(2)
    }

    fn patches(&self) -> usize {
        4 * self.image_tokens()
    }

    /// Which model a case runs.
    fn preset(&self, case: &str) -> Preset {
        self.presets[usize::from(trains(case))]
    }
}

fn trains(case: &str) -> bool {
    matches!(case, "train" | "grpo")
}

/// A model with what rolls it out or trains it. A card holds one of them.
enum Held {
    Rollouts { model: Arc<Model>, engine: Engine, vision: Box<VisionWorkspace>, vision_out: Buffer },
    Training(Box<Learner>),
}

/// The device, what it holds, and random numbers.
struct Bench {
    device: Device,
    sizes: Sizes,
    held: Option<Held>,
    state: u64,
}

impl Bench {
    fn new(device: Device) -> Bench {
        Bench { sizes: Sizes::of(&device), device, held: None, state: 1 }
    }

    /// Takes what a case runs on; made, if it is not there, once what was there is gone.
    fn take(&mut self, case: &str) -> Result<Held> {
        match (self.held.take(), trains(case)) {
            (Some(held @ Held::Training(_)), true) | (Some(held @ Held::Rollouts { .. }), false) => Ok(held),
            (_, true) => self.training(),
            (_, false) => self.rollouts(),
        }
    }

    fn model(&self, preset: Preset) -> Result<Arc<Model>> {
        let options = LoadOptions { freeze_vision: self.sizes.freeze_vision, ..LoadOptions::default() };
        Ok(Arc::new(Model::random(preset.config(), 0, &self.device, &options)?))
    }

    fn rollouts(&self) -> Result<Held> {
        let (sizes, device) = (&self.sizes, &self.device);
        let model = self.model(sizes.presets[0])?;
        let (c, patches) = (model.config.clone(), sizes.most_images * sizes.patches());
        let (kv_bytes, step_tokens) = (sizes.kv_bytes, sizes.step_tokens);
        let vision_bytes = EngineOptions::vision_bytes_for(&c, device.float(), patches).max(16 << 20);
        let options = EngineOptions { kv_bytes, vision_bytes, step_tokens, ..Default::default() };
        Ok(Held::Rollouts {
            engine: Engine::start(model.clone(), options)?,
            vision: VisionWorkspace::new(&c, device, patches).into(),
            vision_out: device.alloc(device.float(), patches / 4 * c.hidden_size),
            model,
        })
    }

    fn training(&self) -> Result<Held> {
        let model = self.model(self.sizes.presets[1])?;
        let mut options = Optim::default();
        if Place::of(&self.device) == Place::Cuda {
            // Half of what gradients, masters and moments leave.
            let free = self.device.available_bytes().unwrap_or(0) as usize;
            options.activations_mib = free.saturating_sub(16 * model.params.trainable().len()) >> 21;
        }
        let forbidden = placeholders(&model.config, None);
        Ok(Held::Training(Learner::new(model, &options, &forbidden)?.into()))
    }

    /// splitmix64.
    fn random(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// Of ids below the special ones.
    fn text(&mut self, c: &Config, tokens: usize) -> Prompt {
        Prompt::from_tokens((0..tokens).map(|_| (self.random() % text_ids(c)) as u32).collect())
    }

    fn image(&mut self) -> Result<Arc<Image>> {
        let side = self.sizes.side;
        let pixels = (0..side * side * 3).map(|_| self.random() as u8).collect();
        Ok(Arc::new(Image::from_resized(pixels, side, side, 14, (side, side))?))
    }

    /// `tokens` tokens, an image among them.
    fn prompt(&mut self, c: &Config, tokens: usize) -> Result<Prompt> {
        let mut p = self.text(c, IMAGE_AT);
        p.tokens.push(c.tokens.vision_start);
        p.push_image(self.image()?, c.tokens.image);
        p.tokens.push(c.tokens.vision_end);
        let rest = self.text(c, tokens - p.len());
        p.append(&rest);
        Ok(p)
    }

    /// Seconds of one run of a case.
    fn run(&mut self, case: &str, batch: usize) -> Result<f64> {
        let mut held = self.take(case)?;
        let [new, first] = self.sizes.new;
        let seconds = match (&mut held, case) {
            (Held::Rollouts { engine, .. }, "decode" | "text-decode") => {
                let short = self.generate(engine, case == "decode", batch, first)?;
                self.generate(engine, case == "decode", batch, new).map(|whole| whole - short)
            }
            (Held::Rollouts { engine, .. }, "prompt" | "text-prompt") => {
                self.generate(engine, case == "prompt", batch, 1)
            }
            (Held::Rollouts { model, vision, vision_out, .. }, "vision") => {
                self.encode(model, vision, vision_out, batch)
            }
            (Held::Training(learner), "train") => self.train(learner, batch),
            (Held::Training(learner), "grpo") => self.grpo(learner, batch),
            _ => Err(varft::Error::input(format!("no case is called {case:?}"), "see the top of benches/steps.rs")),
        };
        self.held = Some(held);
        seconds
    }

    fn generate(&mut self, engine: &Engine, images: bool, batch: usize, new: usize) -> Result<f64> {
        let (c, tokens) = (self.sizes.presets[0].config(), self.sizes.prompt);
        let prompts = (0..batch)
            .map(|_| if images { self.prompt(&c, tokens) } else { Ok(self.text(&c, tokens)) })
            .collect::<Result<Vec<_>>>()?;
        timed(|| {
            let sampling = Sampling::greedy(new);
            let request = |prompt| Request { prompt, sampling: sampling.clone(), n: 1 };
            let all = prompts.into_iter().map(|p| engine.generate(request(p))).collect::<Result<Vec<_>>>()?;
            all.into_iter().flatten().try_for_each(|g| g.wait().map(drop))
        })
    }

    fn encode(&mut self, model: &Model, vision: &mut VisionWorkspace, out: &Buffer, batch: usize) -> Result<f64> {
        let images = (0..batch).map(|_| self.image()).collect::<Result<Vec<_>>>()?;
        let images: Vec<&Image> = images.iter().map(|i| &**i).collect();
        let s = self.device.stream();
        timed(|| {
            model.encode_images(&s, &images, vision, out)?;
            s.synchronize()
        })
    }

    fn train(&mut self, learner: &mut Learner, sequences: usize) -> Result<f64> {
        let c = learner.model().config.clone();
        let mut batch = MicroBatch::default();
        for group in 0..sequences {
            let whole = self.prompt(&c, self.sizes.train[0])?;
            // A group is a prompt, here the first token, and what is trained, here every token of text.
            let mut rest = whole.clone();
            rest.tokens.remove(0);
            rest.images[0].offset -= 1;
            for (index, &target) in rest.tokens.iter().enumerate().filter(|(_, t)| u64::from(**t) < text_ids(&c)) {
                batch.entries.push(entry(group, 0, index, target));
            }
            batch.groups.push(Group { prompt: Prompt::from_tokens(vec![whole.tokens[0]]), completions: vec![rest] });
        }
        let micros = [batch];
        timed(|| learner.gradients(&micros, Goal::Nll, None).and_then(|_| learner.stream().synchronize()))
    }

    fn grpo(&mut self, learner: &mut Learner, completions: usize) -> Result<f64> {
        let c = learner.model().config.clone();
        let prompt = self.prompt(&c, self.sizes.prompt)?;
        let mut batch = MicroBatch::default();
        let completions: Vec<Prompt> = (0..completions).map(|_| self.text(&c, self.sizes.train[1])).collect();
        for (i, completion) in completions.iter().enumerate() {
            let advantage = 2.0 * i as f32 / (completions.len() - 1).max(1) as f32 - 1.0;
            for (index, &target) in completion.tokens.iter().enumerate() {
                batch.entries.push(Entry { advantage, ..entry(0, i, index, target) });
            }
        }
        batch.groups.push(Group { prompt, completions });
        let mut micros = [batch];
        // What was sampled had these log-probabilities: the first update of a batch, where every ratio is 1.
        let old = varft::train::learner::logprobs(learner.model(), &micros, &placeholders(&c, None))?;
        micros[0].entries.iter_mut().zip(old).for_each(|(e, old)| e.old_logp = old);
        let goal = Goal::Grpo { clip_low: 0.2, clip_high: 0.28, beta: 0.0 };
        timed(|| learner.update(&micros, goal, None, 1e-6).and_then(|_| learner.stream().synchronize()))
    }
}

/// Ids of text end where the special ones begin.
fn text_ids(c: &Config) -> u64 {
    u64::from(c.tokens.bos.unwrap_or(c.tokens.vision_start))
}

fn entry(group: usize, completion: usize, index: usize, target: u32) -> Entry {
    Entry { group, completion, index, target, temperature: 1.0, old_logp: 0.0, advantage: 0.0, weight: 1e-3 }
}

fn timed(f: impl FnOnce() -> Result<()>) -> Result<f64> {
    let begun = std::time::Instant::now();
    f()?;
    Ok(begun.elapsed().as_secs_f64())
}

/// What a case cannot do without.
struct Work {
    flops: f64,
    /// From memory: what no cache holds from step to step.
    bytes: f64,
    /// Whether the bytes come after the operations, and not beside them.
    after: bool,
    /// What its rate counts.
    items: f64,
    unit: &'static str,
}

impl Work {
    /// `float`: bytes of a weight.
    fn of(sizes: &Sizes, case: &str, batch: usize, float: usize) -> Work {
        let c = &sizes.preset(case).config();
        let (b, float) = (batch as f64, float as f64);
        let (text, vision) = (c.layer_shape(), c.vision.layer_shape());
        let layers = c.layers as f64;
        let head = (c.vocab_size * c.hidden_size) as f64;
        let decoder = layers * products(&text);
        let pair = 4.0 * layers * text.q_width() as f64;
        let causal = |from: usize, to: usize| (from + 1..=to).sum::<usize>() as f64;
        // Windows of 8 x 8 patches.
        let (side, patches, image_tokens) = (sizes.side / 14, sizes.patches(), sizes.image_tokens());
        let strips = (0..side).step_by(8).map(|at| 8.min(side - at) as f64);
        let in_windows = strips.map(|s| s * s).sum::<f64>().powi(2);
        let full = c.vision.full_attention_blocks.len() as f64;
        let vision_pairs = full * (patches * patches) as f64 + (c.vision.depth as f64 - full) * in_windows;
        let merged = (4 * c.vision.hidden_size) as f64;
        let image = 2.0 * patches as f64 * (c.vision.depth as f64 * products(&vision) + 1176.0 * vision.hidden as f64)
            + 2.0 * image_tokens as f64 * (merged * merged + merged * c.hidden_size as f64)
            + 4.0 * vision_pairs * vision.q_width() as f64;
        let prompt = |tokens: usize| 2.0 * tokens as f64 * decoder + pair * causal(0, tokens);
        // Every product has two more of its size in the backward pass; attention, which computes its scores a second
        // time, two and a half.
        let trained_image = if sizes.freeze_vision { image } else { 3.0 * image };
        match case {
            "decode" | "text-decode" => {
                let [new, first] = sizes.new;
                let steps = (new - first) as f64;
                let context = causal(sizes.prompt + first - 1, sizes.prompt + new - 1);
                let kv = float * 2.0 * layers * text.kv_width() as f64;
                Work {
                    flops: b * (2.0 * steps * (decoder + head) + pair * context),
                    bytes: float * steps * (decoder + head) + b * kv * context,
                    after: false,
                    items: b * steps,
                    unit: "tokens",
                }
            }
            "prompt" | "text-prompt" => {
                let image = if case == "prompt" { image } else { 0.0 };
                let flops = b * (prompt(sizes.prompt) + image + 2.0 * head);
                Work { flops, bytes: 0.0, after: false, items: b * sizes.prompt as f64, unit: "tokens" }
            }
            "vision" => Work { flops: b * image, bytes: 0.0, after: false, items: b, unit: "images" },
            "train" => {
                let tokens = sizes.train[0];
                let scored = (tokens - image_tokens - 2) as f64;
                let flops = b * (3.0 * (prompt(tokens) + 2.0 * scored * head) + trained_image);
                Work { flops, bytes: 0.0, after: false, items: b * tokens as f64, unit: "tokens" }
            }
            _ => {
                let tokens = sizes.train[1];
                let rows = b * tokens as f64;
                let completions =
                    2.0 * rows * (decoder + head) + b * pair * causal(sizes.prompt, sizes.prompt + tokens);
                // AdamW reads weights, gradients and two moments and writes all but the gradients, and where weights are
                // bf16 those beside their masters; the gradients are zeroed, summed into, and read once more for their norm.
                let heads = if c.tie_word_embeddings { head } else { 2.0 * head };
                let tower = if sizes.freeze_vision { 0.0 } else { c.vision.depth as f64 * products(&vision) };
                Work {
                    flops: 3.0 * (prompt(sizes.prompt) + completions) + trained_image,
                    bytes: (44.0 - float) * (decoder + heads + tower),
                    after: true,
                    items: rows,
                    unit: "tokens",
                }
            }
        }
    }

    fn limit(&self, r: &Rates) -> f64 {
        let (arithmetic, memory) = (self.flops / r.flops, self.bytes / r.reads);
        if self.after { arithmetic + memory } else { arithmetic.max(memory) }
    }
}

/// Weights of a layer's four products.
fn products(s: &LayerShape) -> f64 {
    (s.hidden * s.qkv_width() + s.q_width() * s.hidden + 3 * s.hidden * s.intermediate) as f64
}

/// Criterion's statistics of a case, then its line.
fn statistics(c: &mut Criterion, bench: &mut Bench, case: &str, batch: usize, limits: &mut Limits) {
    let work = Work::of(&bench.sizes, case, batch, bench.device.float().size());
    let mut group = c.benchmark_group(case);
    group.throughput(Throughput::ElementsAndBytes { elements: work.flops as u64, bytes: work.bytes as u64 });
    let (mut times, mut rates) = (Vec::new(), Vec::new());
    group.bench_function(BenchmarkId::from_parameter(batch), |b| {
        b.iter_custom(|runs| {
            rates.push(limits.rates());
            let one = |_| bench.run(case, batch).expect("the device does its work");
            let seconds: f64 = (0..runs).map(one).sum();
            times.push(seconds / runs as f64);
            Duration::from_secs_f64(seconds)
        });
    });
    group.finish();
    if !times.is_empty() {
        // The first ones were the warm-up.
        let seconds = median(times.split_off(times.len().saturating_sub(SAMPLES)));
        let rates = Rates::median(&rates);
        let limit = work.limit(&rates);
        println!(
            "{case} {batch}: {:.1} GFLOP, {:.2} GB at {rates}: the limit {limit:.4} s; {seconds:.4} s, {:.0}% of the limit, {:.1} {}/s\n",
            work.flops / 1e9,
            work.bytes / 1e9,
            100.0 * limit / seconds,
            work.items / seconds,
            work.unit
        );
    }
}

fn measure(mut bench: Bench) -> Result<()> {
    let mut limits = Limits::measure(&bench.device)?;
    let mut c = Criterion::default()
        .sample_size(SAMPLES)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_secs(1))
        .configure_from_args();
    for (case, batch) in bench.sizes.cases {
        statistics(&mut c, &mut bench, case, *batch, &mut limits);
    }
    c.final_summary();
    Ok(())
}

/// Every case once.
fn test(mut bench: Bench) -> Result<()> {
    for (case, batch) in bench.sizes.cases {
        bench.run(case, *batch)?;
        println!("{case} {batch}: ok");
    }
    Ok(())
}

/// A line `case batch` in; the seconds of one run and those of its limit out.
fn worker(mut bench: Bench) -> Result<()> {
    let mut limits = Limits::measure(&bench.device)?;
    let cases: Vec<_> = bench.sizes.cases.iter().map(|(case, batch)| format!("{case}:{batch}")).collect();
    let ready = json!({
        "ready": true, "device": format!("{:?}", bench.device), "threads": bench.device.threads(), "cases": cases
    });
    harness::worker(ready, |case, size| {
        let batch = size.parse().unwrap_or(1);
        let seconds = bench.run(case, batch)?;
        let (work, rates) = (Work::of(&bench.sizes, case, batch, bench.device.float().size()), limits.rates());
        Ok(json!({
            "case": case, "batch": batch, "seconds": seconds, "limit": work.limit(&rates), "model": bench.sizes.preset(case).to_string(),
            "flops": work.flops, "bytes": work.bytes, "after": work.after,
        }))
    })
}

fn main() -> Result<()> {
    let bench = Bench::new(harness::device()?);
    match Mode::of_arguments() {
        Mode::Test => test(bench),
        Mode::Worker => worker(bench),
        Mode::Measure => measure(bench),
    }
}
