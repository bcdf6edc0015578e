// The 16-bit floating-point formats on the host: conversions as the hardware does them.
#pragma once
#include <cstdint>
#include <cstring>

namespace emulator {

inline float bits_to_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline std::uint32_t float_to_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float bf16_to_float(std::uint16_t bits) { return bits_to_float(static_cast<std::uint32_t>(bits) << 16); }

// To nearest, ties to even; every NaN becomes 0x7FFF, as cvt.rn.bf16.f32 makes it.
inline std::uint16_t float_to_bf16(float value) {
  std::uint32_t bits = float_to_bits(value);
  if (value != value) return 0x7FFF;
  return static_cast<std::uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline float f16_to_float(std::uint16_t bits) {
  const std::uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return bits_to_float(sign | 0x7F800000 | fraction << 13);
  if (exponent == 0) {
    const float value = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -value : value;
  }
  return bits_to_float(sign | (exponent + 112) << 23 | fraction << 13);
}

}  // namespace emulator
