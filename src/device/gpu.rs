//! The side of a GPU that ops see: kernels launched by name with typed arguments, products with matrices, a workspace.
//!
//! A GPU keeps the first failure of a launch, of whatever stream: what is submitted after it does nothing, and every
//! wait returns it. So ops can launch without asking, and no result is ever read that a failed launch should have made.

use super::card::{Card, Driver};
use super::cuda::{self, Cuda};
use super::emulated::Emulator;
use super::fault::Fault;
use super::graph::{Capture, Graph, Kept, Step};
use super::matmul::Matmul;
use super::tensor_map::TensorMap;
use super::{Buffer, DType, Element};
use crate::{Error, Result};
use std::fmt::Display;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// The shape of a launch.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block in x, y and z.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block.
    pub shared_bytes: usize,
}

impl Launch {
    /// `blocks` blocks of `threads` threads, all in x.
    pub fn linear(blocks: usize, threads: usize) -> Launch {
        // Too many for the field are too many for a launch, which refuses them.
        let field = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Launch { grid: [field(blocks), 1, 1], block: [field(threads), 1, 1], shared_bytes: 0 }
    }

    /// The same with dynamic shared memory.
    pub fn shared(self, bytes: usize) -> Launch {
        Launch { shared_bytes: bytes, ..self }
    }
}

/// An argument of a kernel. Its type must be the parameter's.
#[derive(Clone, Copy, Debug)]
pub enum Arg<'a> {
    /// A pointer to the buffer's first element.
    Buffer(&'a Buffer),
    /// A null pointer to elements of a type.
    Null(DType),
    /// An `int`.
    I32(i32),
    /// An `int` that is a length. A launch with one that does not fit is refused.
    Len(usize),
    /// An `unsigned`.
    U32(u32),
    /// A `uint64_t`.
    U64(u64),
    /// A `float`.
    F32(f32),
    /// A tensor map, by value.
    TensorMap(&'a TensorMap),
}

impl<'a> Arg<'a> {
    /// The bytes of an argument of at most eight, from the lowest on.
    pub(super) fn scalar(&self) -> u64 {
        match *self {
            Arg::Buffer(b) => b.address() as u64,
            Arg::Null(_) | Arg::TensorMap(_) => 0,
            Arg::I32(v) => u64::from(v as u32),
            Arg::Len(n) => n as u64,
            Arg::U32(v) => u64::from(v),
            Arg::U64(v) => v,
            Arg::F32(v) => u64::from(v.to_bits()),
        }
    }

    /// Bytes of the parameter.
    pub(super) fn size(&self) -> usize {
        match self {
            Arg::Buffer(_) | Arg::Null(_) | Arg::U64(_) => 8,
            Arg::I32(_) | Arg::Len(_) | Arg::U32(_) | Arg::F32(_) => 4,
            Arg::TensorMap(_) => size_of::<TensorMap>(),
        }
    }

    /// A pointer to the buffer's first element, or null where there is none.
    pub fn maybe(buffer: Option<&'a Buffer>, dtype: DType) -> Arg<'a> {
        buffer.map_or(Arg::Null(dtype), Arg::Buffer)
    }

    /// A length, which kernels take as an `int`.
    pub fn len(n: usize) -> Arg<'a> {
        Arg::Len(n)
    }
}

/// A stream of a GPU, as ops launch on it. Work runs in the order of submission.
pub struct Gpu {
    card: Arc<Card>,
    /// `None` on the emulated GPU, where everything runs at submission, and where making it failed, which is kept.
    queue: Option<Arc<cuda::Queue>>,
    workspace: Mutex<Option<Buffer>>,
    launches: AtomicUsize,
    /// What has been launched since a capture began, while there is one.
    capture: Mutex<Option<Capture>>,
}

/// A capture under way. However it ends, with a panic or after a failure, the stream runs again what is submitted to it.
struct Capturing<'a> {
    gpu: &'a Gpu,
    begun: bool,
}

impl Capturing<'_> {
    fn end(&mut self) -> (Capture, Option<cuda::Graph>) {
        let capture = self.gpu.capturing().take().unwrap_or_default();
        let begun = std::mem::take(&mut self.begun);
        (capture, self.gpu.queue.as_ref().filter(|_| begun).and_then(|queue| queue.end_capture()))
    }
}

impl Drop for Capturing<'_> {
    fn drop(&mut self) {
        self.end();
    }
}

/// Parts of a workspace begin at multiples of so many bytes.
const PART_ALIGN: usize = 256;

impl Gpu {
    pub(super) fn new(card: Arc<Card>) -> Gpu {
        let queue = card.run(|driver| match driver {
            Driver::Cuda(cuda) => cuda::Queue::new(cuda.clone()).map(|q| Some(Arc::new(q))),
            Driver::Emulated(_) => Ok(None),
        });
        let (workspace, launches, capture) = (Mutex::default(), AtomicUsize::new(0), Mutex::default());
        Gpu { card, queue: queue.flatten(), workspace, launches, capture }
    }

    /// Submits work that no graph can hold.
    fn submit_outside_graphs<T>(
        &self,
        kind: Fault,
        what: impl Display,
        cuda: impl FnOnce(&Arc<cuda::Queue>, &Cuda) -> Result<T>,
        emulated: impl FnOnce(&Emulator) -> Result<T>,
    ) -> Option<T> {
        if self.capturing().is_some() {
            self.refuse(Error::internal("a copy or a wait amid launches that are being captured"));
        }
        self.submit(kind, what, cuda, emulated)
    }

    fn capturing(&self) -> MutexGuard<'_, Option<Capture>> {
        self.capture.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether launches are being captured, and if so, takes note of one.
    fn note(&self, note: impl FnOnce(&mut Capture)) -> bool {
        self.capturing().as_mut().map(note).is_some()
    }

    /// Submits work, unless something has failed: `cuda` to the card's queue, or `emulated`. `kind`: what fails where it is a
    /// fault that was asked for, in doing `what`.
    fn submit<T>(
        &self,
        kind: Fault,
        what: impl Display,
        cuda: impl FnOnce(&Arc<cuda::Queue>, &Cuda) -> Result<T>,
        emulated: impl FnOnce(&Emulator) -> Result<T>,
    ) -> Option<T> {
        self.card.run(|driver| match (driver, &self.queue) {
            (Driver::Cuda(card), Some(queue)) => cuda(queue, card),
            (Driver::Cuda(_), None) => Err(Error::internal("a stream that could not be made")),
            (Driver::Emulated(emulator), _) => {
                if kind == Fault::Copy {
                    self.card.meet(Fault::PageLocked, &what)?;
                }
                self.card.meet(kind, &what)?;
                emulated(emulator)
            }
        })
    }

    /// Submits a launch of the kernel of that name. A failure surfaces at the next wait.
    pub(crate) fn launch(&self, kernel: &str, shape: Launch, args: &[Arg<'_>]) {
        let too_long = args.iter().find_map(|arg| match *arg {
            Arg::Len(n) if i32::try_from(n).is_err() => Some(n),
            _ => None,
        });
        if let Some(n) = too_long {
            let what = format!("kernel {kernel} is asked for {n} elements, rows or columns at once");
            self.refuse(Error::limit(what, "use smaller batches: kernels count to 2147483647"));
        }
        let captured = self.note(|capture| capture.steps.push(Step::launch(kernel, shape, args)));
        self.submit(
            Fault::Launch,
            format_args!("launch {kernel}"),
            |queue, _| queue.launch(kernel, shape, args),
            |emulator| if captured { Ok(()) } else { self.emulate(emulator, kernel, shape, args) },
        );
    }

    fn emulate(&self, emulator: &Emulator, kernel: &str, shape: Launch, args: &[Arg<'_>]) -> Result<()> {
        // Each launch has its own order of warps; together they follow from the device's seed.
        let number = self.launches.fetch_add(1, Ordering::Relaxed) as u64;
        emulator.with_seed(emulator.seed().wrapping_add(number)).launch(kernel, shape, args)
    }

    /// Makes a graph of what `work` launches; it does not run.
    pub(super) fn capture(&self, work: impl FnOnce()) -> Graph {
        let begin = |queue: &Arc<cuda::Queue>, _: &Cuda| queue.begin_capture();
        let begun = self.submit_outside_graphs(Fault::Launch, "begin a graph", begin, |_| Ok(())).is_some();
        let mut capturing = Capturing { gpu: self, begun };
        *self.capturing() = Some(Capture::default());
        work();
        let (capture, made) = capturing.end();
        Graph { card: self.card.clone(), capture, made }
    }

    /// Submits the launches of a graph.
    pub(super) fn replay(&self, graph: &Graph) {
        if !Arc::ptr_eq(&self.card, &graph.card) {
            return self.refuse(Error::internal("a graph of another device"));
        }
        if let Some(made) = &graph.made {
            let none = |_: &Emulator| Err(Error::internal("a graph of a card"));
            self.submit_outside_graphs(Fault::Launch, "launch a graph", |queue, _| queue.replay(made), none);
            return;
        }
        for step in &graph.capture.steps {
            match step {
                Step::Launch(kernel, shape, args) => {
                    let args: Vec<Arg<'_>> = args.iter().map(Kept::arg).collect();
                    self.launch(kernel, *shape, &args);
                }
                Step::Fill(memory, byte) => self.fill(memory, *byte),
            }
        }
    }

    /// Bytes of the stream's workspace.
    pub(super) fn workspace_bytes(&self) -> usize {
        self.workspace.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map_or(0, Buffer::len)
    }

    /// Boxes of a bf16 tensor for [`Arg::TensorMap`]: `size` and `region` (the box) in elements, the innermost dimension first, two
    /// or three of them; `swizzle` in bytes. A failure surfaces at the next wait.
    pub(crate) fn tensor_map(&self, memory: &Buffer, size: &[usize], region: &[u32], swizzle: u32) -> TensorMap {
        self.note(|capture| capture.described.push(memory.clone()));
        let made = self.submit(
            Fault::Launch,
            "describe a tensor",
            |_, card| card.tensor_map(memory, size, region, swizzle),
            |emulator| emulator.tensor_map(memory, size, region, swizzle),
        );
        made.unwrap_or(TensorMap::opaque([0; 16]))
    }

    /// Submits a product. A failure surfaces at the next wait.
    pub(crate) fn matmul(&self, product: Matmul<'_>) {
        if product.shape.contains(&0) {
            return;
        }
        assert!(product.fits(), "buffers too short for {product:?}");
        self.submit_outside_graphs(
            Fault::Launch,
            "multiply",
            |queue, card| card.matmul(queue, &product),
            |emulator| emulator.matmul(&product),
        );
    }

    /// Parts of this stream's workspace, of so many elements of a type each, holding anything. They are the op's until the
    /// stream's next workspace: kernels run in order, so no op disturbs another's. Allocates only where more is asked
    /// for than ever before.
    pub(crate) fn scratch<const N: usize>(&self, parts: [(DType, usize); N]) -> [Buffer; N] {
        let bytes = parts.map(|(dtype, len)| (dtype.size() * len).next_multiple_of(PART_ALIGN));
        let all: usize = bytes.iter().sum();
        let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
        if workspace.as_ref().is_none_or(|w| w.len() < all) {
            *workspace = None; // given back first, unless a graph holds it
            *workspace = Some(self.card.alloc(DType::U8, all));
        }
        let whole = workspace.get_or_insert_with(|| self.card.alloc(DType::U8, 0)).clone();
        drop(workspace);
        if self.queue.is_none() {
            self.fill(&whole, 0xFF);
        }
        let mut start = 0;
        let mut next = bytes.into_iter();
        parts.map(|(dtype, len)| {
            let part = whole.part(start, dtype, len);
            start += next.next().unwrap_or(0);
            part
        })
    }

    /// The first `len` elements, at a multiple of 16 bytes: as they are, or moved to this stream's workspace.
    pub(crate) fn aligned(&self, b: &Buffer, len: usize) -> Buffer {
        if b.alignment() >= 16 {
            return b.clone();
        }
        let [moved] = self.scratch([(b.dtype(), len)]);
        self.copy(&b.view(0, len), &moved);
        moved
    }

    /// Whether all of the buffers begin at multiples of `bytes`, as kernels that say so need it. Where not, the stream keeps that
    /// as its failure.
    pub(crate) fn require_alignment(&self, bytes: usize, buffers: &[&Buffer]) -> bool {
        let off = buffers.iter().find(|b| b.alignment() < bytes);
        if let Some(b) = off {
            let what = format!("{b:?} begins at a multiple of {} bytes, and its kernel needs {bytes}", b.alignment());
            self.refuse(Error::internal(what));
        }
        off.is_none()
    }

    /// Keeps a failure before anything is submitted.
    pub(crate) fn refuse(&self, e: Error) {
        self.card.keep(e);
    }

    /// Streaming multiprocessors: how many blocks a persistent grid has. No result may depend on it.
    pub(crate) fn multiprocessors(&self) -> usize {
        match &self.card.driver {
            Driver::Cuda(cuda) => cuda.info.multiprocessors,
            Driver::Emulated(emulator) => emulator.multiprocessors(),
        }
    }

    /// The architecture that kernels are chosen for: 80 (`mma.sync`, `cp.async`) or 90 (also `wgmma`, TMA).
    pub(crate) fn sm(&self) -> u32 {
        self.card.sm()
    }

    pub(super) fn write<T: Element>(&self, to: &Buffer, data: &[T]) {
        assert_eq!(T::DTYPE, to.dtype(), "a buffer written as another type");
        let data = bytemuck::cast_slice(data);
        self.submit_outside_graphs(
            Fault::Copy,
            "copy to it",
            |queue, _| queue.write(to, data),
            |emulator| emulator.upload(data, to),
        );
    }

    pub(super) fn read<T: Element>(&self, from: &Buffer) -> Coming<T> {
        assert_eq!(T::DTYPE, from.dtype(), "a buffer read as another type");
        let coming = self.submit_outside_graphs(
            Fault::Copy,
            "copy from it",
            |queue, _| queue.read(from).map(Coming::Staged),
            |emulator| {
                let mut values = vec![T::zeroed(); from.len()];
                emulator.download(from, bytemuck::cast_slice_mut(&mut values))?;
                Ok(Coming::Here(values))
            },
        );
        coming.unwrap_or(Coming::Here(Vec::new()))
    }

    pub(super) fn copy(&self, from: &Buffer, to: &Buffer) {
        let (cuda, emulated) =
            (|queue: &Arc<cuda::Queue>, _: &Cuda| queue.copy(from, to), |e: &Emulator| e.copy(from, to));
        self.submit_outside_graphs(Fault::Copy, "copy within it", cuda, emulated);
    }

    pub(super) fn fill(&self, b: &Buffer, byte: u8) {
        let captured = self.note(|capture| capture.steps.push(Step::Fill(b.clone(), byte)));
        self.submit(
            Fault::Launch,
            "fill memory",
            |queue, _| queue.fill(b, byte),
            |emulator| if captured { Ok(()) } else { emulator.fill(b, byte) },
        );
    }

    /// Waits for all that was submitted.
    pub(super) fn synchronize(&self) -> Result<()> {
        self.submit_outside_graphs(Fault::Lost, "finish its work", |queue, _| queue.synchronize(), |_| Ok(()));
        self.card.check()
    }

    /// Marks this point of the queue; nothing to mark where everything runs at submission.
    pub(super) fn mark(&self) -> Option<cuda::Mark> {
        self.submit_outside_graphs(Fault::Lost, "mark its work", |queue, _| queue.mark().map(Some), |_| Ok(None))
            .flatten()
    }

    /// Waits for what was submitted before a mark.
    pub(super) fn wait_for(&self, mark: Option<&cuda::Mark>) -> Result<()> {
        if let Some(mark) = mark {
            self.card.run(|_| mark.wait());
        }
        self.card.check()
    }

    /// Seconds of what `work` submits, by the card's clock; on the emulated GPU by the host's.
    pub(super) fn time(&self, work: impl FnOnce()) -> Result<f64> {
        let begun = Instant::now();
        let first = self.mark();
        work();
        let seconds = match (first, self.mark()) {
            (Some(first), Some(last)) => self.card.run(|_| last.since(&first)),
            _ => Some(begun.elapsed().as_secs_f64()),
        };
        self.card.check()?;
        seconds.ok_or_else(|| Error::internal("a time that was not told"))
    }

    /// Waits for values.
    pub(super) fn wait<T: Element>(&self, coming: Coming<T>) -> Result<Vec<T>> {
        let values = match coming {
            Coming::Here(values) => Some(values),
            Coming::Staged(staged) => self.card.run(|_| staged.wait()),
        };
        self.card.check()?;
        values.ok_or_else(|| Error::internal("values that did not come"))
    }
}

/// Values that a GPU gives back.
pub(super) enum Coming<T> {
    /// Given already.
    Here(Vec<T>),
    /// On their way.
    Staged(cuda::Staged<T>),
}

#[cfg(all(test, emulator))]
mod tests {
    use super::super::{Backend, Device, Stream};
    use super::*;
    use crate::ops::rows;

    fn gpu(s: &Stream) -> &Gpu {
        match s.backend() {
            Backend::Gpu(gpu) => gpu,
            Backend::Cpu(_) => unreachable!("an emulated device"),
        }
    }

    #[test]
    fn memory_is_written_copied_zeroed_read_and_counted() {
        let d = Device::emulated(1).unwrap();
        let s = d.stream();
        let (a, b, c) = (d.upload(&[1u32, 2, 3]), d.alloc(DType::U32, 3), d.zeros(DType::U32, 2));
        assert_eq!(d.allocated_bytes(), 32);
        assert_eq!(s.read::<u32>(&b).wait().unwrap(), [u32::MAX; 3], "fresh memory is poisoned");
        s.write(&a.view(1, 2), &[7u32]);
        s.copy(&a, &b);
        s.zero(&a.view(0, 1));
        assert_eq!(s.read::<u32>(&a).wait().unwrap(), [0, 7, 3]);
        assert_eq!(s.read::<u32>(&b).wait().unwrap(), [1, 7, 3]);
        assert_eq!(s.read::<u32>(&c).wait().unwrap(), [0, 0]);
        drop((a, b, c));
        assert_eq!(d.allocated_bytes(), 0);
    }

    #[test]
    fn the_first_failure_is_kept_and_nothing_runs_after_it() {
        let d = Device::emulated(1).unwrap();
        let (s, other) = (d.stream(), d.stream());
        gpu(&s).launch("no_such_kernel", Launch::linear(1, 32), &[]);
        gpu(&s).launch("nor_this_one", Launch::linear(1, 32), &[]);
        let b = d.upload(&[1.0f32]);
        for said in [s.synchronize().unwrap_err(), other.read::<f32>(&b).wait().unwrap_err()] {
            assert!(said.to_string().contains("no kernel is named no_such_kernel"), "{said}");
        }
    }

    #[test]
    fn memory_that_is_not_there_is_an_error_at_the_next_wait() {
        let d = Device::emulated(1).unwrap();
        let s = d.stream();
        let b = d.alloc(DType::F32, usize::MAX / 8);
        s.zero(&b);
        s.write(&b, &[1.0f32]);
        let said = s.read::<f32>(&b).wait().unwrap_err().to_string();
        assert!(said.contains("no memory for") && said.contains("F32"), "{said}");
        assert_eq!(d.allocated_bytes(), 0);
    }

    #[test]
    fn a_graph_does_what_was_captured_as_often_as_it_is_replayed() {
        let d = Device::emulated(1).unwrap();
        let s = d.stream();
        let (index, from, to) = (d.upload(&[2u32, 0]), d.upload(&[5u32, 6]), d.upload(&[0u32; 3]));
        let now = |to: &Buffer| s.read::<u32>(to).wait().unwrap();
        let graph = s.capture(|s| {
            s.zero(&to);
            rows::put(s, 2, &index, None, &from, &to);
        });
        s.write(&to, &[9u32; 3]);
        assert_eq!(now(&to), [9, 9, 9], "capturing runs nothing");
        for values in [[7u32, 8], [1, 2]] {
            s.write(&from, &values);
            s.replay(&graph);
            assert_eq!(now(&to), [values[1], 0, values[0]]);
        }
        assert!(!Device::cpu(1).stream().has_graphs());
    }

    #[test]
    fn a_graph_keeps_what_it_uses_and_a_capture_that_panics_ends() {
        let d = Device::emulated(1).unwrap();
        let (s, b) = (d.stream(), d.alloc(DType::U32, 1000));
        let graph = s.capture(|s| s.zero(&b));
        let held = d.allocated_bytes();
        drop(b);
        assert_eq!(d.allocated_bytes(), held);
        s.replay(&graph);
        drop(graph);
        assert_eq!(d.allocated_bytes(), 0);
        let panics = std::panic::AssertUnwindSafe(|| s.capture(|_| panic!("amid a capture")));
        assert!(std::panic::catch_unwind(panics).is_err());
        assert_eq!(s.read::<u32>(&d.upload(&[7u32])).wait().unwrap(), [7]);
    }

    #[test]
    fn what_no_graph_can_hold_is_an_error_and_not_left_out() {
        let d = Device::emulated(1).unwrap();
        let (s, b) = (d.stream(), d.upload(&[1u32]));
        s.capture(|s| s.write(&b, &[2u32]));
        let said = s.synchronize().unwrap_err().to_string();
        assert!(said.contains("amid launches that are being captured"), "{said}");
    }

    #[test]
    fn the_workspace_has_parts_of_any_type_and_keeps_its_size() {
        let d = Device::emulated(1).unwrap();
        let s = d.stream();
        let [a, b] = gpu(&s).scratch([(DType::BF16, 3), (DType::U64, 2)]);
        assert!(!a.overlaps(&b) && a.overlaps(&a.view(1, 1)) && (a.len(), b.len()) == (3, 2));
        s.write(&b, &[5u64, 6]);
        let held = d.allocated_bytes();
        let [c] = gpu(&s).scratch([(DType::U8, 512)]);
        assert_eq!((d.allocated_bytes(), c.overlaps(&b)), (held, true));
        assert_eq!(s.read::<u64>(&b).wait().unwrap(), [u64::MAX; 2], "what was in it is gone");
    }
}
