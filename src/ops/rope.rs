//! Rotary position embedding (Su et al., arXiv 2104.09864), in the two forms of Qwen2.5-VL (arXiv 2502.13923, 2.1).
//!
//! A head of `hd` floats is `hd / 2` pairs `(x[i], x[i + hd / 2])`; pair i is turned by an angle `position * f_i`. The
//! decoder's M-RoPE takes the position of pair i from one of three axes (time, height, width); the vision tower turns
//! the first half of the pairs by the height and the second by the width. Angles are f32 products, and cosines and sines
//! are taken of the rounded product, as the reference model was trained.

use super::rows::eights;
use super::simd::multiversion;
use crate::device::{Arg, Backend, Buffer, Launch, SendPtr, Stream};

/// Rows of a parallel item: enough work to be worth handing out.
const ROWS: usize = 32;

/// Rows that a thread of the tables' kernel fills, and the threads of its blocks.
const TABLE_ROWS: usize = 8;
const TABLE_THREADS: usize = 128;

/// Which position turns which pair, and how far.
#[derive(Clone, Copy)]
struct Turns {
    theta: f32,
    pairs: usize,
    /// Pairs below the first follow axis 0, below the second axis 1, the others axis 2.
    ends: [usize; 2],
    /// Pair i has frequency `theta^(-i / period)` of i modulo the period.
    period: usize,
    /// From the position of a row to that of the next, and from axis to axis.
    steps: [usize; 2],
}

impl Turns {
    fn axis(self, pair: usize) -> usize {
        self.ends.iter().filter(|&&end| pair >= end).count()
    }

    /// Rounded where the reference rounds.
    fn frequency(self, pair: usize) -> f32 {
        let exponent = (2 * (pair % self.period)) as f32 / (2 * self.period) as f32;
        1.0 / (f64::from(self.theta).powf(f64::from(exponent)) as f32)
    }
}

/// Fills `cos` and `sin` (`[t, pairs]`).
fn tables(s: &Stream, positions: &Buffer, turns: Turns, cos: &Buffer, sin: &Buffer, t: usize) {
    let Turns { pairs, steps, .. } = turns;
    assert!(cos.len() >= t * pairs && sin.len() >= t * pairs, "rope tables of {t} rows of {pairs}");
    let (positions, cos, sin) = (positions.clone(), cos.view(0, t * pairs), sin.view(0, t * pairs));
    match s.backend() {
        // SAFETY: launches run one after the other; the tables are different buffers.
        Backend::Cpu(s) => s.launch(move |pool| unsafe {
            let (axis, frequency): (Vec<_>, Vec<_>) = (0..pairs).map(|i| (turns.axis(i), turns.frequency(i))).unzip();
            let (positions, sin) = (positions.get::<u32>(), SendPtr(sin.get_mut::<f32>().as_mut_ptr()));
            pool.chunks_mut(cos.get_mut::<f32>(), ROWS * pairs, |chunk, cos| {
                for (j, cos) in cos.iter_mut().enumerate() {
                    let (row, pair) = (chunk * ROWS + j / pairs, j % pairs);
                    let angle = positions[row * steps[0] + axis[pair] * steps[1]] as f32 * frequency[pair];
                    let (sine, cosine) = angle.sin_cos();
                    *cos = cosine;
                    *sin.get().add(row * pairs + pair) = sine;
                }
            });
        }),
        Backend::Gpu(gpu) if t * pairs > 0 => {
            let Turns { theta, ends: [first, second], period, .. } = turns;
            let sizes = [t, pairs, first, second, period, steps[0], steps[1]].map(Arg::len);
            let blocks = Launch::linear(t.div_ceil(TABLE_ROWS), TABLE_THREADS);
            let [x, _, z] = blocks.grid;
            let shape = Launch { grid: [x, pairs.div_ceil(TABLE_THREADS) as u32, z], ..blocks };
            let buffers = [&positions, &cos, &sin].map(Arg::Buffer);
            gpu.launch("rope_tables", shape, &[&buffers[..], &sizes, &[Arg::F32(theta)]].concat());
        }
        Backend::Gpu(_) => {}
    }
}

/// The decoder's tables: `cos` and `sin` `[t, hd / 2]` from `positions`, u32 `[3, t]` (time, height, width).
///
/// `mrope_section` gives the number of pairs that follow each axis and sums to `hd / 2`.
pub fn mrope_tables(
    s: &Stream,
    positions: &Buffer,
    mrope_section: [usize; 3],
    theta: f32,
    hd: usize,
    cos: &Buffer,
    sin: &Buffer,
    t: usize,
) {
    assert_eq!(mrope_section.iter().sum::<usize>(), hd / 2, "mrope_section {mrope_section:?} of a head of {hd}");
    assert!(positions.len() >= 3 * t, "{t} positions on three axes in a buffer of {}", positions.len());
    let [time, height, _] = mrope_section;
    let turns = Turns { theta, pairs: hd / 2, ends: [time, time + height], period: hd / 2, steps: [1, t] };
    tables(s, positions, turns, cos, sin, t);
}

/// The vision tower's tables: `cos` and `sin` `[t, hd / 2]` from `pos_hw`, u32 `[t, 2]` (height, width) of each patch.
pub fn vision_tables(s: &Stream, pos_hw: &Buffer, theta: f32, hd: usize, cos: &Buffer, sin: &Buffer, t: usize) {
    assert!(hd.is_multiple_of(4), "a vision head of {hd} is not a multiple of 4");
    assert!(pos_hw.len() >= 2 * t, "{t} patch positions in a buffer of {}", pos_hw.len());
    let turns = Turns { theta, pairs: hd / 2, ends: [hd / 4, hd / 2], period: hd / 4, steps: [2, 1] };
    tables(s, pos_hw, turns, cos, sin, t);
}

/// Turns `heads` heads of `hd` floats, side by side from column `col_offset` of each row of `x` (`[rows, row_stride]`),
/// in place; row i by row i of the tables. `inverse` turns back, which is also the backward.
pub fn rotate(
    s: &Stream,
    x: &Buffer,
    row_stride: usize,
    col_offset: usize,
    heads: usize,
    hd: usize,
    cos: &Buffer,
    sin: &Buffer,
    rows: usize,
    inverse: bool,
) {
    let pairs = hd / 2;
    assert!(
        hd.is_multiple_of(2) && col_offset + heads * hd <= row_stride,
        "{heads} heads of {hd} in rows of {row_stride}"
    );
    assert!(x.len() >= rows * row_stride, "{rows} rows of {row_stride} in a buffer of {}", x.len());
    assert!(cos.len() >= rows * pairs && sin.len() >= rows * pairs, "rope tables for {rows} rows of {pairs}");
    let (x, cos, sin) = (x.view(0, rows * row_stride), cos.clone(), sin.clone());
    let sign = if inverse { -1.0 } else { 1.0 };
    match s.backend() {
        // SAFETY: launches run one after the other; the tables are not part of `x`.
        Backend::Cpu(s) => s.launch(move |pool| unsafe {
            let (cos, sin) = (cos.get::<f32>(), sin.get::<f32>());
            pool.chunks_mut(x.get_mut::<f32>(), ROWS * row_stride, |chunk, x| {
                for (i, row) in x.chunks_mut(row_stride).enumerate() {
                    let at = (chunk * ROWS + i) * pairs;
                    let (cos, sin) = (&cos[at..at + pairs], &sin[at..at + pairs]);
                    turn(&mut row[col_offset..col_offset + heads * hd], cos, sin, sign);
                }
            });
        }),
        Backend::Gpu(gpu) if rows * heads * pairs > 0 => {
            let sizes = [rows, row_stride, col_offset, heads, pairs].map(Arg::len);
            let buffers = [&x, &cos, &sin].map(Arg::Buffer);
            let args = [&buffers[..], &sizes, &[Arg::F32(sign)]].concat();
            gpu.launch("rope_rotate", eights(rows * heads, pairs), &args);
        }
        Backend::Gpu(_) => {}
    }
}

/// Heads side by side; nothing is fused. The sine's sign flips for the inverse; a product and its negation round alike.
#[inline(always)]
fn turn_body<const FMA: bool>(heads: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
    for head in heads.chunks_exact_mut(2 * cos.len()) {
        let (a, b) = head.split_at_mut(cos.len());
        for ((a, b), (c, s)) in a.iter_mut().zip(b).zip(cos.iter().zip(sin)) {
            let (x, y, s) = (*a, *b, s * sign);
            *a = x * c - y * s;
            *b = y * c + x * s;
        }
    }
}
multiversion!(fn turn(heads: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) = turn_body);

#[cfg(test)]
mod tests {
    use super::super::testing::{noise, same_on_every_isa};
    use super::*;
    use crate::device::{DType, Device};

    fn close(got: &[f32], want: &[f32]) {
        assert_eq!(got.len(), want.len());
        for (g, w) in got.iter().zip(want) {
            assert!((g - w).abs() <= 1.2e-7, "{got:?}\n{want:?}");
        }
    }

    /// Figures from transformers 5.17.
    #[test]
    fn tables_are_the_references() {
        let d = Device::cpu_deferred(2);
        let s = d.stream();
        let (cos, sin) = (d.alloc(DType::F32, 24), d.alloc(DType::F32, 24));
        let positions = d.upload(&[0u32, 3, 1000, 5, 17, 2000, 9, 29, 3999]);
        mrope_tables(&s, &positions, [2, 3, 3], 1e6, 16, &cos, &sin, 3);
        #[rustfmt::skip]
        let want_cos = [
            1.0, 1.0, 0.987526, 0.999_604_76, 0.999_987_5, 0.999_998_75, 0.999_999_94, 1.0,
            -0.989_992_5, 0.861_040_65, 0.858_946_7, 0.995_434, 0.999_855_5, 0.999_986_7, 0.999_999_6, 1.0,
            0.562_379_06, -0.322_109_55, 0.915_638_57, 0.248_616_73, -0.416_146_84, 0.757_622_24, 0.992_014_65, 0.999_747_16,
        ];
        #[rustfmt::skip]
        let want_sin = [
            0.0, 0.0, 0.157_455_9, 0.028_113_361, 0.004_999_979_4, 0.001_600_450_7, 0.000_284_604_96, 5.061_072e-5,
            0.141_12, 0.508_536_1, 0.512_065_05, 0.095_452_48, 0.016_999_181, 0.005_156_987_3, 0.000_917_060_36, 0.000_163_079,
            0.826_879_56, 0.946_702_4, 0.402_002_5, -0.968_601_94, 0.909_297_4, 0.652_693_3, 0.126_122_7, 0.022_486_134,
        ];
        close(&s.read::<f32>(&cos).wait().unwrap(), &want_cos);
        close(&s.read::<f32>(&sin).wait().unwrap(), &want_sin);

        let (cos, sin) = (d.alloc(DType::F32, 16), d.alloc(DType::F32, 16));
        vision_tables(&s, &d.upload(&[3u32, 40, 17, 5]), 1e4, 16, &cos, &sin, 2);
        #[rustfmt::skip]
        let want_cos = [
            -0.989_992_5, 0.955_336_5, 0.999_550_04, 0.999_995_5, -0.666_938_07, -0.653_643_6, 0.921_061, 0.999_200_1,
            -0.275_163_35, -0.128_844_54, 0.985_584_8, 0.999_855_5, 0.283_662_2, 0.877_582_55, 0.998_750_27, 0.999_987_5,
        ];
        #[rustfmt::skip]
        let want_sin = [
            0.141_12, 0.295_520_22, 0.029_995_5, 0.002_999_995_6, 0.745_113_13, -0.756_802_5, 0.389_418_33, 0.039_989_33,
            -0.961_397_47, 0.991_664_8, 0.169_182_35, 0.016_999_181, -0.958_924_3, 0.479_425_55, 0.049_979_165, 0.004_999_979_4,
        ];
        close(&s.read::<f32>(&cos).wait().unwrap(), &want_cos);
        close(&s.read::<f32>(&sin).wait().unwrap(), &want_sin);
    }

    #[test]
    fn rotation_turns_pairs_and_turns_back() {
        let d = Device::cpu(2);
        let s = d.stream();
        let (rows, heads, hd, stride) = (70, 2, 8, 21);
        let positions: Vec<u32> = (0..3 * rows as u32).map(|i| i % 70).collect();
        let (cos, sin) = (d.alloc(DType::F32, rows * 4), d.alloc(DType::F32, rows * 4));
        mrope_tables(&s, &d.upload(&positions), [1, 1, 2], 100.0, hd, &cos, &sin, rows);
        let x: Vec<f32> = (0..rows * stride).map(|i| (i % 17) as f32 - 8.0).collect();
        let b = d.upload(&x);
        rotate(&s, &b, stride, 3, heads, hd, &cos, &sin, rows, false);
        let turned = s.read::<f32>(&b).wait().unwrap();
        for (i, (&got, &was)) in turned.iter().zip(&x).enumerate() {
            let (row, column) = (i / stride, i % stride);
            if !(3..3 + heads * hd).contains(&column) {
                assert_eq!(got, was, "a column that is not a head's");
                continue;
            }
            let pair = (column - 3) % 4;
            let angle = row as f64 * 100f64.powf(-(pair as f64) / 4.0);
            let second = (column - 3) % hd >= 4;
            let other = f64::from(x[if second { i - 4 } else { i + 4 }]);
            let want = f64::from(was) * angle.cos() + if second { other } else { -other } * angle.sin();
            assert!((f64::from(got) - want).abs() < 1e-4, "row {row} column {column}: {got}, not {want}");
        }
        rotate(&s, &b, stride, 3, heads, hd, &cos, &sin, rows, true);
        close(
            &s.read::<f32>(&b).wait().unwrap().iter().map(|x| x / 32.0).collect::<Vec<_>>(),
            &x.iter().map(|x| x / 32.0).collect::<Vec<_>>(),
        );
    }

    #[test]
    fn every_instruction_set_gives_the_bits_of_the_plain_formula() {
        for (hd, inverse) in [(6, false), (64, true), (80, false)] {
            let (rows, heads, pairs, at) = (3, 2, hd / 2, 5);
            let stride = at + heads * hd + 1;
            let (x, cos, sin) = (noise(rows * stride, 1), noise(rows * pairs, 2), noise(rows * pairs, 3));
            let mut want = x.clone();
            for (row, head, i) in (0..rows).flat_map(|r| (0..heads * pairs).map(move |j| (r, j / pairs, j % pairs))) {
                let a = row * stride + at + head * hd + i;
                let (c, s) = (cos[row * pairs + i], sin[row * pairs + i]);
                let s = if inverse { -s } else { s };
                (want[a], want[a + pairs]) = (x[a] * c - x[a + pairs] * s, x[a + pairs] * c + x[a] * s);
            }
            same_on_every_isa(|d| {
                let (s, b) = (d.stream(), d.upload(&x));
                rotate(&s, &b, stride, at, heads, hd, &d.upload(&cos), &d.upload(&sin), rows, inverse);
                let got = s.read::<f32>(&b).wait().unwrap();
                assert_eq!(got, want);
                got
            });
        }
    }
}
