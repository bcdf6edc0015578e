// A tensor in global memory as the tensor memory accelerator (TMA) sees it. Stands for CUtensorMap; src/device/emulated.rs
// has the same fields.
#pragma once
#include <cstdint>

namespace emulator {

struct alignas(64) TensorMap {
  std::uint64_t base;
  std::uint64_t size[3];     // in elements, the innermost first
  std::uint64_t stride[2];   // in bytes, of the second and the third dimension
  std::uint32_t box[3];      // in elements
  std::uint32_t rank;        // 2 or 3
  std::uint32_t swizzle;     // 0, 32, 64 or 128 bytes
  std::uint32_t reserved[15];
};
static_assert(sizeof(TensorMap) == 128, "as long as CUtensorMap");

}  // namespace emulator
