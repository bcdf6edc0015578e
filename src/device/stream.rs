use super::cuda::Mark;
use super::gpu::Coming;
use super::{Backend, Buffer, DType, Device, Element, Gpu, Graph, Kind, Pool};
use crate::{Error, Result};
use half::bf16;
use half::slice::HalfFloatSliceExt;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Instant;

type Work = Box<dyn FnOnce(&Pool) + Send>;

/// Where and when work runs. On the host the lock is held while it does: threads may share a stream, and its launches run one
/// at a time.
enum Queue {
    /// On the host at submission.
    Immediate(Mutex<()>, Arc<Pool>),
    /// On the host when somebody waits.
    Deferred(Mutex<Held>, Arc<Pool>),
    /// On a GPU.
    Gpu(Gpu),
}

#[derive(Default)]
struct Held {
    waiting: VecDeque<Work>,
    submitted: u64,
    done: u64,
}

/// An in-order queue of work on a device. Cloning names the same queue.
#[derive(Clone)]
pub struct Stream {
    device: Device,
    queue: Arc<Queue>,
}

impl Stream {
    pub(super) fn new(device: Device) -> Stream {
        let queue = match &device.inner.kind {
            Kind::Cpu { pool, deferred: false } => Queue::Immediate(Mutex::default(), pool.clone()),
            Kind::Cpu { pool, deferred: true } => Queue::Deferred(Mutex::default(), pool.clone()),
            Kind::Gpu(card, _) => Queue::Gpu(Gpu::new(card.clone())),
        };
        Stream { device, queue: queue.into() }
    }

    /// The device this stream runs on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What to launch for.
    pub fn backend(&self) -> Backend<'_> {
        match &*self.queue {
            Queue::Gpu(gpu) => Backend::Gpu(gpu),
            _ => Backend::Cpu(self),
        }
    }

    /// Submits host work: `f` gets the pool to spread over the cores. It captures clones of the buffers it touches, and submits
    /// nothing to this stream itself: that would wait for ever. For [`Backend::Cpu`]; panics on a GPU's stream.
    pub fn launch<F: FnOnce(&Pool) + Send + 'static>(&self, f: F) {
        match &*self.queue {
            Queue::Immediate(running, pool) => {
                let _one = running.lock().unwrap_or_else(|e| e.into_inner());
                f(pool);
            }
            Queue::Deferred(q, _) => {
                let mut q = q.lock().unwrap_or_else(|e| e.into_inner());
                q.waiting.push_back(Box::new(f));
                q.submitted += 1;
            }
            Queue::Gpu(_) => panic!("host work on a GPU's stream"),
        }
    }

    /// Submits a copy of `data` into the front of `to`. The data is taken at the call.
    pub fn write<T: Element>(&self, to: &Buffer, data: &[T]) {
        assert!(data.len() <= to.len(), "{} elements written into a buffer of {}", data.len(), to.len());
        match &*self.queue {
            Queue::Immediate(running, _) => {
                let _one = running.lock().unwrap_or_else(|e| e.into_inner());
                // SAFETY: work on this stream has run already and none begins, so no launch is using `to`.
                unsafe { to.get_mut::<T>()[..data.len()].copy_from_slice(data) }
            }
            Queue::Deferred(..) => {
                let (to, data) = (to.clone(), data.to_vec());
                // SAFETY: the queue runs launches one after the other.
                self.launch(move |_| unsafe { to.get_mut::<T>()[..data.len()].copy_from_slice(&data) });
            }
            Queue::Gpu(gpu) => gpu.write(to, data),
        }
    }

    /// Submits a copy of all of `from` into `to`. Panics if they overlap.
    pub fn copy(&self, from: &Buffer, to: &Buffer) {
        assert!(!from.overlaps(to), "a copy between buffers that overlap");
        assert_eq!((from.len(), from.dtype()), (to.len(), to.dtype()), "a copy between buffers of one shape");
        if let Queue::Gpu(gpu) = &*self.queue {
            return gpu.copy(from, to);
        }
        let (from, to) = (from.clone(), to.clone());
        // SAFETY: launches of one stream run one after the other; the ranges do not overlap.
        self.launch(move |_| unsafe { to.bytes_mut().copy_from_slice(from.bytes_mut()) });
    }

    /// Submits setting every byte of `b` to zero.
    pub fn zero(&self, b: &Buffer) {
        if let Queue::Gpu(gpu) = &*self.queue {
            return gpu.fill(b, 0);
        }
        let b = b.clone();
        self.launch(move |pool| {
            // SAFETY: launches of one stream run one after the other.
            let bytes = unsafe { b.bytes_mut() };
            pool.chunks_mut(bytes, 1 << 18, |_, c| c.fill(0));
        });
    }

    /// Submits a read of `b`; the values come with [`Pending::wait`].
    pub fn read<T: Element>(&self, b: &Buffer) -> Pending<T> {
        if let Queue::Gpu(gpu) = &*self.queue {
            let event = Event { stream: self.clone(), at: 0, mark: None };
            return Pending { coming: Values::Gpu(gpu.read(b)), event };
        }
        let slot: Arc<Mutex<Vec<T>>> = Arc::default();
        let (to, b) = (slot.clone(), b.clone());
        // SAFETY: launches of one stream run one after the other.
        self.launch(move |_| *to.lock().unwrap_or_else(|e| e.into_inner()) = unsafe { b.get::<T>() }.to_vec());
        Pending { coming: Values::Host(slot), event: self.record() }
    }

    /// Submits a copy of `values` into the front of `to`, which holds f32 or bf16: rounded to nearest where it holds bf16.
    /// Panics if it holds something else.
    pub fn write_floats(&self, to: &Buffer, values: &[f32]) {
        match to.dtype() {
            DType::BF16 => {
                let mut rounded = vec![bf16::ZERO; values.len()];
                rounded.convert_from_f32_slice(values);
                self.write(to, &rounded);
            }
            _ => self.write(to, values),
        }
    }

    /// Waits for the values of `b`, f32 or bf16, as f32. Panics if it holds something else.
    ///
    /// # Errors
    /// As [`Pending::wait`].
    pub fn read_floats(&self, b: &Buffer) -> Result<Vec<f32>> {
        match b.dtype() {
            DType::BF16 => {
                let stored = self.read::<bf16>(b).wait()?;
                let mut values = vec![0.0; stored.len()];
                stored.convert_to_f32_slice(&mut values);
                Ok(values)
            }
            _ => self.read::<f32>(b).wait(),
        }
    }

    /// Whether [`capture`](Self::capture) gives graphs.
    pub fn has_graphs(&self) -> bool {
        matches!(&*self.queue, Queue::Gpu(_))
    }

    /// Makes a graph of what `work` launches on this stream: kernels, and nothing that copies between host and device or waits.
    /// It does not run; [`replay`](Self::replay) runs it, on the buffers that `work` named.
    ///
    /// # Panics
    /// On the host's cores, where a launch costs as much either way: see [`has_graphs`](Self::has_graphs).
    pub fn capture(&self, work: impl FnOnce(&Stream)) -> Graph {
        match &*self.queue {
            Queue::Gpu(gpu) => gpu.capture(|| work(self)),
            _ => panic!("a graph on the host's cores"),
        }
    }

    /// Submits the launches of a graph that a stream of this device has captured. Its workspace is that stream's: the two take turns.
    ///
    /// # Panics
    /// On the host's cores, which give no graphs.
    pub fn replay(&self, graph: &Graph) {
        match &*self.queue {
            Queue::Gpu(gpu) => gpu.replay(graph),
            _ => panic!("a graph on the host's cores"),
        }
    }

    /// Bytes of the workspace that ops on a GPU's stream share: it grows with what they need, and graphs hold what it was when they
    /// were captured.
    pub(crate) fn workspace_bytes(&self) -> usize {
        match &*self.queue {
            Queue::Gpu(gpu) => gpu.workspace_bytes(),
            _ => 0,
        }
    }

    /// Marks this point of the queue.
    pub fn record(&self) -> Event {
        let (at, mark) = match &*self.queue {
            Queue::Immediate(..) => (0, None),
            Queue::Gpu(gpu) => (0, gpu.mark().map(Arc::new)),
            Queue::Deferred(q, _) => (q.lock().unwrap_or_else(|e| e.into_inner()).submitted, None),
        };
        Event { stream: self.clone(), at, mark }
    }

    /// Seconds from the moment when the device comes to what `work` submits to this stream until it has done it, by the device's
    /// own clock where it has one. Waits for all that was submitted.
    ///
    /// # Errors
    /// As [`synchronize`](Self::synchronize).
    pub fn time(&self, work: impl FnOnce()) -> Result<f64> {
        if let Queue::Gpu(gpu) = &*self.queue {
            return gpu.time(work);
        }
        self.synchronize()?;
        let begun = Instant::now();
        work();
        self.synchronize()?;
        Ok(begun.elapsed().as_secs_f64())
    }

    /// Waits for all that was submitted.
    ///
    /// # Errors
    /// The first failure of what was submitted, on a GPU of any stream.
    pub fn synchronize(&self) -> Result<()> {
        match &*self.queue {
            Queue::Gpu(gpu) => gpu.synchronize(),
            _ => self.record().wait(),
        }
    }
}

/// A point in a stream's queue.
#[derive(Clone)]
pub struct Event {
    stream: Stream,
    /// Work submitted before it, on a deferred queue.
    at: u64,
    /// Of a card's queue.
    mark: Option<Arc<Mark>>,
}

impl Event {
    /// Waits until everything submitted before this point has run. Errors of the device surface here.
    pub fn wait(&self) -> Result<()> {
        let (q, pool) = match &*self.stream.queue {
            Queue::Immediate(..) => return Ok(()),
            Queue::Gpu(gpu) => return gpu.wait_for(self.mark.as_deref()),
            Queue::Deferred(q, pool) => (q, pool),
        };
        let mut q = q.lock().map_err(|_| Error::internal("a launch panicked on this stream"))?;
        while q.done < self.at {
            let Some(work) = q.waiting.pop_front() else { break };
            work(pool);
            q.done += 1;
        }
        Ok(())
    }
}

/// Values that are on their way from the device.
#[must_use = "the values come with wait()"]
pub struct Pending<T> {
    coming: Values<T>,
    event: Event,
}

enum Values<T> {
    Host(Arc<Mutex<Vec<T>>>),
    Gpu(Coming<T>),
}

impl<T: Element> Pending<T> {
    /// Waits for the values. Errors of the device surface here.
    pub fn wait(self) -> Result<Vec<T>> {
        match (self.coming, &*self.event.stream.queue) {
            // Not for what was submitted after them.
            (Values::Gpu(coming), Queue::Gpu(gpu)) => gpu.wait(coming),
            (Values::Host(slot), _) => {
                self.event.wait()?;
                Ok(std::mem::take(&mut *slot.lock().unwrap_or_else(|e| e.into_inner())))
            }
            (Values::Gpu(_), _) => Err(Error::internal("values of a GPU on a stream of the host")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{DType, Device};

    #[test]
    fn deferred_runs_nothing_before_a_wait_and_everything_in_order() {
        let d = Device::cpu_deferred(2);
        let s = d.stream();
        let b = d.alloc(DType::F32, 4);
        // SAFETY: nothing is in flight.
        assert!(unsafe { b.get::<f32>() }.iter().all(|x| x.is_nan()), "fresh memory must be poisoned");
        s.write(&b, &[1.0f32, 2.0, 3.0, 4.0]);
        let b2 = b.clone();
        // SAFETY: one launch at a time.
        s.launch(move |_| unsafe { b2.get_mut::<f32>() }.iter_mut().for_each(|x| *x *= 2.0));
        // SAFETY: nothing is in flight.
        assert!(unsafe { b.get::<f32>() }[0].is_nan(), "the deferred device ran early");
        let first = s.read::<f32>(&b);
        s.write(&b, &[9.0f32]);
        assert_eq!(first.wait().unwrap(), [2.0, 4.0, 6.0, 8.0]);
        assert_eq!(s.read::<f32>(&b).wait().unwrap(), [9.0, 4.0, 6.0, 8.0]);
    }

    #[test]
    fn threads_that_share_a_stream_take_turns() {
        for d in [Device::cpu(2), Device::cpu_deferred(2)] {
            let (s, b) = (d.stream(), d.zeros(DType::U32, 1));
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    let (s, b) = (s.clone(), b.clone());
                    scope.spawn(move || {
                        for _ in 0..2000 {
                            let b = b.clone();
                            // SAFETY: one launch at a time.
                            s.launch(move |_| unsafe { b.get_mut::<u32>() }[0] += 1);
                        }
                    });
                }
            });
            assert_eq!(s.read::<u32>(&b).wait().unwrap(), [8000]);
        }
    }

    #[test]
    fn the_time_of_work_is_told_and_the_work_is_done() {
        let emulated = Device::emulated(1).inspect_err(|e| println!("not shown on it: {e}"));
        for d in [Device::cpu(1), Device::cpu_deferred(1)].into_iter().chain(emulated) {
            let (s, b) = (d.stream(), d.upload(&[1.0f32; 1000]));
            let seconds = s.time(|| s.zero(&b)).unwrap();
            assert!(seconds > 0.0 && seconds.is_finite(), "{d:?}: {seconds}");
            assert_eq!(s.read::<f32>(&b).wait().unwrap(), [0.0; 1000]);
        }
    }

    #[test]
    fn a_failure_within_what_is_timed_is_told() {
        let Ok(d) = Device::emulated(1).inspect_err(|e| println!("not shown: {e}")) else { return };
        let s = d.stream();
        assert!(s.time(|| s.zero(&d.alloc(DType::F32, usize::MAX / 8))).is_err());
    }

    #[test]
    fn ranges_overlap_where_they_share_an_element() {
        let d = Device::cpu(1);
        let (a, b) = (d.zeros(DType::F32, 10), d.zeros(DType::F32, 10));
        assert!(a.overlaps(&a) && a.overlaps(&a.view(9, 1)) && a.view(2, 4).overlaps(&a.view(5, 2)));
        assert!(!a.overlaps(&b) && !a.view(2, 3).overlaps(&a.view(5, 2)) && !a.overlaps(&a.view(3, 0)));
    }

    #[test]
    fn memory_is_counted_and_given_back() {
        let d = Device::cpu(1);
        let a = d.zeros(DType::F32, 1000);
        assert_eq!(d.allocated_bytes(), 4032);
        let v = a.view(10, 20);
        drop(a);
        assert_eq!(d.allocated_bytes(), 4032, "a view keeps its memory");
        drop(v);
        assert_eq!(d.allocated_bytes(), 0);
    }
}
