// How weights are rounded to bricks.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "base/half.h"
#include "weights/brick_places.h"
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

/// Whether the largest of 32 values may be more than `ratio` times the next. If it is, the largest
/// square is more than half of the sum of all; squares that overflow tell nothing.
bool may_hold_outlier(const float* values, float ratio) {
  Four most{};
  const float sum = sum_of(kBlockInputs, [&](std::int64_t i) {
    const Four v = load_four(values + i), square = v * v;
    most = max(most, square);
    return square;
  });
  const float others = static_cast<float>(kBlockInputs - 1) / (ratio * ratio);
  return !(sum > 1.01f * (1 + others) * most_of(most));
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

/// The squared error of values[0 ... n) as codes of this step; n is a multiple of 8.
float error_of(const float* values, std::int64_t n, float step) {
  const Four inverse = Four{} + 1 / step;
  return sum_of(n, [=](std::int64_t i) {
    const Four v = load_four(values + i), missed = v - step * codes_of(v, inverse);
    return missed * missed;
  });
}

constexpr std::int64_t kGroups = 4;

/// The sums of four(i) for i < 16, added as sum_of does.
template <class Fours>
Four sums_of(const Fours& four) {
  Four sums[8];
  for (std::int64_t i = 0; i < 8; ++i) sums[i] = four(i) + four(8 + i);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

/// The scales of least squared error for four groups of 16 values in steps, or those that least
/// squares gives for their codes where these are better and clip no more; 0 where none is better
/// than zeros.
Four choose_scales(const float* const (&groups)[kGroups], const ScalesTried& tried) {
  Four values[kScaleInputs], codes[kScaleInputs];
  for (std::int64_t i = 0; i < kScaleInputs; ++i)
    values[i] = Four{groups[0][i], groups[1][i], groups[2][i], groups[3][i]};
  const auto [best, least] = search_scales(values, tried, [](std::int64_t, Four v) { return v; });
  const Four inverses = best == 0 ? Four{} : 1 / best;
  for (std::int64_t i = 0; i < kScaleInputs; ++i) codes[i] = codes_of(values[i], inverses);
  const Four products = sums_of([&](std::int64_t i) { return codes[i] * values[i]; });
  const Four squares = sums_of([&](std::int64_t i) { return codes[i] * codes[i]; });
  const Four fitted = clamp(nearest(products / (squares == 0 ? Four{} + 1 : squares)),
                            -kMostCentredScale, kMostCentredScale);
  const Four fitted_inverses = fitted == 0 ? Four{} : 1 / fitted;
  const Four errors = sums_of([&](std::int64_t i) {
    const Four missed = values[i] - fitted * codes_of(values[i], fitted_inverses);
    return missed * missed;
  });
  const auto size = [](Four v) { return max(v, -v); };
  // The least scale tried puts the largest value nearest to the end of the codes.
  Four reach{};
  for (const Four& v : values) reach = max(reach, size(v));
  const auto reaches = size(fitted) >= tried.first * (reach / 8);
  return (best != 0) & reaches & (errors < least) ? fitted : best;
}

/// The step of least squared error for the rests of a row whose largest scale is `largest`, judged
/// by 32 of its blocks.
float choose_rest_step(const float* rests, std::int64_t blocks, float largest) {
  const std::int64_t every = std::max<std::int64_t>(1, blocks / 32);
  float best = 0, least = std::numeric_limits<float>::infinity();
  for (int k = 4; k <= 12; ++k) {
    const float step = largest / 160 * static_cast<float>(k);
    float error = 0;
    for (std::int64_t b = 0; b < blocks; b += every)
      error += error_of(rests + b * kBlockInputs, kBlockInputs, step);
    if (error >= least) continue;
    least = error;
    best = step;
  }
  return best;
}

/// The codes, 0 to 15 for -8 to 7, of n values, a multiple of 16, which become what these miss.
void encode(float* values, std::int64_t n, float step, std::uint8_t* codes) {
  const Four inverse = Four{} + (step != 0 ? 1 / step : 0);
  for (std::int64_t first = 0; first < n; first += kScaleInputs) {
    Four found[kScaleInputs / 4];
    for (std::int64_t i = 0; i < kScaleInputs; i += 4) {
      const Four v = load_four(values + first + i), code = codes_of(v, inverse);
      found[i / 4] = code + 8.0f;
      store_four(values + first + i, v - step * code);
    }
    store_bytes(codes + first, found);
  }
}

/// rests: [blocks * 32] codes, if the target has rests.
void round_centred(const Bricks& target, std::int64_t row_id, float* row, std::uint8_t* rests) {
  const std::int64_t n = target.blocks * kBlockInputs;
  const std::int64_t strip = row_id / kStripRows, r = row_id % kStripRows;
  const float most = std::abs(largest_of(row, n));
  const float step = step_of_row(most);
  const float unit = power_of_2(most), in_units = 1 / unit, in_steps = unit / step;
  for (std::int64_t i = 0; i < n && most > 0; ++i) row[i] = row[i] * in_units * in_steps;
  float largest = 1;
  constexpr std::int64_t kBlocks = kGroups / 2;
  for (std::int64_t first = 0; first < target.blocks; first += kBlocks) {
    const float* groups[kGroups];  // if there are fewer, the last block's again
    for (std::int64_t g = 0; g < kGroups; ++g)
      groups[g] =
          row + std::min(first + g / 2, target.blocks - 1) * kBlockInputs + g % 2 * kScaleInputs;
    const Four scales = choose_scales(groups, target.has_rests() ? kWithRests : kAlone);
    for (std::int64_t b = first; b < std::min(first + kBlocks, target.blocks); ++b) {
      auto& brick = const_cast<CentredBrick&>(target.brick<CentredBrick>(strip, b));
      std::uint8_t codes[kBlockInputs];
      for (std::int64_t half = 0; half < 2; ++half) {
        const float scale = scales[2 * (b - first) + half];
        largest = std::max(largest, std::abs(scale));
        brick.scales[half][r] = static_cast<std::int8_t>(scale);
        encode(row + b * kBlockInputs + half * kScaleInputs, kScaleInputs, scale,
               codes + half * kScaleInputs);
      }
      set_codes(brick.codes, r, codes);
    }
  }
  const_cast<float*>(target.steps)[row_id] = most > 0 ? step : 0;
  if (!target.has_rests()) return;
  const float rest_step = choose_rest_step(row, target.blocks, largest);
  const_cast<float*>(target.rest_steps)[row_id] = most > 0 ? step * rest_step : 0;
  encode(row, n, rest_step, rests);
}

/// Puts the rests of a strip, codes [64][blocks * 32], in the order of inputs.
void store_rests(const Bricks& target, std::int64_t strip, const std::uint8_t* codes) {
  const std::int64_t n = target.blocks * kBlockInputs, half = kStripRows / 2;
  for (std::int64_t first = 0; first < n; first += kBlockInputs) {
    std::uint8_t runs[kBlockInputs][kStripRows / 2];
    for (std::int64_t r = 0; r < half; ++r)
      for (std::int64_t i = 0; i < kBlockInputs; ++i)
        runs[i][rest_place(r).byte] = static_cast<std::uint8_t>(
            codes[r * n + first + i] | codes[(half + r) * n + first + i] << 4);
    for (std::int64_t i = 0; i < kBlockInputs; ++i)
      std::memcpy(const_cast<std::uint8_t*>(target.rest(first + i)) + half * strip, runs[i], half);
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

void round_lines(const Bricks& target, std::int64_t row_id, float* row) {
  const std::int64_t n = target.blocks * kBlockInputs;
  // Inputs that pad are zeros, whatever their weights: the group's others again, which leave its
  // line as it is, where zeros might lie off it.
  for (std::int64_t i = target.cols; i < n; ++i)
    row[i] = row[std::max(i - target.cols % kBlockInputs, n - kBlockInputs)];
  // In units near the largest value: squares of very large or small ones are no floats.
  const float unit = power_of_2(std::abs(largest_of(row, n)));
  for (std::int64_t i = 0; i < n && unit > 0; ++i) row[i] *= 1 / unit;
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
  std::vector<std::uint8_t> rests(target.has_rests() ? kStripRows * n : 0);
  if (inputs) round_by_inputs(target, strip, values, *inputs);
  for (std::int64_t r = 0; r < kStripRows && !inputs; ++r) {
    const std::int64_t row = strip * kStripRows + r;
    if (target.kind == BrickKind::lines)
      round_lines(target, row, values + r * n);
    else
      round_centred(target, row, values + r * n, rests.data() + (rests.empty() ? 0 : r * n));
  }
  if (target.has_rests()) store_rests(target, strip, rests.data());
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
    set_codes(brick.codes, r, groups[b].codes);
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
