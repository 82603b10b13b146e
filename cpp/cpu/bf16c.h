// Access to bf16c rows (layout: weights/quantize.h). Included by kernel sources only, like simd.h.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "weights/quantize.h"

namespace tda {
namespace {

struct Bf16cRow {
  static constexpr int64_t kAhead = 8192;  // bytes; 5% faster than 4096
  const std::uint8_t* row;
  int64_t n;

  Bf16cRow(const Rows& w, int64_t r)
      : row(reinterpret_cast<const std::uint8_t*>(w.data) + r * w.stride), n(w.n) {}
  static int64_t bytes(int64_t n) { return bf16c_row_bytes(n); }
  const std::uint8_t* group(int64_t i) const {
    return row + bf16c_head_bytes(n) + i * kBf16cGroupBytes;
  }

  // Values stored apart. Their number and columns come from a file, so they are limited to the row:
  // a corrupt file must not cause access out of bounds.
  int64_t apart() const { return min(row[15], bf16c_exceptions(n)); }
  int64_t column(int64_t i) const { return min(half(16 + 4 * i), n - 1); }
  std::uint16_t bits(int64_t i) const { return half(18 + 4 * i); }
  float value(int64_t i) const { return bf16_to_f32(bits(i)); }

  /// Upper and lower bytes interleaved: 16-bit lanes are alternately values of the first 16 and of
  /// the second.
#if defined(__AVX512BW__)
  void interleave(int64_t i, __m512i out[2]) const {
    const std::uint8_t* const at = group(i);
    const __m512i lower = _mm512_loadu_si512(at);
    // The bytes of codes twice: once for their lower nibbles, once for the upper.
    const __m512i twice =
        _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + kGroup)));
    const __m512i down = _mm512_set_epi64(4, 4, 4, 4, 0, 0, 0, 0);
    const __m512i codes = _mm512_and_si512(_mm512_srlv_epi64(twice, down), _mm512_set1_epi8(15));
    const __m512i upper = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(uppers()), codes);
    out[0] = _mm512_unpacklo_epi8(lower, upper);
    out[1] = _mm512_unpackhi_epi8(lower, upper);
  }
#endif

  /// A group's values, with zeros for those stored apart.
  void load(int64_t i, Floats out[kGroup / kLanes]) const {
#if defined(__AVX512BW__)
    __m512i v[2];
    interleave(i, v);
    for (int s = 0; s < 2; ++s) {
      out[2 * s] = (Floats)_mm512_slli_epi32(v[s], 16);
      out[2 * s + 1] = (Floats)_mm512_and_si512(v[s], _mm512_set1_epi32(~0xffff));
    }
#elif defined(__AVX2__)
    const std::uint8_t* const at = group(i);
    const auto load = [](const std::uint8_t* p) {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    };
    const __m256i codes = load(at + kGroup), table = _mm256_broadcastsi128_si256(uppers());
    for (int h = 0; h < 2; ++h) {
      const __m256i lower = load(at + 32 * h);
      const __m256i code =
          _mm256_and_si256(h == 0 ? codes : _mm256_srli_epi16(codes, 4), _mm256_set1_epi8(15));
      const __m256i upper = _mm256_shuffle_epi8(table, code);
      const __m256i v[2] = {_mm256_unpacklo_epi8(lower, upper), _mm256_unpackhi_epi8(lower, upper)};
      for (int s = 0; s < 2; ++s) {
        out[4 * s + h] = (Floats)_mm256_slli_epi32(v[s], 16);
        out[4 * s + 2 + h] = (Floats)_mm256_and_si256(v[s], _mm256_set1_epi32(~0xffff));
      }
    }
#else
    const std::uint8_t* const at = group(i);
    float values[kGroup];
    for (int j = 0; j < kGroup; ++j) {
      const int64_t place = bf16c_place(j);
      const int code = at[kGroup + place % 32] >> (place < 32 ? 0 : 4) & 15;
      const int upper = code == 15 ? 0 : row[code];
      values[j] = bf16_to_f32(static_cast<std::uint16_t>(upper << 8 | at[place]));
    }
    __builtin_memcpy(out, values, sizeof values);
#endif
  }

 private:
  std::uint16_t half(int64_t at) const {
    std::uint16_t bits;
    __builtin_memcpy(&bits, row + at, 2);
    return bits;
  }
#if defined(__AVX2__)
  /// The upper byte for each code.
  __m128i uppers() const {
    const __m128i all_but_last =
        _mm_setr_epi8(-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0);
    return _mm_and_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row)), all_but_last);
  }
#endif
};

}  // namespace
}  // namespace tda
