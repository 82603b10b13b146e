// The graded format's products in plain loops: the specification of the others.
#pragma once

#include "cpu/graded.h"

namespace tda {
namespace {

using std::int64_t;

inline int code_of(std::uint8_t byte, int64_t row) { return row < 32 ? byte & 15 : byte >> 4; }

inline void add_brick(const Brick& brick, const HighInputs& x, float* sums) {
  for (int64_t r = 0; r < kStripRows; ++r) {
    const auto code = [&](int64_t i) {
      return code_of(brick.codes[i / 4][4 * (r % 32) + i % 4], r);
    };
    int dot = 0, excess = 0;
    for (int64_t i = 0; i < kBlockInputs; ++i) dot += code(i) * x.q[i];
    float centred = x.scale * static_cast<float>(dot) - 8 * x.sum;
    if (x.excess_quad >= 0) {
      for (int64_t k = 0; k < 4; ++k) excess += code(4 * x.excess_quad + k) * x.excess[k];
      centred += x.excess_scale * static_cast<float>(excess);
    }
    sums[r] += brick.scales[r] * centred + 16 * brick.offsets[r] * x.sum;
  }
}

void add_high(const Graded& w, Span strips, Span blocks, const HighInputs* x, float* sums) {
  for (int64_t s = strips.first; s < strips.end; ++s)
    for (int64_t b = blocks.first; b < blocks.end; ++b)
      add_brick(w.brick(s, b), x[b - blocks.first], sums + (s - strips.first) * kStripRows);
}

void add_rests(const Graded& w, Span strips, const RestInputs* x, int64_t count, float* sums) {
  for (; count > 0; count -= kBlockInputs, ++x)
    for (int64_t s = strips.first; s < strips.end; ++s)
      for (int64_t r = 0; r < kStripRows; ++r) {
        int dot = 0;
        for (int k = 0; k < x->count; ++k)
          dot += (code_of(w.rest(x->ids[k])[32 * s + r % 32], r) - 8) * x->q[k];
        sums[(s - strips.first) * kStripRows + r] += x->scale * static_cast<float>(dot);
      }
}

}  // namespace
}  // namespace tda
