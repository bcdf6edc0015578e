//! [`varft::ops::kv_cache`].

use super::{Noise, devices, read};
use half::bf16;
use varft::device::DType;
use varft::ops::kv_cache::{BLOCK, KvCache, NO_SLOT, Tokens, add_block, copy_block, gather, rotate_and_write, write};
use varft::ops::rope::rotate;

/// Where slots lie: in a row over the ends of pages, backwards, scattered, in runs that break.
const ORDERS: [fn(usize) -> usize; 4] = [|i| i + 21, |i| 127 - i, |i| i * 37 % 128, |i| (i / 5 * 15 + i % 5) % 128];
const BLOCKS: usize = 4;
/// Tokens, KV heads, elements of a head, and columns around keys and values: real heads, and rows that are not aligned.
const SHAPES: [(usize, usize, usize, usize); 5] =
    [(75, 2, 128, 0), (2, 3, 16, 8), (40, 2, 80, 5), (33, 1, 18, 2), (0, 2, 16, 0)];

#[test]
fn every_element_goes_where_the_layout_says_and_comes_back() {
    let mut rng = Noise::fresh();
    for d in devices() {
        let s = d.stream();
        for (order, (t, heads, hd, gap)) in ORDERS.into_iter().flat_map(|o| SHAPES.map(|shape| (o, shape))) {
            let width = heads * hd;
            let (stride, k, v) = (2 * width + 3 * gap, gap, 2 * gap + width);
            let what = format!("{d:?}, {t} tokens of {heads} heads of {hd}, {gap} columns between");
            let [cache, grads] = [DType::BF16, DType::F32].map(|dtype| KvCache::new(&d, dtype, 2, BLOCKS, heads, hd));
            let x = rng.bf16s(t * stride, 1.0);
            // The last token has no place.
            let slots: Vec<u32> = (0..t).map(|i| if i + 1 == t { NO_SLOT } else { order(i) as u32 }).collect();
            let placed = || (0..t.saturating_sub(1)).flat_map(|i| (0..width).map(move |c| (i, c)));
            let (rows, slots) = (d.upload(&x), d.upload(&slots));
            let tokens = Tokens { rows: &rows, stride, k, v, slots: &slots, n: t };
            write(&s, &cache.layers[1], &cache, tokens);
            let in_pages =
                |i: usize, c: usize| ((order(i) / BLOCK * heads + c / hd) * BLOCK + order(i) % BLOCK) * hd + c % hd;
            for (pages, column) in [(&cache.layers[1].k, k), (&cache.layers[1].v, v)] {
                let mut want = vec![u16::MAX; BLOCKS * BLOCK * width]; // fresh memory, where no token is
                for (i, c) in placed() {
                    want[in_pages(i, c)] = x[i * stride + column + c].to_bits();
                }
                let got: Vec<u16> = read::<bf16>(&s, pages).iter().map(|x| x.to_bits()).collect();
                assert_eq!(got, want, "{what}");
            }
            let layer = &grads.layers[0];
            let [gk, gv] = [&layer.k, &layer.v].map(|pages| {
                let values = rng.f32s(pages.len(), 1.0);
                s.write(pages, &values);
                values
            });
            gather(&s, layer, &grads, tokens);
            let mut want = x;
            for (i, c) in placed() {
                want[i * stride + k + c] = bf16::from_f32(gk[in_pages(i, c)]);
                want[i * stride + v + c] = bf16::from_f32(gv[in_pages(i, c)]);
            }
            assert_eq!(read::<bf16>(&s, &rows), want, "gradients of {what}");
        }
    }
}

#[test]
fn turning_and_writing_at_once_gives_the_bits_of_one_after_the_other() {
    let mut rng = Noise::fresh();
    for d in devices() {
        let s = d.stream();
        for (t, heads, kv_heads, hd) in [(40, 4, 2, 128), (1, 2, 1, 16), (33, 3, 3, 80), (21, 2, 1, 18), (0, 1, 1, 16)]
        {
            let (stride, what) = ((heads + 2 * kv_heads) * hd, format!("{d:?}, {t} tokens, {heads} heads of {hd}"));
            let x = rng.bf16s(t * stride, 1.0);
            let angles: Vec<f32> = rng.f32s(t * hd / 2, 3.0);
            let [cos, sin] = [f32::cos, f32::sin].map(|f| d.upload(&angles.iter().map(|&a| f(a)).collect::<Vec<_>>()));
            // The last token has no place.
            let slots: Vec<u32> = (0..t).map(|i| if i + 1 == t { NO_SLOT } else { (i * 37 % 128) as u32 }).collect();
            let slots = d.upload(&slots);
            let (together, apart) = (d.upload(&x), d.upload(&x));
            let cache = || KvCache::new(&d, DType::BF16, 1, BLOCKS, kv_heads, hd);
            let (one, other) = (cache(), cache());
            let tokens = |rows| Tokens { rows, stride, k: heads * hd, v: (heads + kv_heads) * hd, slots: &slots, n: t };
            rotate_and_write(&s, &one.layers[0], &one, tokens(&together), heads, &cos, &sin);
            rotate(&s, &apart, stride, 0, heads + kv_heads, hd, &cos, &sin, t, false);
            write(&s, &other.layers[0], &other, tokens(&apart));
            let bits = |b| read::<bf16>(&s, b).iter().map(|x| x.to_bits()).collect::<Vec<u16>>();
            assert_eq!(bits(&together), bits(&apart), "rows of {what}");
            assert_eq!(bits(&one.layers[0].k), bits(&other.layers[0].k), "keys of {what}");
            assert_eq!(bits(&one.layers[0].v), bits(&other.layers[0].v), "values of {what}");
        }
    }
}

#[test]
fn pages_are_copied_and_added_in_every_layer_and_only_there() {
    let mut rng = Noise::fresh();
    for d in devices() {
        let s = d.stream();
        for (layers, heads, hd) in [(3, 2, 16), (1, 1, 128), (2, 3, 18)] {
            let (from, to, page) = (3, 1, heads * BLOCK * hd);
            let cache = KvCache::new(&d, DType::BF16, layers, BLOCKS, heads, hd);
            let grads = KvCache::new(&d, DType::F32, layers, BLOCKS, heads, hd);
            let buffers = |c: &KvCache| c.layers.iter().flat_map(|l| [l.k.clone(), l.v.clone()]).collect::<Vec<_>>();
            let copied: Vec<_> = buffers(&cache).into_iter().map(|b| (rng.bf16s(b.len(), 1.0), b)).collect();
            let added: Vec<_> = buffers(&grads).into_iter().map(|b| (rng.f32s(b.len(), 1.0), b)).collect();
            copied.iter().for_each(|(values, b)| s.write(b, values));
            added.iter().for_each(|(values, b)| s.write(b, values));
            copy_block(&s, &cache, from, to);
            add_block(&s, &grads, from, to);
            for (mut want, b) in copied {
                want.copy_within(from * page..(from + 1) * page, to * page);
                assert_eq!(read::<bf16>(&s, &b), want, "{d:?}, {layers} layers, {heads} heads of {hd}");
            }
            for (mut want, b) in added {
                (0..page).for_each(|i| want[to * page + i] += want[from * page + i]);
                assert_eq!(read::<f32>(&s, &b), want, "{d:?}, {layers} layers, {heads} heads of {hd}");
            }
        }
    }
}
