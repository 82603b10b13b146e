// The graded format: 4 bits of every weight that are always read, and a 4-bit rest that is read for
// the inputs that matter most to a token (precision by input, docs/tda.md).
//
//   high[r, i] = step[r] * (scale * (code - 8) + 16 * offset)     0 <= code <= 15
//   rest[r, i] = rest_step[r] * (code - 8)                        w = high + rest
//
// `scale` (1 to 255) and `offset` (-127 to 127) hold for the 32 inputs of a brick. Rows that only pad
// have steps of 0. High parts lie in bricks of 64 rows x 32 inputs, which a decode step reads from
// first to last; rests lie by input, so that what one input needs is one run for as many rows as a
// task has. In both, the lower half of a byte belongs to one of a strip's first 32 rows, the upper
// half to the row 32 after it.
//
// In memory, each part 64-byte aligned:
//   bricks                 [strips][blocks], or [blocks][strips] if `by_block`
//   step, rest_step        f32 [strips * 64] each
//   outliers               [strips][kStripOutliers]
//   rest_lengths           f32 [blocks * 32]: the length of an input's column of rests
//   rests                  [blocks * 32][rest_stride bytes]
#pragma once

#include <cstddef>
#include <cstdint>

namespace tda {

inline constexpr std::int64_t kStripRows = 64;
inline constexpr std::int64_t kBlockInputs = 32;

struct Brick {
  std::uint8_t scales[kStripRows];
  std::int8_t offsets[kStripRows];
  /// Byte [q][4 r + k]: input 4 q + k of row r and, in the upper half, of row 32 + r.
  std::uint8_t codes[kBlockInputs / 4][4 * kStripRows / 2];
};
static_assert(sizeof(Brick) == 1152);

/// A weight so much larger than its neighbours that they would lose their codes to it. It is stored
/// apart and counts as 0 in its brick. value 0: there is none.
struct StripOutlier {
  std::int32_t row, input;
  float value;
};
inline constexpr std::int64_t kStripOutliers = 4;

/// A matrix of outputs (rows) x inputs (cols) in this format. Does not own its data.
struct Graded {
  std::int64_t rows, cols, strips, blocks;
  bool by_block;
  const Brick* bricks;
  const float *steps, *rest_steps;  // [strips * 64]
  const StripOutlier* outliers;     // [strips * kStripOutliers]
  const float* rest_lengths;        // [blocks * 32]
  const std::uint8_t* rests;
  std::int64_t rest_stride;

  Graded(const std::byte* data, std::int64_t rows, std::int64_t cols, bool by_block);

  const Brick& brick(std::int64_t strip, std::int64_t block) const {
    return bricks[by_block ? block * strips + strip : strip * blocks + block];
  }
  const std::uint8_t* rest(std::int64_t input) const { return rests + input * rest_stride; }
};

std::int64_t graded_bytes(std::int64_t rows, std::int64_t cols);
/// Bytes of a matrix that are always read, and those that one input's rest adds.
std::int64_t graded_high_bytes(std::int64_t rows, std::int64_t cols);
std::int64_t graded_rest_bytes(std::int64_t rows);

/// Rounds a strip's rows into cleared memory. values: [64][blocks * 32], finite, zeros where rows or inputs pad;
/// overwritten. The scale and offset of 32 values are the best of five clippings of their range in
/// squared error, and the rest's step the best of nine for its row.
void quantize_graded(const Graded& target, std::int64_t strip, float* values);

/// Fills rest_lengths of the inputs [first, end), when all strips are quantised.
void measure_rests(const Graded& target, std::int64_t first, std::int64_t end);

/// Values [first, first + count) of a row, without the rests if `high_only`.
void dequantize_graded(const Graded& source, std::int64_t row, std::int64_t first,
                       std::int64_t count, float* out, bool high_only = false);

}  // namespace tda
