//! What all streams of a GPU share: the driver, and the first failure.

use super::cuda::Cuda;
use super::emulated::Emulator;
use super::fault::{Fault, Injected, MEMORY_MEND};
use super::{Buffer, DType};
use crate::{Error, Result};
use std::fmt::Display;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// What runs the kernels.
pub(super) enum Driver {
    Cuda(Arc<Cuda>),
    Emulated(Emulator),
}

/// A failure, to be told as often as somebody waits.
#[derive(Clone)]
enum Failure {
    Limit { what: String, mend: String },
    Internal(String),
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Error {
        match failure {
            Failure::Limit { what, mend } => Error::limit(what, mend),
            Failure::Internal(what) => Error::internal(what),
        }
    }
}

/// What all streams of a GPU share.
pub(super) struct Card {
    pub driver: Driver,
    failure: Mutex<Option<Failure>>,
    gauge: Arc<AtomicUsize>,
    allocations: AtomicU64,
    injected: Option<Arc<Injected>>,
}

impl Card {
    pub fn new(driver: Driver, gauge: Arc<AtomicUsize>) -> Card {
        Card { driver, failure: Mutex::default(), gauge, allocations: AtomicU64::new(0), injected: None }
    }

    /// The same, but for a fault.
    pub fn with_fault(self, injected: Option<Arc<Injected>>) -> Card {
        Card { injected, ..self }
    }

    /// How often memory has been asked for.
    pub fn allocations(&self) -> u64 {
        self.allocations.load(Ordering::Relaxed)
    }

    /// One operation of a kind, as far as injected faults are concerned.
    pub fn meet(&self, kind: Fault, what: &(impl Display + ?Sized)) -> Result<()> {
        self.injected.as_ref().map_or(Ok(()), |injected| injected.meet(kind, what))
    }

    /// The first failure, if there was one.
    pub fn check(&self) -> Result<()> {
        match &*self.failure.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(failure) => Err(failure.clone().into()),
            None => Ok(()),
        }
    }

    /// Runs `work` unless something has failed, and keeps its failure.
    pub fn run<T>(&self, work: impl FnOnce(&Driver) -> Result<T>) -> Option<T> {
        self.check().ok()?;
        work(&self.driver).map_err(|e| self.keep(e)).ok()
    }

    /// Keeps a failure, if it is the first.
    pub fn keep(&self, e: Error) {
        let failure = match e {
            Error::Limit { what, mend } => Failure::Limit { what, mend },
            Error::Internal(what) => Failure::Internal(what),
            e => Failure::Internal(e.to_string()),
        };
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(failure);
    }

    /// Memory holding anything (on the emulated GPU every byte is 0xFF). Where there is not enough, a buffer of nothing stands
    /// for it, the failure is kept, and so nothing that would touch it runs.
    pub fn alloc(&self, dtype: DType, len: usize) -> Buffer {
        self.allocations.fetch_add(1, Ordering::Relaxed);
        if let Err(e) = self.meet(Fault::Memory, "give more memory") {
            self.keep(e);
            return Buffer::nowhere(dtype, len, self.gauge.clone());
        }
        let made = match &self.driver {
            Driver::Cuda(cuda) => Buffer::cuda(cuda, dtype, len, self.gauge.clone()),
            Driver::Emulated(_) => Buffer::emulated(dtype, len, self.gauge.clone()),
        };
        made.unwrap_or_else(|| {
            self.keep(Error::limit(format!("the GPU has no memory for {len} more elements of {dtype:?}"), MEMORY_MEND));
            Buffer::nowhere(dtype, len, self.gauge.clone())
        })
    }

    /// The architecture that kernels are chosen for.
    pub fn sm(&self) -> u32 {
        match &self.driver {
            Driver::Cuda(cuda) => cuda.sm(),
            Driver::Emulated(emulator) => emulator.sm(),
        }
    }

    /// Bytes of its memory that are free, as far as it tells.
    pub fn free_bytes(&self) -> Option<u64> {
        match &self.driver {
            Driver::Cuda(cuda) => cuda.free_bytes(),
            Driver::Emulated(_) => None,
        }
    }
}
