// AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) over flat buffers, and the global norm that clipping needs.
//
// Memory-bound: a thread takes eight elements, 16 bytes a load. Every kernel reads gradients in f32; the parameters are f32, or
// f32 masters with bf16 weights beside them, or bf16 alone, rounded up or down at random.
#include "include/philox.cuh"
#include "include/reduce.cuh"
#include "include/vectors.cuh"

constexpr int THREADS = 256;
constexpr int VECTOR = 8;
constexpr int NORM_BLOCK = 65536;  // elements whose squares are summed before they join the total: fixed

// ---- the norm ----

// Sums of squares in f64, whose bits lie in u64. Grid: ceil(n / 65536).
GLOBAL void __launch_bounds__(THREADS)
square_sums(const float* x,             // [n]
            unsigned long long* sums,   // [ceil(n / 65536)]
            unsigned long long n) {
  const size_t first = static_cast<size_t>(blockIdx.x) * NORM_BLOCK;
  const size_t end = first + NORM_BLOCK < n ? first + NORM_BLOCK : n;
  const bool aligned = aligned16(x);
  double sum[1] = {0.0};
  for (size_t i = first + threadIdx.x * VECTOR; i < end; i += THREADS * VECTOR) {
    float v[VECTOR];
    load8(v, x, i, end, aligned);
#pragma unroll
    for (int e = 0; e < VECTOR; e++) sum[0] = fma(static_cast<double>(v[e]), static_cast<double>(v[e]), sum[0]);
  }
  block_sum<THREADS>(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = __double_as_longlong(sum[0]);
}
KERNEL(square_sums, THREADS);

// norm = sqrt(the sum of the sums). Grid: one block.
GLOBAL void __launch_bounds__(THREADS)
norm_of_sums(const unsigned long long* sums,  // [n]: f64 bits
             float* norm,                     // [1]
             int n) {
  double sum[1] = {0.0};
  for (int i = threadIdx.x; i < n; i += THREADS) sum[0] += __longlong_as_double(sums[i]);
  block_sum<THREADS>(sum);
  if (threadIdx.x == 0) norm[0] = static_cast<float>(sqrt(sum[0]));
}
KERNEL(norm_of_sums, THREADS);

// ---- the step ----

// The constants of one step; the host computes them in f64.
struct Constants {
  float keep;        // 1 - lr * weight_decay
  float rest1;       // 1 - beta1
  float beta2;
  float rest2;       // 1 - beta2
  float step_size;   // lr / (1 - beta1^t)
  float root_bias2;  // sqrt(1 - beta2^t)
  float eps;
  float grad_scale;
};

__device__ __forceinline__ void update(float& p, float g, float& m, float& v, const Constants& k) {
  g *= k.grad_scale;
  m = fmaf(g - m, k.rest1, m);
  v = fmaf(k.rest2 * g, g, v * k.beta2);
  p = fmaf(-k.step_size, m / (sqrtf(v) / k.root_bias2 + k.eps), p * k.keep);
}

// Updates the moments and p, eight elements from i on.
__device__ __forceinline__ void update8(float (&p)[VECTOR], const float* grads, float* m, float* v, size_t i, size_t n,
                                        bool aligned, const Constants& k) {
  float g[VECTOR], first[VECTOR], second[VECTOR];
  load8(g, grads, i, n, aligned);
  load8(first, m, i, n, aligned);
  load8(second, v, i, n, aligned);
#pragma unroll
  for (int e = 0; e < VECTOR; e++) update(p[e], g[e], first[e], second[e], k);
  store8(m, i, n, aligned, first);
  store8(v, i, n, aligned, second);
}

// f32 parameters, and bf16 copies of them where `weights` is not null. Grid: ceil(n / 8) threads.
GLOBAL void __launch_bounds__(THREADS)
adamw(float* params,       // [n]
      const float* grads,  // [n]
      float* m,            // [n]: mean of the gradients
      float* v,            // [n]: mean of their squares
      bf16* weights,       // [n] or null: params rounded to nearest
      unsigned long long n, float keep, float rest1, float beta2, float rest2, float step_size, float root_bias2, float eps,
      float grad_scale) {
  const size_t i = (static_cast<size_t>(blockIdx.x) * THREADS + threadIdx.x) * VECTOR;
  if (i >= n) return;
  const Constants k = {keep, rest1, beta2, rest2, step_size, root_bias2, eps, grad_scale};
  const bool aligned = aligned16(params) && aligned16(grads) && aligned16(m) && aligned16(v);
  float p[VECTOR];
  load8(p, params, i, n, aligned);
  update8(p, grads, m, v, i, n, aligned, k);
  store8(params, i, n, aligned, p);
  if (!weights) return;
  if (aligned16(weights) && i + VECTOR <= n) {
    bf16x8 rounded;
#pragma unroll
    for (int e = 0; e < VECTOR; e++) rounded.at[e] = to_bf16(p[e]);
    store16(weights + i, rounded);
  } else {
#pragma unroll
    for (int e = 0; e < VECTOR; e++)
      if (i + e < n) weights[i + e] = to_bf16(p[e]);
  }
}
KERNEL(adamw, THREADS);

// To one of the two bf16 numbers beside x, the nearer one the likelier, so that the mean is x. `random` has 16 bits.
__device__ __forceinline__ bf16 round_at_random(float x, uint32_t random) {
  const uint32_t bits = __float_as_uint(x);
  return x == x ? bf16_of_bits(static_cast<uint16_t>((bits + random) >> 16)) : to_bf16(x);
}

// bf16 parameters without masters. An element's random bits depend on its index among all parameters, the step and the seed.
// Grid: ceil((n + first % 8) / 8) threads, one for each group of eight indices.
GLOBAL void __launch_bounds__(THREADS)
adamw_rounded(bf16* weights,       // [n]: elements first, first + 1, .. of all
              const float* grads,  // [n]
              float* m,            // [n]
              float* v,            // [n]
              unsigned long long n, unsigned long long first, unsigned long long step, unsigned long long seed, float keep,
              float rest1, float beta2, float rest2, float step_size, float root_bias2, float eps, float grad_scale) {
  const Constants k = {keep, rest1, beta2, rest2, step_size, root_bias2, eps, grad_scale};
  const uint64_t group = first / VECTOR + static_cast<uint64_t>(blockIdx.x) * THREADS + threadIdx.x;
  const uint32_t group_low = static_cast<uint32_t>(group), group_high = static_cast<uint32_t>(group >> 32);
  const uint32_t step_low = static_cast<uint32_t>(step), step_high = static_cast<uint32_t>(step >> 32);
  const Random4 random = philox(group_low, group_high, step_low, step_high, seed);
  const uint64_t at = group * VECTOR;
  const bool whole = at >= first && at + VECTOR <= first + n;
  if (whole && aligned16(weights + (at - first)) && aligned16(grads + (at - first)) && aligned16(m + (at - first)) &&
      aligned16(v + (at - first))) {
    const size_t i = at - first;
    float p[VECTOR];
    const bf16x8 old = load16<bf16x8>(weights + i);
#pragma unroll
    for (int e = 0; e < VECTOR; e++) p[e] = to_float(old.at[e]);
    update8(p, grads, m, v, i, n, true, k);
    bf16x8 rounded;
#pragma unroll
    for (int e = 0; e < VECTOR; e++) rounded.at[e] = round_at_random(p[e], random.at[e / 2] >> (e % 2 * 16) & 0xFFFF);
    store16(weights + i, rounded);
  } else {
#pragma unroll
    for (int e = 0; e < VECTOR; e++) {
      if (at + e < first || at + e >= first + n) continue;
      const size_t i = at + e - first;
      float p = to_float(weights[i]), mean = m[i], square = v[i];
      update(p, grads[i], mean, square, k);
      m[i] = mean;
      v[i] = square;
      weights[i] = round_at_random(p, random.at[e / 2] >> (e % 2 * 16) & 0xFFFF);
    }
  }
}
KERNEL(adamw_rounded, THREADS);
