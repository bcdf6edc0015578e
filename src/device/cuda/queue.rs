//! A stream of a card: launches and copies in order, through page-locked memory of the host, so that nobody waits for them.
//!
//! Page-locked memory is scarce: what is large goes through it in pieces, and a stream keeps little of it.

use super::super::fault;
use super::super::gpu::{Arg, Launch};
use super::super::{Buffer, Element};
use super::{Cuda, failed, shared_bytes};
use crate::Result;
use cudarc::driver::{result, sys};
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

/// The smallest piece of page-locked memory.
const LEAST: usize = 1 << 12;
/// The largest; what is longer goes in several.
const PIECE: usize = 16 << 20;
/// How much of it a stream holds before it waits for the card to be done with some.
const KEPT: usize = 64 << 20;

/// An in-order queue of a card.
pub(in crate::device) struct Queue {
    card: Arc<Cuda>,
    stream: sys::CUstream,
    /// Page-locked memory that the host may use again once its event has passed.
    staging: Mutex<Vec<Block>>,
}
// SAFETY: as `Cuda`.
unsafe impl Send for Queue {}
// SAFETY: as `Cuda`; the driver serialises calls on a stream.
unsafe impl Sync for Queue {}

/// Page-locked memory, and the event that says when the card is done with it.
struct Block {
    host: *mut c_void,
    bytes: usize,
    event: sys::CUevent,
}
// SAFETY: memory and an event that one owner has.
unsafe impl Send for Block {}

/// Launches that a card submits together.
pub(in crate::device) struct Graph {
    exec: sys::CUgraphExec,
    card: Arc<Cuda>,
}
// SAFETY: as `Cuda`.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.card.enter().is_ok() {
            // SAFETY: nobody else has it; a replay under way ends before it is freed.
            let _ = unsafe { result::graph::exec_destroy(self.exec) };
        }
    }
}

/// Values on their way from the card.
pub(in crate::device) struct Staged<T> {
    queue: Arc<Queue>,
    len: usize,
    to: To<T>,
}

/// Where values go.
enum To<T> {
    /// There are none, or they have been taken.
    Nowhere,
    Locked(Block),
    /// Too many to lock memory for.
    Plain(Vec<T>, Mark),
}

/// A point of a queue, and the moment at which the card comes to it, on its own clock.
pub(in crate::device) struct Mark {
    event: sys::CUevent,
    card: Arc<Cuda>,
}
// SAFETY: as `Cuda`.
unsafe impl Send for Mark {}
// SAFETY: as `Cuda`.
unsafe impl Sync for Mark {}

impl Mark {
    /// Waits until the card has come to this point.
    pub fn wait(&self) -> Result<()> {
        self.card.enter()?;
        // SAFETY: the event lives.
        unsafe { result::event::synchronize(self.event) }.map_err(|e| failed("finish its work", e))
    }

    /// Seconds from `earlier` to this point; waits for both.
    pub fn since(&self, earlier: &Mark) -> Result<f64> {
        self.wait()?;
        // SAFETY: both events live, and the card has come to both.
        let milliseconds = unsafe { result::event::elapsed(earlier.event, self.event) };
        milliseconds.map(|ms| f64::from(ms) / 1e3).map_err(|e| failed("tell the time", e))
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        if self.card.enter().is_ok() {
            // SAFETY: nobody waits for it any more.
            let _ = unsafe { result::event::destroy(self.event) };
        }
    }
}

impl Queue {
    pub fn new(card: Arc<Cuda>) -> Result<Queue> {
        card.enter()?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking);
        Ok(Queue { card, stream: stream.map_err(|e| failed("make a stream", e))?, staging: Mutex::default() })
    }

    pub(super) fn raw(&self) -> sys::CUstream {
        self.stream
    }

    pub fn launch(&self, kernel: &str, shape: Launch, args: &[Arg<'_>]) -> Result<()> {
        self.card.enter()?;
        let function = self.card.function(kernel)?;
        function.check(kernel, args)?;
        let scalars: Vec<u64> = args.iter().map(Arg::scalar).collect();
        let mut params: Vec<*mut c_void> = (args.iter().zip(&scalars))
            .map(|(arg, scalar)| match arg {
                Arg::TensorMap(map) => std::ptr::from_ref(*map).cast_mut().cast(),
                _ => std::ptr::from_ref(scalar).cast_mut().cast(),
            })
            .collect();
        let three = |[x, y, z]: [u32; 3]| (x, y, z);
        let (grid, block) = (three(shape.grid), three(shape.block));
        // SAFETY: the parameters are the kernel's, as has been checked. They are copied by the call.
        let launched = unsafe {
            result::launch_kernel(function.handle, grid, block, shared_bytes(shape)?, self.stream, &mut params)
        };
        launched.map_err(|e| failed(&format!("launch {kernel} with {shape:?}"), e))
    }

    pub fn fill(&self, to: &Buffer, byte: u8) -> Result<()> {
        self.card.enter()?;
        // SAFETY: a buffer of this card.
        unsafe { result::memset_d8_async(to.address() as u64, byte, to.bytes(), self.stream) }
            .map_err(|e| failed("fill memory", e))
    }

    pub fn copy(&self, from: &Buffer, to: &Buffer) -> Result<()> {
        self.card.enter()?;
        // SAFETY: two buffers of this card, of one length.
        unsafe { result::memcpy_dtod_async(to.address() as u64, from.address() as u64, from.bytes(), self.stream) }
            .map_err(|e| failed("copy memory", e))
    }

    /// Submits a copy of `data`, which is taken at the call.
    pub fn write(&self, to: &Buffer, data: &[u8]) -> Result<()> {
        self.card.enter()?;
        for (i, data) in data.chunks(PIECE).enumerate() {
            let block = self.take(data.len())?;
            // SAFETY: the block has room, and the card is done with it.
            let staged = unsafe {
                block.host.cast::<u8>().copy_from_nonoverlapping(data.as_ptr(), data.len());
                std::slice::from_raw_parts(block.host.cast::<u8>(), data.len())
            };
            let at = to.address() as u64 + (i * PIECE) as u64;
            // SAFETY: `to` has so many bytes; the block stays as it is until its event has passed.
            let sent = unsafe { result::memcpy_htod_async(at, staged, self.stream) };
            self.give(block, sent).map_err(|e| failed("copy to the card", e))?;
        }
        Ok(())
    }

    /// Submits a copy of `from` to the host.
    pub fn read<T: Element>(self: &Arc<Self>, from: &Buffer) -> Result<Staged<T>> {
        self.card.enter()?;
        let (bytes, address) = (from.bytes(), from.address() as u64);
        let staged = |to| Staged { queue: self.clone(), len: from.len(), to };
        if bytes == 0 {
            return Ok(staged(To::Nowhere));
        }
        let copy = |e| failed("copy from the card", e);
        if bytes > PIECE {
            let mut values = vec![T::zeroed(); from.len()];
            // SAFETY: `from` has so many bytes; nobody touches the values before the mark has passed.
            unsafe { result::memcpy_dtoh_async(&mut values, address, self.stream) }.map_err(copy)?;
            return Ok(staged(To::Plain(values, self.mark()?)));
        }
        let block = self.take(bytes)?;
        // SAFETY: the block has room, and the card is done with it.
        let host = unsafe { std::slice::from_raw_parts_mut(block.host.cast::<u8>(), bytes) };
        // SAFETY: `from` has so many bytes; nobody reads the block before its event has passed.
        let sent = unsafe {
            result::memcpy_dtoh_async(host, address, self.stream)
                .and_then(|()| result::event::record(block.event, self.stream))
        };
        let staged = staged(To::Locked(block));
        sent.map_err(copy).map(|()| staged)
    }

    /// Marks what has been submitted.
    pub fn mark(&self) -> Result<Mark> {
        self.card.enter()?;
        let event = result::event::create(sys::CUevent_flags_enum::CU_EVENT_DEFAULT);
        let mark = Mark { event: event.map_err(|e| failed("make an event", e))?, card: self.card.clone() };
        // SAFETY: the event and the stream live.
        unsafe { result::event::record(mark.event, self.stream) }.map_err(|e| failed("mark its work", e))?;
        Ok(mark)
    }

    /// From here on launches are noted instead of run.
    pub fn begin_capture(&self) -> Result<()> {
        self.card.enter()?;
        // Relaxed: what other threads do meanwhile on other streams is none of its business.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream lives.
        unsafe { result::stream::begin_capture(self.stream, mode) }.map_err(|e| failed("begin a graph", e))
    }

    /// What was noted since [`begin_capture`](Self::begin_capture).
    /// `None` where something failed meanwhile, or there is no room for a graph.
    pub fn end_capture(&self) -> Option<Graph> {
        self.card.enter().ok()?;
        // SAFETY: the stream lives; the graph is destroyed below, after what was made of it.
        let exec = unsafe {
            let graph = result::stream::end_capture(self.stream).ok()?;
            let exec = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            let _ = result::graph::destroy(graph);
            exec.ok()?
        };
        Some(Graph { exec, card: self.card.clone() })
    }

    /// Submits a graph of this card.
    pub fn replay(&self, graph: &Graph) -> Result<()> {
        self.card.enter()?;
        // SAFETY: both live; the buffers of its launches are held by whoever replays it.
        unsafe { result::graph::launch(graph.exec, self.stream) }.map_err(|e| failed("run a graph", e))
    }

    /// Waits for all that was submitted.
    pub fn synchronize(&self) -> Result<()> {
        self.card.enter()?;
        // SAFETY: the stream lives.
        unsafe { result::stream::synchronize(self.stream) }.map_err(|e| failed("finish its work", e))
    }

    /// A block of at least so many bytes, at most [`PIECE`], that the card is done with.
    fn take(&self, bytes: usize) -> Result<Block> {
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the event lives as long as its block.
        let done = |b: &Block| unsafe { result::event::query(b.event) }.is_ok();
        if let Some(i) = staging.iter().position(|b| b.bytes >= bytes && done(b)) {
            return Ok(staging.remove(i));
        }
        let wanted = bytes.next_power_of_two().max(LEAST);
        // The oldest first: the card is done with it before the others.
        while !staging.is_empty() && staging.iter().map(|b| b.bytes).sum::<usize>() + wanted > KEPT {
            let block = staging.remove(0);
            // SAFETY: as above.
            unsafe { result::event::synchronize(block.event) }.map_err(|e| failed("finish its work", e))?;
            if block.bytes >= bytes {
                return Ok(block);
            }
        }
        drop(staging);
        Block::new(wanted)
    }

    /// Keeps a block for later, when the card has come to this point.
    fn give(&self, block: Block, sent: Result<(), result::DriverError>) -> Result<(), result::DriverError> {
        // SAFETY: the event and the stream live.
        let marked = sent.and_then(|()| unsafe { result::event::record(block.event, self.stream) });
        self.staging.lock().unwrap_or_else(PoisonError::into_inner).push(block);
        marked
    }
}

impl Block {
    fn new(bytes: usize) -> Result<Block> {
        let event = result::event::create(sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING);
        let event = event.map_err(|e| failed("make an event", e))?;
        let mut block = Block { host: std::ptr::null_mut(), bytes, event };
        // SAFETY: memory that nobody reads before it is written.
        block.host = unsafe { result::malloc_host(bytes, 0) }.map_err(|e| fault::page_locked(format!("{:?}", e.0)))?;
        Ok(block)
    }
}

impl Drop for Block {
    /// The card's context is the thread's, and the card is done with the block or has failed.
    fn drop(&mut self) {
        // SAFETY: nobody else has these.
        unsafe {
            let _ = result::event::destroy(self.event);
            if !self.host.is_null() {
                let _ = result::free_host(self.host);
            }
        }
    }
}

impl<T: Element> Staged<T> {
    /// Waits for the values.
    pub fn wait(mut self) -> Result<Vec<T>> {
        match std::mem::replace(&mut self.to, To::Nowhere) {
            To::Nowhere => Ok(Vec::new()),
            To::Plain(values, mark) => mark.wait().map(|()| values),
            To::Locked(block) => {
                self.queue.card.enter()?;
                let mut values = vec![T::zeroed(); self.len];
                // SAFETY: the event lives as long as its block.
                let done = unsafe { result::event::synchronize(block.event) };
                let bytes = self.len * size_of::<T>();
                // SAFETY: the copy has ended, and the block holds so many bytes.
                let from = unsafe { std::slice::from_raw_parts(block.host.cast::<u8>(), bytes) };
                bytemuck::cast_slice_mut::<T, u8>(&mut values).copy_from_slice(from);
                self.queue.staging.lock().unwrap_or_else(PoisonError::into_inner).push(block);
                done.map_err(|e| failed("finish its work", e)).map(|()| values)
            }
        }
    }
}

impl<T> Drop for Staged<T> {
    /// Of values that nobody waited for.
    fn drop(&mut self) {
        match std::mem::replace(&mut self.to, To::Nowhere) {
            To::Nowhere => {}
            // The card may be about to write them. A failure is an earlier call's, which its own wait reports.
            To::Plain(_values, mark) => drop(mark.wait()),
            // The block's event says when it can be used again.
            To::Locked(block) => self.queue.staging.lock().unwrap_or_else(PoisonError::into_inner).push(block),
        }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        if self.synchronize().is_err() && self.card.enter().is_err() {
            return;
        }
        // Nothing is in flight.
        self.staging.get_mut().unwrap_or_else(PoisonError::into_inner).clear();
        // SAFETY: nobody else has it.
        let _ = unsafe { result::stream::destroy(self.stream) };
    }
}
