// How graded weights round values: every code is the nearest, scales and steps are no worse than
// simple ones, and outliers are kept apart.
#include <algorithm>
#include <cmath>
#include <vector>

#include "brick_tests.h"
#include "check.h"
#include "kernel_tests.h"

using namespace tda;

namespace {

/// A quantised matrix.
struct Stored : StoredBricks {
  Stored(std::int64_t row_count, const std::vector<float>& values, bool by_block = false,
         BrickKind kind = BrickKind::graded)
      : StoredBricks(row_count, values, kind, by_block) {}

  const CentredBrick& brick(std::int64_t r, std::int64_t i) const {
    return w.brick<CentredBrick>(r / 64, i / 32);
  }
  /// The scale of input i, in steps of its row, and as a size.
  int scale(std::int64_t r, std::int64_t i) const { return brick(r, i).scales[i / 16 % 2][r % 64]; }
  double unit(std::int64_t r, std::int64_t i) const { return double{w.steps[r]} * scale(r, i); }
  double high(std::int64_t r, std::int64_t i) const {
    const int byte = brick(r, i).codes[i % 32 / 4][4 * (r % 32) + i % 4];
    return unit(r, i) * ((r % 64 < 32 ? byte & 15 : byte >> 4) - 8);
  }
  double rest(std::int64_t r, std::int64_t i) const {
    if (!w.has_rests()) return 0;
    const int byte = w.rest(i)[r / 64 * 32 + r % 32];
    return double{w.rest_steps[r]} * ((r % 64 < 32 ? byte & 15 : byte >> 4) - 8);
  }
  double outlier(std::int64_t r, std::int64_t i) const {
    for (std::int64_t k = r / 64 * 4; k < r / 64 * 4 + 4; ++k)
      if (w.outliers[k].value != 0 && w.outliers[k].row == r && w.outliers[k].input == i)
        return w.outliers[k].value;
    return 0;
  }
};

/// The distance of a value to the nearest of 16 multiples of `step`, -8 to 7.
double distance(double value, double step) {
  double least = std::abs(value);
  for (int code = -8; code < 8; ++code) least = std::min(least, std::abs(value - step * code));
  return least;
}

/// The error, in the L2 norm, of 16 values with the scale that makes the largest code -8. The search
/// tries it, but for the rounding of scales to whole steps of the row, which moves a value by at most
/// 8 halves of one.
double bound_of_group(const double* values, double step) {
  const auto by_size = [](double a, double b) { return std::abs(a) < std::abs(b); };
  const double unit = -*std::max_element(values, values + 16, by_size) / 8;
  double error = 0;
  for (int i = 0; i < 16; ++i) error += unit != 0 ? std::pow(distance(values[i], unit), 2) : 0;
  return std::sqrt(error) + std::sqrt(16.0) * 4 * step;
}

/// Returns the error relative to the values, in the L2 norm.
double check_rounding(const Stored& s, const std::vector<float>& values) {
  double error = 0, size = 0;
  for (std::int64_t r = 0; r < s.rows; ++r) {
    std::vector<double> row(32 * s.w.blocks), rests(row.size());
    std::vector<float> found(s.cols);
    dequantize_bricks(s.w, r, 0, s.cols, found.data());
    double row_error = 0, simple_error = 0, largest_unit = 0;
    for (std::int64_t i = 0; i < std::ssize(row); ++i) {
      const double value = i < s.cols ? values[r * s.cols + i] : 0, outlier = s.outlier(r, i);
      CHECK(outlier == 0 || outlier == static_cast<float>(value));
      row[i] = value - outlier;
      rests[i] = row[i] - s.high(r, i);
      const double unit = s.unit(r, i), step = s.w.has_rests() ? s.w.rest_steps[r] : 0;
      largest_unit = std::max(largest_unit, std::abs(unit));
      CHECK_NEAR(std::abs(rests[i]), distance(row[i], unit), 1e-3 * std::abs(unit) + 1e-44);
      const double missed = rests[i] - s.rest(r, i);
      CHECK_NEAR(std::abs(missed), distance(rests[i], step), 1e-3 * step + 1e-44);
      row_error += missed * missed;
      if (i < s.cols) CHECK_NEAR(found[i], value - missed, 1e-5 * std::abs(value) + 1e-3 * step);
      error += i < s.cols ? missed * missed : 0;
      size += value * value;
    }
    for (std::int64_t i = 0; i < std::ssize(row); ++i) {
      const double simple = distance(rests[i], largest_unit / 16);
      simple_error += simple * simple;
    }
    if (s.w.has_rests()) CHECK(row_error <= simple_error * 1.001);
    for (std::int64_t first = 0; first < std::ssize(row); first += 16) {
      double squares = 0;
      for (std::int64_t i = first; i < first + 16; ++i) squares += rests[i] * rests[i];
      CHECK(std::sqrt(squares) <= 1.002 * bound_of_group(row.data() + first, s.w.steps[r]));
    }
  }
  for (std::int64_t r = s.rows; r < 64 * s.w.strips; ++r)
    CHECK(s.w.steps[r] == 0 && (!s.w.has_rests() || s.w.rest_steps[r] == 0));
  if (!s.w.has_rests()) return std::sqrt(error / size);
  for (std::int64_t i = 0; i < s.cols; ++i) {
    double squares = 0;
    for (std::int64_t r = 0; r < s.rows; ++r) squares += s.rest(r, i) * s.rest(r, i);
    CHECK_NEAR(s.w.rest_lengths[i], std::sqrt(squares), 1e-5 * std::sqrt(squares));
  }
  return std::sqrt(error / size);
}

}  // namespace

TEST(graded_rounds_to_the_nearest_codes_at_any_size) {
  for (const float size : {1e-38f, 1e-20f, 1e-6f, 1.0f, 1e30f})
    for (const std::int64_t rows : {1, 63, 64, 100})
      for (const std::int64_t cols : {1, 31, 32, 70, 160}) {
        const std::vector<float> values = random_floats(rows * cols, size);
        const double error = check_rounding(Stored(rows, values, cols % 2 == 0), values);
        // The largest of 16 normal numbers is about 1.8 of their deviations, so that a step of 8 bits
        // is 1/70 of one and rounding to it costs 1/70 / sqrt(12) = 0.004; up to twice that where a
        // row's widest group sets the rest's step. In a single row a clipped value may miss by a
        // step of 4 bits, 1/4 of a deviation: 1/4 / sqrt(32).
        CHECK(error < (rows > 1 ? 0.01 : 0.045));
        const Stored four(rows, values, cols % 2 == 0, BrickKind::int4);
        // A step of 4 bits is 1.8 / 8 of a deviation, which costs 1.8 / 8 / sqrt(12) = 0.065, and
        // more in the groups with the largest values.
        CHECK(check_rounding(four, values) < (rows * cols > 1000 ? 0.076 : 0.2));
      }
}

TEST(graded_rounds_groups_of_unlike_sizes_and_centres) {
  for (const std::int64_t cols : {70, 320}) {
    std::vector<float> values = random_floats(130 * cols);
    for (std::size_t i = 0; i < values.size(); ++i) {
      const std::size_t row = i / cols, group = i % cols / 32;
      values[i] = values[i] * std::ldexp(1.0f, -2 * static_cast<int>((row + group) % 6)) +
                  static_cast<float>(group % 4) * static_cast<float>(row % 3);
    }
    CHECK(check_rounding(Stored(130, values), values) < 0.02);
  }
}

TEST(graded_zeros_stay_zero) {
  const std::int64_t cols = 160;
  std::vector<float> values = random_floats(100 * cols);
  for (std::int64_t r = 0; r < 100; ++r)
    std::fill_n(values.begin() + r * cols + 32 * (r % 5), r % 7 == 0 ? cols - 32 * (r % 5) : 32,
                0.0f);
  std::fill_n(values.begin() + 50 * cols, cols, 0.0f);
  const Stored s(100, values);
  std::vector<float> row(cols);
  for (std::int64_t r = 0; r < 100; ++r) {
    dequantize_bricks(s.w, r, 0, cols, row.data());
    for (std::int64_t i = 0; i < cols; ++i)
      if (r == 50 || i / 32 == r % 5) CHECK(row[i] == 0);
  }
  const Stored nothing(1, std::vector<float>(70));
  dequantize_bricks(nothing.w, 0, 0, 70, row.data());
  CHECK(std::all_of(row.begin(), row.begin() + 70, [](float v) { return v == 0; }));
}

TEST(graded_rows_next_to_nothing_stay_small) {
  for (const float size : {1e-45f, 1e-43f, 1e-41f}) {
    const std::vector<float> values = random_floats(64 * 40, size);
    const Stored s(64, values);
    std::vector<float> row(40);
    for (std::int64_t r = 0; r < 64; ++r) {
      dequantize_bricks(s.w, r, 0, 40, row.data());
      for (std::int64_t i = 0; i < 40; ++i) CHECK_NEAR(row[i], values[r * 40 + i], 4 * size);
    }
  }
}

TEST(graded_keeps_the_four_largest_outliers_of_a_strip_exactly) {
  const std::int64_t cols = 70;
  std::vector<float> values(200 * cols);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = i % 3 == 0 ? 0.01f : -0.01f;
  const auto set = [&](std::int64_t r, std::int64_t i, float value) {
    values[r * cols + i] = value;
    return StripOutlier{static_cast<std::int32_t>(r), static_cast<std::int32_t>(i), value};
  };
  const StripOutlier first = set(7, 69, -0.81f), second = set(3, 3, 0.6f), third = set(3, 40, 0.5f),
                     fourth = set(60, 0, 0.4f), alone = set(199, 33, 1e6f);
  set(9, 9, 0.3f);      // one too many
  set(130, 9, 0.079f);  // not 8 times its neighbours
  std::fill_n(values.begin() + 140 * cols, 32, 0.0f);
  set(140, 9, 5);  // whose neighbours lose nothing
  const Stored s(200, values);
  const auto equal = [](const StripOutlier& a, const StripOutlier& b) {
    return a.row == b.row && a.input == b.input && a.value == b.value;
  };
  const std::vector<StripOutlier> expected = {first, second, third, fourth};
  CHECK(std::equal(expected.begin(), expected.end(), s.w.outliers, equal));
  for (std::int64_t k = 4; k < 16; ++k) CHECK(k == 12 || s.w.outliers[k].value == 0);
  CHECK(equal(s.w.outliers[12], alone));
  check_rounding(s, values);
  for (const StripOutlier& o : {first, second, third, fourth}) {
    float value = 0;
    dequantize_bricks(s.w, o.row, o.input, 1, &value);
    CHECK_NEAR(value, o.value, 0.001);  // of the neighbours' size
    dequantize_bricks(s.w, o.row, o.input, 1, &value, true);
    CHECK_NEAR(value, o.value, 0.01);
  }
}

int main() { return run_tests(); }
