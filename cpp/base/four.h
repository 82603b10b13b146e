// Four floats at a time, in the registers that every 64-bit CPU has, or eight in sources compiled
// for AVX2. GCC and Clang vectorise few of the loops that choose how weights are rounded by
// themselves, because of the comparisons in them.
//
// Internal linkage on purpose: sources compiled for different instruction sets include this, and
// the linker must not merge their copies.
#pragma once

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace tda {

using Four = float __attribute__((vector_size(16)));

template <class V>
static inline V load(const float* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class V>
static inline void store(float* to, V v) {
  std::memcpy(to, &v, sizeof v);
}
[[maybe_unused]] static inline Four load_four(const float* from) { return load<Four>(from); }
[[maybe_unused]] static inline void store_four(float* to, Four v) { store(to, v); }

[[maybe_unused]] static inline Four min(Four a, Four b) {
#ifdef __SSE2__
  return _mm_min_ps(a, b);  // GCC makes four instructions of the line below
#else
  return a < b ? a : b;
#endif
}
[[maybe_unused]] static inline Four max(Four a, Four b) {
#ifdef __SSE2__
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

/// Stores 16 integers of 0 to 255 as bytes.
[[maybe_unused]] static inline void store_bytes(std::uint8_t* to, const Four (&v)[4]) {
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

#ifdef __AVX2__
using Eight = float __attribute__((vector_size(32)));
[[maybe_unused]] static inline Eight min(Eight a, Eight b) { return _mm256_min_ps(a, b); }
[[maybe_unused]] static inline Eight max(Eight a, Eight b) { return _mm256_max_ps(a, b); }
[[maybe_unused]] static inline void store_bytes(std::uint8_t* to, const Eight (&v)[2]) {
  store_bytes(to, {_mm256_castps256_ps128(v[0]), _mm256_extractf128_ps(v[0], 1),
                   _mm256_castps256_ps128(v[1]), _mm256_extractf128_ps(v[1], 1)});
}
#endif

template <class V>
static inline V clamp(V v, float low, float high) {
  return min(max(v, V{} + low), V{} + high);
}

[[maybe_unused]] static inline float least_of(Four v) {
  return std::min(std::min(v[0], v[1]), std::min(v[2], v[3]));
}
[[maybe_unused]] static inline float most_of(Four v) {
  return std::max(std::max(v[0], v[1]), std::max(v[2], v[3]));
}

/// The nearest integers of numbers below 2^22.
template <class V>
static inline V nearest(V v) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23
  return (v + kShift) - kShift;
}

/// The sum of at(i), vectors of values i and behind, for i < count, a multiple of 8, in an order
/// that depends neither on the CPU nor on the vectors.
template <class At>
[[gnu::always_inline]] static inline float sum_of(std::int64_t count, const At& at) {
  using V = decltype(at(0));
  constexpr std::int64_t kStep = sizeof(V) / sizeof(float);
  V sums[8 / kStep] = {};
  for (std::int64_t i = 0; i < count; i += 8)
    for (std::int64_t k = 0; k < 8 / kStep; ++k) sums[k] += at(i + k * kStep);
  const auto sum = [&](std::int64_t i) { return sums[i / kStep][i % kStep]; };
  return ((sum(0) + sum(1)) + (sum(2) + sum(3))) + ((sum(4) + sum(5)) + (sum(6) + sum(7)));
}

}  // namespace tda
