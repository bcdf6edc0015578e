use std::alloc::{Layout, alloc, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// The type of a buffer's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

/// One allocation: 64-byte aligned, zeroed by the allocator.
struct Storage {
    ptr: NonNull<u8>,
    layout: Layout,
    gauge: Arc<AtomicUsize>,
}
// SAFETY: plain memory; access is ordered by the stream that runs the launches which touch it.
unsafe impl Send for Storage {}
// SAFETY: as above.
unsafe impl Sync for Storage {}

impl Drop for Storage {
    fn drop(&mut self) {
        self.gauge.fetch_sub(self.layout.size(), Ordering::Relaxed);
        // SAFETY: allocated with this layout in `Buffer::new`.
        unsafe { dealloc(self.ptr.as_ptr(), self.layout) }
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
        Buffer { storage: Arc::new(Storage { ptr, layout, gauge }), offset: 0, len, dtype }
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
        // Views keep the type, so both count in the same elements.
        let (start, end) = (self.offset.max(other.offset), (self.offset + self.len).min(other.offset + other.len));
        Arc::ptr_eq(&self.storage, &other.storage) && start < end
    }

    /// The elements, for use inside a launch.
    ///
    /// # Safety
    /// Nothing may write this range during the borrow: call it inside a launch whose stream orders the writers, or when
    /// nothing is in flight.
    pub unsafe fn get<T: Element>(&self) -> &[T] {
        assert_eq!(T::DTYPE, self.dtype, "a buffer read as another type");
        // SAFETY: in bounds by construction, aligned by ALIGN, any bit pattern is a T (Pod), no writer by contract.
        unsafe {
            std::slice::from_raw_parts(self.storage.ptr.as_ptr().add(self.offset * self.dtype.size()).cast(), self.len)
        }
    }

    /// The elements for writing, for use inside a launch.
    ///
    /// # Safety
    /// As [`Buffer::get`], and nothing else may read this range during the borrow.
    #[allow(clippy::mut_from_ref)] // clones share the memory, so what is exclusive is the launch, not the handle
    pub unsafe fn get_mut<T: Element>(&self) -> &mut [T] {
        assert_eq!(T::DTYPE, self.dtype, "a buffer written as another type");
        // SAFETY: as in `get`, exclusive by contract.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.storage.ptr.as_ptr().add(self.offset * self.dtype.size()).cast(),
                self.len,
            )
        }
    }

    /// # Safety
    /// As [`Buffer::get_mut`].
    #[allow(clippy::mut_from_ref)] // as `get_mut`
    pub(super) unsafe fn bytes_mut(&self) -> &mut [u8] {
        // SAFETY: as in `get_mut`.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.storage.ptr.as_ptr().add(self.offset * self.dtype.size()),
                self.len * self.dtype.size(),
            )
        }
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer<{:?}; {}>", self.dtype, self.len)
    }
}
