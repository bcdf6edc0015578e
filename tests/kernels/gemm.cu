// c[m, n] = a[m, k] b[n, k]^T as kernels on sm_80 are written: three stages of cp.async, chunks of 16 bytes swizzled, ldmatrix,
// mma.sync. Tiles of 64 x 64 x 64, four warps of 32 x 32; m, n and k are multiples of 64.
#include "include/ptx.cuh"

constexpr int THREADS = 128, TILE = 64, STAGES = 3, CHUNKS = TILE / 8;

__device__ __forceinline__ bf16* chunk(bf16* tile, int row, int c) { return tile + row * TILE + ((c ^ (row % 8)) * 8); }

GLOBAL void __launch_bounds__(THREADS) gemm_bf16(const bf16* a, const bf16* b, float* c, int n, int k) {
  DYNAMIC_SHARED(bf16, tiles);  // [STAGES][a and b][TILE][TILE]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, m_warp = warp / 2 * 32, n_warp = warp % 2 * 32;
  const bf16 *a_tile = a + static_cast<size_t>(blockIdx.y) * TILE * k, *b_tile = b + static_cast<size_t>(blockIdx.x) * TILE * k;
  const int steps = k / TILE;
  auto stage = [&](int step, int operand) { return tiles + (step % STAGES * 2 + operand) * TILE * TILE; };
  auto load = [&](int step) {
    for (int i = threadIdx.x; i < TILE * CHUNKS; i += THREADS) {
      const int row = i / CHUNKS, col = i % CHUNKS;
      const size_t from = static_cast<size_t>(row) * k + step * TILE + col * 8;
      cp_async<16>(chunk(stage(step, 0), row, col), a_tile + from);
      cp_async<16>(chunk(stage(step, 1), row, col), b_tile + from);
    }
  };
  float sums[2][4][4] = {};
  for (int step = 0; step < STAGES - 1; step++) {
    if (step < steps) load(step);
    cp_async_commit_group();
  }
  for (int step = 0; step < steps; step++) {
    cp_async_wait_group<STAGES - 2>();
    __syncthreads();
    if (step + STAGES - 1 < steps) load(step + STAGES - 1);
    cp_async_commit_group();
#pragma unroll
    for (int kk = 0; kk < TILE / 16; kk++) {
      unsigned ra[2][4], rb[2][4];
#pragma unroll
      for (int i = 0; i < 2; i++) ldmatrix_x4(ra[i], chunk(stage(step, 0), m_warp + i * 16 + lane % 16, kk * 2 + lane / 16));
#pragma unroll
      for (int j = 0; j < 2; j++)
        ldmatrix_x4(rb[j], chunk(stage(step, 1), n_warp + j * 16 + lane % 8 + lane / 16 * 8, kk * 2 + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const unsigned pair[2] = {rb[j / 2][j % 2 * 2], rb[j / 2][j % 2 * 2 + 1]};
          mma_m16n8k16_bf16(sums[i][j], ra[i], pair);
        }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int row = blockIdx.y * TILE + m_warp + i * 16 + lane / 4 + e / 2 * 8;
        c[static_cast<size_t>(row) * n + blockIdx.x * TILE + n_warp + j * 8 + lane % 4 * 2 + e % 2] = sums[i][j][e];
      }
}
KERNEL(gemm_bf16, THREADS);
