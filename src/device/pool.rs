//! A fork-join pool for short parallel regions.
//!
//! A decode step has about a hundred parallel regions of a few microseconds each, so a worker that has run out of work
//! spins for a moment before it sleeps. Which thread runs an item never changes its result: ops give each output to
//! exactly one item.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long an idle worker spins before it sleeps: longer than the gap between two ops of a step, far shorter than the
/// gap between two steps that wait for a tool.
const SPIN: Duration = Duration::from_micros(60);

type Task = *const (dyn Fn(usize) + Sync);

struct Shared {
    /// The region's body; valid while `pending > 0`.
    task: UnsafeCell<Option<Task>>,
    items: AtomicUsize,
    next: AtomicUsize,
    /// Rises by one for each region.
    epoch: AtomicU64,
    /// Workers that have not yet left the current region.
    pending: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
    sleepers: Mutex<usize>,
    wake: Condvar,
}
// SAFETY: `task` is written only between regions (pending == 0) and published by the release store of `epoch`.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

/// A fixed set of threads that run parallel regions one after the other.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One region at a time: two streams may share the pool.
    region: Mutex<()>,
}

impl Pool {
    /// A pool of `threads` threads, the caller of [`Pool::run`] being one of them.
    pub fn new(threads: usize) -> Pool {
        let shared = Arc::new(Shared {
            task: UnsafeCell::new(None),
            items: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            epoch: AtomicU64::new(0),
            pending: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            sleepers: Mutex::new(0),
            wake: Condvar::new(),
        });
        let workers = (1..threads.max(1))
            .map_while(|i| {
                let s = shared.clone();
                std::thread::Builder::new().name(format!("varft-{i}")).spawn(move || worker(&s)).ok()
            })
            .collect();
        Pool { shared, workers, region: Mutex::new(()) }
    }

    /// How many threads run a region.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f(i)` once for every `i` in `0..items`, on all threads, and returns when all have run. Items are handed
    /// out in ascending order. Must not be called from within `f`.
    pub fn run(&self, items: usize, f: impl Fn(usize) + Sync) {
        if items == 0 {
            return;
        }
        if items == 1 || self.workers.is_empty() {
            return (0..items).for_each(f);
        }
        let _one = self.region.lock().unwrap_or_else(|e| e.into_inner());
        let s = &*self.shared;
        let task: &(dyn Fn(usize) + Sync) = &f;
        // SAFETY: no region is running (we hold `region`, and the last one waited for pending == 0); the lifetime is
        // erased, and `task` is not used after this function returns.
        unsafe {
            *s.task.get() = Some(std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), Task>(task as *const _))
        };
        s.items.store(items, Ordering::Relaxed);
        s.next.store(0, Ordering::Relaxed);
        s.pending.store(self.workers.len(), Ordering::Relaxed);
        s.epoch.fetch_add(1, Ordering::SeqCst);
        if *s.sleepers.lock().unwrap_or_else(|e| e.into_inner()) > 0 {
            s.wake.notify_all();
        }
        let mine = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drain(s, task)));
        let mut spins = 0u32;
        while s.pending.load(Ordering::Acquire) > 0 {
            spins += 1;
            if spins.is_multiple_of(4096) { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
        let others = s.panicked.swap(false, Ordering::Relaxed);
        if let Err(p) = mine {
            std::panic::resume_unwind(p);
        }
        assert!(!others, "a parallel region panicked");
    }

    /// Splits `data` into chunks of `chunk` elements and calls `f(index of chunk, chunk)` for each, on all threads.
    pub fn chunks_mut<T: Send>(&self, data: &mut [T], chunk: usize, f: impl Fn(usize, &mut [T]) + Sync) {
        let (len, base) = (data.len(), SendPtr(data.as_mut_ptr()));
        self.run(len.div_ceil(chunk.max(1)), |i| {
            let start = i * chunk;
            // SAFETY: chunks are disjoint and in bounds, and `data` is borrowed mutably for the whole region.
            f(i, unsafe { std::slice::from_raw_parts_mut(base.get().add(start), chunk.min(len - start)) });
        });
    }
}

/// A pointer that may cross threads; whoever dereferences it says why that is sound.
pub struct SendPtr<T>(pub *mut T);
impl<T> Clone for SendPtr<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for SendPtr<T> {}
// SAFETY: see the type's contract.
unsafe impl<T> Send for SendPtr<T> {}
// SAFETY: see the type's contract.
unsafe impl<T> Sync for SendPtr<T> {}
impl<T> SendPtr<T> {
    /// The pointer (a method, so that closures capture the wrapper and not the field).
    pub fn get(self) -> *mut T {
        self.0
    }
}

fn drain(s: &Shared, task: &(dyn Fn(usize) + Sync)) {
    let items = s.items.load(Ordering::Relaxed);
    loop {
        let i = s.next.fetch_add(1, Ordering::Relaxed);
        if i >= items {
            break;
        }
        task(i);
    }
}

fn worker(s: &Shared) {
    let mut seen = 0;
    loop {
        let idle = Instant::now();
        let mut n = 0u32;
        while s.epoch.load(Ordering::Acquire) == seen {
            n += 1;
            std::hint::spin_loop();
            if n.is_multiple_of(64) && idle.elapsed() > SPIN {
                let mut sleepers = s.sleepers.lock().unwrap_or_else(|e| e.into_inner());
                *sleepers += 1;
                while s.epoch.load(Ordering::SeqCst) == seen && !s.stop.load(Ordering::Relaxed) {
                    sleepers = s.wake.wait(sleepers).unwrap_or_else(|e| e.into_inner());
                }
                *sleepers -= 1;
                break;
            }
        }
        if s.stop.load(Ordering::Relaxed) {
            return;
        }
        seen = s.epoch.load(Ordering::Acquire);
        // SAFETY: published before `epoch` rose, and valid until this worker leaves the region (pending).
        if let Some(task) = unsafe { *s.task.get() } {
            // SAFETY: as above.
            let run = std::panic::AssertUnwindSafe(|| drain(s, unsafe { &*task }));
            if std::panic::catch_unwind(run).is_err() {
                s.panicked.store(true, Ordering::Relaxed);
            }
        }
        s.pending.fetch_sub(1, Ordering::Release);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.epoch.fetch_add(1, Ordering::SeqCst);
        drop(self.shared.sleepers.lock().unwrap_or_else(|e| e.into_inner()));
        self.shared.wake.notify_all();
        for w in self.workers.drain(..) {
            let _ = w.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_runs_once_over_many_regions() {
        for threads in [1, 2, 3] {
            let p = Pool::new(threads);
            for n in [0usize, 1, 2, 7, 100, 1000] {
                let hits: Vec<AtomicUsize> = (0..n).map(|_| AtomicUsize::new(0)).collect();
                for _ in 0..50 {
                    p.run(n, |i| {
                        hits[i].fetch_add(1, Ordering::Relaxed);
                    });
                }
                assert!(hits.iter().all(|h| h.load(Ordering::Relaxed) == 50));
            }
        }
    }

    #[test]
    fn a_sleeping_pool_wakes_and_a_panic_reaches_the_caller() {
        let p = Pool::new(2);
        for _ in 0..5 {
            std::thread::sleep(Duration::from_millis(2));
            let mut v = vec![0u8; 1000];
            p.chunks_mut(&mut v, 10, |i, c| c.fill(i as u8));
            assert!(v.iter().enumerate().all(|(i, &x)| x == (i / 10) as u8));
        }
        let r = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            p.run(100, |i| assert!(i != 60, "planted"));
        }));
        assert!(r.is_err());
        p.run(4, |_| ()); // still usable
    }
}
