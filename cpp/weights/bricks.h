// The formats whose weights lie in bricks of 64 rows x 32 inputs, which a decode step reads from
// first to last.
//
// graded: 4 bits of every weight that are always read, with a scale for 16 inputs, and a 4-bit rest
// that is read for the inputs that matter most to a token (precision by input, docs/tda.md).
//
//   high[r, i] = step[r] * scale * (code - 8)      0 <= code <= 15, -127 <= scale <= 127
//   rest[r, i] = rest_step[r] * (code - 8)         w = high + rest
//
// int4: the high part alone. Weights that had 4 bits before are stored as their file has them
// instead, with a scale and a minimum of 16 bits for 32 inputs:
//
//   w[r, i] = step[r] * (scale * code + minimum)   0 <= code <= 15
//
// Rows that only pad have steps of 0. Rests lie by input, so that what one input needs is one run
// for as many rows as a task has. In bricks and rests the lower half of a byte belongs to one of a
// strip's first 32 rows, the upper half to the row 32 after it.
//
// In memory, each part 64-byte aligned; without rests it ends with the outliers, without rest_step:
//   bricks                 [strips][blocks], or [blocks][strips] if `by_block`
//   step, rest_step        f32 [strips * 64] each
//   outliers               [strips][kStripOutliers]
//   rest_lengths           f32 [blocks * 32]: the length of an input's column of rests
//   rests                  [blocks * 32][rest_stride bytes]
#pragma once

#include <tda/types.h>

#include <cstddef>
#include <cstdint>

namespace tda {

struct InputFactor;  // input_factor.h

/// Whether a format's weights lie in bricks, not in rows, and TDA on them decides by input.
constexpr bool in_bricks(WeightFormat format) {
  return format == WeightFormat::graded || format == WeightFormat::int4;
}

inline constexpr std::int64_t kStripRows = 64;
inline constexpr std::int64_t kBlockInputs = 32;
inline constexpr std::int64_t kScaleInputs = 16;  // of centred bricks

/// Byte [q][4 r + k]: input 4 q + k of row r and, in the upper half, of row 32 + r.
using BrickCodes = std::uint8_t[kBlockInputs / 4][4 * kStripRows / 2];

struct CentredBrick {
  std::int8_t scales[2][kStripRows];  // of inputs 0 to 15 and 16 to 31
  BrickCodes codes;
};
static_assert(sizeof(CentredBrick) == 1152);

struct LineBrick {
  std::uint16_t scales[kStripRows], minima[kStripRows];  // f16
  BrickCodes codes;
};
static_assert(sizeof(LineBrick) == 1280);

/// What a matrix's bricks are: graded has centred bricks and rests, int4 centred bricks, lines line
/// bricks.
enum class BrickKind { graded, int4, lines };
inline constexpr const char* kBrickKinds[] = {"graded", "int4", "lines"};  // in engine folders
inline constexpr const char* kOrderedLines = "ordered lines";  // lines with Matrix::input_order

/// A weight so much larger than its neighbours that they would lose their codes to it. It is stored
/// apart and counts as 0 in its brick. value 0: there is none.
struct StripOutlier {
  std::int32_t row, input;
  float value;
};
inline constexpr std::int64_t kStripOutliers = 4;

/// A matrix of outputs (rows) x inputs (cols) in bricks. Does not own its data.
struct Bricks {
  std::int64_t rows, cols, strips, blocks;
  BrickKind kind;
  bool by_block;
  const std::byte* bricks;
  const float* steps;            // [strips * 64]
  const StripOutlier* outliers;  // [strips * kStripOutliers]
  // Null without rests.
  const float* rest_steps = nullptr;    // [strips * 64]
  const float* rest_lengths = nullptr;  // [blocks * 32]
  const std::uint8_t* rests = nullptr;
  std::int64_t rest_stride = 0;

  Bricks(const std::byte* data, std::int64_t rows, std::int64_t cols, BrickKind kind,
         bool by_block);

  bool has_rests() const { return kind == BrickKind::graded; }

  template <class Brick>
  const Brick& brick(std::int64_t strip, std::int64_t block) const {
    return reinterpret_cast<const Brick*>(
        bricks)[by_block ? block * strips + strip : strip * blocks + block];
  }
  const std::uint8_t* rest(std::int64_t input) const { return rests + input * rest_stride; }

  /// In memory, those of them that are always read, and those that one input's rest adds.
  std::int64_t bytes() const;
  std::int64_t high_bytes() const;
  std::int64_t rest_bytes() const { return has_rests() ? strips * kStripRows / 2 : 0; }
};

/// Rounds a strip's rows into cleared memory. values: [64][blocks * 32], finite, zeros where rows
/// or inputs pad; overwritten. Everything is chosen by squared error. Scales of centred bricks are
/// those that put a group's largest value near either end of the codes, a rest's step is the best
/// of nine for its row, and lines are the best of five clippings, each followed by the
/// least-squares scale and minimum of its codes. inputs: those of int4's centred bricks are chosen
/// by the squared error of the product instead, see round_by_inputs.cpp.
void quantize_bricks(const Bricks& target, std::int64_t strip, float* values,
                     const InputFactor* inputs = nullptr);

/// 32 values as codes: value = scale * code + minimum.
struct LineGroup {
  std::uint8_t codes[kBlockInputs];
  float scale, minimum;
};
/// Stores a strip of lines as it is given, but for the rounding of scales and minima to f16: by at
/// most 2^-11 of themselves, or 2^-40 of the row's largest of them. groups: [64][blocks]; those of
/// rows of zeros lose their codes.
void store_lines(const Bricks& target, std::int64_t strip, LineGroup* groups);
/// Whether 32 values are 16 levels of a line, but for rounding to 16 bits. False for constants.
bool on_a_line(const float* values);

/// Fills rest_lengths of the inputs of blocks [first, end), when all strips are quantised.
void measure_rests(const Bricks& target, std::int64_t first, std::int64_t end);
/// The length of each of a block's 32 columns.
void measure_columns(const Bricks& source, std::int64_t block, float* lengths);

/// Values [first, first + count) of a row, without the rests if `high_only`.
void dequantize_bricks(const Bricks& source, std::int64_t row, std::int64_t first,
                       std::int64_t count, float* out, bool high_only = false);

}  // namespace tda
