// What every kernel includes first: the CUDA language under nvcc, the emulator's under a C++ compiler.
#pragma once

#ifdef __CUDACC__

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

using bf16 = __nv_bfloat16;
using TensorMap = CUtensorMap;

__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ bf16 to_bf16(float x) { return __float2bfloat16_rn(x); }
__device__ __forceinline__ bf16 bf16_of_bits(uint16_t bits) { return __ushort_as_bfloat16(bits); }

// KERNEL(f, threads): f can be launched by name, in blocks of so many threads. On the device its symbol is that name.
#define KERNEL(f, threads) static_assert(true)
// SHARED(float, tile, [4][32]): a static array in shared memory.
#define SHARED(type, name, ...) __shared__ type name __VA_ARGS__
// DYNAMIC_SHARED(bf16, tiles): the bytes that the launch asks for, aligned for every instruction.
#define DYNAMIC_SHARED(type, name)                        \
  extern __shared__ __align__(1024) unsigned char dynamic_shared_bytes[]; \
  type* name = reinterpret_cast<type*>(dynamic_shared_bytes)
// Kernels keep C linkage so that their names are not mangled.
#define GLOBAL extern "C" __global__

#else

#include "../emulator/device.h"

using emulator::TensorMap;

struct bf16 {
  std::uint16_t bits;
};
template <>
struct emulator::TypeName<bf16*> {
  static constexpr const char* value = "bf16*";
};

__device__ __forceinline__ float to_float(bf16 x) { return emulator::bf16_to_float(x.bits); }
__device__ __forceinline__ bf16 to_bf16(float x) { return {emulator::float_to_bf16(x)}; }
__device__ __forceinline__ bf16 bf16_of_bits(std::uint16_t bits) { return {bits}; }

#define SHARED(type, name, ...)                 \
  typedef type name##_shared_type __VA_ARGS__;  \
  static const char name##_shared_tag = 0;      \
  auto& name = *static_cast<name##_shared_type*>( \
      emulator::shared_array(&name##_shared_tag, sizeof(name##_shared_type), alignof(name##_shared_type)))
#define DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(emulator::dynamic_shared())
#define GLOBAL __global__

#endif
