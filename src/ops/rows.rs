//! Moving and adding rows: gather, scatter and the additions that are their gradients.
//!
//! An index outside its matrix is a mistake of the caller and panics, and so is a destination that overlaps a source. Where
//! several rows go to one place, they go in ascending order: on the host's cores work is cut by columns, never by rows; on a GPU
//! two passes over the index find the first and the last row for each place, and the first adds all the others.

use crate::device::{Arg, Backend, Buffer, DType, Gpu, Launch, Pool, SendPtr, Stream};

/// Columns per work item of the ops that write to `dst[index]`.
const COLS: usize = 256;
const CHUNK: usize = 16_384;

/// Threads of the kernels' blocks, of which each takes eight columns of a row; and of those that add the rows for one place.
const THREADS: usize = 256;
pub(super) const SUM_THREADS: usize = 128;

/// The launch of a kernel whose threads each take eight columns of a row.
pub(super) fn eights(rows: usize, columns: usize) -> Launch {
    Launch::linear((rows * columns.div_ceil(8)).div_ceil(THREADS), THREADS)
}

/// For kernels that need to know which of the `n` rows that go to one place is the first and which the last: `[rows, 2]` of the
/// workspace, written where the index names a row. An index of `u32::MAX` is no row.
pub(super) fn ends(gpu: &Gpu, index: &Buffer, n: usize, rows: usize) -> Buffer {
    let [ends] = gpu.scratch([(DType::U32, 2 * rows)]);
    for pass in ["rows_forget", "rows_mark"] {
        let args = [Arg::Buffer(index), Arg::Buffer(&ends), Arg::len(n)];
        gpu.launch(pass, Launch::linear(n.div_ceil(THREADS), THREADS), &args);
    }
    ends
}

/// `dst[i, :] = src[index[i], :]` for i in `0..n`: src `[_, w]`, index u32 `[n]`, dst `[n, w]`.
pub fn gather(s: &Stream, src: &Buffer, index: &Buffer, dst: &Buffer, n: usize, w: usize) {
    by_rows(s, "rows_gather", src, index, dst, n, w, |d, s| d.copy_from_slice(s));
}

/// `dst[i, :] += src[index[i], :]` for i in `0..n`.
pub fn gather_add(s: &Stream, src: &Buffer, index: &Buffer, dst: &Buffer, n: usize, w: usize) {
    by_rows(s, "rows_gather_add", src, index, dst, n, w, add_slice);
}

/// `dst[index[i], :] = src[i, :]` for i in `0..n`; of rows that go to one place the last stays.
pub fn scatter(s: &Stream, src: &Buffer, index: &Buffer, dst: &Buffer, n: usize, w: usize) {
    by_cols(s, "rows_scatter", src, index, dst, n, w, |d, s| d.copy_from_slice(s));
}

/// `dst[index[i], :] += src[i, :]` for i ascending in `0..n`; rows may repeat.
pub fn scatter_add(s: &Stream, src: &Buffer, index: &Buffer, dst: &Buffer, n: usize, w: usize) {
    by_cols(s, "rows_scatter_add", src, index, dst, n, w, add_slice);
}

/// `to[index[i]] = from[source[i]]` for i in `0..n`, or `from[i]` without `source`: what a step changes in lists that stay on the
/// device. All u32; no place is named twice.
pub fn put(s: &Stream, n: usize, index: &Buffer, source: Option<&Buffer>, from: &Buffer, to: &Buffer) {
    let apart = [Some(index), source, Some(from)].into_iter().flatten().all(|b| !to.overlaps(b));
    assert!(apart, "values put into a buffer that says where they come from");
    assert!(source.is_some() || from.len() >= n, "{n} values of {from:?}");
    let (index, source) = (index.view(0, n), source.map(|s| s.view(0, n)));
    let (from, to) = (from.clone(), to.clone());
    match s.backend() {
        Backend::Cpu(s) => s.launch(move |_| {
            // SAFETY: launches of one stream run in order; `to` is none of the others.
            let (index, from, to) = unsafe { (index.get::<u32>(), from.get::<u32>(), to.get_mut::<u32>()) };
            // SAFETY: as above.
            let source = source.as_ref().map(|b| unsafe { b.get::<u32>() });
            for (i, &place) in index.iter().enumerate() {
                to[place as usize] = from[source.map_or(i, |s| s[i] as usize)];
            }
        }),
        Backend::Gpu(gpu) if n > 0 => {
            let [index, from, to] = [&index, &from, &to].map(Arg::Buffer);
            let source = Arg::maybe(source.as_ref(), DType::U32);
            let shape = Launch::linear(n.div_ceil(THREADS), THREADS);
            gpu.launch("rows_put", shape, &[index, source, from, to, Arg::len(n)]);
        }
        Backend::Gpu(_) => {}
    }
}

/// `y += x` over `len` elements.
pub fn add(s: &Stream, x: &Buffer, y: &Buffer, len: usize) {
    assert!(x.len() >= len && y.len() >= len, "buffers of at least {len} elements");
    assert!(!y.overlaps(x), "a sum into a buffer that overlaps what is added");
    let (x, y) = (x.clone(), y.clone());
    match s.backend() {
        Backend::Cpu(s) => s.launch(move |pool| {
            // SAFETY: launches of one stream run in order; y is not x.
            let (x, y) = unsafe { (x.get::<f32>(), y.get_mut::<f32>()) };
            pool.chunks_mut(&mut y[..len], CHUNK, |i, y| add_slice(y, &x[i * CHUNK..][..y.len()]));
        }),
        Backend::Gpu(gpu) if len > 0 => {
            gpu.launch("rows_add", eights(1, len), &[Arg::Buffer(&x), Arg::Buffer(&y), Arg::len(len)]);
        }
        Backend::Gpu(_) => {}
    }
}

pub(super) fn add_slice(d: &mut [f32], s: &[f32]) {
    d.iter_mut().zip(s).for_each(|(d, s)| *d += s);
}

fn by_rows(
    s: &Stream,
    kernel: &str,
    src: &Buffer,
    index: &Buffer,
    dst: &Buffer,
    n: usize,
    w: usize,
    put: impl Fn(&mut [f32], &[f32]) + Send + Sync + 'static,
) {
    assert!(dst.len() >= n * w, "a destination of [{n}, {w}]");
    let gpu = |gpu: &Gpu, index: &Buffer| {
        let args = [Arg::Buffer(src), Arg::Buffer(index), Arg::Buffer(dst), Arg::len(n), Arg::len(w)];
        gpu.launch(kernel, eights(n, w), &args);
    };
    launch(s, src, index, dst, n, w, gpu, move |pool, src, index, dst| {
        let per = (CHUNK / w.max(1)).max(1);
        pool.chunks_mut(&mut dst[..n * w], per * w, |i, d| {
            for (j, d) in d.chunks_exact_mut(w).enumerate() {
                put(d, &src[index[i * per + j] as usize * w..][..w]);
            }
        });
    });
}

fn by_cols(
    s: &Stream,
    kernel: &str,
    src: &Buffer,
    index: &Buffer,
    dst: &Buffer,
    n: usize,
    w: usize,
    put: impl Fn(&mut [f32], &[f32]) + Send + Sync + 'static,
) {
    assert!(src.len() >= n * w, "a source of [{n}, {w}]");
    let gpu = |gpu: &Gpu, index: &Buffer| {
        let ends = ends(gpu, index, n, dst.len() / w);
        let shape = if kernel == "rows_scatter" { eights(n, w) } else { Launch::linear(n, SUM_THREADS) };
        let [src, index, ends, dst] = [src, index, &ends, dst].map(Arg::Buffer);
        gpu.launch(kernel, shape, &[src, index, ends, dst, Arg::len(n), Arg::len(w)]);
    };
    launch(s, src, index, dst, n, w, gpu, move |pool, src, index, dst| {
        let (len, dst) = (dst.len(), SendPtr(dst.as_mut_ptr()));
        // A few rows are not worth waking a thread.
        let cols = if n * w <= CHUNK { w } else { COLS };
        pool.run(w.div_ceil(cols), |item| {
            let (c, k) = (item * cols, cols.min(w - item * cols));
            for (src, &to) in src.chunks_exact(w).zip(index) {
                let at = to as usize * w + c;
                assert!(at + k <= len, "row {to} of a destination of {} rows", len / w);
                // SAFETY: in bounds by the assertion; columns c..c+k belong to this item.
                put(unsafe { std::slice::from_raw_parts_mut(dst.get().add(at), k) }, &src[c..c + k]);
            }
        });
    });
}

/// Launches `f(pool, src, the first n indices, dst)`, or calls `gpu` with the indices where there is something to do.
fn launch(
    s: &Stream,
    src: &Buffer,
    index: &Buffer,
    dst: &Buffer,
    n: usize,
    w: usize,
    gpu: impl FnOnce(&Gpu, &Buffer),
    f: impl FnOnce(&Pool, &[f32], &[u32], &mut [f32]) + Send + 'static,
) {
    assert!(!dst.overlaps(src) && !dst.overlaps(index), "rows moved into a buffer that overlaps where they come from");
    let (src, index, dst) = (src.clone(), index.view(0, n), dst.clone());
    match s.backend() {
        Backend::Cpu(s) => s.launch(move |pool| {
            // SAFETY: launches of one stream run in order; dst is neither src nor index.
            let (src, index, dst) = unsafe { (src.get(), index.get(), dst.get_mut()) };
            f(pool, src, index, dst);
        }),
        Backend::Gpu(card) if n * w > 0 => gpu(card, &index),
        Backend::Gpu(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{devices, noise};
    use super::*;
    use crate::device::DType;

    #[test]
    fn rows_go_where_the_index_says() {
        for (n, w) in [(5, 3), (200, 300)] {
            let (src, base) = (noise(n * w, 1), noise(n * w, 2));
            // Repeats on purpose: 0, 2, 4, .. twice over.
            let index: Vec<u32> = (0..n).map(|i| (2 * i % n) as u32 / 2 * 2).collect();
            let row = |v: &[f32], r: usize| v[r * w..(r + 1) * w].to_vec();
            let (mut g, mut ga, mut sc, mut sa) = (vec![], base.clone(), base.clone(), base.clone());
            for (i, &to) in index.iter().enumerate() {
                let to = to as usize;
                g.extend(row(&src, to));
                for c in 0..w {
                    ga[i * w + c] += src[to * w + c];
                    sc[to * w + c] = src[i * w + c];
                    sa[to * w + c] += src[i * w + c];
                }
            }
            let sum: Vec<f32> = base.iter().zip(&src).map(|(a, b)| a + b).collect();
            for d in devices() {
                let s = d.stream();
                let (sb, ib) = (d.upload(&src), d.upload(&index));
                let out = d.alloc(DType::F32, n * w);
                gather(&s, &sb, &ib, &out, n, w);
                assert_eq!(s.read::<f32>(&out).wait().unwrap(), g);
                type Op = fn(&Stream, &Buffer, &Buffer, &Buffer, usize, usize);
                for (op, want) in [(gather_add as Op, &ga), (scatter, &sc), (scatter_add, &sa)] {
                    let out = d.upload(&base);
                    op(&s, &sb, &ib, &out, n, w);
                    assert_eq!(&s.read::<f32>(&out).wait().unwrap(), want);
                }
                let out = d.upload(&base);
                add(&s, &sb, &out, n * w);
                assert_eq!(s.read::<f32>(&out).wait().unwrap(), sum);
            }
        }
    }

    #[test]
    fn values_are_put_where_the_index_says() {
        for d in devices() {
            let (s, index, from) = (d.stream(), d.upload(&[4u32, 0, 9]), d.upload(&[10u32, 11, 12]));
            let to = d.upload(&[1u32; 6]);
            put(&s, 2, &index, None, &from, &to);
            assert_eq!(s.read::<u32>(&to).wait().unwrap(), [11, 1, 1, 1, 10, 1]);
            put(&s, 2, &index, Some(&d.upload(&[2u32, 2])), &from, &to);
            assert_eq!(s.read::<u32>(&to).wait().unwrap(), [12, 1, 1, 1, 12, 1]);
        }
    }

    #[test]
    fn halves_of_one_buffer_are_apart() {
        for d in devices() {
            let (s, b) = (d.stream(), d.upload(&[1.0f32, 2.0, 3.0, 4.0]));
            add(&s, &b.view(0, 2), &b.view(2, 2), 2);
            assert_eq!(s.read::<f32>(&b).wait().unwrap(), [1.0, 2.0, 4.0, 6.0]);
        }
    }

    #[test]
    #[should_panic(expected = "overlaps")]
    fn a_sum_into_its_own_source_is_refused() {
        let d = crate::device::Device::cpu(1);
        let b = d.zeros(DType::F32, 8);
        add(&d.stream(), &b.view(0, 5), &b.view(4, 4), 4);
    }
}
