// Losses on the log-probabilities of chosen tokens, from logits that softmax_blocks has gone through, and their gradients.
//
// An entry scores one token by one row of logits at one temperature. Entries are sorted by row, then by temperature, then by
// number: the entries of one row at one temperature are a run, and a run's log-sum-exp is taken once. For entry e with target y,
// logp = x_y / T - ln(sum exp(x / T)) over the ids that are not forbidden; the total loss is the sum of weight * loss, with
//   loss = -logp, or
//   loss = -min(r A, clip(r, 1 - low, 1 + high) A) + beta (exp(d) - d - 1), r = exp(logp - old_logp), d = ref_logp - logp.
#include "include/softmax.cuh"

constexpr int THREADS = 128;  // of the kernels that give a warp to each run
constexpr int WARPS = THREADS / WARP_LANES;
constexpr int GRADIENT_THREADS = 512;
constexpr int GRADIENT_STEP = GRADIENT_THREADS * 8;  // ids that a block takes at a time, eight a thread

// ---- log-probabilities ----

__device__ __forceinline__ float target_logp(const LogSumExp& lse, const float* row, const unsigned* forbidden, unsigned target) {
  return is_forbidden(forbidden, target) ? -INFINITY : lse.logp(row[target]);
}

// The log-probability of each entry's target, and the entropy of its distribution. Grid: ceil(runs / 4), a warp a run.
GLOBAL void __launch_bounds__(THREADS)
loss_logprobs(const float* logits,           // [rows, vocabulary]
              const float* sums,             // [runs, blocks, 2]: softmax_blocks'
              const float* moments,          // [runs, blocks], or null without entropy
              const unsigned* run_row,       // [runs]: first_row + the run's row
              const float* run_temperature,  // [runs]
              const unsigned* run_start,     // [runs + 1]: the run's entries are order[run_start[r]], .. before the next run's
              const unsigned* order,         // [n]: entries, sorted
              const unsigned* targets,       // [n]
              const unsigned* forbidden,     // [ceil(vocabulary / 32)]
              float* logp,                   // [n]
              float* entropies,              // [n] or null
              int runs, int first_row, int vocabulary) {
  const int run = blockIdx.x * WARPS + threadIdx.x / WARP_LANES, blocks = softmax_blocks_of(vocabulary);
  if (run >= runs) return;
  const float* run_sums = sums + static_cast<size_t>(run) * blocks * 2;
  const LogSumExp lse = log_sum_exp(run_sums, blocks, inverse_temperature(run_temperature[run]));
  const float nats = entropies ? entropy(run_sums, moments + static_cast<size_t>(run) * blocks, blocks, lse) : 0.0f;
  const float* row = logits + static_cast<size_t>(run_row[run] - first_row) * vocabulary;
  for (unsigned at = run_start[run] + threadIdx.x % WARP_LANES; at < run_start[run + 1]; at += WARP_LANES) {
    const unsigned e = order[at];
    logp[e] = target_logp(lse, row, forbidden, targets[e]);
    if (entropies) entropies[e] = nats;
  }
}
KERNEL(loss_logprobs, THREADS);

// ---- losses ----

struct Term {
  double loss, slope, ratio, kl;  // slope: d loss / d logp
  bool clipped;
};

__device__ __forceinline__ Term clipped_policy_gradient(double logp, double old_logp, double advantage, double low, double high) {
  const double ratio = exp(logp - old_logp), plain = ratio * advantage;
  const double bounded = (ratio < low ? low : ratio > high ? high : ratio) * advantage;
  const bool clipped = bounded < plain;
  // Written so that a NaN stays one.
  return {clipped ? -bounded : -plain, clipped ? 0.0 : -plain, ratio, 0.0, clipped};
}

// What the gradient needs of a run: the log-softmax, and d(total loss) / d(x_j / T) for the logit of a target, over T.
struct alignas(16) RunGradient {
  float max, inv_t, log_sum;
  float slope;  // the sum over the run's entries
};

// The loss of each entry, and what loss_gradient needs. Grid: ceil(runs / 4), a warp a run.
GLOBAL void __launch_bounds__(THREADS)
loss_terms(const float* logits,           // [rows, vocabulary]
           const float* sums,             // [runs, blocks, 2]: softmax_blocks'
           const float* moments,          // [runs, blocks]
           const unsigned* run_row,       // [runs]: first_row + the run's row
           const float* run_temperature,  // [runs]
           const unsigned* run_start,     // [runs + 1]
           const unsigned* order,         // [n]
           const unsigned* targets,       // [n]
           const unsigned* forbidden,     // [ceil(vocabulary / 32)]
           const float* weight,           // [n]
           const float* old_logp,         // [n], or null for loss = -logp
           const float* advantage,        // [n] or null with old_logp
           const float* ref_logp,         // [n], or null without a reference
           float* logp,                   // [n]
           float* entropies,              // [n]
           float* loss,                   // [n], before the weight
           float* ratio,                  // [n]
           float* kl,                     // [n]
           float* clipped,                // [n]: 0 or 1
           float* run_gradient,           // [runs, 4]: RunGradient
           float* entry_gradient,         // [n, 2], in the order of `order`: the target's logit, the entry's slope
           int runs, int first_row, int vocabulary, float clip_low, float clip_high, float beta) {
  const int run = blockIdx.x * WARPS + threadIdx.x / WARP_LANES, blocks = softmax_blocks_of(vocabulary);
  if (run >= runs) return;
  const float* run_sums = sums + static_cast<size_t>(run) * blocks * 2;
  const LogSumExp lse = log_sum_exp(run_sums, blocks, inverse_temperature(run_temperature[run]));
  const float nats = entropy(run_sums, moments + static_cast<size_t>(run) * blocks, blocks, lse);
  const float* row = logits + static_cast<size_t>(run_row[run] - first_row) * vocabulary;
  const unsigned end = run_start[run + 1];
  float slopes = 0.0f;
  for (unsigned from = run_start[run]; from < end; from += WARP_LANES) {
    const unsigned at = from + threadIdx.x % WARP_LANES;
    float slope = 0.0f;
    if (at < end) {
      const unsigned e = order[at];
      const float lp = target_logp(lse, row, forbidden, targets[e]);
      Term t = {-static_cast<double>(lp), -1.0, 1.0, 0.0, false};
      if (old_logp) t = clipped_policy_gradient(lp, old_logp[e], advantage[e], 1.0 - clip_low, 1.0 + clip_high);
      if (ref_logp) {
        const double d = static_cast<double>(ref_logp[e]) - lp, k = exp(d);
        t.kl = k - d - 1.0;
        t.loss += beta * t.kl;
        t.slope += beta * (1.0 - k);
      }
      slope = static_cast<float>(t.slope * weight[e]) * lse.inv_t;
      logp[e] = lp;
      entropies[e] = nats;
      loss[e] = static_cast<float>(t.loss);
      ratio[e] = static_cast<float>(t.ratio);
      kl[e] = static_cast<float>(t.kl);
      clipped[e] = t.clipped ? 1.0f : 0.0f;
      entry_gradient[2 * static_cast<size_t>(at)] = row[targets[e]];
      entry_gradient[2 * static_cast<size_t>(at) + 1] = slope;
    }
    for (int lane = 0; lane < WARP_LANES; lane++) slopes += __shfl_sync(~0u, slope, lane);
  }
  if (threadIdx.x % WARP_LANES) return;
  store16(run_gradient + 4 * static_cast<size_t>(run), RunGradient{lse.max, lse.inv_t, lse.log_sum, slopes});
}
KERNEL(loss_terms, THREADS);

// ---- the gradient of the logits ----

// Replaces logits (-inf for forbidden ids) by -sum over the row's runs of slope * p.
template <int N>
__device__ __forceinline__ void softmax_gradient(float (&x)[N], const float* run_gradient, int runs) {
  float d[N] = {};
  for (int r = 0; r < runs; r++) {
    const RunGradient of = load16<RunGradient>(run_gradient + 4 * static_cast<size_t>(r));
#pragma unroll
    for (int i = 0; i < N; i++) d[i] = fmaf(-of.slope, expf(fmaf(x[i] - of.max, of.inv_t, -of.log_sum)), d[i]);
  }
#pragma unroll
  for (int i = 0; i < N; i++) x[i] = d[i];
}

// d(total loss) / d(logits) in bf16, in the place of the logits: row r of it begins where row r of the logits does, and takes
// half as many bytes. Grid: one block a row.
//
// In place because logits are the largest thing in memory here. Ids go upwards, a step of them is read by all threads before any
// of it is written, and what a step writes lies in what this step and earlier ones have read. A target's gradient is a small
// difference of large numbers, p - 1 next to 1: it is rounded once, from f32, when all else is written.
GLOBAL void __launch_bounds__(GRADIENT_THREADS)
loss_gradient(const float* logits,          // [rows, vocabulary]
              bf16* gradient,               // [rows, 2 vocabulary], the same memory; the first half of each row is written
              const unsigned* row_start,    // [rows + 1]: first_run + the row's first run
              const unsigned* run_start,    // [runs + 1]
              const unsigned* order,        // [n]
              const unsigned* targets,      // [n]
              const unsigned* forbidden,    // [ceil(vocabulary / 32)]
              const float* run_gradient,    // [runs, 4]: loss_terms'
              const float* entry_gradient,  // [n, 2]: loss_terms'
              int first_run, int vocabulary) {
  const unsigned first = row_start[blockIdx.x] - first_run, end = row_start[blockIdx.x + 1] - first_run;
  const float* x = logits + static_cast<size_t>(blockIdx.x) * vocabulary;
  bf16* dx = gradient + static_cast<size_t>(blockIdx.x) * 2 * vocabulary;
  const float* runs = run_gradient + 4 * static_cast<size_t>(first);
  const bool aligned = vocabulary % 4 == 0 && aligned16(logits);
  for (int from = 0; from < vocabulary; from += GRADIENT_STEP) {
    const int id = from + threadIdx.x * 8;
    float v[8];
    if (id < vocabulary) {
      load8(v, x, id, vocabulary, aligned);
      const unsigned bits = forbidden[id / WORD_IDS] >> (id % WORD_IDS);
#pragma unroll
      for (int i = 0; i < 8; i++)
        if (bits >> i & 1) v[i] = -INFINITY;
      softmax_gradient(v, runs, end - first);
    }
    __syncthreads();
    if (id < vocabulary) store8(dx, id, vocabulary, aligned, v);
  }
  __syncthreads();
  const unsigned entries = run_start[first], entries_end = run_start[end];
  for (unsigned at = entries + threadIdx.x; at < entries_end; at += GRADIENT_THREADS) {
    const unsigned target = targets[order[at]];
    bool taken = false;  // by an earlier entry of the row with the same target
    for (unsigned other = entries; other < at; other++) taken |= targets[order[other]] == target;
    if (taken) continue;
    float d[1] = {is_forbidden(forbidden, target) ? -INFINITY : entry_gradient[2 * static_cast<size_t>(at)]};
    softmax_gradient(d, runs, end - first);
    for (unsigned other = at; other < entries_end; other++)
      if (targets[order[other]] == target) d[0] += entry_gradient[2 * static_cast<size_t>(other) + 1];
    dx[target] = to_bf16(d[0]);
  }
}
KERNEL(loss_gradient, GRADIENT_THREADS);
