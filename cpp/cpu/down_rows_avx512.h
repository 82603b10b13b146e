// Batches of down rows with AVX-512 and VNNI.
#pragma once

#include "cpu/down_rows_ahead.h"

namespace tda {
namespace {

/// The multipliers h * scale of a batch's rows for kBlockScales scales, quantised to kBytes bytes
/// relative to the batch's largest |h * row's step|. VPDPBUSD multiplies bytes, so each byte is
/// kept apart, the highest first, those of four rows in one int32.
template <int kOffset, int kBytes, int kRows>
class QuantizedMultipliers {
 public:
  static constexpr int kBlockScales = 32;

  /// parts: h * row's step relative to the largest, in 1/32768. scales: of each row; those from
  /// `first` on are used, `left` of them are there.
  void quantize(const std::int8_t* const* scales, int64_t first, const std::int16_t* parts,
                int64_t rows, int64_t left) {
    const auto some = static_cast<__mmask32>(left >= kBlockScales ? ~0u : (1u << left) - 1);
    __m512i sums[kBytes][2] = {};
    for (int64_t q = 0; 4 * q < rows; ++q) {
      __m512i products[4];  // 16 bits each
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m512i scale =
            _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(some, scales[4 * q + i] + first));
        products[i] = _mm512_mulhrs_epi16(kBytes == 1 ? scale : _mm512_slli_epi16(scale, 8),
                                          _mm512_set1_epi16(parts[4 * q + i]));
      }
#pragma GCC unroll 2
      for (int byte = 0; byte < kBytes; ++byte) {
        const bool is_high = kBytes == 2 && byte == 0;
        const __m512i a = join(products[0], products[1], is_high);
        const __m512i b = join(products[2], products[3], is_high);
        const __m512i fours[2] = {_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b)};
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          _mm512_store_si512(quads_[byte][q][i], fours[i]);
          sums[byte][i] = _mm512_dpbusd_epi32(sums[byte][i], _mm512_set1_epi8(1), fours[i]);
        }
      }
    }
    for (int byte = 0; byte < kBytes; ++byte)
      for (int i = 0; i < 2; ++i)
        _mm512_store_si512(start_[byte][i],
                           _mm512_mullo_epi32(sums[byte][i], _mm512_set1_epi32(-kOffset)));
  }

  // For the interleaved rows of two groups, whose first scale is `at`: to each lane that of its values.
  __m512i of_quad(int64_t q, int byte, int64_t at) const { return lanes(quads_[byte][q], at); }
  /// Where accumulators start: -kOffset * the sum of the rows' multipliers.
  __m512i start(int byte, int64_t at) const { return lanes(start_[byte], at); }

 private:
  /// Integers of all scales: four, the four after the next four, and so on, as unpacking leaves them.
  using Scales = int32_t[2][kBlockScales / 2];
  alignas(64) Scales quads_[kBytes][kRows / 4];
  alignas(64) Scales start_[kBytes];

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

/// Addresses and multipliers of a batch's rows, for one block of scales after the other.
template <bool kExact, class Row, int kRows>
struct DownBatch {
  static constexpr int kScales = Row::kScales;
  // With codes of 8 bits, multipliers of one byte would dominate the error.
  static constexpr int kBytes = kExact ? 2 : 1;
  using Multipliers = QuantizedMultipliers<kExact ? Row::kOffset : 8, kBytes, kRows>;
  static constexpr int64_t kGroups = Multipliers::kBlockScales / kScales;  // of a block

  int64_t count, groups;
  const std::uint8_t* planes[2][kRows];
  const std::int8_t* scales[kRows];
  float steps[kRows];

  DownBatch(const Rows& w, const Batch& batch) : count(batch.count), groups(groups_of(w.n)) {
    for (int64_t r = 0; r < kRows; ++r) {
      const Row row(w, batch.id(r));
      for (int i = 0; i < 2; ++i) planes[i][r] = row.plane(i);
      scales[r] = row.scales.scales;
      steps[r] = row.scales.step();
    }
  }
  /// The rows' multipliers h * step, relative to the largest. Returns the value of a step of sums.
  float relative(const float* h, std::int16_t* out) const {
    alignas(64) float parts[kLargeDownBatch] = {};
    for (int64_t r = 0; r < count; ++r) parts[r] = h[r] * steps[r];
    return to_relative(parts, kExact ? 1.0f / 256 : 16, out);
  }
  void quantize(int64_t g0, const std::int16_t* relative, Multipliers& out) const {
    out.quantize(scales, g0 * kScales, relative, count, (groups - g0) * kScales);
  }
  /// Calls body(first group, how many: 1 or 2) for a block's lines.
  template <class Body>
  [[gnu::always_inline]] void for_lines(int64_t g0, bool in_order, const Body& body) const {
    for (int64_t line = 0; line < kGroups / 2; ++line) {
      const int64_t block = line / kBlockLines * kBlockLines;
      const int64_t g = g0 + 2 * (block + line_in_block(line % kBlockLines, in_order));
      if (g < groups) body(g, min(groups - g, 2));
    }
  }
  /// The codes of two groups of rows 4 q ... 4 q + 3, interleaved: of lower nibbles, and of upper.
  template <class Ahead>
  [[gnu::always_inline]] void unpack(int64_t q, int64_t g, int64_t left, Ahead& ahead,
                                     __m512i (&lower)[4], __m512i (&upper)[4]) const {
    const __mmask64 some = left == 2 ? ~0ull : 0xffffffffull;
    const int64_t bytes = g * kGroupBytes;
    __m512i loaded[4], nibbles[2][4];
#pragma GCC unroll 2
    for (int plane = 0; plane < (kExact ? 2 : 1); ++plane) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        loaded[i] = _mm512_maskz_loadu_epi8(some, planes[plane][4 * q + i] + bytes);
        ahead.prefetch(plane, 4 * q + i, bytes);
      }
      interleave(loaded, nibbles[plane]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i high = nibbles[0][i], low = nibbles[1][i];
      lower[i] = kExact ? merge(_mm512_slli_epi16(high, 4), low) : lower_nibbles(high);
      upper[i] = kExact ? merge(high, _mm512_srli_epi16(low, 4)) : upper_nibbles(high);
    }
  }
};

/// Sums of two groups' products, by byte of the multipliers, of codes in lower and in upper nibbles.
template <int kBytes>
struct DownSums {
  __m512i lowers[kBytes][4], uppers[kBytes][4];

  /// at: the first group's scale in the multipliers
  template <class Multipliers>
  [[gnu::always_inline]] DownSums(const Multipliers& multipliers, int64_t at) {
#pragma GCC unroll 2
    for (int byte = 0; byte < kBytes; ++byte) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) lowers[byte][i] = uppers[byte][i] = multipliers.start(byte, at);
    }
  }
  template <class Multipliers>
  [[gnu::always_inline]] void add(const Multipliers& multipliers, int64_t q, int64_t at,
                                  const __m512i (&lower)[4], const __m512i (&upper)[4]) {
#pragma GCC unroll 2
    for (int byte = 0; byte < kBytes; ++byte) {
      const __m512i multiplier = multipliers.of_quad(q, byte, at);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        lowers[byte][i] = _mm512_dpbusd_epi32(lowers[byte][i], lower[i], multiplier);
        uppers[byte][i] = _mm512_dpbusd_epi32(uppers[byte][i], upper[i], multiplier);
      }
    }
  }
  /// y += step * the sums. groups: 1 or 2
  [[gnu::always_inline]] void finish(float step, int64_t groups, float* y) {
    if (kBytes == 2)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        lowers[0][i] = _mm512_add_epi32(_mm512_slli_epi32(lowers[0][i], 8), lowers[kBytes - 1][i]);
        uppers[0][i] = _mm512_add_epi32(_mm512_slli_epi32(uppers[0][i], 8), uppers[kBytes - 1][i]);
      }
    // A 128-bit lane: 16 values of a scale in the lower nibbles and the next 16 in the upper.
    const auto &l = lowers[0], &u = uppers[0];
    add_lanes(l[0], l[1], l[2], l[3], step, 2 * groups, y);
    add_lanes(u[0], u[1], u[2], u[3], step, 2 * groups, y + 16);
  }
};

/// y += sum over a batch of h[i] row[i], or, if not kExact, of the rows' high planes. y: whole
/// groups. Works on two groups at a time: bytes of four rows are interleaved while each still holds
/// two nibbles.
template <bool kExact, class Row, int kRows, class Ahead>
inline void add_down_batch(const Rows& w, const Batch& batch, Ahead ahead, const float* h,
                           float* y) {
  using Down = DownBatch<kExact, Row, kRows>;
  constexpr int kScales = Row::kScales;
  const Down down(w, batch);
  alignas(32) std::int16_t relative[kLargeDownBatch];
  const float step = down.relative(h, relative);
  typename Down::Multipliers multipliers;
  for (int64_t g0 = 0; g0 < down.groups; g0 += Down::kGroups) {
    down.quantize(g0, relative, multipliers);
    for (int64_t r = 0; r < kRows; ++r) ahead.prefetch_scales(r, g0 * kScales);
    down.for_lines(g0, Ahead::kInOrder,
                   [&](int64_t g, int64_t left) __attribute__((always_inline)) {
                     const int64_t at = (g - g0) * kScales;
                     DownSums<Down::kBytes> sums(multipliers, at);
                     for (int64_t q = 0; 4 * q < down.count; ++q) {
                       __m512i lower[4], upper[4];
                       down.unpack(q, g, left, ahead, lower, upper);
                       sums.add(multipliers, q, at, lower, upper);
                     }
                     sums.finish(step, left, y + g * kGroup);
                   });
  }
}

/// The same for several sequences, which share the rows' unpacked codes. Each gets the same integers
/// as alone.
template <class Row, int kRows, class Ahead>
inline void add_down_batch_each(const Rows& w, const Batch& batch, Ahead ahead,
                                const float* const* h, const Vectors& vectors) {
  using Down = DownBatch<true, Row, kRows>;
  constexpr int kScales = Row::kScales, kQuads = kRows / 4;
  const Down down(w, batch);
  alignas(32) std::int16_t relative[Vectors::kMost][kLargeDownBatch];
  float steps[Vectors::kMost];
  typename Down::Multipliers multipliers[Vectors::kMost];
  for (int64_t v = 0; v < vectors.count; ++v) steps[v] = down.relative(h[v], relative[v]);
  const int64_t share = 2 * kRows / vectors.count + 1;  // of the prefetches
  for (int64_t g0 = 0; g0 < down.groups; g0 += Down::kGroups) {
    for (int64_t v = 0; v < vectors.count; ++v) down.quantize(g0, relative[v], multipliers[v]);
    for (int64_t r = 0; r < kRows; ++r) ahead.prefetch_scales(r, g0 * kScales);
    down.for_lines(g0, Ahead::kInOrder, [&](int64_t g, int64_t left) {
      const int64_t at = (g - g0) * kScales;
      __m512i lower[kQuads][4], upper[kQuads][4];
      NothingAhead nothing;
      for (int64_t q = 0; 4 * q < down.count; ++q)
        down.unpack(q, g, left, nothing, lower[q], upper[q]);
      int64_t line = 0;
      for (int64_t v = 0; v < vectors.count; ++v) {
        for (const int64_t end = min(2 * kRows, line + share); line < end; ++line)
          ahead.prefetch(line % 2, line / 2, g * kGroupBytes);
        DownSums<Down::kBytes> sums(multipliers[v], at);
        for (int64_t q = 0; 4 * q < down.count; ++q)
          sums.add(multipliers[v], q, at, lower[q], upper[q]);
        sums.finish(steps[v], left, vectors.y[v] + g * kGroup);
      }
    });
  }
}

}  // namespace
}  // namespace tda
