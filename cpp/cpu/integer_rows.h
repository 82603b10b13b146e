// Decode for rows of integers, int8 and int4: products with an x that is rounded to integers, too.
//
// Where weights have a scale of their own, so has x:  x = scale q,  q of 8 bits. Instructions want
// codes unsigned, so they are Row::kOffset too large; -kOffset sum(q) is where the integer sums
// start. Where x has an outlier, int8 rows are multiplied with 8 bits more of it.
#pragma once

#include "cpu/batch.h"

namespace tda {
namespace {

/// How many times as large as the root of x's mean square an outlier of x is. Such a value leaves
/// its neighbours only a few steps of their common scale, so they are multiplied with what rounding
/// left, too: x = scale / 256 (256 q + rest).
constexpr float kOutlier = 6;

constexpr int64_t kHalf = kGroup / 2;  // a plane's bytes hold values of both halves of a group

/// How much too large the nibbles of second halves are taken where a plane is used alone.
#if defined(__AVX512VNNI__)
constexpr int32_t kUpper = 16;
#else
constexpr int32_t kUpper = 1;
#endif

/// Two groups of a prepared x: the first halves of both, then their second halves. A lane adds up
/// the products of four neighbours.
struct alignas(64) Pair {
  std::int8_t q[2][2 * kHalf];
  int32_t start[2][kHalf / 2];  // -kOffset sum of four
  // int8 only:
  int32_t coarse_start[2][kHalf / 2];  // for the high plane alone
  std::int8_t rest[2][2 * kHalf];
  int32_t rest_start[2][kHalf / 2];
  bool fine;  // the rest counts, and the scales are 256 times as small
};

/// A prepared x: pairs, and their scales, filled up with zeros to whole vectors.
template <class Row>
struct Vector {
  Pair* pairs;
  float* scales;
  float* coarse_scales;  // int8 only: for the high plane alone
  int64_t count;         // groups

  Vector(const void* prepared, int64_t n)
      : pairs(static_cast<Pair*>(const_cast<void*>(prepared))),
        scales(reinterpret_cast<float*>(pairs + pairs_of(n))),
        coarse_scales(scales + scale_count(n)),
        count(groups_of(n)) {}
  static int64_t pairs_of(int64_t n) { return (groups_of(n) + 1) / 2; }
  static int64_t scale_count(int64_t n) {
    return (groups_of(n) * Row::kScales + kLanes - 1) / kLanes * kLanes;
  }
};

template <class Row>
int64_t prepared_bytes(int64_t n) {
  return Vector<Row>::pairs_of(n) * sizeof(Pair) + 2 * Vector<Row>::scale_count(n) * sizeof(float);
}

/// What kLanes floats, at most 127 in size, are rounded to.
inline Floats store_rounded(std::int8_t* p, Floats v) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23 leaves the nearest integer in the low bits
  const Floats shifted = v + kShift;
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)shifted));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<std::int8_t>(((Ints)shifted)[i]);
#endif
  return shifted - kShift;
}

inline float largest_lane(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float largest = v[0];
  for (int lane = 1; lane < kLanes; ++lane) largest = v[lane] > largest ? v[lane] : largest;
  return largest;
#endif
}

/// Sums of each four of so many bytes.
inline void sum_fours(const std::int8_t (&bytes)[2 * kHalf], int32_t (&sums)[kHalf / 2]) {
#if defined(__AVX512VNNI__)
  const __m512i ones = _mm512_set1_epi8(1), all = _mm512_loadu_si512(bytes);
  _mm512_storeu_si512(sums, _mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, all));
#else
  for (int i = 0; i < kHalf / 2; ++i)
    sums[i] = bytes[4 * i] + bytes[4 * i + 1] + bytes[4 * i + 2] + bytes[4 * i + 3];
#endif
}

inline float root_mean_square(const float* x, int64_t n) {
  Floats squares = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Floats v = load_part<F32>(x + i, n - i);
    squares += v * v;
  }
  return __builtin_sqrtf(sum(squares) / static_cast<float>(n));
}

template <class Row>
void prepare(const float* x, int64_t n, void* prepared) {
  constexpr int kPart = kGroup / Row::kScales, kVectors = kPart / kLanes;
  const Vector<Row> out(prepared, n);
  const float limit = Row::kPlanes ? kOutlier * root_mean_square(x, n) : __builtin_inff();
  for (int64_t part = 0; part < 2 * Vector<Row>::pairs_of(n) * Row::kScales; ++part) {
    const int64_t first = part * kPart, at = first % kGroup, g = first / kGroup;
    Pair& pair = out.pairs[g / 2];
    const int64_t in_half = g % 2 * kHalf + at % kHalf;
    Floats values[kVectors], largest = {};
    for (int i = 0; i < kVectors; ++i) {
      const int64_t left = n - first - i * kLanes;
      values[i] = left > 0 ? load_part<F32>(x + first + i * kLanes, left) : Floats{};
      largest = max(values[i] < 0.0f ? -values[i] : values[i], largest);
    }
    const float most = largest_lane(largest), inverse = most > 0.0f ? 127.0f / most : 0.0f;
    for (int i = 0; i < kVectors; ++i) {
      const Floats scaled = values[i] * inverse;
      const Floats q = store_rounded(pair.q[at / kHalf] + in_half + i * kLanes, scaled);
      if (Row::kPlanes)
        store_rounded(pair.rest[at / kHalf] + in_half + i * kLanes,
                      min(256.0f * (scaled - q), splat(127.0f)));
    }
    pair.fine = (part % (2 * Row::kScales) != 0 && pair.fine) || most > limit;
    if (g == out.count) continue;  // there is no such group, but half a pair
    out.scales[part] = most / 127.0f;
  }
  for (int64_t i = out.count * Row::kScales; i < Vector<Row>::scale_count(n); ++i)
    out.scales[i] = 0.0f;
  for (int64_t i = 0; i < Vector<Row>::scale_count(n); ++i) {
    const bool second = i % Row::kScales >= Row::kScales / 2;
    const float alone = out.scales[i] / (second ? kUpper : 1);
    out.coarse_scales[i] = 16.0f * alone;
    if (!Row::kPlanes) out.scales[i] = alone;
  }
  for (int64_t p = 0; p < Vector<Row>::pairs_of(n); ++p)
    for (int half = 0; half < 2; ++half) {
      Pair& pair = out.pairs[p];
      int32_t sums[kHalf / 2];
      sum_fours(pair.q[half], sums);
      for (int i = 0; i < kHalf / 2; ++i) {
        pair.coarse_start[half][i] = -8 * (half == 0 ? 1 : kUpper) * sums[i];
        pair.start[half][i] = Row::kPlanes ? -Row::kOffset * sums[i] : pair.coarse_start[half][i];
      }
      if (!pair.fine) continue;
      sum_fours(pair.rest[half], sums);
      for (int i = 0; i < kHalf / 2; ++i) pair.rest_start[half][i] = -Row::kOffset * sums[i];
      for (int i = 0; i < Row::kScales; ++i) {
        const int64_t scale = (2 * p + half) * Row::kScales + i;  // as many groups as halves
        if (scale < out.count * Row::kScales) out.scales[scale] /= 256.0f;
      }
    }
}

#if defined(__AVX512VNNI__)
/// Compilers like to repeat loads.
inline __m512i load_once(const void* p) {
  __m512i v = _mm512_loadu_si512(p);
  asm("" : "+v"(v));
  return v;
}

/// The products of kCount rows, or of their high planes, with x, still one sum per lane. They share
/// what is loaded of x: loads are what this loop runs out of. `ahead`: what to ask for. The order
/// of lines changes no bit: the last of four adds to a sum of its own, the others come in the same
/// order either way.
template <bool kExact, class Row, int kCount, class Ahead>
inline void multiply(const Row (&rows)[kCount], Ahead ahead, const Vector<Row>& x,
                     Floats (&lanes)[kCount]) {
  constexpr int kScales = Row::kScales;
  constexpr bool kBoth = Row::kPlanes && kExact;                 // planes
  constexpr int kVectors = kLinesInTurn * 2 * kScales / kLanes;  // of scales
  float steps[kCount];  // read first, for they stand at the rows' ends: 10% of the time
  for (int r = 0; r < kCount; ++r) steps[r] = rows[r].scales.step();
  Floats sums[kCount][2] = {};
  for (int64_t p0 = 0; 2 * p0 < x.count; p0 += kLinesInTurn) {
    Floats scales[kCount][kVectors] = {};
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const int64_t s = 2 * p0 * kScales + v * kLanes;
      if (s >= x.count * kScales) break;
      const Floats of_x = load_as<Floats>((kExact ? x.scales : x.coarse_scales) + s);
      for (int r = 0; r < kCount; ++r) {
        scales[r][v] = rows[r].scales.from(s) * of_x;
        ahead.ask_scales(r, s);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kLinesInTurn; ++i) {
      const int turn = line_in_turn(i, Ahead::kInOrder);
      const int64_t p = p0 + turn;
      if (2 * p >= x.count) continue;
      const Pair& pair = x.pairs[p];
      const int64_t at = 2 * p * kGroupBytes;
      const __mmask64 there = 2 * p + 1 < x.count ? ~0ull : 0xffffffffull;
      const __m512i q[2] = {load_once(pair.q[0]), load_once(pair.q[1])};
      const auto& starts = kExact ? pair.start : pair.coarse_start;
      const __m512i start[2] = {load_once(starts[0]), load_once(starts[1])};
      const int first_scale = turn * 2 * kScales % kLanes, vector = turn * 2 * kScales / kLanes;
      const __m512i index[2] = {scales_of_lanes<kScales>(0, first_scale),
                                scales_of_lanes<kScales>(1, first_scale)};
#pragma GCC unroll 4
      for (int r = 0; r < kCount; ++r) {
        const __m512i high = _mm512_maskz_loadu_epi8(there, rows[r].plane(0) + at);
        ahead.ask(0, r, at);
        __m512i codes[2] = {lower_nibbles(high), upper_nibbles(high)};
        if (kBoth) {
          const __m512i low = _mm512_maskz_loadu_epi8(there, rows[r].plane(1) + at);
          ahead.ask(1, r, at);
          codes[0] = merge(_mm512_slli_epi16(high, 4), low);
          codes[1] = merge(high, _mm512_srli_epi16(low, 4));
        }
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const auto scale = (Floats)_mm512_permutexvar_ps(index[half], (__m512)scales[r][vector]);
          __m512i integers = _mm512_dpbusd_epi32(start[half], codes[half], q[half]);
          if (kBoth && pair.fine) {
            const __m512i shifted = _mm512_slli_epi32(integers, 8);
            integers = _mm512_dpbusd_epi32(
                _mm512_add_epi32(shifted, _mm512_load_si512(pair.rest_start[half])), codes[half],
                _mm512_load_si512(pair.rest[half]));
          }
          sums[r][turn == kLinesInTurn - 1] += scale * to_floats((Ints)integers);
        }
      }
    }
  }
  for (int r = 0; r < kCount; ++r) lanes[r] = steps[r] * (sums[r][0] + sums[r][1]);
}

#else

/// Lane i: the sum of four codes times q, kTimes over.
template <int kTimes>
inline Ints sums_of_four(Bytes codes, const std::int8_t* q) {
#if defined(__AVX2__)
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)codes, _mm256_loadu_si256((const __m256i*)q));
  return (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(kTimes));
#else
  Ints sums = {};
  for (int i = 0; i < kVectorBytes; ++i) sums[i / 4] += codes[i] * q[i];
  return kTimes * sums;
#endif
}

/// The products of kCount rows, or of their high planes, with x, still one sum per lane. `ahead`:
/// what to ask for.
template <bool kExact, class Row, int kCount, class Ahead>
inline void multiply(const Row (&rows)[kCount], Ahead ahead, const Vector<Row>& x,
                     Floats (&lanes)[kCount]) {
  constexpr bool kBoth = Row::kPlanes && kExact;  // planes
  constexpr int64_t kGroups = kLanes / Row::kScales;
  constexpr int kPerVector = kVectorBytes * Row::kScales / kGroup;  // scales
  Floats sums[kCount] = {};
  for (int64_t g0 = 0; g0 < x.count; g0 += kGroups) {
    const int64_t s = g0 * Row::kScales;
    float scales[kCount][kLanes];
    for (int r = 0; r < kCount; ++r) {
      const Floats of_x = load_as<Floats>((kExact ? x.scales : x.coarse_scales) + s);
      store(scales[r], rows[r].scales.from(s) * of_x);
      ahead.ask_scales(r, s);
    }
    for (int64_t g = g0; g < min(g0 + kGroups, x.count); ++g) {
      const Pair& pair = x.pairs[g / 2];
#pragma GCC unroll 4
      for (int r = 0; r < kCount; ++r) {
        Bytes high[kParts], low[kParts];
        expand(rows[r].plane(0) + g * kGroupBytes, high);
        if (kBoth) expand(rows[r].plane(1) + g * kGroupBytes, low);
        if (g % 2 == 0)
          for (int plane = 0; plane < (kBoth ? 2 : 1); ++plane)
            ahead.ask(plane, r, g * kGroupBytes);
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
          const int64_t first = part * kVectorBytes, half = first / kHalf;
          const int64_t at = g % 2 * kHalf + first % kHalf;
          const auto products = [&](const std::int8_t* q) {
            return kBoth ? sums_of_four<16>(high[part], q) + sums_of_four<1>(low[part], q)
                         : sums_of_four<1>(high[part], q);
          };
          const auto& starts = kExact ? pair.start : pair.coarse_start;
          Ints integers = load_as<Ints>(starts[half] + at / 4) + products(pair.q[half] + at);
          if (kBoth && pair.fine)
            integers = (integers << 8) + load_as<Ints>(pair.rest_start[half] + at / 4) +
                       products(pair.rest[half] + at);
          const float* const of_part =
              scales[r] + (g - g0) * Row::kScales + first * Row::kScales / kGroup;
          Floats scale;
          if constexpr (kPerVector > 1)
            for (int lane = 0; lane < kLanes; ++lane)
              scale[lane] = of_part[lane * kPerVector / kLanes];
          else
            scale = splat(of_part[0]);
          sums[r] += scale * to_floats(integers);
        }
      }
    }
  }
  for (int r = 0; r < kCount; ++r) lanes[r] = rows[r].scales.step() * sums[r];
}

#endif

/// out[i] = row_of(i)·x, or its high plane's, i < count <= kBatch, and up to a whole vector of
/// them; ahead_of(i, j): what to ask for while the i-th and j-th are at work.
template <bool kExact, class Row, class RowOf, class AheadOf>
inline void multiply_rows(int64_t count, const RowOf& row_of, const AheadOf& ahead_of,
                          const Vector<Row>& x, float* out) {
  Products products;
  for (int64_t i = 0; i < count; i += 2) {
    const int64_t j = min(i + 1, count - 1);  // the last of an odd number is taken twice
    const Row pair[2] = {row_of(i), row_of(j)};
    Floats lanes[2];
    multiply<kExact>(pair, ahead_of(i, j), x, lanes);
    products.lanes[i] = lanes[0];
    products.lanes[i + 1] = lanes[1];
  }
  products.store_to(out, count);
}

/// out[i] = w[first + i]·x, or its high plane's, i < count <= kBatch.
template <bool kExact, class Row>
void multiply_next(const Rows& w, int64_t first, int64_t count, const Vector<Row>& x, float* out) {
  // Past the end lies what a next call will read.
  multiply_rows<kExact>(
      count, [&](int64_t i) { return Row(w, first + i); },
      [&](int64_t i, int64_t) {
        const auto ahead = [&](int64_t rows) { return Planes(Row(w, first + i + rows)); };
        return StreamsAhead<kExact>{ahead(kBatch), ahead(kBatch / 2)};
      },
      x, out);
}

template <class Row>
void dot(const Rows& w, int64_t rows, const void* prepared, float* y, bool add) {
  const Vector<Row> x(prepared, w.n);
  for (int64_t first = 0; first < rows; first += kBatch, y += kBatch) {
    const int64_t count = min(kBatch, rows - first);
    float results[kBatch];
    multiply_next<true>(w, first, count, x, results);
    for (int64_t r = 0; r < count; ++r) y[r] = results[r] + (add ? y[r] : 0.0f);
  }
}

/// One row's product with x per neuron of a batch.
template <class Row>
void multiply_one_each(const Rows& w, const Batch& batch, const Vector<Row>& x, float* out) {
  const auto ahead = [&](int64_t i) { return batch.ahead<Row>(w, batch.follow.a, i); };
  multiply_rows<true>(
      batch.count, [&](int64_t i) { return Row(w, batch.id(i)); },
      [&](int64_t i, int64_t j) { return RowsAhead<Row, 2>{{ahead(i), ahead(j)}}; }, x, out);
}

template <class Row>
void load(const Rows& w, float* out, int64_t stride) {
  const Row row(w, 0);
  for (int64_t i = 0; i < w.n; i += 16) {
    float values[16];
    row.load(i, values);
    for (int64_t j = 0; j < min(16, w.n - i); ++j) out[(i + j) * stride] = values[j];
  }
}

}  // namespace
}  // namespace tda
