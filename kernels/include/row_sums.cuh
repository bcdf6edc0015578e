// Sums of rows that go to one place, in ascending order of where they come from: gradients of gathers, without atomics on
// floats and without a sort.
//
// First two passes over the index find, for every row of the destination that it names, the first and the last of its sources
// (rows_forget, rows_mark). Then one block per source row: the block of a first source adds all that go there, and the others
// have nothing to do. It looks for them between first and last only. Where no row is named twice, the cost is that of reading
// and writing the rows; a row that is named often costs a pass over the index, four bytes an entry, by one block.
#pragma once
#include "reduce.cuh"
#include "vectors.cuh"

// What the two passes find for a row of the destination, in integers that start at 0 and only grow, so that the order in which
// sources come does not matter: sources - first, and last + 1.
struct Ends {
  unsigned first_from_end, after_last;
};

constexpr int SOURCES_PER_THREAD = 4;

// The sources of `row` among [begin, begin + 4 THREADS) and up to `last`, ascending, into `found`; returns how many there are. All
// threads call it together, and a barrier is needed before the next call.
template <int THREADS>
__device__ __forceinline__ int find_sources(const unsigned* index, unsigned row, unsigned begin, unsigned last,
                                            unsigned (&found)[THREADS * SOURCES_PER_THREAD]) {
  constexpr int WARPS = THREADS / WARP_LANES;
  SHARED(int, totals, [WARPS]);
  const unsigned lanes_below = (1u << threadIdx.x % WARP_LANES) - 1, mine = begin + threadIdx.x * SOURCES_PER_THREAD;
  int before = 0, total = 0;
  unsigned hits = 0;
#pragma unroll
  for (int j = 0; j < SOURCES_PER_THREAD; j++) {
    const bool hit = mine + j <= last && index[mine + j] == row;
    const unsigned lanes = __ballot_sync(~0u, hit);
    hits |= static_cast<unsigned>(hit) << j;
    before += __popc(lanes & lanes_below);
    total += __popc(lanes);
  }
  if (threadIdx.x % WARP_LANES == 0) totals[threadIdx.x / WARP_LANES] = total;
  __syncthreads();
  total = 0;
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
    if (w == static_cast<int>(threadIdx.x) / WARP_LANES) before += total;
    total += totals[w];
  }
#pragma unroll
  for (int j = 0; j < SOURCES_PER_THREAD; j++)
    if (hits >> j & 1) found[before++] = mine + j;
  __syncthreads();
  return total;
}

// to[c] += from[s][c] of all sources s of `row`, f32 in between and rounded once. All threads of the block of the first source.
template <int THREADS, class T>
__device__ __forceinline__ void add_sources(const bf16* from,       // [sources, columns]
                                            const unsigned* index,  // [sources]
                                            T* to,                  // [columns]
                                            unsigned row, unsigned first, unsigned last, int columns) {
  constexpr int STEP = THREADS * 8, AHEAD = 4;  // rows that are on their way at a time
  SHARED(unsigned, found, [THREADS * SOURCES_PER_THREAD]);
  const bool aligned = columns % 8 == 0 && aligned16(from) && aligned16(to);
  for (int base = 0; base < columns; base += STEP) {
    const int c = base + threadIdx.x * 8;
    float sum[8], v[AHEAD][8];
    load8(sum, to, c, columns, aligned);
    load8(v[0], from + static_cast<size_t>(first) * columns, c, columns, aligned);
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] += v[0][i];
    for (unsigned begin = first + 1; begin <= last; begin += THREADS * SOURCES_PER_THREAD) {
      const int sources = find_sources<THREADS>(index, row, begin, last, found);
      for (int s = 0; s < sources; s += AHEAD) {
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
          if (s + j < sources) load8(v[j], from + static_cast<size_t>(found[s + j]) * columns, c, columns, aligned);
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
          if (s + j < sources)
#pragma unroll
            for (int i = 0; i < 8; i++) sum[i] += v[j][i];
      }
      __syncthreads();
    }
    store8(to, c, columns, aligned, sum);
  }
}
