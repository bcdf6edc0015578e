//! Products of matrices for gradients, and the emulated GPU's counterpart of the vendor's, on the host: the same mathematics, f32
//! sums.

use super::Buffer;
use half::bf16;

/// `c = op(a) b`, or `+=` where it accumulates, all row-major. For gradients: the order of additions is fixed, but not the one of
/// [`linear::forward`](crate::ops::linear::forward).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matmul<'a> {
    /// bf16 `[m, k]`, or `[k, m]` where it is transposed.
    pub a: &'a Buffer,
    /// From a row of `a` to the next, in elements.
    pub stride: usize,
    pub transposed: bool,
    /// bf16 `[k, n]`.
    pub b: &'a Buffer,
    /// f32 or bf16 `[m, n]`.
    pub c: &'a Buffer,
    /// m, n and k.
    pub shape: [usize; 3],
    pub accumulate: bool,
}

impl<'a> Matmul<'a> {
    /// `c = a b`.
    pub fn new(a: &'a Buffer, b: &'a Buffer, c: &'a Buffer, shape: [usize; 3]) -> Matmul<'a> {
        Matmul { a, stride: shape[2], transposed: false, b, c, shape, accumulate: false }
    }

    /// `c = a^T b`.
    pub fn transposed(a: &'a Buffer, b: &'a Buffer, c: &'a Buffer, shape: [usize; 3]) -> Matmul<'a> {
        Matmul { stride: shape[0], transposed: true, ..Matmul::new(a, b, c, shape) }
    }

    /// Whether the buffers hold the matrices.
    pub fn fits(&self) -> bool {
        let [m, n, k] = self.shape;
        let (rows, row) = if self.transposed { (k, m) } else { (m, k) };
        let of_a = rows.saturating_sub(1) * self.stride + row;
        self.stride >= row && self.a.len() >= of_a && self.b.len() >= k * n && self.c.len() >= m * n
    }
}

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

/// The product of the matrices in `a` and `b`, into `c`. Each sum goes over ascending k and is rounded once.
pub(super) fn multiply<C: Stored>(product: &Matmul<'_>, a: &[bf16], b: &[bf16], c: &mut [C]) {
    let &Matmul { stride, transposed, shape: [m, n, k], accumulate, .. } = product;
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
    use super::super::{DType, Device};
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
        let none = Device::cpu(1).alloc(DType::BF16, 0);
        let product = Matmul::new(&none, &none, &none, [m, n, k]);
        let turned_one = Matmul { stride: 5, transposed: true, accumulate: true, ..product };
        multiply(&turned_one, &turned, &b, &mut c);
        multiply(&product, &a, &b, &mut rounded);
        for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
            assert!((f64::from(c[i * n + j]) - 1.0 - want(i, j)).abs() < 1e-5);
            assert_eq!(rounded[i * n + j], bf16::from_f32(want(i, j) as f32));
        }
    }
}
