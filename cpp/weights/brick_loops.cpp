#include "weights/brick_loops.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "base/four.h"
#include "base/half.h"
#include "weights/centred.h"

namespace tda::TDA_ISA {
namespace {

#ifdef __AVX2__
using V = Eight;
#else
using V = Four;
#endif
constexpr std::int64_t kLanes = sizeof(V) / sizeof(float);
constexpr std::int64_t kHalf = kStripRows / 2;

// ---- rounding -----------------------------------------------------------------------------------

/// The sums of at(i) for i < 16, added as sum_of does.
template <class At>
[[gnu::always_inline]] inline V sums_of(const At& at) {
  V sums[8];
  for (std::int64_t i = 0; i < 8; ++i) sums[i] = at(i) + at(8 + i);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

/// Value i of each of some groups, which are one behind the other.
V gather(const float* groups, std::int64_t i) {
  const auto value = [=](std::int64_t group) { return groups[group * kScaleInputs + i]; };
#ifdef __AVX2__
  return V{value(0), value(1), value(2), value(3), value(4), value(5), value(6), value(7)};
#else
  return V{value(0), value(1), value(2), value(3)};
#endif
}

/// The scales of least squared error for some groups of 16 values in steps, or those that least
/// squares gives for their codes where these are better and clip no more; 0 where none is better
/// than zeros.
V choose_scales(const float* groups, const ScalesTried& tried) {
  V values[kScaleInputs], codes[kScaleInputs];
  for (std::int64_t i = 0; i < kScaleInputs; ++i) values[i] = gather(groups, i);
  const auto [best, least] = search_scales(values, tried, [](std::int64_t, V v) { return v; });
  const V inverses = best == 0 ? V{} : 1 / best;
  for (std::int64_t i = 0; i < kScaleInputs; ++i) codes[i] = codes_of(values[i], inverses);
  const V products = sums_of([&](std::int64_t i) { return codes[i] * values[i]; });
  const V squares = sums_of([&](std::int64_t i) { return codes[i] * codes[i]; });
  const V fitted = clamp(nearest(products / (squares == 0 ? V{} + 1 : squares)), -kMostCentredScale,
                         kMostCentredScale);
  const V fitted_inverses = fitted == 0 ? V{} : 1 / fitted;
  const V errors = sums_of([&](std::int64_t i) {
    const V missed = values[i] - fitted * codes_of(values[i], fitted_inverses);
    return missed * missed;
  });
  const auto size = [](V v) { return max(v, -v); };
  // The least scale tried puts the largest value nearest to the end of the codes.
  V reach{};
  for (const V& v : values) reach = max(reach, size(v));
  const auto reaches = size(fitted) >= tried.first * (reach / 8);
  return ((best != 0) & reaches & (errors < least)) ? fitted : best;
}

/// The squares of what a vector of values misses as codes of this step.
V squares_missed(V values, float step, float inverse) {
  const V missed = values - step * codes_of(values, V{} + inverse);
  return missed * missed;
}

constexpr int kRestSteps = 9;

/// Adds the squared errors of a block as codes of each step.
void add_errors(const float* values, const float (&steps)[kRestSteps],
                float (&errors)[kRestSteps]) {
  int k = 0;
#ifdef __AVX2__
  for (; k + 4 <= kRestSteps; k += 4) {  // four steps, which share the sums of lanes
    V sums[4] = {};
    for (std::int64_t i = 0; i < kBlockInputs; i += kLanes)
      for (int j = 0; j < 4; ++j)
        sums[j] += squares_missed(load<V>(values + i), steps[k + j], 1 / steps[k + j]);
    // Neighbours, and neighbours of these: as sum_of does.
    const V halves =
        _mm256_hadd_ps(_mm256_hadd_ps(sums[0], sums[1]), _mm256_hadd_ps(sums[2], sums[3]));
    const Four found = _mm256_castps256_ps128(halves) + _mm256_extractf128_ps(halves, 1);
    store_four(errors + k, load_four(errors + k) + found);
  }
#endif
  for (; k < kRestSteps; ++k)
    errors[k] += sum_of(kBlockInputs, [&](std::int64_t i) {
      return squares_missed(load<V>(values + i), steps[k], 1 / steps[k]);
    });
}

/// The step of least squared error for the rests of a row whose largest scale is `largest`, judged
/// by 32 of its blocks.
float choose_rest_step(const float* rests, std::int64_t blocks, float largest) {
  float steps[kRestSteps], errors[kRestSteps] = {};
  for (int k = 0; k < kRestSteps; ++k) steps[k] = largest / 160 * static_cast<float>(4 + k);
  const std::int64_t every = std::max<std::int64_t>(1, blocks / 32);
  for (std::int64_t b = 0; b < blocks; b += every)
    add_errors(rests + b * kBlockInputs, steps, errors);
  float best = 0, least = std::numeric_limits<float>::infinity();
  for (int k = 0; k < kRestSteps; ++k) {
    if (errors[k] >= least) continue;
    least = errors[k];
    best = steps[k];
  }
  return best;
}

/// The codes of n values, a multiple of 16, which become what these miss.
void encode(float* values, std::int64_t n, float step, std::uint8_t* codes) {
  const V inverse = V{} + (step != 0 ? 1 / step : 0);
  for (std::int64_t first = 0; first < n; first += kScaleInputs) {
    V found[kScaleInputs / kLanes];
    for (std::int64_t i = 0; i < kScaleInputs; i += kLanes) {
      const V v = load<V>(values + first + i), code = codes_of(v, inverse);
      found[i / kLanes] = code + 8.0f;
      store(values + first + i, v - step * code);
    }
    store_bytes(codes + first, found);
  }
}

float round_centred(float* row, std::int64_t blocks, float unit, float step, const CentredRow& to) {
  const float in_units = 1 / unit, in_steps = unit / step;
  float largest = 1;
  for (std::int64_t first = 0; first < 2 * blocks; first += kLanes) {
    const std::int64_t count = std::min(kLanes, 2 * blocks - first);
    float* const groups = row + first * kScaleInputs;
    for (std::int64_t i = 0; i < count * kScaleInputs; ++i)
      groups[i] = groups[i] * in_units * in_steps;
    float last[kLanes * kScaleInputs] = {};
    if (count < kLanes) std::copy_n(groups, count * kScaleInputs, last);
    const V scales = choose_scales(count < kLanes ? last : groups, to.rests ? kWithRests : kAlone);
    for (std::int64_t g = 0; g < count; ++g) {
      largest = std::max(largest, std::max(scales[g], -scales[g]));
      to.scales[(first + g) * kStripRows] = static_cast<std::int8_t>(scales[g]);
      encode(groups + g * kScaleInputs, kScaleInputs, scales[g],
             to.codes + (first + g) * kScaleInputs);
    }
  }
  if (!to.rests) return 0;
  const float rest_step = choose_rest_step(row, blocks, largest);
  encode(row, blocks * kBlockInputs, rest_step, to.rests);
  return rest_step;
}

// ---- where codes lie ----------------------------------------------------------------------------

/// A block's codes of rows r, in the lower halves of bytes, and 32 + r.
using Pairs = std::uint8_t[kHalf][kBlockInputs];

void pair_codes(const std::uint8_t* codes, std::int64_t stride, Pairs& pairs) {
  for (std::int64_t r = 0; r < kHalf; ++r) {
    const std::uint8_t *const low = codes + r * stride, *const high = low + kHalf * stride;
    for (std::int64_t i = 0; i < kBlockInputs; ++i)
      pairs[r][i] = static_cast<std::uint8_t>(low[i] | high[i] << 4);
  }
}

void store_codes(const std::uint8_t* codes, std::int64_t stride, BrickCodes& to) {
  Pairs pairs;
  pair_codes(codes, stride, pairs);
  for (std::int64_t q = 0; q < kBlockInputs / 4; ++q)
    for (std::int64_t r = 0; r < kHalf; ++r) std::memcpy(to[q] + 4 * r, pairs[r] + 4 * q, 4);
}

void load_codes(const BrickCodes& codes, Pairs& pairs) {
  for (std::int64_t r = 0; r < kHalf; ++r)
    for (std::int64_t q = 0; q < kBlockInputs / 4; ++q)
      std::memcpy(pairs[r] + 4 * q, codes[q] + 4 * r, 4);
}

/// Exchanges the upper right with the lower left quarters of squares of 2 * kRows rows, in four
/// columns of eight rows of bytes.
template <int kRows>
void exchange(std::uint64_t (&rows)[8][4]) {
  constexpr std::uint64_t kLow[] = {0, 0x00ff00ff00ff00ff, 0x0000ffff0000ffff, 0, 0xffffffff};
  for (int r = 0; r < 8; ++r)
    for (int c = 0; c < 4 && (r & kRows) == 0; ++c) {
      std::uint64_t &upper = rows[r][c], &lower = rows[r + kRows][c];
      const std::uint64_t changed = (upper >> 8 * kRows ^ lower) & kLow[kRows];
      lower ^= changed;
      upper ^= changed << 8 * kRows;
    }
}

void transpose(const std::uint8_t (&from)[32][32], std::uint8_t (&to)[32][32]) {
  for (int first = 0; first < 32; first += 8) {
    std::uint64_t rows[8][4];
    std::memcpy(rows, from[first], sizeof rows);
    exchange<4>(rows);
    exchange<2>(rows);
    exchange<1>(rows);
    for (int i = 0; i < 32; ++i) std::memcpy(to[i] + first, &rows[i % 8][i / 8], 8);
  }
}

void store_rests(const std::uint8_t* codes, std::int64_t stride, const Bricks& to,
                 std::int64_t strip, std::int64_t block) {
  Pairs pairs, runs;
  pair_codes(codes, stride, pairs);
  transpose(pairs, runs);
  for (std::int64_t i = 0; i < kBlockInputs; ++i)
    std::memcpy(const_cast<std::uint8_t*>(to.rest(block * kBlockInputs + i)) + kHalf * strip,
                runs[i], kHalf);
}

void load_rests(const Bricks& source, std::int64_t strip, std::int64_t block, Pairs& pairs) {
  Pairs runs;
  for (std::int64_t i = 0; i < kBlockInputs; ++i)
    std::memcpy(runs[i], source.rest(block * kBlockInputs + i) + kHalf * strip, kHalf);
  transpose(runs, pairs);
}

// ---- lengths of columns -------------------------------------------------------------------------

/// As dequantize_bricks(), a brick at once.
void dequantize(const Bricks& source, std::int64_t strip, std::int64_t block,
                float (&values)[kStripRows][kBlockInputs]) {
  Pairs pairs, rests;
  const bool lines = source.kind == BrickKind::lines;
  const auto* const line = lines ? &source.brick<LineBrick>(strip, block) : nullptr;
  const auto* const centred = lines ? nullptr : &source.brick<CentredBrick>(strip, block);
  load_codes(lines ? line->codes : centred->codes, pairs);
  if (source.has_rests()) load_rests(source, strip, block, rests);
  for (std::int64_t r = 0; r < kStripRows; ++r) {
    const std::uint8_t* const codes = pairs[r % kHalf];
    const int shift = r < kHalf ? 0 : 4;
    const float step = source.steps[strip * kStripRows + r];
    if (lines) {
      const float scale = f16_to_f32(line->scales[r]), minimum = f16_to_f32(line->minima[r]);
      for (std::int64_t i = 0; i < kBlockInputs; ++i)
        values[r][i] = step * (scale * static_cast<float>(codes[i] >> shift & 15) + minimum);
      continue;
    }
    const float low = centred->scales[0][r], high = centred->scales[1][r];
    for (std::int64_t i = 0; i < kBlockInputs; ++i)  // scales times codes are exact
      values[r][i] = step * ((i < kScaleInputs ? low : high) *
                             static_cast<float>((codes[i] >> shift & 15) - 8));
    if (!source.has_rests()) continue;
    const float rest_step = source.rest_steps[strip * kStripRows + r];
    for (std::int64_t i = 0; i < kBlockInputs; ++i)
      values[r][i] += rest_step * static_cast<float>((rests[r % kHalf][i] >> shift & 15) - 8);
  }
  for (std::int64_t k = 0; k < kStripOutliers; ++k) {
    const StripOutlier& outlier = source.outliers[strip * kStripOutliers + k];
    if (outlier.value != 0 && outlier.input / kBlockInputs == block)
      values[outlier.row - strip * kStripRows][outlier.input % kBlockInputs] += outlier.value;
  }
}

void add_squares(const Bricks& source, std::int64_t block, double* squares) {
  for (std::int64_t strip = 0; strip < source.strips; ++strip) {
    float values[kStripRows][kBlockInputs];
    dequantize(source, strip, block, values);
    const std::int64_t rows = std::min(kStripRows, source.rows - strip * kStripRows);
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t i = 0; i < kBlockInputs; ++i)
        squares[i] += static_cast<double>(values[r][i]) * values[r][i];
  }
}

void add_rest_squares(const Bricks& source, std::int64_t block, float unit, double* squares) {
  for (std::int64_t s = 0; s < source.strips; ++s) {
    float weights[kStripRows];  // of the squares of codes
    for (std::int64_t r = 0; r < kStripRows; ++r) {
      const float step = source.rest_steps[s * kStripRows + r] / unit;
      weights[r] = step * step;
    }
    for (std::int64_t i = 0; i < kBlockInputs; ++i) {
      const std::uint8_t* const run = source.rest(block * kBlockInputs + i) + s * kHalf;
      float rests[kStripRows];
      for (std::int64_t r = 0; r < kHalf; ++r) {
        rests[r] = static_cast<float>((run[r] & 15) - 8);
        rests[kHalf + r] = static_cast<float>((run[r] >> 4) - 8);
      }
      squares[i] += sum_of(kStripRows, [&](std::int64_t r) {
        const V rest = load<V>(rests + r);
        return load<V>(weights + r) * rest * rest;
      });
    }
  }
}

#define TDA_STRING_OF(isa) #isa
#define TDA_STRING(isa) TDA_STRING_OF(isa)

}  // namespace

extern const BrickLoops brick_loops;
const BrickLoops brick_loops = {TDA_STRING(TDA_ISA), round_centred, store_codes,
                                store_rests,         add_squares,   add_rest_squares};

}  // namespace tda::TDA_ISA
