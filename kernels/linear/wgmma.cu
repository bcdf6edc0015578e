// y = x W^T by wgmma (sm_90a): one warp copies tiles into a ring of stages by the tensor memory accelerator, groups of four warps
// multiply. See tile.cuh.
//
// Blocks stay for all their tiles, so that the copies of the next one run under the multiplications and stores of this one.
#include "include/ptx.cuh"
#include "include/wgmma.cuh"
#include "linear/tile.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

constexpr int GROUP_THREADS = 128;
constexpr int SLAB = 64;  // elements of a row of 128 bytes, as far as the swizzle reaches

// Fragments of wgmma's A operand from rows as they lie in a slab: 16 rows by warp 0, zeros by the others.
__device__ __forceinline__ void load_rows(uint32_t (&a)[4][4], const bf16* slab, int warp, int lane) {
  if (warp > 0) return;
  const int row = lane % 16;
#pragma unroll
  for (int step = 0; step < 4; step++) ldmatrix_x4(a[step], slab + row * SLAB + ((step * 2 + lane / 16) ^ (row % 8)) * 8);
}

// Tiles of GROUPS * ROWS outputs and TOKENS tokens; a stage holds SLABS slabs of both operands. ROWS is 64, wgmma's M, read from shared
// memory; or 16, of which each block then has so few that a small weight keeps every multiprocessor busy: warp 0 takes these
// to registers, and the other 48 rows are zero. GATED: y [m, n] of w [2 n, k] by store_gated, a group having ROWS / 2 gates and
// their ups.
template <bool GATED, int GROUPS, int ROWS, int TOKENS, int SLABS, int STAGES, class T>
__device__ __forceinline__ void multiply(const TensorMap* w, const TensorMap* x, const bf16* bias, const T* residual, T* y, int m, int n,
                                         int k) {
  static_assert(ROWS == 64 || (ROWS == 16 && GROUPS == 1), "rows of a group");
  constexpr int OUTPUTS = GROUPS * ROWS, W_SLAB = OUTPUTS * SLAB, X_SLAB = TOKENS * SLAB, STAGE = SLABS * (W_SLAB + X_SLAB);
  constexpr int OWN = GATED ? ROWS / 2 : ROWS, COLUMNS = GROUPS * OWN;  // of y: a group's, and a tile's
  constexpr int STAGED = TOKENS < 32 ? TOKENS : 32;  // tokens on their way to memory at a time
  static_assert(W_SLAB * 2 % 1024 == 0 && X_SLAB * 2 % 1024 == 0, "swizzled rows in groups of eight");
  DYNAMIC_SHARED(bf16, stages);  // [STAGES]: [SLABS][OUTPUTS][64] of the weight, [SLABS][TOKENS][64] of the tokens; [GROUPS] staged
  SHARED(uint64_t, full, [STAGES]);
  SHARED(uint64_t, empty, [STAGES]);
  const int group = threadIdx.x / GROUP_THREADS, warp = threadIdx.x % GROUP_THREADS / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      mbarrier_init(&full[s], 1);
      mbarrier_init(&empty[s], GROUPS * 4);
    }
  }
  __syncthreads();
  const int tiles = (m + TOKENS - 1) / TOKENS * ((n + COLUMNS - 1) / COLUMNS), blocks = (k + SLABS * SLAB - 1) / (SLABS * SLAB);
  int stage = 0;
  unsigned parity = 0;  // of the phase of `full` that the stage's next use ends
  auto advance = [&] {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  };

  if (group == GROUPS) {  // the warp that copies
    if (lane > 0) return;
    bool reused = false;
    for (int i = blockIdx.x; i < tiles; i += gridDim.x) {
      const Tile at = tile_at<COLUMNS, TOKENS>(i, m, n);
      for (int block = 0; block < blocks; block++) {
        if (reused) mbarrier_wait_parity(&empty[stage], parity ^ 1);
        mbarrier_arrive_expect_tx(&full[stage], STAGE * 2);
        bf16* to = stages + stage * STAGE;
#pragma unroll
        for (int s = 0; s < SLABS; s++) {
          const int column = (block * SLABS + s) * SLAB;
          if constexpr (GATED) {
#pragma unroll
            for (int half = 0; half < 2 * GROUPS; half++)  // of each group the gates, then the ups
              tensor_copy_2d(to + s * W_SLAB + half * OWN * SLAB, w, &full[stage], column, half % 2 * n + at.output + half / 2 * OWN);
          } else {
            tensor_copy_2d(to + s * W_SLAB, w, &full[stage], column, at.output);
          }
          tensor_copy_2d(to + SLABS * W_SLAB + s * X_SLAB, x, &full[stage], column, at.token);
        }
        advance();
        reused |= stage == 0;
      }
    }
    return;
  }

  float* staged = reinterpret_cast<float*>(stages + STAGES * STAGE) + group * STAGED * STAGED_ROW<ROWS>;
  auto release = [&](int s) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&empty[s]);
  };
  for (int i = blockIdx.x; i < tiles; i += gridDim.x) {
    Tile at = tile_at<COLUMNS, TOKENS>(i, m, n);
    at.output += group * OWN;
    float sums[TOKENS / 2] = {};
    uint32_t a[2][4][4] = {};  // of 16 rows: of this slab and of the next
    int before = 0;
    for (int block = 0; block < blocks; block++) {
      mbarrier_wait_parity(&full[stage], parity);
      bf16 *w_slab = stages + stage * STAGE + group * ROWS * SLAB, *x_slab = stages + stage * STAGE + SLABS * W_SLAB;
#pragma unroll
      for (int s = 0; s < SLABS; s++) {
        if constexpr (ROWS == 16) load_rows(a[s % 2], w_slab + s * W_SLAB, warp, lane);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; step++) {
          const uint64_t tokens = wgmma_descriptor(x_slab + s * X_SLAB + step * 16, 128, 1024);
          if constexpr (ROWS == 16) {
            wgmma_m64k16_bf16<TOKENS>(sums, a[s % 2][step], tokens, true);
          } else {
            wgmma_m64k16_bf16<TOKENS>(sums, wgmma_descriptor(w_slab + s * W_SLAB + step * 16, 128, 1024), tokens, true);
          }
        }
        wgmma_commit_group();
        wgmma_wait_group<1>();  // the slab before has been read
        if (s == 0 && block > 0) release(before);
      }
      before = stage;
      advance();
    }
    wgmma_wait_group<0>();
    release(before);
#pragma unroll
    for (int first = 0; first < TOKENS; first += STAGED) {
      named_barrier_sync(1 + group, GROUP_THREADS);  // what was staged before has been stored
      if (warp * 16 < ROWS) {
#pragma unroll
        for (int j = 0; j < STAGED / 8; j++)
#pragma unroll
          for (int e = 0; e < 4; e++)
            staged[(j * 8 + lane % 4 * 2 + e % 2) * STAGED_ROW<ROWS> + warp * 16 + lane / 4 + e / 2 * 8] = sums[(first / 8 + j) * 4 + e];
      }
      named_barrier_sync(1 + group, GROUP_THREADS);
      const int thread = threadIdx.x % GROUP_THREADS;
      const Tile part = {at.output, at.token + first};
      if constexpr (GATED) {
        store_gated<ROWS, STAGED, GROUP_THREADS>(staged, thread, part, bias, y, m, n);
      } else {
        store_staged<ROWS, STAGED, GROUP_THREADS>(staged, thread, part, bias, residual, y, m, n);
      }
    }
  }
}

// ---- kernels ----

// Grid: any number of blocks. Dynamic shared memory: STAGES * SLABS * (OUTPUTS + TOKENS) * 128 bytes, and OUTPUTS + 4 GROUPS floats for
// each of min(TOKENS, 32) tokens.
//
// w: [n, k] in boxes of 64 x OUTPUTS; x: [m, k] in boxes of 64 x TOKENS, both swizzled over 128 bytes, so k is a multiple of 8;
// bias: [n] or null; residual: [m, n] or null, may be y; y: [m, n].
#define LINEAR_WGMMA_TO(name, T, GROUPS, ...)                                                                                  \
  GLOBAL void __launch_bounds__(GROUPS * GROUP_THREADS + 32)                                                                \
      name(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const bf16* bias, const T* residual, T* y, \
           int m, int n, int k) {                                                                                          \
    multiply<false, GROUPS, __VA_ARGS__, T>(&w, &x, bias, residual, y, m, n, k);                                            \
  }                                                                                                                        \
  KERNEL(name, GROUPS * GROUP_THREADS + 32);

// w: [2 n, k], the gates before the ups, in boxes of 64 x ROWS / 2; bias: [2 n] or null.
#define LINEAR_WGMMA_GATED(name, GROUPS, ...)                                                                              \
  GLOBAL void __launch_bounds__(GROUPS * GROUP_THREADS + 32)                                                                \
      name(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const bf16* bias, bf16* y, int m, int n, \
           int k) {                                                                                                        \
    multiply<true, GROUPS, __VA_ARGS__, bf16>(&w, &x, bias, nullptr, y, m, n, k);                                           \
  }                                                                                                                        \
  KERNEL(name, GROUPS * GROUP_THREADS + 32);

#define LINEAR_WGMMA(name, ...)                    \
  LINEAR_WGMMA_TO(name, bf16, __VA_ARGS__)        \
  LINEAR_WGMMA_TO(name##_f32, float, __VA_ARGS__) \
  LINEAR_WGMMA_GATED(name##_gated, __VA_ARGS__)

// Groups of four warps that multiply, outputs of each, tokens, slabs of a stage, stages.
LINEAR_WGMMA(linear_wgmma_16x8, 1, 16, 8, 4, 8)
LINEAR_WGMMA(linear_wgmma_16x16, 1, 16, 16, 4, 6)
LINEAR_WGMMA(linear_wgmma_16x32, 1, 16, 32, 2, 8)
LINEAR_WGMMA(linear_wgmma_64x8, 1, 64, 8, 2, 5)
LINEAR_WGMMA(linear_wgmma_64x16, 1, 64, 16, 2, 5)
LINEAR_WGMMA(linear_wgmma_64x32, 1, 64, 32, 2, 4)
LINEAR_WGMMA(linear_wgmma_64x64, 1, 64, 64, 1, 6)
LINEAR_WGMMA(linear_wgmma_128x64, 2, 64, 64, 1, 8)
LINEAR_WGMMA(linear_wgmma_128x128, 2, 64, 128, 1, 6)
LINEAR_WGMMA(linear_wgmma_128x256, 2, 64, 256, 1, 4)

#endif
