// Loads and stores of 16 bytes: the widest that one thread makes. Addresses are aligned to 16 bytes.
#pragma once
#include "device.cuh"

struct alignas(16) bf16x8 {
  bf16 at[8];
};

struct alignas(16) f32x4 {
  float at[4];
};

// Whether vectors can be loaded from there on.
__device__ __forceinline__ bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class V, class T>
__device__ __forceinline__ V load16(const T* from) {
  static_assert(sizeof(V) == 16, "16 bytes");
#ifdef __CUDACC__
  const uint4 bits = *reinterpret_cast<const uint4*>(from);
  return *reinterpret_cast<const V*>(&bits);
#else
  const emulator::Bits16 bits = emulator::load16(from);
  V value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

template <class V, class T>
__device__ __forceinline__ void store16(T* to, const V& value) {
  static_assert(sizeof(V) == 16, "16 bytes");
#ifdef __CUDACC__
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&value);
#else
  emulator::Bits16 bits;
  std::memcpy(&bits, &value, sizeof bits);
  emulator::store16(to, bits);
#endif
}

// Two neighbouring elements, the first in the low half; addresses are aligned to 4 bytes.
__device__ __forceinline__ void store4(bf16* to, uint32_t pair) {
#ifdef __CUDACC__
  *reinterpret_cast<uint32_t*>(to) = pair;
#else
  emulator::store4(to, pair);
#endif
}

__device__ __forceinline__ uint32_t load4(const bf16* from) {
#ifdef __CUDACC__
  return *reinterpret_cast<const uint32_t*>(from);
#else
  return emulator::load4(from);
#endif
}

// Of two neighbouring elements the first and the second.
__device__ __forceinline__ float low_float(uint32_t pair) {
#ifdef __CUDACC__
  return __uint_as_float(pair << 16);
#else
  return emulator::bits_to_float(pair << 16);
#endif
}

__device__ __forceinline__ float high_float(uint32_t pair) {
#ifdef __CUDACC__
  return __uint_as_float(pair & 0xFFFF0000);
#else
  return emulator::bits_to_float(pair & 0xFFFF0000);
#endif
}

// The 8 elements that start at `column` of a row of `columns`, as f32, zeros past its end. `aligned`: every row starts at a
// multiple of 16 bytes, so that whole vectors can be loaded at once. The values are the same either way.
__device__ __forceinline__ void load8(float (&to)[8], const bf16* row, int column, int columns, bool aligned) {
  if (aligned && column + 8 <= columns) {
    const bf16x8 v = load16<bf16x8>(row + column);
#pragma unroll
    for (int i = 0; i < 8; i++) to[i] = to_float(v.at[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) to[i] = column + i < columns ? to_float(row[column + i]) : 0.0f;
  }
}

__device__ __forceinline__ void store8(bf16* row, int column, int columns, bool aligned, const float (&from)[8]) {
  if (aligned && column + 8 <= columns) {
    bf16x8 v;
#pragma unroll
    for (int i = 0; i < 8; i++) v.at[i] = to_bf16(from[i]);
    store16(row + column, v);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (column + i < columns) row[column + i] = to_bf16(from[i]);
  }
}

// The same of f32 rows.
__device__ __forceinline__ void load8(float (&to)[8], const float* row, size_t column, size_t columns, bool aligned) {
  if (aligned && column + 8 <= columns) {
    const f32x4 low = load16<f32x4>(row + column), high = load16<f32x4>(row + column + 4);
#pragma unroll
    for (int i = 0; i < 4; i++) to[i] = low.at[i], to[i + 4] = high.at[i];
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) to[i] = column + i < columns ? row[column + i] : 0.0f;
  }
}

__device__ __forceinline__ void store8(float* row, size_t column, size_t columns, bool aligned, const float (&from)[8]) {
  if (aligned && column + 8 <= columns) {
    store16(row + column, f32x4{{from[0], from[1], from[2], from[3]}});
    store16(row + column + 4, f32x4{{from[4], from[5], from[6], from[7]}});
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (column + i < columns) row[column + i] = from[i];
  }
}

// Which eight columns of which row belong to this thread, of a grid with one thread for each; rows past the last are nobody's.
// Blocks of THREADS threads, all in x.
struct Vector {
  unsigned row;
  int column;
};

template <int THREADS>
__device__ __forceinline__ Vector this_vector(int columns) {
  const unsigned vectors = (columns + 7u) / 8, i = blockIdx.x * THREADS + threadIdx.x;
  return {i / vectors, static_cast<int>(i % vectors) * 8};
}
