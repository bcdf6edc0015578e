//! [`varft::ops::cast`].

use super::{Noise, devices, read};
use half::bf16;
use varft::device::{DType, Device};
use varft::ops::cast::cast;

#[test]
fn rounds_to_the_nearest_and_widens_exactly_on_every_device() {
    let mut rng = Noise::fresh();
    for d in devices().into_iter().chain([Device::cpu(2), Device::cpu_deferred(1)]) {
        let s = d.stream();
        for (n, from_at, to_at) in [(1, 0, 0), (4096, 0, 0), (40_001, 0, 3), (77, 5, 0), (0, 0, 0)] {
            let mut x = rng.f32s(n + from_at, 3.0);
            // Ties, numbers that round up to infinity, subnormal ones.
            let special = [1.003_906_3, 1.011_718_8, f32::MAX, f32::NEG_INFINITY, 1e-40, -0.0];
            (x.iter_mut().skip(from_at)).zip(special).for_each(|(x, special)| *x = special);
            let halves: Vec<bf16> = x.iter().map(|&x| bf16::from_f32(x)).collect();
            let (xb, hb) = (d.upload(&x).view(from_at, n), d.upload(&halves).view(from_at, n));
            let (narrow, wide) = (d.zeros(DType::BF16, n + to_at), d.zeros(DType::F32, n + to_at));
            cast(&s, &xb, &narrow.view(to_at, n), n);
            cast(&s, &hb, &wide.view(to_at, n), n);
            let what = format!("{d:?}, {n} elements from {from_at} on to {to_at}");
            assert_eq!(read::<bf16>(&s, &narrow)[to_at..], halves[from_at..], "{what}");
            let want: Vec<f32> = halves[from_at..].iter().map(|x| x.to_f32()).collect();
            assert_eq!(read::<f32>(&s, &wide)[to_at..], want, "{what}");
        }
    }
}
