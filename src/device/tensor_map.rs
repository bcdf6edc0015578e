//! Boxes of tensors, as the tensor memory accelerator copies them.

use super::{Buffer, DType};
use crate::{Error, Result};

/// A tensor of bf16 elements, rows without gaps, and the box of it that one copy of the tensor memory accelerator moves: a
/// `CUtensorMap`, or the fields of the emulator's (`kernels/emulator/tensor_map.h`).
#[repr(C, align(128))]
#[derive(Clone, Copy, Debug)]
pub struct TensorMap([u64; 16]);

impl TensorMap {
    /// What a driver has encoded.
    pub(super) fn opaque(words: [u64; 16]) -> TensorMap {
        TensorMap(words)
    }
}

/// That the tensor memory accelerator copies such boxes of such a tensor.
///
/// # Errors
/// [`Error::Internal`] with the rule that is broken: the CUDA driver's own error names none.
pub(super) fn check_boxes(memory: &Buffer, size: &[usize], region: &[u32], swizzle: u32) -> Result<()> {
    let refuse =
        |why: String| Err(Error::internal(format!("boxes of {region:?} in a tensor of {size:?} in {memory:?}: {why}")));
    let n = size.iter().try_fold(1usize, |n, &s| n.checked_mul(s));
    let fits = memory.dtype() == DType::BF16 && n.is_some_and(|n| n <= memory.len());
    if !fits || !(2..=3).contains(&size.len()) || region.len() != size.len() {
        return refuse("it must be two or three dimensions of bf16 elements that are all there".into());
    }
    let start = memory.address() as usize;
    if !start.is_multiple_of(16) {
        return refuse(format!("it begins at a multiple of {} bytes, not of 16", 1 << start.trailing_zeros()));
    }
    let bytes = DType::BF16.size();
    let strides = (1..size.len()).map(|i| size[..i].iter().product::<usize>() * bytes);
    if let Some(stride) = strides.into_iter().find(|s| !s.is_multiple_of(16)) {
        return refuse(format!("its rows are {stride} bytes apart, not a multiple of 16"));
    }
    if let Some(side) = size.iter().find(|&&s| s == 0 || s as u64 > 1 << 32) {
        return refuse(format!("it has {side} elements in a direction, and must have 1 to 2^32"));
    }
    if let Some(side) = region.iter().find(|r| !(1..=256).contains(*r)) {
        return refuse(format!("a box has a side of {side}, and must have 1 to 256"));
    }
    let row = region[0] as usize * bytes;
    if !row.is_multiple_of(16) {
        return refuse(format!("a box has a row of {row} bytes, not a multiple of 16"));
    }
    if ![0, 32, 64, 128].contains(&swizzle) {
        return refuse(format!("a swizzle of {swizzle} bytes: there are 32, 64, 128 and none"));
    }
    // The hardware takes shorter rows too, but where their chunks go we do not know for sure.
    if swizzle > 0 && row != swizzle as usize {
        return refuse(format!("a box has a row of {row} bytes, and a swizzle of {swizzle}: they must be the same"));
    }
    Ok(())
}
