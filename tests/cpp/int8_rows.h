// int8 rows for tests, with their values in doubles, and inputs as the kernels quantise them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "kernel_tests.h"
#include "weights/model.h"
#include "weights/quantize.h"

namespace int8_rows {

using namespace tda;

inline constexpr std::int64_t kPart = kGroup / kInt8Scales;  // values that share a scale
inline constexpr std::int64_t kLengths[] = {1, 31, 64, 65, 130, 576, 1100};

/// An int8 matrix, and its values with both planes and with the high plane alone.
struct Stored {
  Matrix matrix;
  std::vector<std::byte> high, low;
  std::vector<float> values, coarse;

  Stored(std::int64_t rows, std::int64_t n, const std::vector<float>& source) {
    matrix = {WeightFormat::int8, rows, n};
    high.resize(rows * matrix.row_bytes());
    low.resize(rows * matrix.low_row_bytes());
    matrix.data = high.data();
    matrix.low = low.data();
    values.resize(rows * n);
    coarse.resize(rows * n);
    const std::vector<std::byte> middle(matrix.low_row_bytes(), std::byte{0x88});
    for (std::int64_t r = 0; r < rows; ++r) {
      std::byte* const row = high.data() + r * matrix.row_bytes();
      quantize_int8(source.data() + r * n, n, row, low.data() + r * matrix.low_row_bytes());
      read_row(matrix, r, 0, n, values.data() + r * n);
      dequantize_int8(row, middle.data(), n, 0, n, coarse.data() + r * n);  // low - 8 = 0
    }
  }
  Stored(std::int64_t rows, std::int64_t n) : Stored(rows, n, random_floats(rows * n)) {}
  Rows rows(std::int64_t first = 0) const {
    return {matrix.row(first), matrix.low_row(first), matrix.cols, matrix.stride(),
            matrix.low_stride()};
  }
};

/// The largest absolute value among the elements of x that share a scale with element i.
inline double largest_in_part(const std::vector<float>& x, std::size_t i) {
  const std::size_t first = i / kPart * kPart, end = std::min<std::size_t>(x.size(), first + kPart);
  double largest = 0;
  for (std::size_t j = first; j < end; ++j) largest = std::max(largest, std::abs(double{x[j]}));
  return largest;
}

/// x as decode kernels quantise it: parts rounded to multiples of their largest value / 127.
inline std::vector<double> rounded(const std::vector<float>& x) {
  std::vector<double> out(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double step = largest_in_part(x, i) / 127;
    if (step > 0) out[i] = std::nearbyint(x[i] / step) * step;
  }
  return out;
}

inline float step_of(const Stored& w, std::int64_t row) {
  float step;
  std::memcpy(
      &step,
      w.matrix.row(row) + low_row_bytes(w.matrix.cols) + groups_of(w.matrix.cols) * kInt8Scales, 4);
  return step;
}

inline float scale_of(const Stored& w, std::int64_t row, std::int64_t part) {
  const std::byte* scales = w.matrix.row(row) + low_row_bytes(w.matrix.cols);
  return step_of(w, row) * static_cast<float>(static_cast<std::int8_t>(scales[part]));
}

inline double dot(const float* w, const std::vector<double>& x) {
  return std::inner_product(x.begin(), x.end(), w, 0.0);
}

}  // namespace int8_rows
