// Draws the next token of each sequence from logits that softmax_blocks has gone through.
//
// The token is the first id, upwards, whose cumulative probability exceeds one uniform number, which depends on (seed, stream,
// position) alone. Temperature first, then top-k, then top-p of what that left, then min-p. Nothing is sorted: the smallest
// logit that is kept is found digit by digit, from histograms. Their bins are whole numbers, so that the order in which threads
// add to them does not matter; so every result depends on the row alone.
#include <cfloat>
#include <climits>

#include "include/philox.cuh"
#include "include/softmax.cuh"

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / WARP_LANES;
constexpr int DIGIT_BITS = 11;
constexpr int BINS = 1 << DIGIT_BITS;
constexpr float QUANTA = 0x1p44f;  // of weight 1 in histograms: the weights of 2^19 ids add up to less than 2^64
constexpr unsigned NO_SAMPLE = ~0u;

// A row of logits, and what softmax_blocks found out about it.
struct Row {
  const float* logits;
  const unsigned* forbidden;
  const float* tops;  // the largest allowed logit of each block of ids; shared memory
  int vocabulary, blocks;
  LogSumExp lse;
};

// What is kept: logits above x, and of those equal to it the ids up to `last`.
struct Cut {
  float x;
  int last;
  __device__ __forceinline__ bool keeps(float logit, int id) const { return logit > x || (logit == x && id <= last); }
};

// ---- finding a place in a cumulative sum, by one warp ----

struct Place {
  int index;
  double rest;  // what is left of the sum at the beginning of the place
};

// The sum over the lanes below.
template <class T>
__device__ __forceinline__ T prefix(T own, int lane) {
  T upto = own;
#pragma unroll
  for (int d = 1; d < WARP_LANES; d *= 2) {
    const T below = __shfl_up_sync(~0u, upto, d);
    if (lane >= d) upto += below;
  }
  const T below = __shfl_up_sync(~0u, upto, 1);
  return lane ? below : 0;
}

// The first of n places whose cumulative size exceeds `rest`, else the last one with any size. All lanes get the result.
template <class F>
__device__ __forceinline__ Place find(int n, F size, double rest) {
  const int lane = threadIdx.x % WARP_LANES, each = (n + WARP_LANES - 1) / WARP_LANES;
  const int begin = lane * each, end = begin + each < n ? begin + each : n;
  double own = 0.0;
  for (int i = begin; i < end; i++) own += static_cast<double>(size(i));
  const double below = prefix(own, lane);
  const unsigned with_size = __ballot_sync(~0u, own > 0.0), past = __ballot_sync(~0u, own > 0.0 && below + own > rest);
  const int at = past ? __ffs(past) - 1 : with_size ? 31 - __clz(with_size) : 0;
  Place place = {begin, rest - below};
  double left = place.rest;
  for (int i = begin; lane == at && i < end; i++) {
    const double s = static_cast<double>(size(i));
    if (!(s > 0.0)) continue;
    place = {i, left};
    if (left < s) break;
    left -= s;
  }
  return {__shfl_sync(~0u, place.index, at), __shfl_sync(~0u, place.rest, at)};
}

// ---- going through a row, by all warps ----

// Calls f(x, id) for the allowed ids with a logit of at least `floor`, a warp a block of ids.
template <class F>
__device__ __forceinline__ void each_from(const Row& row, float floor, F f) {
  for (int b = threadIdx.x / WARP_LANES; b < row.blocks; b += WARPS) {
    if (row.tops[b] < floor) continue;
    float x[LANE_IDS];
    load_block(x, row.logits, row.forbidden, b, row.vocabulary, row.vocabulary % 4 == 0);
#pragma unroll
    for (int i = 0; i < LANE_IDS; i++)
      if (x[i] >= floor) f(x[i], lane_id(b, i));
  }
}

// masses[b] = the sum of f(x, id) over block b's allowed ids with a logit of at least `floor`.
template <class F>
__device__ __forceinline__ void block_masses(const Row& row, float floor, double* masses, F f) {
  for (int b = threadIdx.x / WARP_LANES; b < row.blocks; b += WARPS) {
    float sum = 0.0f;
    if (row.tops[b] >= floor) {
      float x[LANE_IDS];
      load_block(x, row.logits, row.forbidden, b, row.vocabulary, row.vocabulary % 4 == 0);
#pragma unroll
      for (int i = 0; i < LANE_IDS; i++) sum += x[i] >= floor ? f(x[i], lane_id(b, i)) : 0.0f;
      sum = warp_sum(sum);
    }
    if (threadIdx.x % WARP_LANES == 0) masses[b] = sum;
  }
  __syncthreads();
}

__device__ __forceinline__ double warp_total(const double* masses, int n) {
  double sum = 0.0;
  for (int i = threadIdx.x % WARP_LANES; i < n; i += WARP_LANES) sum += masses[i];
  return warp_sum(sum);
}

// The id at which the cumulative sum of f(x, id) exceeds `rest`, given each block's masses. By one warp.
template <class F>
__device__ __forceinline__ int find_id(const Row& row, const double* masses, double rest, F f) {
  const Place block = find(row.blocks, [&](int b) { return masses[b]; }, rest);
  const int first = block.index * BLOCK_IDS, left = row.vocabulary - first;
  const auto size = [&](int i) { return f(allowed_logit(row.logits, row.forbidden, first + i), first + i); };
  return first + find(left < BLOCK_IDS ? left : BLOCK_IDS, size, block.rest).index;
}

// ---- truncation ----

// How far a logit lies below another in the order of f32 numbers, equal ones at zero.
__device__ __forceinline__ unsigned order(float x) {
  const unsigned bits = __float_as_uint(x + 0.0f);  // -0 is 0
  return bits >> 31 ? ~bits : bits | 1u << 31;
}
__device__ __forceinline__ float of_order(unsigned n) { return __uint_as_float(n >> 31 ? n & ~(1u << 31) : ~n); }

// The cut that leaves the fewest of the largest that `from` keeps whose sizes reach `target`; `from` if together they don't.
// A size is 1, or where `by_mass` the weight in quanta. By all threads.
__device__ __forceinline__ Cut largest_that_reach(unsigned long long target, bool by_mass, const Row& row, Cut from, double* masses) {
  SHARED(unsigned long long, bins, [BINS]);
  SHARED(unsigned long long, warp_sums, [WARPS]);
  SHARED(unsigned long long, before_digit, [1]);  // what lies before the bin of the cut
  SHARED(int, digit, [1]);
  const auto size = [&](float x) { return by_mass ? static_cast<unsigned long long>(row.lse.weight(x) * QUANTA) : 1ull; };
  const int lane = threadIdx.x % WARP_LANES, warp = threadIdx.x / WARP_LANES;
  const unsigned top = order(row.lse.max), depth = top - order(from.x);
  // The cut is among the 2^width numbers from `low` on, counted downwards from the largest logit; `before` is the size above.
  unsigned low = 0;
  unsigned long long before = 0, equals = 0;
  int width = depth ? 32 - __clz(depth) : 1;
  if (target == 0) target = 1;  // something is always kept
  while (width > 0) {
    const int shift = width > DIGIT_BITS ? width - DIGIT_BITS : 0;
    for (int i = threadIdx.x; i < BINS; i += THREADS) bins[i] = 0;
    if (threadIdx.x == 0) digit[0] = -1;
    __syncthreads();
    each_from(row, from.x, [&](float x, int id) {
      const unsigned d = top - order(x) - low;
      if (static_cast<unsigned long long>(d) < 1ull << width && from.keeps(x, id)) atomicAdd(&bins[d >> shift], size(x));
    });
    __syncthreads();
    constexpr int EACH = BINS / THREADS;
    unsigned long long own = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) own += bins[threadIdx.x * EACH + i];
    unsigned long long start = before + prefix(own, lane);
    if (lane == WARP_LANES - 1) warp_sums[warp] = start + own - before;
    __syncthreads();
    for (int w = 0; w < warp; w++) start += warp_sums[w];
    if (start < target && start + own >= target) {  // at most one thread's
      int i = threadIdx.x * EACH;
      while (start + bins[i] < target) start += bins[i++];
      digit[0] = i;
      before_digit[0] = start;
    }
    __syncthreads();
    const int found = digit[0];
    before = before_digit[0];
    equals = found < 0 ? 0 : bins[found];
    __syncthreads();  // the next digit writes again
    if (found < 0) return from;
    low += static_cast<unsigned>(found) << shift;
    width = shift;
  }
  const float x = of_order(top - low);
  const unsigned long long each = size(x), needed = (target - before + each - 1) / each;
  if (needed * each >= equals) return {x, from.x == x ? from.last : INT_MAX};
  // Of equal logits the lower ids stay.
  const auto is_equal = [&](float logit, int id) { return logit == x && from.keeps(logit, id) ? 1.0f : 0.0f; };
  block_masses(row, x, masses, is_equal);
  const int last = find_id(row, masses, static_cast<double>(needed) - 0.5, is_equal);  // every warp by itself
  __syncthreads();  // the masses are written again
  return {x, last};
}

// The k-th largest of the blocks' largest logits: k blocks have a logit of at least that, so k ids have. -inf where there are
// fewer blocks. By all threads.
__device__ __forceinline__ float floor_of_top_k(const Row& row, unsigned top_k) {
  SHARED(float, found, [1]);
  if (top_k > static_cast<unsigned>(row.blocks)) return -INFINITY;
  for (int b = threadIdx.x; b < row.blocks; b += THREADS) {
    unsigned rank = 0;
    for (int other = 0; other < row.blocks; other++)
      rank += row.tops[other] > row.tops[b] || (row.tops[other] == row.tops[b] && other < b);
    if (rank == top_k - 1) found[0] = row.tops[b];
  }
  __syncthreads();
  return found[0];
}

// The logit whose weight that is, and some room for rounding.
__device__ __forceinline__ float floor_of_weight(const LogSumExp& lse, float weight) {
  const float floor = lse.max + fminf(logf(weight), 0.0f) / lse.inv_t;
  return floor - 1e-3f * (1.0f + fabsf(floor));
}

// What top-k and top-p keep; -inf is never kept. By all threads.
__device__ __forceinline__ Cut cut_of(const Row& row, unsigned top_k, float top_p, double* masses) {
  Cut cut = {-FLT_MAX, INT_MAX};
  double whole = row.lse.total;
  const bool by_count = top_k > 0 && top_k < static_cast<unsigned>(row.vocabulary);
  if (by_count) {
    cut.x = fmaxf(cut.x, floor_of_top_k(row, top_k));
    cut = largest_that_reach(top_k, false, row, cut, masses);
  }
  if (!(top_p < 1.0f)) return cut;
  top_p = fmaxf(top_p, 0.0f);
  if (by_count) {
    block_masses(row, cut.x, masses, [&](float x, int id) { return cut.keeps(x, id) ? row.lse.weight(x) : 0.0f; });
    whole = warp_total(masses, row.blocks);
    __syncthreads();  // the masses are written again
  } else {
    // If all ids below this together weigh less than 1 - top_p of the whole, the nucleus is above it.
    const double spare = (1.0 - top_p) * whole / row.vocabulary;
    cut.x = fmaxf(cut.x, floor_of_weight(row.lse, static_cast<float>(spare * 0.999)));
  }
  return largest_that_reach(static_cast<unsigned long long>(ceil(top_p * whole * QUANTA)), true, row, cut, masses);
}

// ---- the kernel ----

// The first allowed id whose logit is the largest. By one warp.
__device__ __forceinline__ int first_of_largest(const Row& row) {
  const int lane = threadIdx.x % WARP_LANES;
  int block = 0;
  for (int from = 0; from < row.blocks; from += WARP_LANES) {
    const unsigned at = __ballot_sync(~0u, from + lane < row.blocks && row.tops[from + lane] >= row.lse.max);
    if (at) {
      block = from + __ffs(at) - 1;
      break;
    }
  }
  for (int from = block * BLOCK_IDS; from < row.vocabulary; from += WARP_LANES) {
    const int id = from + lane;
    const bool largest = id < row.vocabulary && allowed_logit(row.logits, row.forbidden, id) >= row.lse.max;
    const unsigned at = __ballot_sync(~0u, largest);
    if (at) return from + __ffs(at) - 1;
  }
  return 0;
}

// A number in [0, 1) of 53 bits.
__device__ __forceinline__ double uniform(uint64_t seed, uint64_t stream, uint32_t position) {
  const Random4 r = philox(position, static_cast<uint32_t>(stream), static_cast<uint32_t>(stream >> 32), 0, seed);
  return static_cast<double>((uint64_t{r.at[0]} << 32 | r.at[1]) >> 11) * 0x1p-53;
}

// Grid: one block a row. Dynamic shared memory: 12 bytes for each block of 1024 ids.
GLOBAL void __launch_bounds__(THREADS, 1)
sample(const float* logits,                    // [rows, vocabulary]
       const float* sums,                      // [rows, blocks, 2]: softmax_blocks'
       const float* temperature,               // [rows]; 0 is greedy
       const unsigned* top_k,                  // [rows]; 0 keeps all
       const float* top_p,                     // [rows]; 1 keeps all
       const float* min_p,                     // [rows]; 0 keeps all
       const unsigned long long* seed,         // [rows]
       const unsigned long long* stream_id,    // [rows]
       const unsigned* position,               // [rows]
       const unsigned* forbidden,              // [ceil(vocabulary / 32)]
       unsigned* tokens,                       // [rows]; NO_SAMPLE where the row is no distribution
       float* logps,                           // [rows]: at the temperature, before top-k, top-p and min-p; NaN with NO_SAMPLE
       int vocabulary) {
  DYNAMIC_SHARED(double, masses);
  const int r = blockIdx.x, blocks = softmax_blocks_of(vocabulary);
  float* tops = reinterpret_cast<float*>(masses + blocks);
  const float* row_sums = sums + static_cast<size_t>(r) * blocks * 2;
  const LogSumExp lse = log_sum_exp(row_sums, blocks, inverse_temperature(temperature[r]));
  if (!lse.finite()) {
    if (threadIdx.x == 0) {
      tokens[r] = NO_SAMPLE;
      logps[r] = NAN;
    }
    return;
  }
  for (int b = threadIdx.x; b < blocks; b += THREADS) {
    tops[b] = row_sums[2 * b];
    masses[b] = static_cast<double>(row_sums[2 * b + 1]) * static_cast<double>(block_scale(tops[b], lse.max, lse.inv_t));
  }
  __syncthreads();
  const Row row = {logits + static_cast<size_t>(r) * vocabulary, forbidden, tops, vocabulary, blocks, lse};
  const bool greedy = temperature[r] <= 0.0f;
  const bool truncated = (top_k[r] > 0 && top_k[r] < static_cast<unsigned>(vocabulary)) || top_p[r] < 1.0f || min_p[r] > 0.0f;
  Cut cut = {-FLT_MAX, INT_MAX};
  const float least = min_p[r] > 0.0f ? fminf(min_p[r], 1.0f) : 0.0f;
  const auto kept = [&](float x, int id) {
    const float weight = lse.weight(x);
    return cut.keeps(x, id) && weight >= least ? weight : 0.0f;
  };
  if (truncated && !greedy) {
    cut = cut_of(row, top_k[r], top_p[r], masses);
    block_masses(row, fmaxf(cut.x, floor_of_weight(lse, least)), masses, kept);
  }
  if (threadIdx.x / WARP_LANES) return;
  int id;
  if (greedy) {
    id = first_of_largest(row);
  } else {
    id = find_id(row, masses, uniform(seed[r], stream_id[r], position[r]) * warp_total(masses, blocks), kept);
  }
  if (threadIdx.x) return;
  tokens[r] = id;
  logps[r] = lse.logp(row.logits[id]);
}
KERNEL(sample, THREADS);
