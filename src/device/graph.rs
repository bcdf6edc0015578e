//! Launches that are captured, and then submitted together again and again.

use super::gpu::{Arg, Launch};
use super::{Buffer, TensorMap, card::Card, cuda};
use std::sync::Arc;

/// Launches in their order: see [`Stream::capture`](super::Stream::capture). It holds the memory that they use.
pub struct Graph {
    pub(super) card: Arc<Card>,
    pub(super) capture: Capture,
    /// What the driver has made of them. `None` on the emulated GPU, and where the driver could make nothing: then the launches are
    /// submitted one by one.
    pub(super) made: Option<cuda::Graph>,
}

/// What was launched while a stream captured.
#[derive(Default)]
pub(super) struct Capture {
    pub steps: Vec<Step>,
    /// What tensor maps of the launches describe.
    pub described: Vec<Buffer>,
}

/// One launch.
pub(super) enum Step {
    Launch(String, Launch, Vec<Kept>),
    Fill(Buffer, u8),
}

impl Step {
    pub fn launch(kernel: &str, shape: Launch, args: &[Arg<'_>]) -> Step {
        Step::Launch(kernel.into(), shape, args.iter().map(Kept::new).collect())
    }
}

/// An argument for later.
pub(super) enum Kept {
    Buffer(Buffer),
    TensorMap(TensorMap),
    Plain(Arg<'static>),
}

impl Kept {
    fn new(arg: &Arg<'_>) -> Kept {
        match *arg {
            Arg::Buffer(b) => Kept::Buffer(b.clone()),
            Arg::TensorMap(map) => Kept::TensorMap(*map),
            Arg::Null(dtype) => Kept::Plain(Arg::Null(dtype)),
            Arg::I32(v) => Kept::Plain(Arg::I32(v)),
            Arg::Len(n) => Kept::Plain(Arg::Len(n)),
            Arg::U32(v) => Kept::Plain(Arg::U32(v)),
            Arg::U64(v) => Kept::Plain(Arg::U64(v)),
            Arg::F32(v) => Kept::Plain(Arg::F32(v)),
        }
    }

    pub fn arg(&self) -> Arg<'_> {
        match self {
            Kept::Buffer(b) => Arg::Buffer(b),
            Kept::TensorMap(map) => Arg::TensorMap(map),
            Kept::Plain(arg) => *arg,
        }
    }
}
