// How weights are rounded to bricks.
#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "base/half.h"
#include "weights/brick_places.h"

namespace tda {
namespace {

/// The nearest integer of a number below 2^22: compilers vectorise this, not std::nearbyint.
float nearest(float value) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23
  return (value + kShift) - kShift;
}

/// 32 values, or their codes, in lanes that compilers make vectors of.
constexpr std::int64_t kLanes = 8;

/// The sum of value(i), i < count, a multiple of 8.
template <class Value>
float sum_of(const Value& value, std::int64_t count = kBlockInputs) {
  float lanes[kLanes] = {};
  for (std::int64_t i = 0; i < count; i += kLanes)
    for (std::int64_t k = 0; k < kLanes; ++k) lanes[k] += value(i + k);
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) +
         ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

/// Takes the strip's outliers out of `values`: the largest values that are more than kRatio times
/// the next of their 32.
void take_outliers(float* values, std::int64_t cols, std::int64_t first_row, StripOutlier* out) {
  constexpr float kRatio = 8;
  struct Found {
    float ratio;
    std::int64_t row, input;
  };
  std::vector<Found> found;
  for (std::int64_t r = 0; r < kStripRows; ++r)
    for (std::int64_t first = 0; first < cols; first += kBlockInputs) {
      const float* const group = values + r * cols + first;
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
    float& value = values[found[k].row * cols + found[k].input];
    out[k] = {static_cast<std::int32_t>(first_row + found[k].row),
              static_cast<std::int32_t>(found[k].input), value};
    value = 0;
  }
}

/// Puts the error that storing 0, or a neighbour, in an outlier's place makes into the outlier.
void correct_outliers(const Bricks& target, std::int64_t strip) {
  for (std::int64_t k = 0; k < kStripOutliers; ++k) {
    auto& outlier = const_cast<StripOutlier&>(target.outliers[strip * kStripOutliers + k]);
    if (outlier.value == 0) continue;
    const float value = std::exchange(outlier.value, 0.0f);
    float stored = 0;
    dequantize_bricks(target, outlier.row, outlier.input, 1, &stored);
    outlier.value = value - stored;
  }
}

/// The largest power of 2 that is a normal float and at most `size`; 0 for 0.
float power_of_2(float size) {
  return size > 0 ? std::exp2(std::floor(std::log2(std::max(size, 0x1p-126f)))) : 0;
}

// ---- centred bricks -----------------------------------------------------------------------------

constexpr int kMostCentredScale = 127;
/// With the largest scale, a row's largest value is code 8 / 1.1.
constexpr float kLargestInSteps = 8 * kMostCentredScale / 1.1f;

float code_of(float value, float inverse_step) {  // -8 ... 7
  return nearest(std::min(std::max(value * inverse_step, -8.0f), 7.0f));
}

/// The scales tried for 16 values: those that put the largest at 70% (with rests, which cannot
/// reach further, 86%) to 110% of code 8, with either sign, without repeats.
struct ScaleCandidates {
  static constexpr int kMost = 2 * 21;
  int count = 0;
  float scales[kMost], inverses[kMost];

  ScaleCandidates(float largest, bool has_rests) {
    int last = 0;
    for (int percent = has_rests ? 86 : 70; percent <= 110; percent += 2) {
      const int scale =
          std::min(kMostCentredScale,
                   static_cast<int>(std::lround(largest * static_cast<float>(percent) / 800)));
      if (scale == last) continue;
      last = scale;
      for (const int signed_scale : {scale, -scale}) {
        scales[count] = static_cast<float>(signed_scale);
        inverses[count] = 1 / scales[count];
        ++count;
      }
    }
  }
};

/// The scale of least squared error for 16 values in steps; 0 if none is better than zeros.
float choose_scale(const float* values, bool has_rests) {
  float largest = 0, least = 0;  // least: of zeros
  for (std::int64_t i = 0; i < kScaleInputs; ++i) {
    largest = std::max(largest, std::abs(values[i]));
    least += values[i] * values[i];
  }
  const ScaleCandidates tried(largest, has_rests);
  float errors[ScaleCandidates::kMost] = {};
  for (std::int64_t i = 0; i < kScaleInputs; ++i)
    // Candidates are the inner loop so that it vectorises and each sum keeps its order.
    for (int c = 0; c < tried.count; ++c) {
      const float missed = values[i] - code_of(values[i], tried.inverses[c]) * tried.scales[c];
      errors[c] += missed * missed;
    }
  float best = 0;
  for (int c = 0; c < tried.count; ++c) {
    if (errors[c] >= least) continue;
    least = errors[c];
    best = tried.scales[c];
  }
  return best;
}

/// The step of least squared error for the rests of a row whose largest scale is `largest`.
float choose_rest_step(const float* rests, std::int64_t n, float largest) {
  float best = 0, least = std::numeric_limits<float>::infinity();
  for (int k = 4; k <= 12; ++k) {
    const float step = largest / 160 * static_cast<float>(k), inverse = 1 / step;
    const float error = sum_of(
        [&](std::int64_t i) {
          const float missed = rests[i] - step * code_of(rests[i], inverse);
          return missed * missed;
        },
        n);
    if (error < least) {
      least = error;
      best = step;
    }
  }
  return best;
}

void round_centred(const Bricks& target, std::int64_t row_id, float* row) {
  const std::int64_t n = target.blocks * kBlockInputs;
  const std::int64_t strip = row_id / kStripRows, r = row_id % kStripRows;
  float most = 0;
  for (std::int64_t i = 0; i < n; ++i) most = std::max(most, std::abs(row[i]));
  // The minimum keeps a tiny row's step from underflowing to 0.
  const float step = std::max(most / kLargestInSteps, std::numeric_limits<float>::denorm_min());
  for (std::int64_t i = 0; i < n && most > 0; ++i)
    row[i] = row[i] / most * (most / step);  // in steps
  float largest = 0;
  for (std::int64_t b = 0; b < target.blocks; ++b) {
    auto& brick = const_cast<CentredBrick&>(target.brick<CentredBrick>(strip, b));
    for (std::int64_t half = 0; half < 2; ++half) {
      float* const values = row + b * kBlockInputs + half * kScaleInputs;
      const float scale = choose_scale(values, target.has_rests());
      const float inverse = scale != 0 ? 1 / scale : 0;
      largest = std::max(largest, std::abs(scale));
      brick.scales[half][r] = static_cast<std::int8_t>(scale);
      for (std::int64_t i = 0; i < kScaleInputs; ++i) {
        const float code = code_of(values[i], inverse);
        set_code(brick.codes, r, half * kScaleInputs + i, static_cast<int>(code) + 8);
        values[i] -= scale * code;
      }
    }
  }
  const_cast<float*>(target.steps)[row_id] = most > 0 ? step : 0;
  if (!target.has_rests()) return;
  const float rest_step = choose_rest_step(row, n, std::max(largest, 1.0f));
  const_cast<float*>(target.rest_steps)[row_id] = most > 0 ? step * rest_step : 0;
  const auto [byte, shift] = rest_place(r);
  for (std::int64_t i = 0; i < n; ++i)
    const_cast<std::uint8_t*>(target.rest(i))[32 * strip + byte] |=
        static_cast<std::uint8_t>(static_cast<int>(code_of(row[i], 1 / rest_step) + 8) << shift);
}

// ---- lines --------------------------------------------------------------------------------------

/// A way to code 32 values: value = scale * code + minimum.
struct Line {
  float scale = 0, minimum = 0;
  float codes[kBlockInputs] = {};

  /// Chooses the codes nearest to `values`. Returns their squared error.
  float encode(const float* values) {
    const float inverse = scale != 0 ? 1 / scale : 0;
    for (std::int64_t i = 0; i < kBlockInputs; ++i)
      codes[i] = nearest(std::min(std::max((values[i] - minimum) * inverse, 0.0f), 15.0f));
    return sum_of([&](std::int64_t i) {
      const float missed = values[i] - (scale * codes[i] + minimum);
      return missed * missed;
    });
  }

  /// Takes the least-squares scale and minimum of `values` for the codes, unless these are all the
  /// same.
  void fit(const float* values) {
    constexpr float n = kBlockInputs;
    const float sum = sum_of([&](std::int64_t i) { return values[i]; });
    const float of_codes = sum_of([&](std::int64_t i) { return codes[i]; });
    const float squares = sum_of([&](std::int64_t i) { return codes[i] * codes[i]; });
    const float products = sum_of([&](std::int64_t i) { return codes[i] * values[i]; });
    const float spread = n * squares - of_codes * of_codes;
    if (spread <= 0) return;
    scale = (n * products - of_codes * sum) / spread;
    minimum = (sum - scale * of_codes) / n;
  }
};

/// The power of 2 that brings the largest scale or minimum of a row between 2^14 and 2^15, near the
/// upper end of f16's range; 0 if they are all 0.
float step_of(const LineGroup* groups, std::int64_t blocks) {
  float largest = 0;
  for (const LineGroup& group : std::span(groups, blocks))
    largest = std::max({largest, std::abs(group.scale), std::abs(group.minimum)});
  return largest > 0 ? std::max(power_of_2(largest) / 0x1p14f, 0x1p-126f) : 0;
}

/// Whether 32 values of this squared error, the largest of which is `size`, lie on the line, but
/// for rounding to 16 bits, which keeps 8 to 11 significant ones. Values between levels miss by
/// 0.29 of a step.
bool near(const Line& line, float error, float size) {
  return std::sqrt(error / kBlockInputs) < 0.05f * std::abs(line.scale) + 0x1p-10f * size;
}

/// The line of least squared error of five clippings of the values' range, each fitted, and once
/// more.
Line choose_line(const float* values) {
  const auto [low, high] = std::minmax_element(values, values + kBlockInputs);
  const float middle = *low / 2 + *high / 2, half = *high / 2 - *low / 2;
  // Values that had 4 bits before lie on a line whose ends they need not reach.
  for (int steps = 15; steps > 6 && half > 0; --steps) {
    Line line = {.scale = 2 * half / static_cast<float>(steps), .minimum = *low};
    if (!near(line, line.encode(values), std::max(-*low, *high))) continue;
    line.fit(values);
    line.encode(values);
    return line;
  }
  Line best = {.minimum = middle};
  float least = best.encode(values);
  for (const float clip : {1.0f, 0.93f, 0.86f, 0.79f, 0.72f}) {
    Line line = {.scale = half * clip / 7.5f, .minimum = middle - half * clip};
    line.encode(values);
    line.fit(values);
    const float error = line.encode(values);
    if (!(error < least)) continue;
    least = error;
    best = line;
  }
  Line again = best;
  again.fit(values);
  return again.encode(values) < least ? again : best;
}

void round_lines(const Bricks& target, std::int64_t row_id, float* row) {
  const std::int64_t n = target.blocks * kBlockInputs;
  // Inputs that pad are zeros, whatever their weights: the group's others again, which leave its
  // line as it is, where zeros might lie off it.
  for (std::int64_t i = target.cols; i < n; ++i)
    row[i] = row[std::max(i - target.cols % kBlockInputs, n - kBlockInputs)];
  // In units near the largest value: squares of very large or small ones are no floats.
  const auto by_size = [](float a, float b) { return std::abs(a) < std::abs(b); };
  const float unit = power_of_2(std::abs(*std::max_element(row, row + n, by_size)));
  for (std::int64_t i = 0; i < n && unit > 0; ++i) row[i] /= unit;
  std::vector<LineGroup> groups(target.blocks);
  for (std::int64_t b = 0; b < target.blocks; ++b) {
    const Line line = choose_line(row + b * kBlockInputs);
    groups[b] = {.codes = {}, .scale = line.scale, .minimum = line.minimum};
  }
  // The codes are those nearest with the scales and minima as they are stored.
  const float step = step_of(groups.data(), target.blocks);
  const auto stored = [&](float v) { return step * f16_to_f32(f32_to_f16(v / step)); };
  for (std::int64_t b = 0; b < target.blocks && step > 0; ++b) {
    Line line = {.scale = stored(groups[b].scale), .minimum = stored(groups[b].minimum)};
    line.encode(row + b * kBlockInputs);
    groups[b].scale = unit * line.scale;
    groups[b].minimum = unit * line.minimum;
    std::copy_n(line.codes, kBlockInputs, groups[b].codes);
  }
  store_lines(target, row_id, groups.data());
}

}  // namespace

void quantize_bricks(const Bricks& target, std::int64_t strip, float* values) {
  const std::int64_t n = target.blocks * kBlockInputs;
  auto* const outliers = const_cast<StripOutlier*>(target.outliers + strip * kStripOutliers);
  take_outliers(values, n, strip * kStripRows, outliers);
  if (target.kind == BrickKind::lines)
    for (const StripOutlier& outlier : std::span(outliers, kStripOutliers)) {
      if (outlier.value == 0) continue;
      // In its place stands a neighbour, which leaves the others' range and fit alone.
      float* const row = values + (outlier.row - strip * kStripRows) * n;
      row[outlier.input] = row[outlier.input ^ 1];
    }
  for (std::int64_t r = 0; r < kStripRows; ++r)
    (target.kind == BrickKind::lines ? round_lines : round_centred)(target, strip * kStripRows + r,
                                                                    values + r * n);
  correct_outliers(target, strip);
}

void store_lines(const Bricks& target, std::int64_t row, const LineGroup* groups) {
  const std::int64_t strip = row / kStripRows, r = row % kStripRows;
  const float step = step_of(groups, target.blocks);
  const_cast<float*>(target.steps)[row] = step;
  if (step == 0) return;
  for (std::int64_t b = 0; b < target.blocks; ++b) {
    auto& brick = const_cast<LineBrick&>(target.brick<LineBrick>(strip, b));
    brick.scales[r] = f32_to_f16(groups[b].scale / step);
    brick.minima[r] = f32_to_f16(groups[b].minimum / step);
    for (std::int64_t i = 0; i < kBlockInputs; ++i) set_code(brick.codes, r, i, groups[b].codes[i]);
  }
}

bool on_a_line(const float* values) {
  const auto by_size = [](float a, float b) { return std::abs(a) < std::abs(b); };
  const float unit =
      power_of_2(std::abs(*std::max_element(values, values + kBlockInputs, by_size)));
  if (unit == 0) return false;
  float in_units[kBlockInputs];
  for (std::int64_t i = 0; i < kBlockInputs; ++i) in_units[i] = values[i] / unit;
  Line line = choose_line(in_units);
  return line.scale != 0 && near(line, line.encode(in_units), 1);
}

}  // namespace tda
