// What the products of both architectures share: the order of their tiles, and the way of finished sums to memory.
//
// y[m, n] = x[m, k] W[n, k]^T. The weight is the M operand of the multiply-add instructions and tokens are the N operand, so that
// few tokens waste little. An output is one f32 accumulator that takes k in ascending steps of 16 by one instruction, whose N
// alone differs from tile to tile: a token's result is the same bits in every tile. Past the end of k operands are zero.
#pragma once
#include "include/swiglu.cuh"
#include "include/vectors.cuh"

struct Tile {
  int output, token;  // the first of each
};

// Tiles that run at the same time should share what they read: tokens ascend fastest, over so many tiles of them, and then
// outputs, so that a wave of blocks reads a few tiles of each operand from memory and the rest from the second-level cache.
constexpr int TOKEN_TILES_TOGETHER = 8;

template <int OUTPUTS, int TOKENS>
__device__ __forceinline__ Tile tile_at(int index, int m, int n) {
  const int token_tiles = (m + TOKENS - 1) / TOKENS, output_tiles = (n + OUTPUTS - 1) / OUTPUTS;
  const int group = index / (TOKEN_TILES_TOGETHER * output_tiles), first = group * TOKEN_TILES_TOGETHER;
  const int wide = token_tiles - first < TOKEN_TILES_TOGETHER ? token_tiles - first : TOKEN_TILES_TOGETHER;
  const int within = index - first * output_tiles;
  return {within / wide * OUTPUTS, (first + within % wide) * TOKENS};
}

// Accumulators hold two outputs of two tokens, y lies by tokens: sums go through shared memory, [TOKENS][OUTPUTS + 4] floats. With
// four floats between rows the eight outputs and four tokens that a warp writes at once lie in 32 banks.
template <int OUTPUTS>
constexpr int STAGED_ROW = OUTPUTS + 4;

// y = (sum + bias) + residual for a staged tile, by THREADS threads of which this is number `thread`. A thread reads what it adds
// before it writes there: residual may be y itself.
template <int OUTPUTS, int TOKENS, int THREADS, class T>
__device__ __forceinline__ void store_staged(const float* staged,  // [TOKENS][STAGED_ROW]
                                             int thread, Tile at,
                                             const bf16* bias,   // [n] or null
                                             const T* residual,  // [m, n] or null
                                             T* y,               // [m, n]
                                             int m, int n) {
  constexpr int VECTORS = OUTPUTS / 8;
  static_assert(THREADS % VECTORS == 0, "a thread stays with its outputs");
  const int column = thread % VECTORS * 8, output = at.output + column;
  if (output >= n) return;
  const bool whole = n % 8 == 0;
  const bool aligned = whole && aligned16(y) && aligned16(residual);
  float b[8] = {};
  if (bias) load8(b, bias, output, n, whole && aligned16(bias));
#pragma unroll 2
  for (int t = thread / VECTORS; t < TOKENS; t += THREADS / VECTORS) {
    if (at.token + t >= m) break;
    const size_t row = static_cast<size_t>(at.token + t) * n;
    float v[8];
    load8(v, staged + t * STAGED_ROW<OUTPUTS>, column, OUTPUTS, true);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] += b[i];
    if (residual) {
      float r[8];
      load8(r, residual + row, output, n, aligned);
#pragma unroll
      for (int i = 0; i < 8; i++) v[i] += r[i];
    }
    store8(y + row, output, n, aligned, v);
  }
}

// The gated products: half of a tile's rows are gates, the other half the ups of the same columns of
// y[m, width] = silu(gate) up, where [gate; up] = x W^T, W [2 width, k]. Both are rounded as if they had been stored, so that y has the
// bits that swiglu_forward makes of the plain product.
template <int OUTPUTS, int TOKENS, int THREADS>
__device__ __forceinline__ void store_gated(const float* staged,  // [TOKENS][STAGED_ROW], the gates before the ups
                                            int thread, Tile at,
                                            const bf16* bias,  // [2 width] or null
                                            bf16* y,           // [m, width]
                                            int m, int width) {
  constexpr int HALF = OUTPUTS / 2, VECTORS = HALF / 8;
  static_assert(THREADS % VECTORS == 0, "a thread stays with its columns");
  const int column = thread % VECTORS * 8, output = at.output + column;
  if (output >= width) return;
  const bool whole = width % 8 == 0, aligned = whole && aligned16(y), aligned_bias = whole && aligned16(bias);
  const bf16* up_bias = bias ? bias + width : nullptr;
  // Few registers are free beside the sums: each half is rounded before the next is read, and biases are read again for each token.
  auto rounded = [&](const float* sums, const bf16* of) {
    float v[8], b[8] = {};
    load8(v, sums, column, HALF, true);
    if (bias) load8(b, of, output, width, aligned_bias);
    bf16x8 packed;
#pragma unroll
    for (int i = 0; i < 8; i++) packed.at[i] = to_bf16(v[i] + b[i]);
    return packed;
  };
#pragma unroll 1
  for (int t = thread / VECTORS; t < TOKENS; t += THREADS / VECTORS) {
    if (at.token + t >= m) break;
    const float* sums = staged + t * STAGED_ROW<OUTPUTS>;
    const bf16x8 gate = rounded(sums, bias), up = rounded(sums + HALF, up_bias);
    float h[8];
#pragma unroll
    for (int i = 0; i < 8; i++) h[i] = swiglu(to_float(gate.at[i]), to_float(up.at[i]));
    store8(y + static_cast<size_t>(at.token + t) * width, output, width, aligned, h);
  }
}
