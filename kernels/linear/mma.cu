// y = x W^T by mma.sync (sm_80), cp.async in several stages, and ldmatrix from swizzled tiles. See tile.cuh.
//
// Also on sm_90a for weights whose rows do not start at multiples of 16 bytes, which its tensor copies cannot read.
#include "include/ptx.cuh"
#include "linear/tile.cuh"

// Eight elements, 16 bytes, of a row of DEPTH. The chunks of neighbouring rows are exchanged so that eight rows' chunks of one
// number, which ldmatrix reads at once, lie in different banks.
template <int DEPTH>
__device__ __forceinline__ bf16* chunk(bf16* tile, int row, int c) {
  static_assert(DEPTH >= 32, "two rows of 64 bytes, or one of more, reach over all banks");
  return tile + row * DEPTH + (c ^ (DEPTH == 32 ? row / 2 % 4 : row % 8)) * 8;
}

// Starts the copies of [ROWS][DEPTH] elements from (first, column) of a matrix [rows, k]; zeros outside it. Every row of the matrix
// starts at a multiple of `alignment` bytes, which bounds what one copy takes.
template <int ROWS, int DEPTH, int THREADS>
__device__ __forceinline__ void load_tile(bf16* tile, const bf16* matrix, int first, int rows, int column, int k, int alignment) {
  constexpr int CHUNKS = DEPTH / 8;
  static_assert(ROWS * CHUNKS % THREADS == 0, "every thread copies as much");
#pragma unroll
  for (int i = 0; i < ROWS * CHUNKS / THREADS; i++) {
    const int at = i * THREADS + threadIdx.x, row = at / CHUNKS, c = column + at % CHUNKS * 8;
    bf16* to = chunk<DEPTH>(tile, row, at % CHUNKS);
    const bf16* from = matrix + static_cast<size_t>(first + row) * k + c;
    const int elements = first + row < rows ? k - c : 0;
    if (alignment == 16) {
      cp_async<16>(to, elements > 0 ? from : matrix, elements > 0 ? 16 : 0);
    } else if (alignment == 8) {
#pragma unroll
      for (int e = 0; e < 8; e += 4) cp_async<8>(to + e, elements > e ? from + e : matrix, elements > e ? 8 : 0);
    } else if (alignment == 4) {
#pragma unroll
      for (int e = 0; e < 8; e += 2) cp_async<4>(to + e, elements > e ? from + e : matrix, elements > e ? 4 : 0);
    } else {
#pragma unroll
      for (int e = 0; e < 8; e++) to[e] = elements > e ? from[e] : to_bf16(0.0f);
    }
  }
}

// One tile of OUTPUTS x TOKENS a block. WARPS_M x WARPS_N warps compute; all WARPS copy. GATED: y [m, n] of w [2 n, k] by store_gated,
// a tile having OUTPUTS / 2 gates and their ups.
template <bool GATED, int OUTPUTS, int TOKENS, int DEPTH, int STAGES, int WARPS_M, int WARPS_N, int WARPS, class T>
__device__ __forceinline__ void multiply(const bf16* w, const bf16* x, const bf16* bias, const T* residual, T* y, int m, int n, int k,
                                         int alignment) {
  constexpr int THREADS = WARPS * 32, STAGE = (OUTPUTS + TOKENS) * DEPTH, STEPS = DEPTH / 16;
  constexpr int MS = OUTPUTS / WARPS_M / 16, NS = TOKENS / WARPS_N / 8;
  static_assert(MS * WARPS_M * 16 == OUTPUTS && NS * WARPS_N * 8 == TOKENS && (NS == 1 || NS % 2 == 0), "whole fragments");
  DYNAMIC_SHARED(bf16, stages);  // [STAGES]: [OUTPUTS][DEPTH] of the weight, [TOKENS][DEPTH] of the tokens
  const Tile at = tile_at<GATED ? OUTPUTS / 2 : OUTPUTS, TOKENS>(blockIdx.x, m, n);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int m_warp = warp / WARPS_N * MS * 16, n_warp = warp % WARPS_N * NS * 8;
  const bool computes = warp < WARPS_M * WARPS_N;
  const int blocks = (k + DEPTH - 1) / DEPTH;
  auto load = [&](int block) {
    bf16* stage = stages + block % STAGES * STAGE;
    if constexpr (GATED) {
      constexpr int HALF = OUTPUTS / 2;
      load_tile<HALF, DEPTH, THREADS>(stage, w, at.output, n, block * DEPTH, k, alignment);
      load_tile<HALF, DEPTH, THREADS>(stage + HALF * DEPTH, w + static_cast<size_t>(n) * k, at.output, n, block * DEPTH, k, alignment);
    } else {
      load_tile<OUTPUTS, DEPTH, THREADS>(stage, w, at.output, n, block * DEPTH, k, alignment);
    }
    load_tile<TOKENS, DEPTH, THREADS>(stage + OUTPUTS * DEPTH, x, at.token, m, block * DEPTH, k, alignment);
  };
  uint32_t a[2][MS][4], b[2][NS][2];  // fragments of this step and of the next
  auto fragments = [&](bf16* stage, int step) {
#pragma unroll
    for (int i = 0; i < MS; i++)
      ldmatrix_x4(a[step % 2][i], chunk<DEPTH>(stage, m_warp + i * 16 + lane % 16, step * 2 + lane / 16));
    bf16* tokens = stage + OUTPUTS * DEPTH;
    if constexpr (NS == 1) {
      ldmatrix_x2(b[step % 2][0], chunk<DEPTH>(tokens, n_warp + lane % 8, step * 2 + lane / 8 % 2));
    } else {
#pragma unroll
      for (int j = 0; j < NS; j += 2) {
        uint32_t r[4];
        ldmatrix_x4(r, chunk<DEPTH>(tokens, n_warp + j * 8 + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
        b[step % 2][j][0] = r[0], b[step % 2][j][1] = r[1], b[step % 2][j + 1][0] = r[2], b[step % 2][j + 1][1] = r[3];
      }
    }
  };
  float sums[MS][NS][4] = {};
#pragma unroll
  for (int block = 0; block < STAGES - 1; block++) {
    if (block < blocks) load(block);
    cp_async_commit_group();
  }
  for (int block = 0; block < blocks; block++) {
    cp_async_wait_group<STAGES - 2>();
    __syncthreads();  // this stage has landed for all, and the one before it has been read by all
    if (block + STAGES - 1 < blocks) load(block + STAGES - 1);
    cp_async_commit_group();
    if (!computes) continue;
    bf16* stage = stages + block % STAGES * STAGE;
    fragments(stage, 0);
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      if (step + 1 < STEPS) fragments(stage, step + 1);
#pragma unroll
      for (int i = 0; i < MS; i++)
#pragma unroll
        for (int j = 0; j < NS; j++) mma_m16n8k16_bf16(sums[i][j], a[step % 2][i], b[step % 2][j]);
    }
  }
  // The stages' memory takes the sums, as many tokens at a time as fit.
  constexpr int FIT = STAGES * STAGE / 2 / STAGED_ROW<OUTPUTS>, STAGED = FIT >= TOKENS ? TOKENS : TOKENS / 2;
  static_assert(FIT >= STAGED, "half of the tokens fit");
  float* staged = reinterpret_cast<float*>(stages);
#pragma unroll
  for (int first = 0; first < TOKENS; first += STAGED) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < MS; i++)
#pragma unroll
      for (int j = 0; j < NS; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int output = m_warp + i * 16 + lane / 4 + e / 2 * 8, token = n_warp + j * 8 + lane % 4 * 2 + e % 2 - first;
          if (computes && token >= 0 && token < STAGED) staged[token * STAGED_ROW<OUTPUTS> + output] = sums[i][j][e];
        }
    __syncthreads();
    const Tile part = {at.output, at.token + first};
    if constexpr (GATED) {
      store_gated<OUTPUTS, STAGED, THREADS>(staged, threadIdx.x, part, bias, y, m, n);
    } else {
      store_staged<OUTPUTS, STAGED, THREADS>(staged, threadIdx.x, part, bias, residual, y, m, n);
    }
  }
}

// ---- kernels ----

// Grid: ceil(m / TOKENS) * ceil(n / OUTPUTS) blocks. Dynamic shared memory: STAGES * (OUTPUTS + TOKENS) * DEPTH * 2 bytes.
//
// w: [n, k]; x: [m, k]; bias: [n] or null; residual: [m, n] or null, may be y; y: [m, n]. `alignment`: 16, 8, 4 or 2, a number of
// bytes that the start of every row of w and x is a multiple of.
#define LINEAR_MMA_TO(name, T, WARPS, ...)                                                                                    \
  GLOBAL void __launch_bounds__(WARPS * 32) name(const bf16* w, const bf16* x, const bf16* bias, const T* residual, T* y, int m, \
                                                 int n, int k, int alignment) {                                            \
    multiply<false, __VA_ARGS__, WARPS, T>(w, x, bias, residual, y, m, n, k, alignment);                                    \
  }                                                                                                                        \
  KERNEL(name, WARPS * 32);

// w: [2 n, k], the gates before the ups; bias: [2 n] or null. Grid: ceil(m / TOKENS) * ceil(n / (OUTPUTS / 2)) blocks. Left alone,
// the compiler aims at more blocks on a multiprocessor, and spills.
#define LINEAR_MMA_GATED(name, WARPS, ...)                                                                                    \
  GLOBAL void __launch_bounds__(WARPS * 32, 8 / WARPS) name(const bf16* w, const bf16* x, const bf16* bias, bf16* y, int m, int n, int k, \
                                                 int alignment) {                                                          \
    multiply<true, __VA_ARGS__, WARPS, bf16>(w, x, bias, nullptr, y, m, n, k, alignment);                                   \
  }                                                                                                                        \
  KERNEL(name, WARPS * 32);

#define LINEAR_MMA(name, ...)                    \
  LINEAR_MMA_TO(name, bf16, __VA_ARGS__)        \
  LINEAR_MMA_TO(name##_f32, float, __VA_ARGS__) \
  LINEAR_MMA_GATED(name##_gated, __VA_ARGS__)

// Warps, outputs, tokens, depth of a stage, stages, warps along outputs and tokens. The sums of few tokens take no time; deep stages of
// few outputs keep enough bytes under way, and let a weight of two thousand outputs occupy every multiprocessor.
LINEAR_MMA(linear_mma_16x8, 4, 16, 8, 256, 4, 1, 1)
LINEAR_MMA(linear_mma_16x16, 4, 16, 16, 256, 4, 1, 2)
LINEAR_MMA(linear_mma_32x32, 4, 32, 32, 128, 4, 2, 2)
LINEAR_MMA(linear_mma_64x8, 4, 64, 8, 128, 4, 4, 1)
LINEAR_MMA(linear_mma_64x16, 4, 64, 16, 128, 4, 4, 1)
LINEAR_MMA(linear_mma_64x32, 4, 64, 32, 128, 4, 4, 1)
LINEAR_MMA(linear_mma_64x64, 4, 64, 64, 64, 4, 2, 2)
LINEAR_MMA(linear_mma_128x128, 8, 128, 128, 64, 3, 2, 4)
LINEAR_MMA(linear_mma_128x256, 8, 128, 256, 32, 4, 2, 4)
