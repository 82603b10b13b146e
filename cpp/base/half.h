// Conversions between f32 and the 16-bit float formats, as bit patterns.
//
// Internal linkage on purpose: sources compiled for different instruction sets include this, and
// the linker must not merge their copies. Branch-free, so that loops over it vectorise.
#pragma once

#include <bit>
#include <cstdint>

namespace tda {

[[maybe_unused]] static inline float bf16_to_f32(std::uint16_t value) {
  return std::bit_cast<float>(std::uint32_t{value} << 16);
}

/// Rounds to nearest, ties to even; overflow gives infinity, NaN a quiet NaN.
[[maybe_unused]] static inline std::uint16_t f32_to_bf16(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const std::uint32_t quiet_nan = (bits >> 16) | 0x40;
  return static_cast<std::uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? quiet_nan : rounded);
}

[[maybe_unused]] static inline float f16_to_f32(std::uint16_t value) {
  const std::uint32_t sign = (value & 0x8000u) << 16;
  const std::uint32_t magnitude = (value & 0x7fffu) << 13;  // exponent and mantissa, as in f32
  // The exponent bias grows from 15 to 127; infinity and NaN get f32's largest exponent.
  const std::uint32_t normal = magnitude + (112u << 23);
  const std::uint32_t non_finite = magnitude + (224u << 23);
  // A subnormal is a multiple of 2^-24, which is the unit in the last place of 0.5f.
  const std::uint32_t subnormal =
      std::bit_cast<std::uint32_t>(std::bit_cast<float>(0x3f000000u | (value & 0x3ffu)) - 0.5f);
  const std::uint32_t exponent = value & 0x7c00u;
  const std::uint32_t bits = exponent == 0 ? subnormal : exponent == 0x7c00 ? non_finite : normal;
  return std::bit_cast<float>(bits | sign);
}

/// Rounds to nearest, ties to even; overflow gives infinity. Not for NaN.
[[maybe_unused]] static inline std::uint16_t f32_to_f16(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
  const float size = std::bit_cast<float>(bits & 0x7fffffffu);
  // Below the least normal f16, adding 0.5 leaves multiples of 2^-24 in the low bits.
  const std::uint32_t subnormal = std::bit_cast<std::uint32_t>(size + 0.5f) & 0x7fffu;
  const std::uint32_t exact = (bits & 0x7fffffffu) - (112u << 23);
  const std::uint32_t rounded = (exact + 0xfff + (exact >> 13 & 1)) >> 13;
  const std::uint32_t normal = rounded < 0x7c00u ? rounded : 0x7c00u;
  return sign | static_cast<std::uint16_t>(size < 6.103515625e-5f ? subnormal : normal);
}

}  // namespace tda
