//! A stream of a card: launches and copies in order, through page-locked memory of the host, so that nobody waits for them.

use super::super::gpu::{Arg, Launch};
use super::super::{Buffer, Element};
use super::{Cuda, failed, shared_bytes};
use crate::Result;
use cudarc::driver::{result, sys};
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

/// The smallest piece of page-locked memory.
const LEAST: usize = 1 << 12;

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

/// A moment of the card's, on its own clock.
pub(in crate::device) struct Mark {
    event: sys::CUevent,
    card: Arc<Cuda>,
}

/// Values on their way from the card.
pub(in crate::device) struct Staged {
    block: Option<Block>,
    queue: Arc<Queue>,
    len: usize,
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
        let f = self.card.function(kernel)?;
        let scalars: Vec<u64> = args.iter().map(Arg::scalar).collect();
        let mut params: Vec<*mut c_void> = (args.iter().zip(&scalars))
            .map(|(arg, scalar)| match arg {
                Arg::TensorMap(map) => std::ptr::from_ref(*map).cast_mut().cast(),
                _ => std::ptr::from_ref(scalar).cast_mut().cast(),
            })
            .collect();
        let three = |[x, y, z]: [u32; 3]| (x, y, z);
        let (grid, block) = (three(shape.grid), three(shape.block));
        // SAFETY: the parameters are the kernel's: the emulator checks the same launches against the kernels' types. They are
        // copied by the call.
        let launched = unsafe { result::launch_kernel(f, grid, block, shared_bytes(shape)?, self.stream, &mut params) };
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
        if data.is_empty() {
            return Ok(());
        }
        self.card.enter()?;
        let block = self.take(data.len())?;
        // SAFETY: the block has room, and the card is done with it.
        let staged = unsafe {
            block.host.cast::<u8>().copy_from_nonoverlapping(data.as_ptr(), data.len());
            std::slice::from_raw_parts(block.host.cast::<u8>(), data.len())
        };
        // SAFETY: `to` has so many bytes; the block stays as it is until its event has passed.
        let sent = unsafe { result::memcpy_htod_async(to.address() as u64, staged, self.stream) };
        self.give(block, sent).map_err(|e| failed("copy to the card", e))
    }

    /// Submits a copy of `from` to the host.
    pub fn read(self: &Arc<Self>, from: &Buffer) -> Result<Staged> {
        self.card.enter()?;
        let bytes = from.bytes();
        if bytes == 0 {
            return Ok(Staged { block: None, queue: self.clone(), len: 0 });
        }
        let block = self.take(bytes)?;
        // SAFETY: the block has room, and the card is done with it.
        let host = unsafe { std::slice::from_raw_parts_mut(block.host.cast::<u8>(), bytes) };
        // SAFETY: `from` has so many bytes; nobody reads the block before its event has passed.
        let sent = unsafe {
            result::memcpy_dtoh_async(host, from.address() as u64, self.stream)
                .and_then(|()| result::event::record(block.event, self.stream))
        };
        let staged = Staged { block: Some(block), queue: self.clone(), len: bytes };
        sent.map_err(|e| failed("copy from the card", e)).map(|()| staged)
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
    pub fn end_capture(&self) -> Result<Graph> {
        self.card.enter()?;
        // SAFETY: the stream lives; the graph is destroyed below, after what was made of it.
        unsafe {
            let graph = result::stream::end_capture(self.stream).map_err(|e| failed("end a graph", e))?;
            let exec = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            let _ = result::graph::destroy(graph);
            Ok(Graph { exec: exec.map_err(|e| failed("make a graph", e))?, card: self.card.clone() })
        }
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

    /// Submits a mark: the moment at which the card comes to it.
    pub fn mark(&self) -> Result<Mark> {
        self.card.enter()?;
        let failed = |e| failed("mark a moment", e);
        let event = result::event::create(sys::CUevent_flags_enum::CU_EVENT_DEFAULT).map_err(failed)?;
        let mark = Mark { event, card: self.card.clone() };
        // SAFETY: the event and the stream live.
        unsafe { result::event::record(mark.event, self.stream) }.map_err(failed)?;
        Ok(mark)
    }

    /// A block of at least so many bytes that the card is done with.
    fn take(&self, bytes: usize) -> Result<Block> {
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the event lives as long as its block.
        let free = |b: &Block| b.bytes >= bytes && unsafe { result::event::query(b.event) }.is_ok();
        if let Some(i) = staging.iter().position(free) {
            return Ok(staging.swap_remove(i));
        }
        let bytes = bytes.next_power_of_two().max(LEAST);
        let locked = |e| failed(&format!("lock {bytes} bytes of the host's memory"), e);
        // SAFETY: memory that nobody reads before it is written.
        let host = unsafe { result::malloc_host(bytes, 0) }.map_err(locked)?;
        let event = result::event::create(sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING).map_err(locked)?;
        Ok(Block { host, bytes, event })
    }

    /// Keeps a block for later, when the card has come to this point.
    fn give(&self, block: Block, sent: Result<(), result::DriverError>) -> Result<(), result::DriverError> {
        // SAFETY: the event and the stream live.
        let marked = sent.and_then(|()| unsafe { result::event::record(block.event, self.stream) });
        self.staging.lock().unwrap_or_else(PoisonError::into_inner).push(block);
        marked
    }
}

impl Mark {
    /// Seconds from `earlier` to this one; waits for both.
    pub fn since(&self, earlier: &Mark) -> Result<f64> {
        self.card.enter()?;
        // SAFETY: both events live.
        let milliseconds = unsafe {
            result::event::synchronize(self.event).and_then(|()| result::event::elapsed(earlier.event, self.event))
        };
        milliseconds.map(|ms| f64::from(ms) / 1e3).map_err(|e| failed("tell the time", e))
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        if self.card.enter().is_ok() {
            // SAFETY: nobody else has this event.
            let _ = unsafe { result::event::destroy(self.event) };
        }
    }
}

impl Staged {
    /// Waits for the values.
    pub fn wait<T: Element>(mut self) -> Result<Vec<T>> {
        let mut values = vec![T::zeroed(); self.len / size_of::<T>()];
        let Some(block) = self.block.take() else { return Ok(values) };
        self.queue.card.enter()?;
        // SAFETY: the event lives as long as its block.
        let done = unsafe { result::event::synchronize(block.event) };
        // SAFETY: the copy has ended, and the block holds so many bytes.
        let bytes = unsafe { std::slice::from_raw_parts(block.host.cast::<u8>(), self.len) };
        bytemuck::cast_slice_mut::<T, u8>(&mut values).copy_from_slice(bytes);
        self.queue.staging.lock().unwrap_or_else(PoisonError::into_inner).push(block);
        done.map_err(|e| failed("finish its work", e))?;
        Ok(values)
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        // Values that nobody waited for: the block's event says when it can be used again.
        if let Some(block) = self.block.take() {
            self.queue.staging.lock().unwrap_or_else(PoisonError::into_inner).push(block);
        }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        if self.synchronize().is_err() && self.card.enter().is_err() {
            return;
        }
        // SAFETY: nothing is in flight, and nobody else has these.
        unsafe {
            for block in self.staging.get_mut().unwrap_or_else(PoisonError::into_inner).drain(..) {
                let _ = result::event::destroy(block.event);
                let _ = result::free_host(block.host);
            }
            let _ = result::stream::destroy(self.stream);
        }
    }
}
