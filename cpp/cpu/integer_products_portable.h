// Products of a few int8 rows with prepared x, with AVX2 and in portable C++.
#pragma once

#include "cpu/integer_inputs.h"

namespace tda {
namespace {

/// Lane i: kTimes * the sum of four codes * q.
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

/// Floats first ... first + kCount - 1 of kLanes, each repeated over kLanes / kCount lanes.
template <int kCount>
inline Floats spread(const float* all, int first) {
#if defined(__AVX2__)  // a load of the width it was stored with is forwarded
  Ints index;
  for (int lane = 0; lane < kLanes; ++lane) index[lane] = lane * kCount / kLanes;
  const __m256i from = _mm256_add_epi32((__m256i)index, _mm256_set1_epi32(first));
  return (Floats)_mm256_permutevar8x32_ps(_mm256_loadu_ps(all), from);
#else
  Floats out;
  for (int lane = 0; lane < kLanes; ++lane) out[lane] = all[first + lane * kCount / kLanes];
  return out;
#endif
}

/// lanes[r]: the dot product of row r (or of its high plane) and x, one partial sum per lane; `ahead`
/// prefetches meanwhile.
template <bool kExact, class Row, int kCount, class Ahead>
inline void multiply(const Row (&rows)[kCount], const Ahead& ahead, const Vector<Row>& x,
                     Floats (&lanes)[kCount]) {
  constexpr int64_t kGroups = kLanes / Row::kScales;
  constexpr int kPerVector = 2 * kVectorBytes * Row::kScales / kGroup;  // scales
  Floats sums[kCount] = {};
  for (int64_t g0 = 0; g0 < x.count; g0 += kGroups) {
    const int64_t s = g0 * Row::kScales;
    float scales[kCount][kLanes];
    for (int r = 0; r < kCount; ++r) {
      const Floats of_x = load_as<Floats>((kExact ? x.scales : x.coarse_scales) + s);
      store(scales[r], rows[r].scales.from(s) * of_x);
      ahead.prefetch_scales(r, s);
    }
    for (int64_t g = g0; g < min(g0 + kGroups, x.count); ++g) {
      const Pair& pair = x.pairs[g / 2];
#pragma GCC unroll 4
      for (int r = 0; r < kCount; ++r) {
        Bytes high[kParts], low[kParts];
        expand(rows[r].plane(0) + g * kGroupBytes, high);
        if (kExact) expand(rows[r].plane(1) + g * kGroupBytes, low);
        if (g % 2 == 0)
          for (int plane = 0; plane < (kExact ? 2 : 1); ++plane)
            ahead.prefetch(plane, r, g * kGroupBytes);
#pragma GCC unroll 4
        for (int part = 0; part < kParts / 2; ++part) {
          const int64_t first = part * kVectorBytes, at = g % 2 * kGroupBytes + first;
          const auto of_codes = [&](int i, const std::int8_t* q) {
            return kExact ? sums_of_four<16>(high[i], q) + sums_of_four<1>(low[i], q)
                          : sums_of_four<1>(high[i], q);
          };
          const auto products = [&](const std::int8_t (&q)[2][kPairBytes]) {
            return of_codes(part, q[0] + at) + of_codes(part + kParts / 2, q[1] + at);
          };
          const auto& start = kExact ? pair.start : pair.coarse_start;
          Ints integers = load_as<Ints>(start + at / 4) + products(pair.q);
          if (kExact && pair.has_residual)
            integers = (integers << 8) + load_as<Ints>(pair.residual_start + at / 4) +
                       products(pair.residual);
          const int64_t of_part = (g - g0) * Row::kScales + 2 * first * Row::kScales / kGroup;
          const Floats scale = spread<kPerVector>(scales[r], static_cast<int>(of_part));
          sums[r] = multiply_add(scale, to_floats(integers), sums[r]);
        }
      }
    }
  }
  for (int r = 0; r < kCount; ++r) lanes[r] = rows[r].scales.step() * sums[r];
}

/// Calls take(0, r, lanes) with those of each row.
template <bool kExact, class Row, int kCount, class Ahead, class Take>
[[gnu::always_inline]] inline void multiply_each(const Row (&rows)[kCount], const Ahead& ahead,
                                                 const Vector<Row>& x, const Take& take) {
  Floats lanes[kCount];
  multiply<kExact>(rows, ahead, x, lanes);
  for (int r = 0; r < kCount; ++r) take(0, r, lanes[r]);
}

// ---- several sequences ---------------------------------------------------------------------------

#if defined(__AVX2__)

/// Dot products of a row, the r-th of those that `ahead` knows, with kCount x, one partial sum per
/// lane: what each gets alone, from codes of 16 bits.
template <int kCount, class Row, class Ahead>
[[gnu::always_inline]] inline void multiply_wide(const Row& row, int r, const Ahead& ahead,
                                                 const WideGroup* x, int64_t groups,
                                                 Floats* lanes) {
  constexpr int64_t kGroups = kLanes / Row::kScales;
  const __m256i low_four = _mm256_set1_epi8(15), low_byte = _mm256_set1_epi16(255);
  Floats sums[kCount];
#pragma GCC unroll 8
  for (int v = 0; v < kCount; ++v) sums[v] = Floats{};
  for (int64_t g0 = 0; g0 < groups; g0 += kGroups) {
    float scales[kLanes];
    store(scales, row.scales.from(g0 * Row::kScales));
    ahead.prefetch_scales(r, g0 * Row::kScales);
    for (int64_t g = g0; g < min(g0 + kGroups, groups); ++g) {
      const __m256i high = load_as<__m256i>(row.plane(0) + g * kGroupBytes);
      const __m256i low = load_as<__m256i>(row.plane(1) + g * kGroupBytes);
      if (g % 2 == 0)
        for (int plane = 0; plane < 2; ++plane) ahead.prefetch(plane, r, g * kGroupBytes);
      const __m256i lower = _mm256_or_si256(_mm256_slli_epi16(_mm256_and_si256(high, low_four), 4),
                                            _mm256_and_si256(low, low_four));
      const __m256i upper = _mm256_or_si256(_mm256_andnot_si256(low_four, high),
                                            _mm256_and_si256(_mm256_srli_epi16(low, 4), low_four));
      const __m256i codes[4] = {_mm256_and_si256(lower, low_byte), _mm256_srli_epi16(lower, 8),
                                _mm256_and_si256(upper, low_byte), _mm256_srli_epi16(upper, 8)};
      constexpr int kPerVector = Row::kScales;
      const Floats of_row = spread<kPerVector>(scales, static_cast<int>((g - g0) * kPerVector));
      const WideGroup* const of_group = x + g * kCount;
#pragma GCC unroll 8
      for (int v = 0; v < kCount; ++v) {
        const WideGroup& group = of_group[v];
        __m256i integers = load_as<__m256i>(group.start);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          integers =
              _mm256_add_epi32(integers, _mm256_madd_epi16(codes[i], load_as<__m256i>(group.q[i])));
        sums[v] = multiply_add(of_row * load_as<Floats>(group.scales), to_floats((Ints)integers),
                               sums[v]);
      }
    }
  }
  const float step = row.scales.step();
#pragma GCC unroll 8
  for (int v = 0; v < kCount; ++v) lanes[v] = step * sums[v];
}

template <bool kExact, class Row, int kRows, class Ahead, class Take>
[[gnu::always_inline]] inline void multiply_each(const Row (&rows)[kRows], const Ahead& ahead,
                                                 const VectorsOf<Row>& x, const Take& take) {
  static_assert(kExact);
  Floats lanes[kRows][Vectors::kMost];
  for_blocks<VectorsOf<Row>::kMostAtOnce>(
      x.count, [&](auto size, int64_t first) __attribute__((always_inline)) {
        const WideGroup* const block = x.wide.get() + first * x.groups;
        for (int r = 0; r < kRows; ++r)
          if (first == 0)
            multiply_wide<size.value>(rows[r], r, ahead, block, x.groups, lanes[r]);
          else
            multiply_wide<size.value>(rows[r], r, NothingAhead(), block, x.groups,
                                      lanes[r] + first);
      });
  for (int64_t v = 0; v < x.count; ++v)
    for (int r = 0; r < kRows; ++r) take(v, r, lanes[r][v]);
}

#else

template <bool kExact, class Row, int kCount, class Ahead, class Take>
[[gnu::always_inline]] inline void multiply_each(const Row (&rows)[kCount], const Ahead& ahead,
                                                 const FewVectors<Row>& x, const Take& take) {
  multiply_each<kExact>(rows, ahead, x.of[0], take);
  for (int64_t v = 1; v < x.count; ++v)
    multiply_each<kExact>(rows, NothingAhead(), x.of[v],
                          [&](int64_t, int r, Floats lanes) { take(v, r, lanes); });
}

#endif

}  // namespace
}  // namespace tda
