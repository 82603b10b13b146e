// Products of int8 rows and prepared x, with AVX2.
//
// Multiplying bytes takes VPMADDUBSW, which saturates, and VPMADDWD; numbers of 16 bits take VPMADDWD
// alone. So codes are widened, and x is quantised to 16 bits. Codes keep their offset, and
// accumulators start at -kOffset * sum(q).
#pragma once

#include "cpu/int8_inputs.h"

namespace tda {
namespace {

/// A group of x: the values that are multiplied with the even and the odd bytes of a row's first 32
/// codes, then of its next. The lanes of a scale's values are side by side.
struct alignas(32) GroupOfX {
  std::int16_t q[4][16];
  float scales[kLanes];
  int32_t start[kLanes];  // -kOffset * sum(q) of the lane
};

int64_t prepared_bytes(int64_t n) { return groups_of(n) * sizeof(GroupOfX); }

/// A part of x that is not finite gets a scale that is not, with which all products become NaN or
/// infinite.
void prepare(const float* x, int64_t n, void* prepared) {
  constexpr float kMost = 32767;
  constexpr int kLanesOfScale = kLanes / kInt8Scales;
  auto* const groups = static_cast<GroupOfX*>(prepared);
  for (int64_t g = 0; g < groups_of(n); ++g) {
    GroupOfX& out = groups[g];
    for (int s = 0; s < kInt8Scales; ++s) {
      const Part part(x, n, g * kGroup + s * kPart);
      const float inverse = part.inverse(kMost);
      Ints q[Part::kVectors];
      for (int i = 0; i < Part::kVectors; ++i) q[i] = (Ints)(part.values[i] * inverse + kRound);
      for (int i = 0; i < kPart; ++i)
        out.q[i / 16 * 2 + i % 2][8 * s + i % 16 / 2] =
            static_cast<std::int16_t>(q[i / kLanes][i % kLanes]);
      for (int lane = s * kLanesOfScale; lane < (s + 1) * kLanesOfScale; ++lane) {
        out.scales[lane] = part.most / kMost;
        out.start[lane] = 0;
        for (int i = 0; i < 4; ++i)
          out.start[lane] -= Int8Row::kOffset * (out.q[i][2 * lane] + out.q[i][2 * lane + 1]);
      }
    }
  }
}

/// The two numbers of a group's scales, from `first` on, in the lanes of their values.
inline __m256 lanes_of_scales(const float* all, int64_t first) {
  const __m256i lanes = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
  return _mm256_permutevar8x32_ps(
      _mm256_loadu_ps(all), _mm256_add_epi32(lanes, _mm256_set1_epi32(static_cast<int>(first))));
}

/// lanes[r][v] = the dot products of rows, from the `first` on of those that `ahead` knows, and each of
/// kCount x, one partial sum per lane. x: the same group of all x lies together
template <int kCount, int kRows, class Ahead>
[[gnu::always_inline]] inline void multiply(const Int8Row* rows, int first, Ahead& ahead,
                                            const GroupOfX* x, int64_t groups,
                                            Floats (&lanes)[kRows][kCount]) {
  constexpr int64_t kGroups = kLanes / kInt8Scales;  // whose scales fill a vector
  const __m256i low_byte = _mm256_set1_epi16(255);
  __m256 sums[kRows][kCount];
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kCount; ++v) sums[r][v] = _mm256_setzero_ps();
  for (int64_t g0 = 0; g0 < groups; g0 += kGroups) {
    float scales[kRows][kLanes];
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      store(scales[r], rows[r].scales.from(g0 * kInt8Scales));
      ahead.prefetch_scales(first + r, g0 * kInt8Scales);
    }
    for (int64_t g = g0; g < min(g0 + kGroups, groups); ++g, x += kCount) {
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
        const auto* const at = rows[r].group(g);
        const __m256i here = load_as<__m256i>(at), there = load_as<__m256i>(at + rows[r].half(g));
        ahead.prefetch(first + r, g * kGroup);
        const __m256i codes[4] = {_mm256_and_si256(here, low_byte), _mm256_srli_epi16(here, 8),
                                  _mm256_and_si256(there, low_byte), _mm256_srli_epi16(there, 8)};
        const __m256 of_row = lanes_of_scales(scales[r], (g - g0) * kInt8Scales);
#pragma GCC unroll 8
        for (int v = 0; v < kCount; ++v) {
          __m256i integers = load_as<__m256i>(x[v].start);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i)
            integers = _mm256_add_epi32(integers,
                                        _mm256_madd_epi16(codes[i], load_as<__m256i>(x[v].q[i])));
          const __m256 scale = _mm256_mul_ps(of_row, _mm256_loadu_ps(x[v].scales));
          sums[r][v] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(integers), sums[r][v]);
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kCount; ++v) lanes[r][v] = rows[r].scales.step() * (Floats)sums[r][v];
}

}  // namespace
}  // namespace tda
