#include "weights/bricks.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string_view>

#include "base/half.h"
#include "weights/brick_loops.h"
#include "weights/brick_places.h"

namespace tda {

namespace portable {
extern const BrickLoops brick_loops;
}
namespace avx2 {
extern const BrickLoops brick_loops;
}

// The build defines TDA_HAS_avx2 if it has loops for it.
std::vector<const BrickLoops*> available_brick_loops() {
  std::vector<const BrickLoops*> found = {&portable::brick_loops};
#ifdef TDA_HAS_avx2
  if (__builtin_cpu_supports("avx2")) found.push_back(&avx2::brick_loops);
#endif
  return found;
}

const BrickLoops& brick_loops() {
  static const BrickLoops& chosen = []() -> const BrickLoops& {
    const char* const forced = std::getenv("TDA_CPU_ISA");
    const auto found = available_brick_loops();
    return forced && std::string_view(forced) == found.front()->name ? *found.front()
                                                                     : *found.back();
  }();
  return chosen;
}

namespace {

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
std::int64_t aligned(std::int64_t bytes) { return ceil_div(bytes, 64) * 64; }

/// Runs of rests start on cache lines, an odd number of them apart: at a power of two all would
/// fall into the same sets of the cache.
std::int64_t rest_stride_of(std::int64_t strips) { return (ceil_div(strips, 2) | 1) * 64; }

/// Where the parts of a matrix begin.
struct Parts {
  std::int64_t steps, rest_steps, outliers, rest_lengths, rests, end;

  explicit Parts(const Bricks& w) {
    const std::size_t brick = w.kind == BrickKind::lines ? sizeof(LineBrick) : sizeof(CentredBrick);
    const std::int64_t of_rows = w.strips * kStripRows * 4, has_rests = w.has_rests() ? 1 : 0;
    steps = w.strips * w.blocks * static_cast<std::int64_t>(brick);
    rest_steps = steps + of_rows;
    outliers = rest_steps + has_rests * of_rows;
    rest_lengths = outliers + aligned(w.strips * kStripOutliers *
                                      static_cast<std::int64_t>(sizeof(StripOutlier)));
    rests = rest_lengths + has_rests * aligned(w.blocks * kBlockInputs * 4);
    end = rests + has_rests * w.blocks * kBlockInputs * rest_stride_of(w.strips);
  }
};

}  // namespace

Bricks::Bricks(const std::byte* data, std::int64_t row_count, std::int64_t col_count,
               BrickKind brick_kind, bool in_blocks)
    : rows(row_count),
      cols(col_count),
      strips(ceil_div(rows, kStripRows)),
      blocks(ceil_div(cols, kBlockInputs)),
      kind(brick_kind),
      by_block(in_blocks),
      bricks(data) {
  const Parts parts(*this);
  const auto at = [&](std::int64_t offset) { return data ? data + offset : nullptr; };
  steps = reinterpret_cast<const float*>(at(parts.steps));
  outliers = reinterpret_cast<const StripOutlier*>(at(parts.outliers));
  if (!has_rests()) return;
  rest_steps = reinterpret_cast<const float*>(at(parts.rest_steps));
  rest_lengths = reinterpret_cast<const float*>(at(parts.rest_lengths));
  rests = reinterpret_cast<const std::uint8_t*>(at(parts.rests));
  rest_stride = rest_stride_of(strips);
}

std::int64_t Bricks::bytes() const { return Parts(*this).end; }
std::int64_t Bricks::high_bytes() const { return Parts(*this).rests; }

void measure_rests(const Bricks& target, std::int64_t first, std::int64_t end) {
  // In units of the largest step: squares of very large or small ones are no floats.
  const float* const steps = target.rest_steps;
  const float unit = *std::max_element(steps, steps + target.strips * kStripRows);
  for (std::int64_t b = first; b < end; ++b) {
    double squares[kBlockInputs] = {};
    if (unit > 0) brick_loops().add_rest_squares(target, b, unit, squares);
    for (std::int64_t i = 0; i < kBlockInputs; ++i)
      const_cast<float*>(target.rest_lengths)[b * kBlockInputs + i] =
          static_cast<float>(unit * std::sqrt(squares[i]));
  }
}

void measure_columns(const Bricks& source, std::int64_t block, float* lengths) {
  double squares[kBlockInputs] = {};
  brick_loops().add_squares(source, block, squares);
  for (std::int64_t i = 0; i < kBlockInputs; ++i)
    lengths[i] = static_cast<float>(std::sqrt(squares[i]));
}

void dequantize_bricks(const Bricks& source, std::int64_t row, std::int64_t first,
                       std::int64_t count, float* out, bool high_only) {
  const std::int64_t strip = row / kStripRows, r = row % kStripRows, end = first + count;
  const auto [rest_byte, shift] = rest_place(r);
  const float step = source.steps[row];
  for (std::int64_t begin = first; begin < end;) {
    const std::int64_t block = begin / kBlockInputs, start = block * kBlockInputs;
    const std::int64_t stop = std::min(end, start + kBlockInputs);
    std::uint8_t codes[kBlockInputs];
    float values[kBlockInputs];
    if (source.kind == BrickKind::lines) {
      const auto& brick = source.brick<LineBrick>(strip, block);
      const float scale = f16_to_f32(brick.scales[r]), minimum = f16_to_f32(brick.minima[r]);
      get_codes(brick.codes, r, codes);
      for (std::int64_t i = 0; i < kBlockInputs; ++i)
        values[i] = step * (scale * static_cast<float>(codes[i]) + minimum);
    } else {
      const auto& brick = source.brick<CentredBrick>(strip, block);
      get_codes(brick.codes, r, codes);
      for (std::int64_t i = 0; i < kBlockInputs; ++i)
        values[i] = step * static_cast<float>(brick.scales[i / kScaleInputs][r] * (codes[i] - 8));
    }
    std::copy(values + (begin - start), values + (stop - start), out + (begin - first));
    begin = stop;
  }
  for (std::int64_t i = first; i < end && source.has_rests() && !high_only; ++i)
    out[i - first] +=
        source.rest_steps[row] *
        static_cast<float>((source.rest(i)[32 * strip + rest_byte] >> shift & 15) - 8);
  for (std::int64_t k = 0; k < kStripOutliers; ++k) {
    const StripOutlier& outlier = source.outliers[strip * kStripOutliers + k];
    const std::int64_t at = outlier.input - first;
    if (outlier.value != 0 && outlier.row == row && at >= 0 && at < count) out[at] += outlier.value;
  }
}

}  // namespace tda
