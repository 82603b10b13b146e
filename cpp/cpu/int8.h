// How kernels see int8 rows (model/quantize.h). Included by kernel sources only, like simd.h.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "model/quantize.h"

namespace tda {
namespace {

typedef std::uint8_t Bytes __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));

constexpr int kParts = kGroup / kVectorBytes;  // vectors that hold a group's values as bytes

/// Scales of a row of integers and their step stand behind its nibbles.
template <class Row>
inline const std::int8_t* scales_of(const Row& row) {
  return reinterpret_cast<const std::int8_t*>(row.high + low_row_bytes(row.n));
}
template <class Row>
inline float step_of(const Row& row) {
  float step;
  __builtin_memcpy(&step, scales_of(row) + groups_of(row.n) * Row::kScales, 4);
  return step;
}
/// The scale that value i shares with its neighbours.
template <class Row>
inline float scale_of(const Row& row, int64_t i) {
  return step_of(row) * static_cast<float>(scales_of(row)[i / (kGroup / Row::kScales)]);
}

/// Sixteen neighbours' nibbles, the first a multiple of 16, in order.
inline void load_nibbles(const std::uint8_t* plane, int64_t first, int64_t n, int64_t most,
                         std::uint8_t out[16]) {
  for (int64_t i = 0; i < 16; i += 4) {
    const Four four = four_at(first + i, n, most);
    std::uint32_t bytes;
    __builtin_memcpy(&bytes, plane + four.byte, 4);
    bytes = bytes >> four.shift & 0x0f0f0f0f;
    __builtin_memcpy(out + i, &bytes, 4);
  }
}

#if defined(__AVX512VNNI__)
/// A group's nibbles in order, in the lower (kShift 0) or upper (4) halves of bytes; other bits are
/// left as they come.
template <int kShift>
inline __m512i ordered_nibbles(const std::uint8_t* plane, int64_t group, const Chunk& chunk) {
  const std::uint8_t* const at =
      plane + chunk.first * kGroupBytes +
      (group - chunk.first) * (chunk.vectors == 1 ? kGroupBytes : 64 / chunk.vectors);
  const auto eight = [at](int i) { return _mm_loadl_epi64((const __m128i*)(at + i * 64)); };
  const auto sixteen = [at](int i) { return _mm_loadu_si128((const __m128i*)(at + i * 64)); };
  __m256i bytes;  // the group's part of the chunk's lines, one after the other
  if (chunk.vectors == 8)
    bytes = _mm256_set_m128i(_mm_unpacklo_epi64(eight(2), eight(3)),
                             _mm_unpacklo_epi64(eight(0), eight(1)));
  else if (chunk.vectors == 4)
    bytes = _mm256_set_m128i(sixteen(1), sixteen(0));
  else
    bytes = _mm256_loadu_si256((const __m256i*)at);
  // Fours of the lower halves, then of the upper ones.
  const __m512i twice = _mm512_broadcast_i64x4(bytes);
  const __m512i fours = kShift == 0 ? _mm512_mask_srli_epi16(twice, 0xffff0000, twice, 4)
                                    : _mm512_mask_slli_epi16(twice, 0x0000ffff, twice, 4);
  if (chunk.vectors == 1) return fours;
  // Four i of the group is in lane i / V of vector i % V.
  alignas(64) static constexpr int32_t order[3][16] = {
      {0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15},
      {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15},
      {0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15}};
  return _mm512_permutexvar_epi32(_mm512_load_si512(order[chunk.vectors == 2   ? 0
                                                          : chunk.vectors == 4 ? 1
                                                                               : 2]),
                                  fours);
}
#endif

struct Int8Row {
  static constexpr int kScales = kInt8Scales, kVectors = kInt8Vectors, kOffset = 136;
  static constexpr bool kPlanes = true;
  const std::uint8_t *high, *low;
  int64_t n;

  Int8Row() = default;
  Int8Row(const Rows& w, int64_t r)
      : high(reinterpret_cast<const std::uint8_t*>(w.data) + r * w.stride),
        low(reinterpret_cast<const std::uint8_t*>(w.low) + r * w.low_stride),
        n(w.n) {}

#if defined(__AVX512VNNI__)
  /// A group's codes, 16 high + low, in order.
  __m512i codes(int64_t group) const {
    const Chunk chunk = chunk_at(group, groups_of(n), kVectors);
    // Where the mask is set bits of the high plane, else of the low one.
    return _mm512_ternarylogic_epi64(_mm512_set1_epi8(static_cast<char>(0xf0)),
                                     ordered_nibbles<4>(high, group, chunk),
                                     ordered_nibbles<0>(low, group, chunk), 0xca);
  }
#endif

  /// Values [first, first + 16); `first` is a multiple of 16.
  void load(int64_t first, float* out) const {
    std::uint8_t highs[16], lows[16];
    load_nibbles(high, first, n, kVectors, highs);
    load_nibbles(low, first, n, kVectors, lows);
    std::int8_t codes[16];
    for (int i = 0; i < 16; ++i)
      codes[i] = static_cast<std::int8_t>(16 * highs[i] + lows[i] - kOffset);
    const float scale = scale_of(*this, first);
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

/// A format tag beside F32 and Bf16; its rows are no arrays.
struct Int8 {};

}  // namespace
}  // namespace tda
