//! Rollouts: token ids and images in, token ids and log-probabilities out.
//!
//! [`Engine::start`] takes a model and owns one thread, which owns the KV cache, the schedule and a stream of the device.
//! Handles talk to it over channels and may be used from any thread:
//!
//! - [`Engine::generate`]: `n` samples of one prompt, which is computed once;
//! - [`Engine::session`]: a [`Session`] that keeps its keys and values from turn to turn, for agents;
//! - [`Engine::pause`]: holds the engine still while weights change in place.
//!
//! How it works: continuous batching with prompts cut into chunks beside what decodes (Orca, OSDI '22; Sarathi,
//! arXiv 2308.16369), a paged KV cache (vLLM, arXiv 2309.06180) whose full pages are shared by content, images encoded once
//! and kept by content hash, recomputation where memory runs out. Every key of every cache contains the epoch of the weights
//! that it depends on: for images those of the vision tower alone.
//!
//! None of it shows in the results: a sequence's log-probabilities have the same bits alone, in a batch, through the
//! caches, after preemption, and in the trainer, and a seed gives the same tokens whatever else runs.

mod blocks;
mod generation;
mod plan;
mod runner;
mod sampling;
mod scheduler;
mod sequence;
mod session;
#[cfg(test)]
mod simulation;
mod stats;
mod table;
mod vision;
mod worker;

pub use generation::{Canceller, Generation, Sampled};
pub use sampling::{Completion, Finish, Sampling};
pub use session::{Request, Session};
pub use stats::Stats;

use crate::device::DType;
use crate::error::panic_message;
use crate::input::{Prompt, Tokenizer};
use crate::model::{Config, Model, Version};
use crate::ops::kv_cache::{BLOCK, KvCache};
use crate::{Error, Result};
use generation::{Link, Writer};
use runner::Runner;
use scheduler::{Limits, Scheduler};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use worker::{Command, Worker};

/// Most samples of one [`Request`].
const MAX_SAMPLES: usize = 1 << 16;

/// What an engine may use, and what it may say.
#[derive(Clone)]
pub struct EngineOptions {
    /// Bytes for keys and values.
    pub kv_bytes: usize,
    /// Bytes for encoded images.
    pub vision_bytes: usize,
    /// Longest sequence, in tokens. What the model was made for and what `kv_bytes` holds bound it too.
    pub max_context: usize,
    /// Most sequences in one step; others wait.
    pub max_sequences: usize,
    /// Most tokens in one step: those of decoding sequences and chunks of prompts.
    pub step_tokens: usize,
    /// Most image patches (14 x 14 pixels, four to a token) encoded in one step, and so the largest image.
    pub step_patches: usize,
    /// Ids that are never sampled. `None`: the [`placeholders`]. The trainer's softmax must leave out the same ids
    /// ([`Engine::forbidden`]).
    pub forbidden: Option<Vec<u32>>,
    /// For stop strings, and to know the placeholders by name.
    pub tokenizer: Option<Arc<Tokenizer>>,
}

impl Default for EngineOptions {
    /// 1 GiB of keys and values, 256 MiB of images, 16,384 tokens of context, 64 sequences, 512 tokens and 8,192 patches a
    /// step, placeholders forbidden, no tokenizer.
    fn default() -> EngineOptions {
        EngineOptions {
            kv_bytes: 1 << 30,
            vision_bytes: 256 << 20,
            max_context: 16_384,
            max_sequences: 64,
            step_tokens: 512,
            step_patches: 8192,
            forbidden: None,
            tokenizer: None,
        }
    }
}

impl EngineOptions {
    /// The least [`kv_bytes`](Self::kv_bytes) that hold a sequence of `tokens` tokens of a model of shape `config`, on a device
    /// whose [`float`](crate::device::Device::float) is this.
    pub fn kv_bytes_for(config: &Config, float: DType, tokens: usize) -> usize {
        tokens.div_ceil(BLOCK) * page_bytes(config, float)
    }

    /// The least [`vision_bytes`](Self::vision_bytes) that hold an image of `patches` patches, on such a device.
    pub fn vision_bytes_for(config: &Config, float: DType, patches: usize) -> usize {
        patches.div_ceil(4).next_multiple_of(vision::PAGE) * config.hidden_size * float.size()
    }

    /// Bytes that an engine for such a model, on such a device, holds beside [`kv_bytes`](Self::kv_bytes) and
    /// [`vision_bytes`](Self::vision_bytes): what its steps work in, but for the rounding of buffers.
    pub fn step_bytes(&self, config: &Config, float: DType) -> usize {
        // Beyond any machine; sums of what is less stay whole numbers.
        let most = self.step_tokens.max(self.step_patches).max(self.max_sequences);
        if most > 1 << 32 { usize::MAX } else { Runner::step_bytes(config, float, &self.limits(config, float).0) }
    }

    /// What a step may hold, and pages of the KV cache.
    fn limits(&self, config: &Config, float: DType) -> (Limits, usize) {
        let blocks = self.kv_bytes / page_bytes(config, float);
        let limits = Limits {
            block: BLOCK,
            max_len: self.max_context.min(config.max_position_embeddings).min(blocks * BLOCK),
            step_tokens: self.step_tokens,
            step_patches: self.step_patches,
            max_sequences: self.max_sequences,
        };
        (limits, blocks)
    }
}

/// Bytes of a page of keys and values in all layers.
fn page_bytes(config: &Config, float: DType) -> usize {
    KvCache::bytes_per_block(float, config.layers, config.kv_heads, config.head_dim())
}

/// The ids that stand for pictures and mean nothing as text, ascending: what a rollout must not sample, because whoever
/// reads the tokens back would look for an image there.
pub fn placeholders(config: &Config, tokenizer: Option<&Tokenizer>) -> Vec<u32> {
    let t = &config.tokens;
    let mut ids = vec![t.image, t.video, t.vision_start, t.vision_end];
    ids.extend(tokenizer.into_iter().flat_map(|t| t.special().placeholders()));
    ids.retain(|&id| (id as usize) < config.vocab_size);
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// What handles need to know of their engine.
struct Client {
    commands: Sender<Command>,
    link: Arc<Link>,
    ids: AtomicU64,
    image_token: u32,
    vocab_size: usize,
    max_context: usize,
    /// Largest image, in patches, and what bounds it.
    max_patches: (usize, &'static str),
    has_tokenizer: bool,
}

impl Client {
    fn send(&self, command: Command) -> Result<()> {
        self.commands.send(command).map_err(|_| self.link.stopped())
    }

    fn next_id(&self) -> u64 {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }

    /// Whether `prompt` may follow `past` tokens.
    fn check_prompt(&self, prompt: &Prompt, past: usize) -> Result<()> {
        prompt.validate(self.image_token)?;
        if let Some((i, id)) = prompt.tokens.iter().enumerate().find(|&(_, &id)| id as usize >= self.vocab_size) {
            return Err(Error::input(
                format!("token {i} of the prompt is {id}, but the model knows {} ids", self.vocab_size),
                "use the tokenizer that belongs to the model",
            ));
        }
        let (most, option) = self.max_patches;
        if let Some(s) = prompt.images.iter().find(|s| s.image.grid.patches() > most) {
            return Err(Error::limit(
                format!(
                    "an image of {} x {} pixels has {} patches, but this engine takes {most} at most",
                    s.image.width,
                    s.image.height,
                    s.image.grid.patches()
                ),
                format!("resize images to fewer pixels, or raise {option}"),
            ));
        }
        if past + prompt.len() >= self.max_context {
            return Err(self.too_long(past + prompt.len(), 1));
        }
        Ok(())
    }

    fn too_long(&self, tokens: usize, more: usize) -> Error {
        Error::limit(
            format!("{tokens} tokens and {more} to sample do not fit the context of {} tokens", self.max_context),
            "shorten the prompt, or allow a longer context as far as the model does: in a run file rollout.context and \
             rollout.kv_cache_mib, in a program EngineOptions::max_context and kv_bytes",
        )
    }
}

/// A model at work. Dropping it stops its thread; what is then still being sampled ends with an error.
pub struct Engine {
    model: Arc<Model>,
    client: Arc<Client>,
    stats: Arc<Mutex<Stats>>,
    forbidden: Vec<u32>,
    thread: Option<JoinHandle<()>>,
}

impl Engine {
    /// Plans all device memory for `options` and starts the engine's thread.
    ///
    /// # Errors
    /// [`Error::Limit`] if the budgets hold nothing or do not fit the memory, [`Error::Input`] if `forbidden` or the tokenizer
    /// does not fit the vocabulary.
    pub fn start(model: Arc<Model>, options: EngineOptions) -> Result<Engine> {
        let c = &model.config;
        options.tokenizer.as_deref().map_or(Ok(()), |t| c.check_tokenizer(t))?;
        let float = model.device().float();
        let per_block = page_bytes(c, float);
        let (limits, blocks) = options.limits(c, float);
        let step_bytes = options.step_bytes(c, float);
        let max_context = limits.max_len;
        if max_context < 2 || options.max_sequences == 0 || options.step_tokens == 0 {
            return Err(Error::limit(
                format!(
                    "kv_bytes = {} (one page of {BLOCK} tokens takes {per_block}), max_context = {}, max_sequences = {} and \
                     step_tokens = {} leave no room for a single sequence",
                    options.kv_bytes, options.max_context, options.max_sequences, options.step_tokens
                ),
                "raise what is too small: in a run file rollout.kv_cache_mib, context, concurrency or batch_tokens, in a program \
                 EngineOptions",
            ));
        }
        let forbidden = match options.forbidden {
            Some(mut ids) => {
                ids.sort_unstable();
                ids.dedup();
                ids
            }
            None => placeholders(c, options.tokenizer.as_deref()),
        };
        if forbidden.last().is_some_and(|&id| id as usize >= c.vocab_size) || forbidden.len() >= c.vocab_size {
            return Err(Error::input(
                format!("EngineOptions::forbidden does not fit a vocabulary of {} ids", c.vocab_size),
                "forbid ids of this model's vocabulary, and not all of them",
            ));
        }
        // So that no option can ask for what ends the process.
        let needed = [options.kv_bytes, options.vision_bytes, step_bytes];
        let needed = needed.into_iter().fold(0, usize::saturating_add);
        model.device().check_room(
            needed,
            "this engine's caches and buffers",
            "lower rollout.kv_cache_mib, vision_cache_mib, concurrency or batch_tokens, or model.max_pixels, in a run file; in a \
             program EngineOptions::kv_bytes, vision_bytes, max_sequences, step_tokens or step_patches",
        )?;
        let row = c.hidden_size * float.size();
        let vision_rows = options.vision_bytes / row / vision::PAGE * vision::PAGE;
        let in_cache = vision_rows * 4;
        let max_patches = if in_cache < options.step_patches {
            (in_cache, "EngineOptions::vision_bytes (in a run file rollout.vision_cache_mib)")
        } else {
            (options.step_patches, "EngineOptions::step_patches (in a run file model.max_pixels)")
        };
        let has_tokenizer = options.tokenizer.is_some();
        let (commands, inbox) = channel();
        let link = Arc::new(Link::default());
        let client = Arc::new(Client {
            commands,
            link: link.clone(),
            ids: AtomicU64::new(0),
            image_token: c.tokens.image,
            vocab_size: c.vocab_size,
            max_context,
            max_patches,
            has_tokenizer,
        });
        let runner = Runner::new(model.clone(), &limits, blocks, vision_rows, &forbidden);
        let scheduler = Scheduler::new(limits, blocks, vision_rows, options.tokenizer);
        let stats = Arc::new(Mutex::new(Stats::default()));
        let worker = Worker::new(inbox, scheduler, runner, stats.clone(), link.clone());
        model.begin_reading();
        match std::thread::Builder::new().name("varft-engine".into()).spawn(move || run(worker, &link)) {
            Ok(thread) => Ok(Engine { model, client, stats, forbidden, thread: Some(thread) }),
            Err(e) => {
                model.end_reading();
                Err(Error::no_thread("the engine's thread", e))
            }
        }
    }

    /// Submits a request; one handle for each of its samples.
    ///
    /// # Errors
    /// As [`Session::append`] and [`Session::generate`].
    pub fn generate(&self, request: Request) -> Result<Vec<Generation>> {
        let Request { prompt, sampling, n } = request;
        if prompt.is_empty() {
            return Err(Error::input("a request without tokens", "give it a prompt"));
        }
        self.client.check_prompt(&prompt, 0)?;
        sampling.check(self.client.has_tokenizer)?;
        if n > MAX_SAMPLES {
            return Err(Error::limit(
                format!("{n} samples of one prompt, and {MAX_SAMPLES} are the most in a request"),
                "make several requests, each with its own Sampling::stream",
            ));
        }
        let mut samples = Vec::with_capacity(n);
        let mut handles = Vec::with_capacity(n);
        for i in 0..n {
            let (writer, feed) = Writer::new(self.client.link.clone());
            let own = Sampling { stream: sampling.stream.wrapping_add(i as u64), ..sampling.clone() };
            samples.push((self.client.next_id(), Arc::new(own), writer));
            handles.push(Generation { feed, read: 0 });
        }
        self.client.send(Command::Request { samples, prompt })?;
        Ok(handles)
    }

    /// Opens an empty session.
    pub fn session(&self) -> Session {
        Session { client: self.client.clone(), id: self.client.next_id(), history: Prompt::default(), last: None }
    }

    /// Waits until the device is idle and holds the engine still until the guard is dropped. Sessions and turns keep
    /// their tokens and go on afterwards. Requests made meanwhile wait. Only now may the model's weights move:
    /// [`Learner::update`](crate::train::learner::Learner::update) is refused beside an engine that is not paused. If they did
    /// ([`Model::take_weights`]), everything cached is forgotten when the pause ends, and the weight epoch rises; sessions
    /// and turns under way are computed again from their tokens when they next run. Encoded images stay where the vision tower
    /// did not move ([`Model::take_trainable`] of a frozen one).
    ///
    /// # Errors
    /// If the engine has ended.
    pub fn pause(&self) -> Result<Paused<'_>> {
        let (idle, acknowledged) = channel();
        let (hold, release): (Sender<bool>, Receiver<bool>) = channel();
        self.client.send(Command::Pause { idle, release })?;
        acknowledged.recv().map_err(|_| self.client.link.stopped())?;
        Ok(Paused { engine: self, hold, version: self.model.end_reading() })
    }

    /// The engine's figures after its last step.
    pub fn stats(&self) -> Stats {
        *self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The ids that are never sampled, ascending: what the trainer's softmax leaves out.
    pub fn forbidden(&self) -> &[u32] {
        &self.forbidden
    }

    /// Longest sequence, in tokens.
    pub fn max_context(&self) -> usize {
        self.client.max_context
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // A thread that has failed needs no message.
        let _ = self.client.send(Command::Shutdown);
        if let Some(t) = self.thread.take() {
            let _ = t.join();
        }
        self.model.end_reading();
    }
}

/// The body of the engine's thread. A failure is noted before the worker, and with it every waiting handle, is let go.
fn run(mut worker: Worker, link: &Link) {
    let failure = match std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| worker.serve())) {
        Ok(Ok(())) => None,
        Ok(Err(e)) => Some(e.to_string()),
        Err(panic) => Some(panic_message(&*panic).to_owned()),
    };
    if let Some(why) = failure {
        let _ = link.failure.set(why);
    }
}

/// An engine that holds still; dropping it lets the engine go on.
pub struct Paused<'a> {
    engine: &'a Engine,
    hold: Sender<bool>,
    /// Of the weights that the engine's caches belong to.
    version: Version,
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        // Before the engine is let go, so that nobody takes the weights in between.
        let now = self.engine.model.begin_reading();
        if now != self.version {
            // A thread that has failed has no caches.
            let _ = self.hold.send(now.vision != self.version.vision);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::input::{Image, ImageSpan};
    use crate::model::{LoadOptions, Preset};

    #[test]
    fn a_panic_of_the_thread_reaches_every_caller() {
        let model = Model::random(Preset::Tiny.config(), 1, &Device::cpu(1), &LoadOptions::default()).unwrap();
        let options =
            EngineOptions { kv_bytes: 1 << 20, vision_bytes: 1 << 16, step_patches: 64, ..Default::default() };
        let engine = Engine::start(Arc::new(model), options).unwrap();
        let prompt = Prompt::from_tokens(vec![1, 2, 3]);
        let mut session = engine.session();
        session.append(prompt.clone()).unwrap();
        let sampling = Sampling { max_tokens: 900, ..Sampling::default() };
        let running = session.generate(sampling.clone()).unwrap();
        // Past the checks of the handles: a span that reaches past its tokens.
        let image = Arc::new(Image::from_resized(vec![0; 28 * 28 * 3], 28, 28, 14, (28, 28)).unwrap());
        let broken = Prompt { tokens: vec![1], images: vec![ImageSpan { offset: 9, len: 1, image }] };
        engine.client.send(Command::Append { id: 77, prompt: broken }).unwrap();
        let told = running.wait().unwrap_err().to_string();
        assert!(told.contains("the engine failed") && told.contains("image spans"), "{told}");
        while engine.client.send(Command::Close { id: 77 }).is_ok() {
            std::thread::yield_now(); // the thread is still going down
        }
        let later = engine.generate(Request { prompt, sampling, n: 1 }).err().unwrap().to_string();
        assert!(later.contains("the engine failed"), "{later}");
        assert!(engine.pause().is_err());
    }
}
