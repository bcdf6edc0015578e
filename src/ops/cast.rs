//! Changes of type between f32 and bf16.

use super::rows::eights;
use crate::device::{Arg, Backend, Buffer, DType, Stream};
use half::slice::HalfFloatSliceExt;

/// Elements per work item.
const CHUNK: usize = 16_384;
/// Elements per launch, which counts them in an `int`; a model has more.
const LAUNCH: usize = 1 << 30;

/// `to = from` over `len` elements, one of them f32 and the other bf16: to the nearest, ties to even.
pub fn cast(s: &Stream, from: &Buffer, to: &Buffer, len: usize) {
    assert!(from.len() >= len && to.len() >= len, "buffers of at least {len} elements");
    assert!(!to.overlaps(from), "a cast into a buffer that overlaps its source");
    let down = match (from.dtype(), to.dtype()) {
        (DType::F32, DType::BF16) => true,
        (DType::BF16, DType::F32) => false,
        other => panic!("a cast between f32 and bf16, not {other:?}"),
    };
    let (from, to) = (from.view(0, len), to.view(0, len));
    match s.backend() {
        Backend::Cpu(s) => s.launch(move |pool| {
            // SAFETY: launches of one stream run in order; `to` is not `from`.
            unsafe {
                if down {
                    let from = from.get::<f32>();
                    let part =
                        |i: usize, to: &mut [half::bf16]| to.convert_from_f32_slice(&from[i * CHUNK..][..to.len()]);
                    pool.chunks_mut(to.get_mut::<half::bf16>(), CHUNK, part);
                } else {
                    let from = from.get::<half::bf16>();
                    let part = |i: usize, to: &mut [f32]| from[i * CHUNK..][..to.len()].convert_to_f32_slice(to);
                    pool.chunks_mut(to.get_mut::<f32>(), CHUNK, part);
                }
            }
        }),
        Backend::Gpu(gpu) if len > 0 => {
            let kernel = if down { "cast_f32_to_bf16" } else { "cast_bf16_to_f32" };
            for start in (0..len).step_by(LAUNCH) {
                let n = LAUNCH.min(len - start);
                let [from, to] = [&from, &to].map(|b| b.view(start, n));
                gpu.launch(kernel, eights(1, n), &[Arg::Buffer(&from), Arg::Buffer(&to), Arg::len(n)]);
            }
        }
        Backend::Gpu(_) => {}
    }
}
