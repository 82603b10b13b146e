// Four floats at a time, in the registers that every 64-bit CPU has. GCC and Clang vectorise few of
// the loops that choose how weights are rounded by themselves, because of the comparisons in them.
#pragma once

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace tda {

using Four = float __attribute__((vector_size(16)));

inline Four load_four(const float* from) {
  Four v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
inline void store_four(float* to, Four v) { std::memcpy(to, &v, sizeof v); }

inline Four min(Four a, Four b) {
#ifdef __SSE2__
  return _mm_min_ps(a, b);  // GCC makes four instructions of the line below
#else
  return a < b ? a : b;
#endif
}
inline Four max(Four a, Four b) {
#ifdef __SSE2__
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
inline Four clamp(Four v, float low, float high) {
  return min(max(v, Four{} + low), Four{} + high);
}

inline float least_of(Four v) { return std::min(std::min(v[0], v[1]), std::min(v[2], v[3])); }
inline float most_of(Four v) { return std::max(std::max(v[0], v[1]), std::max(v[2], v[3])); }

/// The nearest integers of numbers below 2^22.
inline Four nearest(Four v) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23
  return (v + kShift) - kShift;
}

/// Stores 16 integers of 0 to 255 as bytes.
inline void store_bytes(std::uint8_t* to, const Four (&v)[4]) {
#ifdef __SSE2__
  const auto eight = [](Four a, Four b) {
    return _mm_packs_epi32(_mm_cvttps_epi32(a), _mm_cvttps_epi32(b));
  };
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm_packus_epi16(eight(v[0], v[1]), eight(v[2], v[3])));
#else
  for (int i = 0; i < 16; ++i) to[i] = static_cast<std::uint8_t>(v[i / 4][i % 4]);
#endif
}

/// The sum of four(i) for i = 0, 4, ... below count, a multiple of 8, in an order that does not
/// depend on the CPU.
template <class Fours>
[[gnu::always_inline]] inline float sum_of(std::int64_t count, const Fours& four) {
  Four a{}, b{};
  for (std::int64_t i = 0; i < count; i += 8) {
    a += four(i);
    b += four(i + 4);
  }
  return ((a[0] + a[1]) + (a[2] + a[3])) + ((b[0] + b[1]) + (b[2] + b[3]));
}

}  // namespace tda
