// The compressed weight formats in rows. Zero weights pad a row to whole groups of 64 values.
//
// int8: a code of 8 bits for each value, and a scale of 8 bits for every 32 values of a row, relative
// to the row's step.
//
//   w = step * scale * (code - 128),  0 <= code <= 255,  -127 <= scale <= 127
//
//   row: codes [groups of 64][64]; scales, int8 [groups of 64][2]; step, f32; zeros up to a multiple
//        of 32 bytes
//
// Of every two groups, which have four scales, the codes of the scales' first 16 values lie in one
// line of 64 bytes, those of their second 16 in the next, so that products which share a SIMD lane
// share a scale. If a last group is alone, it lies in two halves in the same way.
//
// bf16c: bf16 without loss in 12 bits. The lower byte of a value (the exponent's last bit and the
// mantissa) is stored as it is, the upper byte (sign and exponent) as a 4-bit code: code 15 means
// 0, the others the row's 15 most frequent upper bytes, which cover all but a few values in ten
// thousand. The rest are exceptions: stored in a list, with 0 in their place.
//
//   row: upper bytes [15]; number of exceptions, uint8; exceptions [bf16c_exceptions(cols)]:
//        column, uint16, and bf16; groups of 64: lower bytes [64], and codes [32], of byte i in the
//        low half and of byte 32 + i in the high half
//
// Value 32 s + 16 t + 4 q + d of a group is byte 16 q + 8 s + 2 d + t: interleaving twice with the
// upper bytes then yields 16 values in order, in every other 16 bits of a 512-bit vector.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tda {

inline constexpr std::int64_t kGroup = 64;      // values
inline constexpr std::int64_t kInt8Scales = 2;  // per group

constexpr std::int64_t groups_of(std::int64_t cols) { return (cols + kGroup - 1) / kGroup; }
constexpr std::int64_t int8_row_bytes(std::int64_t cols) {
  return (groups_of(cols) * (kGroup + kInt8Scales) + 4 + 31) / 32 * 32;
}
/// The bytes from the first to the second 16 values of a scale, in a group of a row.
constexpr std::int64_t int8_half(std::int64_t group, std::int64_t groups) {
  return group % 2 == 0 && group + 1 == groups ? kGroup / 2 : kGroup;
}
/// Which byte of a row of so many groups is the code of value i.
constexpr std::int64_t int8_place(std::int64_t i, std::int64_t groups) {
  const std::int64_t first = i / (2 * kGroup) * 2 * kGroup, scale = i % (2 * kGroup) / 32;
  return first + i / 16 % 2 * int8_half(i / kGroup, groups) + 16 * scale + i % 16;
}
/// How many exceptions a bf16c row has room for.
constexpr std::int64_t bf16c_exceptions(std::int64_t cols) {
  const std::int64_t count = 3 + cols / 256;
  return count < 255 ? count : 255;
}
constexpr std::int64_t kBf16cGroupBytes = kGroup + kGroup / 2;
/// Which byte of a group is the lower byte of value i.
constexpr std::int64_t bf16c_place(std::int64_t i) {
  const std::int64_t s = i / 32, t = i / 16 % 2, q = i / 4 % 4, d = i % 4;
  return 16 * q + 8 * s + 2 * d + t;
}
constexpr std::int64_t bf16c_head_bytes(std::int64_t cols) {
  return 16 + 4 * bf16c_exceptions(cols);
}
constexpr std::int64_t bf16c_row_bytes(std::int64_t cols) {
  return bf16c_head_bytes(cols) + groups_of(cols) * kBf16cGroupBytes;
}

/// Rounds a row of finite values to int8. A scale is the one nearest to zero, of either sign, that
/// puts its values within codes 0 to 255; the error is at most half of step * scale.
void quantize_int8(const float* values, std::int64_t cols, std::byte* row);

/// Values [first, first + count) of a row.
void dequantize_int8(const std::byte* row, std::int64_t cols, std::int64_t first,
                     std::int64_t count, float* out);

/// Compresses a row. False if it has more exceptions than there is room for, or one in a column
/// beyond 65535.
bool compress_bf16(const std::uint16_t* values, std::int64_t cols, std::byte* row);

/// Values [first, first + count) of a row.
void expand_bf16(const std::byte* row, std::int64_t cols, std::int64_t first, std::int64_t count,
                 float* out);

}  // namespace tda
