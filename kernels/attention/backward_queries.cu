// The gradient of attention's queries. With P = exp(S - lse), dP = dO V^T, D = rowsum(dO O) and dS = P (dP - D): dQ = scale dS K.
//
// A tile of 64 rows goes over its keys in ascending order, 64 at a time in two stages, and recomputes their scores; its sums stay
// in registers. It also leaves D, for the gradients of keys and values (backward_keys.cu).
//
// Dynamic shared memory: two stages of keys and values, 4 STEP HD elements.
#include "tiles.cuh"

constexpr int TILE = 16 * WARPS;
constexpr int STEP = 64;  // keys of a stage

template <int HD, class Keys>
__device__ __forceinline__ void query_tile(const Tile& tile, const Rows<const bf16>& q, const Keys& keys, float scale,
                                           const Rows<const bf16>& out, const Rows<const float>& lse, const Rows<const bf16>& dout,
                                           const Rows<bf16>& dq, const Rows<float>& delta) {
  constexpr int DEPTH = HD / 16;  // steps of 16 elements of a head
  DYNAMIC_SHARED(bf16, shared);
  auto k_stage = [&](int step) { return shared + step % 2 * 2 * STEP * HD; };
  auto v_stage = [&](int step) { return k_stage(step) + STEP * HD; };
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16, first = tile.first + warp_row;
  const int last = (tile.first + TILE < tile.end ? tile.first + TILE : tile.end) - 1;
  const int end = tile.visible(last), steps = (end + STEP - 1) / STEP;
  const int warp_end = first >= tile.end ? 0 : tile.visible(first + 15 < last ? first + 15 : last);
  auto load = [&](int step) {
    const int left = end - step * STEP, count = left < STEP ? (left + PAGE - 1) / PAGE * PAGE : STEP;
    load_keys<HD>(k_stage(step), keys.k, keys, step * STEP, count, end);
    load_keys<HD>(v_stage(step), keys.v, keys, step * STEP, count, end);
    cp_async_commit_group();
  };

  // The rows come through the second stage, which is needed later.
  load_rows<HD>(k_stage(1), q, tile.first, TILE, tile.end);
  load_rows<HD>(v_stage(1), dout, tile.first, TILE, tile.end);
  cp_async_commit_group();
  load(0);
  cp_async_wait_group<1>();
  __syncthreads();
  uint32_t a_q[DEPTH][4], a_d[DEPTH][4];
#pragma unroll
  for (int kk = 0; kk < DEPTH; kk++) {
    load_a<HD>(a_q[kk], k_stage(1), warp_row, kk);
    load_a<HD>(a_d[kk], v_stage(1), warp_row, kk);
  }

  float log_sum[2], d[2] = {0.0f, 0.0f};  // of this lane's rows: the log-sum-exp in powers of two, and D
  int visible[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = first + lane / 4 + h * 8;
    const bool there = row < tile.end;
    visible[h] = there ? tile.visible(row) : 0;
    log_sum[h] = there ? *lse.at(row, 1) * LOG2_E : 0.0f;
    const bf16* o = out.at(there ? row : tile.first, HD) + lane % 4 * 2;
#pragma unroll
    for (int kk = 0; kk < DEPTH; kk++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const uint32_t x = load4(o + kk * 16 + half * 8), y = a_d[kk][half * 2 + h];
        d[h] = fmaf(low_float(x), low_float(y), d[h]);
        d[h] = fmaf(high_float(x), high_float(y), d[h]);
      }
    d[h] = quad_sum(d[h]);
    if (there && lane % 4 == 0) *delta.at(row, 1) = d[h];
  }

  float sums[HD / 8][4] = {};
  for (int step = 0; step < steps; step++) {
    cp_async_wait_group<0>();
    __syncthreads();
    if (step + 1 < steps) load(step + 1);
#pragma unroll
    for (int page = 0; page < STEP / PAGE; page++) {
      const int key = step * STEP + page * PAGE;
      if (key >= warp_end) break;
      float s[PAGE / 8][4] = {}, dp[PAGE / 8][4] = {};
#pragma unroll
      for (int kk = 0; kk < DEPTH; kk++)
#pragma unroll
        for (int j = 0; j < PAGE / 8; j += 2) {
          uint32_t b[4];
          load_b<HD>(b, k_stage(step), page * PAGE + j * 8, kk);
          mma_16(s[j], s[j + 1], a_q[kk], b);
          load_b<HD>(b, v_stage(step), page * PAGE + j * 8, kk);
          mma_16(dp[j], dp[j + 1], a_d[kk], b);
        }
#pragma unroll
      for (int j = 0; j < PAGE / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int h = i / 2;
          const float p = ex2_approx(fmaf(s[j][i], scale * LOG2_E, -log_sum[h]));
          s[j][i] = key + j * 8 + lane % 4 * 2 + i % 2 < visible[h] ? p * (dp[j][i] - d[h]) : 0.0f;
        }
#pragma unroll
      for (int kk = 0; kk < PAGE / 16; kk++) {
        uint32_t a[4];
        to_a(a, s[kk * 2], s[kk * 2 + 1]);
#pragma unroll
        for (int np = 0; np < DEPTH; np++) {
          uint32_t b[4];
          load_b_trans<HD>(b, k_stage(step), page * PAGE + kk * 16, np);
          mma_16(sums[np * 2], sums[np * 2 + 1], a, b);
        }
      }
    }
  }

  if (first >= tile.end) return;
#pragma unroll
  for (int j = 0; j < HD / 8; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) sums[j][i] *= scale;
  // The stage before the last: all have gone past it, and nothing comes into it.
  store_rows<HD>(dq, first, tile.end, k_stage(steps) + warp_row * HD, sums);
}

// ---- kernels ----

template <int HD>
__device__ __forceinline__ void paged_queries(const bf16* q, int q_stride, const bf16* k, const bf16* v, const unsigned* cu_seqlens,
                                              const unsigned* kv_lens, const Tables& tables, int n,
                                              int group, float scale, const bf16* out, const float* lse, const bf16* dout, bf16* dq,
                                              float* delta) {
  Tile tile;
  if (!find_tile(tile, gridDim.x - 1 - blockIdx.x, TILE, cu_seqlens, kv_lens, n, group, true)) return;
  const int kv_heads = gridDim.y, head = blockIdx.y, heads = kv_heads * group;
  const PagedKeys<HD> keys = {k, v, tables.of(tile.segment), kv_heads, head};
  const size_t query = tile.query, row = query * heads + head * group, at = query * q_stride + head * group * HD;
  query_tile<HD>(tile, {q + at, q_stride, group}, keys, scale, {out + row * HD, heads * HD, group}, {lse + row, heads, group},
                 {dout + row * HD, heads * HD, group}, {dq + at, q_stride, group}, {delta + row, heads, group});
}

template <int HD>
__device__ __forceinline__ void varlen_queries(const bf16* qkv, const unsigned* cu_seqlens, int n, float scale, int causal,
                                               const bf16* out, const float* lse, const bf16* dout, bf16* dqkv, float* delta) {
  Tile tile;
  if (!find_tile(tile, gridDim.x - 1 - blockIdx.x, TILE, cu_seqlens, nullptr, n, 1, causal)) return;
  const int heads = gridDim.y, head = blockIdx.y, width = heads * HD;
  const size_t query = tile.query, row = query * heads + head, at = query * 3 * width + head * HD;
  const RowKeys keys = {qkv + at + width, qkv + at + 2 * width, 3 * width};
  query_tile<HD>(tile, {qkv + at, 3 * width, 1}, keys, scale, {out + row * HD, width, 1}, {lse + row, heads, 1},
                 {dout + row * HD, width, 1}, {dqkv + at, 3 * width, 1}, {delta + row, heads, 1});
}

// Causal, over pages. Tiles that see the most keys go first. Grid: floor(rows group / TILE) + n places of tiles, kv_heads.
#define PAGED_QUERIES(HD)                                                                                                  \
  GLOBAL void __launch_bounds__(THREADS, 2)                                                                                \
  attention_paged_backward_queries_##HD(const bf16* q,                 /* [rows, q_stride], the first group kv_heads HD */ \
                                        int q_stride,                                                                      \
                                        const bf16* k, const bf16* v,  /* [pages, kv_heads, PAGE, HD] */                   \
                                        const unsigned* cu_seqlens,    /* [n + 1]: where each segment's queries begin */   \
                                        const unsigned* kv_lens,       /* [n] */                                           \
                                        const unsigned* block_tables,  /* [_, table_stride] */                             \
                                        const unsigned* table_rows,    /* [n]: which row is each segment's */              \
                                        int table_stride, int n, int group, float scale,                                   \
                                        const bf16* out,               /* [rows, group kv_heads, HD] */                    \
                                        const float* lse,              /* [rows, group kv_heads] */                        \
                                        const bf16* dout,              /* [rows, group kv_heads, HD] */                    \
                                        bf16* dq,                      /* as q; other columns are left alone */            \
                                        float* delta) {                /* [rows, group kv_heads]: D */                     \
    paged_queries<HD>(q, q_stride, k, v, cu_seqlens, kv_lens, {block_tables, table_rows, table_stride}, n, group, scale,   \
                      out, lse, dout, dq, delta);                                                                          \
  }                                                                                                                        \
  KERNEL(attention_paged_backward_queries_##HD, THREADS)
PAGED_QUERIES(16);
PAGED_QUERIES(64);
PAGED_QUERIES(80);
PAGED_QUERIES(128);

// Within packed windows of rows. Grid: floor(rows / TILE) + n places of tiles, heads.
#define VARLEN_QUERIES(HD)                                                                                              \
  GLOBAL void __launch_bounds__(THREADS, 2)                                                                             \
  attention_varlen_backward_queries_##HD(const bf16* qkv,             /* [rows, 3, heads, HD] */                        \
                                         const unsigned* cu_seqlens,  /* [n + 1]: where each window's rows begin */     \
                                         int n, float scale, int causal,                                                \
                                         const bf16* out,             /* [rows, heads, HD] */                           \
                                         const float* lse,            /* [rows, heads] */                               \
                                         const bf16* dout,            /* [rows, heads, HD] */                           \
                                         bf16* dqkv,                  /* [rows, 3, heads, HD]: the first are written */ \
                                         float* delta) {              /* [rows, heads]: D */                            \
    varlen_queries<HD>(qkv, cu_seqlens, n, scale, causal, out, lse, dout, dqkv, delta);                                 \
  }                                                                                                                     \
  KERNEL(attention_varlen_backward_queries_##HD, THREADS)
VARLEN_QUERIES(16);
VARLEN_QUERIES(64);
VARLEN_QUERIES(80);
VARLEN_QUERIES(128);
