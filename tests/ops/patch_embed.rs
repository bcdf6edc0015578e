//! [`varft::ops::patch_embed`].

use super::{Noise, as_good_as_bf16, devices, read, round, wide, wide32};
use half::bf16;
use varft::device::{DType, Device};
use varft::ops::linear::Weight;
use varft::ops::patch_embed::{Geometry, INPUTS, Normalize, backward_weight, forward, pixel_values};

fn normalize() -> Normalize {
    Normalize::new([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.261_302_6, 0.275_777_1])
}

/// Images of these grids one after the other, each after a gap, and their pixels.
fn images(rng: &mut Noise, grids: &[(usize, usize)], gap: usize) -> (Vec<u8>, Vec<Geometry>) {
    let mut end = 0;
    let place = |&(grid_h, grid_w): &(usize, usize)| {
        let image = Geometry { offset: end + gap, grid_h, grid_w };
        end = image.offset + image.bytes();
        image
    };
    let all: Vec<Geometry> = grids.iter().map(place).collect();
    ((0..end).map(|_| (rng.next() >> 40) as u8).collect(), all)
}

/// Grids, the bytes before each, and outputs: lines of words and of bytes, tiles over several images and images over several
/// tiles, outputs that are no multiple of anything, a real model's, one block, none.
#[rustfmt::skip]
type Case = (&'static [(usize, usize)], usize, usize);
const CASES: [Case; 6] = [
    (&[(4, 6), (26, 8)], 5, 20),
    (&[(2, 2), (2, 2), (6, 4), (2, 10)], 0, 200),
    (&[(2, 2)], 4, 1280),
    (&[(2, 4)], 1, 1),
    (&[(2, 2); 70], 0, 3),
    (&[], 0, 8),
];

#[test]
fn forward_equals_f64_and_patches_do_not_depend_on_their_company() {
    let (mut rng, normalize) = (Noise::fresh(), normalize());
    for d in devices() {
        let s = d.stream();
        for (grids, gap, n) in CASES {
            let (pixels, images) = images(&mut rng, grids, gap);
            let values: Vec<f32> = images.iter().flat_map(|g| pixel_values(&pixels, g, &normalize)).collect();
            let (rows, w) = (values.len() / INPUTS, rng.bf16s(n * INPUTS, 0.1));
            let (mut want, mut plain) = (vec![], vec![]);
            for (row, w) in values.chunks(INPUTS).flat_map(|row| w.chunks(INPUTS).map(move |w| (row, w))) {
                let pairs = || row.iter().zip(w).map(|(&x, w)| (f64::from(x), w.to_f64()));
                want.push(pairs().map(|(x, w)| x * w).sum());
                plain.push(round(pairs().map(|(x, w)| round(x) * w).sum()));
            }
            let (pb, out) = (d.upload(&pixels), d.alloc(DType::BF16, rows * n));
            let w = Weight { data: d.upload(&w), n, k: INPUTS };
            forward(&s, &pb, &images, &normalize, &w, &out);
            let (got, what) = (read::<bf16>(&s, &out), format!("{d:?}, {grids:?}, {n} outputs"));
            as_good_as_bf16(&what, &wide(&got), &plain, &want);
            if let Some(last) = images.last() {
                let alone = d.alloc(DType::BF16, last.patches() * n);
                forward(&s, &pb, &[*last], &normalize, &w, &alone);
                assert_eq!(read::<bf16>(&s, &alone), got[(rows - last.patches()) * n..], "{what}: an image alone");
            }
        }
    }
}

#[test]
fn the_weights_gradient_equals_f64_and_accumulates() {
    let (mut rng, normalize) = (Noise::fresh(), normalize());
    let check = |rng: &mut Noise, d: &Device, grids: &[(usize, usize)], gap: usize, n: usize| {
        let s = d.stream();
        let (pixels, images) = images(rng, grids, gap);
        let values: Vec<f32> = images.iter().flat_map(|g| pixel_values(&pixels, g, &normalize)).collect();
        let rows = values.len() / INPUTS;
        let (dy, base) = (rng.bf16s(rows * n, 1.0), rng.f32s(n * INPUTS, 1.0));
        let (mut want, mut plain) = (wide32(&base), wide32(&base));
        for (r, j) in (0..rows).flat_map(|r| (0..n).map(move |j| (r, j))) {
            let dy = dy[r * n + j].to_f64();
            for (k, &x) in values[r * INPUTS..][..INPUTS].iter().enumerate() {
                want[j * INPUTS + k] += dy * f64::from(x);
                plain[j * INPUTS + k] += dy * round(f64::from(x));
            }
        }
        let dw = d.upload(&base);
        backward_weight(&s, &d.upload(&pixels), &images, &normalize, &d.upload(&dy), &dw);
        let got = wide32(&read::<f32>(&s, &dw));
        as_good_as_bf16(&format!("{d:?}, {grids:?}, {n} outputs"), &got, &plain, &want);
    };
    for d in devices() {
        for (grids, gap, n) in CASES {
            check(&mut rng, &d, grids, gap, n.min(200));
        }
    }
    // More patches than are written out at a time.
    check(&mut rng, &devices()[0], &[(2, 2), (90, 92)], 3, 2);
}
