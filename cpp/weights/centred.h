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
[[maybe_unused]] static inline float step_of_row(float most) {
  return std::max(most / kLargestInSteps, std::numeric_limits<float>::denorm_min());
}

template <class V>
static inline V codes_of(V values, V inverse_step) {  // -8 ... 7
  return nearest(clamp(values * inverse_step, -8, 7));
}

/// Scales that put a group's largest value between these shares of code -8. Rests reach no further
/// than half a scale, so with them the largest value is clipped less.
struct ScalesTried {
  float first, step;
  int count;
};
inline constexpr ScalesTried kAlone = {0.7f, 0.02f, 24}, kWithRests = {0.86f, 0.07f, 4};

template <class V>
struct FoundScales {
  V scales, errors;
};
/// The scales of least squared error for 16 values of some groups each, [i] holding value i of all
/// of them; 0 where none is better than zeros. Several groups at once, because one alone is a chain
/// of operations that wait for each other. weighted(i, v): v times the weight of i's squares
template <class V, class Weighted>
[[gnu::always_inline]] static inline FoundScales<V> search_scales(const V (&values)[kScaleInputs],
                                                                  const ScalesTried& tried,
                                                                  const Weighted& weighted) {
  V smallest{}, largest{}, best{}, least{};  // least: first of zeros
  for (std::int64_t i = 0; i < kScaleInputs; ++i) {
    smallest = min(smallest, values[i]);
    largest = max(largest, values[i]);
    least += weighted(i, values[i]) * values[i];
  }
  const V unit = (largest >= -smallest ? largest : smallest) / -8;
  constexpr int kTogether = 2;
  for (int first = 0; first < tried.count; first += kTogether) {
    V scales[kTogether], inverses[kTogether], errors[kTogether] = {};
    for (int k = 0; k < kTogether; ++k) {
      const float share = tried.first + tried.step * static_cast<float>(first + k);
      scales[k] = clamp(nearest(unit * share), -kMostCentredScale, kMostCentredScale);
      inverses[k] = scales[k] == 0 ? V{} : 1 / scales[k];
    }
    for (std::int64_t i = 0; i < kScaleInputs; ++i)
      for (int k = 0; k < kTogether; ++k) {
        const V missed = values[i] - scales[k] * codes_of(values[i], inverses[k]);
        errors[k] += weighted(i, missed) * missed;
      }
    for (int k = 0; k < kTogether; ++k) {
      best = errors[k] < least ? scales[k] : best;
      least = min(errors[k], least);
    }
  }
  return {best, least};
}

/// Rounds a strip's rows to int4's centred bricks, see round_by_inputs.cpp.
void round_by_inputs(const Bricks& target, std::int64_t strip, const float* values,
                     const InputFactor& inputs);

}  // namespace tda
