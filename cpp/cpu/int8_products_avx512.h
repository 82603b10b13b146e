// Products of int8 rows and prepared x, with AVX-512 and VNNI.
//
// VPDPBUSD multiplies unsigned by signed bytes, so codes keep their offset, and accumulators start
// at -kOffset * sum(q). Where x has outliers, rows are also multiplied with the residual of x,
// another 8 bits.
#pragma once

#include "cpu/int8_inputs.h"

namespace tda {
namespace {

/// An outlier of x is this many times the root mean square of x. It leaves the other values that
/// share its scale only a few steps of it, so for these the rounding residual is kept:
/// x = scale / 256 (256 q + residual).
constexpr float kOutlier = 6;

/// Two groups of x in the order of a row's codes: q[0] is multiplied with the first line, q[1] with
/// the second. A lane sums the products of four bytes of each.
struct alignas(64) Pair {
  std::int8_t q[2][kGroup];
  int32_t start[kLanes];  // -kOffset * sum(q) of the lane
  std::int8_t residual[2][kGroup];
  int32_t residual_start[kLanes];
  bool has_residual;  // if so, scales are divided by 256
};

/// A prepared x: pairs, then their scales, padded with zeros to whole vectors.
struct Vector {
  static constexpr int kRows = 2;  // that reuse each load of x
  Pair* pairs;
  float* scales;
  int64_t count;  // groups

  Vector() = default;
  Vector(const void* prepared, int64_t n)
      : pairs(static_cast<Pair*>(const_cast<void*>(prepared))),
        scales(reinterpret_cast<float*>(pairs + pairs_of(n))),
        count(groups_of(n)) {}
  static int64_t pairs_of(int64_t n) { return (groups_of(n) + 1) / 2; }
  static int64_t scale_count(int64_t n) {
    return (groups_of(n) * kInt8Scales + kLanes - 1) / kLanes * kLanes;
  }
};

int64_t prepared_bytes(int64_t n) {
  return Vector::pairs_of(n) * sizeof(Pair) + Vector::scale_count(n) * sizeof(float);
}

/// Rounds kLanes floats of |v| <= 127, stores them as bytes and returns the rounded values.
inline Floats store_rounded(std::int8_t* p, Floats v) {
  const Floats shifted = v + kRound;
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)shifted));
  return shifted - kRound;
}

/// out[i] = -kOffset * the sum of the q that lane i multiplies.
inline void start_lanes(const std::int8_t (&q)[2][kGroup], int32_t* out) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, _mm512_loadu_si512(q[0]));
  sums = _mm512_dpbusd_epi32(sums, ones, _mm512_loadu_si512(q[1]));
  _mm512_storeu_si512(out, _mm512_mullo_epi32(sums, _mm512_set1_epi32(-Int8Row::kOffset)));
}

inline float root_mean_square(const float* x, int64_t n) {
  Floats squares = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Floats v = load_part<F32>(x + i, n - i);
    squares += v * v;
  }
  return __builtin_sqrtf(sum(squares) / static_cast<float>(n));
}

/// A part of x that is not finite gets a scale that is not, with which all products become NaN or
/// infinite.
void prepare(const float* x, int64_t n, void* prepared) {
  constexpr int kParts = 2 * kInt8Scales;  // of a pair
  const Vector out(prepared, n);
  const int64_t scales = out.count * kInt8Scales;
  const float limit = kOutlier * root_mean_square(x, n);
  for (int64_t i = scales; i < Vector::scale_count(n); ++i) out.scales[i] = 0.0f;
  for (int64_t p = 0; p < Vector::pairs_of(n); ++p) {
    Pair& pair = out.pairs[p];
    pair.has_residual = false;
    for (int64_t i = 0; i < kParts; ++i) {
      const Part part(x, n, (p * kParts + i) * kPart);
      const float inverse = part.inverse(127.0f);
      for (int half = 0; half < Part::kVectors; ++half) {
        const Floats scaled = part.values[half] * inverse;
        const Floats rounded = store_rounded(pair.q[half] + i * kLanes, scaled);
        store_rounded(pair.residual[half] + i * kLanes,
                      min(256.0f * (scaled - rounded), splat(127.0f)));
      }
      pair.has_residual |= part.most > limit;
      if (p * kParts + i < scales) out.scales[p * kParts + i] = part.most / 127.0f;
    }
    start_lanes(pair.q, pair.start);
    if (!pair.has_residual) continue;
    start_lanes(pair.residual, pair.residual_start);
    for (int64_t i = p * kParts; i < min((p + 1) * kParts, scales); ++i) out.scales[i] /= 256.0f;
  }
}
static_assert(Part::kVectors == 2);

// ---- products -----------------------------------------------------------------------------------

/// Keeps compilers from loading the same bytes again for each use.
inline __m512i load_once(const void* p) {
  __m512i v = _mm512_loadu_si512(p);
  asm("" : "+v"(v));
  return v;
}

/// Pairs whose scales fill a vector.
constexpr int kBlockPairs = kLanes / (2 * kInt8Scales);
static_assert(kBlockPairs == 4);

/// The scales of pair `i` of a block, each in the lanes of its values.
inline Floats scales_of_pair(Floats scales, int i) {
  const __m512i lanes = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  return (Floats)_mm512_permutexvar_ps(_mm512_add_epi32(lanes, _mm512_set1_epi32(4 * i)),
                                       (__m512)scales);
}

/// The two lines of a row's codes that a pair is multiplied with. half: the bytes between them; if
/// it is half a line, so are they.
struct Lines {
  __m512i of[2];

  [[gnu::always_inline]] Lines(const std::uint8_t* codes, int64_t half) {
    __mmask64 there = half == kGroup ? ~0ull : 0xffffffffull;
    asm("" : "+Yk"(there));  // masked even if all are there, see load_no_hw_prefetch
    of[0] = _mm512_maskz_loadu_epi8(there, codes);
    of[1] = _mm512_maskz_loadu_epi8(there, codes + half);
  }
};

/// A pair of groups of x in registers, for several rows.
struct LoadedPair {
  const Pair& pair;
  __m512i q[2], start;

  explicit LoadedPair(const Pair& from)
      : pair(from), q{load_once(from.q[0]), load_once(from.q[1])}, start(load_once(from.start)) {}
  /// The products with a row's codes, summed by lanes.
  [[gnu::always_inline]] Floats times(const Lines& codes) const {
    __m512i integers = _mm512_dpbusd_epi32(start, codes.of[0], q[0]);
    integers = _mm512_dpbusd_epi32(integers, codes.of[1], q[1]);
    if (pair.has_residual) {
      const __m512i shifted = _mm512_slli_epi32(integers, 8);
      integers = _mm512_add_epi32(shifted, _mm512_load_si512(pair.residual_start));
      for (int i = 0; i < 2; ++i)
        integers = _mm512_dpbusd_epi32(integers, codes.of[i], _mm512_load_si512(pair.residual[i]));
    }
    return to_floats((Ints)integers);
  }
};

/// lanes[r] = the dot product of row r and x, one partial sum per lane; rows share each load of x.
/// `ahead` prefetches meanwhile. The loop is bound by its instruction count, and takes a fifth longer
/// if called instead of inlined. The order of pairs within a block does not change the result: the
/// last of four has an accumulator of its own, and the others keep their order.
template <int kRows, class Ahead>
[[gnu::always_inline]] inline void multiply(const Int8Row (&rows)[kRows], Ahead& ahead,
                                            const Vector& x, Floats (&lanes)[kRows]) {
  float steps[kRows];  // read first, since they are at the rows' ends: saves 10% of the time
  for (int r = 0; r < kRows; ++r) steps[r] = rows[r].scales.step();
  Floats sums[kRows][2] = {};

  // Adds kBlockPairs pairs from p on or, if not `all`, those that are left; the last may be half one.
  const auto add_pairs = [&](int64_t p, bool all) __attribute__((always_inline)) {
    const int64_t s = p * 2 * kInt8Scales;
    Floats scales[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      scales[r] = rows[r].scales.from(s) * load_as<Floats>(x.scales + s);
      ahead.prefetch_scales(r, s);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kBlockPairs; ++i) {
      const int k = line_of_four(i, !all || Ahead::kInOrder);
      const int64_t groups = x.count - 2 * (p + k), at = (p + k) * 2 * kGroup;
      if (!all && groups <= 0) break;
      const int64_t half = all || groups > 1 ? kGroup : kGroup / 2;
      const LoadedPair pair(x.pairs[p + k]);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const Lines codes(rows[r].data + at, half);
        ahead.prefetch(r, at);
        if (all || groups > 1) ahead.prefetch(r, at + kLineBytes);
        Floats& sum = sums[r][k == kBlockPairs - 1];
        sum = multiply_add(scales_of_pair(scales[r], k), pair.times(codes), sum);
      }
    }
  };
  int64_t p = 0;
  for (; 2 * (p + kBlockPairs) <= x.count; p += kBlockPairs) add_pairs(p, true);
  if (2 * p < x.count) add_pairs(p, false);
  for (int r = 0; r < kRows; ++r) lanes[r] = steps[r] * (sums[r][0] + sums[r][1]);
}

/// Calls take(0, r, lanes) with those of each row.
template <int kRows, class Ahead, class Take>
[[gnu::always_inline]] inline void multiply_each(const Int8Row (&rows)[kRows], Ahead& ahead,
                                                 const Vector& x, const Take& take) {
  Floats lanes[kRows];
  multiply(rows, ahead, x, lanes);
  for (int r = 0; r < kRows; ++r) take(0, r, lanes[r]);
}

// ---- several sequences --------------------------------------------------------------------------

/// The x of several sequences, prepared.
struct VectorsOf {
  static constexpr int kRows = 4;  // that reuse each load of x
  int64_t count;
  Vector of[Vectors::kMost];

  VectorsOf(const Vectors& vectors, int64_t n) : count(vectors.count) {
    for (int64_t v = 0; v < count; ++v) of[v] = Vector(vectors.x[v], n);
  }
};

/// The same for each of several x, take(v, r, lanes). All but the first find the rows in L1.
template <int kRows, class Ahead, class Take>
[[gnu::always_inline]] inline void multiply_each(const Int8Row (&rows)[kRows], Ahead& ahead,
                                                 const VectorsOf& x, const Take& take) {
  const int64_t lines = kRows * (x.of[0].count + 1);  // with one of scales
  Shares<Ahead> shares(ahead, lines, x.count);
  for (int64_t v = 0; v < x.count; ++v) {
    shares.prefetch_next();
    NothingAhead nothing;
    Floats lanes[kRows];
    multiply(rows, nothing, x.of[v], lanes);
    for (int r = 0; r < kRows; ++r) take(v, r, lanes[r]);
  }
}

}  // namespace
}  // namespace tda
