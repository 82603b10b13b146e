// Float vectors and operations on them, by GCC/Clang vector extensions, which compile to AVX-512,
// AVX2, SSE2 or NEON as the flags allow. Included by kernel sources only, which are compiled once
// per instruction set. Everything has internal linkage, or the linker could keep, say, the AVX-512
// copy of a function for all instruction sets.
#pragma once

#include <tda/model_config.h>

#include <cstdint>

#include "backend/kv_format.h"
#include "base/half.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace tda {
namespace {

/// A number as an argument that is known when compiling.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

using std::int32_t;
using std::int64_t;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / 4;

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef std::uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef std::uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
typedef float Quad __attribute__((vector_size(16)));

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

constexpr int64_t kLineBytes = 64;

/// GCC 12 treats a function that only prefetches as pure and drops calls of it; the empty asm
/// prevents that.
template <int kLocality>
[[gnu::always_inline]] inline void prefetch(const void* line) {
  __builtin_prefetch(line, 0, kLocality);
  asm volatile("");
}
/// For lines that may be read again. Not into L1, which has few miss buffers: loads would wait
/// behind the prefetches.
[[gnu::always_inline]] inline void prefetch_l2(const void* line) { prefetch<2>(line); }
/// For lines that are read once: into L1 alone. Such a line is dropped when evicted, while in the
/// other levels it would displace lines that then have to be written to the next level.
[[gnu::always_inline]] inline void prefetch_nta(const void* line) { prefetch<0>(line); }
/// For lines that have been prefetched before and are read soon.
[[gnu::always_inline]] inline void prefetch_l1(const void* line) { prefetch<3>(line); }

#if defined(__AVX512F__)
/// 64 bytes, under a mask that the compiler does not know to be full. A masked load does not train
/// Zen 5's hardware prefetcher, whose requests compete with software prefetches: one core then
/// reads prefetched lines at 41 GB/s, otherwise at 37.
inline __m512i load_no_hw_prefetch(const void* p) {
  __mmask8 full = 0xff;
  asm("" : "+Yk"(full));
  return _mm512_maskz_loadu_epi64(full, p);
}
inline __m256i load_half_no_hw_prefetch(const void* p) {
  __mmask8 full = 0xff;
  asm("" : "+Yk"(full));
  return _mm256_maskz_loadu_epi32(full, p);
}
#endif

// Loads and stores may be unaligned.

template <class Vector, class T>
inline Vector load_as(const T* p) {
  Vector v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof v); }
inline Floats splat(float s) { return s - Floats{}; }
inline Floats min(Floats a, Floats b) { return a < b ? a : b; }
/// a b + c, rounded once where the instruction set can: compilers may or may not do so with a sum of
/// a product, and results must not depend on the loop it stands in.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
inline Floats max(Floats a, Floats b) { return a > b ? a : b; }

inline float sum(Floats v) {
  Quad quads[kLanes / 4];
  __builtin_memcpy(quads, &v, sizeof v);
  Quad total = quads[0];
  for (int i = 1; i < kLanes / 4; ++i) total += quads[i];
  return (total[0] + total[1]) + (total[2] + total[3]);
}

/// One stage of `sums`: a lane whose index has the bit `distance` is taken from b, otherwise from
/// a, and the lane whose index differs in that bit is added to it.
template <int distance>
inline Floats fold(Floats a, Floats b) {
  Words own, other;
  for (int i = 0; i < kLanes; ++i) {
    const int from = i & distance ? kLanes : 0;
    own[i] = from + i;
    other[i] = from + (i ^ distance);
  }
#if defined(__clang__)
  Floats x, y;
  for (int i = 0; i < kLanes; ++i) {
    x[i] = own[i] < kLanes ? a[own[i]] : b[own[i] - kLanes];
    y[i] = other[i] < kLanes ? a[other[i]] : b[other[i] - kLanes];
  }
  return x + y;
#else
  return __builtin_shuffle(a, b, own) + __builtin_shuffle(a, b, other);
#endif
}

/// The stages of `sums` up to the last, for kLanes / 2 vectors.
inline Floats half_sums(const Floats* v) {
  Floats s[kLanes / 4];
#pragma GCC unroll 4
  for (int i = 0; i < kLanes / 4; ++i) s[i] = fold<1>(v[2 * i], v[2 * i + 1]);
  if constexpr (kLanes >= 8)
#pragma GCC unroll 2
    for (int i = 0; i < kLanes / 8; ++i) s[i] = fold<2>(s[2 * i], s[2 * i + 1]);
  if constexpr (kLanes >= 16) s[0] = fold<4>(s[0], s[1]);
  return s[0];
}
inline Floats join_halves(Floats a, Floats b) { return fold<kLanes / 2>(a, b); }

/// Lane i is the sum of v[i]'s lanes, i < kLanes, added in an order that does not depend on i.
inline Floats sums(const Floats* v) { return join_halves(half_sums(v), half_sums(v + kLanes / 2)); }

/// GCC compiles __builtin_convertvector to four instructions; these are one each.
inline Words widen(Halves v) {
#if defined(__AVX512F__)
  return (Words)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v);
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, Words);
#endif
}

/// kLanes signed bytes as floats.
inline Floats signed_floats(const std::int8_t* p) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  Floats out;
  for (int i = 0; i < kLanes; ++i) out[i] = p[i];
  return out;
#endif
}

#if defined(__F16C__)
/// kLanes numbers in f16 as floats.
inline Floats half_floats(const std::uint16_t* p) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#endif
}
#endif

// ---- element formats of arrays ------------------------------------------------------------------

struct F32 {
  using T = float;
  static Floats load(const T* p) { return load_as<Floats>(p); }
  static float load_one(T v) { return v; }
  static T store_one(float v) { return v; }
};

struct Bf16 {
  using T = std::uint16_t;
  static Floats load(const T* p) { return (Floats)(widen(load_as<Halves>(p)) << 16); }
  static float load_one(T v) { return bf16_to_f32(v); }
  static T store_one(float v) { return f32_to_bf16(v); }
};

/// Keys and values of 8 bits; the groups' scales, by which they are multiplied, follow a row's
/// elements.
struct Int8Cache {
  using T = std::int8_t;
  static Floats load(const T* p) { return signed_floats(p); }
  static float load_one(T v) { return v; }
};

/// Elements from one row of a cache to the next.
template <class Format>
constexpr int64_t cache_stride(int64_t n) {
  return n;
}
template <>
constexpr int64_t cache_stride<Int8Cache>(int64_t n) {
  return kv_row_bytes(KvFormat::int8, n);
}
/// The scale of element i of a row of n, as bf16, as f32, and in all lanes.
inline std::uint16_t cache_scale_bits(const std::int8_t* row, int64_t n, int64_t i) {
  std::uint16_t bits;
  __builtin_memcpy(&bits, row + n + 2 * (i / kKvGroup), 2);
  return bits;
}
inline float cache_scale(const std::int8_t* row, int64_t n, int64_t i) {
  return bf16_to_f32(cache_scale_bits(row, n, i));
}
inline Floats splat_cache_scale(const std::int8_t* row, int64_t n, int64_t i) {
#if defined(__AVX512BW__)
  const __m512i twice = _mm512_set1_epi16(static_cast<short>(cache_scale_bits(row, n, i)));
  return (Floats)_mm512_slli_epi32(twice, 16);
#elif defined(__AVX2__)
  const __m256i twice = _mm256_set1_epi16(static_cast<short>(cache_scale_bits(row, n, i)));
  return (Floats)_mm256_slli_epi32(twice, 16);
#else
  return splat(cache_scale(row, n, i));
#endif
}

/// The first `count` elements or a whole vector if there are more, padded with zeros.
template <class Format>
inline Floats load_part(const typename Format::T* p, int64_t count) {
  if (count >= kLanes) return Format::load(p);
  typename Format::T part[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = p[i];
  return Format::load(part);
}
inline void store_part(float* p, Floats v, int64_t count) {
  if (count >= kLanes) return store(p, v);
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
}

// ---- functions --------------------------------------------------------------------------------

/// Relative error about 1e-7; 0 below -87.3, finite above 88. exp(x) = 2^n exp(r), |r| <= ln 2 / 2,
/// with the polynomial of Cephes' expf.
inline Floats exp(Floats x) {
  const float round =
      12582912.0f;  // 1.5 * 2^23; adding it puts the nearest integer in the low bits
  const Floats limited = x > 88.0f ? splat(88.0f) : x;
  const Floats shifted = limited * 1.44269504f + round;
  const Floats n = shifted - round;
  const Floats r = (limited - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Floats power = (Floats)(((Words)shifted - (0x4b400000 - 127)) << 23);
  return x < -87.3f ? Floats{} : p * power;
}

/// The complementary error function of z >= 0; absolute error below 2e-7 (Abramowitz and Stegun,
/// 7.1.26).
inline Floats erfc_positive(Floats z) {
  const Floats t = 1.0f / (1.0f + 0.3275911f * z);
  Floats p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  return p * t * exp(-z * z);
}

/// cap tanh(x / cap), with a relative error about 1e-7; tanh by Cephes' tanhf. What is not finite
/// becomes NaN, or a cap would hide it.
inline Floats soft_cap(Floats x, float cap) {
  const Floats u = x / cap, size = u < 0.0f ? -u : u, square = u * u;
  Floats p = splat(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const Floats tail = 1.0f - 2.0f / (exp(2.0f * size) + 1.0f);
  const Floats tanh = size < 0.625f ? p * square * u + u : u < 0.0f ? -tail : tail;
  return cap * tanh + (x - x);
}

inline Floats activate(Activation activation, Floats x) {
  switch (activation) {
    case Activation::relu:  // -infinity becomes NaN, so that it reaches the logits
      return x < 0.0f ? x - x : x;
    case Activation::gelu: {
      const Floats half_tail = 0.5f * erfc_positive((x < 0.0f ? -x : x) * 0.707106781f);
      return x * (x < 0.0f ? half_tail : 1.0f - half_tail);
    }
    case Activation::gelu_tanh:  // (1 + tanh(u)) / 2 is the logistic function of 2u
      return x / (1.0f + exp(-1.59576912f * (x + 0.044715f * x * x * x)));
    case Activation::silu:
      break;
  }
  return x / (1.0f + exp(-x));
}

}  // namespace
}  // namespace tda
