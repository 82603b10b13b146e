// Bricks as rows of bf16, for prefill with AVX512-BF16.
#pragma once

#include "cpu/int8.h"
#include "cpu/simd.h"
#include "weights/bricks.h"

#if defined(__AVX512BF16__)

namespace tda {
namespace {

/// A strip's weights for a block of inputs.
using Bf16Brick = std::uint16_t[kStripRows][kBlockInputs];
/// Codes or rests of a brick, by row: byte [r][i] is that of row r and, in the upper half, of row
/// 32 + r.
using RowCodes = std::uint8_t[kStripRows / 2][kBlockInputs];
static_assert(kBlockInputs == 32 && kScaleInputs == 16);

inline __m512i join(const std::uint8_t* low, const std::uint8_t* high) {
  const __m256i first = _mm256_loadu_si256((const __m256i*)low);
  return _mm512_inserti64x4(_mm512_castsi256_si512(first), _mm256_loadu_si256((const __m256i*)high),
                            1);
}

/// Writes four rows and the four that lie `apart` rows behind. v[q] holds the quads q and 4 + q of
/// their inputs, each in a half: those of the first four rows, then those of the others.
inline void put_rows(const __m512i v[4], std::uint8_t (*rows)[kBlockInputs], int64_t apart) {
  const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
  const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
  const __m512i quarters[4] = {_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c),
                               _mm512_unpacklo_epi64(b, d), _mm512_unpackhi_epi64(b, d)};
  for (int k = 0; k < 4; ++k) {
    const __m512i both = _mm512_shuffle_i64x2(quarters[k], quarters[k], 0b11'01'10'00);
    _mm256_storeu_si256((__m256i*)rows[k], _mm512_castsi512_si256(both));
    _mm256_storeu_si256((__m256i*)rows[apart + k], _mm512_extracti64x4_epi64(both, 1));
  }
}

inline void codes_by_row(const BrickCodes& codes, RowCodes& out) {
  for (int j = 0; j < 4; ++j) {
    __m512i quads[4];
    for (int q = 0; q < 4; ++q) quads[q] = join(codes[q] + 32 * j, codes[4 + q] + 32 * j);
    put_rows(quads, out + 8 * j, 4);
  }
}

inline void rests_by_row(const Bricks& w, int64_t strip, int64_t block, RowCodes& out) {
  __m512i quads[4][4];
  for (int q = 0; q < 4; ++q) {
    __m512i inputs[4];
    for (int k = 0; k < 4; ++k) {
      const std::uint8_t* const rest = w.rest(block * kBlockInputs + 4 * q + k) + 32 * strip;
      inputs[k] = join(rest, rest + 16 * w.rest_stride);
    }
    interleave(inputs, quads[q]);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512i of_rows[4] = {quads[0][j], quads[1][j], quads[2][j], quads[3][j]};
    put_rows(of_rows, out + 4 * j, 16);
  }
}

/// weight = unit * code + base, of a brick's rows and the halves of its inputs.
struct BrickScales {
  float unit[2][kStripRows], base[2][kStripRows];

  BrickScales(const CentredBrick& brick, const float* steps) {
    for (int half = 0; half < 2; ++half)
      for (int64_t r = 0; r < kStripRows; ++r) {
        unit[half][r] = steps[r] * brick.scales[half][r];
        base[half][r] = -8 * unit[half][r];
      }
  }
  BrickScales(const LineBrick& brick, const float* steps) {
    for (int64_t r = 0; r < kStripRows; r += kLanes)
      for (int half = 0; half < 2; ++half) {
        const Floats step = load_as<Floats>(steps + r);
        store(unit[half] + r, step * half_floats(brick.scales + r));
        store(base[half] + r, step * half_floats(brick.minima + r));
      }
  }
  /// Takes off what rests of 4 bits have too much, as unsigned numbers.
  void centre_rests(const float* rest_steps) {
    for (auto& of_half : base)
      for (int64_t r = 0; r < kStripRows; ++r) of_half[r] -= 8 * rest_steps[r];
  }
};

/// 16 bytes as dwords.
inline __m512i sixteen(const std::uint8_t* bytes) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)bytes));
}

/// Rounds high + rest, added in f32. Codes are looked up among the 16 weights that they stand for
/// in their row and half; the permutation heeds the lower four bits of a dword.
template <bool kRests>
inline void round_rows(const RowCodes& codes, const BrickScales& scales, const RowCodes& rests,
                       const float* rest_steps, Bf16Brick& out) {
  const __m512 levels = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i four_bits = _mm512_set1_epi32(15);
  for (int64_t at = 0; at < kStripRows / 2; ++at) {
    __m512 values[2][2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512i code = sixteen(codes[at] + 16 * half), rest = sixteen(rests[at] + 16 * half);
#pragma GCC unroll 2
      for (int upper = 0; upper < 2; ++upper) {
        const int64_t r = at + upper * kStripRows / 2;
        const __m512 of_codes = _mm512_fmadd_ps(levels, _mm512_set1_ps(scales.unit[half][r]),
                                                _mm512_set1_ps(scales.base[half][r]));
        __m512& value = values[upper][half];
        value = _mm512_permutexvar_ps(upper ? _mm512_srli_epi32(code, 4) : code, of_codes);
        if (!kRests) continue;
        const __m512i own = upper ? _mm512_srli_epi32(rest, 4) : _mm512_and_si512(rest, four_bits);
        value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(own), _mm512_set1_ps(rest_steps[r]), value);
      }
    }
#pragma GCC unroll 2
    for (int upper = 0; upper < 2; ++upper)
      _mm512_storeu_si512(out[at + upper * kStripRows / 2],
                          (__m512i)_mm512_cvtne2ps_pbh(values[upper][1], values[upper][0]));
  }
}

template <class Brick>
inline void expand_brick(const Bricks& w, int64_t strip, int64_t block, Bf16Brick& out) {
  const auto& brick = w.brick<Brick>(strip, block);
  BrickScales scales(brick, w.steps + strip * kStripRows);
  RowCodes codes, rests;
  codes_by_row(brick.codes, codes);
  if (!w.has_rests()) return round_rows<false>(codes, scales, codes, nullptr, out);
  const float* const rest_steps = w.rest_steps + strip * kStripRows;
  scales.centre_rests(rest_steps);
  rests_by_row(w, strip, block, rests);
  round_rows<true>(codes, scales, rests, rest_steps, out);
}

/// Blocks [first, first + count) of a strip, outliers included.
inline void expand(const Bricks& w, int64_t strip, int64_t first, int64_t count, Bf16Brick* out) {
  for (int64_t k = 0; k < count; ++k) {
    const auto expand_one =
        w.kind == BrickKind::lines ? expand_brick<LineBrick> : expand_brick<CentredBrick>;
    expand_one(w, strip, first + k, out[k]);
  }
  for (int64_t i = 0; i < kStripOutliers; ++i) {
    const StripOutlier& outlier = w.outliers[strip * kStripOutliers + i];
    const int64_t block = outlier.input / kBlockInputs - first;
    if (outlier.value == 0 || block < 0 || block >= count) continue;
    float weight;  // of the whole, to round once
    dequantize_bricks(w, outlier.row, outlier.input, 1, &weight);
    out[block][outlier.row % kStripRows][outlier.input % kBlockInputs] = f32_to_bf16(weight);
  }
}

}  // namespace
}  // namespace tda

#endif
