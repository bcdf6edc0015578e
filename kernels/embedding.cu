// Token embedding: rows of a table by id, and the gradient of that table. An id of 2^32 - 1 is no token.
#include "include/row_sums.cuh"

constexpr int THREADS = 256;
constexpr int SUM_THREADS = 128;
constexpr int SUM_BLOCKS = 6;  // on a multiprocessor: left alone, the compiler aims at more, and spills
constexpr unsigned NO_TOKEN = ~0u;

// ---- kernels ----

// out[i] = table[ids[i]], zeros where there is no token. Grid: tokens * ceil(columns / 8) threads.
GLOBAL void __launch_bounds__(THREADS)
embedding_forward(const unsigned* ids,  // [tokens]
                  const bf16* table,    // [_, columns]
                  bf16* out,            // [tokens, columns]
                  int tokens, int columns) {
  const auto [token, c] = this_vector<THREADS>(columns);
  if (token >= static_cast<unsigned>(tokens)) return;
  const bool aligned = columns % 8 == 0 && aligned16(table) && aligned16(out);
  const unsigned id = ids[token];
  float v[8] = {};
  if (id != NO_TOKEN) load8(v, table + static_cast<size_t>(id) * columns, c, columns, aligned);
  store8(out + static_cast<size_t>(token) * columns, c, columns, aligned, v);
}
KERNEL(embedding_forward, THREADS);

// dtable[ids[i]] += dout[i], i ascending, after rows_mark of the ids. Grid: one block a token.
GLOBAL void __launch_bounds__(SUM_THREADS, SUM_BLOCKS)
embedding_backward(const unsigned* ids,   // [tokens]
                   const unsigned* ends,  // [rows of the table, 2], from rows_mark
                   const bf16* dout,      // [tokens, columns]
                   float* dtable,         // [_, columns]
                   int tokens, int columns) {
  const unsigned id = ids[blockIdx.x];
  if (id == NO_TOKEN) return;
  const unsigned* end = ends + static_cast<size_t>(id) * 2;
  if (end[0] != tokens - blockIdx.x) return;
  add_sources<SUM_THREADS>(dout, ids, dtable + static_cast<size_t>(id) * columns, id, blockIdx.x, end[1] - 1, columns);
}
KERNEL(embedding_backward, SUM_THREADS);
