// How weights are rounded to bricks.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <span>
#include <utility>
#include <vector>

#include "base/half.h"
#include "weights/brick_loops.h"
#include "weights/centred.h"

namespace tda {
namespace {

/// The value of the largest size of n, a multiple of 4; 0 for zeros.
float largest_of(const float* values, std::int64_t n) {
  Four least{}, most{};
  for (std::int64_t i = 0; i < n; i += 4) {
    least = min(least, load_four(values + i));
    most = max(most, load_four(values + i));
  }
  return most_of(most) >= -least_of(least) ? most_of(most) : least_of(least);
}

/// Whether the largest of 32 values may be more than `ratio` times the next: whether it is so for
/// two halves of them.
bool may_hold_outlier(const float* values, float ratio) {
  Four sizes{};
  for (std::int64_t i = 0; i < kBlockInputs; i += 4) {
    const Four v = load_four(values + i);
    sizes = max(sizes, max(v, -v));
  }
  const float a = std::max(sizes[0], sizes[1]), b = std::max(sizes[2], sizes[3]);
  return std::max(a, b) > ratio * std::min(a, b);
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
      if (!may_hold_outlier(group, kRatio)) continue;
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

/// Codes of a strip's rows, and scales if they are centred.
struct StripCodes {
  std::int64_t blocks;
  std::vector<std::int8_t> scales;         // [blocks * 2][64]
  std::vector<std::uint8_t> codes, rests;  // [64][blocks * 32]

  explicit StripCodes(const Bricks& target)
      : blocks(target.blocks),
        scales(kStripRows * blocks * 2),
        codes(kStripRows * blocks * kBlockInputs),
        rests(target.has_rests() ? codes.size() : 0) {}

  CentredRow row(std::int64_t r) {
    const std::int64_t at = r * blocks * kBlockInputs;
    return {scales.data() + r, codes.data() + at, rests.empty() ? nullptr : rests.data() + at};
  }
};

void round_centred(const Bricks& target, std::int64_t row_id, float* row, const CentredRow& to) {
  const std::int64_t n = target.blocks * kBlockInputs;
  const float most = std::abs(largest_of(row, n));
  const float step = most > 0 ? step_of_row(most) : 1, unit = most > 0 ? power_of_2(most) : 1;
  const float rest_step = brick_loops().round_centred(row, target.blocks, unit, step, to);
  const_cast<float*>(target.steps)[row_id] = most > 0 ? step : 0;
  if (target.has_rests())
    const_cast<float*>(target.rest_steps)[row_id] = most > 0 ? step * rest_step : 0;
}

/// Rounds a strip to centred bricks. These are written one after the other: a row's codes lie too
/// far apart for the caches.
void round_centred(const Bricks& target, std::int64_t strip, float* values) {
  const BrickLoops& loops = brick_loops();
  const std::int64_t n = target.blocks * kBlockInputs;
  StripCodes codes(target);
  for (std::int64_t r = 0; r < kStripRows; ++r)
    round_centred(target, strip * kStripRows + r, values + r * n, codes.row(r));
  for (std::int64_t b = 0; b < target.blocks; ++b) {
    auto& brick = const_cast<CentredBrick&>(target.brick<CentredBrick>(strip, b));
    std::memcpy(brick.scales, codes.scales.data() + 2 * b * kStripRows, sizeof brick.scales);
    loops.store_codes(codes.codes.data() + b * kBlockInputs, n, brick.codes);
    if (target.has_rests())
      loops.store_rests(codes.rests.data() + b * kBlockInputs, n, target, strip, b);
  }
}

// ---- lines --------------------------------------------------------------------------------------

/// A way to code 32 values: value = scale * code + minimum.
struct Line {
  float scale = 0, minimum = 0;
  float codes[kBlockInputs] = {};

  /// Chooses the codes nearest to `values`. Returns their squared error.
  float encode(const float* values) {
    const float inverse = scale != 0 ? 1 / scale : 0;
    return sum_of(kBlockInputs, [&](std::int64_t i) {
      const Four v = load_four(values + i);
      const Four code = nearest(clamp((v - minimum) * inverse, 0, 15));
      store_four(codes + i, code);
      const Four missed = v - (scale * code + minimum);
      return missed * missed;
    });
  }

  /// Takes the least-squares scale and minimum of `values` for the codes, unless these are all the
  /// same.
  void fit(const float* values) {
    constexpr float n = kBlockInputs;
    const auto value = [&](std::int64_t i) { return load_four(values + i); };
    const auto code = [&](std::int64_t i) { return load_four(codes + i); };
    const float sum = sum_of(kBlockInputs, value), of_codes = sum_of(kBlockInputs, code);
    const float squares = sum_of(kBlockInputs, [&](std::int64_t i) { return code(i) * code(i); });
    const float products = sum_of(kBlockInputs, [&](std::int64_t i) { return code(i) * value(i); });
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

/// groups: [blocks], zeros
void round_lines(const Bricks& target, float* row, LineGroup* groups) {
  const std::int64_t n = target.blocks * kBlockInputs;
  // Inputs that pad are zeros, whatever their weights: the group's others again, which leave its
  // line as it is, where zeros might lie off it.
  for (std::int64_t i = target.cols; i < n; ++i)
    row[i] = row[std::max(i - target.cols % kBlockInputs, n - kBlockInputs)];
  // In units near the largest value: squares of very large or small ones are no floats.
  const float unit = power_of_2(std::abs(largest_of(row, n)));
  for (std::int64_t i = 0; i < n && unit > 0; ++i) row[i] *= 1 / unit;
  for (std::int64_t b = 0; b < target.blocks; ++b) {
    const Line line = choose_line(row + b * kBlockInputs);
    groups[b] = {.codes = {}, .scale = line.scale, .minimum = line.minimum};
  }
  // The codes are those nearest with the scales and minima as they are stored.
  const float step = step_of(groups, target.blocks);
  const auto stored = [&](float v) { return step * f16_to_f32(f32_to_f16(v / step)); };
  for (std::int64_t b = 0; b < target.blocks && step > 0; ++b) {
    Line line = {.scale = stored(groups[b].scale), .minimum = stored(groups[b].minimum)};
    line.encode(row + b * kBlockInputs);
    groups[b].scale = unit * line.scale;
    groups[b].minimum = unit * line.minimum;
    std::copy_n(line.codes, kBlockInputs, groups[b].codes);
  }
}

}  // namespace

void quantize_bricks(const Bricks& target, std::int64_t strip, float* values,
                     const InputFactor* inputs) {
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
  if (target.kind == BrickKind::lines) {
    std::vector<LineGroup> groups(kStripRows * target.blocks);
    for (std::int64_t r = 0; r < kStripRows; ++r)
      round_lines(target, values + r * n, groups.data() + r * target.blocks);
    store_lines(target, strip, groups.data());
  } else if (inputs) {
    round_by_inputs(target, strip, values, *inputs);
  } else {
    round_centred(target, strip, values);
  }
  correct_outliers(target, strip);
}

void store_lines(const Bricks& target, std::int64_t strip, LineGroup* groups) {
  float* const steps = const_cast<float*>(target.steps) + strip * kStripRows;
  for (std::int64_t r = 0; r < kStripRows; ++r) {
    const std::span row(groups + r * target.blocks, target.blocks);
    steps[r] = step_of(row.data(), target.blocks);
    if (steps[r] == 0) std::ranges::fill(row, LineGroup{});  // codes of nothing but zeros
  }
  for (std::int64_t b = 0; b < target.blocks; ++b) {
    auto& brick = const_cast<LineBrick&>(target.brick<LineBrick>(strip, b));
    float scales[kStripRows], minima[kStripRows];
    for (std::int64_t r = 0; r < kStripRows; ++r) {
      const LineGroup& group = groups[r * target.blocks + b];
      const float step = steps[r] > 0 ? steps[r] : 1;
      scales[r] = group.scale / step;
      minima[r] = group.minimum / step;
    }
    for (std::int64_t r = 0; r < kStripRows; ++r) {
      brick.scales[r] = f32_to_f16(scales[r]);
      brick.minima[r] = f32_to_f16(minima[r]);
    }
    const auto stride = target.blocks * static_cast<std::int64_t>(sizeof(LineGroup));
    brick_loops().store_codes(groups[b].codes, stride, brick.codes);
  }
}

bool on_a_line(const float* values) {
  const float unit = power_of_2(std::abs(largest_of(values, kBlockInputs)));
  if (unit == 0) return false;
  float in_units[kBlockInputs];
  for (std::int64_t i = 0; i < kBlockInputs; ++i) in_units[i] = values[i] / unit;
  Line line = choose_line(in_units);
  return line.scale != 0 && near(line, line.encode(in_units), 1);
}

}  // namespace tda
