// The first pass over logits, which the loss and the sampler share: one read, one exponential for each.
#include "include/softmax.cuh"

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / WARP_LANES;

// ---- kernels ----

// Each block of 1024 ids of each run (a row at a temperature). Grid: (runs, ceil(blocks / 4)), a warp a block.
GLOBAL void __launch_bounds__(THREADS)
softmax_blocks(const float* logits,        // [rows, vocabulary]
               const unsigned* row,        // [runs]: first_row + its row, or null: run r has row r
               const float* temperature,   // [runs]; 0 as 1
               const unsigned* forbidden,  // [ceil(vocabulary / 32)]: bit id % 32 of word id / 32
               float* sums,                // [runs, blocks, 2]: the largest logit, the sum of exp((x - largest) / T)
               float* moments,             // [runs, blocks]: the sum of z exp(z), z = (x - largest) / T; or null
               int first_row, int vocabulary) {
  const int run = blockIdx.x, block = blockIdx.y * WARPS + threadIdx.x / WARP_LANES, blocks = softmax_blocks_of(vocabulary);
  if (block >= blocks) return;
  const size_t r = row ? row[run] - first_row : run;
  float x[LANE_IDS];
  load_block(x, logits + r * vocabulary, forbidden, block, vocabulary, vocabulary % 4 == 0);
  const BlockSums of = block_sums(x, inverse_temperature(temperature[run]));
  if (threadIdx.x % WARP_LANES) return;
  const size_t at = static_cast<size_t>(run) * blocks + block;
  sums[2 * at] = of.max;
  sums[2 * at + 1] = of.sum;
  if (moments) moments[at] = of.moment;
}
KERNEL(softmax_blocks, THREADS);
