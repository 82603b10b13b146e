// Batches of down rows without VNNI.
#pragma once

#include "cpu/down_rows_ahead.h"

namespace tda {
namespace {

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

}  // namespace
}  // namespace tda
