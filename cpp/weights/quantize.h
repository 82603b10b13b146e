// The int8 weight format: two planes of 4 bits, and a scale of 8 bits for every 32 values along a
// row, relative to the row's step.
//
//   w = step * scale * (16 * (high - 8) + (low - 8)),  0 <= high, low <= 15,  -127 <= scale <= 127
//
// The high plane alone is a coarse version of the row: what token-scope TDA reads first. The values
// of a scale have their nibbles in 16 bytes; byte i holds value i in its low and value 16 + i in
// its high four bits, so that one lane's products have one scale. Zero weights fill up the last,
// shorter group of 64 values.
//   high row: nibbles [groups of 64][32]; scales, int8 [groups of 64][2]; step, f32; zeros up to a
//             multiple of 32 bytes
//   low row:  nibbles [groups of 64][32]
//
// int4: one such plane, and a scale for every 16 values.
//
//   w = step * scale * (code - 8),  0 <= code <= 15,  -127 <= scale <= 127
//
// Those 16 are 8 bytes, value 8 + i above value i.
//   row: nibbles [groups of 64][32]; scales, int8 [groups of 64][4]; step, f32; zeros up to a
//        multiple of 16 bytes
//
// bf16c: bf16 values, compressed. Their lower bytes (the exponent's last bit and the mantissa) are
// kept as they are, the upper ones (sign and exponent) as 4-bit codes: code 15 is 0, the others are
// the 15 most frequent ones of the row, and of its weights all but a few in ten thousand have one
// of them. What has none is kept apart, and 0 stands in its place.
//
//   row: upper bytes [15]; number of values apart, uint8; values apart [apart_of(cols)]: column,
//        uint16, and bf16; groups of 64: lower bytes [64], and codes [32], of byte i in the low and
//        of byte 32 + i in the high four bits
//
// Value 32 s + 16 t + 4 q + d of a group is byte 16 q + 8 s + 2 d + t, the last group is filled up
// with zeros: so two interleavings with the upper bytes put 16 values in their order into every
// other 16 bits of 512.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tda {

inline constexpr std::int64_t kGroup = 64;               // values whose nibbles lie together
inline constexpr std::int64_t kGroupBytes = kGroup / 2;  // in one plane
inline constexpr std::int64_t kInt8Scales = 2;           // per group
inline constexpr std::int64_t kInt4Scales = 4;

/// Where value i of a group has its nibble: in which byte, and how far above its lowest bit.
/// `part`: values that share a scale.
struct NibblePlace {
  std::int64_t byte;
  int shift;
};
constexpr NibblePlace nibble_place(std::int64_t i, std::int64_t part) {
  const std::int64_t half = part / 2, in_part = i % part;
  return {i / part * half + in_part % half, in_part < half ? 0 : 4};
}

constexpr std::int64_t groups_of(std::int64_t cols) { return (cols + kGroup - 1) / kGroup; }
constexpr std::int64_t low_row_bytes(std::int64_t cols) { return groups_of(cols) * kGroupBytes; }
constexpr std::int64_t high_row_bytes(std::int64_t cols) {
  return low_row_bytes(cols) + (groups_of(cols) * kInt8Scales + 4 + 31) / 32 * 32;
}
/// Values that a bf16c row has room for apart.
constexpr std::int64_t apart_of(std::int64_t cols) {
  const std::int64_t count = 3 + cols / 256;
  return count < 255 ? count : 255;
}
constexpr std::int64_t kBf16cGroupBytes = kGroup + kGroup / 2;
/// Where value i of a group has its lower byte.
constexpr std::int64_t bf16c_place(std::int64_t i) {
  const std::int64_t s = i / 32, t = i / 16 % 2, q = i / 4 % 4, d = i % 4;
  return 16 * q + 8 * s + 2 * d + t;
}
constexpr std::int64_t bf16c_head_bytes(std::int64_t cols) { return 16 + 4 * apart_of(cols); }
constexpr std::int64_t bf16c_row_bytes(std::int64_t cols) {
  return bf16c_head_bytes(cols) + groups_of(cols) * kBf16cGroupBytes;
}
constexpr std::int64_t int4_row_bytes(std::int64_t cols) {
  return low_row_bytes(cols) + (groups_of(cols) * kInt4Scales + 4 + 15) / 16 * 16;
}

/// Rounds a row of finite values to at most half a step of their scale: of either sign, the one
/// nearest to zero that reaches all of them with -128 to 119 steps.
void quantize_int8(const float* values, std::int64_t cols, std::byte* high, std::byte* low);

/// Values [first, first + count) of a row.
void dequantize_int8(const std::byte* high, const std::byte* low, std::int64_t cols,
                     std::int64_t first, std::int64_t count, float* out);

/// Rounds a row of finite values: of the scales that place each group's largest value near one end
/// of the codes, those of least squared error.
void quantize_int4(const float* values, std::int64_t cols, std::byte* row);

/// Values [first, first + count) of a row.
void dequantize_int4(const std::byte* row, std::int64_t cols, std::int64_t first,
                     std::int64_t count, float* out);

/// Compresses a row, or says false if it has more values to keep apart than room, or a column of
/// them beyond 65535.
bool compress_bf16(const std::uint16_t* values, std::int64_t cols, std::byte* row);

/// Values [first, first + count) of a row.
void expand_bf16(const std::byte* row, std::int64_t cols, std::int64_t first, std::int64_t count,
                 float* out);

}  // namespace tda
