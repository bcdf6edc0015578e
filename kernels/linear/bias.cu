// The gradient of a bias: db[n] += the sum of dy[m, n] over its rows, in an order that depends on the shape alone.
#include "include/vectors.cuh"

constexpr int COLUMNS = 64, VECTORS = COLUMNS / 8;
constexpr int THREADS = 256, LANES = THREADS / VECTORS;  // rows that a block reads at once
constexpr int ROWS = 512;                                // rows that it sums

// ---- kernels ----

// The sums of ROWS rows. Grid: ceil(n / COLUMNS) x ceil(m / ROWS) blocks.
//
// Lane l sums rows l, l + LANES, ... of the block's, and the lanes' sums are added in ascending order.
GLOBAL void __launch_bounds__(THREADS)
linear_bias_gradient_parts(const bf16* dy,  // [m, n]
                           float* parts,    // [ceil(m / ROWS), n]
                           int m, int n) {
  SHARED(float, sums, [LANES][COLUMNS]);
  const int vector = threadIdx.x % VECTORS * 8, lane = threadIdx.x / VECTORS, column = blockIdx.x * COLUMNS + vector;
  const int first = blockIdx.y * ROWS, end = first + ROWS < m ? first + ROWS : m;
  const bool aligned = n % 8 == 0 && aligned16(dy);
  float sum[8] = {};
#pragma unroll 4
  for (int r = first + lane; r < end; r += LANES) {
    float v[8];
    load8(v, dy + static_cast<size_t>(r) * n, column, n, aligned);
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] += v[i];
  }
  store8(sums[lane], vector, COLUMNS, true, sum);
  __syncthreads();
  const int own = blockIdx.x * COLUMNS + threadIdx.x;
  if (threadIdx.x >= COLUMNS || own >= n) return;
  float total = 0.0f;
  for (int l = 0; l < LANES; l++) total += sums[l][threadIdx.x];
  parts[static_cast<size_t>(blockIdx.y) * n + own] = total;
}
KERNEL(linear_bias_gradient_parts, THREADS);

// db += the parts, in ascending order. Grid: one thread a column.
GLOBAL void __launch_bounds__(THREADS)
linear_bias_gradient(const float* parts,  // [count, n]
                     float* db,           // [n]
                     int count, int n) {
  const int c = blockIdx.x * THREADS + threadIdx.x;
  if (c >= n) return;
  float sum = 0.0f;
  for (int p = 0; p < count; p++) sum += parts[static_cast<size_t>(p) * n + c];
  db[c] += sum;
}
KERNEL(linear_bias_gradient, THREADS);
