// Products of bricks in plain loops: the specification of the others.
#pragma once

#include "cpu/bricks.h"

namespace tda {
namespace {

using std::int64_t;

inline int code_of(std::uint8_t byte, int64_t row) { return row < 32 ? byte & 15 : byte >> 4; }

/// The products of row r's codes, less 8, and the inputs of a half of a brick.
inline float dot_of(const BrickCodes& codes, int64_t r, const HighInputs& x, int part) {
  const auto code = [&](int64_t i) { return code_of(codes[i / 4][4 * (r % 32) + i % 4], r); };
  int dot = 0, excess = 0;
  for (int64_t i = part * kScaleInputs; i < (part + 1) * kScaleInputs; ++i) dot += code(i) * x.q[i];
  float centred = x.scale * static_cast<float>(dot) - 8 * x.sums[part];
  if (x.excess_quad >= 0 && x.excess_quad / 4 == part) {
    for (int64_t k = 0; k < 4; ++k) excess += code(4 * x.excess_quad + k) * x.excess[k];
    centred += x.excess_scale * static_cast<float>(excess);
  }
  return centred;
}

inline void add_brick(const CentredBrick& brick, const HighInputs& x, float* sums) {
  for (int64_t r = 0; r < kStripRows; ++r)
    for (int part = 0; part < 2; ++part)
      sums[r] += brick.scales[part][r] * dot_of(brick.codes, r, x, part);
}

inline void add_brick(const LineBrick& brick, const HighInputs& x, float* sums) {
  for (int64_t r = 0; r < kStripRows; ++r) {
    float dot = 0;
    for (int part = 0; part < 2; ++part) dot += dot_of(brick.codes, r, x, part) + 8 * x.sums[part];
    sums[r] +=
        f16_to_f32(brick.scales[r]) * dot + f16_to_f32(brick.minima[r]) * (x.sums[0] + x.sums[1]);
  }
}

template <class Brick>
void add_bricks(const Bricks& w, Span strips, Span blocks, const HighVectors& vectors) {
  for (int64_t s = strips.first; s < strips.end; ++s)
    for (int64_t b = blocks.first; b < blocks.end; ++b)
      for (int64_t v = 0; v < vectors.count; ++v)
        add_brick(w.brick<Brick>(s, b), vectors.x[v][b - blocks.first],
                  vectors.sums[v] + (s - strips.first) * kStripRows);
}

void add_rests(const Bricks& w, Span strips, const RestInputs* x, int64_t count, float* sums) {
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
