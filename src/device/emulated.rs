//! The emulated GPU: the CUDA kernels of `kernels/`, compiled for the host and run by the emulator in `kernels/emulator/`.
//!
//! A launch checks what a GPU would not tell: deadlocks, lanes that part, races on shared memory, asynchronous copies that
//! were not waited for, accesses out of bounds. Each becomes an [`Error`] that names kernel, block, threads and places.
//! Shared and fresh device memory is NaN; warps run in an order that comes from a seed.

use super::gpu::{Arg, Launch};
use super::matmul::{self, Matmul};
use super::tensor_map::{TensorMap, check_boxes};
use super::{Buffer, DType, Element};
use crate::{Error, Result};
use std::ffi::CStr;
use std::ptr::NonNull;
use std::sync::Arc;

/// A tensor of bf16 elements and a box of it, as `kernels/emulator/tensor_map.h` has them.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct EmulatedMap {
    base: u64,
    size: [u64; 3],
    stride: [u64; 2],
    region: [u32; 3],
    rank: u32,
    swizzle: u32,
    reserved: [u32; 15],
}

/// A GPU that is not there. Launches are synchronous.
#[derive(Clone, Copy, Debug)]
pub struct Emulator {
    seed: u64,
    workers: u32,
    sm: u32,
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
        Ok(Emulator { seed, workers: workers as u32, sm: 90 })
    }

    /// The same with another seed.
    pub fn with_seed(self, seed: u64) -> Emulator {
        Emulator { seed, ..self }
    }

    /// The same of another architecture, 80 or 90.
    pub fn with_sm(self, sm: u32) -> Emulator {
        Emulator { sm, ..self }
    }

    /// What decides the order of warps.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The architecture.
    pub fn sm(&self) -> u32 {
        self.sm
    }

    /// One to seven, as the seed has it: nothing may depend on how many there are.
    pub fn multiprocessors(&self) -> usize {
        1 + (self.seed % 7) as usize
    }

    /// Memory for `len` elements, every byte 0xFF.
    ///
    /// # Errors
    /// [`Error::Limit`] where there is not so much.
    pub fn alloc(&self, dtype: DType, len: usize) -> Result<Buffer> {
        Buffer::emulated(dtype, len, Arc::default())
            .ok_or_else(|| Error::limit(format!("no memory for {len} elements of {dtype:?}"), "use a smaller shape"))
    }

    /// New memory with a copy of `data`.
    ///
    /// # Errors
    /// As [`alloc`](Self::alloc).
    pub fn copied<T: Element>(&self, data: &[T]) -> Result<Buffer> {
        let memory = self.alloc(T::DTYPE, data.len())?;
        self.upload(bytemuck::cast_slice(data), &memory)?;
        Ok(memory)
    }

    /// A copy of the elements.
    ///
    /// # Errors
    /// [`Error::Internal`] when they are of another type.
    pub fn read<T: Element>(&self, memory: &Buffer) -> Result<Vec<T>> {
        if T::DTYPE != memory.dtype() {
            return Err(Error::internal(format!("memory of {:?} read as {:?}", memory.dtype(), T::DTYPE)));
        }
        let mut out = vec![T::zeroed(); memory.len()];
        self.download(memory, bytemuck::cast_slice_mut(&mut out))?;
        Ok(out)
    }

    pub(super) fn upload(&self, from: &[u8], to: &Buffer) -> Result<()> {
        // SAFETY: launches are synchronous, and whoever shares a stream takes turns.
        unsafe { to.bytes_mut()[..from.len()].copy_from_slice(from) };
        Ok(())
    }

    pub(super) fn download(&self, from: &Buffer, to: &mut [u8]) -> Result<()> {
        // SAFETY: as in `upload`.
        unsafe { to.copy_from_slice(from.bytes_mut()) };
        Ok(())
    }

    pub(super) fn copy(&self, from: &Buffer, to: &Buffer) -> Result<()> {
        // SAFETY: as in `upload`; the two are apart.
        unsafe { to.bytes_mut().copy_from_slice(from.bytes_mut()) };
        Ok(())
    }

    pub(super) fn fill(&self, to: &Buffer, byte: u8) -> Result<()> {
        // SAFETY: as in `upload`.
        unsafe { to.bytes_mut().fill(byte) };
        Ok(())
    }

    /// The counterpart of cuBLASLt.
    pub(super) fn matmul(&self, product: &Matmul<'_>) -> Result<()> {
        let Matmul { a, b, c, .. } = product;
        if a.dtype() != DType::BF16 || b.dtype() != DType::BF16 {
            return Err(Error::internal(format!("operands of other types: {product:?}")));
        }
        // SAFETY: as in `upload`.
        let (a, b, to) = unsafe { (a.bytes_mut(), b.bytes_mut(), c.bytes_mut()) };
        let (a, b) = (bytemuck::cast_slice(a), bytemuck::cast_slice(b));
        match c.dtype() {
            DType::F32 => {
                let to = bytemuck::cast_slice_mut::<u8, f32>(to);
                matmul::multiply(product, a, b, to)
            }
            DType::BF16 => {
                let to = bytemuck::cast_slice_mut::<u8, half::bf16>(to);
                matmul::multiply(product, a, b, to)
            }
            other => return Err(Error::internal(format!("a product into {other:?}"))),
        }
        Ok(())
    }

    /// What stands for a `CUtensorMap`. `size` and `region` (the box) in elements, the innermost dimension first, two or three of them; `swizzle` in bytes.
    ///
    /// # Errors
    /// [`Error::Internal`] when the memory is no such tensor, or the hardware copies no such boxes.
    pub fn tensor_map(&self, memory: &Buffer, size: &[usize], region: &[u32], swizzle: u32) -> Result<TensorMap> {
        check_boxes(memory, size, region, swizzle)?;
        let at = |i: usize| size.get(i).map_or(1, |&s| s as u64);
        let side = |i: usize| region.get(i).copied().unwrap_or(1);
        Ok(TensorMap::opaque(bytemuck::cast(EmulatedMap {
            base: memory.address() as u64,
            size: [at(0), at(1), at(2)],
            stride: [at(0) * 2, at(0) * at(1) * 2],
            region: [side(0), side(1), side(2)],
            rank: size.len() as u32,
            swizzle,
            reserved: [0; 15],
        })))
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
        let types: Vec<&'static CStr> = args.iter().map(Arg::type_name).collect();
        ffi::run(kernel, shape, self.seed, self.workers, &types, &values).map_err(Error::internal)
    }
}

/// Memory of so many bytes, every one 0xFF, that kernels may touch.
pub(super) fn allocate(bytes: usize) -> Option<NonNull<u8>> {
    NonNull::new(ffi::allocate(bytes))
}

/// Gives back what [`allocate`] gave.
pub(super) fn release(memory: NonNull<u8>) {
    ffi::release(memory.as_ptr());
}

/// That arguments have the types of a kernel's parameters, as far as this program knows them: where it has the emulator.
///
/// # Errors
/// [`Error::Internal`] with both.
pub(super) fn check_arguments(kernel: &str, args: &[Arg<'_>]) -> Result<()> {
    let Some(types) = ffi::parameters(kernel) else { return Ok(()) };
    let given: Vec<&CStr> = args.iter().map(Arg::type_name).collect();
    if types == given {
        return Ok(());
    }
    let list = |types: &[&CStr]| types.iter().map(|t| t.to_string_lossy()).collect::<Vec<_>>().join(", ");
    Err(Error::internal(format!("kernel {kernel} takes ({}), not ({})", list(&types), list(&given))))
}

impl Arg<'_> {
    fn type_name(&self) -> &'static CStr {
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
            Arg::Buffer(b) => pointer(b.dtype()),
            Arg::Null(dtype) => pointer(dtype),
            Arg::I32(_) | Arg::Len(_) => c"i32",
            Arg::U32(_) => c"u32",
            Arg::U64(_) => c"u64",
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
        fn varft_emulator_parameters(kernel: *const c_char) -> *const *const c_char;
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

    /// The types of a kernel's parameters; `None`: there is no such kernel.
    pub(super) fn parameters(kernel: &str) -> Option<Vec<&'static CStr>> {
        let name = CString::new(kernel).ok()?;
        // SAFETY: a list of strings that live as long as the program, and a null pointer after the last.
        unsafe {
            let mut next = varft_emulator_parameters(name.as_ptr());
            let mut types = Vec::new();
            if next.is_null() {
                return None;
            }
            while !(*next).is_null() {
                types.push(CStr::from_ptr(*next));
                next = next.add(1);
            }
            Some(types)
        }
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

    pub(super) fn parameters(_: &str) -> Option<Vec<&'static CStr>> {
        None
    }

    pub(super) fn run(_: &str, _: Launch, _: u64, _: u32, _: &[&'static CStr], _: &[*const u64]) -> Result<(), String> {
        Err("this program was built without the CUDA emulator".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_checked_against_the_kernels_own() {
        let (pointer, n) = (Arg::Null(DType::BF16), Arg::Len(1));
        let swiglu = [pointer, pointer, n, n];
        assert!(check_arguments("swiglu_forward", &swiglu).is_ok() && check_arguments("no_such_kernel", &[]).is_ok());
        if cfg!(emulator) {
            let said = check_arguments("swiglu_forward", &swiglu[1..]).unwrap_err().to_string();
            assert!(said.contains("takes (bf16*, bf16*, i32, i32), not (bf16*, i32, i32)"), "{said}");
        }
    }

    #[test]
    fn an_emulator_is_there_or_says_what_is_missing() {
        match Emulator::new(1) {
            Ok(gpu) => assert_eq!(gpu.read::<f32>(&gpu.copied(&[1.5f32]).unwrap()).unwrap(), [1.5]),
            Err(e) => assert!(e.to_string().contains("install g++"), "{e}"),
        }
    }
}
