//! The vision tower's first product, straight from u8 pixels: rescale, normalise, cut into patches and multiply.
//!
//! An image of `grid_h x grid_w` patches of 14 x 14 pixels gives one row for each patch. Rows are in the order of 2 x 2
//! blocks (block row, block column, row in the block, column in the block), as the merger wants them; the inputs of a row
//! are ordered (channel, frame, y, x). A still image fills both frames of the temporal patch.
//!
//! The normalised pixels never exist for a whole image. On the host's cores 512 patches at a time are written into a scratch
//! tile and multiplied; a GPU's kernel loads levels and normalises them as it multiplies. How patches fall into tiles changes no
//! bit.

use super::linear::{self, Epilogue, Weight};
use crate::device::{Arg, Backend, Buffer, DType, Gpu, Launch, Matmul, Stream};

/// Pixels per side of a patch.
pub const PATCH: usize = 14;
/// Patches per side of a block that the merger joins.
pub const MERGE: usize = 2;
/// Frames of a temporal patch.
pub const FRAMES: usize = 2;
/// Colour channels.
pub const CHANNELS: usize = 3;
/// Inputs of a patch: (channel, frame, y, x).
pub const INPUTS: usize = CHANNELS * FRAMES * PATCH * PATCH;

/// Patches per scratch tile, 2.4 MB: what the product that makes the weight's gradient takes at a time.
const TILE: usize = linear::BATCH;
/// Patches per work item while a tile is filled.
const PATCHES: usize = 16;

/// Of the GPU's kernels: patches and outputs of a tile, threads of the blocks, their shared memory.
const TILE_M: usize = 128;
const TILE_N: usize = 128;
const THREADS: usize = 256;
const SHARED_BYTES: usize = TILE_M * ROW + 3 * 2 * TILE_N * FRAMES * 16;
const PATCHES_THREADS: usize = 96;
/// Inputs of one frame, padded to whole steps of the product.
const ROW: usize = (INPUTS / FRAMES).next_multiple_of(16);
/// Patches that are written out at a time for the weight's gradient, 10 MB.
const WRITTEN: usize = 8192;

/// Where an image lies in a buffer of pixels, and its size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Elements before the image.
    pub offset: usize,
    /// Patches down; even.
    pub grid_h: usize,
    /// Patches across; even.
    pub grid_w: usize,
}

impl Geometry {
    /// Rows that this image gives.
    pub fn patches(&self) -> usize {
        self.grid_h * self.grid_w
    }

    /// Bytes of the image: RGB, rows top to bottom, no padding.
    pub fn bytes(&self) -> usize {
        self.patches() * PATCH * PATCH * CHANNELS
    }

    /// The first byte of patch `p` of this image.
    fn start(&self, p: usize) -> usize {
        let (block, inside) = (p / (MERGE * MERGE), p % (MERGE * MERGE));
        let (by, bx) = (block / (self.grid_w / MERGE), block % (self.grid_w / MERGE));
        let (y, x) = (by * MERGE + inside / MERGE, bx * MERGE + inside % MERGE);
        self.offset + (y * PATCH * self.grid_w + x) * PATCH * CHANNELS
    }
}

/// What each of the 256 levels of each channel becomes.
#[derive(Clone, Debug, PartialEq)]
pub struct Normalize {
    lut: [[f32; 256]; CHANNELS],
    /// The same as `level * scale + shift`, but for the last bits.
    scale: [f32; CHANNELS],
    shift: [f32; CHANNELS],
}

impl Normalize {
    /// `(level / 255 - mean) / std` by channel, in the arithmetic of transformers' image processor: the division by 255
    /// is a product with 1/255 in f64, rounded to f32; the rest is f32.
    pub fn new(mean: [f32; CHANNELS], std: [f32; CHANNELS]) -> Normalize {
        let level = |c: usize, i: usize| ((i as f64 * (1.0 / 255.0)) as f32 - mean[c]) / std[c];
        let [mean64, std64] = [mean, std].map(|of| of.map(f64::from));
        Normalize {
            lut: std::array::from_fn(|c| std::array::from_fn(|i| level(c, i))),
            scale: std64.map(|s| (1.0 / (255.0 * s)) as f32),
            shift: std::array::from_fn(|c| (-mean64[c] / std64[c]) as f32),
        }
    }
}

impl Normalize {
    /// As the kernels take it.
    fn args(&self) -> [Arg<'static>; 2 * CHANNELS] {
        let [[a, b, c], [d, e, f]] = [self.scale, self.shift].map(|of| of.map(Arg::F32));
        [a, b, c, d, e, f]
    }
}

/// `out[p, :] = w patch(p)`: pixels u8, out `[patches of all images, w.n]`, the images' rows one after the other. `w` has
/// [`INPUTS`] inputs.
pub fn forward(s: &Stream, pixels: &Buffer, images: &[Geometry], normalize: &Normalize, w: &Weight, out: &Buffer) {
    assert_eq!(w.k, INPUTS, "a patch embedding of {INPUTS} inputs");
    let patches = check(pixels, images);
    assert!(out.len() >= patches * w.n, "an output of [{patches}, {}]", w.n);
    if let Backend::Gpu(gpu) = s.backend() {
        if patches * w.n > 0 && gpu.require_alignment(8, &[&w.data]) {
            let [table] = gpu.scratch([(DType::U32, 3 * images.len())]);
            write_table(s, images, &table);
            let sizes = [images.len(), patches, w.n].map(Arg::len);
            let buffers = [pixels, &table, &w.data, out].map(Arg::Buffer);
            let grid = [patches.div_ceil(TILE_M) as u32, w.n.div_ceil(TILE_N) as u32, 1];
            let shape = Launch { grid, ..Launch::linear(1, THREADS).shared(SHARED_BYTES) };
            gpu.launch("patch_embed_forward", shape, &[&buffers[..], &sizes, &normalize.args()].concat());
        }
        return;
    }
    tiles(s, pixels, images, normalize, |tile, first, rows| {
        linear::forward(s, tile, w, Epilogue::None, &out.view(first * w.n, rows * w.n), rows);
    });
}

/// The gradient of [`forward`]: `dw += ..`, packed like w, from dy `[patches of all images, n]`, patches ascending.
pub fn backward_weight(
    s: &Stream,
    pixels: &Buffer,
    images: &[Geometry],
    normalize: &Normalize,
    dy: &Buffer,
    dw: &Buffer,
) {
    let patches = check(pixels, images);
    if patches == 0 {
        return;
    }
    let n = dy.len() / patches;
    assert_eq!(dy.len(), patches * n, "a gradient of {patches} rows");
    if let Backend::Gpu(gpu) = s.backend() {
        return gpu_backward_weight(s, gpu, pixels, images, normalize, dy, dw, [patches, n]);
    }
    tiles(s, pixels, images, normalize, |tile, first, rows| {
        linear::backward_weight(s, &dy.view(first * n, rows * n), &tile.view(0, rows * INPUTS), dw, rows);
    });
}

/// Both frames of a patch are the same pixels, and so are both halves of the gradient: the product is made for one.
fn gpu_backward_weight(
    s: &Stream,
    gpu: &Gpu,
    pixels: &Buffer,
    images: &[Geometry],
    normalize: &Normalize,
    dy: &Buffer,
    dw: &Buffer,
    [patches, n]: [usize; 2],
) {
    assert_eq!(dw.len(), n * INPUTS, "a weight's gradient of [{n}, {INPUTS}]");
    let tile = patches.min(WRITTEN);
    let [table, written, frame] =
        gpu.scratch([(DType::U32, 3 * images.len()), (DType::BF16, tile * ROW), (DType::F32, n * ROW)]);
    write_table(s, images, &table);
    for first in (0..patches).step_by(tile) {
        let rows = tile.min(patches - first);
        let [pixels, table, to] = [pixels, &table, &written].map(Arg::Buffer);
        let args = [pixels, table, to, Arg::len(images.len()), Arg::len(first)];
        let shape = Launch::linear(rows, PATCHES_THREADS);
        gpu.launch("patch_embed_patches", shape, &[&args[..], &normalize.args()].concat());
        let dy = dy.view(first * n, rows * n);
        let product = Matmul::transposed(&dy, &written, &frame, [n, ROW, rows]);
        gpu.matmul(Matmul { accumulate: first > 0, ..product });
    }
    let shape = Launch::linear(dw.len().div_ceil(THREADS), THREADS);
    gpu.launch("patch_embed_add_frames", shape, &[Arg::Buffer(&frame), Arg::Buffer(dw), Arg::len(n)]);
}

/// Where the kernels find the images: of each the first row, the byte where it begins, and its patches across.
fn write_table(s: &Stream, images: &[Geometry], table: &Buffer) {
    let mut row = 0;
    let firsts = images.iter().map(|image| {
        let first = row;
        row += image.patches();
        first
    });
    let columns =
        [firsts.collect(), images.iter().map(|i| i.offset).collect(), images.iter().map(|i| i.grid_w).collect()];
    let values: Vec<u32> = columns.into_iter().flat_map(|column: Vec<usize>| column).map(|v| v as u32).collect();
    s.write(table, &values);
}

/// The normalised patches of one image, `[patches, INPUTS]`: what the reference calls `pixel_values`. On the host, for
/// comparison with other implementations; the model never makes them.
pub fn pixel_values(pixels: &[u8], image: &Geometry, normalize: &Normalize) -> Vec<f32> {
    let mut out = vec![0.0; image.patches() * INPUTS];
    for (p, row) in out.chunks_exact_mut(INPUTS).enumerate() {
        fill(pixels, image, p, normalize, row);
    }
    out
}

fn check(pixels: &Buffer, images: &[Geometry]) -> usize {
    for i in images {
        assert!(i.grid_h % MERGE == 0 && i.grid_w % MERGE == 0, "a grid of whole blocks: {i:?}");
        assert!(i.offset + i.bytes() <= pixels.len(), "{i:?} in {} bytes of pixels", pixels.len());
        assert!(u32::try_from(i.offset).is_ok(), "{i:?} begins past 4 GiB of pixels");
    }
    images.iter().map(Geometry::patches).sum()
}

/// For each tile: fills it and calls `then(tile, first row, rows)`, which submits what reads it.
fn tiles(
    s: &Stream,
    pixels: &Buffer,
    images: &[Geometry],
    normalize: &Normalize,
    then: impl Fn(&Buffer, usize, usize),
) {
    // (image, patch) of every row, by the first row of each image.
    let mut starts: Vec<(usize, Geometry)> = Vec::with_capacity(images.len());
    let mut patches = 0;
    for &image in images {
        starts.push((patches, image));
        patches += image.patches();
    }
    if patches == 0 {
        return;
    }
    let tile = s.device().alloc(DType::F32, patches.min(TILE) * INPUTS);
    let shared = std::sync::Arc::new((starts, normalize.clone()));
    for first in (0..patches).step_by(TILE) {
        let rows = TILE.min(patches - first);
        let (pixels, to, shared) = (pixels.clone(), tile.clone(), shared.clone());
        match s.backend() {
            Backend::Cpu(s) => s.launch(move |pool| {
                let (starts, normalize) = &*shared;
                // SAFETY: launches of one stream run in order; the tile's readers ran before this launch.
                let (pixels, tile) = unsafe { (pixels.get::<u8>(), to.get_mut::<f32>()) };
                pool.chunks_mut(&mut tile[..rows * INPUTS], PATCHES * INPUTS, |item, out| {
                    for (j, row) in out.chunks_exact_mut(INPUTS).enumerate() {
                        let r = first + item * PATCHES + j;
                        let (start, image) = &starts[starts.partition_point(|s| s.0 <= r) - 1];
                        fill(pixels, image, r - start, normalize, row);
                    }
                });
            }),
            Backend::Gpu(_) => unreachable!("tiles are the host's way"),
        }
        then(&tile, first, rows);
    }
}

/// Writes the inputs of patch `p` of `image`.
fn fill(pixels: &[u8], image: &Geometry, p: usize, normalize: &Normalize, row: &mut [f32]) {
    const PLANE: usize = PATCH * PATCH;
    let (start, stride) = (image.start(p), image.grid_w * PATCH * CHANNELS);
    let [red, green, blue] = &normalize.lut;
    for y in 0..PATCH {
        let line = &pixels[start + y * stride..][..PATCH * CHANNELS];
        for (x, px) in line.chunks_exact(CHANNELS).enumerate() {
            let at = y * PATCH + x;
            row[at] = red[px[0] as usize];
            row[FRAMES * PLANE + at] = green[px[1] as usize];
            row[2 * FRAMES * PLANE + at] = blue[px[2] as usize];
        }
    }
    for c in row.chunks_exact_mut(FRAMES * PLANE) {
        c.copy_within(..PLANE, PLANE);
    }
}

#[cfg(test)]
mod tests {
    use super::super::linear::{pack, packed_len, unpack};
    use super::super::testing::{close, devices, noise};
    use super::*;

    fn clip() -> Normalize {
        Normalize::new([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.261_302_6, 0.275_777_1])
    }

    /// Two images in one buffer, with bytes between them; the second reaches over several tiles.
    fn images() -> (Vec<u8>, [Geometry; 2]) {
        let a = Geometry { offset: 5, grid_h: 4, grid_w: 6 };
        let b = Geometry { offset: 5 + a.bytes() + 11, grid_h: 26, grid_w: 44 };
        let bytes = noise(b.offset + b.bytes(), 3).iter().map(|x| ((x + 1.0) * 127.9) as u8).collect();
        (bytes, [a, b])
    }

    #[test]
    fn levels_are_the_reference_s_to_the_bit() {
        // The bits of all 768 values that transformers 5.17's Qwen2VLImageProcessorPil makes, folded into one number.
        let bits =
            clip().lut.into_iter().flatten().fold(0u64, |h, x| h.wrapping_mul(31).wrapping_add(x.to_bits() as u64));
        assert_eq!(bits, 0xb73d_1390_a53f_0b7d);
    }

    #[test]
    fn a_product_and_a_sum_make_the_same_bf16_values() {
        let n = clip();
        for (c, level) in (0..CHANNELS).flat_map(|c| (0..256).map(move |i| (c, i))) {
            let fused = (level as f32).mul_add(n.scale[c], n.shift[c]);
            assert_eq!(half::bf16::from_f32(fused), half::bf16::from_f32(n.lut[c][level]), "level {level} of {c}");
        }
    }

    #[test]
    fn patches_are_in_block_order_with_both_frames() {
        let (pixels, images) = images();
        let lut = clip().lut;
        for g in images {
            let got = pixel_values(&pixels, &g, &clip());
            let mut row = 0;
            for (by, bx) in (0..g.grid_h / 2).flat_map(|y| (0..g.grid_w / 2).map(move |x| (y, x))) {
                for (my, mx) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                    for (c, t, y, x) in [(0, 0, 0, 0), (1, 1, 3, 13), (2, 0, 13, 0), (2, 1, 7, 5)] {
                        let (py, px) = ((2 * by + my) * 14 + y, (2 * bx + mx) * 14 + x);
                        let level = pixels[g.offset + (py * g.grid_w * 14 + px) * 3 + c];
                        let at = row * INPUTS + ((c * 2 + t) * 14 + y) * 14 + x;
                        assert_eq!(got[at], lut[c][level as usize]);
                    }
                    row += 1;
                }
            }
        }
    }

    #[test]
    fn equals_the_product_of_pixel_values_however_rows_fall_into_tiles() {
        let (n, norm) = (20, clip());
        let (pixels, images) = images();
        let values: Vec<f32> = images.iter().flat_map(|g| pixel_values(&pixels, g, &norm)).collect();
        let rows = values.len() / INPUTS;
        let (w, dy, base) = (noise(n * INPUTS, 1), noise(rows * n, 2), noise(n * INPUTS, 4));
        let (mut y, mut dw) = (vec![0.0f64; rows * n], base.iter().map(|&x| x as f64).collect::<Vec<_>>());
        for r in 0..rows {
            for j in 0..n {
                for k in 0..INPUTS {
                    y[r * n + j] += values[r * INPUTS + k] as f64 * w[j * INPUTS + k] as f64;
                    dw[j * INPUTS + k] += dy[r * n + j] as f64 * values[r * INPUTS + k] as f64;
                }
            }
        }
        let mut first: Option<(Vec<f32>, Vec<f32>)> = None;
        for d in devices() {
            let s = d.stream();
            let weight = |rows: &[f32]| {
                let mut p = vec![0.0; packed_len(n, INPUTS)];
                pack(rows, n, INPUTS, &mut p);
                Weight { data: d.upload(&p), n, k: INPUTS }
            };
            let (wb, dwb, px) = (weight(&w), weight(&base), d.upload(&pixels));
            let out = d.alloc(DType::F32, rows * n);
            forward(&s, &px, &images, &norm, &wb, &out);
            backward_weight(&s, &px, &images, &norm, &d.upload(&dy), &dwb.data);
            let mut got_dw = vec![0.0; n * INPUTS];
            unpack(&s.read::<f32>(&dwb.data).wait().unwrap(), n, INPUTS, &mut got_dw);
            let got = (s.read::<f32>(&out).wait().unwrap(), got_dw);
            close(&got.0, &y, 1e-4);
            close(&got.1, &dw, 1e-4);
            assert_eq!(*first.get_or_insert(got.clone()), got);
            // The second image alone: its rows fall into other tiles.
            let alone = d.alloc(DType::F32, images[1].patches() * n);
            forward(&s, &px, &images[1..], &norm, &wb, &alone);
            assert_eq!(s.read::<f32>(&alone).wait().unwrap(), got.0[images[0].patches() * n..]);
            forward(&s, &px, &[], &norm, &wb, &alone);
        }
    }
}
