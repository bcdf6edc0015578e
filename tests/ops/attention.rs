//! [`varft::ops::attention`]: against f64, and bit for bit against itself in other batches, chunks and kernels.

use super::{Noise, as_good_as_bf16, devices, emulated, pairs, read, round, setting, wide, wide32};
use half::bf16;
use std::ops::Range;
use varft::device::{Buffer, DType, Device};
use varft::ops::attention::{Segments, paged_backward, paged_forward, varlen_backward, varlen_forward};
use varft::ops::kv_cache::{BLOCK, KvLayer};

#[derive(Clone, Copy, Debug)]
struct Shape {
    hq: usize,
    hkv: usize,
    hd: usize,
}

/// Every head dimension that there are kernels for; groups of one, of several, of more rows than a tile of decoding has; rows of
/// queries at odd addresses (`PADS`).
const SHAPES: [Shape; 5] = [
    Shape { hq: 4, hkv: 2, hd: 16 },
    Shape { hq: 14, hkv: 2, hd: 64 },
    Shape { hq: 2, hkv: 2, hd: 80 },
    Shape { hq: 7, hkv: 1, hd: 128 },
    Shape { hq: 19, hkv: 1, hd: 16 },
];
/// The heads of the 3B and the 7B model.
const MODELS: [Shape; 2] = [Shape { hq: 16, hkv: 2, hd: 128 }, Shape { hq: 28, hkv: 4, hd: 128 }];
/// Elements behind the queries of a row: with five, no vector of 16 bytes can be moved.
const PADS: [usize; 2] = [5, 8];

/// Each emulated architecture with one of the two, a card with both.
fn padded() -> Vec<(Device, usize)> {
    let emulated = devices().into_iter().filter(|d| d.card().is_none()).zip(PADS);
    emulated.chain(setting::card().into_iter().flat_map(|card| PADS.map(|pad| (card.clone(), pad)))).collect()
}

impl Shape {
    fn scale(self) -> f32 {
        3.0 / (self.hd as f32).sqrt()
    }
    /// Elements of a row of queries, and of keys.
    fn widths(self) -> (usize, usize) {
        (self.hq * self.hd, self.hkv * self.hd)
    }
}

/// One sequence's rows, and where its tokens are in the cache.
struct Sequence {
    len: usize,
    q: Vec<bf16>,
    k: Vec<bf16>,
    v: Vec<bf16>,
    table: Vec<u32>,
}

/// Sequences in one cache. A sequence may share the whole pages of the first one's beginning.
struct World {
    shape: Shape,
    seqs: Vec<Sequence>,
    pages: usize,
}

/// A sequence, and which of its tokens are queries: the last of them sees up to itself.
type Part = (usize, Range<usize>);

impl World {
    /// `lens`: (length, tokens shared with sequence 0). Pages are handed out in a scattered order.
    fn new(shape: Shape, lens: &[(usize, usize)], rng: &mut Noise) -> World {
        let pages = lens.iter().map(|l| l.0.div_ceil(BLOCK)).sum::<usize>() + 2;
        let mut free: Vec<u32> = (0..pages as u32).collect();
        let mut seqs: Vec<Sequence> = Vec::new();
        let (wq, wkv) = shape.widths();
        for &(len, shared) in lens {
            let [q, mut k, mut v] = [wq, wkv, wkv].map(|w| rng.bf16s(len * w, 1.0));
            let mut table = vec![];
            if let (Some(first), true) = (seqs.first(), shared > 0) {
                k[..shared * wkv].copy_from_slice(&first.k[..shared * wkv]);
                v[..shared * wkv].copy_from_slice(&first.v[..shared * wkv]);
                table.extend(&first.table[..shared / BLOCK]);
            }
            while table.len() < len.div_ceil(BLOCK) {
                table.push(free.swap_remove((rng.next() % free.len() as u64) as usize));
            }
            seqs.push(Sequence { len, q, k, v, table });
        }
        World { shape, seqs, pages }
    }

    /// Where a token's head begins in the pages.
    fn place(&self, seq: usize, token: usize, head: usize) -> usize {
        let page = self.seqs[seq].table[token / BLOCK] as usize;
        ((page * self.shape.hkv + head) * BLOCK + token % BLOCK) * self.shape.hd
    }

    /// Elements of all pages.
    fn elements(&self) -> usize {
        self.pages * BLOCK * self.shape.widths().1
    }

    /// Pages full of NaN, but for the tokens of each sequence that the parts see.
    fn cache(&self, d: &Device, parts: &[Part]) -> KvLayer {
        let Shape { hkv, hd, .. } = self.shape;
        let [k, v] = [0, 1].map(|which| {
            let mut pages = vec![bf16::NAN; self.elements()];
            for &(seq, Range { end, .. }) in parts {
                let s = &self.seqs[seq];
                let rows = if which == 0 { &s.k } else { &s.v };
                for (i, head) in rows.chunks(hd).take(end * hkv).enumerate() {
                    pages[self.place(seq, i / hkv, i % hkv)..][..hd].copy_from_slice(head);
                }
            }
            d.upload(&pages)
        });
        KvLayer { k, v }
    }

    /// The block tables lie in the opposite order, and the segments name their rows.
    fn segments(&self, d: &Device, parts: &[Part]) -> Segments {
        let stride = self.seqs.iter().map(|s| s.table.len()).max().unwrap() + 1;
        let mut cu = vec![0u32];
        // Entries past the context name no page at all.
        let mut tables = vec![u32::MAX; parts.len() * stride];
        for (i, (seq, tokens)) in parts.iter().enumerate() {
            cu.push(cu[i] + tokens.len() as u32);
            let n = tokens.end.div_ceil(BLOCK);
            tables[(parts.len() - 1 - i) * stride..][..n].copy_from_slice(&self.seqs[*seq].table[..n]);
        }
        let kv: Vec<u32> = parts.iter().map(|p| p.1.end as u32).collect();
        let (n, rows) = (parts.len(), cu[parts.len()] as usize);
        Segments {
            cu_seqlens_q: d.upload(&cu),
            kv_lens: d.upload(&kv),
            block_tables: d.upload(&tables),
            table_rows: d.upload(&(0..n as u32).rev().collect::<Vec<_>>()),
            stride,
            n,
            rows,
        }
    }

    /// The parts' queries, each row followed by `pad` NaN.
    fn queries(&self, parts: &[Part], pad: usize) -> Vec<bf16> {
        let w = self.shape.widths().0;
        let row = |seq: usize, t: usize| [&self.seqs[seq].q[t * w..(t + 1) * w], &vec![bf16::NAN; pad]].concat();
        parts.iter().flat_map(|(seq, tokens)| tokens.clone().flat_map(|t| row(*seq, t))).collect()
    }

    fn forward(&self, d: &Device, parts: &[Part], pad: usize) -> (Vec<bf16>, Vec<f32>) {
        let (s, Shape { hq, hkv, hd }) = (d.stream(), self.shape);
        let (kv, seg) = (self.cache(d, parts), self.segments(d, parts));
        let q = d.upload(&self.queries(parts, pad));
        let (out, lse) = (d.alloc(DType::BF16, seg.rows * hq * hd), d.alloc(DType::F32, seg.rows * hq));
        paged_forward(&s, &q, hq * hd + pad, &kv, &seg, hq, hkv, hd, self.shape.scale(), &out, Some(&lse));
        (read(&s, &out), read(&s, &lse))
    }

    /// One query head of a token.
    fn view(&self, seq: usize, token: usize, head: usize) -> View<'_> {
        let (s, Shape { hq, hkv, hd }) = (&self.seqs[seq], self.shape);
        let at = head * hkv / hq * hd;
        View {
            q: &s.q[(token * hq + head) * hd..][..hd],
            k: &s.k[at..],
            v: &s.v[at..],
            stride: hkv * hd,
            n: token + 1,
            scale: f64::from(self.shape.scale()),
        }
    }
}

/// A query and the keys and values that it sees, in rows of `stride`.
struct View<'a> {
    q: &'a [bf16],
    k: &'a [bf16],
    v: &'a [bf16],
    stride: usize,
    n: usize,
    scale: f64,
}

/// What a query adds to gradients: `[hd]`, and `[n, hd]` for the keys and values it sees.
struct Gradient {
    dq: Vec<f64>,
    dk: Vec<f64>,
    dv: Vec<f64>,
}

fn dot(a: &[bf16], b: &[bf16]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a.to_f64() * b.to_f64()).sum()
}

fn add(to: &mut [f64], x: &[bf16], factor: f64) {
    to.iter_mut().zip(x).for_each(|(to, x)| *to += x.to_f64() * factor);
}

impl View<'_> {
    fn key(&self, j: usize) -> &[bf16] {
        &self.k[j * self.stride..][..self.q.len()]
    }
    fn value(&self, j: usize) -> &[bf16] {
        &self.v[j * self.stride..][..self.q.len()]
    }

    /// Scores, the largest, and the log-sum-exp.
    fn scores(&self) -> (Vec<f64>, f64, f64) {
        let s: Vec<f64> = (0..self.n).map(|j| dot(self.q, self.key(j)) * self.scale).collect();
        let max = s.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let lse = max + s.iter().map(|s| (s - max).exp()).sum::<f64>().ln();
        (s, max, lse)
    }

    /// The output; `bf16`: with probabilities and result rounded.
    fn output(&self, bf16: bool) -> Vec<f64> {
        let ((s, max, lse), mut out) = (self.scores(), vec![0.0; self.q.len()]);
        for (j, s) in s.iter().enumerate() {
            let p = (s - max).exp();
            add(&mut out, self.value(j), if bf16 { round(p) } else { p });
        }
        let out = out.into_iter().map(|o| o * (max - lse).exp());
        if bf16 { out.map(round).collect() } else { out.collect() }
    }

    /// The gradient; `bf16`: with output, probabilities, score gradients and dq rounded.
    fn gradient(&self, dout: &[bf16], bf16: bool) -> Gradient {
        let (hd, maybe) = (self.q.len(), |x: f64| if bf16 { round(x) } else { x });
        let (s, _, lse) = self.scores();
        let delta: f64 = self.output(bf16).iter().zip(dout).map(|(o, d)| o * d.to_f64()).sum();
        let mut g = Gradient { dq: vec![0.0; hd], dk: vec![0.0; self.n * hd], dv: vec![0.0; self.n * hd] };
        for (j, s) in s.iter().enumerate() {
            let p = (s - lse).exp();
            let ds = maybe(p * (dot(dout, self.value(j)) - delta)) * self.scale;
            add(&mut g.dq, self.key(j), ds);
            add(&mut g.dk[j * hd..], self.q, ds);
            add(&mut g.dv[j * hd..], dout, maybe(p));
        }
        g.dq.iter_mut().for_each(|x| *x = maybe(*x));
        g
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn paged_forward_is_attention() {
    let mut rng = Noise::fresh();
    for shape in SHAPES.into_iter().chain(MODELS) {
        let (lens, parts): (Vec<_>, Vec<Part>) = if MODELS.iter().any(|m| m.hq == shape.hq) {
            (vec![(192, 0), (40, 0)], vec![(0, 0..192), (1, 39..40)])
        } else {
            let lens = vec![(300, 0), (1, 0), (33, 0), (129, 0), (310, 288), (64, 0)];
            (lens, vec![(1, 0..1), (0, 297..300), (2, 0..33), (3, 128..129), (2, 5..5), (4, 250..310), (5, 31..64)])
        };
        let w = World::new(shape, &lens, &mut rng);
        let (mut want, mut plain, mut want_lse) = (vec![], vec![], vec![]);
        for (seq, tokens) in &parts {
            for (t, h) in tokens.clone().flat_map(|t| (0..shape.hq).map(move |h| (t, h))) {
                let view = w.view(*seq, t, h);
                want.extend(view.output(false));
                plain.extend(view.output(true));
                want_lse.push(view.scores().2);
            }
        }
        for (d, pad) in padded() {
            let (out, lse) = w.forward(&d, &parts, pad);
            let what = format!("{shape:?} on {d:?}");
            as_good_as_bf16(&what, &wide(&out), &plain, &want);
            // The log-sum-exp is f32, and so is what it is made of.
            for (got, want) in lse.iter().zip(&want_lse) {
                assert!((f64::from(*got) - want).abs() < 1e-5 * (1.0 + want.abs()), "{what}: lse {got}, not {want}");
            }
        }
    }
}

#[test]
fn every_mode_gives_the_same_bits() {
    let mut rng = Noise::fresh();
    for (pair, shape) in pairs().into_iter().flat_map(|pair| SHAPES.map(|shape| (pair.clone(), shape))) {
        let [d, other] = pair;
        let w = World::new(shape, &[(150, 0), (280, 128), (170, 96)], &mut rng);
        let whole: Vec<_> = w.seqs.iter().enumerate().map(|(i, s)| w.forward(&d, &[(i, 0..s.len)], 0)).collect();
        let check = |d: &Device, parts: &[Part], pad: usize| {
            let (out, lse) = w.forward(d, parts, pad);
            let width = shape.widths().0;
            let (mut outs, mut lses) = (out.chunks(width), lse.chunks(shape.hq));
            for (seq, t) in parts.iter().flat_map(|(seq, tokens)| tokens.clone().map(move |t| (*seq, t))) {
                let (want, want_lse) = &whole[seq];
                assert_eq!(outs.next(), want.chunks(width).nth(t), "{shape:?} {d:?} token {t} of {parts:?}");
                let got = bits(lses.next().unwrap());
                assert_eq!(got, bits(&want_lse[t * shape.hq..][..shape.hq]), "lse: {shape:?} {d:?} {t} of {parts:?}");
            }
        };
        // Packed, each sequence whole; then only what is not shared, beside the sequence that it is shared with.
        check(&other, &[(0, 0..150), (1, 0..280), (2, 0..170)], 0);
        check(&d, &[(0, 0..150), (1, 128..280), (2, 96..170)], 8);
        // One token at a time: alone, where blocks share its cuts; in company; with so many that no blocks share any.
        for t in [0, 31, 32, 127, 128, 255, 256, 279] {
            check(&other, &[(1, t..t + 1)], 5);
        }
        check(&d, &[(0, 149..150), (1, 279..280), (2, 100..100), (2, 169..170)], 0);
        check(&other, &(257..280).map(|t| (1, t..t + 1)).collect::<Vec<_>>(), 8);
        // Random chunks, mixed with decoding.
        let mut at = 0;
        while at < 280 {
            let n = (1 + rng.next() as usize % 90).min(280 - at);
            check(if n.is_multiple_of(2) { &d } else { &other }, &[(0, 149..150), (1, at..at + n)], 0);
            at += n;
        }
    }
}

#[test]
fn paged_backward_is_its_derivative() {
    let mut rng = Noise::fresh();
    for shape in SHAPES.into_iter().chain(MODELS) {
        let (lens, parts): (Vec<_>, Vec<Part>) = if MODELS.iter().any(|m| m.hq == shape.hq) {
            (vec![(96, 0), (100, 96)], vec![(0, 0..96), (1, 96..100)])
        } else {
            // Pages shared by the first segment with others; by two that the first is not among; by nobody.
            let lens = vec![(150, 0), (190, 128), (1, 0), (160, 128), (40, 0), (70, 64)];
            (lens, vec![(4, 30..40), (1, 128..190), (0, 0..150), (2, 0..1), (3, 128..160), (4, 40..40), (5, 64..70)])
        };
        let w = World::new(shape, &lens, &mut rng);
        let (Shape { hq, hkv, hd }, n) = (shape, w.elements());
        let rows: usize = parts.iter().map(|p| p.1.len()).sum();
        let dout = rng.bf16s(rows * hq * hd, 1.0);
        let zero = || Gradient { dq: vec![], dk: vec![0.5; n], dv: vec![0.25; n] };
        let [want, plain] = [false, true].map(|bf16| {
            let (mut sum, mut douts) = (zero(), dout.chunks(hd));
            for (seq, tokens) in &parts {
                for (t, h) in tokens.clone().flat_map(|t| (0..hq).map(move |h| (t, h))) {
                    let g = w.view(*seq, t, h).gradient(douts.next().unwrap(), bf16);
                    sum.dq.extend(g.dq);
                    for (j, (dk, dv)) in g.dk.chunks(hd).zip(g.dv.chunks(hd)).enumerate() {
                        let at = w.place(*seq, j, h * hkv / hq);
                        sum.dk[at..].iter_mut().zip(dk).for_each(|(to, x)| *to += x);
                        sum.dv[at..].iter_mut().zip(dv).for_each(|(to, x)| *to += x);
                    }
                }
            }
            sum
        });
        type Bits = (Vec<bf16>, Vec<u32>, Vec<u32>);
        let mut first: [Option<Bits>; 2] = [None, None];
        for (d, pad) in padded() {
            let (s, stride) = (d.stream(), hq * hd + pad);
            let (kv, seg) = (w.cache(&d, &parts), w.segments(&d, &parts));
            let q = d.upload(&w.queries(&parts, pad));
            let (out, lse) = (d.alloc(DType::BF16, rows * hq * hd), d.alloc(DType::F32, rows * hq));
            paged_forward(&s, &q, stride, &kv, &seg, hq, hkv, hd, shape.scale(), &out, Some(&lse));
            let dkv = KvLayer { k: d.upload(&vec![0.5f32; n]), v: d.upload(&vec![0.25f32; n]) };
            let (dq, doutb) = (d.upload(&vec![bf16::ONE; rows * stride]), d.upload(&dout));
            paged_backward(&s, &q, stride, &kv, &seg, hq, hkv, hd, shape.scale(), &out, &lse, &doutb, &dq, &dkv);
            let (dq, dk, dv) = (read::<bf16>(&s, &dq), read::<f32>(&s, &dkv.k), read::<f32>(&s, &dkv.v));
            let beside = dq.chunks(stride).flat_map(|r| &r[hq * hd..]);
            assert!(beside.into_iter().all(|&x| x == bf16::ONE), "columns beside the queries' gradients were written");
            let dq: Vec<bf16> = dq.chunks(stride).flat_map(|r| r[..hq * hd].to_vec()).collect();
            let got = (dq, bits(&dk), bits(&dv));
            // The emulated architectures agree to the bit. A card, whose exponentials are its own, agrees with itself.
            let kin = usize::from(d.card().is_some());
            if let Some(first) = &first[kin] {
                assert!(*first == got, "{shape:?} on {d:?}: other bits");
                continue;
            }
            as_good_as_bf16(&format!("{shape:?} dq"), &wide(&got.0), &plain.dq, &want.dq);
            as_good_as_bf16(&format!("{shape:?} dk"), &wide32(&dk), &plain.dk, &want.dk);
            as_good_as_bf16(&format!("{shape:?} dv"), &wide32(&dv), &plain.dv, &want.dv);
            first[kin] = Some(got);
        }
    }
}

/// Packed windows on a device.
#[derive(Clone)]
struct Windows {
    h: usize,
    hd: usize,
    causal: bool,
    cu: Vec<u32>,
}

impl Windows {
    fn run(&self, d: &Device, x: &[bf16], dout: &[bf16]) -> (Vec<bf16>, Vec<bf16>) {
        let &Windows { h, hd, causal, ref cu } = self;
        let (s, n, t, scale) = (d.stream(), cu.len() - 1, *cu.last().unwrap() as usize, self.scale());
        let (x, dout, cu) = (d.upload(x), d.upload(dout), d.upload(cu));
        let room = |dtype, n: usize| -> Buffer { d.alloc(dtype, n) };
        let (out, lse, dx) =
            (room(DType::BF16, t * h * hd), room(DType::F32, t * h), room(DType::BF16, 3 * t * h * hd));
        varlen_forward(&s, &x, &cu, n, h, hd, scale, causal, &out, Some(&lse));
        varlen_backward(&s, &x, &cu, n, h, hd, scale, causal, &out, &lse, &dout, &dx);
        (read(&s, &out), read(&s, &dx))
    }

    fn scale(&self) -> f32 {
        3.0 / (self.hd as f32).sqrt()
    }
}

#[test]
fn varlen_forward_and_backward_are_attention_within_windows() {
    let mut rng = Noise::fresh();
    // The vision tower's heads among them.
    for (h, hd, causal) in [(16, 80, false), (2, 16, true), (3, 64, false), (1, 128, true), (1, 128, false)] {
        let lens = if h == 16 { vec![64, 36, 16] } else { vec![64, 4, 0, 1, 200, 37] };
        let cu = std::iter::once(0).chain(lens.iter().scan(0, |end, n| {
            *end += n;
            Some(*end)
        }));
        let windows = Windows { h, hd, causal, cu: cu.collect() };
        let (t, w) = (lens.iter().sum::<u32>() as usize, h * hd);
        let (x, dout) = (rng.bf16s(t * 3 * w, 1.0), rng.bf16s(t * w, 1.0));
        let [want, plain] = [false, true].map(|bf16| {
            let (mut out, mut dx) = (vec![0.0; t * w], vec![0.0; t * 3 * w]);
            for ends in windows.cu.windows(2) {
                let (from, to) = (ends[0] as usize, ends[1] as usize);
                for (i, head) in (from..to).flat_map(|i| (0..h).map(move |head| (i, head * hd))) {
                    let view = View {
                        q: &x[i * 3 * w + head..][..hd],
                        k: &x[from * 3 * w + w + head..],
                        v: &x[from * 3 * w + 2 * w + head..],
                        stride: 3 * w,
                        n: if causal { i + 1 - from } else { to - from },
                        scale: f64::from(windows.scale()),
                    };
                    out[i * w + head..][..hd].copy_from_slice(&view.output(bf16));
                    let g = view.gradient(&dout[i * w + head..][..hd], bf16);
                    dx[i * 3 * w + head..][..hd].copy_from_slice(&g.dq);
                    for (j, (dk, dv)) in g.dk.chunks(hd).zip(g.dv.chunks(hd)).enumerate() {
                        let at = (from + j) * 3 * w + w + head;
                        dx[at..].iter_mut().zip(dk).for_each(|(to, g)| *to += g);
                        dx[at + w..].iter_mut().zip(dv).for_each(|(to, g)| *to += g);
                    }
                }
            }
            if bf16 {
                dx.iter_mut().for_each(|x| *x = round(*x));
            }
            (out, dx)
        });
        let from = *windows.cu.iter().nth_back(1).unwrap() as usize;
        let last = Windows { cu: vec![0, (t - from) as u32], ..windows.clone() };
        for pair in pairs() {
            let what = format!("h {h}, hd {hd}, causal {causal} on {pair:?}");
            let [first, second] = pair.each_ref().map(|d| windows.run(d, &x, &dout));
            as_good_as_bf16(&what, &wide(&first.0), &plain.0, &want.0);
            as_good_as_bf16(&format!("dqkv of {what}"), &wide(&first.1), &plain.1, &want.1);
            assert!(first == second, "{what}: other bits");
            // The last window alone.
            let alone = last.run(&pair[0], &x[from * 3 * w..], &dout[from * w..]);
            assert!(alone.0 == first.0[from * w..] && alone.1 == first.1[from * 3 * w..], "{what}: other bits alone");
        }
    }
}

#[test]
fn no_rows_are_no_work_and_heads_without_a_kernel_are_named() {
    let mut rng = Noise::fresh();
    let d = emulated()[0].clone();
    let w = World::new(SHAPES[0], &[(3, 0)], &mut rng);
    assert_eq!(w.forward(&d, &[(0, 2..2)], 0), (vec![], vec![]));
    let none = Windows { h: 2, hd: 16, causal: false, cu: vec![0] };
    assert_eq!(none.run(&d, &[], &[]), (vec![], vec![]));
    let (s, [x, cu, out]) = (d.stream(), [d.zeros(DType::BF16, 72), d.upload(&[0u32, 1]), d.alloc(DType::BF16, 24)]);
    varlen_forward(&s, &x, &cu, 1, 1, 24, 1.0, false, &out, None);
    let said = s.read::<bf16>(&out).wait().unwrap_err().to_string();
    assert!(said.contains("heads of 24") && said.contains("[16, 64, 80, 128]"), "{said}");
}
