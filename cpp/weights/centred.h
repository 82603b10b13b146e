// What the ways to round to centred bricks share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "base/four.h"
#include "weights/bricks.h"

namespace tda {

inline constexpr int kMostCentredScale = 127;
/// With the largest scale, a row's largest value is code 8 / 1.1.
inline constexpr float kLargestInSteps = 8 * kMostCentredScale / 1.1f;

/// Of a row whose largest value is `most`. The minimum keeps a tiny row's from underflowing to 0.
inline float step_of_row(float most) {
  return std::max(most / kLargestInSteps, std::numeric_limits<float>::denorm_min());
}

inline Four codes_of(Four values, Four inverse_step) {  // -8 ... 7
  return nearest(clamp(values * inverse_step, -8, 7));
}

/// Scales that put a group's largest value between these shares of code -8. Rests reach no further
/// than half a scale, so with them the largest value is clipped less.
struct ScalesTried {
  float first, step;
  int count;  // a multiple of 4
};
inline constexpr ScalesTried kAlone = {0.7f, 0.02f, 24}, kWithRests = {0.86f, 0.07f, 4};

/// Rounds a strip's rows to int4's centred bricks, see round_by_inputs.cpp.
void round_by_inputs(const Bricks& target, std::int64_t strip, const float* values,
                     const InputFactor& inputs);

}  // namespace tda
