#include "weights/graded.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace tda {
namespace {

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
std::int64_t aligned(std::int64_t bytes) { return ceil_div(bytes, 64) * 64; }

/// Runs of rests start on cache lines, an odd number of them apart: at a power of two all would
/// fall into the same sets of the cache.
std::int64_t rest_stride_of(std::int64_t strips) { return (ceil_div(strips, 2) | 1) * 64; }

/// Where the parts of a matrix begin.
struct Parts {
  std::int64_t steps, rest_steps, outliers, rest_lengths, rests, end;

  Parts(std::int64_t strips, std::int64_t blocks) {
    steps = strips * blocks * static_cast<std::int64_t>(sizeof(Brick));
    rest_steps = steps + strips * kStripRows * 4;
    outliers = rest_steps + strips * kStripRows * 4;
    rest_lengths = outliers + aligned(strips * kStripOutliers *
                                      static_cast<std::int64_t>(sizeof(StripOutlier)));
    rests = rest_lengths + aligned(blocks * kBlockInputs * 4);
    end = rests + blocks * kBlockInputs * rest_stride_of(strips);
  }
};

/// The byte of a strip's run that holds row r's rest, and the shift in it.
struct RestPlace {
  std::int64_t byte;
  int shift;
};
RestPlace rest_place(std::int64_t r) { return {r % 32, r < 32 ? 0 : 4}; }

/// The nearest integer of a number below 2^22: compilers vectorise this, not std::nearbyint.
float nearest(float value) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23
  return (value + kShift) - kShift;
}

float code_of(float value, float inverse_step) {  // -8 ... 7
  return nearest(std::min(std::max(value * inverse_step, -8.0f), 7.0f));
}

/// The squared error of n values, a multiple of 8, as `base` and 4-bit codes of `step`. Summed in lanes,
/// which compilers make a vector of.
float squared_error(const float* values, std::int64_t n, float base, float step) {
  constexpr std::int64_t kLanes = 8;
  const float inverse = 1 / step;
  float lanes[kLanes] = {};
  for (std::int64_t i = 0; i < n; i += kLanes)
    for (std::int64_t k = 0; k < kLanes; ++k) {
      const float value = values[i + k] - base;
      const float missed = value - step * code_of(value, inverse);
      lanes[k] += missed * missed;
    }
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) +
         ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

/// How a brick codes 32 values of a row, in steps.
struct Coding {
  float scale = 1, offset = 0;
};

/// The best of five clippings of the values' range.
Coding choose_coding(const float* values) {
  const auto [low, high] = std::minmax_element(values, values + kBlockInputs);
  const float middle = (*low + *high) / 2, range = *high - *low;
  Coding best;
  float least = std::numeric_limits<float>::infinity();
  for (const float clip : {1.0f, 0.95f, 0.9f, 0.85f, 0.8f}) {
    Coding coding;
    coding.scale = std::clamp(nearest(range * clip / 15), 1.0f, 255.0f);
    // Codes -8 ... 7 lie around -0.5.
    coding.offset = std::clamp(nearest((middle + 0.5f * coding.scale) / 16), -127.0f, 127.0f);
    const float error = squared_error(values, kBlockInputs, 16 * coding.offset, coding.scale);
    if (error < least) {
      least = error;
      best = coding;
    }
  }
  return best;
}

/// Takes the strip's outliers out of `values`: the largest values that are more than kRatio times
/// the next of their 32.
void take_outliers(float* values, std::int64_t cols, std::int64_t stride, std::int64_t first_row,
                   StripOutlier* out) {
  constexpr float kRatio = 8;
  struct Found {
    float ratio;
    std::int64_t row, input;
  };
  std::vector<Found> found;
  for (std::int64_t r = 0; r < kStripRows; ++r)
    for (std::int64_t first = 0; first < cols; first += kBlockInputs) {
      const float* const group = values + r * stride + first;
      float largest = 0, next = 0;
      std::int64_t at = 0;
      for (std::int64_t i = 0; i < kBlockInputs; ++i) {
        const float size = std::abs(group[i]);
        if (size > largest) {
          next = largest;
          largest = size;
          at = first + i;
        } else if (size > next) {
          next = size;
        }
      }
      if (next > 0 && largest > kRatio * next) found.push_back({largest / next, r, at});
    }
  std::stable_sort(found.begin(), found.end(),
                   [](const Found& a, const Found& b) { return a.ratio > b.ratio; });
  for (std::int64_t k = 0; k < kStripOutliers; ++k) {
    out[k] = {};
    if (k >= std::ssize(found)) continue;
    float& value = values[found[k].row * stride + found[k].input];
    out[k] = {static_cast<std::int32_t>(first_row + found[k].row),
              static_cast<std::int32_t>(found[k].input), value};
    value = 0;
  }
}

/// The step of least squared error for the rests of a row whose largest scale is `largest`.
float choose_rest_step(const float* rests, std::int64_t n, float largest) {
  float best = 0, least = std::numeric_limits<float>::infinity();
  for (int k = 4; k <= 12; ++k) {
    const float step = largest / 160 * static_cast<float>(k);
    const float error = squared_error(rests, n, 0, step);
    if (error < least) {
      least = error;
      best = step;
    }
  }
  return best;
}

/// The least step with which every scale and offset of a row fits into its byte.
float choose_step(const float* row, std::int64_t n) {
  double step = 0;
  for (std::int64_t first = 0; first < n; first += kBlockInputs) {
    const auto [low, high] = std::minmax_element(row + first, row + first + kBlockInputs);
    const double a = *low, b = *high;
    step = std::max({step, (b - a) / 15 / 255, std::abs(a + b) / 2 / (16 * 126)});
  }
  return static_cast<float>(step);
}

}  // namespace

Graded::Graded(const std::byte* data, std::int64_t row_count, std::int64_t col_count,
               bool in_blocks)
    : rows(row_count),
      cols(col_count),
      strips(ceil_div(rows, kStripRows)),
      blocks(ceil_div(cols, kBlockInputs)),
      by_block(in_blocks),
      rest_stride(rest_stride_of(strips)) {
  const Parts parts(strips, blocks);
  const auto at = [&](std::int64_t offset) { return data ? data + offset : nullptr; };
  bricks = reinterpret_cast<const Brick*>(data);
  steps = reinterpret_cast<const float*>(at(parts.steps));
  rest_steps = reinterpret_cast<const float*>(at(parts.rest_steps));
  outliers = reinterpret_cast<const StripOutlier*>(at(parts.outliers));
  rest_lengths = reinterpret_cast<const float*>(at(parts.rest_lengths));
  rests = reinterpret_cast<const std::uint8_t*>(at(parts.rests));
}

std::int64_t graded_bytes(std::int64_t rows, std::int64_t cols) {
  return Parts(ceil_div(rows, kStripRows), ceil_div(cols, kBlockInputs)).end;
}
std::int64_t graded_high_bytes(std::int64_t rows, std::int64_t cols) {
  return Parts(ceil_div(rows, kStripRows), ceil_div(cols, kBlockInputs)).rests;
}
std::int64_t graded_rest_bytes(std::int64_t rows) { return ceil_div(rows, kStripRows) * 32; }

void quantize_graded(const Graded& target, std::int64_t strip, float* values) {
  const std::int64_t n = target.blocks * kBlockInputs;
  take_outliers(values, n, n, strip * kStripRows,
                const_cast<StripOutlier*>(target.outliers + strip * kStripOutliers));
  for (std::int64_t r = 0; r < kStripRows; ++r) {
    float* const row = values + r * n;
    const float step = choose_step(row, n);
    for (std::int64_t i = 0; i < n; ++i)
      row[i] = step > 0 ? row[i] / step : 0;  // in steps from here
    float largest = 0;
    for (std::int64_t b = 0; b < target.blocks; ++b) {
      auto& brick = const_cast<Brick&>(target.brick(strip, b));
      float* const group = row + b * kBlockInputs;
      const auto [scale, offset] = choose_coding(group);
      largest = std::max(largest, scale);
      brick.scales[r] = static_cast<std::uint8_t>(scale);
      brick.offsets[r] = static_cast<std::int8_t>(offset);
      for (std::int64_t i = 0; i < kBlockInputs; ++i) {
        const float code = code_of(group[i] - 16 * offset, 1 / scale);
        brick.codes[i / 4][4 * (r % 32) + i % 4] |=
            static_cast<std::uint8_t>(static_cast<int>(code + 8) << (r < 32 ? 0 : 4));
        group[i] -= scale * code + 16 * offset;
      }
    }
    const float rest_step = choose_rest_step(row, n, largest);
    const_cast<float*>(target.steps)[strip * kStripRows + r] = step;
    const_cast<float*>(target.rest_steps)[strip * kStripRows + r] = step * rest_step;
    const auto [byte, shift] = rest_place(r);
    for (std::int64_t i = 0; i < n; ++i)
      const_cast<std::uint8_t*>(target.rest(i))[32 * strip + byte] |=
          static_cast<std::uint8_t>(static_cast<int>(code_of(row[i], 1 / rest_step) + 8) << shift);
  }
}

void measure_rests(const Graded& target, std::int64_t first, std::int64_t end) {
  for (std::int64_t i = first; i < end; ++i) {
    double squares = 0;
    for (std::int64_t r = 0; r < target.rows; ++r) {
      const auto [byte, shift] = rest_place(r % kStripRows);
      const int code = (target.rest(i)[r / kStripRows * 32 + byte] >> shift & 15) - 8;
      const double rest = static_cast<double>(target.rest_steps[r]) * code;
      squares += rest * rest;
    }
    const_cast<float*>(target.rest_lengths)[i] = static_cast<float>(std::sqrt(squares));
  }
}

void dequantize_graded(const Graded& source, std::int64_t row, std::int64_t first,
                       std::int64_t count, float* out, bool high_only) {
  const std::int64_t strip = row / kStripRows, r = row % kStripRows;
  const auto [rest_byte, shift] = rest_place(r);
  for (std::int64_t i = first; i < first + count; ++i) {
    const Brick& brick = source.brick(strip, i / kBlockInputs);
    const std::int64_t in_block = i % kBlockInputs;
    const int code = (brick.codes[in_block / 4][4 * (r % 32) + in_block % 4] >> shift & 15) - 8;
    float value =
        source.steps[row] * static_cast<float>(brick.scales[r] * code + 16 * brick.offsets[r]);
    if (!high_only) {
      const int rest = (source.rest(i)[32 * strip + rest_byte] >> shift & 15) - 8;
      value += source.rest_steps[row] * static_cast<float>(rest);
    }
    out[i - first] = value;
  }
  for (std::int64_t k = 0; k < kStripOutliers; ++k) {
    const StripOutlier& outlier = source.outliers[strip * kStripOutliers + k];
    const std::int64_t at = outlier.input - first;
    if (outlier.value != 0 && outlier.row == row && at >= 0 && at < count) out[at] += outlier.value;
  }
}

}  // namespace tda
