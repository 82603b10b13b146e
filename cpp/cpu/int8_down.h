// The down projection in decode: y += h[i] row[i] over batches of int8 rows.
#pragma once

#if !defined(__AVX2__)

#include "cpu/int8_down_portable.h"

#else

#if defined(__AVX512VNNI__)
#include "cpu/int8_down_avx512.h"
#else
#include "cpu/int8_down_avx2.h"
#endif

// Products of integers add up RowCodes::kRows rows at once: h and the rows' scales are quantised, too.

namespace tda {
namespace {

/// Addresses and multipliers of a batch's rows, for one block of scales after the other.
template <int kRows>
struct DownBatch {
  using Multipliers = QuantizedMultipliers<kRows>;
  static constexpr int64_t kGroups = Multipliers::kBlockScales / kInt8Scales;  // of a block

  int64_t count, groups;
  const std::uint8_t* codes[kRows];
  const std::int8_t* scales[kRows];
  float steps[kRows];

  DownBatch(const Rows& w, const Batch& batch) : count(batch.count), groups(groups_of(w.n)) {
    for (int64_t r = 0; r < kRows; ++r) {
      const Int8Row row(w, batch.id(r));
      codes[r] = row.data;
      scales[r] = row.scales.scales;
      steps[r] = row.scales.step();
    }
  }
  /// The rows' multipliers h * step, relative to the largest. Returns the value of a step of sums.
  float relative(const float* h, std::int16_t* out) const {
    alignas(64) float parts[kLargeDownBatch] = {};
    for (int64_t r = 0; r < count; ++r) parts[r] = h[r] * steps[r];
    return to_relative(parts, 1.0f / 256, out);
  }
  void quantize(int64_t g0, const std::int16_t* relative, Multipliers& out) const {
    out.quantize(scales, g0 * kInt8Scales, relative, count, (groups - g0) * kInt8Scales);
  }
  /// Calls body(first group, how many) for at most kDownGroups of a block at a time.
  template <class Body>
  [[gnu::always_inline]] void for_groups(int64_t g0, bool in_order, const Body& body) const {
    for (int64_t i = 0; i < kGroups / kDownGroups; ++i) {
      const int64_t line = i / 4 * 4 + line_of_four(static_cast<int>(i % 4), in_order);
      const int64_t g = g0 + kDownGroups * line;
      if (g < groups) body(g, min(groups - g, kDownGroups));
    }
  }
};

/// y += sum over a batch of h[i] row[i]. y: whole groups
template <int kRows, class Ahead>
inline void add_down_batch(const Rows& w, const Batch& batch, Ahead& ahead, const float* h,
                           float* y) {
  using Down = DownBatch<kRows>;
  const Down down(w, batch);
  alignas(32) std::int16_t relative[kLargeDownBatch];
  const float step = down.relative(h, relative);
  typename Down::Multipliers multipliers;
  for (int64_t g0 = 0; g0 < down.groups; g0 += Down::kGroups) {
    down.quantize(g0, relative, multipliers);
    for (int64_t r = 0; r < kRows; ++r) ahead.prefetch_scales(r, g0 * kInt8Scales);
    down.for_groups(g0, Ahead::kInOrder,
                    [&](int64_t g, int64_t left) __attribute__((always_inline)) {
                      const int64_t at = (g - g0) * kInt8Scales;
                      DownSums sums(multipliers, at);
                      for (int64_t q = 0; RowCodes::kRows * q < down.count; ++q) {
                        RowCodes codes;
                        codes.load(down.codes, RowCodes::kRows * q, g, left, down.groups, ahead);
                        sums.add(multipliers, q, at, codes);
                      }
                      sums.finish(step, left, y + g * kGroup);
                    });
  }
}

/// The same for several sequences, which share the rows' codes. Each gets the same integers as alone.
template <int kRows, class Ahead>
inline void add_down_batch_each(const Rows& w, const Batch& batch, Ahead& ahead,
                                const float* const* h, const Vectors& vectors) {
  using Down = DownBatch<kRows>;
  const Down down(w, batch);
  alignas(32) std::int16_t relative[Vectors::kMost][kLargeDownBatch];
  float steps[Vectors::kMost];
  typename Down::Multipliers multipliers[Vectors::kMost];
  for (int64_t v = 0; v < vectors.count; ++v) steps[v] = down.relative(h[v], relative[v]);
  const int64_t lines = kRows * (down.groups + 1);
  const int64_t passes = (down.groups + kDownGroups - 1) / kDownGroups * vectors.count;
  Shares<Ahead> shares(ahead, lines, passes);
  for (int64_t g0 = 0; g0 < down.groups; g0 += Down::kGroups) {
    for (int64_t v = 0; v < vectors.count; ++v) down.quantize(g0, relative[v], multipliers[v]);
    down.for_groups(g0, Ahead::kInOrder, [&](int64_t g, int64_t left) {
      const int64_t at = (g - g0) * kInt8Scales;
      RowCodes codes[kRows / RowCodes::kRows];
      NothingAhead nothing;
      for (int64_t q = 0; RowCodes::kRows * q < down.count; ++q)
        codes[q].load(down.codes, RowCodes::kRows * q, g, left, down.groups, nothing);
      for (int64_t v = 0; v < vectors.count; ++v) {
        shares.prefetch_next();
        DownSums sums(multipliers[v], at);
        for (int64_t q = 0; RowCodes::kRows * q < down.count; ++q)
          sums.add(multipliers[v], q, at, codes[q]);
        sums.finish(steps[v], left, vectors.y[v] + g * kGroup);
      }
    });
  }
}

}  // namespace
}  // namespace tda

#endif
