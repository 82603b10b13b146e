// The x of products with integer rows, quantised.
//
// Activations are quantised per weight group: x = scale q, with q of 8 bits and one scale for each
// scale of the weights. VPDPBUSD multiplies unsigned by signed bytes, so codes carry the offset
// Row::kOffset, and accumulators start at -kOffset * sum(q). Where x has outliers, int8 rows are
// also multiplied with the residual of x, another 8 bits.
#pragma once

#include <memory>

#include "cpu/batch.h"

namespace tda {
namespace {

/// An outlier of x is this many times the root mean square of x. It leaves the other values that
/// share its scale only a few steps of it, so for these the rounding residual is kept:
/// x = scale / 256 (256 q + residual).
constexpr float kOutlier = 6;

constexpr int64_t kPairBytes = 2 * kGroupBytes;  // a cache line

/// Two groups of a prepared x in the order of a row's nibbles: q[0] is multiplied with the lower
/// nibbles, q[1] with the upper ones. A lane sums the products of four bytes.
struct alignas(64) Pair {
  std::int8_t q[2][kPairBytes];
  int32_t start[kPairBytes / 4];  // -kOffset * sum(q) of the lane
  // int8 only:
  int32_t coarse_start[kPairBytes / 4];  // the same for the high plane alone
  std::int8_t residual[2][kPairBytes];
  int32_t residual_start[kPairBytes / 4];
  bool has_residual;  // if so, scales are divided by 256
};

/// A prepared x: pairs, then their scales, padded with zeros to whole vectors.
template <class Row>
struct Vector {
  static constexpr int kRows = 2;  // that reuse each load of x
  static constexpr bool kSeveral = false;
  Pair* pairs;
  float* scales;
  float* coarse_scales;  // int8 only: for the high plane alone
  int64_t count;         // groups

  Vector() = default;
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

/// Rounds kLanes floats of |v| <= 127, stores them as bytes and returns the rounded values.
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

/// |v| as integers, which are in the order of the values; infinity is above all numbers, and NaN
/// above infinity, so that neither gets lost in a maximum.
inline Ints size_bits(Floats v) { return (Ints)v & 0x7fffffff; }

inline float largest_size(Ints sizes) {
#if defined(__AVX512F__)
  return __builtin_bit_cast(float, _mm512_reduce_max_epi32((__m512i)sizes));
#else
  int32_t largest = sizes[0];
  for (int lane = 1; lane < kLanes; ++lane) largest = sizes[lane] > largest ? sizes[lane] : largest;
  return __builtin_bit_cast(float, largest);
#endif
}

/// out[i] = times * the sum of the q that lane i multiplies.
inline void sum_lanes(const std::int8_t (&q)[2][kPairBytes], int32_t times, int32_t* out) {
#if defined(__AVX512VNNI__)
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, _mm512_loadu_si512(q[0]));
  sums = _mm512_dpbusd_epi32(sums, ones, _mm512_loadu_si512(q[1]));
  _mm512_storeu_si512(out, _mm512_mullo_epi32(sums, _mm512_set1_epi32(times)));
#else
  for (int64_t i = 0; i < kPairBytes / 4; ++i) {
    out[i] = 0;
    for (int64_t j = 4 * i; j < 4 * i + 4; ++j) out[i] += times * (q[0][j] + q[1][j]);
  }
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

/// A group of x that is not finite gets a scale that is not, with which all products become NaN or
/// infinite.
template <class Row>
void prepare(const float* x, int64_t n, void* prepared) {
  constexpr int kPart = kGroup / Row::kScales, kVectors = kPart / kLanes;
  const Vector<Row> out(prepared, n);
  const float limit = kOutlier * root_mean_square(x, n);
  for (int64_t part = 0; part < 2 * Vector<Row>::pairs_of(n) * Row::kScales; ++part) {
    const int64_t first = part * kPart, in_pair = part % (2 * Row::kScales);
    Pair& pair = out.pairs[first / (2 * kGroup)];
    Floats values[kVectors];
    Ints largest = {};
    for (int i = 0; i < kVectors; ++i) {
      const int64_t left = n - first - i * kLanes;
      values[i] = left > 0 ? load_part<F32>(x + first + i * kLanes, left) : Floats{};
      const Ints sizes = size_bits(values[i]);
      largest = sizes > largest ? sizes : largest;
    }
    const float most = largest_size(largest), inverse = most > 0.0f ? 127.0f / most : 0.0f;
    std::int8_t q[kPart], residual[kPart];
    for (int i = 0; i < kVectors; ++i) {
      const Floats scaled = values[i] * inverse;
      const Floats rounded = store_rounded(q + i * kLanes, scaled);
      store_rounded(residual + i * kLanes, min(256.0f * (scaled - rounded), splat(127.0f)));
    }
    for (int half = 0; half < 2; ++half) {
      const int64_t to = in_pair * (kPart / 2), from = half * (kPart / 2);
      __builtin_memcpy(pair.q[half] + to, q + from, kPart / 2);
      __builtin_memcpy(pair.residual[half] + to, residual + from, kPart / 2);
    }
    pair.has_residual = (in_pair != 0 && pair.has_residual) || most > limit;
    if (part < out.count * Row::kScales) out.scales[part] = most / 127.0f;
  }
  for (int64_t i = out.count * Row::kScales; i < Vector<Row>::scale_count(n); ++i)
    out.scales[i] = 0.0f;
  for (int64_t i = 0; i < Vector<Row>::scale_count(n); ++i)
    out.coarse_scales[i] = 16.0f * out.scales[i];
  for (int64_t p = 0; p < Vector<Row>::pairs_of(n); ++p) {
    Pair& pair = out.pairs[p];
    sum_lanes(pair.q, -Row::kOffset, pair.start);
    sum_lanes(pair.q, -8, pair.coarse_start);
    if (!pair.has_residual) continue;
    sum_lanes(pair.residual, -Row::kOffset, pair.residual_start);
    const int64_t end = min(2 * (p + 1), out.count) * Row::kScales;
    for (int64_t i = 2 * p * Row::kScales; i < end; ++i) out.scales[i] /= 256.0f;
  }
}

// ---- several sequences ---------------------------------------------------------------------------

/// Calls body(size, first) for blocks of kMost vectors, then of half as many, and so on; size is a
/// constant.
template <int kMost, class Body>
[[gnu::always_inline]] inline void for_blocks(int64_t count, const Body& body, int64_t first = 0) {
  for (; first + kMost <= count; first += kMost) body(Constant<kMost>(), first);
  if constexpr (kMost > 1) for_blocks<kMost / 2>(count, body, first);
}

#if defined(__AVX2__) && !defined(__AVX512VNNI__)

/// A group of a prepared x as 16-bit numbers, q or, with its residual, 256 q + residual: those that
/// are multiplied with the bytes of even and of odd places of lower nibbles, then of upper ones. A
/// lane sums the same products as with bytes.
struct alignas(32) WideGroup {
  std::int16_t q[4][16];
  float scales[kLanes];
  int32_t start[kLanes];
};

template <class Row>
inline void widen(const Vector<Row>& x, int64_t g, WideGroup& out) {
  const Pair& pair = x.pairs[g / 2];
  const int64_t at = g % 2 * kGroupBytes;
  const bool more = pair.has_residual;
  const int32_t times = more ? 256 : 1;
  for (int half = 0; half < 2; ++half)
    for (int odd = 0; odd < 2; ++odd)
      for (int i = 0; i < 16; ++i) {
        const int64_t from = at + 2 * i + odd;
        out.q[2 * half + odd][i] = static_cast<std::int16_t>(
            times * pair.q[half][from] + (more ? pair.residual[half][from] : 0));
      }
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t from = at / 4 + lane;
    out.scales[lane] = x.scales[g * Row::kScales + lane * Row::kScales / kLanes];
    out.start[lane] = times * pair.start[from] + (more ? pair.residual_start[from] : 0);
  }
}

/// The x of several sequences, prepared. Where bytes are multiplied by two instructions (VPMADDUBSW
/// and VPMADDWD), the codes of a row are widened to 16 bits once for all of them, and then one is
/// enough. In blocks of 8, 4, 2 and 1 vectors: the same group of a block's vectors lies together.
template <class Row>
struct VectorsOf {
  static constexpr int kRows = 2, kMostAtOnce = 8;
  static constexpr bool kSeveral = true;
  int64_t count, groups;
  std::unique_ptr<WideGroup[]> wide;

  VectorsOf(const Vectors& vectors, int64_t n)
      : count(vectors.count), groups(groups_of(n)), wide(new WideGroup[count * groups]) {
    for_blocks<kMostAtOnce>(count, [&](auto size, int64_t first) {
      for (int64_t v = first; v < first + size.value; ++v) {
        const Vector<Row> x(vectors.x[v], n);
        for (int64_t g = 0; g < groups; ++g)
          widen(x, g, wide[first * groups + g * size.value + v - first]);
      }
    });
  }
};

/// Calls body(x) with the prepared x of several sequences.
template <class Row, class Body>
void with_vectors(const Vectors& vectors, int64_t n, const Body& body) {
  body(VectorsOf<Row>(vectors, n));
}

#else

/// The x of several sequences, prepared.
template <class Row, int kRowsTogether>
struct VectorsOf {
  static constexpr int kRows = kRowsTogether;
  static constexpr bool kSeveral = true;
  int64_t count;
  Vector<Row> of[Vectors::kMost];

  VectorsOf(const Vectors& vectors, int64_t n) : count(vectors.count) {
    for (int64_t v = 0; v < count; ++v) of[v] = Vector<Row>(vectors.x[v], n);
  }
};
template <class Row>
using FewVectors = VectorsOf<Row, 2>;
template <class Row>
using ManyVectors = VectorsOf<Row, 4>;

/// Calls body(x) with the prepared x of several sequences.
template <class Row, class Body>
void with_vectors(const Vectors& vectors, int64_t n, const Body& body) {
#if defined(__AVX512VNNI__)
  constexpr int64_t kFew = 4;
  if (vectors.count > kFew) return body(ManyVectors<Row>(vectors, n));
#endif
  body(FewVectors<Row>(vectors, n));
}

#endif

}  // namespace
}  // namespace tda
