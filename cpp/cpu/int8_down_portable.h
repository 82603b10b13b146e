// The down projection in decode without VNNI: y += h[i] row[i] over batches of int8 rows.
#pragma once

#include "cpu/int8_products.h"

namespace tda {
namespace {

/// Vectors of a group's values, and where their codes, their scale and their place in the row are.
struct Place {
  static constexpr int kCount = kGroup / kLanes;
  int64_t code, scale;

  Place(int i, int64_t half)
      : code(i * kLanes / kPart * 16 + i * kLanes / 16 % 2 * half + i * kLanes % 16),
        scale(i * kLanes / kPart) {}
};

/// y += sum over a batch of h[i] row[i]. y: whole groups
template <int kRows, class Ahead>
inline void add_down_batch(const Rows& w, const Batch& batch, Ahead& ahead, const float* h,
                           float* y) {
  float multipliers[kRows][kLanes];
  Int8Row rows[kRows];
  for (int64_t r = 0; r < batch.count; ++r) rows[r] = Int8Row(w, batch.id(r));
  for (int64_t g = 0; g < groups_of(w.n); ++g, y += kGroup) {
    const int64_t at = g * kInt8Scales % kLanes, half = rows[0].half(g);
    if (at == 0)
      for (int64_t r = 0; r < batch.count; ++r) {
        store(multipliers[r], h[r] * rows[r].scales.step() * rows[r].scales.from(g * kInt8Scales));
        ahead.prefetch_scales(r, g * kInt8Scales);
      }
    Floats sums[Place::kCount];
#pragma GCC unroll 16
    for (int i = 0; i < Place::kCount; ++i) sums[i] = load_as<Floats>(y + i * kLanes);
    for (int64_t r = 0; r < batch.count; ++r) {
      const std::uint8_t* const codes = rows[r].group(g);
      ahead.prefetch(r, g * kGroup);
#pragma GCC unroll 16
      for (int i = 0; i < Place::kCount; ++i) {
        const Place place(i, half);
        sums[i] = multiply_add(splat(multipliers[r][at + place.scale]),
                               code_floats(codes + place.code), sums[i]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < Place::kCount; ++i) store(y + i * kLanes, sums[i]);
  }
}

/// The same for several sequences, which share the rows' values.
template <int kRows, class Ahead>
inline void add_down_batch_each(const Rows& w, const Batch& batch, Ahead& ahead,
                                const float* const* h, const Vectors& vectors) {
  float multipliers[Vectors::kMost][kRows][kLanes];
  Int8Row rows[kRows];
  for (int64_t r = 0; r < batch.count; ++r) rows[r] = Int8Row(w, batch.id(r));
  for (int64_t g = 0; g < groups_of(w.n); ++g) {
    const int64_t at = g * kInt8Scales % kLanes, half = rows[0].half(g);
    alignas(64) float values[kRows][kGroup];
    for (int64_t r = 0; r < batch.count; ++r) {
      if (at == 0) {
        const Floats scales = rows[r].scales.from(g * kInt8Scales);
        for (int64_t v = 0; v < vectors.count; ++v)
          store(multipliers[v][r], h[v][r] * rows[r].scales.step() * scales);
        ahead.prefetch_scales(r, g * kInt8Scales);
      }
      ahead.prefetch(r, g * kGroup);
#pragma GCC unroll 16
      for (int i = 0; i < Place::kCount; ++i)
        store(values[r] + i * kLanes, code_floats(rows[r].group(g) + Place(i, half).code));
    }
    for (int64_t v = 0; v < vectors.count; ++v) {
      float* const y = vectors.y[v] + g * kGroup;
      Floats sums[Place::kCount];
#pragma GCC unroll 16
      for (int i = 0; i < Place::kCount; ++i) sums[i] = load_as<Floats>(y + i * kLanes);
      for (int64_t r = 0; r < batch.count; ++r)
#pragma GCC unroll 16
        for (int i = 0; i < Place::kCount; ++i)
          sums[i] = multiply_add(splat(multipliers[v][r][at + Place(i, half).scale]),
                                 load_as<Floats>(values[r] + i * kLanes), sums[i]);
#pragma GCC unroll 16
      for (int i = 0; i < Place::kCount; ++i) store(y + i * kLanes, sums[i]);
    }
  }
}

}  // namespace
}  // namespace tda
