// Pages of keys and values, [blocks, kv_heads, BLOCK, head_dim] alike; a slot is block * BLOCK + offset.
#pragma once
#include "vectors.cuh"

constexpr unsigned BLOCK = 32;      // tokens of a page
constexpr unsigned NO_SLOT = ~0u;  // of a token that has no place

// Where a head of the token at `slot` begins in the pages.
__device__ __forceinline__ size_t in_pages(unsigned slot, unsigned head, int kv_heads, int head_dim) {
  return ((static_cast<size_t>(slot / BLOCK) * kv_heads + head) * BLOCK + slot % BLOCK) * head_dim;
}
