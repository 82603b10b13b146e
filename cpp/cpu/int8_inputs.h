// The x of products with int8 rows, quantised: one scale for each scale of the weights. Included by
// kernel sources only, like simd.h.
#pragma once

#include "cpu/prefetch.h"

namespace tda {
namespace {

constexpr int kPart = kGroup / kInt8Scales;  // values that share a scale

/// kPart values of x, zeros past its end.
struct Part {
  static constexpr int kVectors = kPart / kLanes;
  Floats values[kVectors];
  float most;  // the largest |value|; not finite if a value is not

  Part(const float* x, int64_t n, int64_t first) {
    Ints largest = {};
    for (int i = 0; i < kVectors; ++i) {
      const int64_t at = first + i * kLanes;
      values[i] = at < n ? load_part<F32>(x + at, n - at) : Floats{};
      // As integers, which are in the order of the values; infinity is above all numbers, and NaN
      // above infinity, so that neither gets lost.
      const Ints sizes = (Ints)values[i] & 0x7fffffff;
      largest = sizes > largest ? sizes : largest;
    }
    int32_t bits = largest[0];
    for (int lane = 1; lane < kLanes; ++lane) bits = largest[lane] > bits ? largest[lane] : bits;
    most = __builtin_bit_cast(float, bits);
  }
  /// What makes `to` of the largest value.
  float inverse(float to) const { return most > 0.0f ? to / most : 0.0f; }
};

/// The nearest integers of |v| < 2^22, as floats; their low 16 bits are the integers' own.
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23

/// Calls body(size, first) for blocks of kMost vectors, then of half as many, and so on; size is a
/// constant.
template <int kMost, class Body>
[[gnu::always_inline]] inline void for_blocks(int64_t count, const Body& body, int64_t first = 0) {
  for (; first + kMost <= count; first += kMost) body(Constant<kMost>(), first);
  if constexpr (kMost > 1) for_blocks<kMost / 2>(count, body, first);
}

}  // namespace
}  // namespace tda
