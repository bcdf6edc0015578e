// Moving and adding rows of bf16: gather, scatter, and the additions that are their gradients. Sums are f32, rounded once.
#include "include/row_sums.cuh"

constexpr int THREADS = 256;
constexpr int SUM_THREADS = 128;
constexpr int SUM_BLOCKS = 6;  // on a multiprocessor: left alone, the compiler aims at more, and spills

// ---- kernels ----

// dst[i] = src[index[i]]. Grid: rows * ceil(columns / 8) threads.
GLOBAL void __launch_bounds__(THREADS)
rows_gather(const bf16* src,        // [_, columns]
            const unsigned* index,  // [rows]
            bf16* dst,              // [rows, columns]
            int rows, int columns) {
  const auto [row, c] = this_vector<THREADS>(columns);
  if (row >= static_cast<unsigned>(rows)) return;
  const bool aligned = columns % 8 == 0 && aligned16(src) && aligned16(dst);
  float v[8];
  load8(v, src + static_cast<size_t>(index[row]) * columns, c, columns, aligned);
  store8(dst + static_cast<size_t>(row) * columns, c, columns, aligned, v);
}
KERNEL(rows_gather, THREADS);

// dst[i] += src[index[i]]. The same grid.
GLOBAL void __launch_bounds__(THREADS)
rows_gather_add(const bf16* src,        // [_, columns]
                const unsigned* index,  // [rows]
                bf16* dst,              // [rows, columns]
                int rows, int columns) {
  const auto [row, c] = this_vector<THREADS>(columns);
  if (row >= static_cast<unsigned>(rows)) return;
  const bool aligned = columns % 8 == 0 && aligned16(src) && aligned16(dst);
  float v[8], sum[8];
  load8(v, src + static_cast<size_t>(index[row]) * columns, c, columns, aligned);
  load8(sum, dst + static_cast<size_t>(row) * columns, c, columns, aligned);
#pragma unroll
  for (int i = 0; i < 8; i++) sum[i] += v[i];
  store8(dst + static_cast<size_t>(row) * columns, c, columns, aligned, sum);
}
KERNEL(rows_gather_add, THREADS);

// to[index[i]] = from[source[i]], or from[i]; places are all different. Grid: one thread an entry.
GLOBAL void __launch_bounds__(THREADS)
rows_put(const unsigned* index,   // [entries]
         const unsigned* source,  // [entries], or null
         const unsigned* from, unsigned* to,
         int entries) {
  const unsigned i = blockIdx.x * THREADS + threadIdx.x;
  if (i < static_cast<unsigned>(entries)) to[index[i]] = from[source ? source[i] : i];
}
KERNEL(rows_put, THREADS);

// Before rows_mark, for the same index: nothing is known of the rows that it names, several threads perhaps of one. An index of
// 2^32 - 1 is no row. Grid: one thread an entry.
GLOBAL void __launch_bounds__(THREADS)
rows_forget(const unsigned* index,  // [rows]
            unsigned* ends,         // [rows of the destination, 2]
            int rows) {
  const unsigned i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= static_cast<unsigned>(rows) || index[i] == ~0u) return;
  const size_t at = static_cast<size_t>(index[i]) * 2;
  atomicExch(ends + at, 0u);
  atomicExch(ends + at + 1, 0u);
}
KERNEL(rows_forget, THREADS);

// The first and the last source of every row of the destination that the index names, as Ends. Grid: one thread an entry.
GLOBAL void __launch_bounds__(THREADS)
rows_mark(const unsigned* index,  // [rows]
          unsigned* ends,         // [rows of the destination, 2]
          int rows) {
  const unsigned i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= static_cast<unsigned>(rows) || index[i] == ~0u) return;
  const size_t at = static_cast<size_t>(index[i]) * 2;
  atomicMax(ends + at, rows - i);
  atomicMax(ends + at + 1, i + 1);
}
KERNEL(rows_mark, THREADS);

// dst[index[i]] = src[i]; of rows that go to one place the last stays. Grid: rows * ceil(columns / 8) threads.
GLOBAL void __launch_bounds__(THREADS)
rows_scatter(const bf16* src,        // [rows, columns]
             const unsigned* index,  // [rows]
             const unsigned* ends,   // [rows of the destination, 2], from rows_mark
             bf16* dst,              // [_, columns]
             int rows, int columns) {
  const auto [row, c] = this_vector<THREADS>(columns);
  if (row >= static_cast<unsigned>(rows)) return;
  const size_t to = index[row];
  if (ends[to * 2 + 1] != row + 1) return;
  const bool aligned = columns % 8 == 0 && aligned16(src) && aligned16(dst);
  float v[8];
  load8(v, src + static_cast<size_t>(row) * columns, c, columns, aligned);
  store8(dst + to * columns, c, columns, aligned, v);
}
KERNEL(rows_scatter, THREADS);

// dst[index[i]] += src[i], i ascending. Grid: one block a row of the source.
GLOBAL void __launch_bounds__(SUM_THREADS, SUM_BLOCKS)
rows_scatter_add(const bf16* src,        // [rows, columns]
                 const unsigned* index,  // [rows]
                 const unsigned* ends,   // [rows of the destination, 2], from rows_mark
                 bf16* dst,              // [_, columns]
                 int rows, int columns) {
  const unsigned to = index[blockIdx.x];
  const unsigned* end = ends + static_cast<size_t>(to) * 2;
  if (end[0] != rows - blockIdx.x) return;
  add_sources<SUM_THREADS>(src, index, dst + static_cast<size_t>(to) * columns, to, blockIdx.x, end[1] - 1, columns);
}
KERNEL(rows_scatter_add, SUM_THREADS);

// y += x. Grid: ceil(n / 8) threads.
GLOBAL void __launch_bounds__(THREADS)
rows_add(const bf16* x,  // [n]
         bf16* y,        // [n]
         int n) {
  const auto [past, i] = this_vector<THREADS>(n);
  if (past) return;
  float v[8], sum[8];
  load8(v, x, i, n, aligned16(x));
  load8(sum, y, i, n, aligned16(y));
#pragma unroll
  for (int j = 0; j < 8; j++) sum[j] += v[j];
  store8(y, i, n, aligned16(y), sum);
}
KERNEL(rows_add, THREADS);
