//! Where memory lives and work is launched.
//!
//! A [`Device`] owns memory; a [`Buffer`] is a typed range of it; a [`Stream`] runs work in the order in which it was
//! submitted. Submitting never promises that work has run: results are read through [`Pending::wait`] or after
//! [`Event::wait`]. The CPU device runs work at once; [`Device::cpu_deferred`] holds every launch back until somebody
//! waits, so that nothing above can come to rely on immediate results. [`Device::emulated`] is a GPU that is not there: the
//! CUDA kernels run on the host, under checks.
//!
//! Ops match on [`Stream::backend`] and launch for the backend they find; nothing above `ops` does.

mod buffer;
mod card;
mod cuda;
#[doc(hidden)] // for the emulator's own tests
pub mod emulated;
mod fault;
mod gpu;
mod graph;
mod inputs;
mod matmul;
mod pool;
mod stream;
mod tensor_map;

pub use buffer::{Buffer, DType, Element};
pub use cuda::{CardInfo, architectures, has_card, has_driver, usable_card};
#[doc(hidden)] // for tests
pub use fault::{Fault, Injected};
pub use gpu::{Arg, Gpu, Launch};
pub use graph::Graph;
pub use inputs::{Input, Inputs};
pub(crate) use matmul::Matmul;
pub use pool::{Pool, SendPtr};
pub use stream::{Event, Pending, Stream};
pub use tensor_map::TensorMap;

use crate::{Error, Result};
use card::{Card, Driver};
use cuda::Cuda;
use emulated::Emulator;
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// More threads than any machine has cores would only take memory.
const MAX_THREADS: usize = 1024;

/// A place where buffers live and streams run. Cloning is cheap and names the same device.
#[derive(Clone)]
pub struct Device {
    inner: Arc<Inner>,
}

struct Inner {
    kind: Kind,
    allocated: Arc<AtomicUsize>,
}

enum Kind {
    Cpu {
        pool: Arc<Pool>,
        deferred: bool,
    },
    /// With the stream that fills fresh buffers.
    Gpu(Arc<Card>, Gpu),
}

impl Kind {
    fn gpu(card: Card) -> Kind {
        let card = Arc::new(card);
        Kind::Gpu(card.clone(), Gpu::new(card))
    }
}

/// What a [`Stream`] runs on, for the ops' dispatch.
pub enum Backend<'a> {
    /// The host's cores, in f32.
    Cpu(&'a Stream),
    /// A GPU: bf16 between kernels, f32 within them.
    Gpu(&'a Gpu),
}

impl Device {
    /// The host's cores. `threads` 0 means all that this process may use.
    pub fn cpu(threads: usize) -> Device {
        Self::build(threads, false)
    }

    /// The host's cores, but every launch runs only when somebody waits for a later result, and fresh buffers hold NaN.
    /// For tests of what is above: code that reads too early, or relies on zeroed memory, fails on it.
    pub fn cpu_deferred(threads: usize) -> Device {
        Self::build(threads, true)
    }

    fn build(threads: usize, deferred: bool) -> Device {
        let threads = threads.min(MAX_THREADS);
        let threads = if threads == 0 { std::thread::available_parallelism().map_or(1, |n| n.get()) } else { threads };
        let kind = Kind::Cpu { pool: Arc::new(Pool::new(threads)), deferred };
        Device { inner: Arc::new(Inner { kind, allocated: Arc::default() }) }
    }

    /// NVIDIA's card number `ordinal`, as the driver counts them (`CUDA_VISIBLE_DEVICES`).
    ///
    /// # Errors
    /// [`Error::Limit`] that says what is missing: kernels in this program, a driver, a card, a newer driver or card.
    pub fn cuda(ordinal: usize) -> Result<Device> {
        let allocated = Arc::<AtomicUsize>::default();
        let card = Card::new(Driver::Cuda(Arc::new(Cuda::open(ordinal)?)), allocated.clone());
        Ok(Device { inner: Arc::new(Inner { kind: Kind::gpu(card), allocated }) })
    }

    /// What the driver says of the card, where this is one.
    pub fn card(&self) -> Option<&CardInfo> {
        match &self.inner.kind {
            Kind::Gpu(card, _) => match &card.driver {
                Driver::Cuda(cuda) => Some(&cuda.info),
                Driver::Emulated(_) => None,
            },
            Kind::Cpu { .. } => None,
        }
    }

    /// A GPU with the instructions of sm_90 that is not there: the CUDA kernels, compiled for the host, under the emulator's checks
    /// (races, deadlocks, bounds, unfinished copies). Warps run in an order that `seed` gives. Slow: for tests.
    ///
    /// # Errors
    /// [`Error::Limit`] where the crate was built without a C++ compiler.
    pub fn emulated(seed: u64) -> Result<Device> {
        Self::emulated_as(seed, 90)
    }

    /// The same with the instructions of `sm`: 80 or 90.
    ///
    /// # Errors
    /// As [`emulated`](Self::emulated); [`Error::Input`] for another architecture.
    pub fn emulated_as(seed: u64, sm: u32) -> Result<Device> {
        Self::emulated_failing(seed, sm, None)
    }

    /// The same, with a fault to come: for tests of what is above.
    ///
    /// # Errors
    /// As [`emulated_as`](Self::emulated_as).
    #[doc(hidden)]
    pub fn emulated_failing(seed: u64, sm: u32, fault: Option<Arc<Injected>>) -> Result<Device> {
        if ![80, 90].contains(&sm) {
            return Err(Error::input(format!("there are no kernels for sm_{sm}"), "use 80 or 90"));
        }
        let allocated = Arc::<AtomicUsize>::default();
        let card = Card::new(Driver::Emulated(Emulator::new(seed)?.with_sm(sm)), allocated.clone()).with_fault(fault);
        Ok(Device { inner: Arc::new(Inner { kind: Kind::gpu(card), allocated }) })
    }

    /// A new in-order queue of work on this device.
    pub fn stream(&self) -> Stream {
        Stream::new(self.clone())
    }

    /// The type of what goes from op to op (activations, weights, keys and values): f32 on the host's cores, bf16 on a GPU.
    pub fn float(&self) -> DType {
        match self.inner.kind {
            Kind::Cpu { .. } => DType::F32,
            Kind::Gpu(..) => DType::BF16,
        }
    }

    /// Whether work has run when its submission returns: then nothing is gained by submitting more before results are read.
    pub fn runs_at_submission(&self) -> bool {
        matches!(self.inner.kind, Kind::Cpu { deferred: false, .. })
    }

    /// Whether the weights of products lie in [`linear`](crate::ops::linear)'s panels here, rather than row-major.
    pub fn packs_weights(&self) -> bool {
        matches!(self.inner.kind, Kind::Cpu { .. })
    }

    /// Uninitialised memory for `len` elements; poisoned with NaN bytes (0xFF) on the deferred and the emulated device. 64-byte
    /// aligned. A GPU that has no room for it fails at the next wait.
    pub fn alloc(&self, dtype: DType, len: usize) -> Buffer {
        match &self.inner.kind {
            Kind::Cpu { deferred, .. } => {
                let b = Buffer::new(dtype, len, self.inner.allocated.clone());
                if *deferred {
                    // SAFETY: nobody else has this buffer yet.
                    unsafe { b.bytes_mut().fill(0xFF) }
                }
                b
            }
            Kind::Gpu(card, _) => card.alloc(dtype, len),
        }
    }

    /// Zeroed memory for `len` elements.
    pub fn zeros(&self, dtype: DType, len: usize) -> Buffer {
        match &self.inner.kind {
            // The allocator hands out zeroed pages.
            Kind::Cpu { .. } => Buffer::new(dtype, len, self.inner.allocated.clone()),
            Kind::Gpu(card, gpu) => {
                let b = card.alloc(dtype, len);
                gpu.fill(&b, 0);
                // Other streams may use it at once. A failure is kept.
                let _ = gpu.synchronize();
                b
            }
        }
    }

    /// A new buffer with a copy of `data`.
    pub fn upload<T: Element>(&self, data: &[T]) -> Buffer {
        match &self.inner.kind {
            Kind::Cpu { .. } => {
                let b = Buffer::new(T::DTYPE, data.len(), self.inner.allocated.clone());
                // SAFETY: nobody else has this buffer yet.
                unsafe { b.get_mut::<T>().copy_from_slice(data) };
                b
            }
            Kind::Gpu(card, gpu) => {
                let b = card.alloc(T::DTYPE, data.len());
                gpu.write(&b, data);
                let _ = gpu.synchronize();
                b
            }
        }
    }

    /// Bytes held by live buffers of this device.
    pub fn allocated_bytes(&self) -> usize {
        self.inner.allocated.load(Ordering::Relaxed)
    }

    /// How often a GPU has been asked for memory since it was opened; 0 on the host's cores.
    pub fn allocations(&self) -> u64 {
        match &self.inner.kind {
            Kind::Gpu(card, _) => card.allocations(),
            Kind::Cpu { .. } => 0,
        }
    }

    /// Bytes that could still be allocated, as far as the card or the system tells: its free memory and the limit of the
    /// control group.
    pub fn available_bytes(&self) -> Option<u64> {
        if let Kind::Gpu(card, _) = &self.inner.kind
            && let Some(free) = card.free_bytes()
        {
            return Some(free);
        }
        let info = std::fs::read_to_string("/proc/meminfo").ok()?;
        let line = info.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
        let free = line.split_whitespace().next()?.parse::<u64>().ok()? << 10;
        let group = |file: &str| std::fs::read_to_string(format!("/sys/fs/cgroup/{file}")).ok();
        let number = |file: &str| group(file)?.trim().parse::<u64>().ok();
        let Some(limit) = number("memory.max") else { return Some(free) };
        // Copies of files count as used, and are given up when memory is asked for.
        let stat = group("memory.stat").unwrap_or_default();
        let files: u64 = (stat.lines())
            .filter_map(|l| l.strip_prefix("active_file ").or(l.strip_prefix("inactive_file ")))
            .filter_map(|bytes| bytes.parse::<u64>().ok())
            .sum();
        let used = number("memory.current").unwrap_or(0).saturating_sub(files);
        Some(free.min(limit.saturating_sub(used)))
    }

    /// Bytes of live buffers that nobody has written to yet: the system still counts them as free. A card hands out its
    /// memory at once.
    fn promised_bytes(&self) -> u64 {
        if self.card().is_some() {
            return 0;
        }
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:"));
        let held = line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok());
        held.map_or(0, |kib| (self.allocated_bytes() as u64).saturating_sub(kib << 10))
    }

    /// Bytes that are free beside what its live buffers hold or have been promised; `None` where nobody tells.
    pub fn free_bytes(&self) -> Option<u64> {
        self.available_bytes().map(|free| free.saturating_sub(self.promised_bytes()))
    }

    /// That `bytes` for `what` can be allocated beside what is already. A CPU's memory is handed out before it is there:
    /// without this question, what does not fit ends the whole process, later, without a word.
    ///
    /// # Errors
    /// [`Error::Limit`] with both figures and `mend`.
    pub fn check_room(&self, bytes: usize, what: &str, mend: &str) -> Result<()> {
        match self.free_bytes() {
            Some(free) if bytes as u64 > free => {
                let mib = |bytes: u64| bytes.div_ceil(1 << 20);
                let (need, free) = (mib(bytes as u64), mib(free));
                Err(Error::limit(format!("{what}: {need} MiB are needed, and {free} MiB of memory are free"), mend))
            }
            // Where the system does not tell, what no allocator gives is all that can be known.
            _ if bytes > isize::MAX as usize / 2 => {
                Err(Error::limit(format!("{what}: {bytes} bytes are needed"), mend))
            }
            _ => Ok(()),
        }
    }

    /// How many threads of the host work for it: in its ops, where it is the host, and in filling its memory.
    pub fn threads(&self) -> usize {
        match &self.inner.kind {
            Kind::Cpu { pool, .. } => pool.threads(),
            Kind::Gpu(..) => std::thread::available_parallelism().map_or(1, |n| n.get()),
        }
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.inner.kind {
            Kind::Cpu { pool, deferred: true } => write!(f, "cpu({} threads, deferred)", pool.threads()),
            Kind::Cpu { pool, .. } => write!(f, "cpu({} threads)", pool.threads()),
            Kind::Gpu(card, _) => match &card.driver {
                Driver::Cuda(cuda) => write!(f, "cuda({})", cuda.info.name),
                Driver::Emulated(emulator) => write!(f, "emulated(sm_{})", emulator.sm()),
            },
        }
    }
}
