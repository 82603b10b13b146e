// How kernels see int4 rows (model/quantize.h). Included by kernel sources only, like simd.h.
#pragma once

#include "cpu/int8.h"

namespace tda {
namespace {

struct Int4Row {
  static constexpr int kScales = kInt4Scales, kVectors = kInt4Vectors, kOffset = 8;
  static constexpr bool kPlanes = false;
  const std::uint8_t* high;  // the only plane
  int64_t n;

  Int4Row() = default;
  Int4Row(const Rows& w, int64_t r)
      : high(reinterpret_cast<const std::uint8_t*>(w.data) + r * w.stride), n(w.n) {}

#if defined(__AVX512VNNI__)
  /// A group's codes, in order.
  __m512i codes(int64_t group) const {
    const Chunk chunk = chunk_at(group, groups_of(n), kVectors);
    return _mm512_and_si512(ordered_nibbles<0>(high, group, chunk), _mm512_set1_epi8(15));
  }
#endif

  /// Values [first, first + 16); `first` is a multiple of 16.
  void load(int64_t first, float* out) const {
    std::uint8_t nibbles[16];
    load_nibbles(high, first, n, kVectors, nibbles);
    std::int8_t codes[16];
    for (int i = 0; i < 16; ++i) codes[i] = static_cast<std::int8_t>(nibbles[i] - kOffset);
    const float scale = scale_of(*this, first);
    for (int i = 0; i < 16; i += kLanes) store(out + i, scale * signed_floats(codes + i));
  }
};

/// A format tag beside F32 and Bf16; its rows are no arrays.
struct Int4 {};

}  // namespace
}  // namespace tda
