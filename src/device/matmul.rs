//! The emulated GPU's counterpart of the vendor's matrix product, on the host: the same mathematics, f32 sums.

use half::bf16;

/// What a product is stored as.
pub(super) trait Stored: Copy {
    fn to_f32(self) -> f32;
    fn of_f32(x: f32) -> Self;
}

impl Stored for f32 {
    fn to_f32(self) -> f32 {
        self
    }
    fn of_f32(x: f32) -> f32 {
        x
    }
}

impl Stored for bf16 {
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
    fn of_f32(x: f32) -> bf16 {
        bf16::from_f32(x)
    }
}

/// `c = op(a) b`, or `+=`: `a` `[m, k]` (or `[k, m]` where it is transposed) with rows `stride` apart, `b` `[k, n]`, `c` `[m, n]`. Each
/// sum goes over ascending k and is rounded once.
pub(super) fn multiply<C: Stored>(
    a: &[bf16],
    stride: usize,
    transposed: bool,
    b: &[bf16],
    c: &mut [C],
    [m, n, k]: [usize; 3],
    accumulate: bool,
) {
    let mut sums = vec![0.0f32; n];
    let b: Vec<f32> = b[..k * n].iter().map(|x| x.to_f32()).collect();
    for (i, c) in c.chunks_exact_mut(n.max(1)).take(m).enumerate() {
        sums.fill(0.0);
        for (p, b) in b.chunks_exact(n.max(1)).enumerate() {
            let a = a[if transposed { p * stride + i } else { i * stride + p }].to_f32();
            sums.iter_mut().zip(b).for_each(|(sum, b)| *sum += a * b);
        }
        for (c, sum) in c.iter_mut().zip(&sums) {
            *c = C::of_f32(if accumulate { c.to_f32() + sum } else { *sum });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_the_naive_product_either_way_round() {
        let (m, n, k) = (3, 5, 7);
        let value = |i: usize| bf16::from_f32((i as f32 * 0.37).sin());
        let (a, b): (Vec<bf16>, Vec<bf16>) = ((0..m * k).map(value).collect(), (50..50 + k * n).map(value).collect());
        // Rows of five where three belong to the matrix.
        let turned: Vec<bf16> = (0..k * 5).map(|i| a[i % 5 % m * k + i / 5]).collect();
        let want = |i: usize, j: usize| (0..k).map(|p| a[i * k + p].to_f64() * b[p * n + j].to_f64()).sum::<f64>();
        let (mut c, mut rounded) = (vec![1.0f32; m * n], vec![bf16::ZERO; m * n]);
        multiply(&turned, 5, true, &b, &mut c, [m, n, k], true);
        multiply(&a, k, false, &b, &mut rounded, [m, n, k], false);
        for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
            assert!((f64::from(c[i * n + j]) - 1.0 - want(i, j)).abs() < 1e-5);
            assert_eq!(rounded[i * n + j], bf16::from_f32(want(i, j) as f32));
        }
    }
}
