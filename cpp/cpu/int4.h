// How kernels see int4 rows (model/quantize.h). Included by kernel sources only, like simd.h.
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
  const std::uint8_t* plane(int) const { return nibbles; }
  const void* scales_at(int64_t group) const { return scales.scales + group * kScales; }
  Int4Row only(bool, bool) const { return *this; }

#if defined(__AVX512VNNI__)
  /// A group's codes.
  __m512i codes(int64_t group) const { return tda::nibbles(nibbles + group * kGroupBytes); }
#if defined(__AVX512BF16__)
  void bf16(int64_t group, __m512i out[2]) const { to_bf16(*this, group, out); }
#endif
#else
  /// A group's codes, less the offset.
  template <bool>
  void codes(int64_t group, std::int8_t out[kGroup]) const {
    Bytes w[kParts];
    expand(nibbles + group * kGroupBytes, w);
    for (int i = 0; i < kParts; ++i) w[i] -= kOffset;
    __builtin_memcpy(out, w, sizeof w);
  }
#endif

  /// Values [first, first + 16); `first` is a multiple of 16.
  void load(int64_t first, float* out) const {
    const int64_t quarter = first % kGroup / 16;
    const HalfBytes both =
        load_as<HalfBytes>(nibbles + first / kGroup * kGroupBytes + quarter % 2 * 16);
    const HalfBytes code = (quarter < 2 ? both & 15 : both >> 4) - kOffset;
    std::int8_t codes[16];
    __builtin_memcpy(codes, &code, 16);
    const float scale = scales[first / (kGroup / kScales)];
    for (int i = 0; i < 16; i += kLanes) store(out + i, scale * signed_floats(codes + i));
  }
};

/// A format tag beside F32 and Bf16; its rows are no arrays.
struct Int4 {};

}  // namespace
}  // namespace tda
