// Products of int8 rows and prepared x in portable C++.
#pragma once

#include "cpu/int8_inputs.h"

namespace tda {
namespace {

/// A group of x: x = scale * q.
struct GroupOfX {
  std::int16_t q[kInt8Scales][kPart];
  float scales[kInt8Scales];
};

int64_t prepared_bytes(int64_t n) { return groups_of(n) * sizeof(GroupOfX); }

/// A part of x that is not finite gets a scale that is not, with which all products become NaN or
/// infinite.
void prepare(const float* x, int64_t n, void* prepared) {
  constexpr float kMost = 32767;
  auto* const groups = static_cast<GroupOfX*>(prepared);
  for (int64_t g = 0; g < groups_of(n); ++g)
    for (int s = 0; s < kInt8Scales; ++s) {
      const Part part(x, n, g * kGroup + s * kPart);
      const float inverse = part.inverse(kMost);
      for (int i = 0; i < kPart; ++i) {
        const float rounded = part.values[i / kLanes][i % kLanes] * inverse + kRound;
        groups[g].q[s][i] = static_cast<std::int16_t>(__builtin_bit_cast(int32_t, rounded));
      }
      groups[g].scales[s] = part.most / kMost;
    }
}

/// lanes[r][v] = the dot products of rows, from the `first` on of those that `ahead` knows, and each of
/// kCount x, one partial sum per lane. x: the same group of all x lies together
template <int kCount, int kRows, class Ahead>
inline void multiply(const Int8Row* rows, int first, Ahead& ahead, const GroupOfX* all,
                     int64_t groups, Floats (&lanes)[kRows][kCount]) {
  for (int r = 0; r < kRows; ++r) {
    const Int8Row& row = rows[r];
    for (int v = 0; v < kCount; ++v) lanes[r][v] = Floats{};
    for (int64_t g = 0; g < groups; ++g) {
      const GroupOfX* const x = all + g * kCount;
      ahead.prefetch(first + r, g * kGroup);
      for (int s = 0; s < kInt8Scales; ++s) {
        const std::uint8_t* const here = row.group(g) + 16 * s;
        const std::uint8_t* const there = here + row.half(g);
        std::int16_t codes[kPart];
        for (int i = 0; i < 16; ++i) {
          codes[i] = static_cast<std::int16_t>(here[i] - Int8Row::kOffset);
          codes[16 + i] = static_cast<std::int16_t>(there[i] - Int8Row::kOffset);
        }
        const float of_row = row.scales[g * kInt8Scales + s];
        for (int v = 0; v < kCount; ++v) {
          int32_t sum = 0;
          for (int i = 0; i < kPart; ++i) sum += codes[i] * x[v].q[s][i];
          lanes[r][v][s] += of_row * x[v].scales[s] * static_cast<float>(sum);
        }
      }
    }
    ahead.prefetch_scales(first + r, 0);
  }
}

}  // namespace
}  // namespace tda
