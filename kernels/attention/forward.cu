// Attention without a matrix of scores (Dao et al., arXiv 2205.14135): tiles of 64 rows, over pages and over packed rows.
//
// Keys are cut at multiples of KV_CUT. Each cut starts fresh, and cuts are combined in ascending order: a row's bits depend on
// the row and its keys alone. A warp has 16 rows. While it multiplies by a cut's keys the values are on their way, and the next
// cut's keys while it multiplies by the values. Dynamic shared memory: a cut's keys and values, and the rows, (2 KV_CUT + TILE) HD
// elements.
#include "softmax.cuh"

constexpr int TILE = 16 * WARPS;

// Grid: floor(rows / TILE) + segments places of tiles, KV heads.
template <int HD, class Keys>
__device__ __forceinline__ void forward_tile(const Tile& tile, const Rows<const bf16>& q, const Keys& keys, float scale,
                                             const Rows<bf16>& out, const Rows<float>& lse) {
  constexpr int DEPTH = HD / 16;              // steps of 16 elements of a head
  constexpr int COLUMNS = HD % 64 ? HD : 32;  // of the values, multiplied at a time
  DYNAMIC_SHARED(bf16, shared);
  bf16 *k_tile = shared, *v_tile = shared + KV_CUT * HD, *q_tile = shared + 2 * KV_CUT * HD;
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16, first = tile.first + warp_row;
  const int last = (tile.first + TILE < tile.end ? tile.first + TILE : tile.end) - 1;
  const int end = tile.visible(last);
  // What this warp's rows see, and this lane's two.
  const int warp_end = first >= tile.end ? 0 : tile.visible(first + 15 < last ? first + 15 : last);
  const int rows[2] = {first + lane / 4, first + lane / 4 + 8};
  auto pages = [&](int cut) {
    const int n = end - cut * KV_CUT;
    return n < KV_CUT ? (n + PAGE - 1) / PAGE : KV_CUT / PAGE;
  };
  scale *= LOG2_E;

  uint32_t a_q[DEPTH][4];
  load_rows<HD>(q_tile, q, tile.first, TILE, tile.end);
  load_keys<HD>(k_tile, keys.k, keys, 0, pages(0) * PAGE, end);
  cp_async_commit_group();
  load_keys<HD>(v_tile, keys.v, keys, 0, pages(0) * PAGE, end);
  cp_async_commit_group();
  cp_async_wait_group<1>();
  __syncthreads();
#pragma unroll
  for (int kk = 0; kk < DEPTH; kk++) load_a<HD>(a_q[kk], q_tile, warp_row, kk);

  RowSum total[2] = {{-INFINITY, 0.0f}, {-INFINITY, 0.0f}};
  float o[HD / 8][4] = {};
  for (int cut = 0; cut * KV_CUT < end; cut++) {
    if (cut > 0) {
      cp_async_wait_group<0>();
      __syncthreads();
      load_keys<HD>(v_tile, keys.v, keys, cut * KV_CUT, pages(cut) * PAGE, end);
      cp_async_commit_group();
    }

    // Keys of this cut that the warp's rows see, in whole pages as far as products go.
    const int seen = warp_end - cut * KV_CUT, warp_pages = seen <= 0 ? 0 : seen < KV_CUT ? (seen + PAGE - 1) / PAGE : KV_CUT / PAGE;
    uint32_t a_p[KV_CUT / 16][4];
    RowSum one[2] = {{-INFINITY, 0.0f}, {-INFINITY, 0.0f}};
    if (warp_pages > 0) {
      float s[KV_CUT / 8][4];
#pragma unroll
      for (int page = 0; page < KV_CUT / PAGE; page++) {
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
          for (int i = 0; i < 4; i++) s[page * 4 + j][i] = 0.0f;
        if (page >= warp_pages) continue;
#pragma unroll
        for (int kk = 0; kk < DEPTH; kk++)
#pragma unroll
          for (int j = 0; j < 4; j += 2) {
            uint32_t b[4];
            load_b<HD>(b, k_tile, page * PAGE + j * 8, kk);
            mma_16(s[page * 4 + j], s[page * 4 + j + 1], a_q[kk], b);
          }
      }
      const int visible[2] = {tile.visible(rows[0]) - cut * KV_CUT, tile.visible(rows[1]) - cut * KV_CUT};
      if (visible[0] < KV_CUT || visible[1] < KV_CUT) hide(s, 0, visible);
      float max[2] = {-INFINITY, -INFINITY}, offset[2];
      lane_max(max, s);
#pragma unroll
      for (int h = 0; h < 2; h++) {
        one[h].max = quad_max(max[h]) * scale;
        offset[h] = offset_of(one[h].max);
      }
#pragma unroll
      for (int page = 0; page < KV_CUT / PAGE; page++) {
        float sum[2];
        page_powers(sum, s + page * 4, scale, offset);
#pragma unroll
        for (int h = 0; h < 2; h++) one[h].sum += sum[h];
      }
#pragma unroll
      for (int h = 0; h < 2; h++) one[h].sum = quad_sum(one[h].sum);
#pragma unroll
      for (int i = 0; i < KV_CUT / 16; i++) to_a(a_p[i], s[2 * i], s[2 * i + 1]);
    }

    cp_async_wait_group<0>();
    __syncthreads();
    if ((cut + 1) * KV_CUT < end) load_keys<HD>(k_tile, keys.k, keys, (cut + 1) * KV_CUT, pages(cut + 1) * PAGE, end);
    cp_async_commit_group();
    if (warp_pages > 0) {
      float keep[2], take[2];
#pragma unroll
      for (int h = 0; h < 2; h++) combine(total[h], one[h], keep[h], take[h]);
#pragma unroll
      for (int column = 0; column < HD; column += COLUMNS) {
        float part[COLUMNS / 8][4] = {};
#pragma unroll
        for (int kk = 0; kk < KV_CUT / 16; kk++) {
          if (kk * 16 >= warp_pages * PAGE) break;
#pragma unroll
          for (int j = 0; j < COLUMNS / 8; j += 2) {
            uint32_t b[4];
            load_b_trans<HD>(b, v_tile, kk * 16, column / 16 + j / 2);
            mma_16(part[j], part[j + 1], a_p[kk], b);
          }
        }
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; j++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            float& x = o[column / 8 + j][i];
            x = combine(x, part[j][i], keep[i / 2], take[i / 2]);
          }
      }
    }
  }

  if (first >= tile.end) return;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const float inverse = 1.0f / total[h].sum;
#pragma unroll
    for (int j = 0; j < HD / 8; j++) {
      o[j][2 * h] = normalise(o[j][2 * h], inverse);
      o[j][2 * h + 1] = normalise(o[j][2 * h + 1], inverse);
    }
    if (lse.x && lane % 4 == 0 && rows[h] < tile.end) *lse.at(rows[h], 1) = log_sum_exp(total[h]);
  }
  store_rows<HD>(out, first, tile.end, q_tile + warp_row * HD, o);
}

// ---- kernels ----

template <int HD>
__device__ __forceinline__ void paged_forward(const bf16* q, int q_stride, const bf16* k, const bf16* v, const unsigned* cu_seqlens,
                                              const unsigned* kv_lens, const Tables& tables, int n,
                                              int group, float scale, bf16* out, float* lse) {
  Tile tile;
  if (!find_tile(tile, gridDim.x - 1 - blockIdx.x, TILE, cu_seqlens, kv_lens, n, group, true)) return;
  const int kv_heads = gridDim.y, head = blockIdx.y, heads = kv_heads * group;
  const PagedKeys<HD> keys = {k, v, tables.of(tile.segment), kv_heads, head};
  const size_t row = tile.query;
  forward_tile<HD>(tile, {q + row * q_stride + head * group * HD, q_stride, group}, keys, scale,
                   {out + (row * heads + head * group) * HD, heads * HD, group},
                   {lse ? lse + row * heads + head * group : nullptr, heads, group});
}

template <int HD>
__device__ __forceinline__ void varlen_forward(const bf16* qkv, const unsigned* cu_seqlens, int n, float scale, int causal, bf16* out,
                                               float* lse) {
  Tile tile;
  if (!find_tile(tile, gridDim.x - 1 - blockIdx.x, TILE, cu_seqlens, nullptr, n, 1, causal)) return;
  const int heads = gridDim.y, head = blockIdx.y, width = heads * HD;
  const size_t row = tile.query;
  const bf16* x = qkv + row * 3 * width + head * HD;
  const RowKeys keys = {x + width, x + 2 * width, 3 * width};
  forward_tile<HD>(tile, {x, 3 * width, 1}, keys, scale, {out + row * width + head * HD, width, 1},
                   {lse ? lse + row * heads + head : nullptr, heads, 1});
}

// Causal, over pages. Tiles that see the most keys go first. Grid: places of tiles, kv_heads.
#define PAGED_FORWARD(HD)                                                                                                  \
  GLOBAL void __launch_bounds__(THREADS, 2)                                                                                \
  attention_paged_forward_##HD(const bf16* q,                  /* [rows, q_stride], the first group kv_heads HD of them */ \
                               int q_stride,                                                                               \
                               const bf16* k, const bf16* v,   /* [pages, kv_heads, PAGE, HD] */                           \
                               const unsigned* cu_seqlens,     /* [n + 1]: where each segment's queries begin */           \
                               const unsigned* kv_lens,        /* [n] */                                                   \
                               const unsigned* block_tables,   /* [_, table_stride] */                                     \
                               const unsigned* table_rows,     /* [n]: which row is each segment's */                      \
                               int table_stride, int n, int group, float scale,                                            \
                               bf16* out,                      /* [rows, group kv_heads, HD] */                            \
                               float* lse) {                   /* [rows, group kv_heads] or null */                        \
    paged_forward<HD>(q, q_stride, k, v, cu_seqlens, kv_lens, {block_tables, table_rows, table_stride}, n, group, scale,   \
                      out, lse);                                                                                           \
  }                                                                                                                        \
  KERNEL(attention_paged_forward_##HD, THREADS)
PAGED_FORWARD(16);
PAGED_FORWARD(64);
PAGED_FORWARD(80);
PAGED_FORWARD(128);

// Within packed windows of rows. Grid: places of tiles, heads.
#define VARLEN_FORWARD(HD)                                                                                 \
  GLOBAL void __launch_bounds__(THREADS, 2)                                                                \
  attention_varlen_forward_##HD(const bf16* qkv,             /* [rows, 3, heads, HD] */                    \
                                const unsigned* cu_seqlens,  /* [n + 1]: where each window's rows begin */ \
                                int n, float scale, int causal,                                            \
                                bf16* out,                   /* [rows, heads, HD] */                       \
                                float* lse) {                /* [rows, heads] or null */                   \
    varlen_forward<HD>(qkv, cu_seqlens, n, scale, causal, out, lse);                                       \
  }                                                                                                        \
  KERNEL(attention_varlen_forward_##HD, THREADS)
VARLEN_FORWARD(16);
VARLEN_FORWARD(64);
VARLEN_FORWARD(80);
VARLEN_FORWARD(128);
