// Sums of int8 down rows with AVX2: VPMADDWD multiplies the codes of two rows, widened to 16 bits and
// side by side, and adds the products.
#pragma once

#include "cpu/int8_products_avx2.h"

namespace tda {
namespace {

/// The multipliers h * scale of a batch's rows for kBlockScales scales, in 16 bits relative to the
/// batch's largest |h * row's step|, those of two rows in one int32.
template <int kRows>
class QuantizedMultipliers {
 public:
  static constexpr int kBlockScales = 8;

  /// parts: h * row's step relative to the largest, in 1/32768. scales: of each row; those from
  /// `first` on are used, and those past the last are of no account.
  void quantize(const std::int8_t* const* scales, int64_t first, const std::int16_t* parts,
                int64_t rows, int64_t) {
    __m256i sums = _mm256_setzero_si256();
    for (int64_t q = 0; 2 * q < rows; ++q) {
      const __m128i a = products(scales[2 * q] + first, parts[2 * q]);
      const __m128i b = products(scales[2 * q + 1] + first, parts[2 * q + 1]);
      const __m256i pairs = _mm256_set_m128i(_mm_unpackhi_epi16(a, b), _mm_unpacklo_epi16(a, b));
      store_vector(pairs_[q], pairs);
      sums = _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    store_vector(start_, _mm256_mullo_epi32(sums, _mm256_set1_epi32(-Int8Row::kOffset)));
  }

  // For the group whose first scale is `at`: to each lane that of its values.
  __m256i of_pair(int64_t q, int64_t at) const { return lanes(pairs_[q], at); }
  /// Where accumulators start: -kOffset * the sum of the rows' multipliers.
  __m256i start(int64_t at) const { return lanes(start_, at); }

 private:
  // The 128-bit lanes: the first scales of four groups, their second.
  alignas(32) int32_t pairs_[kRows / 2][kBlockScales];
  alignas(32) int32_t start_[kBlockScales];

  static __m128i products(const std::int8_t* scales, std::int16_t part) {
    const __m128i by_group = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales));
    const __m128i first_ones =
        _mm_setr_epi8(-1, 0, -1, 2, -1, 4, -1, 6, -1, 1, -1, 3, -1, 5, -1, 7);
    return _mm_mulhrs_epi16(_mm_shuffle_epi8(by_group, first_ones), _mm_set1_epi16(part));
  }
  static void store_vector(int32_t* p, __m256i v) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(p), v);
  }
  static __m256i lanes(const int32_t (&scales)[kBlockScales], int64_t at) {
    const __m256i group = _mm256_set1_epi32(static_cast<int>(at / kInt8Scales));
    return (__m256i)_mm256_permutevar_ps(_mm256_load_ps((const float*)scales), group);
  }
};

/// Writes each part / the largest |part|, in 1/32768. Returns the value of one such step times
/// `unit`; NaN if a part is NaN, so that NaN reaches y.
[[gnu::always_inline]] inline float to_relative(const float (&parts)[kLargeDownBatch], float unit,
                                                std::int16_t* relative) {
  const Floats values[2] = {load_as<Floats>(parts), load_as<Floats>(parts + kLanes)};
  const Floats sizes = max(max(values[0], -values[0]), max(values[1], -values[1]));
  const Floats nan = (values[0] - values[0]) + (values[1] - values[1]);  // or 0, or infinite
  float most = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) most = most > sizes[lane] ? most : sizes[lane];
  const float inverse = most > 0 ? 32767.0f / most : 0;
  const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32((__m256)(values[0] * inverse)),
                                           _mm256_cvtps_epi32((__m256)(values[1] * inverse)));
  _mm256_store_si256((__m256i*)relative, _mm256_permute4x64_epi64(words, 0xd8));
  return most * (32768.0f / 32767.0f) * unit + sum(nan);
}

/// Groups that are summed at a time.
constexpr int64_t kDownGroups = 1;

/// The codes of two rows and a group, each value's side by side: of its scales' first 16 values, then
/// of their next, the even and then the odd ones.
struct RowCodes {
  static constexpr int kRows = 2;
  __m256i of[8];

  /// Of the rows from `first` on, in the order of `ahead`.
  template <class Ahead>
  [[gnu::always_inline]] void load(const std::uint8_t* const* rows, int64_t first, int64_t g,
                                   int64_t, int64_t groups, Ahead& ahead) {
    const std::uint8_t *const a = rows[first] + place(g), *const b = rows[first + 1] + place(g);
    ahead.prefetch(first, g * kGroup);
    ahead.prefetch(first + 1, g * kGroup);
    join(load_as<__m256i>(a), load_as<__m256i>(b), of);
    const int64_t half = int8_half(g, groups);
    join(load_as<__m256i>(a + half), load_as<__m256i>(b + half), of + 4);
  }

 private:
  static int64_t place(int64_t g) { return g / 2 * (2 * kGroup) + g % 2 * (kGroup / 2); }
  [[gnu::always_inline]] static void join(__m256i a, __m256i b, __m256i* out) {
    const __m256i low_byte = _mm256_set1_epi16(255);
    const __m256i evens[2] = {_mm256_and_si256(a, low_byte), _mm256_and_si256(b, low_byte)};
    const __m256i odds[2] = {_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8)};
    out[0] = _mm256_unpacklo_epi16(evens[0], evens[1]);
    out[1] = _mm256_unpackhi_epi16(evens[0], evens[1]);
    out[2] = _mm256_unpacklo_epi16(odds[0], odds[1]);
    out[3] = _mm256_unpackhi_epi16(odds[0], odds[1]);
  }
};

/// Sums of a group's products, as RowCodes lie.
struct DownSums {
  __m256i of[8];

  /// at: the group's first scale in the multipliers
  template <class Multipliers>
  [[gnu::always_inline]] DownSums(const Multipliers& multipliers, int64_t at) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) of[i] = multipliers.start(at);
  }
  template <class Multipliers>
  [[gnu::always_inline]] void add(const Multipliers& multipliers, int64_t q, int64_t at,
                                  const RowCodes& codes) {
    const __m256i multiplier = multipliers.of_pair(q, at);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
      of[i] = _mm256_add_epi32(of[i], _mm256_madd_epi16(codes.of[i], multiplier));
  }
  /// y += step * the sums.
  [[gnu::always_inline]] void finish(float step, int64_t, float* y) const {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // eight values of each scale
      const int evens = i / 2 * 4 + i % 2;
      const __m256i a = _mm256_unpacklo_epi32(of[evens], of[evens + 2]);
      const __m256i b = _mm256_unpackhi_epi32(of[evens], of[evens + 2]);
      add(_mm256_permute2x128_si256(a, b, 0x20), step, y + 8 * i);
      add(_mm256_permute2x128_si256(a, b, 0x31), step, y + kPart + 8 * i);
    }
  }

 private:
  [[gnu::always_inline]] static void add(__m256i sums, float step, float* y) {
    store(y, multiply_add(splat(step), to_floats((Ints)sums), load_as<Floats>(y)));
  }
};

}  // namespace
}  // namespace tda
