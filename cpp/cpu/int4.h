// Access to int4 rows (layout: weights/quantize.h). Included by kernel sources only, like simd.h.
#pragma once

#include "cpu/int8.h"

namespace tda {
namespace {

struct Int4Row {
  static constexpr int kScales = kInt4Scales, kOffset = 8;
  static constexpr bool kPlanes = false;
  static constexpr int64_t bytes(int64_t n) { return int4_row_bytes(n); }
  static constexpr int64_t bytes_of(int64_t columns) { return low_row_bytes(columns); }
  static int64_t stride(const Rows& w) { return w.stride; }
  const std::uint8_t* nibbles;
  RowScales scales;

  Int4Row() = default;
  Int4Row(const Rows& w, int64_t r)
      : nibbles(reinterpret_cast<const std::uint8_t*>(w.data) + r * w.stride),
        scales(nibbles, w.n, kScales) {}
  Int4Row after(const Rows& w, int64_t rows) const {
    Int4Row later = *this;
    later.nibbles += rows * w.stride;
    later.scales.scales += rows * w.stride;
    return later;
  }
  const std::uint8_t* plane(int) const { return nibbles; }
  const void* scales_at(int64_t group) const { return scales.scales + group * kScales; }
  Int4Row only(bool, bool) const { return *this; }

#if defined(__AVX512VNNI__)
  /// A group's codes.
  __m512i codes(int64_t group) const {
    // The 8 bytes of each scale twice: once for their lower nibbles, once for the upper.
    const auto* at = reinterpret_cast<const __m256i*>(nibbles + group * kGroupBytes);
    const __m512i twice = _mm512_permutexvar_epi64(_mm512_set_epi64(3, 3, 2, 2, 1, 1, 0, 0),
                                                   _mm512_castsi256_si512(_mm256_loadu_si256(at)));
    return lower_nibbles(_mm512_srlv_epi64(twice, _mm512_set_epi64(4, 0, 4, 0, 4, 0, 4, 0)));
  }
#if defined(__AVX512BF16__)
  void bf16(int64_t group, __m512i out[2]) const { to_bf16(*this, group, out); }
#endif
#else
  /// A group's codes minus the offset.
  template <bool>
  void codes(int64_t group, std::int8_t out[kGroup]) const {
    Bytes w[kParts];
    expand(nibbles + group * kGroupBytes, w);
    for (int i = 0; i < kParts; ++i) w[i] -= kOffset;
    store_in_order<kScales>(w, out);
  }
#endif

  /// Values [first, first + 16); `first` is a multiple of 16.
  void load(int64_t first, float* out) const {
    std::int8_t codes[16];
    for (int i = 0; i < 8; ++i) {
      const std::uint8_t both = nibbles[first / 2 + i];
      codes[i] = static_cast<std::int8_t>((both & 15) - kOffset);
      codes[8 + i] = static_cast<std::int8_t>((both >> 4) - kOffset);
    }
    const float scale = scales[first / (kGroup / kScales)];
    for (int i = 0; i < 16; i += kLanes) store(out + i, scale * signed_floats(codes + i));
  }
};

/// A format tag like F32 and Bf16, for rows that are not arrays.
struct Int4 {};

}  // namespace
}  // namespace tda
