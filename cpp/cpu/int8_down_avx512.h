// Sums of int8 down rows with AVX-512 and VNNI.
#pragma once

#include "cpu/int8_products_avx512.h"

namespace tda {
namespace {

/// The multipliers h * scale of a batch's rows for kBlockScales scales, quantised to two bytes
/// relative to the batch's largest |h * row's step|: with codes of 8 bits, one byte would dominate
/// the error. VPDPBUSD multiplies bytes, so each byte is kept apart, the highest first, those of four
/// rows in one int32.
template <int kRows>
class QuantizedMultipliers {
 public:
  static constexpr int kBlockScales = 32;

  /// parts: h * row's step relative to the largest, in 1/32768. scales: of each row; those from
  /// `first` on are used, `left` of them are there.
  void quantize(const std::int8_t* const* scales, int64_t first, const std::int16_t* parts,
                int64_t rows, int64_t left) {
    const auto some = static_cast<__mmask32>(left >= kBlockScales ? ~0u : (1u << left) - 1);
    __m512i sums[2][2] = {};
    for (int64_t q = 0; 4 * q < rows; ++q) {
      __m512i products[4];  // 16 bits each
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m512i scale =
            _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(some, scales[4 * q + i] + first));
        products[i] =
            _mm512_mulhrs_epi16(_mm512_slli_epi16(scale, 8), _mm512_set1_epi16(parts[4 * q + i]));
      }
#pragma GCC unroll 2
      for (int byte = 0; byte < 2; ++byte) {
        const __m512i a = join(products[0], products[1], byte == 0);
        const __m512i b = join(products[2], products[3], byte == 0);
        const __m512i fours[2] = {_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b)};
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          _mm512_store_si512(quads_[byte][q][i], fours[i]);
          sums[byte][i] = _mm512_dpbusd_epi32(sums[byte][i], _mm512_set1_epi8(1), fours[i]);
        }
      }
    }
    for (int byte = 0; byte < 2; ++byte)
      for (int i = 0; i < 2; ++i)
        _mm512_store_si512(start_[byte][i],
                           _mm512_mullo_epi32(sums[byte][i], _mm512_set1_epi32(-Int8Row::kOffset)));
  }

  // For the lines of two groups, whose first scale is `at`: to each lane that of its values.
  __m512i of_quad(int64_t q, int byte, int64_t at) const { return lanes(quads_[byte][q], at); }
  /// Where accumulators start: -kOffset * the sum of the rows' multipliers.
  __m512i start(int byte, int64_t at) const { return lanes(start_[byte], at); }

 private:
  /// Integers of all scales: four, the four after the next four, and so on, as unpacking leaves them.
  using Scales = int32_t[2][kBlockScales / 2];
  alignas(64) Scales quads_[2][kRows / 4];
  alignas(64) Scales start_[2];

  /// The low bytes of two rows' products side by side, or their high bytes, to which the products are
  /// rounded.
  static __m512i join(__m512i even, __m512i odd, bool is_high) {
    if (!is_high) return merge_bytes(_mm512_slli_epi16(odd, 8), even);
    const __m512i half = _mm512_set1_epi16(128);
    return merge_bytes(_mm512_add_epi16(odd, half),
                       _mm512_srli_epi16(_mm512_add_epi16(even, half), 8));
  }
  /// The upper bytes of one and the lower bytes of the other.
  static __m512i merge_bytes(__m512i upper, __m512i lower) {
    const __m512i mask = _mm512_set1_epi16(static_cast<short>(0xff00));
    return _mm512_ternarylogic_epi64(upper, mask, lower, 0xe2);
  }
  static __m512i lanes(const Scales& scales, int64_t at) {
    const __m512i lanes = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    const auto* const four = reinterpret_cast<const __m128i*>(scales[at / 4 % 2] + at / 8 * 4);
    return _mm512_permutexvar_epi32(lanes, _mm512_castsi128_si512(_mm_load_si128(four)));
  }
};

/// y[32 i] ... y[32 i + 15] += step * the four vectors' 128-bit lanes i, i < lanes.
inline void add_lanes(__m512i s0, __m512i s1, __m512i s2, __m512i s3, float step, int64_t lanes,
                      float* y) {
  const __m512i ab = _mm512_shuffle_i32x4(s0, s1, 0x88);
  const __m512i AB = _mm512_shuffle_i32x4(s0, s1, 0xdd);
  const __m512i cd = _mm512_shuffle_i32x4(s2, s3, 0x88);
  const __m512i CD = _mm512_shuffle_i32x4(s2, s3, 0xdd);
  const __m512i ordered[4] = {
      _mm512_shuffle_i32x4(ab, cd, 0x88), _mm512_shuffle_i32x4(AB, CD, 0x88),
      _mm512_shuffle_i32x4(ab, cd, 0xdd), _mm512_shuffle_i32x4(AB, CD, 0xdd)};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i, y += 32)
    if (i < lanes)
      store(y, multiply_add(splat(step), to_floats((Ints)ordered[i]), load_as<Floats>(y)));
}

// The pieces of add_down_batch. Inlined always, so that sums stay in registers.

/// Writes each part / the largest |part|, in 1/32768. Returns the value of one such step times
/// `unit`; NaN if a part is NaN, so that NaN reaches y.
[[gnu::always_inline]] inline float to_relative(const float (&parts)[kLargeDownBatch], float unit,
                                                std::int16_t* relative) {
  const __m512 values = _mm512_load_ps(parts);
  float most = _mm512_reduce_max_ps(_mm512_abs_ps(values));
  if (_mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q)) most = __builtin_nanf("");
  const float step = most * (32768.0f / 32767.0f) * unit;
  const __m512i words =
      _mm512_cvtps_epi32(_mm512_mul_ps(values, _mm512_set1_ps(most > 0 ? 32767.0f / most : 0)));
  _mm256_store_si256((__m256i*)relative, _mm512_cvtepi32_epi16(words));
  return step;
}

/// Groups that are summed at a time.
constexpr int64_t kDownGroups = 2;

/// The codes of four rows and kDownGroups groups.
struct RowCodes {
  static constexpr int kRows = 4;
  __m512i of[2][4];  // the groups' first lines interleaved, and their second

  /// Of the rows from `first` on, in the order of `ahead`, from group g of `groups` on.
  template <class Ahead>
  [[gnu::always_inline]] void load(const std::uint8_t* const* rows, int64_t first, int64_t g,
                                   int64_t left, int64_t, Ahead& ahead) {
    const int64_t at = g * kGroup, half = left == 2 ? kGroup : kGroup / 2;
    __m512i lines[2][4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Lines both(rows[first + i] + at, half);
      ahead.prefetch(first + i, at);
      if (left == 2) ahead.prefetch(first + i, at + kLineBytes);
      lines[0][i] = both.of[0];
      lines[1][i] = both.of[1];
    }
    interleave(lines[0], of[0]);
    interleave(lines[1], of[1]);
  }
};

/// Sums of two groups' products, by byte of the multipliers, then as codes of four rows lie.
struct DownSums {
  __m512i of[2][2][4];

  /// at: the first group's scale in the multipliers
  template <class Multipliers>
  [[gnu::always_inline]] DownSums(const Multipliers& multipliers, int64_t at) {
#pragma GCC unroll 2
    for (int byte = 0; byte < 2; ++byte)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) of[byte][0][i] = of[byte][1][i] = multipliers.start(byte, at);
  }
  template <class Multipliers>
  [[gnu::always_inline]] void add(const Multipliers& multipliers, int64_t q, int64_t at,
                                  const RowCodes& codes) {
#pragma GCC unroll 2
    for (int byte = 0; byte < 2; ++byte) {
      const __m512i multiplier = multipliers.of_quad(q, byte, at);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        of[byte][0][i] = _mm512_dpbusd_epi32(of[byte][0][i], codes.of[0][i], multiplier);
        of[byte][1][i] = _mm512_dpbusd_epi32(of[byte][1][i], codes.of[1][i], multiplier);
      }
    }
  }
  /// y += step * the sums. groups: 1 or 2
  [[gnu::always_inline]] void finish(float step, int64_t groups, float* y) {
#pragma GCC unroll 2
    for (int line = 0; line < 2; ++line) {
      __m512i all[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        all[i] = _mm512_add_epi32(_mm512_slli_epi32(of[0][line][i], 8), of[1][line][i]);
      // A 128-bit lane: the first 16 values of a scale, or the next 16.
      add_lanes(all[0], all[1], all[2], all[3], step, 2 * groups, y + 16 * line);
    }
  }
};

}  // namespace
}  // namespace tda
