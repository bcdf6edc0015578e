// d[64, N] = a[64, 64] b[N, 64]^T by one group of warps, with every layout of operands. For sm_90a.
#include "include/wgmma.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

constexpr int DEPTH = 64;

// Where element [row, k] of an operand of `rows` rows lies, in bytes: columns of blocks as wide as the swizzle.
__device__ __forceinline__ int place_of(int row, int k, int rows, int swizzle) {
  if (swizzle == 0) return k / 8 * rows * 16 + row * 16 + k % 8 * 2;
  const int at = k / (swizzle / 2) * rows * swizzle + row * swizzle + k % (swizzle / 2) * 2;
  return at ^ ((at >> 7 & (swizzle / 16 - 1)) << 4);
}

// The descriptor of the 16 columns from k on.
__device__ __forceinline__ uint64_t columns(const unsigned char* operand, int k, int rows, int swizzle) {
  if (swizzle == 0) return wgmma_descriptor(operand + k / 8 * rows * 16, 0, 128, rows * 16);
  return wgmma_descriptor(operand + k / (swizzle / 2) * rows * swizzle + k % (swizzle / 2) * 2, swizzle, 8 * swizzle);
}

template <int N>
__device__ __forceinline__ void multiply(const bf16* a, const bf16* b, float* d, int swizzle, int registers) {
  DYNAMIC_SHARED(unsigned char, operands);
  unsigned char *a_shared = operands, *b_shared = operands + 64 * DEPTH * 2;
  for (int i = threadIdx.x; i < 64 * DEPTH; i += 128)
    *reinterpret_cast<bf16*>(a_shared + place_of(i / DEPTH, i % DEPTH, 64, swizzle)) = a[i];
  for (int i = threadIdx.x; i < N * DEPTH; i += 128)
    *reinterpret_cast<bf16*>(b_shared + place_of(i / DEPTH, i % DEPTH, N, swizzle)) = b[i];
  fence_proxy_async();
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = warp * 16 + lane / 4;
  float sums[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; i++) sums[i] = 1000.0f;  // the first step overwrites it
  unsigned ra[DEPTH / 16][4];
#pragma unroll
  for (int k = 0; k < DEPTH; k += 16)
#pragma unroll
    for (int i = 0; i < 4; i++)
      ra[k / 16][i] = *reinterpret_cast<const unsigned*>(a + (row + i % 2 * 8) * DEPTH + k + i / 2 * 8 + lane % 4 * 2);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < DEPTH; k += 16) {
    if (registers) {
      wgmma_m64k16_bf16<N>(sums, ra[k / 16], columns(b_shared, k, N, swizzle), k > 0);
    } else {
      wgmma_m64k16_bf16<N>(sums, columns(a_shared, k, 64, swizzle), columns(b_shared, k, N, swizzle), k > 0);
    }
    wgmma_commit_group();
  }
  wgmma_wait_group<1>();
  wgmma_wait_group<0>();
#pragma unroll
  for (int i = 0; i < N / 2; i++) d[(row + i / 2 % 2 * 8) * N + i / 4 * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

#define MULTIPLY(N)                                                                                                          \
  GLOBAL void __launch_bounds__(128)                                                                                         \
  wgmma_##N(const bf16* a, const bf16* b, float* d, int swizzle, int registers) {                                 \
    multiply<N>(a, b, d, swizzle, registers);                                                                         \
  }                                                                                                                          \
  KERNEL(wgmma_##N, 128)
MULTIPLY(8);
MULTIPLY(96);
MULTIPLY(256);

#endif
