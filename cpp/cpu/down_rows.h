// The down projection in decode for integer formats: y += h[i] row[i] over batches of rows.
#pragma once

#include "cpu/batch.h"

namespace tda {
namespace {

/// Prefetches scattered rows while a batch of down rows is processed; near the end of a list these
/// are rows of two matrices, the next gate and up.
template <class Row, int kRows>
struct DownRowsAhead : RowsAhead<Row, kRows> {
  RowsAhead<Row, kRows> others;
  bool two;

  DownRowsAhead(const Rows& w, const Batch& batch)
      : two(batch.is_last() && batch.next.b != nullptr) {
    for (int64_t r = 0; r < kRows; ++r) {
      this->rows[r] = batch.ahead<Row>(w, batch.next.a, r);
      if (two) others.rows[r] = batch.ahead<Row>(w, batch.next.b, r);
    }
  }
  void prefetch(int plane, int64_t row, int64_t byte) {
    RowsAhead<Row, kRows>::prefetch(plane, row, byte);
    if (two) others.prefetch(plane, row, byte);
  }
};

/// The same for contiguous rows: line by line through all of them, twice, then through the streams
/// of what is read next.
template <class Row>
struct DownStreamsAhead {
  static constexpr bool kInOrder = true;

  DownStreamsAhead(const Rows& w, const Batch& batch) {
    const Row row(w, batch.ids[0]);
    const int64_t high = row.plane(1) - row.plane(0);
    const Streams own = {{row.plane(0), row.plane(0)}, {w.stride, w.stride}};
    const NextNeurons& next = batch.next;
    ReadPath path = {own, batch.left, next_streams(next.otherwise, own, high, w.stride - high)};
    if (next.count > 0) {
      const Row gate(*next.a, next.ids[0]);
      path.next = {{gate.plane(0), gate.plane(1)}, {high, w.stride - high}};
    }
    const int64_t distance = 2 * neurons_ahead(w.stride);
    far = lines(path, distance);
    near = lines(path, distance / 2);
  }
  void prefetch(int plane, int64_t, int64_t) {
    prefetch_nta(far.take(plane));
    prefetch_l1(near.take(plane));
  }
  void prefetch_scales(int64_t, int64_t) { prefetch(0, 0, 0); }

 private:
  struct Lines {
    const std::uint8_t* of[2];
    int second;  // the index in `of` of plane 1's stream

    const std::uint8_t* take(int plane) {
      const std::uint8_t*& line = of[plane == 0 ? 0 : second];
      line += kLineBytes;
      return line - kLineBytes;
    }
  };
  Lines far, near;

  static Lines lines(const ReadPath& path, int64_t row) {
    const Streams at = path.at(row);
    return {{at.of[0], at.of[1]}, row < path.left ? 0 : 1};
  }
};

#if defined(__AVX512VNNI__)

/// The multipliers h * scale of a batch's rows for kBlockScales scales, quantised to kBytes bytes
/// relative to the batch's largest |h * row's step|. VPDPBUSD multiplies bytes, so each byte is
/// kept apart, the highest first, those of four rows in one int32.
template <int kOffset, int kBytes, int kRows>
struct QuantizedMultipliers {
  static constexpr int kQuads = kRows / 4, kBlockScales = 32;
  alignas(64) int32_t quads[kBytes][kQuads][kBlockScales];
  /// Where accumulators start: -kOffset * the sum of the rows' multipliers.
  alignas(64) int32_t start[kBytes][kBlockScales];

  /// parts: h * row's step relative to the largest, in 1/32768. scales: of each row, from the first
  /// of these on; `left` of them are there.
  void quantize(const std::int8_t* const* scales, const std::int16_t* parts, int64_t rows,
                int64_t left) {
    const auto some = static_cast<__mmask32>(left >= kBlockScales ? ~0u : (1u << left) - 1);
    __m512i sums[kBytes] = {};  // 16 bits each
    for (int64_t q = 0; 4 * q < rows; ++q) {
      __m256i bytes[kBytes][4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m512i part = _mm512_set1_epi16(parts[4 * q + i]);
        const __m512i words =
            _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(some, scales[4 * q + i]));
        if (kBytes == 1) {
          const __m512i product = _mm512_mulhrs_epi16(words, part);
          sums[0] = _mm512_add_epi16(sums[0], product);
          bytes[0][i] = _mm512_cvtepi16_epi8(product);
        } else {
          const __m512i fine = _mm512_mulhrs_epi16(_mm512_slli_epi16(words, 8), part);
          const __m512i high = _mm512_srai_epi16(_mm512_add_epi16(fine, _mm512_set1_epi16(128)), 8);
          const __m512i low = _mm512_sub_epi16(fine, _mm512_slli_epi16(high, 8));
          sums[0] = _mm512_add_epi16(sums[0], high);
          sums[kBytes - 1] = _mm512_add_epi16(sums[kBytes - 1], low);
          bytes[0][i] = _mm512_cvtepi16_epi8(high);
          bytes[kBytes - 1][i] = _mm512_cvtepi16_epi8(low);
        }
      }
      for (int byte = 0; byte < kBytes; ++byte) interleave(bytes[byte], quads[byte][q]);
    }
    for (int byte = 0; byte < kBytes; ++byte)
      for (int i = 0; i < 2; ++i) {
        const __m256i half =
            i == 0 ? _mm512_castsi512_si256(sums[byte]) : _mm512_extracti64x4_epi64(sums[byte], 1);
        _mm512_store_si512(start[byte] + 16 * i, _mm512_mullo_epi32(_mm512_cvtepi16_epi32(half),
                                                                    _mm512_set1_epi32(-kOffset)));
      }
  }

 private:
  /// out[i] = byte i of each of the four vectors.
  static void interleave(const __m256i (&bytes)[4], int32_t* out) {
    const __m256i a = _mm256_unpacklo_epi8(bytes[0], bytes[1]);
    const __m256i b = _mm256_unpackhi_epi8(bytes[0], bytes[1]);
    const __m256i c = _mm256_unpacklo_epi8(bytes[2], bytes[3]);
    const __m256i d = _mm256_unpackhi_epi8(bytes[2], bytes[3]);
    const __m256i fours[4] = {_mm256_unpacklo_epi16(a, c), _mm256_unpackhi_epi16(a, c),
                              _mm256_unpacklo_epi16(b, d), _mm256_unpackhi_epi16(b, d)};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      _mm_store_si128((__m128i*)(out + 4 * i), _mm256_castsi256_si128(fours[i]));
      _mm_store_si128((__m128i*)(out + 16 + 4 * i), _mm256_extracti128_si256(fours[i], 1));
    }
  }
};

/// p: two groups' integers, one per scale. Each lane of vector i of the interleaved rows gets that
/// of its own values.
template <int kScales>
inline __m512i lanes_of_scales(const int32_t* p, int i) {
  const __m512i lanes = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  if constexpr (kScales == 2)
    return _mm512_permutexvar_epi32(lanes,
                                    _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)p)));
  const __m512i index = _mm512_add_epi32(_mm512_add_epi32(lanes, lanes), _mm512_set1_epi32(i / 2));
  return _mm512_permutexvar_epi32(index,
                                  _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p)));
}

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

/// Starts the sums of two groups' products: by byte of the multipliers, of codes in lower and in
/// upper nibbles. at: the first group's scale in the multipliers
template <int kScales, int kBytes, class Multipliers>
[[gnu::always_inline]] inline void start_sums(const Multipliers& multipliers, int64_t at,
                                              __m512i (&lowers)[kBytes][4],
                                              __m512i (&uppers)[kBytes][4]) {
#pragma GCC unroll 2
  for (int byte = 0; byte < kBytes; ++byte) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      lowers[byte][i] = uppers[byte][i] = lanes_of_scales<kScales>(multipliers.start[byte] + at, i);
  }
}

/// Joins the sums by the multipliers' high and low bytes into those of the first.
template <int kBytes>
[[gnu::always_inline]] inline void join_bytes(__m512i (&lowers)[kBytes][4],
                                              __m512i (&uppers)[kBytes][4]) {
  if (kBytes == 1) return;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    lowers[0][i] = _mm512_add_epi32(_mm512_slli_epi32(lowers[0][i], 8), lowers[kBytes - 1][i]);
    uppers[0][i] = _mm512_add_epi32(_mm512_slli_epi32(uppers[0][i], 8), uppers[kBytes - 1][i]);
  }
}

/// y += step * the sums of lower nibbles, l, and of upper ones, u. groups: 1 or 2
template <int kScales>
[[gnu::always_inline]] inline void add_sums(const __m512i (&l)[4], const __m512i (&u)[4],
                                            float step, int64_t groups, float* y) {
  // A 128-bit lane: of 2 scales, 16 values in the lower nibbles and the next 16 in the upper; of 4,
  // 8 values of each of two scales.
  if (kScales == 2) {
    add_lanes(l[0], l[1], l[2], l[3], step, 2 * groups, y);
    add_lanes(u[0], u[1], u[2], u[3], step, 2 * groups, y + 16);
  } else {
    add_lanes(l[0], l[1], u[0], u[1], step, 2 * groups, y);
    add_lanes(l[2], l[3], u[2], u[3], step, 2 * groups, y + 16);
  }
}

/// y += sum over a batch of h[i] row[i], or, if not kExact, of the rows' high planes. y: whole
/// groups. Works on two groups at a time: bytes of four rows are interleaved while each still holds
/// two nibbles.
template <bool kExact, class Row, int kRows, class Ahead>
inline void add_down_batch(const Rows& w, const Batch& batch, Ahead ahead, const float* h,
                           float* y) {
  constexpr int kScales = Row::kScales;
  constexpr float kUnit = kExact ? 1 : 16;  // the value of one code step
  // With codes of 8 bits, multipliers of one byte would dominate the error.
  constexpr int kBytes = kExact ? 2 : 1;
  using QuantizedMultipliers = QuantizedMultipliers<kExact ? Row::kOffset : 8, kBytes, kRows>;
  constexpr int64_t kGroups = QuantizedMultipliers::kBlockScales / kScales;
  const int64_t count = batch.count, groups = groups_of(w.n);
  const std::uint8_t* planes[2][kRows];
  const std::int8_t* scales[kRows];
  alignas(64) float parts[kLargeDownBatch] = {};
  for (int64_t r = 0; r < kRows; ++r) {
    const Row row(w, batch.id(r));
    for (int i = 0; i < 2; ++i) planes[i][r] = row.plane(i);
    scales[r] = row.scales.scales;
    if (r < count) parts[r] = h[r] * row.scales.step();
  }
  alignas(32) std::int16_t relative[kLargeDownBatch];
  const float step = to_relative(parts, kBytes == 2 ? 1.0f / 256 : kUnit, relative);
  QuantizedMultipliers multipliers;
  for (int64_t g0 = 0; g0 < groups; g0 += kGroups) {
    multipliers.quantize(scales, relative, count, (groups - g0) * kScales);
    for (int64_t r = 0; r < kRows; ++r) {
      ahead.prefetch_scales(r, g0 * kScales);
      scales[r] += QuantizedMultipliers::kBlockScales;
    }
    for (int64_t line = 0; line < kGroups / 2; ++line) {
      const int64_t block = line / kBlockLines * kBlockLines;
      const int64_t g = g0 + 2 * (block + line_in_block(line % kBlockLines, Ahead::kInOrder));
      if (g >= groups) continue;
      const int64_t at = (g - g0) * kScales, bytes = g * kGroupBytes, left = min(groups - g, 2);
      const __mmask64 some = left == 2 ? ~0ull : 0xffffffffull;
      __m512i lowers[kBytes][4], uppers[kBytes][4];
      start_sums<kScales>(multipliers, at, lowers, uppers);
      for (int64_t q = 0; 4 * q < count; ++q) {
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
          const __m512i a = kExact ? merge(_mm512_slli_epi16(high, 4), low) : lower_nibbles(high);
          const __m512i b = kExact ? merge(high, _mm512_srli_epi16(low, 4)) : upper_nibbles(high);
#pragma GCC unroll 2
          for (int byte = 0; byte < kBytes; ++byte) {
            const __m512i multiplier = lanes_of_scales<kScales>(multipliers.quads[byte][q] + at, i);
            lowers[byte][i] = _mm512_dpbusd_epi32(lowers[byte][i], a, multiplier);
            uppers[byte][i] = _mm512_dpbusd_epi32(uppers[byte][i], b, multiplier);
          }
        }
      }
      join_bytes(lowers, uppers);
      add_sums<kScales>(lowers[0], uppers[0], step, left, y + g * kGroup);
    }
  }
}

#else

/// y += sum over a batch of h[i] row[i], or, if not kExact, of the rows' high planes. y: whole
/// groups
template <bool kExact, class Row, int kRows, class Ahead>
inline void add_down_batch(const Rows& w, const Batch& batch, Ahead ahead, const float* h,
                           float* y) {
  constexpr int kVectors = kGroup / kLanes, kScales = Row::kScales;
  static_assert(kLanes % kScales == 0);
  float multipliers[kRows][kLanes];
  Row rows[kRows];
  for (int64_t r = 0; r < batch.count; ++r) rows[r] = Row(w, batch.id(r));
  for (int64_t g = 0; g < groups_of(w.n); ++g, y += kGroup) {
    const int64_t at = g * kScales % kLanes;
    if (at == 0)
      for (int64_t r = 0; r < batch.count; ++r) {
        store(multipliers[r], h[r] * rows[r].scales.step() * rows[r].scales.from(g * kScales));
        ahead.prefetch_scales(r, g * kScales);
      }
    Floats sums[kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) sums[i] = load_as<Floats>(y + i * kLanes);
    for (int64_t r = 0; r < batch.count; ++r) {
      std::int8_t codes[kGroup];
      rows[r].template codes<kExact>(g, codes);
      if (g % 2 == 0)
#pragma GCC unroll 2
        for (int plane = 0; plane < (kExact ? 2 : 1); ++plane)
          ahead.prefetch(plane, r, g * kGroupBytes);
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; ++i)
        sums[i] = multiply_add(splat(multipliers[r][at + i * kScales / kVectors]),
                               signed_floats(codes + i * kLanes), sums[i]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) store(y + i * kLanes, sums[i]);
  }
}

/// The same for several sequences, which share the rows' values.
template <class Row, int kRows, class Ahead>
inline void add_down_batch_each(const Rows& w, const Batch& batch, Ahead ahead,
                                const float* const* h, const Vectors& vectors) {
  constexpr int kVectors = kGroup / kLanes, kScales = Row::kScales;
  float multipliers[Vectors::kMost][kRows][kLanes];
  Row rows[kRows];
  for (int64_t r = 0; r < batch.count; ++r) rows[r] = Row(w, batch.id(r));
  for (int64_t g = 0; g < groups_of(w.n); ++g) {
    const int64_t at = g * kScales % kLanes;
    alignas(64) float values[kRows][kGroup];
    for (int64_t r = 0; r < batch.count; ++r) {
      if (at == 0) {
        const Floats scales = rows[r].scales.from(g * kScales);
        for (int64_t v = 0; v < vectors.count; ++v)
          store(multipliers[v][r], h[v][r] * rows[r].scales.step() * scales);
        ahead.prefetch_scales(r, g * kScales);
      }
      std::int8_t codes[kGroup];
      rows[r].template codes<true>(g, codes);
      if (g % 2 == 0)
#pragma GCC unroll 2
        for (int plane = 0; plane < 2; ++plane) ahead.prefetch(plane, r, g * kGroupBytes);
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; ++i)
        store(values[r] + i * kLanes, signed_floats(codes + i * kLanes));
    }
    for (int64_t v = 0; v < vectors.count; ++v) {
      float* const y = vectors.y[v] + g * kGroup;
      Floats sums[kVectors];
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; ++i) sums[i] = load_as<Floats>(y + i * kLanes);
      for (int64_t r = 0; r < batch.count; ++r)
#pragma GCC unroll 16
        for (int i = 0; i < kVectors; ++i)
          sums[i] = multiply_add(splat(multipliers[v][r][at + i * kScales / kVectors]),
                                 load_as<Floats>(values[r] + i * kLanes), sums[i]);
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; ++i) store(y + i * kLanes, sums[i]);
    }
  }
}

#endif

#if defined(__AVX512VNNI__)
template <class Row, int kRows, class Ahead>
inline void add_down_batch_each(const Rows& w, const Batch& batch, Ahead ahead,
                                const float* const* h, const Vectors& vectors) {
  add_down_batch<true, Row, kRows>(w, batch, ahead, h[0], vectors.y[0]);
  for (int64_t v = 1; v < vectors.count; ++v)
    add_down_batch<true, Row, kRows>(w, batch, NothingAhead(), h[v], vectors.y[v]);
}
#endif

template <bool kExact, class Row, int kRows>
void add_down_batch(const Rows& w, const Batch& batch, const float* h, float* y) {
  // Only whole rows, both planes, are read without gaps.
  if (kExact && batch.is_stream_ahead())
    add_down_batch<kExact, Row, kRows>(w, batch, DownStreamsAhead<Row>(w, batch), h, y);
  else
    add_down_batch<kExact, Row, kRows>(w, batch, DownRowsAhead<Row, kRows>(w, batch), h, y);
}

}  // namespace
}  // namespace tda
