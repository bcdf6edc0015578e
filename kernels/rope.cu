// Rotary position embedding (Su et al., arXiv 2104.09864): pair i of a head, its elements i and i + pairs, turns by the angle
// position * theta^(-i / period). In M-RoPE the position of a pair is one of three (time, height, width); in the vision tower
// the first half of the pairs turns by the height, the second by the width.
//
// An angle is an f32 product, and its cosine and sine are those of the rounded product, as the reference model was trained:
// at large positions the rounding is what decides them.
#include "include/pages.cuh"

constexpr int THREADS = 256;
constexpr int TABLE_THREADS = 128;
constexpr int TABLE_ROWS = 8;  // rows that a thread fills: a frequency costs more than an angle

// ---- kernels ----

// theta^(-i / period), rounded where the reference rounds.
__device__ __forceinline__ float frequency(float theta, int i, int period) {
  const float exponent = static_cast<float>(2 * i) / static_cast<float>(2 * period);
  return 1.0f / static_cast<float>(pow(static_cast<double>(theta), static_cast<double>(exponent)));
}

// The nearest f32 to cosine and sine but for a rare last bit: in f64, where the turns of any f32 angle that positions give come
// off exactly, and Taylor's series over an eighth of a turn.
__device__ __forceinline__ void cosine_and_sine(float angle, float& cosine, float& sine) {
  constexpr double HALF_PI = 1.5707963267948966, HALF_PI_REST = 6.123233995736766e-17, HALF_PI_INVERSE = 0.63661977236758134;
  const double turns = rint(angle * HALF_PI_INVERSE);
  const double r = fma(-turns, HALF_PI_REST, fma(-turns, HALF_PI, static_cast<double>(angle))), s = r * r;
  double c = 1.0 / 479001600.0, d = -1.0 / 39916800.0;  // 1 / 12!, -1 / 11!
  c = fma(c, s, -1.0 / 3628800.0), d = fma(d, s, 1.0 / 362880.0);
  c = fma(c, s, 1.0 / 40320.0), d = fma(d, s, -1.0 / 5040.0);
  c = fma(c, s, -1.0 / 720.0), d = fma(d, s, 1.0 / 120.0);
  c = fma(c, s, 1.0 / 24.0), d = fma(d, s, -1.0 / 6.0);
  c = fma(c, s, -0.5), d = d * s * r + r;
  c = fma(c, s, 1.0);
  const int quarter = static_cast<int>(static_cast<long long>(turns) & 3);
  const double x = quarter % 2 ? d : c, y = quarter % 2 ? c : d;
  cosine = static_cast<float>(quarter == 1 || quarter == 2 ? -x : x);
  sine = static_cast<float>(quarter >= 2 ? -y : y);
}

// Pair i follows axis 0 below `first`, axis 1 below `second`, else axis 2, and has the frequency of i % period. The position of a
// row on an axis is positions[row * row_step + axis * axis_step]. Grid: x over ceil(rows / TABLE_ROWS), y over
// ceil(pairs / TABLE_THREADS).
GLOBAL void __launch_bounds__(TABLE_THREADS)
rope_tables(const unsigned* positions,
            float* cosines,  // [rows, pairs]
            float* sines,    // [rows, pairs]
            int rows, int pairs, int first, int second, int period, int row_step, int axis_step, float theta) {
  const int pair = blockIdx.y * TABLE_THREADS + threadIdx.x;
  if (pair >= pairs) return;
  const int axis = pair < first ? 0 : pair < second ? 1 : 2;
  const float f = frequency(theta, pair % period, period);
  const int begin = blockIdx.x * TABLE_ROWS, end = begin + TABLE_ROWS < rows ? begin + TABLE_ROWS : rows;
  for (int row = begin; row < end; row++) {
    const unsigned position = positions[static_cast<size_t>(row) * row_step + static_cast<size_t>(axis) * axis_step];
    const size_t at = static_cast<size_t>(row) * pairs + pair;
    cosine_and_sine(static_cast<float>(position) * f, cosines[at], sines[at]);
  }
}
KERNEL(rope_tables, TABLE_THREADS);

// Turns eight pairs (a[j], b[j]).
__device__ __forceinline__ void turn(float (&a)[8], float (&b)[8], const float (&cosine)[8], const float (&sine)[8], float sign) {
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const float s = sine[j] * sign, turned = fmaf(a[j], cosine[j], -(b[j] * s));
    b[j] = fmaf(b[j], cosine[j], a[j] * s);
    a[j] = turned;
  }
}

// Turns `heads` heads of 2 pairs elements, side by side from column `offset` of each row, in place; `sign` -1 turns back. A
// thread takes eight pairs of a head. Grid: rows * heads * ceil(pairs / 8) threads.
GLOBAL void __launch_bounds__(THREADS)
rope_rotate(bf16* x,               // [rows, stride]
            const float* cosines,  // [rows, pairs]
            const float* sines,    // [rows, pairs]
            int rows, int stride, int offset, int heads, int pairs, float sign) {
  const auto [i, c] = this_vector<THREADS>(pairs);
  const unsigned row = i / heads;
  if (row >= static_cast<unsigned>(rows)) return;
  const bool whole = pairs % 8 == 0;
  const bool aligned = whole && stride % 8 == 0 && aligned16(x + offset);
  const bool aligned_tables = whole && aligned16(cosines) && aligned16(sines);
  bf16* head = x + static_cast<size_t>(row) * stride + offset + static_cast<size_t>(i % heads) * 2 * pairs;
  const size_t table = static_cast<size_t>(row) * pairs;
  float a[8], b[8], cosine[8], sine[8];
  load8(cosine, cosines + table, c, pairs, aligned_tables);
  load8(sine, sines + table, c, pairs, aligned_tables);
  load8(a, head, c, pairs, aligned);
  load8(b, head + pairs, c, pairs, aligned);
  turn(a, b, cosine, sine, sign);
  store8(head, c, pairs, aligned, a);
  store8(head + pairs, c, pairs, aligned, b);
}
KERNEL(rope_rotate, THREADS);

// rope_rotate and kv_cache_write in one pass: turns the query and key heads of each row in place, and puts keys and values into
// their pages. A row is `heads` query heads, kv_heads of keys, kv_heads of values, 2 pairs elements each. A token whose slot is
// NO_SLOT has no page. Grid: rows * (heads + 2 kv_heads) * ceil(pairs / 8) threads.
GLOBAL void __launch_bounds__(THREADS)
rope_into_pages(bf16* x,                      // [rows, (heads + 2 kv_heads) 2 pairs]
                const float* cosines,         // [rows, pairs]
                const float* sines,           // [rows, pairs]
                const unsigned* slots,        // [rows]
                bf16* keys, bf16* values,     // pages
                int rows, int heads, int kv_heads, int pairs) {
  const auto [i, c] = this_vector<THREADS>(pairs);
  const int all = heads + 2 * kv_heads, head_dim = 2 * pairs;
  const unsigned row = i / all;
  if (row >= static_cast<unsigned>(rows)) return;
  const int head = i % all, kv_head = head < heads + kv_heads ? head - heads : head - heads - kv_heads;
  const bool whole = pairs % 8 == 0, aligned = whole && aligned16(x);
  bf16* at = x + static_cast<size_t>(i) * head_dim;
  float a[8], b[8];
  load8(a, at, c, pairs, aligned);
  load8(b, at + pairs, c, pairs, aligned);
  if (head < heads + kv_heads) {
    const bool aligned_tables = whole && aligned16(cosines) && aligned16(sines);
    const size_t table = static_cast<size_t>(row) * pairs;
    float cosine[8], sine[8];
    load8(cosine, cosines + table, c, pairs, aligned_tables);
    load8(sine, sines + table, c, pairs, aligned_tables);
    turn(a, b, cosine, sine, 1.0f);
    store8(at, c, pairs, aligned, a);
    store8(at + pairs, c, pairs, aligned, b);
  }
  if (kv_head < 0 || slots[row] == NO_SLOT) return;
  bf16* page = (head < heads + kv_heads ? keys : values) + in_pages(slots[row], kv_head, kv_heads, head_dim);
  const bool aligned_pages = whole && aligned16(keys) && aligned16(values);
  store8(page, c, pairs, aligned_pages, a);
  store8(page + pairs, c, pairs, aligned_pages, b);
}
KERNEL(rope_into_pages, THREADS);
