//! What can go wrong with a GPU that is nobody's mistake, in words for a person; and the faults that tests inject into the
//! emulated one, which say the same.

use crate::{Error, Result};
use std::fmt::Display;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What to do about memory.
pub(super) const MEMORY_MEND: &str =
    "lower rollout.kv_cache_mib, rollout.vision_cache_mib or optim.micro_batch_tokens, or use a smaller model";

/// A kind of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The GPU has no memory left.
    Memory,
    /// The host gives no more page-locked memory, through which copies go.
    PageLocked,
    /// A launch is refused.
    Launch,
    /// A copy between the host and the GPU fails.
    Copy,
    /// The GPU does not answer any more.
    Lost,
}

impl Fault {
    fn named(name: &str) -> Option<Fault> {
        let all = [
            ("memory", Fault::Memory),
            ("page-locked", Fault::PageLocked),
            ("launch", Fault::Launch),
            ("copy", Fault::Copy),
            ("lost", Fault::Lost),
        ];
        all.into_iter().find(|(n, _)| *n == name).map(|(_, fault)| fault)
    }
}

/// The error of page-locked memory that is not to be had.
pub(super) fn page_locked(why: impl Display) -> Error {
    Error::limit(
        format!("the system locks no more of the host's memory for copies to and from the GPU: {why}"),
        "free some of the host's memory, or raise the limit on locked memory (ulimit -l)",
    )
}

/// The error of a GPU that does not answer; `what` was being done.
pub(super) fn lost(what: impl Display, why: impl Display) -> Error {
    Error::limit(
        format!("the GPU is lost: it cannot {what}: {why}"),
        "look at nvidia-smi and at the system's log (dmesg, for lines with Xid), reset the card or the machine, and run the same \
         command again: a run goes on from its last checkpoint",
    )
}

/// A fault that comes once: at the n-th operation of its kind, or, where the GPU is lost, at the n-th of any.
#[derive(Debug)]
pub struct Injected {
    fault: Fault,
    /// Operations before it, and whether it is still to come.
    left: AtomicU64,
}

impl Injected {
    /// The `nth` such operation fails, the first being 1.
    pub fn new(fault: Fault, nth: u64) -> Injected {
        Injected { fault, left: AtomicU64::new(nth) }
    }

    /// Operations that are still to come until it does, itself among them; 0: it has come.
    pub fn left(&self) -> u64 {
        self.left.load(Ordering::Relaxed)
    }

    /// What the environment variable `VARFT_EMULATED_FAULT` asks for, such as `launch:100`.
    ///
    /// # Errors
    /// [`Error::Input`] where it asks for something else.
    pub fn asked() -> Result<Option<Arc<Injected>>> {
        let Ok(asked) = std::env::var("VARFT_EMULATED_FAULT") else { return Ok(None) };
        let parts = asked.split_once(':').and_then(|(name, nth)| Some((Fault::named(name)?, nth.parse().ok()?)));
        let (fault, nth) = parts.ok_or_else(|| {
            Error::input(
                format!("VARFT_EMULATED_FAULT is {asked:?}"),
                "write memory, page-locked, launch, copy or lost, a colon and a number, as in launch:100",
            )
        })?;
        Ok(Some(Arc::new(Injected::new(fault, nth))))
    }

    /// One operation of a kind: its error, where it is the one that fails.
    pub(super) fn meet(&self, kind: Fault, what: &(impl Display + ?Sized)) -> Result<()> {
        if self.fault != kind && self.fault != Fault::Lost {
            return Ok(());
        }
        // Once at zero it stays there.
        match self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)) {
            Ok(1) => {}
            _ => return Ok(()),
        }
        let why = "a fault that was asked for";
        Err(match self.fault {
            Fault::Memory => Error::limit(format!("the GPU cannot {what}: {why}"), MEMORY_MEND),
            Fault::PageLocked => page_locked(why),
            Fault::Launch | Fault::Copy => Error::internal(format!("the GPU cannot {what}: {why}")),
            Fault::Lost => lost(what, why),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_comes_once_and_at_its_number() {
        let third = Injected::new(Fault::Copy, 3);
        let met: Vec<bool> = (0..6).map(|_| third.meet(Fault::Copy, "copy").is_err()).collect();
        assert_eq!(met, [false, false, true, false, false, false]);
        assert!(third.meet(Fault::Launch, "launch").is_ok());
        let lost = Injected::new(Fault::Lost, 2);
        assert!(lost.meet(Fault::Launch, "launch").is_ok());
        let said = lost.meet(Fault::Copy, "copy a thing").unwrap_err().to_string();
        assert!(said.contains("the GPU is lost: it cannot copy a thing") && said.contains("Xid"), "{said}");
    }
}
