#include "weights/quantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "base/four.h"
#include "base/half.h"
#include "weights/model.h"

namespace tda {
namespace {

constexpr int kMostScale = 127;
constexpr int kOffset = 128, kLeast = -128, kLargest = 127;  // of codes
constexpr std::int64_t kInt8Group = kGroup / kInt8Scales;

/// A row's scales and step, which follow its codes.
struct Scales {
  std::byte* scales;
  std::byte* step;

  Scales(const std::byte* row, std::int64_t cols)
      : scales(const_cast<std::byte*>(row) + groups_of(cols) * kGroup),
        step(scales + groups_of(cols) * kInt8Scales) {}
  float operator[](std::int64_t i) const {
    float size;
    std::memcpy(&size, step, 4);
    return size * static_cast<float>(static_cast<std::int8_t>(scales[i]));
  }
};

/// The scale nearest to zero that puts 32 values within the codes. Its sign assigns the larger side
/// of the values to the 128 negative codes, the other to the 127 positive ones.
float covering_scale(const float* values) {
  Four smallest{}, largest{};
  for (std::int64_t i = 0; i < kInt8Group; i += 4) {
    smallest = min(smallest, load_four(values + i));
    largest = max(largest, load_four(values + i));
  }
  const float least = least_of(smallest), most = most_of(largest);
  const float up = std::max(least / kLeast, most / kLargest);
  const float down = std::max(most / -kLeast, least / -kLargest);
  return up <= down ? up : -down;
}

/// Stores 32 values, rounded half away from zero, 16 of them `half` bytes after the others. size: of
/// a code, not 0
void store_codes(const float* values, float size, std::byte* codes, std::int64_t half) {
  constexpr float kBelowHalf = 0x1.fffffep-2f;  // with 0.5 itself, the number below 0.5 would be 1
  float rounded[kInt8Group];
  for (std::int64_t i = 0; i < kInt8Group; i += 4) {
    const Four code = load_four(values + i) / size;
    const Four away = code < 0 ? Four{} - kBelowHalf : Four{} + kBelowHalf;
    store_four(rounded + i, clamp(code + away, kLeast, kLargest));
  }
  const auto store = [&](std::byte* to, const float* from) {
    for (std::int64_t i = 0; i < kInt8Group / 2; ++i)
      to[i] = static_cast<std::byte>(static_cast<int>(from[i]) + kOffset);
  };
  store(codes, rounded);
  store(codes + half, rounded + kInt8Group / 2);
}

}  // namespace

void quantize_int8(const float* values, std::int64_t cols, std::byte* row) {
  const std::int64_t groups = groups_of(cols), count = groups * kInt8Scales;
  std::memset(row, 0, static_cast<std::size_t>(int8_row_bytes(cols)));
  const Scales scales(row, cols);
  float padded[kInt8Group];
  const auto part = [&](std::int64_t p) -> const float* {
    const std::int64_t first = std::min(p * kInt8Group, cols), own = cols - first;
    if (own >= kInt8Group) return values + first;
    std::fill(std::copy_n(values + first, own, padded), std::end(padded), 0.0f);
    return padded;
  };
  std::vector<float> wanted(count);
  // The minimum keeps a tiny row's step from underflowing to 0.
  float most = std::numeric_limits<float>::denorm_min() * kMostScale;
  for (std::int64_t p = 0; p < count; ++p) {
    wanted[p] = covering_scale(part(p));
    most = std::max(most, std::abs(wanted[p]));
  }
  const float step = most / kMostScale;
  std::memcpy(scales.step, &step, 4);
  for (std::int64_t p = 0; p < count; ++p) {
    const float away = std::copysign(std::ceil(std::abs(wanted[p] / step)), wanted[p]);
    const int scale = std::clamp(static_cast<int>(away), -kMostScale, kMostScale);
    scales.scales[p] = static_cast<std::byte>(scale);
    const float size = scale != 0 ? step * static_cast<float>(scale) : 1;
    store_codes(part(p), size, row + int8_place(p * kInt8Group, groups),
                int8_half(p / kInt8Scales, groups));
  }
}

void dequantize_int8(const std::byte* row, std::int64_t cols, std::int64_t first,
                     std::int64_t count, float* out) {
  const Scales scales(row, cols);
  const std::int64_t groups = groups_of(cols);
  for (std::int64_t i = first; i < first + count; ++i) {
    const int code = static_cast<int>(row[int8_place(i, groups)]) - kOffset;
    *out++ = scales[i / kInt8Group] * static_cast<float>(code);
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
      dequantize_int8(matrix.row(row), matrix.cols, first, count, out);
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
