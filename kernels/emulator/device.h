// The CUDA language as a kernel sees it on the host. Kernels get it through kernels/include/device.cuh.
//
// Each function finds the thread that runs it by itself, and its place in the kernel by its return address.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "half.h"
#include "index.h"
#include "registry.h"
#include "tensor_map.h"

namespace emulator {

// What a fiber is never changes, so these may be computed once per function.
[[gnu::const]] Index thread_index();
[[gnu::const]] Index block_index();
[[gnu::const]] Index block_size();
[[gnu::const]] Index grid_size();

void* dynamic_shared();
void* shared_array(const void* tag, std::size_t bytes, std::size_t align);

// Four and sixteen aligned bytes at once. Passed in registers, so that no check is made of what a vector's elements do afterwards.
struct Bits16 {
  std::uint64_t low, high;
};
Bits16 load16(const void* from);
void store16(void* to, Bits16 bits);
std::uint32_t load4(const void* from);
void store4(void* to, std::uint32_t bits);

void sync_threads();
void sync_warp(std::uint32_t mask);
void named_barrier_sync(unsigned id, unsigned threads);
void named_barrier_arrive(unsigned id, unsigned threads);

enum class Shuffle { index, up, down, exclusive_or };
std::uint64_t shuffle(Shuffle mode, std::uint32_t mask, std::uint64_t value, unsigned operand, unsigned width);
enum class Vote { ballot, any, all };
std::uint32_t vote(Vote kind, std::uint32_t mask, bool predicate);

template <class T>
inline __attribute__((always_inline)) T shuffle_value(Shuffle mode, std::uint32_t mask, T value, unsigned operand, unsigned width) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle(mode, mask, bits, operand, width);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

int atomic_add(int* address, int value);
unsigned atomic_add(unsigned* address, unsigned value);
unsigned long long atomic_add(unsigned long long* address, unsigned long long value);
float atomic_add(float* address, float value);
int atomic_max(int* address, int value);
unsigned atomic_max(unsigned* address, unsigned value);
unsigned long long atomic_max(unsigned long long* address, unsigned long long value);
unsigned atomic_exchange(unsigned* address, unsigned value);
int atomic_cas(int* address, int expected, int value);
unsigned atomic_cas(unsigned* address, unsigned expected, unsigned value);
unsigned long long atomic_cas(unsigned long long* address, unsigned long long expected, unsigned long long value);

// Copies `valid` of `bytes` bytes and zeros for the rest.
void cp_async(void* to, const void* from, unsigned bytes, unsigned valid);
void cp_async_commit();
void cp_async_wait(unsigned pending);
void cp_async_wait_all();

void mbarrier_init(void* barrier, unsigned count);
void mbarrier_arrive(void* barrier);
void mbarrier_arrive_expect_tx(void* barrier, unsigned bytes);
void mbarrier_wait_parity(void* barrier, unsigned parity);
void tensor_copy_2d(void* to, const TensorMap* map, void* barrier, int x, int y);
void tensor_copy_3d(void* to, const TensorMap* map, void* barrier, int x, int y, int z);

void ldmatrix(std::uint32_t* to, unsigned matrices, bool transposed, const void* row);
void mma_bf16(float* d, const std::uint32_t* a, const std::uint32_t* b);
void mma_f16(float* d, const std::uint32_t* a, const std::uint32_t* b);

// A from `registers`, or by its descriptor where they are null.
void wgmma(float* d, unsigned n, const std::uint32_t* registers, std::uint64_t a, std::uint64_t b, bool accumulate);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(unsigned pending);
void fence_proxy_async();
std::uint32_t shared_address(const void* address);

}  // namespace emulator

#define __global__ static
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define blockDim (emulator::block_size())
#define gridDim (emulator::grid_size())

__forceinline__ void __syncthreads() { emulator::sync_threads(); }
__forceinline__ void __syncwarp(unsigned mask = ~0u) { emulator::sync_warp(mask); }

template <class T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return emulator::shuffle_value(emulator::Shuffle::index, mask, value, lane, width);
}
template <class T>
__forceinline__ T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emulator::shuffle_value(emulator::Shuffle::up, mask, value, delta, width);
}
template <class T>
__forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emulator::shuffle_value(emulator::Shuffle::down, mask, value, delta, width);
}
template <class T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  return emulator::shuffle_value(emulator::Shuffle::exclusive_or, mask, value, lanes, width);
}
__forceinline__ unsigned __ballot_sync(unsigned mask, int predicate) {
  return emulator::vote(emulator::Vote::ballot, mask, predicate);
}
__forceinline__ int __any_sync(unsigned mask, int predicate) { return emulator::vote(emulator::Vote::any, mask, predicate); }
__forceinline__ int __all_sync(unsigned mask, int predicate) { return emulator::vote(emulator::Vote::all, mask, predicate); }

template <class T>
__forceinline__ T atomicAdd(T* address, T value) { return emulator::atomic_add(address, value); }
template <class T>
__forceinline__ T atomicMax(T* address, T value) { return emulator::atomic_max(address, value); }
__forceinline__ unsigned atomicExch(unsigned* address, unsigned value) { return emulator::atomic_exchange(address, value); }
template <class T>
__forceinline__ T atomicCAS(T* address, T expected, T value) { return emulator::atomic_cas(address, expected, value); }

__forceinline__ int __popc(unsigned x) { return __builtin_popcount(x); }
__forceinline__ int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline unsigned __float_as_uint(float x) { return emulator::float_to_bits(x); }
inline float __uint_as_float(unsigned bits) { return emulator::bits_to_float(bits); }
inline long long __double_as_longlong(double x) {
  long long bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline double __longlong_as_double(long long bits) {
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
