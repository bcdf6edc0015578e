//! The gated activation of the MLPs (Shazeer 2020, arXiv 2002.05202): `h = silu(gate) * up`, `silu(x) = x sigmoid(x)`.

use super::rows::eights;
use super::simd::{LANES, exp, multiversion, rows_per_item};
use crate::device::{Arg, Backend, Buffer, SendPtr, Stream};

/// `h[r, j] = silu(gate_up[r, j]) * gate_up[r, i + j]`: gate_up is `[m, 2 i]`, the gates before the ups; h is `[m, i]`.
pub fn forward(s: &Stream, gate_up: &Buffer, h: &Buffer, m: usize, i: usize) {
    assert!(gate_up.len() >= m * 2 * i && h.len() >= m * i, "gate_up of [{m}, {}], h of [{m}, {i}]", 2 * i);
    let (gate_up, h) = (gate_up.clone(), h.clone());
    match s.backend() {
        Backend::Cpu(s) => s.launch(move |pool| {
            // SAFETY: launches of one stream run in order; h is not gate_up.
            let (x, h) = unsafe { (gate_up.get::<f32>(), h.get_mut::<f32>()) };
            let per = rows_per_item(i);
            pool.chunks_mut(&mut h[..m * i], per * i, |item, h| {
                for (j, h) in h.chunks_exact_mut(i).enumerate() {
                    let (gate, up) = x[(item * per + j) * 2 * i..][..2 * i].split_at(i);
                    gate_row(gate, up, h);
                }
            });
        }),
        Backend::Gpu(gpu) if m * i > 0 => {
            let args = [Arg::Buffer(&gate_up), Arg::Buffer(&h), Arg::len(m), Arg::len(i)];
            gpu.launch("swiglu_forward", eights(m, i), &args);
        }
        Backend::Gpu(_) => {}
    }
}

/// The gradient of [`forward`]: writes `dgate_up` `[m, 2 i]` from `dh` `[m, i]`. `dgate_up` may be `gate_up` itself.
pub fn backward(s: &Stream, gate_up: &Buffer, dh: &Buffer, dgate_up: &Buffer, m: usize, i: usize) {
    assert!(
        gate_up.len() >= m * 2 * i && dgate_up.len() >= m * 2 * i && dh.len() >= m * i,
        "gate_up and its gradient of [{m}, {}], dh of [{m}, {i}]",
        2 * i
    );
    let (x, dh, dx) = (gate_up.clone(), dh.clone(), dgate_up.clone());
    match s.backend() {
        Backend::Cpu(s) => s.launch(move |pool| {
            let per = rows_per_item(i);
            // SAFETY: launches of one stream run in order.
            let dh = unsafe { dh.get::<f32>() };
            // SAFETY: as above; only pointers are kept, since dx may be x.
            let (x, dx) =
                unsafe { (SendPtr(x.get_mut::<f32>().as_mut_ptr()), SendPtr(dx.get_mut::<f32>().as_mut_ptr())) };
            pool.run(m.div_ceil(per), |item| {
                for r in item * per..m.min((item + 1) * per) {
                    // SAFETY: in bounds by the check; row r belongs to this item.
                    unsafe { gate_row_backward(x.get().add(r * 2 * i), &dh[r * i..][..i], dx.get().add(r * 2 * i)) };
                }
            });
        }),
        Backend::Gpu(gpu) if m * i > 0 => {
            let args = [Arg::Buffer(&x), Arg::Buffer(&dh), Arg::Buffer(&dx), Arg::len(m), Arg::len(i)];
            gpu.launch("swiglu_backward", eights(m, i), &args);
        }
        Backend::Gpu(_) => {}
    }
}

#[inline(always)]
fn gate_row_body<const FMA: bool>(gate: &[f32], up: &[f32], h: &mut [f32]) {
    let n = h.len();
    let (gate, up) = (&gate[..n], &up[..n]);
    for i in 0..n {
        h[i] = gate[i] / (1.0 + exp::<FMA>(-gate[i])) * up[i];
    }
}
multiversion!(fn gate_row(gate: &[f32], up: &[f32], h: &mut [f32]) = gate_row_body);

/// The gradients of one vector of gates and ups, from those of their products.
#[inline(always)]
fn gate_backward<const FMA: bool>(g: [f32; LANES], u: [f32; LANES], d: [f32; LANES]) -> ([f32; LANES], [f32; LANES]) {
    let (mut dg, mut du) = ([0.0; LANES], [0.0; LANES]);
    for i in 0..LANES {
        let sig = 1.0 / (1.0 + exp::<FMA>(-g[i]));
        du[i] = d[i] * g[i] * sig;
        dg[i] = d[i] * u[i] * sig * (1.0 + g[i] * (1.0 - sig));
    }
    (dg, du)
}

/// Pointers to rows of `2 dh.len()` elements, because dx may be x: each vector is read before it is written.
#[inline(always)]
fn gate_row_backward_body<const FMA: bool>(x: *const f32, dh: &[f32], dx: *mut f32) {
    let n = dh.len();
    let whole = n - n % LANES;
    // SAFETY: the caller's rows have 2 n elements, and every vector ends within its half.
    unsafe {
        for c in (0..whole).step_by(LANES) {
            // Of a length that the compiler knows: loads and stores instead of calls to copy.
            let read = |p: *const f32| p.cast::<[f32; LANES]>().read();
            let (dg, du) = gate_backward::<FMA>(read(x.add(c)), read(x.add(n + c)), read(dh.as_ptr().add(c)));
            dx.add(c).cast::<[f32; LANES]>().write(dg);
            dx.add(n + c).cast::<[f32; LANES]>().write(du);
        }
        let rest = n - whole;
        if rest > 0 {
            let read = |p: *const f32| std::array::from_fn(|i| if i < rest { *p.add(i) } else { 0.0 });
            let (dg, du) =
                gate_backward::<FMA>(read(x.add(whole)), read(x.add(n + whole)), read(dh.as_ptr().add(whole)));
            dx.add(whole).copy_from_nonoverlapping(dg.as_ptr(), rest);
            dx.add(n + whole).copy_from_nonoverlapping(du.as_ptr(), rest);
        }
    }
}
multiversion!(fn gate_row_backward(x: *const f32, dh: &[f32], dx: *mut f32) = gate_row_backward_body);

#[cfg(test)]
mod tests {
    use super::super::testing::{close, devices, noise, same_on_every_isa};
    use super::*;
    use crate::device::DType;

    #[test]
    fn equals_the_f64_loop_on_every_device() {
        for (m, i) in [(1, 1), (3, 19), (40, 856)] {
            let mut x = noise(m * 2 * i, 1);
            x.iter_mut().for_each(|v| *v *= 4.0);
            x[0] = -120.0; // far in the tail: sigmoid underflows
            let dh = noise(m * i, 2);
            let (mut h, mut dx) = (vec![], vec![0.0; m * 2 * i]);
            for r in 0..m {
                for j in 0..i {
                    let (g, u, d) = (x[r * 2 * i + j] as f64, x[r * 2 * i + i + j] as f64, dh[r * i + j] as f64);
                    let sig = 1.0 / (1.0 + (-g).exp());
                    h.push(g * sig * u);
                    dx[r * 2 * i + j] = d * u * (sig + g * sig * (1.0 - sig));
                    dx[r * 2 * i + i + j] = d * g * sig;
                }
            }
            let mut first: Option<(Vec<f32>, Vec<f32>)> = None;
            for d in devices() {
                let s = d.stream();
                let (xb, dhb, hb) = (d.upload(&x), d.upload(&dh), d.alloc(DType::F32, m * i));
                forward(&s, &xb, &hb, m, i);
                let dxb = d.alloc(DType::F32, m * 2 * i);
                backward(&s, &xb, &dhb, &dxb, m, i);
                let got = (s.read::<f32>(&hb).wait().unwrap(), s.read::<f32>(&dxb).wait().unwrap());
                close(&got.0, &h, 1e-6);
                close(&got.1, &dx, 1e-6);
                assert_eq!(*first.get_or_insert(got.clone()), got);
                backward(&s, &xb, &dhb, &xb, m, i);
                assert_eq!(s.read::<f32>(&xb).wait().unwrap(), got.1, "in place");
            }
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let (m, i) = (7, 1003);
        let x: Vec<f32> = noise(m * 2 * i, 1).iter().map(|x| x * 20.0).collect();
        same_on_every_isa(|d| {
            let (s, x, dh) = (d.stream(), d.upload(&x), d.upload(&noise(m * i, 2)));
            let (h, dx) = (d.alloc(DType::F32, m * i), d.alloc(DType::F32, m * 2 * i));
            forward(&s, &x, &h, m, i);
            backward(&s, &x, &dh, &dx, m, i);
            [h, dx].map(|b| s.read::<f32>(&b).wait().unwrap()).concat()
        });
    }
}
