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

/// An int8 matrix and its values.
struct Stored {
  Matrix matrix;
  std::vector<std::byte> data;
  std::vector<float> values;

  Stored(std::int64_t rows, std::int64_t n, const std::vector<float>& source) {
    matrix = {WeightFormat::int8, rows, n};
    data.resize(rows * matrix.row_bytes());
    matrix.data = data.data();
    values.resize(rows * n);
    for (std::int64_t r = 0; r < rows; ++r) {
      quantize_int8(source.data() + r * n, n, data.data() + r * matrix.row_bytes());
      read_row(matrix, r, 0, n, values.data() + r * n);
    }
  }
  Stored(std::int64_t rows, std::int64_t n) : Stored(rows, n, random_floats(rows * n)) {}
  Rows rows(std::int64_t first = 0) const {
    return {matrix.row(first), matrix.cols, matrix.stride()};
  }
};

/// Whether the kernels multiply bytes: these quantise more, in decode as in prefill.
inline bool multiply_bytes(const Kernels& kernels) {
  return panel_kernels(kernels, WeightFormat::int8).prepare != nullptr;
}

/// The largest absolute value among the elements of x that share a scale with element i.
inline double largest_in_part(const std::vector<float>& x, std::size_t i) {
  const std::size_t first = i / kPart * kPart, end = std::min<std::size_t>(x.size(), first + kPart);
  double largest = 0;
  for (std::size_t j = first; j < end; ++j) largest = std::max(largest, std::abs(double{x[j]}));
  return largest;
}

/// x as decode kernels quantise it, to 8 bits or 16.
inline std::vector<double> rounded(const std::vector<float>& x, const Kernels& kernels) {
  const double most = multiply_bytes(kernels) ? 127 : 32767;
  std::vector<double> out(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double step = largest_in_part(x, i) / most;
    if (step > 0) out[i] = std::nearbyint(x[i] / step) * step;
  }
  return out;
}

inline const std::byte* scales_of(const Stored& w, std::int64_t row) {
  return w.matrix.row(row) + groups_of(w.matrix.cols) * kGroup;
}
inline float step_of(const Stored& w, std::int64_t row) {
  float step;
  std::memcpy(&step, scales_of(w, row) + groups_of(w.matrix.cols) * kInt8Scales, 4);
  return step;
}
inline float scale_of(const Stored& w, std::int64_t row, std::int64_t part) {
  return step_of(w, row) * static_cast<float>(static_cast<std::int8_t>(scales_of(w, row)[part]));
}

inline double dot(const float* w, const std::vector<double>& x) {
  return std::inner_product(x.begin(), x.end(), w, 0.0);
}

}  // namespace int8_rows
