// The gradients of attention's keys and values. With P = exp(S - lse), dP = dO V^T and dS = P (dP - D): dV = P^T dO,
// dK = scale dS^T Q. D comes from backward_queries.cu, which runs before.
//
// A block owns 64 keys of one KV head, 16 a warp, and goes over all rows that see them in ascending order, 32 at a time in two
// stages; its sums stay in registers. Pages that segments share belong to the first of them, whose block goes over the rows
// of all: each gradient has one owner and one order of additions.
//
// Dynamic shared memory: keys and values, and two stages of queries and output gradients, (2 KEYS + 4 ROWS) HD elements.
#include "tiles.cuh"

constexpr int KEYS = 16 * WARPS, ROWS = 32, TILE_PAGES = KEYS / PAGE;

// A segment's rows, from the first that sees a key of the tile on.
struct Span {
  int segment;
  unsigned pages;             // which pages of the tile are the segment's too, a bit each
  int query, queries, keys;   // as in Tile
  int row, end;               // the next row, and where they end
};

// What rows are made of.
struct RowSide {
  const bf16* q;      // of the first of the KV head's query heads, row 0
  const bf16* dout;   // likewise
  const float *lse, *delta;
  int q_stride, heads, group;
  const unsigned *cu_seqlens, *kv_lens;  // kv_lens null: a segment's keys are its queries
  bool causal;

  // Sets a span to what its segment's rows see of the keys from first_key on; false where that is nothing.
  __device__ __forceinline__ bool open(Span& span, int first_key) const {
    span.query = cu_seqlens[span.segment];
    span.queries = cu_seqlens[span.segment + 1] - span.query;
    span.keys = kv_lens ? kv_lens[span.segment] : span.queries;
    const int hidden = causal ? first_key - (span.keys - span.queries) : 0;
    span.row = hidden > 0 ? hidden * group : 0;
    span.end = span.queries * group;
    return span.row < span.end;
  }
};

// `next(span)`: the next segment, from span.segment on, that has pages of the tile. `write(key, column, dk, dv)`: two elements.
template <int HD, class Keys, class Next, class Write>
__device__ __forceinline__ void key_tile(const Keys& keys, int first_key, int count, int end, const RowSide& side, float scale,
                                         const Next& next, const Write& write) {
  constexpr int DEPTH = HD / 16;  // steps of 16 elements of a head
  DYNAMIC_SHARED(bf16, shared);
  SHARED(float, log_sums, [2][ROWS]);
  SHARED(float, deltas, [2][ROWS]);
  SHARED(int, visible, [2][ROWS]);
  bf16 *k_tile = shared, *v_tile = shared + KEYS * HD;
  auto q_stage = [&](int stage) { return shared + (2 * KEYS + stage * 2 * ROWS) * HD; };
  auto d_stage = [&](int stage) { return q_stage(stage) + ROWS * HD; };
  const int lane = threadIdx.x % 32, warp_key = threadIdx.x / 32 * 16;

  auto load = [&](const Span& span, int stage) {
    const size_t query = span.query;
    load_rows<HD>(q_stage(stage), {side.q + query * side.q_stride, side.q_stride, side.group}, span.row, ROWS, span.end);
    load_rows<HD>(d_stage(stage), {side.dout + query * side.heads * HD, side.heads * HD, side.group}, span.row, ROWS, span.end);
    if (threadIdx.x < ROWS) {
      const int row = span.row + threadIdx.x;
      const bool there = row < span.end;
      const size_t at = (query + row / side.group) * side.heads + row % side.group;
      log_sums[stage][threadIdx.x] = there ? side.lse[at] * LOG2_E : 0.0f;
      deltas[stage][threadIdx.x] = there ? side.delta[at] : 0.0f;
      const int seen = side.causal ? span.keys - span.queries + row / side.group + 1 : span.keys;
      visible[stage][threadIdx.x] = there ? seen - first_key : 0;
    }
    cp_async_commit_group();
  };
  // The first rows, or the ones after these; false where there are none.
  auto find = [&](Span& span) {
    while (next(span)) {
      if (side.open(span, first_key)) return true;
      span.segment++;
    }
    return false;
  };
  auto advance = [&](Span& span) {
    span.row += ROWS;
    if (span.row < span.end) return true;
    span.segment++;
    return find(span);
  };

  Span coming = {};
  bool more = find(coming);
  if (more) {
    load_keys<HD>(k_tile, keys.k, keys, first_key, count, end);
    load_keys<HD>(v_tile, keys.v, keys, first_key, count, end);
    load(coming, 0);
  }
  float dk[HD / 8][4] = {}, dv[HD / 8][4] = {};
  for (int stage = 0; more; stage ^= 1) {
    const unsigned pages = coming.pages;
    const int last = (coming.row + ROWS < coming.end ? coming.row + ROWS : coming.end) - 1;
    const int most = side.causal ? coming.keys - coming.queries + last / side.group + 1 : coming.keys;
    more = advance(coming);
    cp_async_wait_group<0>();
    __syncthreads();
    if (more) load(coming, stage ^ 1);
    if (!(pages >> warp_key / PAGE & 1) || most <= first_key + warp_key) continue;

    // Transposed: keys are the rows of these, queries the columns.
    float s[ROWS / 8][4] = {}, dp[ROWS / 8][4] = {};
#pragma unroll
    for (int kk = 0; kk < DEPTH; kk++) {
      uint32_t a_k[4], a_v[4];
      load_a<HD>(a_k, k_tile, warp_key, kk);
      load_a<HD>(a_v, v_tile, warp_key, kk);
#pragma unroll
      for (int j = 0; j < ROWS / 8; j += 2) {
        uint32_t b[4];
        load_b<HD>(b, q_stage(stage), j * 8, kk);
        mma_16(s[j], s[j + 1], a_k, b);
        load_b<HD>(b, d_stage(stage), j * 8, kk);
        mma_16(dp[j], dp[j + 1], a_v, b);
      }
    }
#pragma unroll
    for (int j = 0; j < ROWS / 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = j * 8 + lane % 4 * 2 + i % 2, key = warp_key + lane / 4 + i / 2 * 8;
        // Slots of a page that the segment has not filled may hold anything: what is hidden is set, not multiplied, to zero.
        const bool seen = key < visible[stage][row];
        const float p = ex2_approx(fmaf(s[j][i], scale * LOG2_E, -log_sums[stage][row]));
        s[j][i] = seen ? p : 0.0f;
        dp[j][i] = seen ? p * (dp[j][i] - deltas[stage][row]) : 0.0f;
      }
#pragma unroll
    for (int kk = 0; kk < ROWS / 16; kk++) {
      uint32_t a_p[4], a_ds[4];
      to_a(a_p, s[kk * 2], s[kk * 2 + 1]);
      to_a(a_ds, dp[kk * 2], dp[kk * 2 + 1]);
#pragma unroll
      for (int np = 0; np < DEPTH; np++) {
        uint32_t b[4];
        load_b_trans<HD>(b, d_stage(stage), kk * 16, np);
        mma_16(dv[np * 2], dv[np * 2 + 1], a_p, b);
        load_b_trans<HD>(b, q_stage(stage), kk * 16, np);
        mma_16(dk[np * 2], dk[np * 2 + 1], a_ds, b);
      }
    }
  }

#pragma unroll
  for (int h = 0; h < 2; h++)
#pragma unroll
    for (int j = 0; j < HD / 8; j++) {
      const float k_pair[2] = {dk[j][2 * h] * scale, dk[j][2 * h + 1] * scale}, v_pair[2] = {dv[j][2 * h], dv[j][2 * h + 1]};
      write(first_key + warp_key + lane / 4 + h * 8, j * 8 + lane % 4 * 2, k_pair, v_pair);
    }
}

// ---- kernels ----

// Which segments have the pages of a tile.
struct Sharing {
  const unsigned* kv_lens;
  const Tables& tables;
  int n;
  int place;                    // of the tile's first page in its segment
  unsigned page[TILE_PAGES];
  unsigned owned;               // which pages the block owns, a bit each

  __device__ __forceinline__ unsigned shared(int segment) const {
    const int pages = (kv_lens[segment] + PAGE - 1) / PAGE;
    unsigned mask = 0;
#pragma unroll
    for (int i = 0; i < TILE_PAGES; i++)
      if (place + i < pages && tables.of(segment)[place + i] == page[i]) mask |= 1u << i;
    return mask & owned;
  }

  // Takes the segment's pages that no segment before it has.
  __device__ __forceinline__ void own(int segment) {
    const int pages = (kv_lens[segment] + PAGE - 1) / PAGE;
    owned = 0;
#pragma unroll
    for (int i = 0; i < TILE_PAGES; i++) {
      page[i] = place + i < pages ? tables.of(segment)[place + i] : 0;
      if (place + i < pages) owned |= 1u << i;
    }
    for (int first = 0; first < segment; first += 32) {
      const int other = first + threadIdx.x % 32;
      const unsigned taken = other < segment ? shared(other) : 0;
#pragma unroll
      for (int i = 0; i < TILE_PAGES; i++)
        if (__any_sync(~0u, taken >> i & 1)) owned &= ~(1u << i);
    }
  }

  __device__ __forceinline__ bool next(Span& span) const {
    for (int first = span.segment; first < n; first += 32) {
      const int segment = first + threadIdx.x % 32;
      const unsigned mask = segment < n ? shared(segment) : 0, votes = __ballot_sync(~0u, mask != 0);
      if (!votes) continue;
      const int lane = __ffs(votes) - 1;
      span.segment = first + lane;
      span.pages = __shfl_sync(~0u, mask, lane);
      return true;
    }
    return false;
  }
};

template <int HD>
__device__ __forceinline__ void paged_keys(const bf16* q, int q_stride, const bf16* k, const bf16* v, const unsigned* cu_seqlens,
                                           const unsigned* kv_lens, const Tables& tables, int n, int group,
                                           float scale, const float* lse, const bf16* dout, const float* delta, float* dk, float* dv) {
  const int tiles = (tables.stride + TILE_PAGES - 1) / TILE_PAGES, segment = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int kv_heads = gridDim.y, head = blockIdx.y, heads = kv_heads * group, kv_len = kv_lens[segment];
  if (tile * KEYS >= kv_len) return;
  Sharing sharing = {kv_lens, tables, n, tile * TILE_PAGES, {}, 0};
  sharing.own(segment);
  if (!sharing.owned) return;
  const PagedKeys<HD> keys = {k, v, tables.of(segment), kv_heads, head};
  const int pages = (kv_len + PAGE - 1) / PAGE - tile * TILE_PAGES, count = pages < TILE_PAGES ? pages * PAGE : KEYS;
  const RowSide side = {q + head * group * HD,  dout + head * group * HD, lse + head * group, delta + head * group, q_stride, heads,
                        group, cu_seqlens, kv_lens, true};
  auto write = [&](int key, int column, const float(&k_pair)[2], const float(&v_pair)[2]) {
    if (!(sharing.owned >> (key - tile * KEYS) / PAGE & 1)) return;
    const size_t at = keys.at(key) + column;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      dk[at + i] += k_pair[i];
      dv[at + i] += v_pair[i];
    }
  };
  key_tile<HD>(keys, tile * KEYS, count, tile * KEYS + count, side, scale, [&](Span& span) { return sharing.next(span); }, write);
}

template <int HD>
__device__ __forceinline__ void varlen_keys(const bf16* qkv, const unsigned* cu_seqlens, int n, float scale, int causal,
                                            const float* lse, const bf16* dout, const float* delta, bf16* dqkv) {
  Tile tile;
  if (!find_tile(tile, blockIdx.x, KEYS, cu_seqlens, nullptr, n, 1, causal)) return;
  const int heads = gridDim.y, head = blockIdx.y, width = heads * HD;
  const size_t at = static_cast<size_t>(tile.query) * 3 * width + head * HD;
  const RowKeys keys = {qkv + at + width, qkv + at + 2 * width, 3 * width};
  const RowSide side = {qkv + head * HD, dout + head * HD, lse + head, delta + head, 3 * width, heads, 1, cu_seqlens, nullptr, causal != 0};
  bool found = false;
  auto next = [&](Span& span) {
    if (found) return false;
    found = true;
    span.segment = tile.segment;
    span.pages = ~0u;
    return true;
  };
  auto write = [&](int key, int column, const float(&k_pair)[2], const float(&v_pair)[2]) {
    if (key >= tile.end) return;
    bf16* to = dqkv + at + static_cast<size_t>(key) * 3 * width + width + column;
    store4(to, cvt_bf16x2(k_pair[0], k_pair[1]));
    store4(to + width, cvt_bf16x2(v_pair[0], v_pair[1]));
  };
  key_tile<HD>(keys, tile.first, KEYS, tile.end, side, scale, next, write);
}

// Causal, over pages. Grid: n ceil(table_stride / TILE_PAGES), kv_heads.
#define PAGED_KEYS(HD)                                                                                                  \
  GLOBAL void __launch_bounds__(THREADS, 2)                                                                             \
  attention_paged_backward_keys_##HD(const bf16* q,                 /* [rows, q_stride], the first group kv_heads HD */ \
                                     int q_stride,                                                                      \
                                     const bf16* k, const bf16* v,  /* [pages, kv_heads, PAGE, HD] */                   \
                                     const unsigned* cu_seqlens,    /* [n + 1]: where each segment's queries begin */   \
                                     const unsigned* kv_lens,       /* [n] */                                           \
                                     const unsigned* block_tables,  /* [_, table_stride] */                             \
                                     const unsigned* table_rows,    /* [n]: which row is each segment's */              \
                                     int table_stride, int n, int group, float scale,                                   \
                                     const float* lse,              /* [rows, group kv_heads] */                        \
                                     const bf16* dout,              /* [rows, group kv_heads, HD] */                    \
                                     const float* delta,            /* [rows, group kv_heads]: D */                     \
                                     float* dk, float* dv) {        /* as k and v; added to */                          \
    paged_keys<HD>(q, q_stride, k, v, cu_seqlens, kv_lens, {block_tables, table_rows, table_stride}, n, group, scale,   \
                   lse, dout, delta, dk, dv);                                                                           \
  }                                                                                                                     \
  KERNEL(attention_paged_backward_keys_##HD, THREADS)
PAGED_KEYS(16);
PAGED_KEYS(64);
PAGED_KEYS(80);
PAGED_KEYS(128);

// Within packed windows of rows. Grid: floor(rows / KEYS) + n places of tiles, heads.
#define VARLEN_KEYS(HD)                                                                                                      \
  GLOBAL void __launch_bounds__(THREADS, 2)                                                                                  \
  attention_varlen_backward_keys_##HD(const bf16* qkv,             /* [rows, 3, heads, HD] */                                \
                                      const unsigned* cu_seqlens,  /* [n + 1]: where each window's rows begin */             \
                                      int n, float scale, int causal,                                                        \
                                      const float* lse,            /* [rows, heads] */                                       \
                                      const bf16* dout,            /* [rows, heads, HD] */                                   \
                                      const float* delta,          /* [rows, heads]: D */                                    \
                                      bf16* dqkv) {                /* [rows, 3, heads, HD]: all but the first are written */ \
    varlen_keys<HD>(qkv, cu_seqlens, n, scale, causal, lse, dout, delta, dqkv);                                              \
  }                                                                                                                          \
  KERNEL(attention_varlen_backward_keys_##HD, THREADS)
VARLEN_KEYS(16);
VARLEN_KEYS(64);
VARLEN_KEYS(80);
VARLEN_KEYS(128);
