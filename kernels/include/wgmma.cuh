// wgmma (sm_90a): d[64, N] (+)= a[64, 16] b[N, 16]^T by a group of four warps, bf16 with f32 sums, both operands K-major.
//
// Asynchronous: operands and accumulators are the instruction's from wgmma_fence and its issue to wgmma_wait_group. Lane l of warp
// w holds, of rows 16 w + l / 4 and + 8, columns l % 4 * 2 and the next of every eight: d[4 j + 2 h + e] is column 8 j + l % 4
// * 2 + e of row 16 w + l / 4 + 8 h.
#pragma once
#include "ptx.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// An operand in shared memory whose rows of eight start `stride` bytes apart. With a swizzle (32, 64 or 128 bytes) rows are as
// long as that, and the address may be moved along a row by 32 bytes for the next 16 elements; with none, rows are 16 bytes,
// and the second eight elements of each start `leading` bytes after the first.
__device__ __forceinline__ uint64_t wgmma_descriptor(const void* p, int swizzle, int stride, int leading = 16) {
  const uint64_t mode = swizzle == 128 ? 1 : swizzle == 64 ? 2 : swizzle == 32 ? 3 : 0;
  return (shared_address(p) & 0x3FFFF) >> 4 | static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(stride >> 4) << 32 |
         mode << 62;
}

// Before the first wgmma, and after registers that one uses were written.
__device__ __forceinline__ void wgmma_fence() {
#ifdef __CUDACC__
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  emulator::wgmma_fence();
#endif
}

__device__ __forceinline__ void wgmma_commit_group() {
#ifdef __CUDACC__
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  emulator::wgmma_commit();
#endif
}

template <int PENDING>
__device__ __forceinline__ void wgmma_wait_group() {
#ifdef __CUDACC__
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#else
  emulator::wgmma_wait(PENDING);
#endif
}

// Writes of shared memory by threads, before wgmma or tensor copies that touch the same bytes.
__device__ __forceinline__ void fence_proxy_async() {
#ifdef __CUDACC__
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  emulator::fence_proxy_async();
#endif
}

#ifdef __CUDACC__

template <int N>
struct WgmmaBf16;

#define ACCUMULATORS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define ACCUMULATORS_16(i) ACCUMULATORS_4(i), ACCUMULATORS_4(i + 4), ACCUMULATORS_4(i + 8), ACCUMULATORS_4(i + 12)
#define ACCUMULATORS_64(i) ACCUMULATORS_16(i), ACCUMULATORS_16(i + 16), ACCUMULATORS_16(i + 32), ACCUMULATORS_16(i + 48)

// N, the accumulators' names and operands, and the numbers of the operands that follow them.
#define WGMMA_BF16(N, NAMES, OPERANDS, P0, P1, P2, P3, P4, P5)                                                              \
  template <>                                                                                                           \
  struct WgmmaBf16<N> {                                                                                                 \
    static __device__ __forceinline__ void shared(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {          \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P2 ", 0;\n"                                                  \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" NAMES "}, %" #P0 ", %" #P1             \
                   ", p, 1, 1, 0, 0;\n}"                                                                               \
                   : OPERANDS : "l"(a), "l"(b), "r"(accumulate) : "memory");                                            \
    }                                                                                                                   \
    static __device__ __forceinline__ void registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,             \
                                                     int accumulate) {                                                  \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P5 ", 0;\n"                                                  \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" NAMES "}, {%" #P0 ", %" #P1 ", %" #P2  \
                   ", %" #P3 "}, %" #P4 ", p, 1, 1, 0;\n}"                                                             \
                   : OPERANDS : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate) : "memory");        \
    }                                                                                                                   \
  };

#define NAMES_4 "%0, %1, %2, %3"
#define NAMES_8 NAMES_4 ", %4, %5, %6, %7"
#define NAMES_16 NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_32 NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_48 NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES_64 NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_80 NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define NAMES_96 NAMES_80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NAMES_112 NAMES_96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define NAMES_128 NAMES_112 ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// clang-format off
#define WGMMA_OPERANDS_8 ACCUMULATORS_4(0)
#define WGMMA_OPERANDS_16 ACCUMULATORS_4(0), ACCUMULATORS_4(4)
#define WGMMA_OPERANDS_32 ACCUMULATORS_16(0)
#define WGMMA_OPERANDS_64 ACCUMULATORS_16(0), ACCUMULATORS_16(16)
#define WGMMA_OPERANDS_96 ACCUMULATORS_16(0), ACCUMULATORS_16(16), ACCUMULATORS_16(32)
#define WGMMA_OPERANDS_128 ACCUMULATORS_64(0)
#define WGMMA_OPERANDS_160 ACCUMULATORS_64(0), ACCUMULATORS_16(64)
#define WGMMA_OPERANDS_192 ACCUMULATORS_64(0), ACCUMULATORS_16(64), ACCUMULATORS_16(80)
#define WGMMA_OPERANDS_224 ACCUMULATORS_64(0), ACCUMULATORS_16(64), ACCUMULATORS_16(80), ACCUMULATORS_16(96)
#define WGMMA_OPERANDS_256 ACCUMULATORS_64(0), ACCUMULATORS_64(64)
WGMMA_BF16(8, NAMES_4, WGMMA_OPERANDS_8, 4, 5, 6, 7, 8, 9)
WGMMA_BF16(16, NAMES_8, WGMMA_OPERANDS_16, 8, 9, 10, 11, 12, 13)
WGMMA_BF16(32, NAMES_16, WGMMA_OPERANDS_32, 16, 17, 18, 19, 20, 21)
WGMMA_BF16(64, NAMES_32, WGMMA_OPERANDS_64, 32, 33, 34, 35, 36, 37)
WGMMA_BF16(96, NAMES_48, WGMMA_OPERANDS_96, 48, 49, 50, 51, 52, 53)
WGMMA_BF16(128, NAMES_64, WGMMA_OPERANDS_128, 64, 65, 66, 67, 68, 69)
WGMMA_BF16(160, NAMES_80, WGMMA_OPERANDS_160, 80, 81, 82, 83, 84, 85)
WGMMA_BF16(192, NAMES_96, WGMMA_OPERANDS_192, 96, 97, 98, 99, 100, 101)
WGMMA_BF16(224, NAMES_112, WGMMA_OPERANDS_224, 112, 113, 114, 115, 116, 117)
WGMMA_BF16(256, NAMES_128, WGMMA_OPERANDS_256, 128, 129, 130, 131, 132, 133)
// clang-format on

#endif

// N: a multiple of 8 up to 256; the device has those listed above.
template <int N>
__device__ __forceinline__ void wgmma_m64k16_bf16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256, "N is a multiple of 8 up to 256");
#ifdef __CUDACC__
  WgmmaBf16<N>::shared(d, a, b, accumulate);
#else
  emulator::wgmma(d, N, nullptr, a, b, accumulate);
#endif
}

// A from registers, as fragments of mma.m16n8k16.
template <int N>
__device__ __forceinline__ void wgmma_m64k16_bf16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256, "N is a multiple of 8 up to 256");
#ifdef __CUDACC__
  WgmmaBf16<N>::registers(d, a, b, accumulate);
#else
  emulator::wgmma(d, N, a, 0, b, accumulate);
#endif
}

#endif
