//! [`varft::ops::rows`].

use super::{Noise, devices, read};
use half::bf16;
use varft::device::{Buffer, DType, Stream};
use varft::ops::rows::{add, gather, gather_add, put, scatter, scatter_add};

#[test]
fn rows_go_where_the_index_says_and_sums_are_rounded_once() {
    let mut rng = Noise::fresh();
    // Rows, columns, rows of the other side, and how many of these are named.
    let shapes = [
        (5, 3, 5, 5),
        (200, 300, 220, 200),
        (40, 1280, 64, 40),
        (1200, 24, 9, 4),
        (600, 1031, 3, 1),
        (1, 8, 1, 1),
        (0, 8, 4, 4),
    ];
    for d in devices() {
        let s = d.stream();
        for (n, w, others, named) in shapes {
            let index: Vec<u32> = (0..n).map(|_| (rng.next() % named) as u32 + (others - named) as u32).collect();
            let (rows, far) = (rng.bf16s(n * w, 1.0), rng.bf16s(others as usize * w, 1.0));
            let what = format!("{d:?}, [{n}, {w}], {named} of {others} rows");
            let at = |i: usize| index[i] as usize * w;
            let (mut gathered, mut gather_sum, mut scattered) = (vec![], vec![], far.clone());
            let mut sums: Vec<f32> = far.iter().map(|x| x.to_f32()).collect();
            for (i, c) in (0..n).flat_map(|i| (0..w).map(move |c| (i, c))) {
                gathered.push(far[at(i) + c]);
                gather_sum.push(bf16::from_f32(rows[i * w + c].to_f32() + far[at(i) + c].to_f32()));
                scattered[at(i) + c] = rows[i * w + c];
                sums[at(i) + c] += rows[i * w + c].to_f32();
            }
            let sums: Vec<bf16> = sums.into_iter().map(bf16::from_f32).collect();
            let (ib, rb, fb) = (d.upload(&index), d.upload(&rows), d.upload(&far));
            type Op = fn(&Stream, &Buffer, &Buffer, &Buffer, usize, usize);
            for (name, op, from, onto, want) in [
                ("gather", gather as Op, &fb, None, &gathered),
                ("gather_add", gather_add, &fb, Some(&rows), &gather_sum),
                ("scatter", scatter, &rb, Some(&far), &scattered),
                ("scatter_add", scatter_add, &rb, Some(&far), &sums),
            ] {
                let to = onto.map_or_else(|| d.alloc(DType::BF16, n * w), |values| d.upload(values));
                op(&s, from, &ib, &to, n, w);
                assert_eq!(&read::<bf16>(&s, &to), want, "{name} of {what}");
            }
        }
    }
}

#[test]
fn values_are_put_where_the_index_says_and_nowhere_else() {
    let mut rng = Noise::fresh();
    for d in devices() {
        let s = d.stream();
        for n in [0usize, 1, 300] {
            let (places, values) = (2 * n + 1, n + 7);
            let index: Vec<u32> = (0..n as u32).map(|i| places as u32 - 1 - 2 * i).collect();
            let source: Vec<u32> = (0..n).map(|_| (rng.next() % values as u64) as u32).collect();
            let from: Vec<u32> = (0..values).map(|_| rng.next() as u32).collect();
            let (ib, sb, fb) = (d.upload(&index), d.upload(&source), d.upload(&from));
            for named in [true, false] {
                let mut want = vec![7u32; places];
                for (i, &place) in index.iter().enumerate() {
                    want[place as usize] = from[if named { source[i] as usize } else { i }];
                }
                let to = d.upload(&vec![7u32; places]);
                put(&s, n, &ib, named.then_some(&sb), &fb, &to);
                assert_eq!(read::<u32>(&s, &to), want, "{d:?}, {n} values");
            }
        }
    }
}

#[test]
fn sums_of_buffers_that_begin_anywhere() {
    let mut rng = Noise::fresh();
    for d in devices() {
        let s = d.stream();
        for (n, x_at, y_at) in [(2048, 0, 0), (1, 0, 0), (1001, 3, 0), (77, 8, 1), (0, 0, 0)] {
            let (x, y) = (rng.bf16s(n + x_at, 1.0), rng.bf16s(n + y_at, 1.0));
            let (xb, yb) = (d.upload(&x), d.upload(&y));
            add(&s, &xb.view(x_at, n), &yb.view(y_at, n), n);
            let mut want = y;
            (0..n).for_each(|i| want[y_at + i] = bf16::from_f32(want[y_at + i].to_f32() + x[x_at + i].to_f32()));
            assert_eq!(read::<bf16>(&s, &yb), want, "{d:?}, {n} elements from {x_at} on to {y_at}");
        }
    }
}
