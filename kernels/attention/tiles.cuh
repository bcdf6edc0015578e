// What the attention kernels share: which rows a block has, where their keys are, tiles in shared memory, fragments.
//
// A row is a query of one query head. The query heads that share a KV head are rows of one tile, so that a key is read once
// for all of them: row r of a segment is head r % group of query r / group. Products are mma.m16n8k16 of bf16 with f32 sums.
#pragma once
#include "include/pages.cuh"
#include "include/ptx.cuh"

constexpr int THREADS = 128, WARPS = THREADS / 32;
constexpr int KV_CUT = 128;  // keys of a cut: where the sums over keys start fresh
constexpr int PAGE = BLOCK;  // tokens of a page
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

// ---- which rows ----

// The last of n ascending starts that is at most `index`; the first is. For whole warps, 32 probes at a time.
template <class Start>
__device__ __forceinline__ int last_start(int n, int index, const Start& start) {
  int first = 0;
  while (n > 1) {
    const int step = (n + 31) / 32, probe = threadIdx.x % 32 * step;
    const unsigned votes = __ballot_sync(~0u, probe < n && start(first + probe) <= index);
    const int last = (__popc(votes) - 1) * step;
    first += last;
    n = n - last < step ? n - last : step;
  }
  return first;
}

// A run of rows of one segment, in a tile of fixed height.
struct Tile {
  int segment;
  int query;    // the segment's first, of all in the batch
  int queries;  // of the segment
  int keys;     // of the segment
  int group;    // query heads of a KV head
  int first;    // the tile's first row in its segment
  int end;      // rows of the segment
  bool causal;

  // How many keys a row sees.
  __device__ __forceinline__ int visible(int row) const { return causal ? keys - queries + row / group + 1 : keys; }
};

// The tile that has place `index` of tiles of `height` rows. Segment s has places from floor(rows before it / height) + s: at
// least as many as it needs, so that the number of places depends on the numbers of rows and segments alone. False where the
// place is empty. `kv_lens` null: a segment's keys are its queries.
__device__ __forceinline__ bool find_tile(Tile& tile, int index, int height, const unsigned* cu_seqlens, const unsigned* kv_lens,
                                          int n, int group, bool causal) {
  const unsigned begin = cu_seqlens[0];
  auto place = [&](int s) { return static_cast<int>(cu_seqlens[s] - begin) * group / height + s; };
  const int s = last_start(n, index, place);
  tile.segment = s;
  tile.query = cu_seqlens[s];
  tile.queries = cu_seqlens[s + 1] - cu_seqlens[s];
  tile.keys = kv_lens ? kv_lens[s] : tile.queries;
  tile.group = group;
  tile.first = (index - place(s)) * height;
  tile.end = tile.queries * group;
  tile.causal = causal;
  return tile.first < tile.end;
}

// ---- where keys and values are ----

// One KV head of a segment in pages. `at`: where a key begins; within a page keys follow each other by `stride`.
template <int HD>
struct PagedKeys {
  static constexpr int stride = HD;
  const bf16 *k, *v;  // [pages, kv_heads, PAGE, HD]
  const unsigned* table;
  int kv_heads, head;
  __device__ __forceinline__ size_t at(int key) const {
    return in_pages(table[key / PAGE] * BLOCK + key % PAGE, head, kv_heads, HD);
  }
};

// Block tables, and which of their rows is each segment's.
struct Tables {
  const unsigned* block_tables;  // [_, stride]
  const unsigned* rows;          // [n]
  int stride;
  __device__ __forceinline__ const unsigned* of(int segment) const {
    return block_tables + static_cast<size_t>(rows[segment]) * stride;
  }
};

// In the rows of the queries, from the segment's first.
struct RowKeys {
  const bf16 *k, *v;
  int stride;
  __device__ __forceinline__ size_t at(int key) const { return static_cast<size_t>(key) * stride; }
};

// ---- tiles in shared memory: rows of HD elements in chunks of 16 bytes ----

// Chunk c of a row. Chunks change places so that the eight rows of an 8 x 8 matrix lie in different banks.
template <int HD>
__device__ __forceinline__ bf16* chunk(bf16* tile, int row, int c) {
  return tile + row * HD + (HD % 64 == 0 ? c ^ row % 8 : c ^ row / 4 % 2) * 8;
}

// Starts copies of `count` keys, whole pages, from a page's first on (or of values: `x` is which); zeros from `end` on.
template <int HD, class Keys>
__device__ __forceinline__ void load_keys(bf16* to, const bf16* x, const Keys& keys, int first, int count, int end) {
  constexpr int CHUNKS = HD / 8, TURNS = (PAGE * CHUNKS + THREADS - 1) / THREADS;
  for (int page = 0; page < count; page += PAGE) {
    const bf16* from = x + keys.at(first + page);
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
      const int i = turn * THREADS + threadIdx.x, row = i / CHUNKS, c = i % CHUNKS;
      if (i >= PAGE * CHUNKS) break;
      const bool there = first + page + row < end;
      cp_async<16>(chunk<HD>(to, page + row, c), there ? from + static_cast<size_t>(row) * keys.stride + c * 8 : x, there ? 16 : 0);
    }
  }
}

// Rows of one KV head's query heads; the pointer is at the segment's first query.
template <class T>
struct Rows {
  T* x;
  int stride, group;
  __device__ __forceinline__ T* at(int row, int head_dim) const {
    return x + static_cast<size_t>(row / group) * stride + row % group * head_dim;
  }
  // Whether rows lie so that 16 bytes can be moved at once.
  __device__ __forceinline__ bool aligned() const { return stride % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0; }
};

// Starts copies of `count` rows from `first` on; zeros from `end` on.
template <int HD>
__device__ __forceinline__ void load_rows(bf16* to, const Rows<const bf16>& rows, int first, int count, int end) {
  constexpr int CHUNKS = HD / 8;
  const bool aligned = rows.aligned();
  for (int i = threadIdx.x; i < count * CHUNKS; i += THREADS) {
    const int row = i / CHUNKS, c = i % CHUNKS;
    const bool there = first + row < end;
    bf16* at = chunk<HD>(to, row, c);
    const bf16* from = there ? rows.at(first + row, HD) + c * 8 : rows.x;
    if (aligned) {
      cp_async<16>(at, from, there ? 16 : 0);
    } else {
      for (int e = 0; e < 8; e++) at[e] = there ? from[e] : to_bf16(0.0f);
    }
  }
}

// A warp writes sums of 16 rows to memory, over 16 rows of shared memory that are its own.
template <int HD>
__device__ __forceinline__ void store_rows(const Rows<bf16>& rows, int first, int end, bf16* staging, const float (&x)[HD / 8][4]) {
  constexpr int CHUNKS = HD / 8;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < CHUNKS; j++)
#pragma unroll
    for (int h = 0; h < 2; h++)
      store4(chunk<HD>(staging, lane / 4 + h * 8, j) + lane % 4 * 2, cvt_bf16x2(x[j][2 * h], x[j][2 * h + 1]));
  __syncwarp();
  const bool aligned = rows.aligned();
  for (int i = lane; i < 16 * CHUNKS; i += 32) {
    const int row = i / CHUNKS, c = i % CHUNKS;
    if (first + row >= end) break;
    const bf16* from = chunk<HD>(staging, row, c);
    bf16* to = rows.at(first + row, HD) + c * 8;
    if (aligned) {
      store16(to, load16<bf16x8>(from));
    } else {
      for (int e = 0; e < 8; e++) to[e] = from[e];
    }
  }
}

// ---- fragments: 16 rows or columns, 16 elements deep ----

// A operand: rows from `row`, elements from 16 kk.
template <int HD>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], bf16* tile, int row, int kk) {
  const int lane = threadIdx.x % 32;
  ldmatrix_x4(a, chunk<HD>(tile, row + lane % 16, kk * 2 + lane / 16));
}

// B operand whose columns are rows of the tile from `row`, elements from 16 kk.
template <int HD>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], bf16* tile, int row, int kk) {
  const int lane = threadIdx.x % 32;
  ldmatrix_x4(b, chunk<HD>(tile, row + lane % 8 + lane / 16 * 8, kk * 2 + lane / 8 % 2));
}

// B operand whose columns are columns of the tile from 16 np, over the rows from `row`.
template <int HD>
__device__ __forceinline__ void load_b_trans(uint32_t (&b)[4], bf16* tile, int row, int np) {
  const int lane = threadIdx.x % 32;
  ldmatrix_x4_trans(b, chunk<HD>(tile, row + lane % 16, np * 2 + lane / 16));
}

// d[0], d[1] += a b over 16 columns.
__device__ __forceinline__ void mma_16(float (&left)[4], float (&right)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
  mma_m16n8k16_bf16(left, a, first);
  mma_m16n8k16_bf16(right, a, second);
}

// Sums of 16 columns as an A operand.
__device__ __forceinline__ void to_a(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = cvt_bf16x2(left[0], left[1]);
  a[1] = cvt_bf16x2(left[2], left[3]);
  a[2] = cvt_bf16x2(right[0], right[1]);
  a[3] = cvt_bf16x2(right[2], right[3]);
}

// Over the four lanes that share a row.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
