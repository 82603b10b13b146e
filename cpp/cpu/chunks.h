// The way through an integer row, chunk by chunk (model/quantize.h). Included by kernel sources
// only, like simd.h.
#pragma once

#include <type_traits>

#include "cpu/int8.h"

namespace tda {
namespace {

/// Which of a row's planes takes part; formats with one plane have `high` alone.
enum class Plane { high, low };

inline Floats to_floats(Ints v) { return __builtin_convertvector(v, Floats); }

constexpr int64_t kChunkLanes = 16;  // in memory, whatever kLanes is

template <class Row>
constexpr int64_t chunks_of(int64_t groups) {
  return groups / Row::kVectors + __builtin_popcountll(groups % Row::kVectors);
}

/// body(V, first group, number) for every chunk; V is a constant, its vectors.
template <class Row, class Body>
inline void for_chunks(int64_t groups, const Body& body) {
  int64_t first = 0, number = 0;
  const auto take = [&](auto vectors) {
    body(vectors, first, number++);
    first += vectors;
  };
  while (first + Row::kVectors <= groups) take(std::integral_constant<int, Row::kVectors>());
  const int64_t left = groups - first;
  if constexpr (Row::kVectors == 8)
    if (left & 4) take(std::integral_constant<int, 4>());
  if (left & 2) take(std::integral_constant<int, 2>());
  if (left & 1) take(std::integral_constant<int, 1>());
}

/// Lines of a chunk, and vectors in each.
constexpr int lines_of(int vectors) { return vectors == 1 ? 1 : vectors / 2; }
constexpr int line_vectors(int vectors) { return vectors == 1 ? 1 : 2; }

/// Part `part` of a line's vectors, as codes.
template <int kVectors>
inline void load_line(const std::uint8_t* line, int part, Bytes (&codes)[line_vectors(kVectors)]) {
  if constexpr (kVectors > 1) {
    const Bytes v = load_as<Bytes>(line + part * kVectorBytes);
    codes[0] = v & 15;
    codes[1] = v >> 4;
  } else if constexpr (kParts > 1) {
    const Bytes v = load_as<Bytes>(line + part % (kParts / 2) * kVectorBytes);
    codes[0] = part < kParts / 2 ? v & 15 : v >> 4;
  } else {
#if defined(__AVX512F__)
    const __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)line));
    codes[0] = (Bytes)_mm512_mask_srli_epi16(twice, 0xffff0000, twice, 4) & 15;
#endif
  }
}

/// Scales of the chunk's lanes in part `part`, in steps.
template <class Row, int kVectors>
inline Floats chunk_scales(const Row& row, int64_t first, int part) {
  const std::int8_t* const scales = scales_of(row) + first * Row::kScales;
  if constexpr (kVectors == Row::kVectors) return signed_floats(scales + part * kLanes);
#if defined(__AVX512F__)
  __m128i some = _mm_setzero_si128();
  __builtin_memcpy(&some, scales, kChunkLanes * kVectors / Row::kVectors);
  Ints index;
  for (int lane = 0; lane < kLanes; ++lane) index[lane] = lane * kVectors / Row::kVectors;
  const __m512 floats = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(some));
  return (Floats)_mm512_permutexvar_ps((__m512i)index, floats);
#else
  Floats out;
  for (int lane = 0; lane < kLanes; ++lane)
    out[lane] = scales[(part * kLanes + lane) * kVectors / Row::kVectors];
  return out;
#endif
}

}  // namespace
}  // namespace tda
