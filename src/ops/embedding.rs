//! Token embedding: rows of a table by id, and the gradient of that table.

use super::linear::{PANEL, Weight};
use super::rows::{SUM_THREADS, add_slice, eights, ends};
use crate::device::{Arg, Backend, Buffer, Launch, SendPtr, Stream};

/// An id that stands for no token (the rows that image embeddings fill): reads as zeros, has no gradient.
pub const NO_TOKEN: u32 = u32::MAX;

/// Elements per work item of the forward pass.
const CHUNK: usize = 16_384;

/// Where the embeddings live.
#[derive(Clone, Copy)]
pub enum Table<'a> {
    /// Row-major `[vocabulary, h]`.
    Rows(&'a Buffer),
    /// The weight of a tied head (n = vocabulary, k = h), packed on the host's cores.
    Packed(&'a Weight),
}

/// The address of a table's elements: element (id, c) is at `start(id) + c * stride`.
#[derive(Clone, Copy)]
struct Layout {
    packed: bool,
    h: usize,
}

impl Layout {
    fn start(self, id: usize) -> usize {
        if self.packed { id / PANEL * PANEL * self.h + id % PANEL } else { id * self.h }
    }
    fn stride(self) -> usize {
        if self.packed { PANEL } else { 1 }
    }
}

fn parts(s: &Stream, table: Table<'_>, h: usize) -> (Buffer, Layout) {
    match table {
        Table::Rows(b) => {
            assert!(b.len().is_multiple_of(h), "a table of rows of {h}");
            (b.clone(), Layout { packed: false, h })
        }
        Table::Packed(w) => {
            assert_eq!(w.k, h, "a table of rows of {h}");
            (w.data.clone(), Layout { packed: s.device().packs_weights(), h })
        }
    }
}

/// `out[i, :] = table[ids[i], :]`: ids u32 `[t]`, out `[t, h]`. [`NO_TOKEN`] gives zeros; any other id past the table's
/// end panics (the tokenizer's ids are checked where they enter).
pub fn forward(s: &Stream, ids: &Buffer, table: Table<'_>, out: &Buffer, t: usize, h: usize) {
    assert!(ids.len() >= t && out.len() >= t * h, "{t} ids and an output of [{t}, {h}]");
    let (table, layout) = parts(s, table, h);
    let (ids, out) = (ids.clone(), out.clone());
    match s.backend() {
        Backend::Cpu(s) => s.launch(move |pool| {
            // SAFETY: launches of one stream run in order; out is not the table.
            let (ids, table, out) = unsafe { (ids.get::<u32>(), table.get::<f32>(), out.get_mut::<f32>()) };
            let per = (CHUNK / h).max(1);
            pool.chunks_mut(&mut out[..t * h], per * h, |item, out| {
                for (row, &id) in out.chunks_exact_mut(h).zip(&ids[item * per..]) {
                    if id == NO_TOKEN {
                        row.fill(0.0);
                    } else if layout.packed {
                        let from = table[layout.start(id as usize)..].iter().step_by(PANEL);
                        row.iter_mut().zip(from).for_each(|(o, &x)| *o = x);
                    } else {
                        row.copy_from_slice(&table[layout.start(id as usize)..][..h]);
                    }
                }
            });
        }),
        Backend::Gpu(gpu) if t * h > 0 => {
            let [ids, table, out] = [&ids, &table, &out].map(Arg::Buffer);
            gpu.launch("embedding_forward", eights(t, h), &[ids, table, out, Arg::len(t), Arg::len(h)]);
        }
        Backend::Gpu(_) => {}
    }
}

/// The gradient of [`forward`]: `dtable[ids[i], :] += dout[i, :]` in the table's layout, i ascending, skipping
/// [`NO_TOKEN`].
pub fn backward(s: &Stream, ids: &Buffer, dout: &Buffer, dtable: Table<'_>, t: usize, h: usize) {
    assert!(ids.len() >= t && dout.len() >= t * h, "{t} ids and a gradient of [{t}, {h}]");
    let (table, layout) = parts(s, dtable, h);
    let (ids, dout) = (ids.clone(), dout.clone());
    match s.backend() {
        Backend::Cpu(s) => s.launch(move |pool| {
            // SAFETY: launches of one stream run in order; the table's gradient is not its input.
            let (ids, dout, table) = unsafe { (ids.get::<u32>(), dout.get::<f32>(), table.get_mut::<f32>()) };
            let (len, table, stride) = (table.len(), SendPtr(table.as_mut_ptr()), layout.stride());
            // Wide parts of rows: what lies side by side comes from memory faster.
            let cols = h.div_ceil(pool.threads()).next_multiple_of(PANEL);
            pool.run(h.div_ceil(cols), |item| {
                let (c, n) = (item * cols, cols.min(h - item * cols));
                for (d, &id) in dout.chunks_exact(h).zip(&ids[..t]) {
                    if id == NO_TOKEN {
                        continue;
                    }
                    let (d, at) = (&d[c..c + n], layout.start(id as usize) + c * stride);
                    assert!(at + (n - 1) * stride < len, "id {id} past the end of the table");
                    // SAFETY: in bounds by the assertion; these columns belong to this item.
                    unsafe {
                        let to = table.get().add(at);
                        if layout.packed {
                            d.iter().enumerate().for_each(|(i, d)| *to.add(i * PANEL) += d);
                        } else {
                            add_slice(std::slice::from_raw_parts_mut(to, n), d);
                        }
                    }
                }
            });
        }),
        Backend::Gpu(gpu) if t * h > 0 => {
            let ends = ends(gpu, &ids, t, table.len() / h);
            let [ids, ends, dout, table] = [&ids, &ends, &dout, &table].map(Arg::Buffer);
            let args = [ids, ends, dout, table, Arg::len(t), Arg::len(h)];
            gpu.launch("embedding_backward", Launch::linear(t, SUM_THREADS), &args);
        }
        Backend::Gpu(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::super::linear::{pack, packed_len, unpack};
    use super::super::testing::{devices, noise};
    use super::*;
    use crate::device::DType;

    #[test]
    fn both_layouts_read_and_add_the_same_rows() {
        for (v, h, t) in [(5, 3, 4), (37, 300, 90)] {
            let (table, dout, base) = (noise(v * h, 1), noise(t * h, 2), noise(v * h, 3));
            let ids: Vec<u32> =
                (0..t).map(|i| if i % 4 == 3 { NO_TOKEN } else { (i * i + v - 1) as u32 % v as u32 }).collect();
            let (mut want, mut dwant) = (vec![0.0; t * h], base.clone());
            for (i, &id) in ids.iter().enumerate().filter(|(_, id)| **id != NO_TOKEN) {
                for c in 0..h {
                    want[i * h + c] = table[id as usize * h + c];
                    dwant[id as usize * h + c] += dout[i * h + c];
                }
            }
            let packed = |rows: &[f32]| {
                let mut p = vec![0.0; packed_len(v, h)];
                pack(rows, v, h, &mut p);
                p
            };
            for d in devices() {
                let s = d.stream();
                let (ib, db, out) = (d.upload(&ids), d.upload(&dout), d.alloc(DType::F32, t * h));
                let (rows, drows) = (d.upload(&table), d.upload(&base));
                forward(&s, &ib, Table::Rows(&rows), &out, t, h);
                assert_eq!(s.read::<f32>(&out).wait().unwrap(), want);
                backward(&s, &ib, &db, Table::Rows(&drows), t, h);
                assert_eq!(s.read::<f32>(&drows).wait().unwrap(), dwant);

                let weight = |rows: &[f32]| Weight { data: d.upload(&packed(rows)), n: v, k: h };
                let (w, dw) = (weight(&table), weight(&base));
                let out = d.alloc(DType::F32, t * h);
                forward(&s, &ib, Table::Packed(&w), &out, t, h);
                assert_eq!(s.read::<f32>(&out).wait().unwrap(), want);
                backward(&s, &ib, &db, Table::Packed(&dw), t, h);
                let mut got = vec![0.0; v * h];
                unpack(&s.read::<f32>(&dw.data).wait().unwrap(), v, h, &mut got);
                assert_eq!(got, dwant);
            }
        }
    }
}
