#include "model/quantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "model/half.h"
#include "model/model.h"

namespace tda {
namespace {

constexpr int kLargest = 119;  // 16 * (15 - 8) + (15 - 8)
constexpr int kOffset = 136;   // 16 * 8 + 8

/// The smallest bf16 step of which kLargest reach `largest`.
std::uint16_t step_for(float largest) {
  std::uint16_t step = f32_to_bf16(largest / kLargest);
  if (bf16_to_f32(step) * kLargest < largest) ++step;  // the next larger bf16
  return step;
}

}  // namespace

void quantize_int8(const float* values, std::int64_t cols, std::byte* high, std::byte* low) {
  const std::int64_t groups = groups_of(cols);
  std::memset(high, 0, static_cast<std::size_t>(high_row_bytes(cols)));
  for (std::int64_t g = 0; g < groups; ++g) {
    const std::int64_t count = std::min(kGroup, cols - g * kGroup);
    float largest = 0;
    for (std::int64_t i = 0; i < count; ++i)
      largest = std::max(largest, std::abs(values[g * kGroup + i]));
    const std::uint16_t step = step_for(largest);
    std::memcpy(high + groups * kGroupBytes + 2 * g, &step, 2);
    const float size = largest > 0 ? bf16_to_f32(step) : 1;
    int codes[kGroup];
    for (std::int64_t i = 0; i < kGroup; ++i) {
      const long rounded = i < count ? std::lround(values[g * kGroup + i] / size) : 0;
      codes[i] = static_cast<int>(std::clamp<long>(rounded, -kLargest, kLargest)) + kOffset;
    }
    for (std::int64_t i = 0; i < kGroupBytes; ++i) {
      const int a = codes[i], b = codes[kGroupBytes + i];
      high[g * kGroupBytes + i] = static_cast<std::byte>(a >> 4 | (b & 0xf0));
      low[g * kGroupBytes + i] = static_cast<std::byte>((a & 15) | (b & 15) << 4);
    }
  }
}

void dequantize_int8(const std::byte* high, const std::byte* low, std::int64_t cols,
                     std::int64_t first, std::int64_t count, float* out) {
  const std::byte* steps = high + groups_of(cols) * kGroupBytes;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t group = (first + i) / kGroup, in_group = (first + i) % kGroup;
    const std::int64_t at = group * kGroupBytes + in_group % kGroupBytes;
    const int shift = in_group < kGroupBytes ? 0 : 4;
    const int code = (static_cast<int>(high[at]) >> shift & 15) * 16 +
                     (static_cast<int>(low[at]) >> shift & 15) - kOffset;
    std::uint16_t step;
    std::memcpy(&step, steps + 2 * group, 2);
    out[i] = bf16_to_f32(step) * static_cast<float>(code);
  }
}

void read_row(const Matrix& matrix, std::int64_t row, std::int64_t first, std::int64_t count,
              float* out) {
  if (matrix.format == WeightFormat::int8)
    return dequantize_int8(matrix.row(row), matrix.low_row(row), matrix.cols, first, count, out);
  if (matrix.format == WeightFormat::f32) {
    std::copy_n(reinterpret_cast<const float*>(matrix.row(row)) + first, count, out);
  } else {
    const auto* source = reinterpret_cast<const std::uint16_t*>(matrix.row(row)) + first;
    std::transform(source, source + count, out, bf16_to_f32);
  }
}

}  // namespace tda
