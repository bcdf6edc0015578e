//! What operations are fed with.

use varft::device::{Buffer, DType, Device};
use varft::ops::attention::Segments;
use varft::ops::kv_cache::{BLOCK, KvCache};

/// `n` floats between -1 and 1.
pub fn random(d: &Device, n: usize) -> Buffer {
    let mut x = 1u32;
    let values: Vec<f32> = (0..n)
        .map(|_| {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (x >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect();
    d.upload(&values)
}

/// `n` ids below `end`.
pub fn ids(n: usize, end: usize) -> Vec<u32> {
    (0..n as u32).map(|i| i.wrapping_mul(2_654_435_761) % end as u32).collect()
}

/// Where pieces of these lengths begin and end.
pub fn cu_seqlens(lens: impl IntoIterator<Item = usize>) -> Vec<u32> {
    let mut cu = vec![0];
    cu.extend(lens.into_iter().scan(0, |end, len| {
        *end += len as u32;
        Some(*end)
    }));
    cu
}

/// Segments of (queries, context), each with pages of its own; a cache of one layer that holds them; the queries' rows.
pub fn paged(d: &Device, lens: &[(usize, usize)], kv_heads: usize, head_dim: usize) -> (Segments, KvCache, usize) {
    let stride = lens.iter().map(|l| l.1.div_ceil(BLOCK)).max().unwrap_or(0);
    let cu = cu_seqlens(lens.iter().map(|l| l.0));
    let tables: Vec<u32> = (0..(lens.len() * stride) as u32).collect();
    let kv: Vec<u32> = lens.iter().map(|l| l.1 as u32).collect();
    let mut cache = KvCache::new(d, DType::F32, 1, lens.len() * stride, kv_heads, head_dim);
    let n = cache.layers[0].k.len();
    cache.layers[0].k = random(d, n);
    cache.layers[0].v = random(d, n);
    let segments = Segments {
        cu_seqlens_q: d.upload(&cu),
        kv_lens: d.upload(&kv),
        block_tables: d.upload(&tables),
        table_rows: d.upload(&(0..lens.len() as u32).collect::<Vec<_>>()),
        stride,
        n: lens.len(),
        rows: cu[lens.len()] as usize,
    };
    let rows = segments.rows;
    (segments, cache, rows)
}

/// Zeros, for sums and results.
pub fn zeros(d: &Device, n: usize) -> Buffer {
    d.zeros(DType::F32, n)
}
