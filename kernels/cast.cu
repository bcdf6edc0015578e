// Changes of type, eight elements a thread. Grid: ceil(n / 8) threads.
#include "include/vectors.cuh"

constexpr int THREADS = 256;

// ---- kernels ----

template <class From, class To>
__device__ __forceinline__ void cast(const From* from, To* to, int n) {
  const auto [past, i] = this_vector<THREADS>(n);
  if (past) return;
  float v[8];
  load8(v, from, i, n, aligned16(from));
  store8(to, i, n, aligned16(to), v);
}

// To the nearest, ties to even.
GLOBAL void __launch_bounds__(THREADS)
cast_f32_to_bf16(const float* from,  // [n]
                 bf16* to,           // [n]
                 int n) {
  cast(from, to, n);
}
KERNEL(cast_f32_to_bf16, THREADS);

GLOBAL void __launch_bounds__(THREADS)
cast_bf16_to_f32(const bf16* from,  // [n]
                 float* to,         // [n]
                 int n) {
  cast(from, to, n);
}
KERNEL(cast_bf16_to_f32, THREADS);
