// Kernels whose tensor copies, mbarriers and wgmma go right where `mistake` is 0, and wrong in one way for every other number.
// tests/emulator/asynchronous.rs finds the lines by the marks at their ends. For sm_90a.
#include "include/ptx.cuh"
#include "include/wgmma.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// d[64, 8] = a[64, 16] b[8, 16]^T, both operands x[.., 16], swizzled over their rows of 32 bytes; A from registers where
// `registers` says so, as x[row, .] has it.
GLOBAL void __launch_bounds__(128) wgmma_mistakes(const bf16* x, float* d, int registers, int mistake) {
  DYNAMIC_SHARED(unsigned char, operands);  // a, then b
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  if (mistake == 1) fence_proxy_async();
  for (int i = threadIdx.x; i < 72 * 16; i += 128) {
    const int at = i * 2;
    *reinterpret_cast<bf16*>(operands + (at ^ (at >> 7 & 1) << 4)) = x[i];  // MARK operand-write
  }
  if (mistake != 1 && mistake != 2) fence_proxy_async();
  __syncthreads();
  if (mistake == 2 && threadIdx.x >= 64) fence_proxy_async();
  float sums[4];
  unsigned a[4];
  auto load = [&] {
    for (int i = 0; i < 4; i++) a[i] = *reinterpret_cast<const unsigned*>(x + (row + i % 2 * 8) * 16 + i / 2 * 8 + column);  // MARK a-write
  };
  load();
  for (float& s : sums) s = 0.0f;
  if (mistake != 3) wgmma_fence();
  if (mistake == 4) sums[2] = 1.0f;
  if (mistake == 5) load();
  const uint64_t b = wgmma_descriptor(operands + 64 * 32 + (mistake == 6 ? 64 : 0), 32, 256);
  if (registers) wgmma_m64k16_bf16<8>(sums, a, b, true);                      // MARK wgmma-a
  else wgmma_m64k16_bf16<8>(sums, wgmma_descriptor(operands, 32, 256), b, true);  // MARK wgmma
  wgmma_commit_group();
  if (mistake == 7) d[0] = sums[1];  // MARK early-read
  if (mistake == 8) load();
  if (mistake == 9) return;
  wgmma_wait_group<0>();
  for (int i = 0; i < 4; i++) d[(row + i / 2 * 8) * 8 + column + i % 2] = sums[i];
}
KERNEL(wgmma_mistakes, 128);

// out[64] = the first row of a box of 64 x 8 elements.
GLOBAL void copy_mistakes(const __grid_constant__ TensorMap map, bf16* out, int mistake) {
  constexpr int BYTES = 64 * 8 * 2;
  DYNAMIC_SHARED(bf16, box);
  SHARED(uint64_t, full, [1]);
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    if (mistake == 1) box[5] = to_bf16(1.0f);  // MARK box-write
    mbarrier_arrive_expect_tx(full, mistake == 2 ? BYTES / 2 : BYTES);
    if (mistake == 3) mbarrier_arrive(full);  // MARK second-arrival
    tensor_copy_2d(box + (mistake == 4 ? 256 : 0), &map, full, 0, 0);  // MARK box-copy
  }
  __syncthreads();
  if (mistake == 5) return;
  if (mistake != 6 || threadIdx.x == 0) mbarrier_wait_parity(full, 0);
  for (int i = threadIdx.x; i < 64; i += 32) out[i] = box[i];  // MARK box-read
}
KERNEL(copy_mistakes, 32);

// Phases of a barrier for one arrival, whose ends 32 threads wait for. With mistake 1 the last one does not wait for that of
// the second; with mistake 2 the barrier is told of bytes that nobody sends.
GLOBAL void phase_mistakes(unsigned* out, int mistake) {
  SHARED(uint64_t, barrier, [1]);
  if (threadIdx.x == 0) mbarrier_init(barrier, 1);
  __syncthreads();
  for (unsigned phase = 0; phase < 4; phase++) {
    if (threadIdx.x == 0) mbarrier_arrive(barrier);
    const bool late = mistake == 1 && threadIdx.x == 31 && phase == 1;
    if (!late) mbarrier_wait_parity(barrier, phase % 2);  // MARK phase-wait
    __syncwarp();
  }
  if (mistake == 2 && threadIdx.x == 0) mbarrier_arrive_expect_tx(barrier, 64);
  out[threadIdx.x] = threadIdx.x;
}
KERNEL(phase_mistakes, 32);

// d[64, 8] = rows of x by themselves: b as a tensor copy brought it, described as if by a swizzle of `described` bytes.
GLOBAL void __launch_bounds__(128) described_box(const __grid_constant__ TensorMap map, float* d, int described) {
  DYNAMIC_SHARED(unsigned char, box);
  SHARED(uint64_t, full, [1]);
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    mbarrier_arrive_expect_tx(full, 64 * 8 * 2);
    tensor_copy_2d(box, &map, full, 0, 0);
  }
  __syncthreads();
  mbarrier_wait_parity(full, 0);
  const unsigned a[4] = {};
  float sums[4] = {};
  wgmma_fence();
  wgmma_m64k16_bf16<8>(sums, a, wgmma_descriptor(box, described, 8 * described), true);  // MARK described
  wgmma_commit_group();
  wgmma_wait_group<0>();
  for (int i = 0; i < 4; i++) d[threadIdx.x * 4 + i] = sums[i];
}
KERNEL(described_box, 128);

#endif
