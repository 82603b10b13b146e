// Access to int8 rows (layout: weights/quantize.h). Included by kernel sources only, like simd.h.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "weights/quantize.h"

namespace tda {
namespace {

inline Floats to_floats(Ints v) { return __builtin_convertvector(v, Floats); }

/// The scales of a row and their step, which follow its codes. Like the row these are only
/// addresses, and may be those of a row that does not exist.
struct RowScales {
  const std::int8_t* scales;
  int64_t count;

  RowScales() = default;
  RowScales(const std::uint8_t* row, int64_t n)
      : scales(reinterpret_cast<const std::int8_t*>(row + groups_of(n) * kGroup)),
        count(groups_of(n) * kInt8Scales) {}
  float step() const {
    float value;
    __builtin_memcpy(&value, scales + count, 4);
    return value;
  }
  float operator[](int64_t i) const { return step() * static_cast<float>(scales[i]); }
  /// kLanes scales, in steps. Past the row's last one the lanes are arbitrary.
  Floats from(int64_t first) const { return signed_floats(scales + first); }
};

struct Int8Row {
  static constexpr int kScales = kInt8Scales, kOffset = 128;
  static constexpr int64_t kGroupBytes = 2 * kGroup;  // in which a group's codes are
  static constexpr int64_t bytes(int64_t n) { return int8_row_bytes(n); }
  static int64_t stride(const Rows& w) { return w.stride; }
  const std::uint8_t* data;
  RowScales scales;

  Int8Row() = default;
  Int8Row(const Rows& w, int64_t r)
      : data(reinterpret_cast<const std::uint8_t*>(w.data) + r * w.stride), scales(data, w.n) {}
  /// The row `rows` further on.
  Int8Row after(const Rows& w, int64_t rows) const {
    Int8Row later = *this;
    later.data += rows * w.stride;
    later.scales.scales += rows * w.stride;
    return later;
  }
  /// A group's codes: for each scale the first 16 values and, half(group) bytes on, the next 16.
  const std::uint8_t* group(int64_t i) const {
    return data + i / 2 * (2 * kGroup) + i % 2 * (kGroup / 2);
  }
  const void* scales_at(int64_t group) const { return scales.scales + group * kScales; }
  int64_t half(int64_t group) const { return int8_half(group, scales.count / kScales); }

#if defined(__AVX512VNNI__)
  /// A group's codes in the order of its values.
  __m512i codes(int64_t i) const {
    const auto load = [](const std::uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); };
    const __m512i halves =
        _mm512_inserti64x4(_mm512_castsi256_si512(load(group(i))), load(group(i) + half(i)), 1);
    return _mm512_shuffle_i64x2(halves, halves, 0xd8);  // 128-bit lanes 0, 2, 1, 3
  }
#if defined(__AVX512BF16__)
  /// A group's values.
  void bf16(int64_t i, __m512i out[2]) const {
    alignas(64) std::uint8_t in_order[kGroup];
    _mm512_store_si512(in_order, codes(i));
    const auto quarter = [&](int k) {
      const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(in_order) + k);
      const __m512i code =
          _mm512_sub_epi32(_mm512_cvtepu8_epi32(bytes), _mm512_set1_epi32(kOffset));
      return _mm512_mul_ps(_mm512_set1_ps(scales[i * kScales + k / 2]), _mm512_cvtepi32_ps(code));
    };
    for (int k = 0; k < 2; ++k)
      out[k] = (__m512i)_mm512_cvtne2ps_pbh(quarter(2 * k + 1), quarter(2 * k));
  }
#endif
#endif

  /// Values [first, first + 16); `first` is a multiple of 16.
  void load(int64_t first, float* out) const;
};

/// kLanes codes, less their offset.
inline Floats code_floats(const std::uint8_t* p) {
#if defined(__AVX512F__)
  const Ints codes = (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  const Ints codes = (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  Ints codes;
  for (int i = 0; i < kLanes; ++i) codes[i] = p[i];
#endif
  return to_floats(codes - Int8Row::kOffset);
}

inline void Int8Row::load(int64_t first, float* out) const {
  const std::uint8_t* const codes = data + int8_place(first, scales.count / kScales);
  const float scale = scales[first / (kGroup / kScales)];
  for (int i = 0; i < 16; i += kLanes) store(out + i, scale * code_floats(codes + i));
}

#if defined(__AVX512VNNI__)
/// Four rows' bytes interleaved: byte 4 k + i of out[j]'s 128-bit lane L is byte 16 L + 4 j + k of
/// rows[i].
inline void interleave(const __m512i rows[4], __m512i out[4]) {
  const __m512i a = _mm512_unpacklo_epi8(rows[0], rows[1]);
  const __m512i b = _mm512_unpackhi_epi8(rows[0], rows[1]);
  const __m512i c = _mm512_unpacklo_epi8(rows[2], rows[3]);
  const __m512i d = _mm512_unpackhi_epi8(rows[2], rows[3]);
  out[0] = _mm512_unpacklo_epi16(a, c);
  out[1] = _mm512_unpackhi_epi16(a, c);
  out[2] = _mm512_unpacklo_epi16(b, d);
  out[3] = _mm512_unpackhi_epi16(b, d);
}
#endif

/// A format tag like F32 and Bf16, for rows that are not arrays.
struct Int8 {};

}  // namespace
}  // namespace tda
