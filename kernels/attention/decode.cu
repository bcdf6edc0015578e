// Attention of few rows a segment: decoding. The same numbers as forward.cu, to the bit, shared out otherwise.
//
// A tile has 16 rows: the query heads of a KV head, for one query or a few. Of each cut a warp takes one page of scores and every
// fourth sixteen columns of the values; powers pass through shared memory. The sums that lanes and products make are those of
// forward.cu, in the same order. Where tiles are few the cuts of one are spread over blocks, each leaves its parts in memory, and
// attention_decode_combine adds them up as one block would have done.
//
// Dynamic shared memory: a cut's keys and values, and the rows, (2 KV_CUT + TILE) HD elements.
#include "softmax.cuh"

constexpr int TILE = 16;
static_assert(KV_CUT / PAGE == WARPS, "a warp takes a page of each cut");

// Results of cuts, for rows of all heads: of a row's cut its sums over values [HD], its maximum, and its sum of powers.
struct Parts {
  float* values;  // [rows, cuts, HD], or null: the block has all cuts
  float* sums;    // [rows, cuts, 2]
  int cuts;
};

// `row`: of the tile's first query and head, of all in the batch; `heads`: rows of a query.
template <int HD>
__device__ __forceinline__ void decode_tile(const Tile& tile, const Rows<const bf16>& q, const PagedKeys<HD>& keys, float scale,
                                            const Rows<bf16>& out, const Rows<float>& lse, const Parts& parts, size_t row, int heads) {
  constexpr int DEPTH = HD / 16, STEPS = (DEPTH + WARPS - 1) / WARPS;  // of 16 columns, this warp's
  DYNAMIC_SHARED(bf16, shared);
  SHARED(bf16x8, powers, [TILE * KV_CUT / 8]);  // [TILE, KV_CUT]
  SHARED(float, maxima, [WARPS][TILE]);
  SHARED(float, sums, [WARPS][32][2]);
  bf16 *k_tile = shared, *v_tile = shared + KV_CUT * HD, *q_tile = shared + 2 * KV_CUT * HD, *p_tile = powers[0].at;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int rows[2] = {tile.first + lane / 4, tile.first + lane / 4 + 8};
  const int end = tile.visible((tile.first + TILE < tile.end ? tile.first + TILE : tile.end) - 1);
  // This block's share of the cuts.
  const int cuts = (end + KV_CUT - 1) / KV_CUT, share = (cuts + gridDim.z - 1) / gridDim.z, first_cut = blockIdx.z * share;
  const int end_cut = first_cut + share < cuts ? first_cut + share : cuts;
  if (first_cut >= end_cut) return;
  auto pages = [&](int cut) {
    const int n = end - cut * KV_CUT;
    return n < KV_CUT ? (n + PAGE - 1) / PAGE : KV_CUT / PAGE;
  };
  scale *= LOG2_E;

  uint32_t a_q[DEPTH][4];
  load_rows<HD>(q_tile, q, tile.first, TILE, tile.end);
  load_keys<HD>(k_tile, keys.k, keys, first_cut * KV_CUT, pages(first_cut) * PAGE, end);
  cp_async_commit_group();
  load_keys<HD>(v_tile, keys.v, keys, first_cut * KV_CUT, pages(first_cut) * PAGE, end);
  cp_async_commit_group();
  cp_async_wait_group<1>();
  __syncthreads();
#pragma unroll
  for (int kk = 0; kk < DEPTH; kk++) load_a<HD>(a_q[kk], q_tile, 0, kk);

  RowSum total[2] = {{-INFINITY, 0.0f}, {-INFINITY, 0.0f}};
  float o[STEPS][2][4] = {};
  for (int cut = first_cut; cut < end_cut; cut++) {
    const int live = pages(cut);
    if (cut > first_cut) {
      cp_async_wait_group<0>();
      __syncthreads();
      load_keys<HD>(v_tile, keys.v, keys, cut * KV_CUT, live * PAGE, end);
      cp_async_commit_group();
    }

    float s[PAGE / 8][4] = {}, max[2] = {-INFINITY, -INFINITY};
    if (warp < live) {
#pragma unroll
      for (int kk = 0; kk < DEPTH; kk++)
#pragma unroll
        for (int j = 0; j < PAGE / 8; j += 2) {
          uint32_t b[4];
          load_b<HD>(b, k_tile, warp * PAGE + j * 8, kk);
          mma_16(s[j], s[j + 1], a_q[kk], b);
        }
      const int visible[2] = {tile.visible(rows[0]) - cut * KV_CUT, tile.visible(rows[1]) - cut * KV_CUT};
      if (visible[0] < KV_CUT || visible[1] < KV_CUT) hide(s, warp * PAGE, visible);
      lane_max(max, s);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      max[h] = quad_max(max[h]);
      if (lane % 4 == 0) maxima[warp][lane / 4 + h * 8] = max[h];
    }
    __syncthreads();
    if (cut + 1 < end_cut) load_keys<HD>(k_tile, keys.k, keys, (cut + 1) * KV_CUT, pages(cut + 1) * PAGE, end);
    cp_async_commit_group();

    RowSum one[2];
    float offset[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      max[h] = -INFINITY;
#pragma unroll
      for (int w = 0; w < WARPS; w++) max[h] = fmaxf(max[h], maxima[w][lane / 4 + h * 8]);
      one[h] = {max[h] * scale, 0.0f};
      offset[h] = offset_of(one[h].max);
    }
    if (warp < live) {
      float sum[2];
      page_powers(sum, s, scale, offset);
#pragma unroll
      for (int h = 0; h < 2; h++) {
        sums[warp][lane][h] = sum[h];
#pragma unroll
        for (int j = 0; j < PAGE / 8; j++)
          store4(chunk<KV_CUT>(p_tile, lane / 4 + h * 8, warp * 4 + j) + lane % 4 * 2, cvt_bf16x2(s[j][2 * h], s[j][2 * h + 1]));
      }
    }
    cp_async_wait_group<1>();
    __syncthreads();

    float keep[2], take[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
      for (int w = 0; w < WARPS; w++)
        if (w < live) one[h].sum += sums[w][lane][h];
      one[h].sum = quad_sum(one[h].sum);
      if (!parts.values) combine(total[h], one[h], keep[h], take[h]);
    }
    float part[STEPS][2][4] = {};
#pragma unroll
    for (int kk = 0; kk < KV_CUT / 16; kk++) {
      if (kk * 16 >= live * PAGE) break;
      uint32_t a[4], b[4];
      load_a<KV_CUT>(a, p_tile, 0, kk);
#pragma unroll
      for (int i = 0; i < STEPS; i++) {
        if (i * WARPS + warp >= DEPTH) break;
        load_b_trans<HD>(b, v_tile, kk * 16, i * WARPS + warp);
        mma_16(part[i][0], part[i][1], a, b);
      }
    }
    if (!parts.values) {
#pragma unroll
      for (int i = 0; i < STEPS; i++)
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
          for (int e = 0; e < 4; e++) o[i][j][e] = combine(o[i][j][e], part[i][j][e], keep[e / 2], take[e / 2]);
      continue;
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if (rows[h] >= tile.end) continue;
      const size_t at = (row + static_cast<size_t>(rows[h] / tile.group) * heads + rows[h] % tile.group) * parts.cuts + cut;
#pragma unroll
      for (int i = 0; i < STEPS; i++)
#pragma unroll
        for (int j = 0; j < 2; j++)
          if (i * WARPS + warp < DEPTH) {
            float* to = parts.values + at * HD + (i * WARPS + warp) * 16 + j * 8 + lane % 4 * 2;
            to[0] = part[i][j][2 * h];
            to[1] = part[i][j][2 * h + 1];
          }
      if (warp == 0 && lane % 4 == 0) {
        parts.sums[at * 2] = one[h].max;
        parts.sums[at * 2 + 1] = one[h].sum;
      }
    }
  }

  if (parts.values) return;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    if (rows[h] >= tile.end) continue;
    const float inverse = 1.0f / total[h].sum;
#pragma unroll
    for (int i = 0; i < STEPS; i++)
#pragma unroll
      for (int j = 0; j < 2; j++)
        if (i * WARPS + warp < DEPTH)
          store4(out.at(rows[h], HD) + (i * WARPS + warp) * 16 + j * 8 + lane % 4 * 2,
                 cvt_bf16x2(normalise(o[i][j][2 * h], inverse), normalise(o[i][j][2 * h + 1], inverse)));
    if (lse.x && warp == 0 && lane % 4 == 0) *lse.at(rows[h], 1) = log_sum_exp(total[h]);
  }
}

// ---- kernels ----

template <int HD>
__device__ __forceinline__ void decode(const bf16* q, int q_stride, const bf16* k, const bf16* v, const unsigned* cu_seqlens,
                                       const unsigned* kv_lens, const Tables& tables, int n, int group,
                                       float scale, bf16* out, float* lse, const Parts& parts) {
  Tile tile;
  if (!find_tile(tile, blockIdx.x, TILE, cu_seqlens, kv_lens, n, group, true)) return;
  const int kv_heads = gridDim.y, head = blockIdx.y, heads = kv_heads * group;
  const PagedKeys<HD> keys = {k, v, tables.of(tile.segment), kv_heads, head};
  const size_t query = tile.query, row = query * heads + head * group;
  decode_tile<HD>(tile, {q + query * q_stride + head * group * HD, q_stride, group}, keys, scale, {out + row * HD, heads * HD, group},
                  {lse ? lse + row : nullptr, heads, group}, parts, row, heads);
}

// Grid: floor(rows group / TILE) + n places of tiles, kv_heads, blocks that share a tile's cuts.
#define DECODE(HD)                                                                                                           \
  GLOBAL void __launch_bounds__(THREADS, 3)                                                                                  \
  attention_decode_##HD(const bf16* q,                 /* [rows, q_stride], the first group kv_heads HD of them */           \
                        int q_stride,                                                                                        \
                        const bf16* k, const bf16* v,  /* [pages, kv_heads, PAGE, HD] */                                     \
                        const unsigned* cu_seqlens,    /* [n + 1]: where each segment's queries begin */                     \
                        const unsigned* kv_lens,       /* [n] */                                                             \
                        const unsigned* block_tables,  /* [_, table_stride] */                                               \
                        const unsigned* table_rows,    /* [n]: which row is each segment's */                                \
                        int table_stride, int n, int group, float scale,                                                     \
                        bf16* out,                     /* [rows, group kv_heads, HD] */                                      \
                        float* lse,                    /* [rows, group kv_heads] or null */                                  \
                        float* part_values,            /* [rows, group kv_heads, cuts, HD], or null with one block a tile */ \
                        float* part_sums,              /* [rows, group kv_heads, cuts, 2], likewise */                       \
                        int cuts) {                                                                                          \
    decode<HD>(q, q_stride, k, v, cu_seqlens, kv_lens, {block_tables, table_rows, table_stride}, n, group, scale,            \
               out, lse, {part_values, part_sums, cuts});                                                                    \
  }                                                                                                                          \
  KERNEL(attention_decode_##HD, THREADS)
DECODE(16);
DECODE(64);
DECODE(80);
DECODE(128);

// Adds up the parts of each row's cuts in ascending order. Grid: rows heads; a thread has a column. Rows of no segment are left.
GLOBAL void __launch_bounds__(THREADS)
attention_decode_combine(const float* part_values,    // [rows, heads, cuts, head_dim]
                         const float* part_sums,      // [rows, heads, cuts, 2]
                         const unsigned* cu_seqlens,  // [n + 1]
                         const unsigned* kv_lens,     // [n]
                         int n, int heads, int head_dim, int cuts,
                         bf16* out,                   // [rows, heads, head_dim]
                         float* lse) {                // [rows, heads] or null
  const int row = blockIdx.x / heads, column = threadIdx.x;
  if (row < static_cast<int>(cu_seqlens[0]) || row >= static_cast<int>(cu_seqlens[n])) return;
  const int s = last_start(n, row, [&](int i) { return static_cast<int>(cu_seqlens[i]); });
  const int visible = kv_lens[s] - cu_seqlens[s + 1] + row + 1;
  const float *values = part_values + static_cast<size_t>(blockIdx.x) * cuts * head_dim + column;
  const float* sums = part_sums + static_cast<size_t>(blockIdx.x) * cuts * 2;
  RowSum total = {-INFINITY, 0.0f};
  float o = 0.0f;
  for (int cut = 0; cut * KV_CUT < visible; cut++) {
    float keep, take;
    combine(total, {sums[cut * 2], sums[cut * 2 + 1]}, keep, take);
    if (column < head_dim) o = combine(o, values[static_cast<size_t>(cut) * head_dim], keep, take);
  }
  if (column < head_dim) out[static_cast<size_t>(blockIdx.x) * head_dim + column] = to_bf16(normalise(o, 1.0f / total.sum));
  if (lse && column == 0) lse[blockIdx.x] = log_sum_exp(total);
}
KERNEL(attention_decode_combine, THREADS);
