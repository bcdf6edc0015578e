// The log-sum-exp of a row of logits, over the ids that may be sampled. The sampler and the loss both take their
// log-probabilities from here, which makes them equal bit for bit.
//
// A row is cut into blocks of 1024 ids. A warp reads a block once and leaves its largest logit and the sum of exp((x - largest)
// / T); the blocks are put together in a fixed order. Nothing depends on what else is in the batch.
#pragma once
#include "reduce.cuh"
#include "vectors.cuh"

constexpr int BLOCK_IDS = 1024;
constexpr int LANE_IDS = BLOCK_IDS / WARP_LANES;
constexpr int WORD_IDS = 32;  // ids per word of the forbidden set

__host__ __device__ constexpr int softmax_blocks_of(int vocabulary) { return (vocabulary + BLOCK_IDS - 1) / BLOCK_IDS; }

// One over the temperature at which log-probabilities are taken; greedy decoding (0) is scored at 1.
__device__ __forceinline__ float inverse_temperature(float t) { return 1.0f / (t > 0.0f ? t : 1.0f); }

__device__ __forceinline__ bool is_forbidden(const unsigned* forbidden, int id) {
  return forbidden[id / WORD_IDS] >> (id % WORD_IDS) & 1;
}

// The logit of one id, -inf if it is forbidden.
__device__ __forceinline__ float allowed_logit(const float* row, const unsigned* forbidden, int id) {
  return is_forbidden(forbidden, id) ? -INFINITY : row[id];
}

// The id of element i of this lane, as load_block places them: four ids side by side, 16 bytes, every 128 ids.
__device__ __forceinline__ int lane_id(int block, int i) {
  return block * BLOCK_IDS + i / 4 * (4 * WARP_LANES) + threadIdx.x % WARP_LANES * 4 + i % 4;
}

// A block's logits, 32 a lane, -inf for ids that are forbidden or past the end. `aligned`: rows start at multiples of 16
// bytes. By whole warps.
__device__ __forceinline__ void load_block(float (&x)[LANE_IDS], const float* row, const unsigned* forbidden, int block,
                                           int vocabulary, bool aligned) {
#pragma unroll
  for (int i = 0; i < LANE_IDS; i += 4) {
    const int id = lane_id(block, i);
    if (aligned && id + 4 <= vocabulary) {
      const f32x4 v = load16<f32x4>(row + id);
#pragma unroll
      for (int e = 0; e < 4; e++) x[i + e] = v.at[e];
    } else {
#pragma unroll
      for (int e = 0; e < 4; e++) x[i + e] = id + e < vocabulary ? row[id + e] : -INFINITY;
    }
  }
  const int lane = threadIdx.x % WARP_LANES, at = block * (BLOCK_IDS / WORD_IDS) + lane;
  const unsigned word = at < (vocabulary + WORD_IDS - 1) / WORD_IDS ? forbidden[at] : 0;
  if (!__any_sync(~0u, word != 0)) return;
#pragma unroll
  for (int i = 0; i < LANE_IDS; i += 4) {
    const unsigned bits = __shfl_sync(~0u, word, i + lane / 8) >> (lane % 8 * 4);
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (bits >> e & 1) x[i + e] = -INFINITY;
  }
}

// What exponents are taken from: the largest logit, but never -inf, which would make NaN of a row or block without any.
__device__ __forceinline__ float origin(float largest) { return largest == -INFINITY ? 0.0f : largest; }

struct BlockSums {
  float max;     // the largest logit; NaN is passed over, it shows in the sum
  float sum;     // of exp(z), z = (x - max) / T
  float moment;  // of z exp(z)
};

// All lanes get the result.
__device__ __forceinline__ BlockSums block_sums(const float (&x)[LANE_IDS], float inv_t) {
  float largest = -INFINITY, sum = 0.0f, moment = 0.0f;
#pragma unroll
  for (int i = 0; i < LANE_IDS; i++) largest = fmaxf(largest, x[i]);
  largest = warp_max(largest);
#pragma unroll
  for (int i = 0; i < LANE_IDS; i++) {
    const float z = (x[i] - origin(largest)) * inv_t, e = expf(z);
    sum += e;
    moment = fmaf(e, fmaxf(z, -100.0f), moment);  // bounded: where e is zero z may be -inf
  }
  return {largest, warp_sum(sum), warp_sum(moment)};
}

// The log-softmax of a row at a temperature.
struct LogSumExp {
  float max;      // the largest allowed logit
  float inv_t;    // one over the temperature
  float log_sum;  // ln(total); not finite if a logit is NaN or +inf, or no id is allowed
  double total;   // the sum of exp((x - max) / T)

  // Of an allowed id with logit x.
  __device__ __forceinline__ float logp(float x) const { return fmaf(x - max, inv_t, -log_sum); }
  // exp((x - max) / T)
  __device__ __forceinline__ float weight(float x) const { return expf((x - max) * inv_t); }
  __device__ __forceinline__ bool finite() const { return fabsf(log_sum) < INFINITY; }
};

// What a block's sum is multiplied by to count from the row's largest logit.
__device__ __forceinline__ float block_scale(float block_max, float max, float inv_t) {
  return expf((block_max - origin(max)) * inv_t);
}

// `sums` [blocks][2]: largest logit and sum of each block. By whole warps; all lanes get the result.
__device__ __forceinline__ LogSumExp log_sum_exp(const float* sums, int blocks, float inv_t) {
  float max = -INFINITY;
  for (int b = threadIdx.x % WARP_LANES; b < blocks; b += WARP_LANES) max = fmaxf(max, sums[2 * b]);
  max = warp_max(max);
  double total = 0.0;
  for (int b = threadIdx.x % WARP_LANES; b < blocks; b += WARP_LANES)
    total += static_cast<double>(sums[2 * b + 1]) * static_cast<double>(block_scale(sums[2 * b], max, inv_t));
  total = warp_sum(total);
  return {max, inv_t, static_cast<float>(log(total)), total};
}

// The entropy in nats, -sum p ln p, from each block's moment besides. By whole warps; all lanes get the result.
__device__ __forceinline__ float entropy(const float* sums, const float* moments, int blocks, const LogSumExp& lse) {
  double moment = 0.0;
  for (int b = threadIdx.x % WARP_LANES; b < blocks; b += WARP_LANES) {
    const float shift = fmaxf((sums[2 * b] - origin(lse.max)) * lse.inv_t, -100.0f);
    moment += static_cast<double>(block_scale(sums[2 * b], lse.max, lse.inv_t)) *
              (static_cast<double>(moments[b]) + static_cast<double>(shift) * static_cast<double>(sums[2 * b + 1]));
  }
  return static_cast<float>(log(lse.total) - warp_sum(moment) / lse.total);
}
