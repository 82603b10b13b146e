// The last stage of decode for integer formats: a batch's down rows, each times its h, added up in
// y. Included by kernel sources only, like simd.h.
#pragma once

#include "cpu/batch.h"

namespace tda {
namespace {

/// What to ask for while a batch's down rows are at work; at a list's end rows of two matrices.
template <class Row, int kRows>
struct DownRowsAhead : RowsAhead<Row, kRows> {
  RowsAhead<Row, kRows> others;
  bool two;

  DownRowsAhead(const Rows& w, const Batch& batch)
      : two(batch.is_last() && batch.follow.b != nullptr) {
    for (int64_t r = 0; r < kRows; ++r) {
      this->rows[r] = batch.ahead<Row>(w, batch.follow.a, r);
      if (two) others.rows[r] = batch.ahead<Row>(w, batch.follow.b, r);
    }
  }
  void prefetch(int plane, int64_t row, int64_t byte) {
    RowsAhead<Row, kRows>::prefetch(plane, row, byte);
    if (two) others.prefetch(plane, row, byte);
  }
};

/// The same for rows that follow each other: line by line through all of them, and again; then
/// through the streams of what follows the list.
template <class Row>
struct DownStreamsAhead {
  static constexpr bool kInOrder = true;

  DownStreamsAhead(const Rows& w, const Batch& batch) {
    const Row row(w, batch.ids[0]);
    const int64_t high = Row::kPlanes ? row.plane(1) - row.plane(0) : w.stride;
    const Streams own = {{row.plane(0), row.plane(0)}, {w.stride, w.stride}};
    const Follow& follow = batch.follow;
    Route route = {own, batch.left, read_on(follow.then, own, high, w.stride - high)};
    if (follow.count > 0) {
      const Row gate(*follow.a, follow.ids[0]);
      route.then = {{gate.plane(0), gate.plane(1)}, {high, w.stride - high}};
    }
    const int64_t far = 2 * neurons_ahead(w.stride);
    next = lines(route, far);
    again = lines(route, far / 2);
  }
  void prefetch(int plane, int64_t, int64_t) {
    prefetch_nta(next.take(plane));
    prefetch_l1(again.take(plane));
  }
  void prefetch_scales(int64_t, int64_t) { prefetch(0, 0, 0); }

 private:
  struct Lines {
    const std::uint8_t* of[2];
    int second;  // which of them plane 1 asks from

    const std::uint8_t* take(int plane) {
      const std::uint8_t*& line = of[plane == 0 ? 0 : second];
      line += kLineBytes;
      return line - kLineBytes;
    }
  };
  Lines next, again;

  static Lines lines(const Route& route, int64_t row) {
    const Streams at = route.at(row);
    return {{at.of[0], at.of[1]}, row < route.left ? 0 : 1};
  }
};

#if defined(__AVX512VNNI__)

/// What a batch's rows are taken times, h * scale, for kSome scales: integers of kBytes bytes,
/// relative to the largest of h * row's step. Byte products want each of their bytes, the highest
/// first, four rows to an int32.
template <int kOffset, int kBytes, int kRows>
struct Factors {
  static constexpr int kQuads = kRows / 4, kSome = 32;
  alignas(64) int32_t quads[kBytes][kQuads][kSome];
  alignas(64) int32_t start[kBytes][kSome];  // -kOffset sum

  /// parts: of the largest, in 1/32768; scales: the rows' from where these begin, `left` of them
  void make(const std::int8_t* const* scales, const std::int16_t* parts, int64_t rows,
            int64_t left) {
    const auto some = static_cast<__mmask32>(left >= kSome ? ~0u : (1u << left) - 1);
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
  /// out[i] = byte i of each of the four.
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

/// Of two groups' integers, one per scale, those that interleaved rows' out[i] takes.
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

/// y[32 i] ... y[32 i + 15] += step * the 128-bit lanes i of the four, i < lanes.
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
    if (i < lanes) store(y, load_as<Floats>(y) + step * to_floats((Ints)ordered[i]));
}

/// y += sum over a batch of h[i] row[i]; not exact: of the rows' high planes. y: whole groups. Two
/// groups at a time: their bytes of four rows are interleaved while they still hold two nibbles.
template <bool kExact, class Row, int kRows, class Ahead>
inline void add_rows(const Rows& w, const Batch& batch, Ahead ahead, const float* h, float* y) {
  constexpr int kScales = Row::kScales;
  constexpr bool kBoth = Row::kPlanes && kExact;             // planes
  constexpr float kUnit = Row::kPlanes && !kExact ? 16 : 1;  // what a nibble of 1 is worth
  // Codes of 8 bits deserve finer factors.
  constexpr int kBytes = kBoth ? 2 : 1;
  using Factors = Factors<kBoth ? Row::kOffset : 8, kBytes, kRows>;
  constexpr int64_t kGroups = Factors::kSome / kScales;
  const int64_t count = batch.count, groups = groups_of(w.n);
  const std::uint8_t* planes[2][kRows];
  const std::int8_t* scales[kRows];
  alignas(64) float parts[kManyDownRows] = {};
  for (int64_t r = 0; r < kRows; ++r) {
    const Row row(w, batch.id(r));
    for (int i = 0; i < 2; ++i) planes[i][r] = row.plane(i);
    scales[r] = row.scales.scales;
    if (r < count) parts[r] = h[r] * row.scales.step();
  }
  const __m512 values = _mm512_load_ps(parts);
  float most = _mm512_reduce_max_ps(_mm512_abs_ps(values));
  if (_mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q))
    most = __builtin_nanf("");  // to be seen in y
  const float step = most * (32768.0f / 32767.0f) * (kBytes == 2 ? 1.0f / 256 : kUnit);
  const __m512i relative =
      _mm512_cvtps_epi32(_mm512_mul_ps(values, _mm512_set1_ps(most > 0 ? 32767.0f / most : 0)));
  alignas(32) std::int16_t words[kManyDownRows];
  _mm256_store_si256((__m256i*)words, _mm512_cvtepi32_epi16(relative));
  Factors factors;
  for (int64_t g0 = 0; g0 < groups; g0 += kGroups) {
    factors.make(scales, words, count, (groups - g0) * kScales);
    for (int64_t r = 0; r < kRows; ++r) {
      ahead.prefetch_scales(r, g0 * kScales);
      scales[r] += Factors::kSome;
    }
    for (int64_t turn = 0; turn < kGroups / 2; ++turn) {
      const int64_t four = turn / kLinesInTurn * kLinesInTurn;
      const int64_t g = g0 + 2 * (four + line_in_turn(turn % kLinesInTurn, Ahead::kInOrder));
      if (g >= groups) continue;
      const int64_t at = (g - g0) * kScales, bytes = g * kGroupBytes, left = min(groups - g, 2);
      const __mmask64 some = left == 2 ? ~0ull : 0xffffffffull;
      __m512i lowers[kBytes][4], uppers[kBytes][4];
#pragma GCC unroll 2
      for (int byte = 0; byte < kBytes; ++byte) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          lowers[byte][i] = uppers[byte][i] = lanes_of_scales<kScales>(factors.start[byte] + at, i);
      }
      for (int64_t q = 0; 4 * q < count; ++q) {
        __m512i loaded[4], nibbles[2][4];
#pragma GCC unroll 2
        for (int plane = 0; plane < (kBoth ? 2 : 1); ++plane) {
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) {
            loaded[i] = _mm512_maskz_loadu_epi8(some, planes[plane][4 * q + i] + bytes);
            ahead.prefetch(plane, 4 * q + i, bytes);
          }
          interleave(loaded, nibbles[plane]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const __m512i both = nibbles[0][i], rest = nibbles[1][i];
          const __m512i a = kBoth ? merge(_mm512_slli_epi16(both, 4), rest) : lower_nibbles(both);
          const __m512i b = kBoth ? merge(both, _mm512_srli_epi16(rest, 4)) : upper_nibbles(both);
#pragma GCC unroll 2
          for (int byte = 0; byte < kBytes; ++byte) {
            const __m512i factor = lanes_of_scales<kScales>(factors.quads[byte][q] + at, i);
            lowers[byte][i] = _mm512_dpbusd_epi32(lowers[byte][i], a, factor);
            uppers[byte][i] = _mm512_dpbusd_epi32(uppers[byte][i], b, factor);
          }
        }
      }
      if (kBytes == 2) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          lowers[0][i] =
              _mm512_add_epi32(_mm512_slli_epi32(lowers[0][i], 8), lowers[kBytes - 1][i]);
          uppers[0][i] =
              _mm512_add_epi32(_mm512_slli_epi32(uppers[0][i], 8), uppers[kBytes - 1][i]);
        }
      }
      const __m512i(&l)[4] = lowers[0], (&u)[4] = uppers[0];
      float* const out = y + g * kGroup;
      if (kScales == 2) {  // a lane's lower nibbles are 16 values, its upper ones the next 16
        add_lanes(l[0], l[1], l[2], l[3], step, 2 * left, out);
        add_lanes(u[0], u[1], u[2], u[3], step, 2 * left, out + 16);
      } else {  // 8 of two scales each
        add_lanes(l[0], l[1], u[0], u[1], step, 2 * left, out);
        add_lanes(l[2], l[3], u[2], u[3], step, 2 * left, out + 16);
      }
    }
  }
}

#else

/// y += sum over a batch of h[i] row[i]; not exact: of the rows' high planes. y: whole groups
template <bool kExact, class Row, int kRows, class Ahead>
inline void add_rows(const Rows& w, const Batch& batch, Ahead ahead, const float* h, float* y) {
  constexpr int kVectors = kGroup / kLanes, kScales = Row::kScales;
  static_assert(kLanes % kScales == 0);
  float factors[kRows][kLanes];
  Row rows[kRows];
  for (int64_t r = 0; r < batch.count; ++r) rows[r] = Row(w, batch.id(r));
  for (int64_t g = 0; g < groups_of(w.n); ++g, y += kGroup) {
    const int64_t at = g * kScales % kLanes;
    if (at == 0)
      for (int64_t r = 0; r < batch.count; ++r) {
        store(factors[r], h[r] * rows[r].scales.step() * rows[r].scales.from(g * kScales));
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
        for (int plane = 0; plane < (kExact && Row::kPlanes ? 2 : 1); ++plane)
          ahead.prefetch(plane, r, g * kGroupBytes);
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; ++i)
        sums[i] += factors[r][at + i * kScales / kVectors] * signed_floats(codes + i * kLanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) store(y + i * kLanes, sums[i]);
  }
}

#endif

template <bool kExact, class Row, int kRows>
void add_rows(const Rows& w, const Batch& batch, const float* h, float* y) {
  constexpr bool kWhole = kExact || !Row::kPlanes;  // rows leave no gaps between them
  if (kWhole && batch.is_stream_ahead())
    add_rows<kExact, Row, kRows>(w, batch, DownStreamsAhead<Row>(w, batch), h, y);
  else
    add_rows<kExact, Row, kRows>(w, batch, DownRowsAhead<Row, kRows>(w, batch), h, y);
}

}  // namespace
}  // namespace tda
