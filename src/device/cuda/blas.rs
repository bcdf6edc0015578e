//! Products for gradients, through cuBLASLt. The algorithm for a shape is chosen once, and never one that adds in an order of
//! its own.

use super::super::fault::MEMORY_MEND;
use super::super::matmul::Matmul;
use super::super::{Buffer, DType};
use super::{Cuda, blas_type};
use crate::{Error, Result};
use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use std::collections::HashMap;
use std::ffi::c_void;

/// Bytes that an algorithm may use beside its operands.
pub(super) const WORKSPACE: usize = 32 << 20;
/// The alignment that operands may be promised to have.
const ALIGN: u64 = 256;

/// `CUBLAS_OP_T`.
const TRANSPOSED: i32 = 1;

/// Shape, how far apart the rows of `a` begin, whether it is transposed, what is stored, the alignments of a, b and c.
type Key = ([usize; 3], usize, bool, DType, [u32; 3]);

/// The library's handle, its workspace, and the algorithms that were chosen.
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: u64,
    plans: HashMap<Key, Plan>,
}

struct Plan {
    product: Product,
    /// Of b, a and c: the library counts columns first, so it computes the transposed product.
    layouts: [MatrixLayout; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// What the library made and takes back.
macro_rules! owned {
    ($name:ident, $handle:ty, $destroy:path) => {
        struct $name($handle);
        impl Drop for $name {
            fn drop(&mut self) {
                // SAFETY: made by the library, and used by nobody any more.
                let _ = unsafe { $destroy(self.0) };
            }
        }
    };
}
owned!(Product, sys::cublasLtMatmulDesc_t, result::destroy_matmul_desc);
owned!(MatrixLayout, sys::cublasLtMatrixLayout_t, result::destroy_matrix_layout);
owned!(Preference, sys::cublasLtMatmulPreference_t, result::destroy_matmul_pref);

fn failed(what: &str, e: CublasError) -> Error {
    Error::internal(format!("cuBLASLt cannot {what}: {e}"))
}

fn attribute<T>(value: &T) -> (*const c_void, usize) {
    (std::ptr::from_ref(value).cast(), size_of::<T>())
}

impl Blas {
    pub fn new(card: &Cuda) -> Result<Blas> {
        // SAFETY: looks for a library.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::limit(
                "there is no cuBLASLt on this machine (libcublasLt.so), and training needs it",
                "install the CUDA toolkit's libraries (pip's nvidia-cublas has them; put them on LD_LIBRARY_PATH)",
            ));
        }
        let handle = result::create_handle().map_err(|e| failed("start", e))?;
        let Some(workspace) = card.allocate(WORKSPACE) else {
            // SAFETY: made above, and used by nobody.
            let _ = unsafe { result::destroy_handle(handle) };
            return Err(Error::limit("the GPU has no memory for the workspace of products", MEMORY_MEND));
        };
        Ok(Blas { handle, workspace, plans: HashMap::new() })
    }

    /// Ends the library's part; gives the workspace's address.
    pub fn close(mut self) -> u64 {
        self.plans.clear();
        // SAFETY: made by this type, and used by nobody any more.
        let _ = unsafe { result::destroy_handle(self.handle) };
        self.workspace
    }

    pub fn multiply(
        &mut self,
        stream: cudarc::driver::sys::CUstream,
        &Matmul { a, stride, transposed, b, c, shape, accumulate }: &Matmul<'_>,
    ) -> Result<()> {
        let align = |x: &Buffer| (x.address() as u64 | ALIGN).trailing_zeros();
        let key = (shape, stride, transposed, c.dtype(), [a, b, c].map(align));
        if !self.plans.contains_key(&key) {
            let plan = plan(self.handle, key)?;
            self.plans.insert(key, plan);
        }
        let plan = &self.plans[&key];
        let (one, beta) = (1.0f32, if accumulate { 1.0f32 } else { 0.0 });
        let [b_layout, a_layout, c_layout] = plan.layouts.each_ref().map(|layout| layout.0);
        // SAFETY: the operands have the shapes of the plan, checked by the caller; the order of the stream is the order of use of
        // the workspace, which one stream at a time trains with.
        unsafe {
            result::matmul(
                self.handle,
                plan.product.0,
                std::ptr::from_ref(&one).cast(),
                std::ptr::from_ref(&beta).cast(),
                b.address().cast(),
                b_layout,
                a.address().cast(),
                a_layout,
                c.address().cast(),
                c_layout,
                c.address().cast(),
                c_layout,
                &plan.algorithm,
                self.workspace as *mut c_void,
                WORKSPACE,
                stream.cast(),
            )
        }
        .map_err(|e| failed(&format!("multiply {shape:?}"), e))
    }
}

fn plan(handle: sys::cublasLtHandle_t, ([m, n, k], stride, transposed, dtype, aligns): Key) -> Result<Plan> {
    use sys::cublasLtMatmulPreferenceAttributes_t as P;
    let describe = |e| failed("describe a product", e);
    let product =
        result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType_t::CUDA_R_32F)
            .map(Product)
            .map_err(describe)?;
    if transposed {
        let (value, size) = attribute(&TRANSPOSED);
        use sys::cublasLtMatmulDescAttributes_t as D;
        // SAFETY: the value has the attribute's type.
        unsafe { result::set_matmul_desc_attribute(product.0, D::CUBLASLT_MATMUL_DESC_TRANSB, value, size) }
            .map_err(describe)?;
    }
    let layout = |dtype: DType, rows: usize, cols: usize, stride: usize| {
        let made = result::create_matrix_layout(blas_type(dtype)?, rows as u64, cols as u64, stride as i64);
        made.map(MatrixLayout).map_err(describe)
    };
    let (row, rows) = if transposed { (m, k) } else { (k, m) };
    let a = layout(DType::BF16, row, rows, stride)?;
    let layouts = [layout(DType::BF16, n, k, n)?, a, layout(dtype, n, m, n)?];
    let preference = result::create_matmul_pref().map(Preference).map_err(describe)?;
    let set = |which: P, value: (*const c_void, usize)| {
        // SAFETY: every value below has its attribute's type.
        unsafe { result::set_matmul_pref_attribute(preference.0, which, value.0, value.1) }.map_err(describe)
    };
    set(P::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, attribute(&WORKSPACE))?;
    // Partial sums are added by a kernel of their own, in one order.
    let schemes = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
    set(P::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, attribute(&schemes))?;
    let [of_a, of_b, of_c] = aligns.map(|zeros| 1u32 << zeros);
    set(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, attribute(&of_b))?;
    set(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, attribute(&of_a))?;
    set(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, attribute(&of_c))?;
    set(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, attribute(&of_c))?;
    let [b, a, c] = layouts.each_ref().map(|layout| layout.0);
    // SAFETY: all of these live.
    let found = unsafe { result::get_matmul_algo_heuristic(handle, product.0, b, a, c, c, preference.0) };
    let found = found.map_err(|e| failed(&format!("find a way to multiply {:?}", [m, n, k]), e))?;
    Ok(Plan { product, layouts, algorithm: found.algo })
}
