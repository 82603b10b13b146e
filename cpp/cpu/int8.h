// How kernels see int8 rows (model/quantize.h). Included by kernel sources only, like simd.h.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "model/quantize.h"

namespace tda {
namespace {

typedef std::uint8_t Bytes __attribute__((vector_size(kVectorBytes)));
typedef std::uint8_t HalfBytes __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));

constexpr int kParts = kGroup / kVectorBytes;  // vectors that hold a group's values as bytes

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

/// A group of one plane: 64 nibbles, in order.
inline void expand(const std::uint8_t* group, Bytes out[kParts]) {
#if defined(__AVX512F__)
  const __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)group));
  const __m512i shifts = _mm512_set_epi64(0x0004000400040004, 0x0004000400040004,
                                          0x0004000400040004, 0x0004000400040004, 0, 0, 0, 0);
  out[0] = (Bytes)_mm512_and_si512(_mm512_srlv_epi16(twice, shifts), _mm512_set1_epi8(15));
#else
  for (int i = 0; i < kParts / 2; ++i) {
    const Bytes v = load_as<Bytes>(group + i * kVectorBytes);
    out[i] = v & 15;
    out[i + kParts / 2] = v >> 4;
  }
#endif
}

struct Int8Row {
  const std::uint8_t *high, *low;
  const std::uint16_t* scales;  // bf16

  Int8Row() = default;
  Int8Row(const Rows& w, int64_t r)
      : high(reinterpret_cast<const std::uint8_t*>(w.data) + r * (high_row_bytes(w.n) + w.gap)),
        low(reinterpret_cast<const std::uint8_t*>(w.low) + r * (low_row_bytes(w.n) + w.low_gap)),
        scales(reinterpret_cast<const std::uint16_t*>(high + low_row_bytes(w.n))) {}

  /// A group's 16 (high - 8) + (low - 8), or 16 (high - 8).
  void codes(int64_t group, bool exact, std::int8_t out[kGroup]) const {
    const int64_t at = group * kGroupBytes;
    Bytes w[kParts], lows[kParts] = {};
    expand(high + at, w);
    if (exact) expand(low + at, lows);
    const std::uint8_t offset = exact ? 136 : 128;
    for (int i = 0; i < kParts; ++i) w[i] = (w[i] << 4) + lows[i] - offset;
    __builtin_memcpy(out, w, sizeof w);
  }

  /// Values [first, first + 16); `first` is a multiple of 16.
  void load(int64_t first, float* out) const {
    const int64_t group = first / kGroup, quarter = first % kGroup / 16;
    const int64_t at = group * kGroupBytes + quarter % 2 * 16;
    HalfBytes h = load_as<HalfBytes>(high + at), l = load_as<HalfBytes>(low + at);
    if (quarter < 2)
      h <<= 4, l &= 15;
    else
      h &= 0xf0, l >>= 4;
    const HalfBytes code = (h | l) - 136;
    std::int8_t codes[16];
    __builtin_memcpy(codes, &code, 16);
    const float scale = bf16_to_f32(scales[group]);
    for (int i = 0; i < 16; i += kLanes) store(out + i, scale * signed_floats(codes + i));
  }
};

/// A format tag beside F32 and Bf16; its rows are no arrays.
struct Int8 {};

}  // namespace
}  // namespace tda
