// Access to int8 rows (layout: weights/quantize.h). Included by kernel sources only, like simd.h.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "weights/quantize.h"

namespace tda {
namespace {

typedef std::uint8_t Bytes __attribute__((vector_size(kVectorBytes)));
typedef std::uint8_t HalfBytes __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));

constexpr int kParts = kGroup / kVectorBytes;  // vectors that hold a group's values as bytes

#if defined(__AVX512VNNI__)
inline __m512i lower_nibbles(__m512i v) { return _mm512_and_si512(v, _mm512_set1_epi8(0x0f)); }
inline __m512i upper_nibbles(__m512i v) { return lower_nibbles(_mm512_srli_epi16(v, 4)); }
/// Bytes with the upper nibbles of one and the lower nibbles of the other.
inline __m512i merge(__m512i upper, __m512i lower) {
  const __m512i mask = _mm512_set1_epi8(static_cast<char>(0xf0));
  return _mm512_ternarylogic_epi64(upper, mask, lower,
                                   0xe2);  // overwrites `upper`
}
#else
/// A group of one plane: the lower nibbles of its bytes, then the upper.
inline void expand(const std::uint8_t* group, Bytes out[kParts]) {
  for (int i = 0; i < kParts / 2; ++i) {
    const Bytes v = load_as<Bytes>(group + i * kVectorBytes);
    out[i] = v & 15;
    out[i + kParts / 2] = v >> 4;
  }
}

/// Values in the order in which `expand` leaves their nibbles, stored in the order of the row.
template <int kScales>
inline void store_in_order(const Bytes (&v)[kParts], std::int8_t out[kGroup]) {
  constexpr int kHalf = kGroup / kScales / 2;  // half the values of a scale
  std::int8_t bytes[kGroup];
  __builtin_memcpy(bytes, v, sizeof bytes);
  for (int i = 0; i < kScales; ++i, out += 2 * kHalf) {
    __builtin_memcpy(out, bytes + i * kHalf, kHalf);
    __builtin_memcpy(out + kHalf, bytes + kGroup / 2 + i * kHalf, kHalf);
  }
}
#endif

/// The scales of an integer row and their step, which follow its nibbles. Like the rows these are
/// only addresses, and may be those of a row that does not exist.
struct RowScales {
  const std::int8_t* scales;
  int64_t count;

  RowScales() = default;
  RowScales(const std::uint8_t* row, int64_t n, int64_t per_group)
      : scales(reinterpret_cast<const std::int8_t*>(row + low_row_bytes(n))),
        count(groups_of(n) * per_group) {}
  float step() const {
    float value;
    __builtin_memcpy(&value, scales + count, 4);
    return value;
  }
  float operator[](int64_t i) const { return step() * static_cast<float>(scales[i]); }
  /// kLanes scales, in steps. Past the row's last one the lanes are arbitrary.
  Floats from(int64_t first) const { return signed_floats(scales + first); }
};

#if defined(__AVX512BF16__)
/// A group of an integer row, converted to bf16.
template <class Row>
inline void to_bf16(const Row& row, int64_t group, __m512i out[2]) {
  alignas(64) std::uint8_t codes[kGroup];
  _mm512_store_si512(codes, row.codes(group));
  const auto quarter = [&](int i) {
    const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(codes) + i);
    const __m512i code =
        _mm512_sub_epi32(_mm512_cvtepu8_epi32(bytes), _mm512_set1_epi32(Row::kOffset));
    const float scale = row.scales[group * Row::kScales + i * Row::kScales / 4];
    return _mm512_mul_ps(_mm512_set1_ps(scale), _mm512_cvtepi32_ps(code));
  };
  for (int i = 0; i < 2; ++i)
    out[i] = (__m512i)_mm512_cvtne2ps_pbh(quarter(2 * i + 1), quarter(2 * i));
}
#endif

struct Int8Row {
  static constexpr int kScales = kInt8Scales, kOffset = 136;
  static constexpr bool kPlanes = true;
  static constexpr int64_t bytes(int64_t n) { return high_row_bytes(n); }  // of plane 0
  static constexpr int64_t bytes_of(int64_t columns) { return low_row_bytes(columns); }
  static int64_t stride(const Rows& w) { return w.stride; }
  const std::uint8_t *high, *low;
  RowScales scales;

  Int8Row() = default;
  Int8Row(const Rows& w, int64_t r)
      : high(reinterpret_cast<const std::uint8_t*>(w.data) + r * w.stride),
        low(reinterpret_cast<const std::uint8_t*>(w.low) + r * w.low_stride),
        scales(high, w.n, kScales) {}
  /// The row `rows` further on.
  Int8Row after(const Rows& w, int64_t rows) const {
    Int8Row later = *this;
    later.high += rows * w.stride;
    later.low += rows * w.low_stride;
    later.scales.scales += rows * w.stride;
    return later;
  }
  const std::uint8_t* plane(int i) const { return i == 0 ? high : low; }
  const void* scales_at(int64_t group) const { return scales.scales + group * kScales; }
  /// For prefetches: the same plane in the place of both.
  Int8Row only(bool with_high, bool with_low) const {
    Int8Row row = *this;
    if (!with_high) row.high = low;
    if (!with_low) row.low = high;
    return row;
  }

#if defined(__AVX512VNNI__)
  /// A group's codes: 16 high + low.
  __m512i codes(int64_t group) const {
    // The 16 bytes of each scale twice: once for their lower nibbles, once for the upper.
    const auto twice = [group](const std::uint8_t* plane) {
      const auto* at = reinterpret_cast<const __m256i*>(plane + group * kGroupBytes);
      return _mm512_permutexvar_epi64(_mm512_set_epi64(3, 2, 3, 2, 1, 0, 1, 0),
                                      _mm512_castsi256_si512(_mm256_loadu_si256(at)));
    };
    const __m512i up = _mm512_set_epi64(0, 0, 4, 4, 0, 0, 4, 4);
    const __m512i down = _mm512_set_epi64(4, 4, 0, 0, 4, 4, 0, 0);
    return merge(_mm512_sllv_epi64(twice(high), up), _mm512_srlv_epi64(twice(low), down));
  }
#if defined(__AVX512BF16__)
  /// A group's values.
  void bf16(int64_t group, __m512i out[2]) const { to_bf16(*this, group, out); }
#endif
#else
  /// A group's 16 (high - 8) + (low - 8), or 16 (high - 8).
  template <bool kExact>
  void codes(int64_t group, std::int8_t out[kGroup]) const {
    const int64_t at = group * kGroupBytes;
    Bytes w[kParts], lows[kParts] = {};
    expand(high + at, w);
    if (kExact) expand(low + at, lows);
    const std::uint8_t offset = kExact ? 136 : 128;
    for (int i = 0; i < kParts; ++i) w[i] = (w[i] << 4) + lows[i] - offset;
    store_in_order<kScales>(w, out);
  }
#endif

  /// Values [first, first + 16); `first` is a multiple of 16.
  void load(int64_t first, float* out) const {
    const int64_t at = first / 32 * 16;
    HalfBytes h = load_as<HalfBytes>(high + at), l = load_as<HalfBytes>(low + at);
    if (first % 32 == 0)
      h <<= 4, l &= 15;
    else
      h &= 0xf0, l >>= 4;
    const HalfBytes code = (h | l) - 136;
    std::int8_t codes[16];
    __builtin_memcpy(codes, &code, 16);
    const float scale = scales[first / (kGroup / kScales)];
    for (int i = 0; i < 16; i += kLanes) store(out + i, scale * signed_floats(codes + i));
  }
};

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
