//! NVIDIA cards through the CUDA driver, which is loaded at run time: a program that was built anywhere starts without one.
//!
//! **No card has run this code yet**: what is tested is that it says what is missing where there is none.

mod blas;
mod queue;

pub(super) use queue::{Graph, Mark, Queue, Staged};

use super::emulated;
use super::fault::{self, MEMORY_MEND};
use super::gpu::{Arg, Launch};
use super::matmul::Matmul;
use super::tensor_map::{TensorMap, check_boxes};
use super::{Buffer, DType};
use crate::{Error, Result};
use blas::Blas;
use cudarc::driver::sys::{CUcontext, CUdevice, CUdevice_attribute_enum as Attribute, CUfunction, CUmodule};
use cudarc::driver::{result, sys};
use std::collections::HashMap;
use std::ffi::CString;
use std::sync::{Arc, Mutex, PoisonError};

/// The kernels of each file for every architecture that they are built for, and as PTX for later ones.
mod built {
    include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));
}

/// The oldest driver that runs these kernels: CUDA 13.0's, 580.
const DRIVER: i32 = 13000;
/// The first architecture that has what the kernels use.
const FIRST_SM: i32 = 80;

/// What `varft doctor` prints about a card.
#[derive(Clone, Debug)]
pub struct CardInfo {
    /// Its name.
    pub name: String,
    /// Its compute capability, such as 90.
    pub capability: u32,
    /// Streaming multiprocessors.
    pub multiprocessors: usize,
    /// Bytes of memory, free and in all.
    pub memory: (u64, u64),
    /// The CUDA version that the driver speaks, such as 13000.
    pub driver: i32,
}

/// One card, its context and its kernels.
pub(super) struct Cuda {
    device: CUdevice,
    context: CUcontext,
    pub info: CardInfo,
    modules: Vec<CUmodule>,
    functions: Mutex<HashMap<String, Function>>,
    blas: Mutex<Option<Blas>>,
}
// SAFETY: handles of the driver, which may be used from any thread that has made the context current.
unsafe impl Send for Cuda {}
// SAFETY: as above.
unsafe impl Sync for Cuda {}

/// A kernel, and the bytes of each of its parameters.
#[derive(Clone)]
struct Function {
    handle: CUfunction,
    sizes: Arc<[usize]>,
}
// SAFETY: as `Cuda`.
unsafe impl Send for Function {}

impl Function {
    /// That a launch has the kernel's parameters: so many, of these sizes, and of these types where the emulator was built, which
    /// knows them. The driver takes what it needs from wherever it is pointed to.
    fn check(&self, kernel: &str, args: &[Arg<'_>]) -> Result<()> {
        let sizes = args.iter().map(Arg::size);
        if !sizes.clone().eq(self.sizes.iter().copied()) {
            let sizes: Vec<usize> = sizes.collect();
            let what = format!("kernel {kernel} takes parameters of {:?} bytes, not of {sizes:?}", self.sizes);
            return Err(Error::internal(what));
        }
        emulated::check_arguments(kernel, args)
    }
}

/// An error of the driver's; `what` was being done.
fn failed(what: &str, e: result::DriverError) -> Error {
    use sys::CUresult as E;
    // Its name rather than its text, which only a driver that works could give.
    let result::DriverError(e) = e;
    match e {
        E::CUDA_ERROR_OUT_OF_MEMORY => Error::limit(format!("the GPU has no memory to {what}"), MEMORY_MEND),
        E::CUDA_ERROR_NO_BINARY_FOR_GPU
        | E::CUDA_ERROR_INVALID_PTX
        | E::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
        | E::CUDA_ERROR_JIT_COMPILER_NOT_FOUND
        | E::CUDA_ERROR_INVALID_IMAGE => Error::limit(
            format!("this program has no kernels for this card and driver: the driver cannot {what}: {e:?}"),
            "install a newer driver, or build the program with a newer nvcc, or use the processor (--device cpu)",
        ),
        E::CUDA_ERROR_DEINITIALIZED
        | E::CUDA_ERROR_NO_DEVICE
        | E::CUDA_ERROR_DEVICE_UNAVAILABLE
        | E::CUDA_ERROR_ECC_UNCORRECTABLE
        | E::CUDA_ERROR_NVLINK_UNCORRECTABLE
        | E::CUDA_ERROR_HARDWARE_STACK_ERROR
        | E::CUDA_ERROR_OPERATING_SYSTEM
        | E::CUDA_ERROR_CONTEXT_IS_DESTROYED
        | E::CUDA_ERROR_LAUNCH_TIMEOUT
        | E::CUDA_ERROR_LAUNCH_FAILED
        | E::CUDA_ERROR_SYSTEM_NOT_READY
        | E::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH
        | E::CUDA_ERROR_EXTERNAL_DEVICE
        | E::CUDA_ERROR_UNKNOWN => fault::lost(what, format!("{e:?}")),
        _ => Error::internal(format!("the CUDA driver cannot {what}, or something before it failed: {e:?}")),
    }
}

/// That a driver that speaks so new a CUDA runs these kernels.
fn check_driver(version: i32) -> Result<()> {
    if version >= DRIVER {
        return Ok(());
    }
    let (major, minor) = (version / 1000, version % 1000 / 10);
    Err(Error::limit(
        format!("NVIDIA's driver is too old: it speaks CUDA {major}.{minor}, and 13.0 is needed"),
        "install driver 580 or later, or use the processor (--device cpu)",
    ))
}

/// That a card of that compute capability runs them.
fn check_card(name: &str, major: i32, minor: i32) -> Result<()> {
    if 10 * major + minor >= FIRST_SM {
        return Ok(());
    }
    Err(Error::limit(
        format!("{name} is too old: its compute capability is {major}.{minor}, and 8.0 is needed"),
        "use a card of the Ampere generation or later, or the processor (--device cpu)",
    ))
}

/// That there are kernels in this program.
fn check_built(fatbins: &[(&str, &[u8])]) -> Result<()> {
    if !fatbins.is_empty() {
        return Ok(());
    }
    Err(Error::limit(
        "this program was built without nvcc, so it has no kernels for a GPU",
        "build it where nvcc 13 is on the PATH (or NVCC names it), or use the processor (--device cpu)",
    ))
}

/// What the kernels in this program are built for: machine code of architectures (`sm_80`), and intermediate code from which the
/// driver makes that of later ones (`compute_80`). Empty where it was built without nvcc.
pub fn architectures() -> &'static [&'static str] {
    built::ARCHITECTURES
}

/// Whether NVIDIA's driver is on this machine, of whatever version.
pub fn has_driver() -> bool {
    // SAFETY: looks for a library.
    unsafe { sys::is_culib_present() }
}

/// That a driver is there, new enough, and started; its version.
fn driver() -> Result<i32> {
    if !has_driver() {
        return Err(Error::limit(
            "there is no NVIDIA driver on this machine (libcuda.so)",
            "install NVIDIA's driver, version 580 or later, or use the processor (--device cpu)",
        ));
    }
    let mut version = 0;
    // SAFETY: one int is written.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(|e| failed("tell its version", e))?;
    check_driver(version)?;
    result::init().map_err(|e| {
        Error::limit(
            format!("NVIDIA's driver does not start: {e}"),
            "look at what nvidia-smi says, or use the processor (--device cpu)",
        )
    })?;
    Ok(version)
}

/// Whether there are cards of NVIDIA's on this machine, of use or not: as its driver counts them, or as the bus shows them.
pub fn has_card() -> bool {
    let counted = || result::init().is_ok() && result::device::get_count().is_ok_and(|n| n > 0);
    has_driver() && counted() || on_bus()
}

/// Whether a display controller on the bus is NVIDIA's.
fn on_bus() -> bool {
    let devices = std::fs::read_dir("/sys/bus/pci/devices").into_iter().flatten().flatten();
    devices.map(|d| d.path()).any(|d| {
        let says = |file: &str, start: &str| std::fs::read_to_string(d.join(file)).is_ok_and(|s| s.starts_with(start));
        says("vendor", "0x10de") && says("class", "0x03")
    })
}

/// What the driver says of card `ordinal`, if the kernels run on it; nothing is made on the card, and its memory is not asked for.
///
/// # Errors
/// [`Error::Limit`] that says what is missing: kernels in this program, a driver, a card, a newer card.
pub fn usable_card(ordinal: usize) -> Result<CardInfo> {
    find(ordinal).map(|(_, info)| info)
}

/// Card `ordinal`, if the kernels run on it.
fn find(ordinal: usize) -> Result<(CUdevice, CardInfo)> {
    check_built(built::FATBINS)?;
    let version = driver()?;
    let count = result::device::get_count().map_err(|e| failed("count its cards", e))?;
    let device = i32::try_from(ordinal).ok().filter(|&o| o < count);
    let Some(device) = device else {
        return Err(Error::limit(
            format!("there is no card {ordinal}: the driver shows {count}"),
            "look at CUDA_VISIBLE_DEVICES, or use the processor (--device cpu)",
        ));
    };
    let device = result::device::get(device).map_err(|e| failed("open the card", e))?;
    let name = result::device::get_name(device).map_err(|e| failed("name the card", e))?;
    let ask = |a: Attribute| {
        // SAFETY: the device is one.
        unsafe { result::device::get_attribute(device, a) }.map_err(|e| failed("describe the card", e))
    };
    let major = ask(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = ask(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let capability = 10 * major + minor;
    check_card(&name, major, minor)?;
    let multiprocessors = ask(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize;
    let info = CardInfo { name, capability: capability as u32, multiprocessors, memory: (0, 0), driver: version };
    Ok((device, info))
}

impl Cuda {
    /// Card `ordinal`.
    ///
    /// # Errors
    /// As [`usable_card`]; and where the driver cannot begin work on it.
    pub fn open(ordinal: usize) -> Result<Cuda> {
        let (device, info) = find(ordinal)?;
        // SAFETY: the device is one.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(|e| failed("make a context", e))?;
        let mut card =
            Cuda { device, context, info, modules: Vec::new(), functions: Mutex::default(), blas: Mutex::default() };
        card.enter()?;
        let (free, total) = result::mem_get_info().map_err(|e| failed("tell its memory", e))?;
        card.info.memory = (free as u64, total as u64);
        for (file, image) in built::FATBINS {
            // SAFETY: a whole fat binary, which lives as long as the program.
            let module = unsafe { result::module::load_data(image.as_ptr().cast()) };
            card.modules.push(module.map_err(|e| failed(&format!("load the kernels of {file}"), e))?);
        }
        Ok(card)
    }

    /// Makes the context this thread's.
    fn enter(&self) -> Result<()> {
        // SAFETY: the context lives as long as `self`.
        unsafe { result::ctx::set_current(self.context) }.map_err(|e| failed("use its context", e))
    }

    /// The architecture that kernels are chosen for.
    pub fn sm(&self) -> u32 {
        if self.info.capability / 10 == 9 { 90 } else { 80 }
    }

    /// Bytes that are free.
    pub fn free_bytes(&self) -> Option<u64> {
        self.enter().ok()?;
        result::mem_get_info().ok().map(|(free, _)| free as u64)
    }

    /// Memory of so many bytes, holding anything; `None` where there is not so much.
    pub fn allocate(&self, bytes: usize) -> Option<u64> {
        self.enter().ok()?;
        // SAFETY: memory that nobody reads before it is written.
        unsafe { result::malloc_sync(bytes.max(1)) }.ok()
    }

    /// Gives back what [`allocate`](Self::allocate) gave; waits for the work that uses it.
    pub fn release(&self, address: u64) {
        if self.enter().is_ok() {
            // SAFETY: it came from `allocate`, and its only owner is being dropped. An error here is an earlier launch's, which
            // its own wait reports.
            let _ = unsafe { result::free_sync(address) };
        }
    }

    /// The kernel of that name, allowed as much shared memory as a block may have.
    fn function(&self, name: &str) -> Result<Function> {
        let mut known = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(f) = known.get(name) {
            return Ok(f.clone());
        }
        let symbol = CString::new(name).map_err(|_| Error::internal(format!("no kernel is named {name:?}")))?;
        let found = self.modules.iter().find_map(|&module| {
            // SAFETY: the module is loaded.
            unsafe { result::module::get_function(module, symbol.clone()) }.ok()
        });
        let f = found.ok_or_else(|| Error::internal(format!("no kernel is named {name}")))?;
        // SAFETY: the device is one.
        let most = unsafe {
            result::device::get_attribute(self.device, Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
        };
        use sys::CUfunction_attribute_enum as F;
        // SAFETY: the function is one of a loaded module.
        let fixed = unsafe { result::function::get_function_attribute(f, F::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES) };
        let room = most.and_then(|most| Ok(most - fixed?)).map_err(|e| failed("describe a kernel", e))?;
        // SAFETY: as above.
        unsafe {
            result::function::set_function_attribute(f, F::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, room)
                .map_err(|e| failed("give a kernel its shared memory", e))?;
        }
        let mut sizes = Vec::new();
        let (mut offset, mut size) = (0, 0);
        // SAFETY: two numbers are written. Past the last parameter the answer is an error.
        while unsafe { sys::cuFuncGetParamInfo(f, sizes.len(), &mut offset, &mut size) }.result().is_ok() {
            sizes.push(size);
        }
        let function = Function { handle: f, sizes: sizes.into() };
        known.insert(name.into(), function.clone());
        Ok(function)
    }

    /// The description of a tensor for the tensor memory accelerator: see [`TensorMap`].
    pub fn tensor_map(&self, memory: &Buffer, size: &[usize], region: &[u32], swizzle: u32) -> Result<TensorMap> {
        use sys::CUtensorMapSwizzle_enum as Swizzle;
        check_boxes(memory, size, region, swizzle)?;
        self.enter()?;
        let swizzle = match swizzle {
            0 => Swizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
            32 => Swizzle::CU_TENSOR_MAP_SWIZZLE_32B,
            64 => Swizzle::CU_TENSOR_MAP_SWIZZLE_64B,
            128 => Swizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            other => return Err(Error::internal(format!("a swizzle of {other} bytes"))),
        };
        let sizes: Vec<u64> = size.iter().map(|&s| s as u64).collect();
        let bytes = memory.dtype().size() as u64;
        let strides: Vec<u64> = (1..size.len()).map(|i| sizes[..i].iter().product::<u64>() * bytes).collect();
        let steps = vec![1u32; size.len()];
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        // SAFETY: all lists have as many entries as the rank says, the strides one less.
        let made = unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                sys::CUtensorMapDataType_enum::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                size.len() as u32,
                memory.address().cast(),
                sizes.as_ptr(),
                strides.as_ptr(),
                region.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        made.result().map_err(|e| failed(&format!("describe boxes of {region:?} in a tensor of {size:?}"), e))?;
        Ok(TensorMap::opaque(map.opaque))
    }

    /// Submits a product to `queue`.
    pub fn matmul(&self, queue: &Queue, product: &Matmul<'_>) -> Result<()> {
        self.enter()?;
        let mut blas = self.blas.lock().unwrap_or_else(PoisonError::into_inner);
        let blas = match &mut *blas {
            Some(blas) => blas,
            none => none.insert(Blas::new(self)?),
        };
        blas.multiply(queue.raw(), product)
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        if self.enter().is_err() {
            return;
        }
        if let Some(blas) = self.blas.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            self.release(blas.close());
        }
        // SAFETY: nothing of this card is used any more: buffers and queues hold it.
        unsafe {
            for &module in &self.modules {
                let _ = result::module::unload(module);
            }
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

/// What a launch's sizes must be for the driver, which takes unsigned 32-bit ones.
fn shared_bytes(shape: Launch) -> Result<u32> {
    u32::try_from(shape.shared_bytes)
        .map_err(|_| Error::internal(format!("a block with {} bytes of shared memory", shape.shared_bytes)))
}

/// The vendor's name of an element type that products take.
fn blas_type(dtype: DType) -> Result<cudarc::cublaslt::sys::cudaDataType_t> {
    use cudarc::cublaslt::sys::cudaDataType_t as T;
    match dtype {
        DType::F32 => Ok(T::CUDA_R_32F),
        DType::BF16 => Ok(T::CUDA_R_16BF),
        other => Err(Error::internal(format!("a product of {other:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_old_or_missing_is_said_with_what_to_do() {
        let cases = [
            (check_driver(12_080), "it speaks CUDA 12.8, and 13.0 is needed", "driver 580"),
            (check_card("A card", 7, 5), "A card is too old: its compute capability is 7.5", "Ampere"),
            (check_built(&[]), "built without nvcc", "NVCC names it"),
        ];
        for (said, what, mend) in cases {
            let said = said.unwrap_err().to_string();
            assert!(said.contains(what) && said.contains(mend) && said.contains("--device cpu"), "{said}");
        }
        assert!(check_driver(DRIVER).is_ok() && check_card("", 8, 0).is_ok() && check_built(&[("a", b"b")]).is_ok());
    }

    #[test]
    fn a_driver_error_says_what_a_person_can_do() {
        use sys::CUresult as E;
        let said = |code| failed("load the kernels", result::DriverError(code)).to_string();
        assert!(said(E::CUDA_ERROR_OUT_OF_MEMORY).contains("rollout.kv_cache_mib"));
        assert!(said(E::CUDA_ERROR_NO_BINARY_FOR_GPU).contains("no kernels for this card"));
        assert!(
            said(E::CUDA_ERROR_ECC_UNCORRECTABLE).contains("the GPU is lost")
                && said(E::CUDA_ERROR_UNKNOWN).contains("Xid")
        );
        assert!(said(E::CUDA_ERROR_ILLEGAL_ADDRESS).contains("please report"));
    }

    #[test]
    fn a_launch_must_have_the_kernels_parameters() {
        let function = Function { handle: std::ptr::null_mut(), sizes: [8, 4].into() };
        let check = |args: &[Arg<'_>]| function.check("no_such_kernel", args);
        check(&[Arg::Null(DType::F32), Arg::F32(1.0)]).unwrap();
        check(&[Arg::U64(1), Arg::Len(1)]).unwrap();
        for wrong in [&[Arg::U64(1)][..], &[Arg::U64(1); 2], &[Arg::U64(1), Arg::I32(1), Arg::I32(1)]] {
            let said = check(wrong).unwrap_err().to_string();
            assert!(said.contains("no_such_kernel takes parameters of [8, 4] bytes"), "{said}");
        }
    }

    #[test]
    fn a_machine_without_a_card_says_what_is_missing() {
        match Cuda::open(0) {
            Ok(card) => println!("not shown: this machine has {}", card.info.name),
            Err(e) => {
                let said = e.to_string();
                let known = ["built without nvcc", "no NVIDIA driver", "too old", "does not start", "no card 0"];
                assert!(known.iter().any(|k| said.contains(k)) && said.contains("--device cpu"), "{said}");
            }
        }
    }
}
