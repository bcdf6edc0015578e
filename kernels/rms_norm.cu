// Root-mean-square layer normalisation (Zhang and Sennrich 2019, arXiv 1910.07467). The residual stream's
// addition is an epilogue of the product before it (linear/tile.cuh).
//
// bf16 in and out, f32 in between. A row belongs to one block, and its sums depend on the number of columns alone: a row's
// result is the same whatever else is in the batch. The second pass over a row reads it again: it is a few kilobytes, which
// the first pass has left in the cache.
#include "include/reduce.cuh"
#include "include/vectors.cuh"

constexpr int THREADS = 128;
constexpr int STEP = THREADS * 8;  // columns that a block takes at a time, eight a thread
constexpr int BLOCKS = 8;          // on a multiprocessor: left alone, the compiler aims at more, and spills

// ---- kernels ----

// y = x / sqrt(mean(x^2) + eps) * w. Grid: one block a row.
GLOBAL void __launch_bounds__(THREADS)
rms_norm_forward(const bf16* x,  // [rows, columns]
                 const bf16* w,  // [columns]
                 bf16* y,        // [rows, columns]
                 int columns, float eps) {
  const bool aligned = columns % 8 == 0 && aligned16(x) && aligned16(w) && aligned16(y);
  const size_t row = static_cast<size_t>(blockIdx.x) * columns;
  float squares[1] = {0.0f};
  for (int c = threadIdx.x * 8; c < columns; c += STEP) {
    float v[8];
    load8(v, x + row, c, columns, aligned);
#pragma unroll
    for (int i = 0; i < 8; i++) squares[0] = fmaf(v[i], v[i], squares[0]);
  }
  block_sum<THREADS>(squares);
  const float k = rsqrtf(squares[0] / columns + eps);
  for (int c = threadIdx.x * 8; c < columns; c += STEP) {
    float v[8], g[8];
    load8(v, x + row, c, columns, aligned);
    load8(g, w, c, columns, aligned);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = v[i] * k * g[i];
    store8(y + row, c, columns, aligned, v);
  }
}
KERNEL(rms_norm_forward, THREADS);

// With k = 1 / rms(h) and g = dy w: dh = dresidual + k g - h k^3 mean(g h), and this block's part of dw, the sum of dy h k.
//
// A fixed number of blocks goes through the rows, block b the b-th share of them, and keeps its part of dw in shared memory,
// where each column belongs to one thread. Dynamic shared memory: columns floats.
GLOBAL void __launch_bounds__(THREADS, BLOCKS)
rms_norm_backward(const bf16* h,          // [rows, columns]
                  const bf16* w,          // [columns]
                  const bf16* dy,         // [rows, columns]
                  const bf16* dresidual,  // [rows, columns] or null
                  bf16* dh,               // [rows, columns]; may be dresidual or dy
                  float* dw_partial,      // [blocks, columns], or null where the weight is frozen
                  int rows, int columns, float eps) {
  DYNAMIC_SHARED(float, dw);
  const bool aligned =
      columns % 8 == 0 && aligned16(h) && aligned16(w) && aligned16(dy) && aligned16(dresidual) && aligned16(dh);
  const int share = (rows + gridDim.x - 1) / gridDim.x, first = blockIdx.x * share;
  const int end = first + share < rows ? first + share : rows;
  for (int c = threadIdx.x * 8; c < columns; c += STEP)
    for (int i = c; i < c + 8 && i < columns; i++) dw[i] = 0.0f;
  for (int r = first; r < end; r++) {
    const size_t row = static_cast<size_t>(r) * columns;
    float sums[2] = {0.0f, 0.0f};  // of h^2, of g h
    for (int c = threadIdx.x * 8; c < columns; c += STEP) {
      float v[8], d[8], g[8];
      load8(v, h + row, c, columns, aligned);
      load8(d, dy + row, c, columns, aligned);
      load8(g, w, c, columns, aligned);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        sums[0] = fmaf(v[i], v[i], sums[0]);
        sums[1] = fmaf(d[i] * g[i], v[i], sums[1]);
      }
    }
    block_sum<THREADS>(sums);
    const float k = rsqrtf(sums[0] / columns + eps), back = -sums[1] / columns * k * k * k;
    for (int c = threadIdx.x * 8; c < columns; c += STEP) {
      float v[8], d[8], g[8], to[8] = {};
      load8(v, h + row, c, columns, aligned);
      load8(d, dy + row, c, columns, aligned);
      load8(g, w, c, columns, aligned);
      if (dresidual) load8(to, dresidual + row, c, columns, aligned);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        if (c + i < columns) dw[c + i] = fmaf(d[i], v[i] * k, dw[c + i]);
        to[i] += fmaf(d[i] * g[i], k, v[i] * back);
      }
      store8(dh + row, c, columns, aligned, to);
    }
  }
  if (!dw_partial) return;
  for (int c = threadIdx.x * 8; c < columns; c += STEP)
    for (int i = c; i < c + 8 && i < columns; i++) dw_partial[static_cast<size_t>(blockIdx.x) * columns + i] = dw[i];
}
KERNEL(rms_norm_backward, THREADS);

// dw += the sum of the blocks' parts, in ascending order. Grid: one thread a column.
GLOBAL void __launch_bounds__(THREADS)
rms_norm_weight_gradient(const float* dw_partial,  // [blocks, columns]
                         float* dw,                // [columns]
                         int blocks, int columns) {
  const int c = blockIdx.x * THREADS + threadIdx.x;
  if (c >= columns) return;
  float sum = 0.0f;
  for (int b = 0; b < blocks; b++) sum += dw_partial[static_cast<size_t>(b) * columns + c];
  dw[c] += sum;
}
KERNEL(rms_norm_weight_gradient, THREADS);
