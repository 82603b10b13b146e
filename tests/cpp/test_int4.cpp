// How line bricks round values, and what they hold without loss. The layout and the kernels are those of
// test_graded.cpp.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "base/half.h"
#include "brick_tests.h"
#include "check.h"
#include "cpu/key_scales.h"
#include "kernel_tests.h"

using namespace tda;

namespace {

struct Stored : StoredBricks {
  Stored(std::int64_t row_count, std::int64_t col_count)
      : StoredBricks(row_count, col_count, BrickKind::lines) {}
  Stored(std::int64_t row_count, const std::vector<float>& values)
      : StoredBricks(row_count, values, BrickKind::lines) {}
  std::vector<float> values() const {
    std::vector<float> all(rows * cols);
    for (std::int64_t r = 0; r < rows; ++r) dequantize_bricks(w, r, 0, cols, all.data() + r * cols);
    return all;
  }
};

double squared_error(std::span<const float> a, std::span<const float> b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += std::pow(double{a[i]} - b[i], 2);
  return sum;
}

/// 16 levels over the whole range, as simple formats have them.
std::vector<float> over_the_range(std::span<const float> values) {
  const auto [low, high] = std::ranges::minmax(values);
  const double step = (double{high} - low) / 15;
  std::vector<float> out;
  for (const float v : values)
    out.push_back(static_cast<float>(step > 0 ? low + step * std::nearbyint((v - low) / step) : v));
  return out;
}

}  // namespace

TEST(f16_rounds_as_the_compiler_does) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    if ((half & 0x7c00) == 0x7c00) continue;
    CHECK(f32_to_f16(f16_to_f32(half)) == half);
  }
  std::mt19937 random(3);
  for (int i = 0; i < 200000; ++i) {
    const float value = std::bit_cast<float>(static_cast<std::uint32_t>(random()));
    if (std::isnan(value)) continue;
    CHECK(f32_to_f16(value) == std::bit_cast<std::uint16_t>(static_cast<_Float16>(value)));
  }
}

TEST(lines_are_no_worse_than_16_levels_over_the_range) {
  for (const float size : {1e-38f, 1e-20f, 1.0f, 1e30f, 1e38f})
    for (const std::int64_t rows : {1, 64, 100})
      for (const std::int64_t cols : {1, 31, 32, 70, 160}) {
        std::vector<float> values = random_floats(rows * cols, size);
        for (float& v : values) v = std::clamp(v, -3e38f, 3e38f);
        const std::vector<float> found = Stored(rows, values).values();
        double error = 0, simple = 0, all = 0;
        for (std::int64_t r = 0; r < rows; ++r)
          for (std::int64_t first = 0; first < cols; first += 32) {
            const std::int64_t count = std::min<std::int64_t>(32, cols - first);
            std::vector<float> group(values.begin() + r * cols + first,
                                     values.begin() + r * cols + first + count);
            std::vector<float> padded = group;
            padded.resize(32);
            for (float& v : padded) v /= size;
            std::vector<float> levels = over_the_range(padded);
            std::vector<float> here(found.begin() + r * cols + first,
                                    found.begin() + r * cols + first + count);
            for (float& v : here) v /= size;
            const double own = squared_error(here, std::span(padded).first(count));
            const double theirs = squared_error(levels, padded);
            // Scales and minima have 11 bits, of values up to 5.
            if (count == 32)
              CHECK(std::sqrt(own) <= std::sqrt(theirs) + std::sqrt(32) * 5 * std::exp2(-11));
            error += own;
            simple += theirs;
            for (const float v : padded) all += double{v} * v;
          }
        if (rows == 100 && cols == 160 && size < 1e38f) {
          CHECK(error < 0.9 * simple);
          CHECK(std::sqrt(error / all) < 0.09);
        }
      }
}

TEST(lines_hold_values_of_a_grid) {
  // As a file of 4 bits has them: scales and minima of f16, codes of every group from 0 to 15.
  std::vector<float> values;
  std::mt19937 random(5);
  const std::int64_t rows = 70, cols = 320;
  for (std::int64_t g = 0; g < rows * cols / 32; ++g) {
    const float scale = f16_to_f32(f32_to_f16(0.01f + 0.001f * static_cast<float>(random() % 100)));
    const float minimum = f16_to_f32(f32_to_f16(-8 * scale + 0.3f * scale * float(random() % 3)));
    for (int i = 0; i < 32; ++i)
      values.push_back(scale * static_cast<float>(i < 2 ? 15 * i : random() % 16) + minimum);
  }
  const std::vector<float> found = Stored(rows, values).values();
  for (std::size_t i = 0; i < values.size(); ++i) CHECK_NEAR(found[i], values[i], 2e-3);
}

TEST(lines_store_what_they_are_given) {
  const std::int64_t cols = 96;
  Stored s(65, cols);
  std::mt19937 random(9);
  std::vector<LineGroup> strips(128 * 3);
  for (std::int64_t r = 0; r < 65; ++r) {
    const std::span groups(strips.data() + r * 3, 3);
    for (LineGroup& group : groups) {
      for (std::uint8_t& code : group.codes) code = random() % 16;
      group.scale = std::ldexp(static_cast<float>(random() % 63) * -0.37f, -int(random() % 20));
      group.minimum = std::ldexp(static_cast<float>(random() % 63) * 0.51f, -int(random() % 20));
    }
    if (r == 7) std::ranges::fill(groups, LineGroup{});  // all 0
    if (r == 9)                                          // all 0, but for the codes
      for (LineGroup& group : groups) group.scale = group.minimum = 0;
    if (r == 8)  // f16 as they are
      for (LineGroup& group : groups) {
        group.scale = f16_to_f32(f32_to_f16(group.scale));
        group.minimum = f16_to_f32(f32_to_f16(group.minimum));
      }
  }
  std::vector<LineGroup> given = strips;
  for (std::int64_t strip = 0; strip < 2; ++strip)
    store_lines(s.w, strip, given.data() + strip * 64 * 3);
  const std::vector<float> found = s.values();
  for (std::int64_t r = 0; r < 65; ++r)
    for (std::int64_t i = 0; i < cols; ++i) {
      const LineGroup& group = strips[r * 3 + i / 32];
      const double scaled = double{group.scale} * group.codes[i % 32];
      const double bound = r == 8 ? 1e-7 : std::exp2(-11) + 1e-7;
      CHECK_NEAR(found[r * cols + i], scaled + group.minimum,
                 bound * (std::abs(scaled) + std::abs(group.minimum)) + 1e-9);
    }
}

TEST(lines_keep_the_four_largest_outliers_of_a_strip_exactly) {
  const std::int64_t cols = 96;  // whole groups of two values, which are kept
  std::vector<float> values(100 * cols);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = i % 3 == 0 ? 0.01f : -0.01f;
  const auto set = [&](std::int64_t r, std::int64_t i, float value) {
    values[r * cols + i] = value;
  };
  set(7, 69, -0.81f), set(3, 3, 0.6f), set(3, 40, 0.5f), set(60, 0, 0.4f), set(99, 33, 1e6f);
  const std::vector<float> found = Stored(100, values).values();
  for (std::size_t i = 0; i < values.size(); ++i)
    CHECK_NEAR(found[i], values[i], std::max(1e-4f, 1e-6f * std::abs(values[i])));
  set(9, 9, 0.3f);  // one too many: its own group alone loses codes
  const std::vector<float> five = Stored(100, values).values();
  for (std::int64_t i = 0; i < std::ssize(values); ++i) {
    const bool beside = i / cols == 9 && i % cols < 32;
    CHECK_NEAR(five[i], values[i], beside ? 0.03 : std::max(1e-4, 1e-6 * std::abs(values[i])));
  }
}

TEST(lines_zeros_and_constants_are_kept) {
  std::vector<float> values(64 * 64, 0.0f);
  for (std::int64_t i = 0; i < 64; ++i) values[5 * 64 + i] = 0.375f;
  const std::vector<float> found = Stored(64, values).values();
  CHECK(found == values);
}

TEST(key_scales_take_each_input_times_its_own_norm) {
  ModelConfig config;
  config.hidden_size = 64;
  config.num_heads = config.num_kv_heads = 1;
  config.head_dim = 16;
  const std::int64_t rows = config.q_size() + 2 * config.kv_size(), cols = config.hidden_size;
  std::vector<float> norm(cols), bias(rows);
  std::vector<std::int32_t> order(cols);
  for (std::int64_t i = 0; i < cols; ++i) {
    order[i] = static_cast<std::int32_t>((i + cols / 2) % cols);
    norm[i] = i < cols / 2 ? 100.0f : 1.0f;  // so that another order is another power of two
  }
  std::vector<float> values = random_floats(rows * cols, 1), ordered(rows * cols);
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t i = 0; i < cols; ++i) {
      if (i < cols / 2 && r % 2 == 0) values[r * cols + i] *= 1e-3f;
      ordered[r * cols + i] = values[r * cols + order[i]];
    }
  const auto scales = [&](const std::vector<float>& of, std::span<const std::int32_t> input_order) {
    LayerWeights weights;
    weights.attention_norm = norm;
    weights.qkv_bias = bias;
    weights.qkv = {WeightFormat::f32, rows, cols, reinterpret_cast<const std::byte*>(of.data())};
    weights.qkv.input_order = input_order;
    return key_scales(config, weights).keys;
  };
  CHECK(scales(ordered, order) == scales(values, {}));
  CHECK(scales(ordered, {}) != scales(values, {}));
}

int main() { return run_tests(); }
