// int8 rows: quantisation and dot products.
#include <algorithm>
#include <cmath>
#include <vector>

#include "check.h"
#include "cpu/isa.h"
#include "int8_rows.h"
#include "kernel_tests.h"

using namespace tda;
using namespace int8_rows;

namespace {

/// The scale of element i of a weight row: codes are -128 to 127, less their offset, and scales may
/// be negative.
double weight_step(const std::vector<float>& w, std::size_t i) {
  const std::size_t first = i / kPart * kPart, end = std::min<std::size_t>(w.size(), first + kPart);
  double least = 0, largest = 0;
  for (std::size_t j = first; j < end; ++j) {
    least = std::min(least, double{w[j]});
    largest = std::max(largest, double{w[j]});
  }
  return std::min(std::max(-least / 128, largest / 127), std::max(largest / 128, -least / 127));
}

}  // namespace

TEST(int8_rounds_to_half_a_step) {
  for (const std::int64_t n : kLengths)
    for (const float scale : {1e-38f, 1e-6f, 1.0f, 1e30f}) {
      const auto values = random_floats(n, scale);
      const Stored stored(1, n, values);
      double row_step = 0;
      for (std::int64_t i = 0; i < n; ++i)
        row_step = std::max(row_step, weight_step(values, i) / 127);
      for (std::int64_t i = 0; i < n; ++i) {
        // A scale is an integer multiple of the row's step; subnormal ones are less accurate.
        const double step = weight_step(values, i) + row_step + 1e-40;
        CHECK(std::abs(stored.values[i] - double{values[i]}) <= step / 2 * (1 + 1e-5));
      }
    }
  const Stored zero(1, 70, std::vector<float>(70));
  CHECK(zero.values == std::vector<float>(70));
}

TEST(int8_values_of_a_scale_share_lanes) {  // the layout in engine folders, spelt out
  constexpr std::int64_t kCols = 3 * kGroup;
  std::vector<float> values(kCols, 0.0f);
  std::vector<std::byte> zeros(int8_row_bytes(kCols)), row(int8_row_bytes(kCols));
  quantize_int8(values.data(), kCols, zeros.data());
  for (std::int64_t i = 0; i < kCols; ++i) {
    values[i] = 1;
    quantize_int8(values.data(), kCols, row.data());
    values[i] = 0;
    const bool is_second = i % 32 >= 16;  // of a scale's two halves
    const std::int64_t place = i < 128 ? (is_second ? 64 : 0) + i / 32 * 16 + i % 16
                                       : 128 + (is_second ? 32 : 0) + (i - 128) / 32 * 16 + i % 16;
    for (std::int64_t b = 0; b < kCols; ++b) CHECK((row[b] != zeros[b]) == (b == place));
  }
}

TEST(int8_rows_are_loaded) {
  for_all_kernels([](const Kernels& kernels) {
    for (const std::int64_t n : kLengths) {
      const Stored stored(2, n);
      std::vector<float> out(2 * n + 1, 7);
      row_kernels(kernels, WeightFormat::int8).load(stored.rows(1), out.data(), 2);
      for (std::int64_t i = 0; i < n; ++i) {
        CHECK(out[2 * i] == stored.values[n + i]);
        CHECK(out[2 * i + 1] == 7);
      }
    }
  });
}

TEST(int8_dot_matches_doubles) {
  for_all_kernels([](const Kernels& kernels) {
    for (const std::int64_t n : kLengths) {
      const std::int64_t rows = 1 + n % 6;
      const Stored w(rows, n);
      auto x = random_floats(n);
      if (n > 64) std::fill_n(x.begin(), 64, 0.0f);  // a group of zeros
      const auto expected_x = rounded(x, kernels);
      const auto p = prepared(row_kernels(kernels, WeightFormat::int8), x);
      std::vector<float> y(rows + 1, 3);
      row_kernels(kernels, WeightFormat::int8).dot(w.rows(), rows, p.data(), y.data(), false, {});
      const std::vector<float> once = y;
      row_kernels(kernels, WeightFormat::int8).dot(w.rows(), rows, p.data(), y.data(), true, {});
      for (std::int64_t r = 0; r < rows; ++r) {
        CHECK_NEAR(once[r], dot(w.values.data() + r * n, expected_x), 2e-4);
        CHECK_NEAR(y[r], 2 * once[r], 1e-4);
        // The error bound of exact x: quantising changes each value by at most max / 254.
        const std::vector<double> unrounded(x.begin(), x.end());
        double bound = 1e-4;
        for (std::int64_t i = 0; i < n; ++i)
          bound += std::abs(w.values[r * n + i]) * largest_in_part(x, i) / 254;
        CHECK_NEAR(once[r], dot(w.values.data() + r * n, unrounded), bound);
      }
      CHECK(y[rows] == 3);
    }
  });
}

namespace {

/// Three outliers, each in a part of random values; zeros elsewhere.
std::vector<float> with_outliers(std::int64_t n) {
  std::vector<float> x(n);
  for (const std::int64_t i : {std::int64_t{0}, n / 2, n - 1}) {
    const std::int64_t part = kPart, first = i / part * part;
    const auto values = random_floats(part);
    std::copy_n(values.begin(), std::min(part, n - first), x.begin() + first);
    x[i] = i % 2 == 0 ? 80.0f : -90.0f;
  }
  return x;
}

/// The error bound of w·x if parts with outliers keep another byte of x: sum |w[i]| * half a unit.
double finer_bound(const std::vector<double>& w, const std::vector<float>& x) {
  double bound = 0;
  for (std::size_t i = 0; i < x.size(); ++i)
    bound += std::abs(w[i]) * largest_in_part(x, i) / 254 / 255;
  return bound;
}

}  // namespace

TEST(int8_keeps_the_residual_beside_outliers) {
  for_all_kernels([](const Kernels& kernels) {
    for (const std::int64_t n : {300, 576, 2000}) {
      const Stored w(37, n);
      const auto x = with_outliers(n);
      const auto p = prepared(row_kernels(kernels, WeightFormat::int8), x);
      std::vector<float> y(37);
      row_kernels(kernels, WeightFormat::int8).dot(w.rows(), 37, p.data(), y.data(), false, {});
      for (std::int64_t r = 0; r < 37; ++r) {
        const float* row = w.values.data() + r * n;
        CHECK_NEAR(y[r], dot(row, {x.begin(), x.end()}), finer_bound({row, row + n}, x) + 2e-4);
      }
    }
  });
}

TEST(int8_dot_of_several_equals_dot) {
  for_all_kernels([](const Kernels& all) {
    const RowKernels& kernels = row_kernels(all, WeightFormat::int8);
    for (const std::int64_t n : {1, 64, 130, 576, 2112, 4224}) {
      const std::int64_t rows = 37;
      const Stored w(rows, n);
      std::vector<AlignedBytes> x;
      std::vector<std::vector<float>> y(Vectors::kMost, std::vector<float>(rows + 1, 3));
      auto alone = y;
      std::vector<const void*> inputs;
      std::vector<float*> outputs;
      for (std::int64_t v = 0; v < Vectors::kMost; ++v) {
        x.push_back(prepared(kernels, v % 3 == 1 ? with_outliers(n) : random_floats(n)));
        inputs.push_back(x[v].data());
        outputs.push_back(y[v].data());
      }
      for (const bool add : {false, true})
        for (const std::int64_t count : {1, 2, 3, 4, 5, 8, 15, 16}) {
          const Vectors vectors = {count, inputs.data(), outputs.data()};
          kernels.dot_each(w.rows(), rows, vectors, add);
          for (std::int64_t v = 0; v < count; ++v)
            kernels.dot(w.rows(), rows, x[v].data(), alone[v].data(), add, {});
          CHECK(y == alone);
        }
    }
  });
}

int main() { return run_tests(); }
