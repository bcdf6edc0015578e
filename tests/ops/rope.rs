//! [`varft::ops::rope`].

use super::{Noise, as_good_as_bf16, devices, read, round, wide};
use half::bf16;
use varft::device::DType;
use varft::ops::rope::{mrope_tables, rotate, vision_tables};

/// Pair i of `pairs`: its frequency, rounded as the reference rounds it.
fn frequency(theta: f32, i: usize, pairs: usize) -> f32 {
    1.0 / (f64::from(theta).powf(f64::from((2 * i) as f32 / (2 * pairs) as f32)) as f32)
}

#[test]
fn tables_are_cosines_and_sines_of_the_rounded_angles() {
    let mut rng = Noise::fresh();
    let close = |what: &str, got: &[f32], want: &[f64]| {
        assert_eq!(got.len(), want.len());
        for (i, (g, w)) in got.iter().zip(want).enumerate() {
            assert!((f64::from(*g) - w).abs() <= 6.1e-8, "{what}, element {i}: {g}, not {w}");
        }
    };
    for d in devices() {
        let s = d.stream();
        for (t, hd, section) in [(1, 16, [2, 3, 3]), (37, 128, [16, 24, 24]), (5, 6, [0, 3, 0]), (9, 288, [100, 4, 40])]
        {
            let pairs = hd / 2;
            // Up to where neighbouring f32 are further apart than a turn.
            let positions: Vec<u32> = (0..3 * t).map(|i| (rng.next() >> (40 + i % 24)) as u32).collect();
            let (cos, sin) = (d.alloc(DType::F32, t * pairs), d.alloc(DType::F32, t * pairs));
            mrope_tables(&s, &d.upload(&positions), section, 1e6, hd, &cos, &sin, t);
            let angles: Vec<f64> = (0..t * pairs)
                .map(|i| {
                    let (row, pair) = (i / pairs, i % pairs);
                    let axis = usize::from(pair >= section[0]) + usize::from(pair >= section[0] + section[1]);
                    f64::from(positions[axis * t + row] as f32 * frequency(1e6, pair, pairs))
                })
                .collect();
            let what = format!("{d:?}, {t} rows of a head of {hd}");
            close(&what, &read(&s, &cos), &angles.iter().map(|a| a.cos()).collect::<Vec<_>>());
            close(&what, &read(&s, &sin), &angles.iter().map(|a| a.sin()).collect::<Vec<_>>());
        }
        for (t, hd) in [(1, 4), (50, 80), (3, 16)] {
            let pairs = hd / 2;
            let positions: Vec<u32> = (0..2 * t).map(|_| (rng.next() % 1000) as u32).collect();
            let (cos, sin) = (d.alloc(DType::F32, t * pairs), d.alloc(DType::F32, t * pairs));
            vision_tables(&s, &d.upload(&positions), 1e4, hd, &cos, &sin, t);
            let angle = |i: usize| {
                let (row, pair) = (i / pairs, i % pairs);
                let f = frequency(1e4, pair % (pairs / 2), pairs / 2);
                f64::from(positions[row * 2 + pair / (pairs / 2)] as f32 * f)
            };
            let what = format!("{d:?}, {t} patches, a head of {hd}");
            close(&what, &read(&s, &cos), &(0..t * pairs).map(|i| angle(i).cos()).collect::<Vec<_>>());
            close(&what, &read(&s, &sin), &(0..t * pairs).map(|i| angle(i).sin()).collect::<Vec<_>>());
        }
    }
}

#[test]
fn rotation_turns_pairs_in_place_either_way_and_nothing_else() {
    let mut rng = Noise::fresh();
    // Real heads; heads, columns and rows that are not aligned; one row; none.
    let shapes = [
        (40, 18, 128, 0, 256),
        (70, 32, 80, 0, 1280),
        (1, 2, 16, 0, 0),
        (9, 2, 6, 5, 3),
        (5, 3, 64, 8, 1),
        (0, 2, 16, 0, 0),
    ];
    for d in devices() {
        let s = d.stream();
        for (rows, heads, hd, offset, more) in shapes {
            let (pairs, stride) = (hd / 2, offset + heads * hd + more);
            let x = rng.bf16s(rows * stride, 3.0);
            let turns = rng.f32s(rows * pairs, 7.0);
            let [cos, sin] = [f32::cos, f32::sin].map(|f| turns.iter().map(|&t| f(t)).collect::<Vec<_>>());
            let [cb, sb] = [&cos, &sin].map(|v| d.upload(v));
            for inverse in [false, true] {
                let (mut want, mut plain) = (wide(&x), wide(&x));
                for (row, j) in (0..rows).flat_map(|r| (0..heads * pairs).map(move |j| (r, j))) {
                    let at = row * stride + offset + j / pairs * hd + j % pairs;
                    let (a, b, c) = (x[at].to_f64(), x[at + pairs].to_f64(), f64::from(cos[row * pairs + j % pairs]));
                    let s = f64::from(sin[row * pairs + j % pairs]) * if inverse { -1.0 } else { 1.0 };
                    (want[at], want[at + pairs]) = (a * c - b * s, b * c + a * s);
                    let (c, s) = (round(c), round(s));
                    plain[at] = round(round(a * c) - round(b * s));
                    plain[at + pairs] = round(round(b * c) + round(a * s));
                }
                let b = d.upload(&x);
                rotate(&s, &b, stride, offset, heads, hd, &cb, &sb, rows, inverse);
                let got = read::<bf16>(&s, &b);
                let what = format!("{d:?}, {rows} rows of {heads} heads of {hd}, inverse {inverse}");
                as_good_as_bf16(&what, &wide(&got), &plain, &want);
                for (i, (got, was)) in got.iter().zip(&x).enumerate() {
                    let ours = (offset..offset + heads * hd).contains(&(i % stride));
                    assert!(ours || got == was, "{what}: column {} is not a head's", i % stride);
                }
                if rows > 0 {
                    let (r, alone) = (rows - 1, d.upload(&x[(rows - 1) * stride..]));
                    let [c1, s1] = [&cb, &sb].map(|b| b.view(r * pairs, pairs));
                    rotate(&s, &alone, stride, offset, heads, hd, &c1, &s1, 1, inverse);
                    assert_eq!(read::<bf16>(&s, &alone), got[r * stride..], "{what}: a row alone");
                }
            }
        }
    }
}
