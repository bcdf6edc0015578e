use super::cuda::Cuda;
use super::emulated;
use std::alloc::{Layout, alloc, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// The type of a buffer's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // the names say it
pub enum DType {
    F32,
    BF16,
    F16,
    U8,
    U32,
    I32,
    U64,
}

impl DType {
    /// Bytes per element.
    pub fn size(self) -> usize {
        match self {
            DType::U8 => 1,
            DType::BF16 | DType::F16 => 2,
            DType::F32 | DType::U32 | DType::I32 => 4,
            DType::U64 => 8,
        }
    }
}

/// A Rust type that a [`Buffer`] can hold.
pub trait Element: bytemuck::Pod + Send + Sync {
    /// Its [`DType`].
    const DTYPE: DType;
}
macro_rules! element {
    ($($t:ty => $d:ident),*) => { $(impl Element for $t { const DTYPE: DType = DType::$d; })* };
}
element!(f32 => F32, half::bf16 => BF16, half::f16 => F16, u8 => U8, u32 => U32, i32 => I32, u64 => U64);

/// Whose memory it is.
enum Place {
    /// The host's: 64-byte aligned, zeroed by the allocator.
    Host(Layout),
    /// The emulated GPU's.
    Emulated,
    /// A card's; the pointer is an address there.
    Cuda(Arc<Cuda>),
    /// Nobody's: what a GPU without room for it gives. It has failed then, and nothing touches its buffers any more.
    Nowhere,
}

/// One allocation.
struct Storage {
    ptr: NonNull<u8>,
    bytes: usize,
    place: Place,
    gauge: Arc<AtomicUsize>,
}
// SAFETY: plain memory; access is ordered by the stream that runs the launches which touch it.
unsafe impl Send for Storage {}
// SAFETY: as above.
unsafe impl Sync for Storage {}

impl Drop for Storage {
    fn drop(&mut self) {
        self.gauge.fetch_sub(self.bytes, Ordering::Relaxed);
        match &self.place {
            // SAFETY: allocated with this layout in `Buffer::new`.
            Place::Host(layout) => unsafe { dealloc(self.ptr.as_ptr(), *layout) },
            Place::Emulated => emulated::release(self.ptr),
            Place::Cuda(card) => card.release(self.ptr.as_ptr() as u64),
            Place::Nowhere => {}
        }
    }
}

/// A typed range of a device's memory. Cloning shares the memory; it is freed with the last handle.
///
/// A buffer does not know who writes it: launches on one [`Stream`](super::Stream) run in order, and that order is what
/// keeps readers and writers apart. Element counts, never bytes, unless a name says so.
#[derive(Clone)]
pub struct Buffer {
    storage: Arc<Storage>,
    /// In elements.
    offset: usize,
    /// In elements.
    len: usize,
    dtype: DType,
}

const ALIGN: usize = 64;
/// Large buffers start on a huge-page boundary: weights are read end to end at every decode step.
const HUGE: usize = 2 << 20;

impl Buffer {
    pub(super) fn new(dtype: DType, len: usize, gauge: Arc<AtomicUsize>) -> Buffer {
        let bytes =
            len.checked_mul(dtype.size()).expect("a buffer of at most usize::MAX bytes").max(1).next_multiple_of(ALIGN);
        let align = if bytes >= HUGE { HUGE } else { ALIGN };
        let layout = Layout::from_size_align(bytes, align).expect("a buffer of at most isize::MAX bytes");
        let fail = || handle_alloc_error(layout);
        let ptr = if bytes >= HUGE {
            // SAFETY: the layout has a non-zero size.
            let ptr = NonNull::new(unsafe { alloc(layout) }).unwrap_or_else(fail);
            // Before the first touch: a page that is there already stays as small as it is.
            #[cfg(target_os = "linux")]
            // SAFETY: advice on memory that we own; failure is harmless.
            unsafe {
                libc::madvise(ptr.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE)
            };
            // SAFETY: `bytes` bytes that we own.
            unsafe { ptr.as_ptr().write_bytes(0, bytes) };
            ptr
        } else {
            // SAFETY: as above.
            NonNull::new(unsafe { alloc_zeroed(layout) }).unwrap_or_else(fail)
        };
        gauge.fetch_add(bytes, Ordering::Relaxed);
        let storage = Storage { ptr, bytes, place: Place::Host(layout), gauge };
        Buffer { storage: Arc::new(storage), offset: 0, len, dtype }
    }

    /// `len` elements of the emulated GPU's memory, 256-byte aligned, every byte 0xFF; `None` when there is not so much.
    pub(super) fn emulated(dtype: DType, len: usize, gauge: Arc<AtomicUsize>) -> Option<Buffer> {
        let bytes = len.checked_mul(dtype.size())?;
        let storage = Storage { ptr: emulated::allocate(bytes)?, bytes, place: Place::Emulated, gauge };
        storage.gauge.fetch_add(bytes, Ordering::Relaxed);
        Some(Buffer { storage: Arc::new(storage), offset: 0, len, dtype })
    }

    /// `len` elements of a card's memory, holding anything; `None` when there is not so much.
    pub(super) fn cuda(card: &Arc<Cuda>, dtype: DType, len: usize, gauge: Arc<AtomicUsize>) -> Option<Buffer> {
        let bytes = len.checked_mul(dtype.size())?;
        let ptr = NonNull::new(card.allocate(bytes)? as *mut u8)?;
        let storage = Storage { ptr, bytes, place: Place::Cuda(card.clone()), gauge };
        storage.gauge.fetch_add(bytes, Ordering::Relaxed);
        Some(Buffer { storage: Arc::new(storage), offset: 0, len, dtype })
    }

    /// A buffer without memory.
    pub(super) fn nowhere(dtype: DType, len: usize, gauge: Arc<AtomicUsize>) -> Buffer {
        let storage = Storage { ptr: NonNull::dangling(), bytes: 0, place: Place::Nowhere, gauge };
        Buffer { storage: Arc::new(storage), offset: 0, len, dtype }
    }

    /// `len` elements of another type, from byte `start` of a buffer of bytes on: parts of a workspace. Panics if they are
    /// not all there, or not aligned.
    pub(super) fn part(&self, start: usize, dtype: DType, len: usize) -> Buffer {
        let (first, size) = (self.offset + start, dtype.size());
        assert!(self.dtype == DType::U8 && first.is_multiple_of(size) && start + len * size <= self.len);
        Buffer { storage: self.storage.clone(), offset: first / size, len, dtype }
    }

    /// The memory of f32 elements as twice as many bf16 ones, for what takes their place.
    pub(crate) fn as_bf16(&self) -> Buffer {
        assert_eq!(self.dtype, DType::F32, "f32 elements");
        Buffer { storage: self.storage.clone(), offset: 2 * self.offset, len: 2 * self.len, dtype: DType::BF16 }
    }

    /// Number of elements.
    #[allow(clippy::len_without_is_empty)] // nobody asks whether a buffer is empty
    pub fn len(&self) -> usize {
        self.len
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The elements `[start, start + len)` of this buffer, sharing its memory. Panics if they are not all there.
    pub fn view(&self, start: usize, len: usize) -> Buffer {
        assert!(
            start.checked_add(len).is_some_and(|e| e <= self.len),
            "view [{start}, +{len}) of a buffer of {} elements",
            self.len
        );
        Buffer { storage: self.storage.clone(), offset: self.offset + start, len, dtype: self.dtype }
    }

    /// Whether both handles share an element; ranges of one allocation that lie beside each other do not.
    pub fn overlaps(&self, other: &Buffer) -> bool {
        let ends = |b: &Buffer| (b.offset * b.dtype.size(), (b.offset + b.len) * b.dtype.size());
        let ((start, end), (other_start, other_end)) = (ends(self), ends(other));
        Arc::ptr_eq(&self.storage, &other.storage) && start.max(other_start) < end.min(other_end)
    }

    /// Bytes of all elements.
    pub(super) fn bytes(&self) -> usize {
        self.len * self.dtype.size()
    }

    /// The device's address of the first element.
    pub(super) fn address(&self) -> *mut u8 {
        self.storage.ptr.as_ptr().wrapping_add(self.offset * self.dtype.size())
    }

    /// The largest power of two of bytes, at most 256, at a multiple of which the buffer begins.
    pub(crate) fn alignment(&self) -> usize {
        1 << (self.address() as usize | 256).trailing_zeros()
    }

    /// Asserts that the host may look at the memory.
    fn on_host(&self) {
        assert!(matches!(self.storage.place, Place::Host(_)), "the host touches a GPU's memory");
    }

    /// The elements, for use inside a launch.
    ///
    /// # Safety
    /// Nothing may write this range during the borrow: call it inside a launch whose stream orders the writers, or when
    /// nothing is in flight.
    pub unsafe fn get<T: Element>(&self) -> &[T] {
        assert_eq!(T::DTYPE, self.dtype, "a buffer read as another type");
        self.on_host();
        // SAFETY: in bounds by construction, aligned by ALIGN, any bit pattern is a T (Pod), no writer by contract.
        unsafe { std::slice::from_raw_parts(self.address().cast(), self.len) }
    }

    /// The elements for writing, for use inside a launch.
    ///
    /// # Safety
    /// As [`Buffer::get`], and nothing else may read this range during the borrow.
    #[allow(clippy::mut_from_ref)] // clones share the memory, so what is exclusive is the launch, not the handle
    pub unsafe fn get_mut<T: Element>(&self) -> &mut [T] {
        assert_eq!(T::DTYPE, self.dtype, "a buffer written as another type");
        self.on_host();
        // SAFETY: as in `get`, exclusive by contract.
        unsafe { std::slice::from_raw_parts_mut(self.address().cast(), self.len) }
    }

    /// The bytes, of the host's memory or of an emulated GPU's.
    ///
    /// # Safety
    /// As [`Buffer::get_mut`].
    #[allow(clippy::mut_from_ref)] // as `get_mut`
    pub(super) unsafe fn bytes_mut(&self) -> &mut [u8] {
        // SAFETY: as in `get_mut`; both kinds of memory are the process's own.
        unsafe { std::slice::from_raw_parts_mut(self.address(), self.len * self.dtype.size()) }
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer<{:?}; {}>", self.dtype, self.len)
    }
}
