// The gated activation of the MLPs (Shazeer 2020, arXiv 2002.05202): h = silu(gate) * up, silu(x) = x sigmoid(x).
//
// bf16 in and out, f32 in between; a thread takes eight columns of a row, 16 bytes. Grid: ceil(width / 8) * rows threads.
#include "include/vectors.cuh"

constexpr int THREADS = 256;

// ---- kernels ----

struct Position {
  size_t row;
  int column;
};

__device__ __forceinline__ Position position(int width) {
  const size_t vectors = (width + 7) / 8, i = static_cast<size_t>(blockIdx.x) * THREADS + threadIdx.x;
  return {i / vectors, static_cast<int>(i % vectors) * 8};
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

GLOBAL void __launch_bounds__(THREADS)
swiglu_forward(const bf16* gate_up,  // [rows, 2 width], the gates before the ups
               bf16* h,              // [rows, width]
               int rows, int width) {
  const auto [row, c] = position(width);
  if (row >= static_cast<size_t>(rows)) return;
  const bool aligned = width % 8 == 0;
  float gate[8], up[8];
  load8(gate, gate_up + row * 2 * width, c, width, aligned);
  load8(up, gate_up + row * 2 * width + width, c, width, aligned);
#pragma unroll
  for (int i = 0; i < 8; i++) gate[i] = gate[i] * sigmoid(gate[i]) * up[i];
  store8(h + row * width, c, width, aligned, gate);
}
KERNEL(swiglu_forward, THREADS);

// Each thread reads its columns before it writes them: dgate_up may be gate_up itself.
GLOBAL void __launch_bounds__(THREADS)
swiglu_backward(const bf16* gate_up,  // [rows, 2 width]
                const bf16* dh,       // [rows, width]
                bf16* dgate_up,       // [rows, 2 width]
                int rows, int width) {
  const auto [row, c] = position(width);
  if (row >= static_cast<size_t>(rows)) return;
  const bool aligned = width % 8 == 0;
  float gate[8], up[8], d[8];
  load8(gate, gate_up + row * 2 * width, c, width, aligned);
  load8(up, gate_up + row * 2 * width + width, c, width, aligned);
  load8(d, dh + row * width, c, width, aligned);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const float s = sigmoid(gate[i]), dgate = d[i] * up[i] * s * (1.0f + gate[i] * (1.0f - s));
    up[i] = d[i] * gate[i] * s;
    gate[i] = dgate;
  }
  store8(dgate_up + row * 2 * width, c, width, aligned, gate);
  store8(dgate_up + row * 2 * width + width, c, width, aligned, up);
}
KERNEL(swiglu_backward, THREADS);
