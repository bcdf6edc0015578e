//! Blocks, threads and caches around the tile kernels: one driver for the forward and both backward products.
//!
//! All three are `C[rows, cols] = L R` with a sum of length `len`: `L` is copied once into groups of up to 12 rows,
//! `[group][len][rows of the group]`; `R` comes as panels `[panel][len][16]`. A work item is a block of row groups (in
//! the second-level cache) times one tile's width of panels; the sum is cut so that the panels' part stays
//! close too. Between cuts the exact accumulators are stored and loaded again: neither the cut nor the shape of the tiles
//! nor the thread that runs them can be seen in a result.

use super::kernel::{Finish, MAX_PANELS, MAX_ROWS, PANEL, Tile};
use super::transpose::{ABREAST, gather_abreast, gather_rows, transpose};
use crate::device::{Pool, SendPtr};
use crate::ops::simd::Isa;
use std::cell::Cell;

/// Steps of the sum per cut: two panels of it, 64 KiB, stay close while the rows of a block go by.
const CUT: usize = 512;
/// Floats of `L` that a work item walks over for each tile's width of panels: a third of the second-level cache.
const BLOCK: usize = 96 << 10;
/// Row groups per block, at most.
const BLOCK_GROUPS: usize = 16;
/// Floats of a copied operand held at a time.
pub(super) const SLAB: usize = 2 << 20;
/// Multiply-adds below which other threads are not worth waking.
const INLINE: usize = 1 << 16;
/// Multiply-adds that a work item should have at least: below, taking the next item would show.
const ITEM: usize = 1 << 16;

/// Where a product's rows come from.
#[derive(Clone, Copy)]
pub(super) enum Left {
    /// `[rows, stride]` row-major, of which the first `len` columns.
    Rows(*const f32, usize),
    /// `[len, stride]` row-major: a row of the product is a column of it.
    Columns(*const f32, usize),
}

/// Where a product goes.
#[derive(Clone, Copy)]
pub(super) enum Out {
    /// `[rows, stride]` row-major, of which the first `cols` columns. Accumulators start from what is there if
    /// `continues`, else from zero; `(acc + bias) + residual` is written, where null pointers add nothing.
    Rows { y: *mut f32, stride: usize, cols: usize, continues: bool, bias: *const f32, residual: *const f32 },
    /// `[panels][stride / 16][16]`, from whose values accumulators start.
    Panels { c: *mut f32, stride: usize },
}

/// A product's right operand and extents.
#[derive(Clone, Copy)]
pub(super) struct Product {
    pub rows: usize,
    pub len: usize,
    pub panels: usize,
    /// The first panel, `[len][16]`.
    pub right: *const f32,
    /// Floats from one panel to the next.
    pub stride: usize,
}
// SAFETY: the pointers are to operands that outlive the product and that nothing writes while it runs (the callers'
// contract); work items write disjoint parts of `Out`.
unsafe impl Sync for Product {}
// SAFETY: as above.
unsafe impl Sync for Out {}
// SAFETY: as above.
unsafe impl Sync for Left {}

thread_local! {
    static SCRATCH: [Cell<Vec<f32>>; 2] = const { [Cell::new(Vec::new()), Cell::new(Vec::new())] };
}

/// Calls `f` with scratch memory that this thread keeps: at least `len` floats with any values, 64-byte aligned.
/// `which` tells two apart that are in use at once.
pub(super) fn with_scratch<T>(which: usize, len: usize, f: impl FnOnce(*mut f32) -> T) -> T {
    SCRATCH.with(|s| {
        let mut v = s[which].take();
        if v.len() < len + PANEL {
            v = vec![0.0; (len + PANEL).next_power_of_two()];
        }
        let offset = v.as_ptr().align_offset(64);
        // SAFETY: 16 floats more than `len` were allocated, and aligning takes at most 15.
        let out = f(unsafe { v.as_mut_ptr().add(offset) });
        s[which].set(v);
        out
    })
}

/// Runs `items` of `f`, on the pool if `work` multiply-adds (or moves) are worth it.
pub(super) fn spread(pool: &Pool, work: usize, items: usize, f: impl Fn(usize) + Sync) {
    if work < INLINE { (0..items).for_each(f) } else { pool.run(items, f) }
}

/// Row groups of nearly equal height: `n` rows in `ceil(n / max)` groups.
#[derive(Clone, Copy)]
struct Groups {
    rows: usize,
    count: usize,
}

impl Groups {
    fn new(rows: usize, max: usize) -> Groups {
        Groups { rows, count: rows.div_ceil(max) }
    }
    fn start(self, group: usize) -> usize {
        group * self.rows / self.count
    }
}

/// Computes `out = left * right` on `pool`.
///
/// # Safety
/// All pointers are valid over the extents that the types describe until this returns, `out` overlaps no input except
/// that a residual may be `y` itself, and nothing else writes any of them meanwhile.
pub(super) unsafe fn multiply(pool: &Pool, isa: Isa, left: Left, product: &Product, out: Out) {
    let slab = (SLAB / product.len).max(4 * isa.max_rows());
    let mut start = 0;
    while start < product.rows {
        let rows = slab.min(product.rows - start);
        let part = Product { rows, ..*product };
        // SAFETY: rows `start..start + rows` of operands that the caller vouches for.
        let (left, out) = unsafe {
            let left = match left {
                Left::Rows(x, stride) => Left::Rows(x.add(start * stride), stride),
                Left::Columns(x, stride) => Left::Columns(x.add(start), stride),
            };
            let out = match out {
                Out::Rows { y, stride, cols, continues, bias, residual } => {
                    let residual = if residual.is_null() { residual } else { residual.add(start * stride) };
                    Out::Rows { y: y.add(start * stride), stride, cols, continues, bias, residual }
                }
                Out::Panels { c, stride } => Out::Panels { c: c.add(start * PANEL), stride },
            };
            (left, out)
        };
        let groups = Groups::new(rows, isa.max_rows());
        match left {
            // One row is in the kernels' order as it is.
            // SAFETY: as above.
            Left::Rows(x, _) if rows == 1 => unsafe { tiles(pool, isa, x, groups, &part, out) },
            _ => with_scratch(0, rows * product.len, |packed| {
                // SAFETY: as above; `packed` holds `rows * len` floats.
                unsafe {
                    pack_left(pool, left, groups, product.len, packed);
                    tiles(pool, isa, packed, groups, &part, out);
                }
            }),
        }
        start += rows;
    }
}

/// # Safety
/// As [`multiply`]; `packed` holds `rows * len` floats.
unsafe fn pack_left(pool: &Pool, left: Left, groups: Groups, len: usize, packed: *mut f32) {
    let packed = SendPtr(packed);
    let extent = |g: usize| (groups.start(g), groups.start(g + 1) - groups.start(g));
    let (x, stride) = match left {
        Left::Rows(x, stride) | Left::Columns(x, stride) => (SendPtr(x.cast_mut()), stride),
    };
    // SAFETY: each group reads its own rows of `left` and writes its own part of `packed`.
    match left {
        Left::Rows(..) => spread(pool, groups.rows * len, groups.count, |g| unsafe {
            let (start, rows) = extent(g);
            transpose(x.get().add(start * stride), stride, rows, len, packed.get().add(start * len), rows);
        }),
        Left::Columns(..) => spread(pool, groups.rows * len, groups.count.div_ceil(ABREAST), |item| unsafe {
            let groups = item * ABREAST..groups.count.min((item + 1) * ABREAST);
            gather_abreast(len, groups, |g, t, steps| {
                let (start, rows) = extent(g);
                gather_rows(
                    x.get().add(start + t * stride),
                    stride,
                    steps,
                    rows,
                    packed.get().add(start * len + t * rows),
                );
            });
        }),
    }
}

/// # Safety
/// As [`multiply`]; `packed` is `left` in the order of [`pack_left`].
unsafe fn tiles(pool: &Pool, isa: Isa, packed: *const f32, groups: Groups, product: &Product, out: Out) {
    let tallest = groups.rows.div_ceil(groups.count);
    let (len, out) = (product.len, &out);
    let per_block = (BLOCK / (len * tallest)).clamp(4, BLOCK_GROUPS).min(groups.count);
    let blocks = groups.count.div_ceil(per_block);
    let width = isa.panels(tallest);
    let widths_per_item = (ITEM / (len * width * PANEL * tallest * per_block)).max(1);
    let columns = product.panels.div_ceil(width * widths_per_item);
    let packed = SendPtr(packed.cast_mut());
    let product = &product;
    spread(pool, groups.rows * len * product.panels * PANEL, blocks * columns, |item| {
        let (block, column) = (item / columns, item % columns);
        let first = block * per_block;
        let last = (first + per_block).min(groups.count);
        for i in column * widths_per_item..(column + 1) * widths_per_item {
            let panel = i * width;
            if panel >= product.panels {
                break;
            }
            // SAFETY: each item writes its own rows and panels of `out`.
            unsafe {
                block_of_tiles(
                    isa,
                    packed.get(),
                    groups,
                    first..last,
                    product,
                    panel,
                    width.min(product.panels - panel),
                    *out,
                );
            }
        }
    });
}

/// The tiles of some row groups and of up to one tile's width of panels.
///
/// # Safety
/// As [`tiles`]; `groups_here` has at most [`BLOCK_GROUPS`] groups and `width` is at most `isa.panels(tallest group)`.
unsafe fn block_of_tiles(
    isa: Isa,
    packed: *const f32,
    groups: Groups,
    groups_here: std::ops::Range<usize>,
    product: &Product,
    panel: usize,
    width: usize,
    out: Out,
) {
    // Accumulators of a block between two cuts: rows of `width` panels.
    let mut spill = std::mem::MaybeUninit::<[f32; BLOCK_GROUPS * MAX_ROWS * 2 * PANEL]>::uninit();
    const { assert!(BLOCK_GROUPS * MAX_ROWS * 2 >= MAX_ROWS * MAX_PANELS) };
    let spill = spill.as_mut_ptr().cast::<f32>();
    let len = product.len;
    let cut = if groups_here.len() == 1 { len } else { CUT };
    let base = groups.start(groups_here.start);
    for from in (0..len).step_by(cut) {
        let steps = cut.min(len - from);
        for g in groups_here.clone() {
            let (row, rows) = (groups.start(g), groups.start(g + 1) - groups.start(g));
            // SAFETY: group `g` lies at `row * len` in `packed` and at `row - base` in the spill; the panels
            // `panel..panel + width` exist.
            unsafe {
                let (c, c_row, c_panel, load) = match out {
                    Out::Rows { y, stride, cols, continues, .. } => {
                        let c = spill.add((row - base) * width * PANEL);
                        if continues && from == 0 {
                            let column = panel * PANEL;
                            let valid = (width * PANEL).min(cols - column);
                            for r in 0..rows {
                                let c = c.add(r * width * PANEL);
                                c.copy_from_nonoverlapping(y.add((row + r) * stride + column), valid);
                                (valid..width * PANEL).for_each(|j| *c.add(j) = 0.0);
                            }
                        }
                        (c, width * PANEL, PANEL, continues || from > 0)
                    }
                    Out::Panels { c, stride } => (c.add(panel * stride + row * PANEL), PANEL, stride, true),
                };
                let mut p = 0;
                while p < width {
                    // A width that is no power of two, at the right edge, is done in such steps.
                    let now = 1 << (width - p).ilog2();
                    isa.kernel(rows, now)(&Tile {
                        x: packed.add(row * len + from * rows),
                        w: product.right.add((panel + p) * product.stride + from * PANEL),
                        w_panel: product.stride,
                        len: steps,
                        c: c.add(p * c_panel),
                        c_row,
                        c_panel,
                        load,
                    });
                    p += now;
                }
                if from + steps == len
                    && let Out::Rows { y, stride, cols, bias, residual, .. } = out
                {
                    let column = panel * PANEL;
                    let at = row * stride + column;
                    isa.finish(&Finish {
                        acc: c,
                        width: width * PANEL,
                        rows,
                        cols: (width * PANEL).min(cols - column),
                        y: y.add(at),
                        stride,
                        bias: if bias.is_null() { bias } else { bias.add(column) },
                        residual: if residual.is_null() { residual } else { residual.add(at) },
                    });
                }
            }
        }
    }
}
