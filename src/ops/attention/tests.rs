//! Against a plain f64 attention, and bit for bit against itself in other batches, chunks, threads and instruction sets.

use super::kernels::{Exponent, Kernels, Product, available};
use super::*;
use crate::device::{DType, Device, Stream};
use crate::ops::kv_cache::{self, KvCache, Tokens};

struct Rng(u64);
impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| (self.next() % 20_001) as f32 / 10_000.0 - 1.0).collect()
    }
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    hq: usize,
    hkv: usize,
    hd: usize,
}
impl Shape {
    fn scale(self) -> f32 {
        3.0 / (self.hd as f32).sqrt()
    }
}

/// One sequence's rows, and where its tokens are in the cache.
struct Sequence {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    table: Vec<u32>,
}

/// Sequences in one cache. A sequence may share the whole pages of an earlier one's beginning.
struct World {
    shape: Shape,
    seqs: Vec<Sequence>,
    pages: usize,
}

impl World {
    /// `lens`: (length, tokens shared with sequence 0). Pages are handed out in a scattered order.
    fn new(shape: Shape, lens: &[(usize, usize)], seed: u64) -> World {
        let mut rng = Rng(seed | 1);
        let pages = lens.iter().map(|l| l.0.div_ceil(BLOCK)).sum::<usize>() + 2;
        let mut free: Vec<u32> = (0..pages as u32).collect();
        let mut seqs: Vec<Sequence> = Vec::new();
        for &(len, shared) in lens {
            let (wq, wkv) = (shape.hq * shape.hd, shape.hkv * shape.hd);
            let mut s =
                Sequence { q: rng.floats(len * wq), k: rng.floats(len * wkv), v: rng.floats(len * wkv), table: vec![] };
            if shared > 0 {
                s.k[..shared * wkv].copy_from_slice(&seqs[0].k[..shared * wkv]);
                s.v[..shared * wkv].copy_from_slice(&seqs[0].v[..shared * wkv]);
                s.table.extend(&seqs[0].table[..shared / BLOCK]);
            }
            while s.table.len() < len.div_ceil(BLOCK) {
                let i = rng.below(free.len());
                s.table.push(free.swap_remove(i));
            }
            seqs.push(s);
        }
        World { shape, seqs, pages }
    }

    fn slots(&self, seq: usize, tokens: std::ops::Range<usize>) -> Vec<u32> {
        tokens.map(|t| self.seqs[seq].table[t / BLOCK] * BLOCK as u32 + (t % BLOCK) as u32).collect()
    }

    /// A cache full of NaN, but for the first `upto(seq)` tokens of each sequence.
    fn cache(&self, s: &Stream, upto: impl Fn(usize) -> usize) -> KvCache {
        let Shape { hkv, hd, .. } = self.shape;
        let c = KvCache::new(s.device(), DType::F32, 1, self.pages, hkv, hd);
        for b in [&c.layers[0].k, &c.layers[0].v] {
            s.write(b, &vec![f32::NAN; b.len()]);
        }
        for (i, seq) in self.seqs.iter().enumerate() {
            let (n, w) = (upto(i), hkv * hd);
            // Keys and values side by side behind a column that is not theirs.
            let rows: Vec<f32> = (0..n)
                .flat_map(|t| [&[7.0], &seq.k[t * w..(t + 1) * w], &seq.v[t * w..(t + 1) * w]].concat())
                .collect();
            let d = s.device();
            let (rows, slots) = (d.upload(&rows), d.upload(&self.slots(i, 0..n)));
            let tokens = Tokens { rows: &rows, stride: 2 * w + 1, k: 1, v: 1 + w, slots: &slots, n };
            kv_cache::write(s, &c.layers[0], &c, tokens);
        }
        c
    }

    /// `parts`: (sequence, from, to): queries `from..to` with the context up to `to`.
    /// The block tables lie in the opposite order, and the segments name their rows.
    fn segments(&self, d: &Device, parts: &[(usize, usize, usize)]) -> Segments {
        let stride = self.seqs.iter().map(|s| s.table.len()).max().unwrap() + 1;
        let mut cu = vec![0u32];
        // Entries past the context name no page at all.
        let mut tables = vec![u32::MAX; parts.len() * stride];
        for (i, &(seq, from, to)) in parts.iter().enumerate() {
            cu.push(cu[i] + (to - from) as u32);
            let n = to.div_ceil(BLOCK);
            tables[(parts.len() - 1 - i) * stride..][..n].copy_from_slice(&self.seqs[seq].table[..n]);
        }
        let kv: Vec<u32> = parts.iter().map(|p| p.2 as u32).collect();
        Segments {
            cu_seqlens_q: d.upload(&cu),
            kv_lens: d.upload(&kv),
            block_tables: d.upload(&tables),
            table_rows: d.upload(&(0..parts.len() as u32).rev().collect::<Vec<_>>()),
            stride,
            n: parts.len(),
            rows: *cu.last().unwrap() as usize,
        }
    }

    /// Rows of `width` floats for the parts, each followed by `pad` NaN.
    fn rows(&self, parts: &[(usize, usize, usize)], pad: usize) -> Vec<f32> {
        let w = self.shape.hq * self.shape.hd;
        let row = |seq: usize, t: usize| [&self.seqs[seq].q[t * w..(t + 1) * w], &vec![f32::NAN; pad]].concat();
        parts.iter().flat_map(|&(seq, from, to)| (from..to).flat_map(move |t| row(seq, t))).collect()
    }

    fn forward(&self, d: &Device, parts: &[(usize, usize, usize)]) -> (Vec<f32>, Vec<f32>) {
        let s = d.stream();
        let Shape { hq, hkv, hd } = self.shape;
        let upto = |seq| parts.iter().filter(|p| p.0 == seq).map(|p| p.2).max().unwrap_or(0);
        let cache = self.cache(&s, upto);
        let t: usize = parts.iter().map(|p| p.2 - p.1).sum();
        let (out, lse) = (d.alloc(DType::F32, t * hq * hd), d.alloc(DType::F32, t * hq));
        let q = d.upload(&self.rows(parts, 5));
        let seg = self.segments(d, parts);
        paged_forward(&s, &q, hq * hd + 5, &cache.layers[0], &seg, hq, hkv, hd, self.shape.scale(), &out, Some(&lse));
        let (out, lse) = (s.read(&out), s.read(&lse));
        (out.wait().unwrap(), lse.wait().unwrap())
    }
}

/// One query against keys `[n, stride]` in f64: output, log-sum-exp, probabilities.
fn naive(
    q: &[f32],
    k: impl Fn(usize) -> Vec<f32>,
    v: impl Fn(usize) -> Vec<f32>,
    n: usize,
    scale: f32,
) -> (Vec<f64>, f64, Vec<f64>) {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
    let s: Vec<f64> = (0..n).map(|j| dot(q, &k(j)) * f64::from(scale)).collect();
    let max = s.iter().cloned().fold(f64::NEG_INFINITY, f64::max);
    let lse = max + s.iter().map(|s| (s - max).exp()).sum::<f64>().ln();
    let p: Vec<f64> = s.iter().map(|s| (s - lse).exp()).collect();
    let mut out = vec![0.0; q.len()];
    for (j, p) in p.iter().enumerate() {
        out.iter_mut().zip(v(j)).for_each(|(o, v)| *o += p * f64::from(v));
    }
    (out, lse, p)
}

/// What one query adds to the gradients: `dq`, and per key `(dk, dv)`.
#[allow(clippy::type_complexity)] // a test's own
fn naive_backward(
    q: &[f32],
    k: impl Fn(usize) -> Vec<f32>,
    v: impl Fn(usize) -> Vec<f32>,
    n: usize,
    scale: f32,
    dout: &[f32],
) -> (Vec<f64>, Vec<(Vec<f64>, Vec<f64>)>) {
    let (out, _, p) = naive(q, &k, &v, n, scale);
    let delta: f64 = out.iter().zip(dout).map(|(o, &d)| o * f64::from(d)).sum();
    let mut dq = vec![0.0; q.len()];
    let per_key = (0..n)
        .map(|j| {
            let (kj, vj) = (k(j), v(j));
            let dp: f64 = dout.iter().zip(&vj).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
            let ds = p[j] * (dp - delta) * f64::from(scale);
            dq.iter_mut().zip(&kj).for_each(|(g, &k)| *g += ds * f64::from(k));
            let dk = q.iter().map(|&q| ds * f64::from(q)).collect();
            (dk, dout.iter().map(|&d| p[j] * f64::from(d)).collect())
        })
        .collect();
    (dq, per_key)
}

fn close(what: &str, got: &[f32], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        assert!((f64::from(g) - w).abs() <= tolerance * (1.0 + w.abs()), "{what}[{i}]: {g}, not {w}");
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

const SHAPES: [Shape; 9] = [
    Shape { hq: 4, hkv: 2, hd: 16 },
    Shape { hq: 8, hkv: 2, hd: 64 },
    Shape { hq: 2, hkv: 2, hd: 80 },
    Shape { hq: 7, hkv: 1, hd: 24 },
    Shape { hq: 2, hkv: 1, hd: 128 },
    Shape { hq: 3, hkv: 3, hd: 8 },
    Shape { hq: 4, hkv: 2, hd: 12 },
    Shape { hq: 2, hkv: 1, hd: 2 },
    Shape { hq: 100, hkv: 1, hd: 8 },
];

#[test]
fn paged_forward_is_attention() {
    for (i, shape) in SHAPES.into_iter().enumerate() {
        let w = World::new(shape, &[(300, 0), (1, 0), (33, 0), (129, 0), (310, 290)], 11 + i as u64);
        let parts = [(1, 0, 1), (0, 297, 300), (2, 0, 33), (3, 128, 129), (2, 5, 5), (4, 250, 310)];
        let (out, lse) = w.forward(&Device::cpu(2), &parts);
        let Shape { hq, hkv, hd } = shape;
        let (mut want, mut want_lse) = (vec![], vec![]);
        for &(seq, from, to) in &parts {
            let s = &w.seqs[seq];
            for t in from..to {
                for h in 0..hq {
                    let at = |x: &[f32], j: usize| x[(j * hkv + h * hkv / hq) * hd..][..hd].to_vec();
                    let q = &s.q[(t * hq + h) * hd..][..hd];
                    let (o, l, _) = naive(q, |j| at(&s.k, j), |j| at(&s.v, j), t + 1, shape.scale());
                    want.extend(o);
                    want_lse.push(l);
                }
            }
        }
        close(&format!("{shape:?} out"), &out, &want, 3e-6);
        close(&format!("{shape:?} lse"), &lse, &want_lse, 3e-6);
    }
}

#[test]
fn every_mode_gives_the_same_bits() {
    for (i, shape) in SHAPES.into_iter().enumerate() {
        let w = World::new(shape, &[(200, 0), (330, 192), (210, 160)], 5 + i as u64);
        let width = shape.hq * shape.hd;
        let d = Device::cpu(1);
        let whole: Vec<_> = (0..3).map(|s| w.forward(&d, &[(s, 0, w.seqs[s].q.len() / width)])).collect();
        let check = |d: &Device, parts: &[(usize, usize, usize)]| {
            let (out, lse) = w.forward(d, parts);
            let mut row = 0;
            for &(s, from, to) in parts {
                for t in from..to {
                    let at = |x: &[f32], row: usize, w: usize| bits(&x[row * w..(row + 1) * w]);
                    assert_eq!(
                        at(&out, row, width),
                        at(&whole[s].0, t, width),
                        "{shape:?} {d:?} token {t} of {parts:?}"
                    );
                    assert_eq!(at(&lse, row, shape.hq), at(&whole[s].1, t, shape.hq), "{shape:?} {d:?} {parts:?}");
                    row += 1;
                }
            }
        };
        let devices = [Device::cpu(1), Device::cpu(2), Device::cpu(3), Device::cpu_deferred(2)];
        for d in &devices {
            // Packed, each sequence whole; then only what is not shared, beside the sequence that it is shared with.
            check(d, &[(0, 0, 200), (1, 0, 330), (2, 0, 210)]);
            check(d, &[(0, 0, 200), (1, 192, 330), (2, 160, 210)]);
        }
        // One token at a time, alone and in company.
        for t in (0..330).step_by(if i == 1 { 1 } else { 41 }) {
            check(&devices[t % 4], &[(1, t, t + 1)]);
        }
        check(&devices[1], &[(0, 199, 200), (1, 329, 330), (2, 209, 210)]);
        // Random chunks, mixed with decoding.
        let mut rng = Rng(77 + i as u64);
        let mut at = 0;
        while at < 330 {
            let n = (1 + rng.below(90)).min(330 - at);
            check(&devices[rng.below(4)], &[(0, 199, 200), (1, at, at + n)]);
            at += n;
        }
    }
}

#[test]
fn paged_backward_is_its_derivative() {
    for (i, shape) in SHAPES.into_iter().enumerate() {
        let Shape { hq, hkv, hd } = shape;
        let w = World::new(shape, &[(150, 0), (190, 128), (1, 0), (160, 128), (40, 0)], 21 + i as u64);
        let parts = [(0, 0, 150), (1, 128, 190), (2, 0, 1), (3, 128, 160), (4, 30, 40), (4, 40, 40)];
        let t: usize = parts.iter().map(|p| p.2 - p.1).sum();
        let dout = Rng(3).floats(t * hq * hd);
        let (mut dq, mut dk, mut dv) =
            (vec![], vec![0.0; w.pages * BLOCK * hkv * hd], vec![0.0; w.pages * BLOCK * hkv * hd]);
        let mut row = 0;
        for &(seq, from, to) in &parts {
            let (s, slots) = (&w.seqs[seq], w.slots(seq, 0..to));
            for t in from..to {
                for h in 0..hq {
                    let g = h * hkv / hq;
                    let at = |x: &[f32], j: usize| x[(j * hkv + g) * hd..][..hd].to_vec();
                    let q = &s.q[(t * hq + h) * hd..][..hd];
                    let dout = &dout[(row * hq + h) * hd..][..hd];
                    let (a, per_key) = naive_backward(q, |j| at(&s.k, j), |j| at(&s.v, j), t + 1, shape.scale(), dout);
                    dq.extend(a);
                    for (j, (a, b)) in per_key.iter().enumerate() {
                        let base = (slots[j] as usize * hkv + g) * hd;
                        dk[base..].iter_mut().zip(a).for_each(|(x, a)| *x += a);
                        dv[base..].iter_mut().zip(b).for_each(|(x, b)| *x += b);
                    }
                }
                row += 1;
            }
        }
        let mut first: Option<[Vec<u32>; 3]> = None;
        for d in [Device::cpu(1), Device::cpu(2), Device::cpu(3), Device::cpu(8), Device::cpu_deferred(2)] {
            let s = d.stream();
            let cache = w.cache(&s, |seq| w.seqs[seq].q.len() / (hq * hd));
            let (out, lse) = (d.alloc(DType::F32, t * hq * hd), d.alloc(DType::F32, t * hq));
            let (q, seg, stride) = (d.upload(&w.rows(&parts, 5)), w.segments(&d, &parts), hq * hd + 5);
            let layer = &cache.layers[0];
            paged_forward(&s, &q, stride, layer, &seg, hq, hkv, hd, shape.scale(), &out, Some(&lse));
            let grads = KvCache::new(&d, DType::F32, 1, w.pages, hkv, hd);
            s.write(&grads.layers[0].k, &vec![0.5f32; grads.layers[0].k.len()]);
            s.write(&grads.layers[0].v, &vec![0.25f32; grads.layers[0].v.len()]);
            let (dq_got, dout) = (d.alloc(DType::F32, t * stride), d.upload(&dout));
            s.write(&dq_got, &vec![7.0f32; t * stride]);
            let (scale, g) = (shape.scale(), &grads.layers[0]);
            paged_backward(&s, &q, stride, layer, &seg, hq, hkv, hd, scale, &out, &lse, &dout, &dq_got, g);
            // Every slot of every page, as rows.
            let n = w.pages * BLOCK;
            let (slots, width) = (d.upload(&(0..n as u32).collect::<Vec<_>>()), hkv * hd);
            let rows = d.zeros(DType::F32, n * 2 * width);
            kv_cache::gather(
                &s,
                g,
                &grads,
                Tokens { rows: &rows, stride: 2 * width, k: 0, v: width, slots: &slots, n },
            );
            let (dq_got, rows) = (s.read::<f32>(&dq_got).wait().unwrap(), s.read::<f32>(&rows).wait().unwrap());
            let beside = dq_got.chunks(stride).flat_map(|r| &r[hq * hd..]);
            assert!(beside.into_iter().all(|&x| x == 7.0), "columns beside the queries' gradients were written");
            let dq_got: Vec<f32> = dq_got.chunks(stride).flat_map(|r| r[..hq * hd].to_vec()).collect();
            let dk_got: Vec<f32> = rows.chunks(2 * width).flat_map(|r| r[..width].to_vec()).collect();
            let dv_got: Vec<f32> = rows.chunks(2 * width).flat_map(|r| r[width..].to_vec()).collect();
            match &first {
                None => {
                    close(&format!("{shape:?} dq"), &dq_got, &dq, 2e-5);
                    close(&format!("{shape:?} dk"), &dk_got, &dk.iter().map(|x| x + 0.5).collect::<Vec<_>>(), 2e-5);
                    close(&format!("{shape:?} dv"), &dv_got, &dv.iter().map(|x| x + 0.25).collect::<Vec<_>>(), 2e-5);
                    first = Some([bits(&dq_got), bits(&dk_got), bits(&dv_got)]);
                }
                Some(f) => assert!(*f == [bits(&dq_got), bits(&dk_got), bits(&dv_got)], "{shape:?} on {d:?}"),
            }
        }
    }
}

#[test]
fn varlen_forward_and_backward_are_attention_within_windows() {
    for (h, hd, causal) in [(4, 80, false), (2, 16, true), (3, 24, false), (3, 20, false), (1, 8, true), (2, 64, true)]
    {
        let windows = [64, 4, 0, 1, 260, 37];
        let cu: Vec<u32> = std::iter::once(0)
            .chain(windows.iter().scan(0, |a, &n| {
                *a += n;
                Some(*a)
            }))
            .collect();
        let (t, w, scale) = (*cu.last().unwrap() as usize, h * hd, 3.0 / (hd as f32).sqrt());
        let mut rng = Rng(hd as u64);
        let (x, dout) = (rng.floats(t * 3 * w), rng.floats(t * w));
        let (mut out, mut lse, mut dx) = (vec![0.0; t * w], vec![0.0; t * h], vec![0.0; t * 3 * w]);
        for c in cu.windows(2) {
            let (from, to) = (c[0] as usize, c[1] as usize);
            for (i, head) in (from..to).flat_map(|i| (0..h).map(move |head| (i, head))) {
                let at = |j: usize, part: usize| x[j * 3 * w + part * w + head * hd..][..hd].to_vec();
                let n = if causal { i + 1 - from } else { to - from };
                let (q, dout) = (at(i, 0), &dout[i * w + head * hd..][..hd]);
                let (o, l, _) = naive(&q, |j| at(from + j, 1), |j| at(from + j, 2), n, scale);
                out[i * w + head * hd..][..hd].copy_from_slice(&o);
                lse[i * h + head] = l;
                let (dq, kv) = naive_backward(&q, |j| at(from + j, 1), |j| at(from + j, 2), n, scale, dout);
                dx[i * 3 * w + head * hd..][..hd].copy_from_slice(&dq);
                for (j, (dk, dv)) in kv.iter().enumerate() {
                    let base = (from + j) * 3 * w + head * hd;
                    dx[base + w..].iter_mut().zip(dk).for_each(|(x, g)| *x += g);
                    dx[base + 2 * w..].iter_mut().zip(dv).for_each(|(x, g)| *x += g);
                }
            }
        }
        let mut first: Option<[Vec<u32>; 2]> = None;
        for d in [Device::cpu(1), Device::cpu(2), Device::cpu(3), Device::cpu_deferred(8)] {
            let (s, n) = (d.stream(), windows.len());
            let (xb, cub) = (d.upload(&x), d.upload(&cu));
            let (outb, lseb) = (d.alloc(DType::F32, t * w), d.alloc(DType::F32, t * h));
            let (doutb, dxb) = (d.upload(&dout), d.alloc(DType::F32, t * 3 * w));
            varlen_forward(&s, &xb, &cub, n, h, hd, scale, causal, &outb, Some(&lseb));
            varlen_backward(&s, &xb, &cub, n, h, hd, scale, causal, &outb, &lseb, &doutb, &dxb);
            let (got, lse_got, dx_got) = (s.read(&outb), s.read(&lseb), s.read(&dxb));
            let (got, lse_got, dx_got) = (got.wait().unwrap(), lse_got.wait().unwrap(), dx_got.wait().unwrap());
            match &first {
                None => {
                    close("out", &got, &out, 3e-6);
                    close("lse", &lse_got, &lse, 3e-6);
                    close("dqkv", &dx_got, &dx, 2e-5);
                    first = Some([bits(&got), bits(&dx_got)]);
                }
                Some(f) => assert!(*f == [bits(&got), bits(&dx_got)], "{h} heads of {hd} on {d:?}"),
            }
        }
    }
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    let mut rng = Rng(9);
    let (a, b) = (rng.floats(40 * 140), rng.floats(140 * 96));
    let run = |k: &Kernels, m: usize, n: usize, steps: usize, limited: bool| {
        let mut c = vec![1.0f32; m * 96];
        let limits: Vec<u32> = (0..m).map(|i| (i * steps / m.max(1)) as u32).collect();
        let blocks: Vec<*const f32> = (0..5).map(|i| b[i * 28 * 96..].as_ptr()).collect();
        let p = Product {
            a: a.as_ptr(),
            a_row: 140,
            a_col: 1,
            m,
            b: blocks.as_ptr(),
            block: 28,
            b_row: 96,
            next: std::ptr::null(),
            k: steps,
            limits: if limited { limits.as_ptr() } else { std::ptr::null() },
            c: c.as_mut_ptr(),
            c_row: 96,
            n,
            accumulate: !limited,
        };
        // SAFETY: the processor has it, and the shape fits.
        unsafe { (k.product)(&p) };
        c
    };
    let portable = available().last().unwrap();
    for k in available() {
        for (m, n, steps) in [(1, 16, 1), (5, 48, 29), (12, 32, 140), (13, 96, 64), (37, 80, 113)] {
            assert_eq!(bits(&run(k, m, n, steps, false)), bits(&run(portable, m, n, steps, false)), "{m} {n} {steps}");
        }
        for valid in [1, 15, 16, 17, 100, 128] {
            let scores: Vec<f32> = Rng(valid as u64).floats(128).iter().map(|x| x * 40.0).collect();
            let (mut x, mut y) = (scores.clone(), scores.clone());
            let (mut dx, mut dy) = (scores.clone(), scores.clone());
            x[valid..].fill(f32::NAN);
            y[valid..].fill(f32::INFINITY);
            dx[valid..].fill(f32::NAN);
            let (px, py) = (x.as_mut_ptr(), y.as_mut_ptr());
            // SAFETY: the processor has both.
            unsafe {
                let (m, s) = (k.softmax_cut)(px, valid, 128, Exponent::new(0.5));
                let (m2, s2) = (portable.softmax_cut)(py, valid, 128, Exponent::new(0.5));
                assert_eq!((m.to_bits(), s.to_bits()), (m2.to_bits(), s2.to_bits()));
                assert_eq!(bits(&x), bits(&y));
                assert!(x[valid..].iter().all(|&p| p == 0.0) && s >= 1.0 - 1e-6);
                let (mut x, mut y) = (scores.clone(), scores.clone());
                let e = Exponent::new(0.5);
                (k.softmax_backward)(x.as_mut_ptr(), dx.as_mut_ptr(), valid, 128, e, 21.0, 0.3, 0.5);
                (portable.softmax_backward)(y.as_mut_ptr(), dy.as_mut_ptr(), valid, 128, e, 21.0, 0.3, 0.5);
                assert_eq!((bits(&x), bits(&dx)), (bits(&y), bits(&dy)));
                assert_eq!((k.dot)(px, py, 128).to_bits(), (portable.dot)(px, py, 128).to_bits());
                (k.combine)(px, scores.as_ptr(), 128, 0.3, 0.7);
                (portable.combine)(py, scores.as_ptr(), 128, 0.3, 0.7);
            }
            assert_eq!(bits(&x), bits(&y));
        }
        // The exponential: exact at 0, zero where it would be denormal, NaN for NaN, within 2 ulp elsewhere.
        // SAFETY: the processor has it.
        let exp2 = |x: f32| unsafe { (k.exp2)(x) };
        assert_eq!((exp2(0.0), exp2(f32::NEG_INFINITY), exp2(-126.5)), (1.0, 0.0, 0.0));
        assert!(exp2(f32::NAN).is_nan());
        for i in 0..4000 {
            let x = -126.0 + 0.0318 * i as f32;
            let want = f64::from(x).exp2();
            assert!((f64::from(exp2(x)) / want - 1.0).abs() < 1.3e-7, "2^{x}: {} not {want}", exp2(x));
        }
    }
}

#[test]
fn the_limits_of_a_product_skip_only_zeros() {
    // A row's limit bounds its tile: entries past a row's own limit are multiplied, so they must be zero in A.
    for k in available() {
        let (m, steps) = (14, 28);
        let a: Vec<f32> = (0..m * steps).map(|i| if i % steps <= i / steps { 1.0 } else { 0.0 }).collect();
        let mut b = vec![2.0f32; steps * 16];
        b[m * 16..].fill(f32::NAN);
        let limits: Vec<u32> = (1..=m as u32).collect();
        let mut c = vec![f32::NAN; m * 16];
        let p = Product {
            a: a.as_ptr(),
            a_row: steps,
            a_col: 1,
            m,
            b: &b.as_ptr(),
            block: steps,
            b_row: 16,
            next: std::ptr::null(),
            k: steps,
            limits: limits.as_ptr(),
            c: c.as_mut_ptr(),
            c_row: 16,
            n: 16,
            accumulate: false,
        };
        // SAFETY: the processor has it, and the shape fits.
        unsafe { (k.product)(&p) };
        assert!(c.chunks(16).enumerate().all(|(i, r)| r.iter().all(|&x| x == 2.0 * (i + 1) as f32)));
    }
}
