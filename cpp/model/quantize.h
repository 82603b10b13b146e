// The int8 weight format: groups of 64 values along a row with one scale, as two planes of 4 bits.
//
//   w = scale * (16 * (high - 8) + (low - 8)),  0 <= high, low <= 15
//
// The high plane alone is a coarse version of the row: what token-scope TDA reads first. A group's
// nibbles are 32 bytes; byte i holds value i in its low and value 32 + i in its high four bits, and
// a last, shorter group is filled up with zero weights.
//   high row: [groups][32] nibbles, then [groups] scales, bf16, zeros up to a multiple of 32 bytes
//   low row:  [groups][32] nibbles
//
// int4: groups of 16 values along a row, each with a scale of 8 bits, relative to the row's step.
//
//   w = step * scale * (code - 8),  0 <= code <= 15,  -127 <= scale <= 127
//
//   row: nibbles of [groups of 64][32], as above; scales, int8 [groups of 64][4]; step, f32; zeros
//   up to a multiple of 16 bytes
#pragma once

#include <cstddef>
#include <cstdint>

namespace tda {

inline constexpr std::int64_t kGroup = 64;
inline constexpr std::int64_t kGroupBytes = kGroup / 2;  // in one plane

constexpr std::int64_t groups_of(std::int64_t cols) { return (cols + kGroup - 1) / kGroup; }
constexpr std::int64_t low_row_bytes(std::int64_t cols) { return groups_of(cols) * kGroupBytes; }
constexpr std::int64_t high_row_bytes(std::int64_t cols) {
  return low_row_bytes(cols) + (2 * groups_of(cols) + 31) / 32 * 32;
}

inline constexpr std::int64_t kInt4Scales = 4;  // per 64 values
constexpr std::int64_t int4_row_bytes(std::int64_t cols) {
  return low_row_bytes(cols) + (groups_of(cols) * kInt4Scales + 4 + 15) / 16 * 16;
}

/// Rounds a row of finite values. The largest value of a group becomes +-119: |w - stored| is at
/// most half a step of max / 119, and the step's own rounding to bf16 costs no accuracy, since
/// values are rounded to multiples of the stored step.
void quantize_int8(const float* values, std::int64_t cols, std::byte* high, std::byte* low);

/// Values [first, first + count) of a row, `first` a multiple of 64.
void dequantize_int8(const std::byte* high, const std::byte* low, std::int64_t cols,
                     std::int64_t first, std::int64_t count, float* out);

/// Rounds a row of finite values: of the scales that place each group's largest value near one end
/// of the codes, those of least squared error.
void quantize_int4(const float* values, std::int64_t cols, std::byte* row);

/// Values [first, first + count) of a row.
void dequantize_int4(const std::byte* row, std::int64_t cols, std::int64_t first,
                     std::int64_t count, float* out);

}  // namespace tda
