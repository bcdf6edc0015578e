// The gated activation of the MLPs and its gradient; the products' kernels also do the former (linear/tile.cuh).
//
// bf16 in and out, f32 in between; a thread takes eight columns of a row, 16 bytes. Grid: ceil(width / 8) * rows threads.
#include "include/swiglu.cuh"
#include "include/vectors.cuh"

constexpr int THREADS = 256;

// ---- kernels ----

GLOBAL void __launch_bounds__(THREADS)
swiglu_forward(const bf16* gate_up,  // [rows, 2 width], the gates before the ups
               bf16* h,              // [rows, width]
               int rows, int width) {
  const auto [i, c] = this_vector<THREADS>(width);
  if (i >= static_cast<unsigned>(rows)) return;
  const size_t row = i;
  const bool aligned = width % 8 == 0 && aligned16(gate_up) && aligned16(h);
  float gate[8], up[8];
  load8(gate, gate_up + row * 2 * width, c, width, aligned);
  load8(up, gate_up + row * 2 * width + width, c, width, aligned);
#pragma unroll
  for (int j = 0; j < 8; j++) gate[j] = swiglu(gate[j], up[j]);
  store8(h + row * width, c, width, aligned, gate);
}
KERNEL(swiglu_forward, THREADS);

// Each thread reads its columns before it writes them: dgate_up may be gate_up itself.
GLOBAL void __launch_bounds__(THREADS)
swiglu_backward(const bf16* gate_up,  // [rows, 2 width]
                const bf16* dh,       // [rows, width]
                bf16* dgate_up,       // [rows, 2 width]
                int rows, int width) {
  const auto [i, c] = this_vector<THREADS>(width);
  if (i >= static_cast<unsigned>(rows)) return;
  const size_t row = i;
  const bool aligned = width % 8 == 0 && aligned16(gate_up) && aligned16(dh) && aligned16(dgate_up);
  float gate[8], up[8], d[8];
  load8(gate, gate_up + row * 2 * width, c, width, aligned);
  load8(up, gate_up + row * 2 * width + width, c, width, aligned);
  load8(d, dh + row * width, c, width, aligned);
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const float s = sigmoid(gate[j]), dgate = d[j] * up[j] * s * (1.0f + gate[j] * (1.0f - s));
    up[j] = d[j] * gate[j] * s;
    gate[j] = dgate;
  }
  store8(dgate_up + row * 2 * width, c, width, aligned, gate);
  store8(dgate_up + row * 2 * width + width, c, width, aligned, up);
}
KERNEL(swiglu_backward, THREADS);
