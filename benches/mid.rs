//! The whole model at the shape of preset `mid`, in f32: rollouts, vision, training.
//!
//! ```text
//! cargo bench --bench mid                     # every case: work, limit, time, distance to the limit
//! cargo bench --bench mid -- --only decode:8  # one of them
//! cargo bench --bench mid -- --worker         # cases from stdin, for benches/peers/peers.py
//! ```
//!
//! | case | what is timed |
//! |---|---|
//! | `decode B` | B prompts of 300 tokens with an image of 280 x 280 each, 128 new tokens, greedy: the tokens after the first, that is the whole minus a run of one new token |
//! | `prompt B` | the same prompts and one new token, images included |
//! | `vision B` | the vision tower on B such images |
//! | `train 4` | forward and backward pass of 4 sequences of 512 tokens with an image each, vision tower included |
//! | `grpo 8` | one update (forward, backward, clipping, AdamW): 8 completions of 128 tokens on one prompt with an image |
//! | `text-decode B`, `text-prompt B` | without images, as llama.cpp has them |
//!
//! No run finds anything of another in a cache: every one has its own random tokens and pixels.

mod harness;
mod limits;

use harness::{Mode, ROUNDS};
use limits::{Probe, Rates, median, seconds};
use serde_json::json;
use std::sync::Arc;
use varft::Result;
use varft::device::{Buffer, DType, Device};
use varft::engine::{Engine, EngineOptions, Request, Sampling};
use varft::input::{Image, Prompt};
use varft::model::train::Group;
use varft::model::{Config, LayerShape, LoadOptions, Model, Preset, VisionWorkspace};
use varft::train::batch::{Entry, MicroBatch};
use varft::train::config::Optim;
use varft::train::learner::{Goal, Learner};

const PROMPT: usize = 300;
const NEW: usize = 128;
const SIDE: usize = 280;
const IMAGE_AT: usize = 21;
const IMAGE_TOKENS: usize = (SIDE / 28) * (SIDE / 28);
const PATCHES: usize = 4 * IMAGE_TOKENS;
/// Sequences of the training case, and their length.
const SEQUENCES: usize = 4;
const SEQUENCE: usize = 512;
const MOST_IMAGES: usize = 32;
/// Ids of text; those above are special.
const TEXT_IDS: u64 = 8000;

const CASES: [(&str, usize); 9] = [
    ("decode", 1),
    ("decode", 8),
    ("decode", 32),
    ("prompt", 1),
    ("prompt", 8),
    ("vision", 1),
    ("vision", 8),
    ("train", SEQUENCES),
    ("grpo", 8),
];

/// Everything that a case may need, and random numbers.
struct Bench {
    config: Config,
    model: Arc<Model>,
    engine: Engine,
    vision: VisionWorkspace,
    vision_out: Buffer,
    learner: Option<Learner>,
    device: Device,
    state: u64,
}

impl Bench {
    fn new() -> Result<Bench> {
        let device = harness::device();
        let config = Preset::Mid.config();
        let model = Arc::new(Model::random(config.clone(), 0, &device, &LoadOptions::default())?);
        let options = EngineOptions { kv_bytes: 256 << 20, vision_bytes: 16 << 20, ..Default::default() };
        Ok(Bench {
            engine: Engine::start(model.clone(), options)?,
            vision: VisionWorkspace::new(&config, &device, MOST_IMAGES * PATCHES),
            vision_out: device.alloc(DType::F32, MOST_IMAGES * IMAGE_TOKENS * config.hidden_size),
            learner: None,
            state: 1,
            config,
            model,
            device,
        })
    }

    /// splitmix64.
    fn random(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    fn text(&mut self, tokens: usize) -> Prompt {
        Prompt::from_tokens((0..tokens).map(|_| (self.random() % TEXT_IDS) as u32).collect())
    }

    fn image(&mut self) -> Result<Arc<Image>> {
        let pixels = (0..SIDE * SIDE * 3).map(|_| self.random() as u8).collect();
        Ok(Arc::new(Image::from_resized(pixels, SIDE, SIDE, 14, (SIDE, SIDE))?))
    }

    /// `tokens` tokens, an image among them.
    fn prompt(&mut self, tokens: usize) -> Result<Prompt> {
        let mut p = self.text(IMAGE_AT - 1);
        p.tokens.push(self.config.tokens.vision_start);
        p.push_image(self.image()?, self.config.tokens.image);
        p.tokens.push(self.config.tokens.vision_end);
        p.append(&self.text(tokens - p.len()));
        Ok(p)
    }

    /// Seconds of one run of a case.
    fn run(&mut self, case: &str, batch: usize) -> Result<f64> {
        match case {
            "decode" | "text-decode" => {
                let first = self.generate(case == "decode", batch, 1)?;
                Ok(self.generate(case == "decode", batch, NEW)? - first)
            }
            "prompt" | "text-prompt" => self.generate(case == "prompt", batch, 1),
            "vision" => self.encode(batch),
            "train" => self.train(),
            "grpo" => self.grpo(batch),
            _ => Err(varft::Error::input(format!("no case is called {case:?}"), "see the top of benches/mid.rs")),
        }
    }

    fn generate(&mut self, images: bool, batch: usize, new: usize) -> Result<f64> {
        let prompts = (0..batch)
            .map(|_| if images { self.prompt(PROMPT) } else { Ok(self.text(PROMPT)) })
            .collect::<Result<Vec<_>>>()?;
        timed(|| {
            let sampling = Sampling::greedy(new);
            let request = |prompt| Request { prompt, sampling: sampling.clone(), n: 1 };
            let all = prompts.into_iter().map(|p| self.engine.generate(request(p))).collect::<Result<Vec<_>>>()?;
            all.into_iter().flatten().try_for_each(|g| g.wait().map(drop))
        })
    }

    fn encode(&mut self, batch: usize) -> Result<f64> {
        let images = (0..batch).map(|_| self.image()).collect::<Result<Vec<_>>>()?;
        let images: Vec<&Image> = images.iter().map(|i| &**i).collect();
        let s = self.device.stream();
        timed(|| {
            self.model.encode_images(&s, &images, &mut self.vision, &self.vision_out)?;
            s.synchronize()
        })
    }

    /// The learner has its own weights: the engine must not see them move.
    fn learner(&mut self) -> Result<Learner> {
        match self.learner.take() {
            Some(learner) => Ok(learner),
            None => {
                let model = Model::random(self.config.clone(), 0, &self.device, &LoadOptions::default())?;
                Ok(Learner::new(Arc::new(model), &Optim::default(), self.engine.forbidden()))
            }
        }
    }

    fn train(&mut self) -> Result<f64> {
        let mut learner = self.learner()?;
        let mut batch = MicroBatch::default();
        for group in 0..SEQUENCES {
            let whole = self.prompt(SEQUENCE)?;
            // A group is a prompt, here the first token, and what is trained, here every token of text.
            let mut rest = whole.clone();
            rest.tokens.remove(0);
            rest.images[0].offset -= 1;
            for (index, &target) in rest.tokens.iter().enumerate().filter(|(_, t)| u64::from(**t) < TEXT_IDS) {
                batch.entries.push(entry(group, 0, index, target));
            }
            batch.groups.push(Group { prompt: Prompt::from_tokens(vec![whole.tokens[0]]), completions: vec![rest] });
        }
        let micros = [batch];
        let seconds = timed(|| learner.gradients(&micros, Goal::Nll, None).map(drop));
        self.learner = Some(learner);
        seconds
    }

    fn grpo(&mut self, completions: usize) -> Result<f64> {
        let mut learner = self.learner()?;
        let prompt = self.prompt(PROMPT)?;
        let mut batch = MicroBatch::default();
        let completions: Vec<Prompt> = (0..completions).map(|_| self.text(NEW)).collect();
        for (i, completion) in completions.iter().enumerate() {
            let advantage = 2.0 * i as f32 / (completions.len() - 1).max(1) as f32 - 1.0;
            for (index, &target) in completion.tokens.iter().enumerate() {
                batch.entries.push(Entry { advantage, ..entry(0, i, index, target) });
            }
        }
        batch.groups.push(Group { prompt, completions });
        let mut micros = [batch];
        // What was sampled had these log-probabilities: the first update of a batch, where every ratio is 1.
        let old = varft::train::learner::logprobs(learner.model(), &micros, self.engine.forbidden())?;
        micros[0].entries.iter_mut().zip(old).for_each(|(e, old)| e.old_logp = old);
        let goal = Goal::Grpo { clip_low: 0.2, clip_high: 0.28, beta: 0.0 };
        let seconds = timed(|| learner.update(&micros, goal, None, 1e-6).map(drop));
        self.learner = Some(learner);
        seconds
    }
}

fn entry(group: usize, completion: usize, index: usize, target: u32) -> Entry {
    Entry { group, completion, index, target, temperature: 1.0, old_logp: 0.0, advantage: 0.0, weight: 1e-3 }
}

fn timed(f: impl FnOnce() -> Result<()>) -> Result<f64> {
    let mut result = Ok(());
    let time = seconds(|| result = f());
    result.map(|()| time)
}

/// What a case cannot do without.
struct Work {
    flops: f64,
    /// From memory: what no cache holds from step to step.
    bytes: f64,
    /// What its rate counts.
    items: f64,
    unit: &'static str,
}

impl Work {
    fn of(c: &Config, case: &str, batch: usize) -> Work {
        let b = batch as f64;
        let (text, vision) = (c.layer_shape(), c.vision.layer_shape());
        let layers = c.layers as f64;
        let head = (c.vocab_size * c.hidden_size) as f64;
        let decoder = layers * products(&text);
        let pair = 4.0 * layers * text.q_width() as f64;
        let causal = |from: usize, to: usize| (from + 1..=to).sum::<usize>() as f64;
        // Windows of 8 x 8 patches.
        let side = SIDE / 14;
        let strips = (0..side).step_by(8).map(|at| 8.min(side - at) as f64);
        let in_windows = strips.map(|s| s * s).sum::<f64>().powi(2);
        let full = c.vision.full_attention_blocks.len() as f64;
        let vision_pairs = full * (PATCHES * PATCHES) as f64 + (c.vision.depth as f64 - full) * in_windows;
        let merged = (4 * c.vision.hidden_size) as f64;
        let image = 2.0 * PATCHES as f64 * (c.vision.depth as f64 * products(&vision) + 1176.0 * vision.hidden as f64)
            + 2.0 * IMAGE_TOKENS as f64 * (merged * merged + merged * c.hidden_size as f64)
            + 4.0 * vision_pairs * vision.q_width() as f64;
        let prompt = |tokens: usize| 2.0 * tokens as f64 * decoder + pair * causal(0, tokens);
        match case {
            "decode" => {
                let steps = (NEW - 1) as f64;
                let context = causal(PROMPT, PROMPT + NEW - 1);
                let kv = 4.0 * 2.0 * layers * text.kv_width() as f64;
                Work {
                    flops: b * (2.0 * steps * (decoder + head) + pair * context),
                    bytes: 4.0 * steps * (decoder + head) + b * kv * context,
                    items: b * steps,
                    unit: "tokens",
                }
            }
            "prompt" => {
                let flops = b * (prompt(PROMPT) + image + 2.0 * head);
                Work { flops, bytes: 0.0, items: b * PROMPT as f64, unit: "tokens" }
            }
            "vision" => Work { flops: b * image, bytes: 0.0, items: b, unit: "images" },
            // Every product has two more of its size in the backward pass; attention, which computes its scores a
            // second time, two and a half.
            "train" => {
                let scored = (SEQUENCE - IMAGE_TOKENS - 2) as f64;
                let flops = 3.0 * b * (prompt(SEQUENCE) + image + 2.0 * scored * head);
                Work { flops, bytes: 0.0, items: b * SEQUENCE as f64, unit: "tokens" }
            }
            _ => {
                let rows = 2.0 * b * NEW as f64;
                let completions = rows * (decoder + head) + b * pair * causal(PROMPT, PROMPT + NEW);
                // AdamW reads weights, gradients and two moments and writes all but the gradients; the gradients are
                // zeroed, summed into, and read once more for their norm.
                let parameters = decoder + 2.0 * head + c.vision.depth as f64 * products(&vision);
                Work {
                    flops: 3.0 * (prompt(PROMPT) + image + completions),
                    bytes: 4.0 * parameters * (7.0 + 3.0),
                    items: b * NEW as f64,
                    unit: "tokens",
                }
            }
        }
    }
}

/// Weights of a layer's four products.
fn products(s: &LayerShape) -> f64 {
    (s.hidden * s.qkv_width() + s.q_width() * s.hidden + 3 * s.hidden * s.intermediate) as f64
}

/// Runs each case and the machine's limits by turns, and prints the medians.
fn table(bench: &mut Bench, only: Option<&str>) -> Result<()> {
    let mut probe = Probe::new(&bench.device);
    println!("| case | GFLOP | GB | GFLOP/s peak | GB/s peak | limit s | ours s | of the limit | rate |");
    println!("|---|---|---|---|---|---|---|---|---|");
    for (case, batch) in CASES {
        let name = format!("{case} {batch}");
        if only.is_some_and(|only| only.replace(':', " ") != name) {
            continue;
        }
        let (mut times, mut rates) = (Vec::new(), Vec::new());
        bench.run(case, batch)?;
        for _ in 0..ROUNDS {
            rates.push(probe.rates());
            times.push(bench.run(case, batch)?);
        }
        let (time, Rates { flops: peak, reads: rate, .. }) = (median(times), Rates::median(&rates));
        let w = Work::of(&bench.config, case, batch);
        // A step of decoding computes while it reads; an update's optimizer follows its products.
        let (arithmetic, memory) = (w.flops / peak, w.bytes / rate);
        let limit = if case == "grpo" { arithmetic + memory } else { arithmetic.max(memory) };
        println!(
            "| {name} | {:.1} | {:.2} | {:.0} | {:.1} | {limit:.4} | {time:.4} | {:.0}% | {:.1} {}/s |",
            w.flops / 1e9,
            w.bytes / 1e9,
            peak / 1e9,
            rate / 1e9,
            100.0 * limit / time,
            w.items / time,
            w.unit
        );
    }
    Ok(())
}

fn main() -> Result<()> {
    let mode = Mode::of_arguments();
    if matches!(mode, Mode::Test) {
        return Ok(());
    }
    let mut bench = Bench::new()?;
    match mode {
        Mode::Table(only) => table(&mut bench, only.as_deref()),
        _ => harness::worker(json!({ "ready": true, "threads": bench.device.threads() }), |case, size| {
            let batch = size.parse().unwrap_or(1);
            Ok(json!({ "case": case, "batch": batch, "seconds": bench.run(case, batch)? }))
        }),
    }
}
