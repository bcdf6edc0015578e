// The vision tower's first product, straight from u8 pixels: rescale, normalise, cut into patches and multiply, in one pass.
//
// An image of patches of 14 x 14 pixels gives one row for each patch, in the order of 2 x 2 blocks (block row, block column, row in
// the block, column in the block). A weight's inputs are ordered (channel, frame, y, x). A still image fills both frames with the
// same pixels: a patch is loaded and normalised once, and multiplied with the weights of both.
//
// Images are described by a table, u32 [3, images]: the first row of each, the byte where its pixels begin, and its patches
// across, which are even. Pixels are RGB, rows top to bottom.
#include "include/ptx.cuh"
#include "include/reduce.cuh"
#include "include/vectors.cuh"

constexpr int PATCH = 14, CHANNELS = 3, FRAMES = 2, PLANE = PATCH * PATCH;
constexpr int INPUTS = CHANNELS * FRAMES * PLANE, VALUES = CHANNELS * PLANE;  // of a row of weights, and of one frame
constexpr int LINE = PATCH * CHANNELS;                                        // bytes of a patch's line
constexpr int STEP = 16, STEPS = (VALUES + STEP - 1) / STEP;                  // what mma.sync sums at a time
constexpr int ROW = STEPS * STEP;                                             // VALUES and what pads them

constexpr int THREADS = 256;
constexpr int BLOCKS = 2;                               // of a multiprocessor that has room for them
constexpr int TILE_M = 128, TILE_N = 128, STAGES = 3;   // patches, outputs, weights on their way
constexpr int WARP_M = 32, WARP_N = 64;                 // of a warp, in four rows of two
constexpr int PIXEL_BYTES = TILE_M * ROW, STAGE = TILE_N * FRAMES * STEP;
constexpr int OUT_STRIDE = TILE_N + 8;                  // rows of the finished tile fall into different banks
static_assert(PIXEL_BYTES + STAGES * STAGE * 2 <= 99 << 10, "shared memory that every card has");

constexpr int PATCHES_THREADS = 96;
constexpr int FRAMES_THREADS = 256;

// ---- kernels ----

// What makes a level (0 to 255) of each channel the value that the model knows: level * scale + shift.
struct Normal {
  float scale[CHANNELS], shift[CHANNELS];
};

// Where the pixels of row `row` begin, and the bytes from line to line. All lanes of a warp ask for the same row.
struct Source {
  const unsigned char* begin;
  size_t stride;
};

__device__ __forceinline__ Source find_patch(const unsigned char* pixels, const unsigned* table, int images, unsigned row) {
  int image = -1;
  for (int first = 0; first < images; first += WARP_LANES) {
    const int i = first + threadIdx.x % WARP_LANES;
    image += __popc(__ballot_sync(~0u, i < images && table[i] <= row));
  }
  const unsigned p = row - table[image], across = table[2 * images + image], block = p / 4;
  const size_t y = block / (across / 2) * 2 + p / 2 % 2, x = block % (across / 2) * 2 + p % 2, stride = across * LINE;
  return {pixels + table[images + image] + y * PATCH * stride + x * LINE, stride};
}

// The levels of TILE_M patches from row `first` on into `to` [TILE_M, ROW], in the order (channel, y, x). A warp takes two patches
// side by side: the pixels of both are 84 neighbouring bytes of each line, and a lane keeps four of them.
__device__ __forceinline__ void load_levels(unsigned char* to, const unsigned char* pixels, const unsigned* table, int images,
                                            int first, int rows) {
  const int warp = threadIdx.x / WARP_LANES, lane = threadIdx.x % WARP_LANES;
  int place[4];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const int byte = lane * 4 + j, in_line = byte % LINE;
    place[j] = byte / LINE * ROW + in_line % CHANNELS * PLANE + in_line / CHANNELS;
  }
  for (int m = warp * 2; m < TILE_M && first + m < rows; m += THREADS / WARP_LANES * 2) {
    const auto [begin, stride] = find_patch(pixels, table, images, first + m);
    if (lane >= 2 * LINE / 4) continue;
    const unsigned char* from = begin + lane * 4;
    unsigned char* patches = to + m * ROW;
    unsigned words[PATCH];
    if (reinterpret_cast<uintptr_t>(from) % 4 == 0) {
#pragma unroll
      for (int y = 0; y < PATCH; y++) words[y] = *reinterpret_cast<const unsigned*>(from + y * stride);
    } else {
#pragma unroll
      for (int y = 0; y < PATCH; y++) {
        const unsigned char* line = from + y * stride;
        words[y] = line[0] | line[1] << 8 | line[2] << 16 | static_cast<unsigned>(line[3]) << 24;
      }
    }
#pragma unroll
    for (int y = 0; y < PATCH; y++)
#pragma unroll
      for (int j = 0; j < 4; j++) patches[place[j] + y * PATCH] = static_cast<unsigned char>(words[y] >> 8 * j);
  }
}

// Sixteen bytes of a stage of weights [TILE_N, FRAMES, STEP]: the halves of an output's step for each frame, exchanged so that eight
// rows are in different banks.
__device__ __forceinline__ bf16* weights(bf16* stage, int n, int frame, int half) {
  return stage + n * FRAMES * STEP + ((frame * 2 + half) ^ (n / 2 % 4)) * 8;
}

// out[row] = w patch(row). Grid: x over ceil(rows / TILE_M), y over ceil(n / TILE_N). Dynamic shared memory: PIXEL_BYTES and the
// stages, 100,352 bytes. Steps ascend, the first frame of a step before the second.
GLOBAL void __launch_bounds__(THREADS, BLOCKS)
patch_embed_forward(const unsigned char* pixels,
                    const unsigned* table,  // [3, images]
                    const bf16* w,          // [n, INPUTS], aligned to 8 bytes
                    bf16* out,              // [rows, n]
                    int images, int rows, int n, float red_scale, float green_scale, float blue_scale, float red_shift,
                    float green_shift, float blue_shift) {
  DYNAMIC_SHARED(unsigned char, shared);
  unsigned char* levels = shared;
  bf16* stages = reinterpret_cast<bf16*>(shared + PIXEL_BYTES);
  const Normal normal = {{red_scale, green_scale, blue_scale}, {red_shift, green_shift, blue_shift}};
  const int warp = threadIdx.x / WARP_LANES, lane = threadIdx.x % WARP_LANES;
  const int m_warp = warp / 2 * WARP_M, n_warp = warp % 2 * WARP_N;
  const int first_m = blockIdx.x * TILE_M, first_n = blockIdx.y * TILE_N;

  // Four weights at a time, eight bytes: as many divide a plane, and a row is aligned to no more.
  const int quad = threadIdx.x % 4, frame = threadIdx.x / 4 % FRAMES;
  auto load = [&](int step) {
    const int k = step * STEP + quad * 4;
    for (int row = threadIdx.x / 8; row < TILE_N; row += THREADS / 8) {
      const bool there = k < VALUES && first_n + row < n;
      const bf16* from = there ? w + static_cast<size_t>(first_n + row) * INPUTS + (k / PLANE + frame) * PLANE + k : w;
      bf16* to = weights(stages + step % STAGES * STAGE, row, frame, quad / 2) + quad % 2 * 4;
      cp_async<8>(to, from, there ? 8 : 0);
    }
  };
  for (int step = 0; step < STAGES - 1; step++) {
    load(step);
    cp_async_commit_group();
  }
  load_levels(levels, pixels, table, images, first_m, rows);

  float sums[WARP_M / 16][WARP_N / 8][4] = {};
  for (int step = 0; step < STEPS; step++) {
    cp_async_wait_group<STAGES - 2>();
    __syncthreads();
    if (step + STAGES - 1 < STEPS) load(step + STAGES - 1);
    cp_async_commit_group();
    unsigned a[WARP_M / 16][4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      // Neighbours are of one channel: a plane is even.
      const int k = step * STEP + half * 8 + lane % 4 * 2;
      const bool red = k < PLANE, green = k < 2 * PLANE;
      const float scale = red ? normal.scale[0] : green ? normal.scale[1] : normal.scale[2];
      const float shift = red ? normal.shift[0] : green ? normal.shift[1] : normal.shift[2];
#pragma unroll
      for (int i = 0; i < WARP_M / 8; i++) {
        const unsigned char* at = levels + (m_warp + i * 8 + lane / 4) * ROW + k;
        const unsigned pair = *reinterpret_cast<const unsigned short*>(at);
        const float low = static_cast<float>(pair & 0xFF), high = static_cast<float>(pair >> 8);
        a[i / 2][half * 2 + i % 2] = cvt_bf16x2(fmaf(low, scale, shift), fmaf(high, scale, shift));
      }
    }
    bf16* stage = stages + step % STAGES * STAGE;
#pragma unroll
    for (int f = 0; f < FRAMES; f++)
#pragma unroll
      for (int j = 0; j < WARP_N / 16; j++) {
        unsigned b[4];
        ldmatrix_x4(b, weights(stage, n_warp + j * 16 + lane % 8 + lane / 16 * 8, f, lane / 8 % 2));
#pragma unroll
        for (int i = 0; i < WARP_M / 16; i++)
#pragma unroll
          for (int side = 0; side < 2; side++) {
            const unsigned part[2] = {b[side * 2], b[side * 2 + 1]};
            mma_m16n8k16_bf16(sums[i][j * 2 + side], a[i], part);
          }
      }
  }

  // Through shared memory, where the levels were, so that whole rows are stored.
  __syncthreads();
  bf16* tile = reinterpret_cast<bf16*>(shared);
#pragma unroll
  for (int i = 0; i < WARP_M / 16; i++)
#pragma unroll
    for (int j = 0; j < WARP_N / 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        bf16* to = tile + (m_warp + i * 16 + lane / 4 + e / 2 * 8) * OUT_STRIDE + n_warp + j * 8 + lane % 4 * 2;
        *reinterpret_cast<uint32_t*>(to) = cvt_bf16x2(sums[i][j][e], sums[i][j][e + 1]);
      }
  __syncthreads();
  const bool aligned = n % 8 == 0 && aligned16(out);
  for (int i = threadIdx.x; i < TILE_M * TILE_N / 8; i += THREADS) {
    const int m = i / (TILE_N / 8), c = i % (TILE_N / 8) * 8;
    if (first_m + m >= rows || first_n + c >= n) continue;
    float v[8];
    load8(v, tile + m * OUT_STRIDE, c, TILE_N, true);
    store8(out + static_cast<size_t>(first_m + m) * n + first_n, c, n - first_n, aligned, v);
  }
}
KERNEL(patch_embed_forward, THREADS);

// One frame of each patch as the product above sees it, for the weight's gradient: normalised, rounded, padded with zeros. Grid: one
// block a row.
GLOBAL void __launch_bounds__(PATCHES_THREADS)
patch_embed_patches(const unsigned char* pixels,
                    const unsigned* table,  // [3, images]
                    bf16* patches,          // [rows, ROW]: the rows from `first` on
                    int images, int first, float red_scale, float green_scale, float blue_scale, float red_shift,
                    float green_shift, float blue_shift) {
  const Normal normal = {{red_scale, green_scale, blue_scale}, {red_shift, green_shift, blue_shift}};
  const auto [begin, stride] = find_patch(pixels, table, images, first + blockIdx.x);
  const int k = threadIdx.x * 8;
  if (k >= ROW) return;
  float v[8];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int channel = (k + i) / PLANE, y = (k + i) % PLANE / PATCH, x = (k + i) % PATCH;
    const bool red = channel == 0, green = channel == 1;
    const float scale = red ? normal.scale[0] : green ? normal.scale[1] : normal.scale[2];
    const float shift = red ? normal.shift[0] : green ? normal.shift[1] : normal.shift[2];
    v[i] = k + i < VALUES ? fmaf(static_cast<float>(begin[y * stride + x * CHANNELS + channel]), scale, shift) : 0.0f;
  }
  store8(patches + static_cast<size_t>(blockIdx.x) * ROW, k, ROW, true, v);
}
KERNEL(patch_embed_patches, PATCHES_THREADS);

// dw += the gradient of one frame's weights, for both: they see the same pixels. Grid: n * INPUTS threads.
GLOBAL void __launch_bounds__(FRAMES_THREADS)
patch_embed_add_frames(const float* frame,  // [n, ROW]
                       float* dw,           // [n, INPUTS]
                       int n) {
  const unsigned i = blockIdx.x * FRAMES_THREADS + threadIdx.x, row = i / INPUTS, k = i % INPUTS;
  if (row >= static_cast<unsigned>(n)) return;
  dw[i] += frame[static_cast<size_t>(row) * ROW + k / (FRAMES * PLANE) * PLANE + k % PLANE];
}
KERNEL(patch_embed_add_frames, FRAMES_THREADS);
