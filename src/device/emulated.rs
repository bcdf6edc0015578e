//! The emulated GPU: the CUDA kernels of `kernels/`, compiled for the host and run by the emulator in `kernels/emulator/`.
//!
//! A launch checks what a GPU would not tell: deadlocks, lanes that part, races on shared memory, asynchronous copies that
//! were not waited for, accesses out of bounds. Each becomes an [`Error`] that names kernel, block, threads and places.
//! Shared and fresh device memory is NaN; warps run in an order that comes from a seed.

use super::{DType, Element};
use crate::{Error, Result};

/// A GPU that is not there. Launches are synchronous.
#[derive(Clone, Copy, Debug)]
pub struct Emulator {
    seed: u64,
    workers: u32,
}

/// Memory of the emulated GPU, NaN when fresh.
#[derive(Debug)]
pub struct Memory {
    ptr: *mut u8,
    dtype: DType,
    len: usize,
}

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

/// A tensor of 16-bit elements, rows without gaps, and the box of it that one copy of the tensor memory accelerator moves.
/// Stands for `CUtensorMap`; `kernels/emulator/tensor_map.h` has the same fields.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug)]
pub struct TensorMap {
    base: u64,
    size: [u64; 3],
    stride: [u64; 2],
    region: [u32; 3],
    rank: u32,
    swizzle: u32,
    reserved: [u32; 15],
}

impl TensorMap {
    /// `size` and `region` (the box) in elements, the innermost dimension first, two or three of them; `swizzle` in bytes.
    ///
    /// # Errors
    /// [`Error::Internal`] when the memory is no such tensor. What the hardware refuses besides is an error of the launch.
    pub fn new(memory: &Memory, size: &[usize], region: &[u32], swizzle: u32) -> Result<TensorMap> {
        let n = size.iter().try_fold(1usize, |n, &s| n.checked_mul(s));
        let fits = memory.dtype.size() == 2 && n.is_some_and(|n| n <= memory.len);
        if !fits || !(2..=3).contains(&size.len()) || region.len() != size.len() {
            return Err(Error::internal(format!("boxes of {region:?} in a tensor of {size:?} in {memory:?}")));
        }
        let at = |i: usize| size.get(i).map_or(1, |&s| s as u64);
        let side = |i: usize| region.get(i).copied().unwrap_or(1);
        Ok(TensorMap {
            base: memory.ptr as u64,
            size: [at(0), at(1), at(2)],
            stride: [at(0) * 2, at(0) * at(1) * 2],
            region: [side(0), side(1), side(2)],
            rank: size.len() as u32,
            swizzle,
            reserved: [0; 15],
        })
    }
}

/// An argument of a kernel. Its type must be the parameter's.
#[derive(Clone, Copy, Debug)]
pub enum Arg<'a> {
    /// A pointer to the memory's first element.
    Memory(&'a Memory),
    /// A null pointer to elements of a type.
    Null(DType),
    /// An `int`.
    I32(i32),
    /// An `unsigned`.
    U32(u32),
    /// A `float`.
    F32(f32),
    /// A tensor map, by value.
    TensorMap(&'a TensorMap),
}

impl Emulator {
    /// An emulated GPU whose warps run in the order that `seed` gives, its blocks spread over a few threads of the host.
    ///
    /// # Errors
    /// [`Error::Limit`] where the crate was built without a C++ compiler.
    pub fn new(seed: u64) -> Result<Emulator> {
        if !cfg!(emulator) {
            return Err(Error::limit(
                "this program was built without the CUDA emulator",
                "install g++ and build it again",
            ));
        }
        // Each worker has stacks for a thousand threads and a map of who touched which byte: a few are enough.
        let workers = std::thread::available_parallelism().map_or(1, |n| n.get()).min(8);
        Ok(Emulator { seed, workers: workers as u32 })
    }

    /// The same with another seed.
    pub fn with_seed(self, seed: u64) -> Emulator {
        Emulator { seed, ..self }
    }

    /// Memory for `len` elements, every byte 0xFF.
    pub fn alloc(&self, dtype: DType, len: usize) -> Result<Memory> {
        let bytes = len.checked_mul(dtype.size());
        let ptr = bytes.map_or(std::ptr::null_mut(), ffi::allocate);
        if ptr.is_null() {
            return Err(Error::limit(format!("no memory for {len} elements of {dtype:?}"), "use a smaller shape"));
        }
        Ok(Memory { ptr, dtype, len })
    }

    /// New memory with a copy of `data`.
    pub fn upload<T: Element>(&self, data: &[T]) -> Result<Memory> {
        let memory = self.alloc(T::DTYPE, data.len())?;
        // SAFETY: both ranges have so many elements, and nobody else has the new one.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr().cast(), memory.ptr, size_of_val(data)) };
        Ok(memory)
    }

    /// Runs the kernel of that name to its end.
    ///
    /// # Errors
    /// [`Error::Internal`] with all that is known when the launch does not fit the kernel, or the kernel does what it must not.
    pub fn launch(&self, kernel: &str, shape: Launch, args: &[Arg<'_>]) -> Result<()> {
        let scalars: Vec<u64> = args.iter().map(Arg::scalar).collect();
        let values: Vec<*const u64> = (args.iter().zip(&scalars))
            .map(|(arg, scalar)| match arg {
                Arg::TensorMap(map) => std::ptr::from_ref::<TensorMap>(map).cast(),
                _ => std::ptr::from_ref(scalar),
            })
            .collect();
        let types: Vec<&'static std::ffi::CStr> = args.iter().map(Arg::type_name).collect();
        ffi::run(kernel, shape, self.seed, self.workers, &types, &values).map_err(Error::internal)
    }
}

impl Memory {
    /// Number of elements.
    #[allow(clippy::len_without_is_empty)] // nobody asks whether memory is empty
    pub fn len(&self) -> usize {
        self.len
    }

    /// A copy of the elements, of which every bit pattern is one.
    ///
    /// # Errors
    /// [`Error::Internal`] when they are of another type.
    pub fn read<T: Element>(&self) -> Result<Vec<T>> {
        if T::DTYPE != self.dtype {
            return Err(Error::internal(format!("memory of {:?} read as {:?}", self.dtype, T::DTYPE)));
        }
        let mut out = vec![T::zeroed(); self.len];
        // SAFETY: so many elements on both sides; launches are synchronous and `Memory` stays on its thread.
        unsafe { std::ptr::copy_nonoverlapping(self.ptr, out.as_mut_ptr().cast::<u8>(), size_of_val(&out[..])) };
        Ok(out)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        ffi::release(self.ptr);
    }
}

impl Arg<'_> {
    /// The bytes of an argument of at most eight, from the lowest on.
    fn scalar(&self) -> u64 {
        match *self {
            Arg::Memory(m) => m.ptr as u64,
            Arg::Null(_) | Arg::TensorMap(_) => 0,
            Arg::I32(v) => u64::from(v as u32),
            Arg::U32(v) => u64::from(v),
            Arg::F32(v) => u64::from(v.to_bits()),
        }
    }

    fn type_name(&self) -> &'static std::ffi::CStr {
        let pointer = |dtype: DType| match dtype {
            DType::F32 => c"f32*",
            DType::BF16 => c"bf16*",
            DType::F16 => c"f16*",
            DType::U8 => c"u8*",
            DType::U32 => c"u32*",
            DType::I32 => c"i32*",
            DType::U64 => c"u64*",
        };
        match *self {
            Arg::Memory(m) => pointer(m.dtype),
            Arg::Null(dtype) => pointer(dtype),
            Arg::I32(_) => c"i32",
            Arg::U32(_) => c"u32",
            Arg::F32(_) => c"f32",
            Arg::TensorMap(_) => c"tensor_map",
        }
    }
}

/// The emulator's functions, `kernels/emulator/launch.h`.
#[cfg(emulator)]
mod ffi {
    use super::Launch;
    use std::ffi::{CStr, CString, c_char, c_int, c_void};

    /// As the emulator's header has it.
    #[repr(C)]
    struct RawLaunch {
        kernel: *const c_char,
        grid: [u32; 3],
        block: [u32; 3],
        shared_bytes: usize,
        seed: u64,
        workers: u32,
        arguments: u32,
        types: *const *const c_char,
        values: *const *const u64,
    }

    unsafe extern "C" {
        fn varft_emulator_allocate(bytes: usize) -> *mut c_void;
        fn varft_emulator_release(memory: *mut c_void);
        fn varft_emulator_run(launch: *const RawLaunch, message: *mut c_char, capacity: usize) -> c_int;
    }

    pub(super) fn allocate(bytes: usize) -> *mut u8 {
        // SAFETY: no conditions.
        unsafe { varft_emulator_allocate(bytes) }.cast()
    }

    pub(super) fn release(memory: *mut u8) {
        // SAFETY: it came from `allocate`, and its only owner is being dropped.
        unsafe { varft_emulator_release(memory.cast()) }
    }

    pub(super) fn run(
        kernel: &str,
        shape: Launch,
        seed: u64,
        workers: u32,
        types: &[&'static CStr],
        values: &[*const u64],
    ) -> Result<(), String> {
        let name = CString::new(kernel).map_err(|_| format!("no kernel is named {kernel:?}"))?;
        let types: Vec<*const c_char> = types.iter().map(|t| t.as_ptr()).collect();
        let launch = RawLaunch {
            kernel: name.as_ptr(),
            grid: shape.grid,
            block: shape.block,
            shared_bytes: shape.shared_bytes,
            seed,
            workers,
            arguments: types.len() as u32,
            types: types.as_ptr(),
            values: values.as_ptr(),
        };
        let mut message = vec![0u8; 8192];
        // SAFETY: all pointers live through the call, types and values have `arguments` entries, and the emulator runs a
        // kernel only when the types are its parameters'.
        let failed = unsafe { varft_emulator_run(&launch, message.as_mut_ptr().cast(), message.len()) };
        if failed == 0 {
            return Ok(());
        }
        Err(CStr::from_bytes_until_nul(&message).unwrap_or_default().to_string_lossy().into_owned())
    }
}

/// No emulator was built: [`Emulator::new`](super::Emulator::new) has said so, and nothing below it is reached.
#[cfg(not(emulator))]
mod ffi {
    use super::Launch;
    use std::ffi::CStr;

    pub(super) fn allocate(_: usize) -> *mut u8 {
        std::ptr::null_mut()
    }

    pub(super) fn release(_: *mut u8) {}

    pub(super) fn run(_: &str, _: Launch, _: u64, _: u32, _: &[&'static CStr], _: &[*const u64]) -> Result<(), String> {
        Err("this program was built without the CUDA emulator".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_emulator_is_there_or_says_what_is_missing() {
        match Emulator::new(1) {
            Ok(gpu) => assert_eq!(gpu.upload(&[1.5f32]).unwrap().read::<f32>().unwrap(), [1.5]),
            Err(e) => assert!(e.to_string().contains("install g++"), "{e}"),
        }
    }
}
