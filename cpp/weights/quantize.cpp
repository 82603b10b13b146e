#include "weights/quantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <span>
#include <vector>

#include "base/half.h"
#include "weights/model.h"

namespace tda {
namespace {

constexpr int kMostScale = 127;
constexpr int kLeast = -128, kLargest = 119;  // int8 codes: two nibbles, each less 8
constexpr int kOffset = 136;                  // 16 * 8 + 8
constexpr std::int64_t kInt8Group = kGroup / kInt8Scales;

/// A row's scales and step, which follow its nibbles.
struct Scales {
  std::byte* scales;
  std::byte* step;

  Scales(const std::byte* row, std::int64_t cols, std::int64_t per_group)
      : scales(const_cast<std::byte*>(row) + groups_of(cols) * kGroupBytes),
        step(scales + groups_of(cols) * per_group) {}
  float operator[](std::int64_t i) const {
    float size;
    std::memcpy(&size, step, 4);
    return size * static_cast<float>(static_cast<std::int8_t>(scales[i]));
  }
};

/// The scale nearest to zero that puts all values within the codes. Its sign assigns the larger
/// side of the values to the 128 negative codes, the other to the 119 positive ones.
float covering_scale(std::span<const float> values) {
  float least = 0, largest = 0;
  for (const float v : values) {
    least = std::min(least, v);
    largest = std::max(largest, v);
  }
  const float up = std::max(least / kLeast, largest / kLargest);
  const float down = std::max(largest / -kLeast, least / -kLargest);
  return up <= down ? up : -down;
}

}  // namespace

void quantize_int8(const float* values, std::int64_t cols, std::byte* high, std::byte* low) {
  const std::int64_t groups = groups_of(cols);
  std::memset(high, 0, static_cast<std::size_t>(high_row_bytes(cols)));
  const Scales scales(high, cols, kInt8Scales);
  const auto part_of = [&](std::int64_t first) {
    first = std::min(first, cols);
    return std::span(values + first, values + std::min(first + kInt8Group, cols));
  };
  // The minimum keeps a tiny row's step from underflowing to 0.
  float most = std::numeric_limits<float>::denorm_min() * kMostScale;
  for (std::int64_t i = 0; i < cols; i += kInt8Group)
    most = std::max(most, std::abs(covering_scale(part_of(i))));
  const float step = most / kMostScale;
  std::memcpy(scales.step, &step, 4);
  for (std::int64_t g = 0; g < groups; ++g) {
    int codes[kGroup];
    for (std::int64_t part = 0; part < kInt8Scales; ++part) {
      const std::span<const float> in = part_of(g * kGroup + part * kInt8Group);
      const float wanted = covering_scale(in) / step;
      const float away = std::copysign(std::ceil(std::abs(wanted)), wanted);
      const int scale = std::clamp(static_cast<int>(away), -kMostScale, kMostScale);
      scales.scales[g * kInt8Scales + part] = static_cast<std::byte>(scale);
      const float size = scale != 0 ? step * static_cast<float>(scale) : 1;
      for (std::size_t i = 0; i < kInt8Group; ++i) {
        const long rounded = i < in.size() ? std::lround(in[i] / size) : 0;
        codes[part * kInt8Group + static_cast<std::int64_t>(i)] =
            static_cast<int>(std::clamp<long>(rounded, kLeast, kLargest)) + kOffset;
      }
    }
    std::memset(low + g * kGroupBytes, 0, kGroupBytes);
    for (std::int64_t i = 0; i < kGroup; ++i) {
      const auto [byte, shift] = nibble_place(i, kInt8Group);
      high[g * kGroupBytes + byte] |= static_cast<std::byte>(codes[i] >> 4 << shift);
      low[g * kGroupBytes + byte] |= static_cast<std::byte>((codes[i] & 15) << shift);
    }
  }
}

void dequantize_int8(const std::byte* high, const std::byte* low, std::int64_t cols,
                     std::int64_t first, std::int64_t count, float* out) {
  const Scales scales(high, cols, kInt8Scales);
  for (std::int64_t i = 0; i < count; ++i) {
    const auto [byte, shift] = nibble_place((first + i) % kGroup, kInt8Group);
    const std::int64_t at = (first + i) / kGroup * kGroupBytes + byte;
    const int code = (static_cast<int>(high[at]) >> shift & 15) * 16 +
                     (static_cast<int>(low[at]) >> shift & 15) - kOffset;
    out[i] = scales[(first + i) / kInt8Group] * static_cast<float>(code);
  }
}

// ---- bf16c --------------------------------------------------------------------------------------

namespace {

/// The start of a row.
struct Head {
  std::uint8_t uppers[15], count;
};
struct Exception {
  std::uint16_t column, value;
};
static_assert(sizeof(Head) == 16 && sizeof(Exception) == 4);

constexpr int kZero = 15;  // the code of the upper byte 0

/// The most frequent upper bytes other than 0; the smaller one first if equally frequent.
void choose_uppers(const std::vector<std::uint16_t>& values, Head& head) {
  std::int64_t counts[256] = {};
  for (const std::uint16_t v : values) ++counts[v >> 8];
  counts[0] = 0;
  for (std::uint8_t& upper : head.uppers) {
    std::int64_t* const most = std::max_element(counts, counts + 256);
    if (*most == 0) break;
    upper = static_cast<std::uint8_t>(most - counts);
    *most = 0;
  }
}

}  // namespace

bool compress_bf16(const std::uint16_t* values, std::int64_t cols, std::byte* row) {
  std::vector<std::uint16_t> in(values, values + cols);
  in.resize(groups_of(cols) * kGroup);
  Head head = {};
  choose_uppers(in, head);
  int codes[256];
  std::fill_n(codes, 256, -1);
  for (int code = kZero - 1; code >= 0; --code) codes[head.uppers[code]] = code;
  codes[0] = kZero;
  std::memset(row, 0, static_cast<std::size_t>(bf16c_row_bytes(cols)));
  for (std::int64_t i = 0; i < std::ssize(in); ++i) {
    std::uint16_t value = in[i];
    if (codes[value >> 8] < 0) {
      if (head.count == bf16c_exceptions(cols) || i > 0xffff) return false;
      const Exception exception = {static_cast<std::uint16_t>(i), value};
      std::memcpy(row + sizeof head + head.count++ * sizeof exception, &exception,
                  sizeof exception);
      value = 0;
    }
    std::byte* const group = row + bf16c_head_bytes(cols) + i / kGroup * kBf16cGroupBytes;
    const std::int64_t place = bf16c_place(i % kGroup);
    group[place] = static_cast<std::byte>(value & 0xff);
    group[kGroup + place % 32] |= static_cast<std::byte>(codes[value >> 8] << (place < 32 ? 0 : 4));
  }
  std::memcpy(row, &head, sizeof head);
  return true;
}

void expand_bf16(const std::byte* row, std::int64_t cols, std::int64_t first, std::int64_t count,
                 float* out) {
  Head head;
  std::memcpy(&head, row, sizeof head);
  for (std::int64_t i = 0; i < count; ++i) {
    const std::byte* const group =
        row + bf16c_head_bytes(cols) + (first + i) / kGroup * kBf16cGroupBytes;
    const std::int64_t place = bf16c_place((first + i) % kGroup);
    const int code = static_cast<int>(group[kGroup + place % 32]) >> (place < 32 ? 0 : 4) & 15;
    const int upper = code == kZero ? 0 : head.uppers[code];
    out[i] = bf16_to_f32(static_cast<std::uint16_t>(upper << 8 | static_cast<int>(group[place])));
  }
  // The count comes from a file and may be too large.
  for (std::int64_t i = 0; i < std::min<std::int64_t>(head.count, bf16c_exceptions(cols)); ++i) {
    Exception exception;
    std::memcpy(&exception, row + sizeof head + i * sizeof exception, sizeof exception);
    const std::int64_t at = exception.column - first;
    if (at >= 0 && at < count) out[at] = bf16_to_f32(exception.value);
  }
}

void read_row(const Matrix& matrix, std::int64_t row, std::int64_t first, std::int64_t count,
              float* out) {
  switch (matrix.format) {
    case WeightFormat::int8:
      dequantize_int8(matrix.row(row), matrix.low_row(row), matrix.cols, first, count, out);
      break;
    case WeightFormat::graded:
    case WeightFormat::int4:
      dequantize_bricks(matrix.bricks(), row, first, count, out);
      break;
    case WeightFormat::bf16c:
      expand_bf16(matrix.row(row), matrix.cols, first, count, out);
      break;
    case WeightFormat::f32:
      std::copy_n(reinterpret_cast<const float*>(matrix.row(row)) + first, count, out);
      break;
    default: {
      const auto* source = reinterpret_cast<const std::uint16_t*>(matrix.row(row)) + first;
      std::transform(source, source + count, out, bf16_to_f32);
    }
  }
  if (!matrix.outliers || matrix.outliers[row].value == 0) return;
  const std::int64_t at = matrix.outliers[row].column - first;
  if (at >= 0 && at < count) out[at] = matrix.outliers[row].value;
}

}  // namespace tda
