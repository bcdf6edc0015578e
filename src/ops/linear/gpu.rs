//! The products on a GPU: which kernel of `kernels/linear/` computes which tile, and the gradients.
//!
//! Of an architecture and a weight's shape all tiles give the same bits, so tiles are chosen for speed alone.

use super::Weight;
use crate::device::{Arg, Buffer, DType, Gpu, Launch};

/// Threads of the kernels that sum gradients of biases.
const BIAS_THREADS: usize = 256;
/// Columns and rows of which a block sums gradients of biases.
const BIAS_TILE: [usize; 2] = [64, 512];

/// Elements that a tensor copy brings of a row: the 128 bytes over which it is swizzled.
const SLAB: usize = 64;
/// The most outputs of a group of warps that `wgmma` runs on.
const GROUP_ROWS: usize = 64;
/// Bytes of shared memory of a multiprocessor of sm_90, of which a block takes one KiB for the system and one for its barriers.
const SM90_SHARED: usize = 228 << 10;

/// The instructions that multiply. Which ones do is a matter of the architecture and the weight's shape alone: the two may
/// differ in the last bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    /// `mma.sync` with `cp.async`: any shape, from sm_80 on.
    Mma,
    /// `wgmma` with tensor copies, which read rows at multiples of 16 bytes: sm_90a.
    Wgmma,
}

impl Family {
    pub(super) fn of(sm: u32, k: usize) -> Family {
        if sm >= 90 && k.is_multiple_of(8) { Family::Wgmma } else { Family::Mma }
    }

    /// Its kernels.
    pub(super) fn tiles(self) -> &'static [Tile] {
        match self {
            Family::Mma => &MMA,
            Family::Wgmma => &WGMMA,
        }
    }
}

/// A kernel: the outputs and tokens of one of its tiles, and what a block takes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tile {
    pub outputs: usize,
    pub tokens: usize,
    threads: usize,
    shared_bytes: usize,
}

/// As `kernels/linear/mma.cu` has it.
const fn mma(outputs: usize, tokens: usize, depth: usize, stages: usize, threads: usize) -> Tile {
    Tile { outputs, tokens, threads, shared_bytes: stages * (outputs + tokens) * depth * 2 }
}

/// As `kernels/linear/wgmma.cu` has it.
const fn wgmma(groups: usize, rows: usize, tokens: usize, slabs: usize, stages: usize) -> Tile {
    let outputs = groups * rows;
    let staged = if tokens < 32 { tokens } else { 32 };
    let shared_bytes = stages * slabs * (outputs + tokens) * SLAB * 2 + groups * staged * (rows + 4) * 4;
    Tile { outputs, tokens, threads: groups * 128 + 32, shared_bytes }
}

const MMA: [Tile; 9] = [
    mma(16, 8, 256, 4, 128),
    mma(16, 16, 256, 4, 128),
    mma(32, 32, 128, 4, 128),
    mma(64, 8, 128, 4, 128),
    mma(64, 16, 128, 4, 128),
    mma(64, 32, 128, 4, 128),
    mma(64, 64, 64, 4, 128),
    mma(128, 128, 64, 3, 256),
    mma(128, 256, 32, 4, 256),
];

const WGMMA: [Tile; 10] = [
    wgmma(1, 16, 8, 4, 8),
    wgmma(1, 16, 16, 4, 6),
    wgmma(1, 16, 32, 2, 8),
    wgmma(1, 64, 8, 2, 5),
    wgmma(1, 64, 16, 2, 5),
    wgmma(1, 64, 32, 2, 4),
    wgmma(1, 64, 64, 1, 6),
    wgmma(2, 64, 64, 1, 8),
    wgmma(2, 64, 128, 1, 6),
    wgmma(2, 64, 256, 1, 4),
];

impl Tile {
    fn count(self, m: usize, n: usize) -> usize {
        m.div_ceil(self.tokens) * n.div_ceil(self.outputs)
    }

    /// An estimate of the time for `[m, n]`, in rows of operands that a multiprocessor takes in from the second-level cache.
    ///
    /// What bounds a product besides the memory that every tiling reads alike: the rows that the busiest multiprocessor takes in;
    /// those that the cache gives to all, about as fast as six of ten multiprocessors could take; and multiplications, of
    /// which the tensor cores do about 64 pairs of rows in the time of one row.
    fn cost(self, m: usize, n: usize, multiprocessors: usize) -> usize {
        let (tiles, rows) = (self.count(m, n), self.outputs + self.tokens);
        let busiest = tiles.div_ceil(multiprocessors);
        let multiply = self.outputs.max(64) * self.tokens / 64;
        (busiest * rows.max(multiply)).max(tiles * rows * 10 / (multiprocessors * 6))
    }

    pub(super) fn best(tiles: &[Tile], m: usize, n: usize, multiprocessors: usize) -> Tile {
        *tiles.iter().min_by_key(|t| t.cost(m, n, multiprocessors)).unwrap_or(&MMA[0])
    }
}

/// What becomes of the finished sums.
#[derive(Clone, Copy)]
pub(super) enum Then<'a> {
    /// A bias and a residual are added; the result is bf16, or f32.
    Add { bias: Option<&'a Buffer>, residual: Option<&'a Buffer> },
    /// A bias is added, then the first half of the outputs gates the second: the result has half as many columns.
    Gate { bias: Option<&'a Buffer> },
}

/// `y = x[m, k] W^T`, and `then`.
pub(super) fn forward(gpu: &Gpu, x: &Buffer, w: &Weight, then: Then<'_>, y: &Buffer, m: usize) {
    let family = Family::of(gpu.sm(), w.k);
    let tile = Tile::best(family.tiles(), m, w.n, gpu.multiprocessors());
    forward_as(gpu, family, tile, x, w, then, y, m);
}

/// [`forward`] in tiles of one kind.
pub(super) fn forward_as(
    gpu: &Gpu,
    family: Family,
    tile: Tile,
    x: &Buffer,
    w: &Weight,
    then: Then<'_>,
    y: &Buffer,
    m: usize,
) {
    let (n, k) = (w.n, w.k);
    if m == 0 {
        return;
    }
    let kind = if family == Family::Mma { "mma" } else { "wgmma" };
    // Of a weight that gates a box has the gates of a group of warps, or its ups.
    let (form, added, columns, rows) = match then {
        Then::Add { bias, residual } => {
            let form = if y.dtype() == DType::F32 { "_f32" } else { "" };
            (form, vec![Arg::maybe(bias, DType::BF16), Arg::maybe(residual, y.dtype())], n, tile.outputs)
        }
        Then::Gate { bias } => ("_gated", vec![Arg::maybe(bias, DType::BF16)], n / 2, tile.outputs.min(GROUP_ROWS) / 2),
    };
    let kernel = format!("linear_{kind}_{}x{}{form}", tile.outputs, tile.tokens);
    let tail = [Arg::Buffer(y), Arg::len(m), Arg::len(columns), Arg::len(k)];
    let tiles = tile.count(m, n);
    match family {
        Family::Mma => {
            // Of rows that lie one after the other, so many bytes divide every start.
            let starts = [&w.data, x].map(|b| b.alignment());
            let alignment = starts.into_iter().chain([1 << (k * 2).trailing_zeros()]).min().unwrap_or(2);
            let mut args = vec![Arg::Buffer(&w.data), Arg::Buffer(x)];
            args.extend(added);
            args.extend(tail);
            args.push(Arg::len(alignment.min(16)));
            gpu.launch(&kernel, Launch::linear(tiles, tile.threads).shared(tile.shared_bytes), &args);
        }
        Family::Wgmma => {
            // Another instruction would give other bits, so rows at odd places move.
            let x = &gpu.aligned(x, m * k);
            let map =
                |b, rows, tile: usize| gpu.tensor_map(b, &[k, rows], &[SLAB as u32, tile as u32], SLAB as u32 * 2);
            let (weight, tokens) = (map(&w.data, n, rows), map(x, m, tile.tokens));
            let mut args = vec![Arg::TensorMap(&weight), Arg::TensorMap(&tokens)];
            args.extend(added);
            args.extend(tail);
            // Blocks stay for all their tiles, as many as there is room for at once.
            let resident = (SM90_SHARED / (tile.shared_bytes + 2048)).min(2) * gpu.multiprocessors();
            let launch = Launch::linear(tiles.min(resident), tile.threads).shared(tile.shared_bytes);
            gpu.launch(&kernel, launch, &args);
        }
    }
}

/// `db[n] += ` the sum of `dy[m, n]` over its rows; `dy` bf16, `db` f32.
pub(super) fn backward_bias(gpu: &Gpu, dy: &Buffer, db: &Buffer, m: usize) {
    let n = db.len();
    if m * n == 0 {
        return;
    }
    let [columns, rows] = BIAS_TILE;
    let count = m.div_ceil(rows);
    let [parts] = gpu.scratch([(DType::F32, count * n)]);
    let grid = [n.div_ceil(columns), count, 1].map(|blocks| u32::try_from(blocks).unwrap_or(u32::MAX));
    let launch = Launch { grid, ..Launch::linear(1, BIAS_THREADS) };
    let args = [Arg::Buffer(dy), Arg::Buffer(&parts), Arg::len(m), Arg::len(n)];
    gpu.launch("linear_bias_gradient_parts", launch, &args);
    let args = [Arg::Buffer(&parts), Arg::Buffer(db), Arg::len(count), Arg::len(n)];
    gpu.launch("linear_bias_gradient", Launch::linear(n.div_ceil(BIAS_THREADS), BIAS_THREADS), &args);
}

#[cfg(all(test, emulator))]
mod tests {
    use super::*;
    use crate::device::{Backend, Device, Stream};
    use crate::ops::swiglu;
    use crate::ops::testing::noise;
    use half::bf16;
    use std::hash::{BuildHasher, RandomState};

    fn run(s: &Stream, family: Family, tile: Tile, x: &Buffer, w: &Weight, then: Then<'_>, y: &Buffer, m: usize) {
        let Backend::Gpu(gpu) = s.backend() else { unreachable!("an emulated device") };
        forward_as(gpu, family, tile, x, w, then, y, m);
    }

    #[test]
    fn every_tile_of_a_family_equals_f64_with_the_same_bits() {
        let seed = RandomState::new().hash_one("seed");
        println!("seed {seed}");
        let d = Device::emulated(seed).unwrap();
        let s = d.stream();
        for [m, n, k] in [[1, 1, 8], [9, 40, 64], [3, 130, 600], [270, 24, 72], [2, 33, 20], [5, 34, 22], [70, 19, 7]] {
            let [x, w, bias] = [m * k, n * k, n].map(|len| noise(len, seed ^ len as u64));
            let [x, w, bias] = [x, w, bias].map(|v| v.into_iter().map(bf16::from_f32).collect::<Vec<_>>());
            let want: Vec<f64> = (0..m * n)
                .map(|i| {
                    let row = x[i / n * k..][..k].iter().zip(&w[i % n * k..][..k]);
                    row.map(|(x, w)| x.to_f64() * w.to_f64()).sum::<f64>() + bias[i % n].to_f64()
                })
                .collect();
            let weight = Weight { data: d.upload(&w), n, k };
            let (x, bias) = (d.upload(&x), d.upload(&bias));
            for family in [Family::Mma, Family::of(90, k)] {
                let mut first: Option<(Vec<u32>, Vec<bf16>)> = None;
                for &tile in family.tiles() {
                    let (wide, narrow) = (d.alloc(DType::F32, m * n), d.alloc(DType::BF16, m * n));
                    let then = Then::Add { bias: Some(&bias), residual: None };
                    run(&s, family, tile, &x, &weight, then, &wide, m);
                    run(&s, family, tile, &x, &weight, then, &narrow, m);
                    let wide = s.read::<f32>(&wide).wait().unwrap();
                    let narrow = s.read::<bf16>(&narrow).wait().unwrap();
                    for (i, (&got, want)) in wide.iter().zip(&want).enumerate() {
                        let off = (f64::from(got) - want).abs();
                        assert!(off < 1e-4, "element {i} of [{m}, {n}, {k}], {family:?} {tile:?}: {got}, not {want}");
                        assert_eq!(narrow[i], bf16::from_f32(got), "element {i} of [{m}, {n}, {k}], {tile:?}");
                    }
                    let bits: (Vec<u32>, Vec<bf16>) = (wide.into_iter().map(f32::to_bits).collect(), narrow);
                    assert!(*first.get_or_insert_with(|| bits.clone()) == bits, "[{m}, {n}, {k}], {family:?} {tile:?}");
                }
            }
        }
    }

    #[test]
    fn gated_in_any_tile_is_what_the_activation_makes_of_the_product() {
        let seed = RandomState::new().hash_one("seed");
        println!("seed {seed}");
        let d = Device::emulated(seed).unwrap();
        let s = d.stream();
        for [m, width, k] in [[1, 1, 8], [9, 20, 64], [3, 72, 600], [270, 12, 72], [2, 33, 20], [70, 130, 8]] {
            let [x, w, bias] = [m * k, 2 * width * k, 2 * width].map(|len| noise(len, seed ^ len as u64));
            let [x, w, bias] = [x, w, bias].map(|v| v.into_iter().map(bf16::from_f32).collect::<Vec<_>>());
            let weight = Weight { data: d.upload(&w), n: 2 * width, k };
            let (x, bias) = (d.upload(&x), d.upload(&bias));
            for (family, bias) in
                [(Family::Mma, Some(&bias)), (Family::of(90, k), Some(&bias)), (Family::of(90, k), None)]
            {
                let [both, want] = [2 * width, width].map(|n| d.alloc(DType::BF16, m * n));
                let then = Then::Add { bias, residual: None };
                run(&s, family, family.tiles()[0], &x, &weight, then, &both, m);
                swiglu::forward(&s, &both, &want, m, width);
                let want = s.read::<bf16>(&want).wait().unwrap();
                for &tile in family.tiles() {
                    let got = d.alloc(DType::BF16, m * width);
                    run(&s, family, tile, &x, &weight, Then::Gate { bias }, &got, m);
                    let got = s.read::<bf16>(&got).wait().unwrap();
                    assert!(
                        got.iter().zip(&want).all(|(a, b)| a.to_bits() == b.to_bits()),
                        "[{m}, {width}, {k}], {tile:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn few_tokens_take_narrow_tiles_and_many_take_wide_ones() {
        let best = |tiles: &'static [Tile], m, n, multiprocessors| {
            let t = Tile::best(tiles, m, n, multiprocessors);
            [t.outputs, t.tokens]
        };
        // A small weight has few tiles: they must be small for all multiprocessors to have one.
        assert_eq!(best(&WGMMA, 1, 2048, 132), [16, 8]);
        assert_eq!(best(&WGMMA, 8, 151_936, 132), [64, 8]);
        assert_eq!(best(&WGMMA, 2048, 22_016, 132), [128, 256]);
        assert_eq!(best(&MMA, 8, 2048, 108), [16, 8]);
        assert_eq!(best(&MMA, 64, 22_016, 108), [64, 64]);
        assert_eq!(best(&MMA, 4096, 11_008, 108), [128, 256]);
    }

    #[test]
    fn a_block_has_the_shared_memory_that_it_takes() {
        assert!(MMA.iter().all(|t| t.shared_bytes <= 99 << 10), "sm_86 and sm_89 give a block 99 KiB");
        assert!(WGMMA.iter().all(|t| t.shared_bytes + 1024 <= 227 << 10), "sm_90 gives a block 227 KiB");
    }
}
