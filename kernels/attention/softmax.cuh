// The numbers of a cut of keys: shared by every kernel of the forward, so that all of them give the same bits.
//
// Scores are scaled by log2(e) too, so that powers are powers of two. A row's sum goes lane by lane over the keys of a page
// in ascending order, then over the pages, then over the four lanes.
#pragma once
#include "tiles.cuh"

// A row's largest score, times scale log2(e), and its sum of powers.
struct RowSum {
  float max, sum;
};

// The largest score as an exponent's offset: rows that see nothing of the cut have none.
__device__ __forceinline__ float offset_of(float max) { return max == -INFINITY ? 0.0f : max; }

// Hides the scores of keys that rows don't see: `visible` keys of the N from column `first` on, for rows lane / 4 and + 8.
template <int N>
__device__ __forceinline__ void hide(float (&s)[N][4], int first, const int (&visible)[2]) {
  const int column = first + threadIdx.x % 4 * 2;
#pragma unroll
  for (int j = 0; j < N; j++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (column + j * 8 + i % 2 >= visible[i / 2]) s[j][i] = -INFINITY;
}

// This lane's largest score of each row.
template <int N>
__device__ __forceinline__ void lane_max(float (&max)[2], const float (&s)[N][4]) {
#pragma unroll
  for (int j = 0; j < N; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) max[i / 2] = fmaxf(max[i / 2], s[j][i]);
}

// Scores of a page to powers, and this lane's sum of them in each row.
__device__ __forceinline__ void page_powers(float (&sum)[2], float (*s)[4], float scale, const float (&offset)[2]) {
  sum[0] = sum[1] = 0.0f;
#pragma unroll
  for (int j = 0; j < PAGE / 8; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      s[j][i] = ex2_approx(fmaf(s[j][i], scale, -offset[i / 2]));
      sum[i / 2] += s[j][i];
    }
}

// Adds a cut's maximum and sum to a row's; what was there is to be multiplied by keep, the cut by take.
__device__ __forceinline__ void combine(RowSum& total, const RowSum& cut, float& keep, float& take) {
  const float max = fmaxf(total.max, cut.max);
  keep = ex2_approx(total.max - max);
  take = ex2_approx(cut.max - max);
  total.max = max;
  total.sum = fmaf(total.sum, keep, cut.sum * take);
}

__device__ __forceinline__ float combine(float total, float cut, float keep, float take) { return fmaf(total, keep, cut * take); }

// A sum over values divided by the sum of powers. Zero has one sign: a cut of which a row sees nothing could change it.
__device__ __forceinline__ float normalise(float x, float inverse) { return fmaf(x, inverse, 0.0f); }

__device__ __forceinline__ float log_sum_exp(const RowSum& total) { return (total.max + log2f(total.sum)) * LN_2; }
