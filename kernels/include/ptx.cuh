// Every PTX instruction that kernels use, but those of wgmma.cuh, behind one function each: inline assembly for the device, a call
// of the emulator for the host. Names are the instructions'.
#pragma once
#include "device.cuh"

// The address that instructions on shared memory take.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
#ifdef __CUDACC__
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
#else
  return emulator::shared_address(p);
#endif
}

// ---- Barriers 1 to 15 of a block, for `threads` threads of it (a multiple of 32). Barrier 0 is __syncthreads'. ----

__device__ __forceinline__ void named_barrier_sync(unsigned id, unsigned threads) {
#ifdef __CUDACC__
  asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  emulator::named_barrier_sync(id, threads);
#endif
}

// Counts as having arrived, and goes on.
__device__ __forceinline__ void named_barrier_arrive(unsigned id, unsigned threads) {
#ifdef __CUDACC__
  asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  emulator::named_barrier_arrive(id, threads);
#endif
}

// ---- cp.async: global to shared memory, past the registers; addresses are aligned to BYTES. ----

// The first `valid` bytes are copied, the rest is zero.
template <int BYTES>
__device__ __forceinline__ void cp_async(void* to, const void* from, unsigned valid = BYTES) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
#ifdef __CUDACC__
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(BYTES), "r"(valid)
                 : "memory");
  }
#else
  emulator::cp_async(to, from, BYTES, valid);
#endif
}

// Makes a group of the copies since the last one.
__device__ __forceinline__ void cp_async_commit_group() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulator::cp_async_commit();
#endif
}

// Waits until at most PENDING of this thread's groups are under way. Other threads' copies need a barrier after their wait.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait_group() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#else
  emulator::cp_async_wait(PENDING);
#endif
}

__device__ __forceinline__ void cp_async_wait_all() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_all;" ::: "memory");
#else
  emulator::cp_async_wait_all();
#endif
}

// ---- ldmatrix: 8 x 8 matrices of 16-bit elements from shared memory. Lane l gives row l % 8 of matrix l / 8. ----

__device__ __forceinline__ void ldmatrix_x1(uint32_t (&r)[1], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(shared_address(row)) : "memory");
#else
  emulator::ldmatrix(r, 1, false, row);
#endif
}

__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
#else
  emulator::ldmatrix(r, 2, false, row);
#endif
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
#else
  emulator::ldmatrix(r, 4, false, row);
#endif
}

__device__ __forceinline__ void ldmatrix_x1_trans(uint32_t (&r)[1], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(r[0]) : "r"(shared_address(row)) : "memory");
#else
  emulator::ldmatrix(r, 1, true, row);
#endif
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
#else
  emulator::ldmatrix(r, 2, true, row);
#endif
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
#else
  emulator::ldmatrix(r, 4, true, row);
#endif
}

// ---- mma.sync: d[16, 8] += a[16, 16] b[16, 8], f32 sums. Fragments as in the PTX manual, m16n8k16. ----

__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emulator::mma_bf16(d, a, b);
#endif
}

__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emulator::mma_f16(d, a, b);
#endif
}

// ---- Arithmetic ----

// 2^x to 2 units in the last place; results below 2^-126 are zero.
__device__ __forceinline__ float ex2_approx(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
#endif
}

// Two numbers rounded to bf16, the first in the low half.
__device__ __forceinline__ uint32_t cvt_bf16x2(float low, float high) {
#ifdef __CUDACC__
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return emulator::float_to_bf16(low) | static_cast<uint32_t>(emulator::float_to_bf16(high)) << 16;
#endif
}

// ---- mbarrier (sm_90): eight aligned bytes of shared memory that count arrivals and the bytes of tensor copies. ----

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// By one thread; a barrier of the block must follow before others use it.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, unsigned arrivals) {
#ifdef __CUDACC__
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  emulator::mbarrier_init(barrier, arrivals);
#endif
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#else
  emulator::mbarrier_arrive(barrier);
#endif
}

// Arrives, and lets the phase wait for so many bytes more.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, unsigned bytes) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
#else
  emulator::mbarrier_arrive_expect_tx(barrier, bytes);
#endif
}

// Waits for the end of the phase of that parity: 0 for the first, 1 for the second, and so on.
__device__ __forceinline__ void mbarrier_wait_parity(uint64_t* barrier, unsigned parity) {
#ifdef __CUDACC__
  unsigned done;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
  } while (!done);
#else
  emulator::mbarrier_wait_parity(barrier, parity);
#endif
}

// ---- Tensor copies (TMA, sm_90): the box whose first element is (x, y[, z]), innermost first, started by one thread. ----

__device__ __forceinline__ void tensor_copy_2d(void* to, const TensorMap* map, uint64_t* barrier, int x, int y) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
#else
  emulator::tensor_copy_2d(to, map, barrier, x, y);
#endif
}

__device__ __forceinline__ void tensor_copy_3d(void* to, const TensorMap* map, uint64_t* barrier, int x, int y, int z) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
#else
  emulator::tensor_copy_3d(to, map, barrier, x, y, z);
#endif
}

#endif
