//! Tools that an agent may call: a trait, and the `python` tool behind it.
//!
//! A [`Tool`] takes one self-contained [`ToolCall`] and gives back a [`ToolResult`]. The line between the two ways in
//! which a call can go wrong matters for training and runs through everything here:
//!
//! * what the model's own input caused (a traceback, a limit it ran into) is an [`Outcome`] of an `Ok` result: it is
//!   shown to the model and may cost it reward;
//! * what the machinery caused (the warm process died, the machine had no time for it) is [`Error::Tool`](crate::Error::Tool):
//!   the episode is run again or left out, never scored as a wrong answer.
//!
//! | file | what it holds |
//! |---|---|
//! | [`python`] | the `python` tool: OpenCV on images, a fork of a warm process per call |
//! | `text` | makes a program's output fit to be shown to a model and a person |

pub mod python;
mod text;

pub use python::{PythonOptions, PythonTool};
pub use text::clean;

use std::sync::Arc;
use std::time::Duration;

use image::RgbImage;
use serde::{Deserialize, Serialize};

/// Something an agent can call.
///
/// Calls are independent of each other: whatever a call needs is in it, and nothing stays behind after it, so calls may run
/// in any order, at once, in another process or in a stricter sandbox without a caller noticing.
pub trait Tool: Send + Sync {
    /// The name by which protocols, metrics and errors know the tool.
    fn name(&self) -> &str;

    /// Runs one call and blocks until it has ended; safe to call from many threads, which is how calls run at once.
    ///
    /// # Errors
    /// [`Error::Tool`](crate::Error::Tool) when the machinery failed. What the call's own input caused is an
    /// [`Outcome`] instead.
    fn run(&self, call: ToolCall) -> crate::Result<ToolResult>;
}

/// One call of a tool.
#[derive(Clone, Debug)]
pub struct ToolCall {
    /// What the model wrote: source code for `python`, a query for a search.
    pub input: String,
    /// The images of the conversation in the order in which they were shown; the last is the one being worked on.
    pub images: Vec<Arc<RgbImage>>,
    /// Seeds the random generators that the tool offers, so that a call can be repeated.
    pub seed: u64,
    /// What the call may use up.
    pub limits: Limits,
}

impl ToolCall {
    /// A call with default limits, seed 0 and no image.
    pub fn new(input: impl Into<String>) -> Self {
        ToolCall { input: input.into(), images: Vec::new(), seed: 0, limits: Limits::default() }
    }

    /// Adds an image; the last one added is the one being worked on.
    pub fn image(mut self, image: Arc<RgbImage>) -> Self {
        self.images.push(image);
        self
    }
}

/// What one call may use up. All but `wall` are always the model's business: running into one is an [`Outcome`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Processor time, exact to a few milliseconds.
    pub cpu: Duration,
    /// Time by the clock from when the call is handed to its process, which runs by then. It is there to notice that the machinery hangs, so it is
    /// generous: reaching it is [`Error::Tool`](crate::Error::Tool), since a busy machine must not cost reward. Only
    /// code that is at rest by its own doing then (it sleeps, or waits for what never comes) has failed.
    pub wall: Duration,
    /// Bytes of address space beyond those of the warm process.
    pub memory: u64,
    /// Bytes of one file; all files of a call together may have four times that (and 1 MiB in any case).
    pub file: u64,
    /// Bytes of standard output and of standard error, each.
    pub output: usize,
    /// Bytes of the resulting image as 8-bit RGB (width x height x 3).
    pub image: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            cpu: Duration::from_secs(10),
            wall: Duration::from_secs(120),
            memory: 1 << 30,
            file: 64 << 20,
            output: 64 << 10,
            image: 48 << 20,
        }
    }
}

/// What came of a call.
#[derive(Clone, Debug, PartialEq)]
pub struct ToolResult {
    /// How it ended.
    pub outcome: Outcome,
    /// Standard output: at most [`Limits::output`] bytes, UTF-8, without terminal escapes (see [`clean`]).
    pub stdout: String,
    /// Standard error, likewise.
    pub stderr: String,
    /// The image that the call made, if it made one.
    pub image: Option<RgbImage>,
    /// What it used up.
    pub usage: Usage,
}

/// How a call ended, when the machinery worked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind", content = "detail")]
#[non_exhaustive]
pub enum Outcome {
    /// It ran to its end.
    Ok,
    /// The program failed: its traceback, or what else ended it (a crash, an unusable result).
    ProgramError(String),
    /// It used up its processor time.
    CpuLimit,
    /// It asked for more memory than it may have.
    MemoryLimit,
    /// It wrote a file larger than it may.
    FileSizeLimit,
    /// All its files together were too large.
    ScratchLimit,
    /// It printed more than it may, or made an image larger than it may.
    OutputLimit,
}

impl Outcome {
    /// The name under which metrics count it.
    pub fn kind(&self) -> &'static str {
        match self {
            Outcome::Ok => "ok",
            Outcome::ProgramError(_) => "program_error",
            Outcome::CpuLimit => "cpu_limit",
            Outcome::MemoryLimit => "memory_limit",
            Outcome::FileSizeLimit => "file_size_limit",
            Outcome::ScratchLimit => "scratch_limit",
            Outcome::OutputLimit => "output_limit",
        }
    }

    /// What to tell the model; empty when all went well.
    pub fn message(&self) -> String {
        match self {
            Outcome::Ok => String::new(),
            Outcome::ProgramError(what) => what.clone(),
            Outcome::CpuLimit => "The code used up its processor time and was stopped.".into(),
            Outcome::MemoryLimit => "The code ran out of memory.".into(),
            Outcome::FileSizeLimit => "The code tried to write a file that is too large.".into(),
            Outcome::ScratchLimit => "The files that the code wrote are too large together.".into(),
            Outcome::OutputLimit => "The code's output is too large.".into(),
        }
    }
}

/// What a call used up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// Waiting for a free slot.
    pub queued: Duration,
    /// By the clock, from handing the call over until its result was read.
    pub wall: Duration,
    /// Processor time, exact to a few milliseconds.
    pub cpu: Duration,
    /// The most memory resident at once, in bytes, the pages shared with the warm process included.
    pub peak_memory: u64,
}
