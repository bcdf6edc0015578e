// Sums over a warp and over a block, in an order that depends on the number of threads alone. All threads get the result.
#pragma once
#include "device.cuh"

constexpr int WARP_LANES = 32;

// A butterfly: every lane adds the same pairs, so that all hold the same bits.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int lanes = WARP_LANES / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}

// NaN is passed over.
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int lanes = WARP_LANES / 2; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, lanes));
  return x;
}

// N sums over a block of THREADS threads: within warps, then over warps in ascending order. All threads call it together.
template <int THREADS, class T, int N>
__device__ __forceinline__ void block_sum(T (&x)[N]) {
  static_assert(THREADS % WARP_LANES == 0, "whole warps");
  constexpr int WARPS = THREADS / WARP_LANES;
  SHARED(T, partial, [WARPS][N]);
#pragma unroll
  for (int i = 0; i < N; i++) {
    x[i] = warp_sum(x[i]);
    if (threadIdx.x % WARP_LANES == 0) partial[threadIdx.x / WARP_LANES][i] = x[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; i++) {
    x[i] = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) x[i] += partial[w][i];
  }
  __syncthreads();  // the next call writes again
}
