// The exact Gaussian error linear unit (Hendrycks and Gimpel 2016, arXiv 1606.08415): y = x cdf(x), with the cumulative
// distribution of the normal distribution.
//
// bf16 in and out, f32 in between, eight elements a thread. Grid: ceil(n / 8) threads.
#include "include/vectors.cuh"

constexpr int THREADS = 256;

// ---- kernels ----

// erfc loses nothing in the left tail, where 1 + erf would cancel.
__device__ __forceinline__ float cdf(float x) { return 0.5f * erfcf(x * -0.70710678f); }

GLOBAL void __launch_bounds__(THREADS)
gelu_forward(const bf16* x,  // [n]
             bf16* y,        // [n]
             int n) {
  const auto [past, i] = this_vector<THREADS>(n);
  if (past) return;
  float v[8];
  load8(v, x, i, n, aligned16(x));
#pragma unroll
  for (int j = 0; j < 8; j++) v[j] *= cdf(v[j]);
  store8(y, i, n, aligned16(y), v);
}
KERNEL(gelu_forward, THREADS);

// dx = dy (cdf(x) + x pdf(x)).
GLOBAL void __launch_bounds__(THREADS)
gelu_backward(const bf16* x,   // [n]
              const bf16* dy,  // [n]
              bf16* dx,        // [n]
              int n) {
  const auto [past, i] = this_vector<THREADS>(n);
  if (past) return;
  float v[8], d[8];
  load8(v, x, i, n, aligned16(x));
  load8(d, dy, i, n, aligned16(dy));
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const float pdf = 0.39894228f * expf(-0.5f * v[j] * v[j]);
    d[j] *= fmaf(v[j], pdf, cdf(v[j]));
  }
  store8(dx, i, n, aligned16(dx), d);
}
KERNEL(gelu_backward, THREADS);
