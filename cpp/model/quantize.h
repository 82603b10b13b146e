// The integer weight formats. int8: two planes of 4 bits, and a scale of 8 bits for every 32 values
// along a row, relative to the row's step.
//
//   w = step * scale * (16 * (high - 8) + (low - 8)),  0 <= high, low <= 15,  0 <= scale <= 127
//
// The high plane alone is a coarse version of the row: what token-scope TDA reads first.
//   high row: nibbles [groups of 64][32]; scales, int8 [groups of 64][2]; step, f32; zeros up to a
//             multiple of 32 bytes
//   low row:  nibbles [groups of 64][32]
//
// int4: one such plane, and a scale for every 16 values.
//
//   w = step * scale * (code - 8),  0 <= code <= 15,  -127 <= scale <= 127
//
//   row: nibbles [groups of 64][32]; scales, int8 [groups of 64][4]; step, f32; zeros up to a
//        multiple of 16 bytes
//
// Order of nibbles. Instructions multiply four neighbouring bytes with four of x and add them up,
// 16 such fours at once. What has a scale in common is to meet in one of these sums, so that a row
// is scaled once per chunk, not once per vector: in a chunk of V vectors of 64 values (as many as a
// scale has fours, 8 or 4; then fewer powers of two, as the groups of 64 end) four i is in lane
// i / V of vector i % V. A line of 64 bytes holds vector m in the low and vector m + V / 2 in the
// high four bits of its bytes; the 32 bytes of a chunk with V = 1 hold lane l in the low and lane
// l + 8 in the high ones. The last, shorter group is filled up with zero weights.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tda {

inline constexpr std::int64_t kGroup = 64;               // values whose nibbles lie together
inline constexpr std::int64_t kGroupBytes = kGroup / 2;  // in one plane
inline constexpr std::int64_t kInt8Scales = 2;           // per group
inline constexpr std::int64_t kInt4Scales = 4;

/// Vectors of a whole chunk: fours that have a scale in common.
inline constexpr std::int64_t kInt8Vectors = kGroup / kInt8Scales / 4;
inline constexpr std::int64_t kInt4Vectors = kGroup / kInt4Scales / 4;

constexpr std::int64_t groups_of(std::int64_t cols) { return (cols + kGroup - 1) / kGroup; }
constexpr std::int64_t low_row_bytes(std::int64_t cols) { return groups_of(cols) * kGroupBytes; }
constexpr std::int64_t high_row_bytes(std::int64_t cols) {
  return low_row_bytes(cols) + (groups_of(cols) * kInt8Scales + 4 + 31) / 32 * 32;
}
constexpr std::int64_t int4_row_bytes(std::int64_t cols) {
  return low_row_bytes(cols) + (groups_of(cols) * kInt4Scales + 4 + 15) / 16 * 16;
}

/// Groups [first, first + vectors) of a row.
struct Chunk {
  std::int64_t first, vectors;
};

/// The chunk that a group is part of; `most` vectors to a whole one.
constexpr Chunk chunk_at(std::int64_t group, std::int64_t groups, std::int64_t most) {
  std::int64_t first = group / most * most;
  for (std::int64_t vectors = most;; vectors /= 2) {
    if (first + vectors > groups) continue;
    if (group < first + vectors) return {first, vectors};
    first += vectors;
  }
}

/// Four neighbours' nibbles: in the bits from `shift` on of the four bytes from `byte` on.
struct Four {
  std::int64_t byte;
  int shift;  // 0 or 4
};

/// Where values i, a multiple of 4, to i + 3 of a row of `cols` lie in a plane.
constexpr Four four_at(std::int64_t i, std::int64_t cols, std::int64_t most) {
  const Chunk chunk = chunk_at(i / kGroup, groups_of(cols), most);
  const std::int64_t four = (i - chunk.first * kGroup) / 4, start = chunk.first * kGroupBytes;
  if (chunk.vectors == 1) return {start + four % 8 * 4, four < 8 ? 0 : 4};
  const std::int64_t lane = four / chunk.vectors, v = four % chunk.vectors;
  const std::int64_t lines = chunk.vectors / 2;
  return {start + v % lines * 64 + lane * 4, v < lines ? 0 : 4};
}

/// Rounds a row of finite values: to at most half a step of their scale, the least that reaches
/// their largest value with 119 of them.
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

}  // namespace tda
