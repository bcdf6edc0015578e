// Moving keys and values between the rows of a batch and the pages of the cache, and whole pages.
//
// Keys and values lie alike, [blocks, kv_heads, BLOCK, head_dim]; a slot is block * BLOCK + offset. A row holds a token's keys
// ([kv_heads, head_dim]) from column `k_offset` and its values from column `v_offset`. A token whose slot is NO_SLOT
// is left out.
#include "include/pages.cuh"

constexpr int THREADS = 256;

// ---- kernels ----

// The eight elements of a token's head that a thread moves.
struct Part {
  unsigned token, head;
  int column;
};

__device__ __forceinline__ Part this_part(int kv_heads, int head_dim) {
  const auto [i, column] = this_vector<THREADS>(head_dim);
  return {i / kv_heads, i % kv_heads, column};
}

template <class T>
__device__ __forceinline__ void move8(const T* from, bf16* to, int column, int columns, bool aligned) {
  float v[8];
  load8(v, from, column, columns, aligned);
  store8(to, column, columns, aligned, v);
}

// Grid: tokens * kv_heads * ceil(head_dim / 8) threads. Slots are all different.
GLOBAL void __launch_bounds__(THREADS)
kv_cache_write(const bf16* rows,       // [tokens, stride]
               const unsigned* slots,  // [tokens]
               bf16* keys, bf16* values,
               int tokens, int stride, int k_offset, int v_offset, int kv_heads, int head_dim) {
  const auto [token, head, c] = this_part(kv_heads, head_dim);
  if (token >= static_cast<unsigned>(tokens) || slots[token] == NO_SLOT) return;
  const bool whole = head_dim % 8 == 0 && stride % 8 == 0;
  const size_t page = in_pages(slots[token], head, kv_heads, head_dim);
  const bf16* row = rows + static_cast<size_t>(token) * stride + static_cast<size_t>(head) * head_dim;
  move8(row + k_offset, keys + page, c, head_dim, whole && aligned16(rows + k_offset));
  move8(row + v_offset, values + page, c, head_dim, whole && aligned16(rows + v_offset));
}
KERNEL(kv_cache_write, THREADS);

// The way back, for gradients: from f32 pages, rounded. Only the columns of keys and values are written.
GLOBAL void __launch_bounds__(THREADS)
kv_cache_gather(const float* keys, const float* values,
                const unsigned* slots,  // [tokens]
                bf16* rows,             // [tokens, stride]
                int tokens, int stride, int k_offset, int v_offset, int kv_heads, int head_dim) {
  const auto [token, head, c] = this_part(kv_heads, head_dim);
  if (token >= static_cast<unsigned>(tokens) || slots[token] == NO_SLOT) return;
  const bool whole = head_dim % 8 == 0 && stride % 8 == 0;
  const size_t page = in_pages(slots[token], head, kv_heads, head_dim);
  bf16* row = rows + static_cast<size_t>(token) * stride + static_cast<size_t>(head) * head_dim;
  move8(keys + page, row + k_offset, c, head_dim, whole && aligned16(rows + k_offset));
  move8(values + page, row + v_offset, c, head_dim, whole && aligned16(rows + v_offset));
}
KERNEL(kv_cache_gather, THREADS);

// Where the eight elements of a thread are in pages `from` and `to`. Grid: x over a page, y over the keys and values of all layers.
struct Pair {
  size_t from, to;
};

__device__ __forceinline__ Pair this_pair(unsigned from, unsigned to, int blocks, int page) {
  const size_t plane = static_cast<size_t>(blockIdx.y) * blocks;
  return {(plane + from) * page, (plane + to) * page};
}

GLOBAL void __launch_bounds__(THREADS)
kv_cache_copy_block(bf16* pages,  // [keys and values of all layers, blocks, page]
                    unsigned from, unsigned to, int blocks, int page) {
  const auto [past, i] = this_vector<THREADS>(page);
  if (past) return;
  const auto at = this_pair(from, to, blocks, page);
  store16(pages + at.to + i, load16<bf16x8>(pages + at.from + i));
}
KERNEL(kv_cache_copy_block, THREADS);

// For gradients.
GLOBAL void __launch_bounds__(THREADS)
kv_cache_add_block(float* pages,  // [keys and values of all layers, blocks, page]
                   unsigned from, unsigned to, int blocks, int page) {
  const auto [past, i] = this_vector<THREADS>(page);
  if (past) return;
  const auto at = this_pair(from, to, blocks, page);
  float more[8], sum[8];
  load8(more, pages + at.from, i, page, true);
  load8(sum, pages + at.to, i, page, true);
#pragma unroll
  for (int j = 0; j < 8; j++) sum[j] += more[j];
  store8(pages + at.to, i, page, true, sum);
}
KERNEL(kv_cache_add_block, THREADS);
