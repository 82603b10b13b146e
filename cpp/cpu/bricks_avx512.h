// Products of bricks with AVX-512 and VNNI.
#pragma once

#include <immintrin.h>

#include "cpu/bricks.h"
#include "cpu/simd.h"

namespace tda {
namespace {

/// How many parts of a brick's inputs have scales of their own, and what is taken off their codes.
template <class Brick>
constexpr int kParts = 2;
template <class Brick>
constexpr float kCentre = 8;
template <>
constexpr int kParts<LineBrick> = 1;
template <>
constexpr float kCentre<LineBrick> = 0;

inline __m512i load_line(const void* p) { return _mm512_loadu_si512(p); }
/// A byte's upper code stays where it is: it counts 16 times.
inline __m512i lower_codes(__m512i v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
inline __m512i upper_codes(__m512i v) { return _mm512_andnot_si512(_mm512_set1_epi8(15), v); }
constexpr float kUpperScale = 1 / 16.0f;

/// The codes of a strip's rows 16 k ... 16 k + 15 and four inputs.
struct Codes {
  __m512i of[4];

  explicit Codes(const std::uint8_t* quad) {
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
      const __m512i both = load_line(quad + 64 * k);
      of[k] = lower_codes(both);
      of[2 + k] = upper_codes(both);
    }
  }
};

/// Sums of products of codes and inputs.
struct RowSums {
  __m512i of[4];

  void add(const Codes& codes, __m512i inputs) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) of[k] = _mm512_dpbusd_epi32(of[k], codes.of[k], inputs);
  }
  /// scale * the sums of part k + addend
  __m512 scaled(int k, float scale, __m512 addend) const {
    const __m512 by = _mm512_set1_ps(k < 2 ? scale : scale * kUpperScale);
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(of[k]), by, addend);
  }
};

inline __m512i four_inputs(const std::int8_t* q) {
  std::int32_t four;
  __builtin_memcpy(&four, q, 4);
  return _mm512_set1_epi32(four);
}

/// total + the products of rows 16 k ... 16 k + 15, whose codes times inputs are `dots`.
inline __m512 add_rows(const CentredBrick& brick, const HighInputs&, int part, int k, __m512 dots,
                       __m512 total) {
  return _mm512_fmadd_ps((__m512)signed_floats(brick.scales[part] + 16 * k), dots, total);
}
inline __m512 add_rows(const LineBrick& brick, const HighInputs& x, int, int k, __m512 dots,
                       __m512 total) {
  total = _mm512_fmadd_ps((__m512)half_floats(brick.scales + 16 * k), dots, total);
  return _mm512_fmadd_ps((__m512)half_floats(brick.minima + 16 * k),
                         _mm512_set1_ps(x.sums[0] + x.sums[1]), total);
}

/// Up to four vectors and the sums of their products with a brick's rows.
struct SomeVectors {
  const HighInputs* x[4];
  float* sums[4];  // [64] each
};

/// sums[v] += the brick's rows times x[v], v < kVectors: codes are unpacked once for all. Prefetches
/// the brick at `ahead`.
template <int kVectors, class Brick>
[[gnu::always_inline]] inline void add_brick(const Brick& brick, const SomeVectors& vectors,
                                             const char* ahead) {
  constexpr int kQuads = kBlockInputs / 4 / kParts<Brick>;
#pragma GCC unroll 2
  for (int part = 0; part < kParts<Brick>; ++part) {
    RowSums dots[kVectors] = {};
#pragma GCC unroll 8
    for (int q = part * kQuads; q < (part + 1) * kQuads; ++q) {
      prefetch_l1(ahead + 128 * q);
      prefetch_l1(ahead + 128 * q + kLineBytes);
      const Codes codes(brick.codes[q]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) dots[v].add(codes, four_inputs(vectors.x[v]->q + 4 * q));
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const HighInputs& x = *vectors.x[v];
      const __m512 centre = _mm512_set1_ps(-kCentre<Brick> * x.sums[part]);
      __m512 centred[4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) centred[k] = dots[v].scaled(k, x.scale, centre);
      if (x.excess_quad >= part * kQuads && x.excess_quad < (part + 1) * kQuads) {
        RowSums excess = {};
        excess.add(Codes(brick.codes[x.excess_quad]), four_inputs(x.excess));
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) centred[k] = excess.scaled(k, x.excess_scale, centred[k]);
      }
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        float* const out = vectors.sums[v] + 16 * k;
        _mm512_storeu_ps(out, add_rows(brick, x, part, k, centred[k], _mm512_loadu_ps(out)));
      }
    }
  }
  for (int64_t line = sizeof brick.codes; line < static_cast<int64_t>(sizeof brick);
       line += kLineBytes)
    prefetch_l1(ahead + line);
}

template <class Brick>
void add_bricks(const Bricks& w, Span strips, Span blocks, const HighVectors& vectors) {
  for_bricks<Brick>(w, strips, blocks,
                    [&](const Brick& brick, int64_t s, int64_t b, const char* ahead)
                        __attribute__((always_inline)) {
                          for (int64_t first = 0; first < vectors.count; first += 4) {
                            SomeVectors some;
                            const int64_t count = min(4, vectors.count - first);
                            for (int64_t v = 0; v < count; ++v) {
                              some.x[v] = vectors.x[first + v] + b;
                              some.sums[v] = vectors.sums[first + v] + s * kStripRows;
                            }
                            if (count == 1) add_brick<1>(brick, some, ahead);
                            if (count == 2) add_brick<2>(brick, some, ahead);
                            if (count == 3) add_brick<3>(brick, some, ahead);
                            if (count == 4) add_brick<4>(brick, some, ahead);
                          }
                        });
}

// ---- rests ------------------------------------------------------------------------------------

/// Strips whose rests of an input share a cache line.
constexpr int64_t kLineStrips = 2;

/// Sums of products of a line's codes. Vector k has bytes 4 k ... 4 k + 3 of each of the line's four
/// lanes, of the lower codes and, behind them, of the upper ones.
struct LineSums {
  __m512i of[2][4];

  /// Codes are 8 more than what they stand for.
  explicit LineSums(const RestInputs& x) {
    std::int32_t sum = 0;
    for (const std::int8_t q : x.q) sum += q;
    for (int k = 0; k < 4; ++k) {
      of[0][k] = _mm512_set1_epi32(-8 * sum);
      of[1][k] = _mm512_set1_epi32(-128 * sum);
    }
  }
  /// Adds lines of four inputs.
  void add(__m512i a, __m512i b, __m512i c, __m512i d, __m512i inputs) {
    const __m512i ab[2] = {_mm512_unpacklo_epi8(a, b), _mm512_unpackhi_epi8(a, b)};
    const __m512i cd[2] = {_mm512_unpacklo_epi8(c, d), _mm512_unpackhi_epi8(c, d)};
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const __m512i four = k % 2 ? _mm512_unpackhi_epi16(ab[k / 2], cd[k / 2])
                                 : _mm512_unpacklo_epi16(ab[k / 2], cd[k / 2]);
      of[0][k] = _mm512_dpbusd_epi32(of[0][k], lower_codes(four), inputs);
      of[1][k] = _mm512_dpbusd_epi32(of[1][k], upper_codes(four), inputs);
    }
  }
  /// rows[i] += scale times the sums of the line's bytes 16 i ... 16 i + 15. upper: of these codes
  template <bool kUpper>
  void finish(float scale, float* const rows[4]) const {
    const __m512 by = _mm512_set1_ps(kUpper ? scale * kUpperScale : scale);
    const auto lanes = [&](int k) { return (__m512)_mm512_cvtepi32_ps(of[kUpper][k]); };
    const __m512 a = lanes(0), b = lanes(1), c = lanes(2), d = lanes(3);
    const __m512 ab[2] = {_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee)};
    const __m512 cd[2] = {_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee)};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      if (!rows[i]) continue;
      const __m512 sums = i % 2 ? _mm512_shuffle_f32x4(ab[i / 2], cd[i / 2], 0xdd)
                                : _mm512_shuffle_f32x4(ab[i / 2], cd[i / 2], 0x88);
      float* const out = rows[i] + (kUpper ? 32 : 0);
      _mm512_storeu_ps(out, _mm512_fmadd_ps(sums, by, _mm512_loadu_ps(out)));
    }
  }
};

/// One block of inputs; meanwhile prefetches the rests of the block `later`.
inline void add_block(const Bricks& w, Span strips, const RestInputs& x, const RestInputs& later,
                      float* sums) {
  const std::uint8_t *runs[kBlockInputs], *ahead[kBlockInputs];
  for (int k = 0; k < kBlockInputs; ++k) {
    runs[k] = w.rest(x.ids[k]);
    ahead[k] = w.rest(later.ids[k]);
  }
  const LineSums start(x);
  for (int64_t s = strips.first / kLineStrips * kLineStrips; s < strips.end; s += kLineStrips) {
    const int64_t at = s / kLineStrips * kLineBytes;
    LineSums line = start;
    for (int k = 0; k < x.count; k += 4) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) prefetch_l2(ahead[k + i] + at);
      line.add(load_line(runs[k] + at), load_line(runs[k + 1] + at), load_line(runs[k + 2] + at),
               load_line(runs[k + 3] + at), four_inputs(x.q + k));
    }
    float* rows[4];
    for (int i = 0; i < 4; ++i) {
      const int64_t strip = s + i / 2 - strips.first;
      const bool there = strip >= 0 && strip < strips.count();
      rows[i] = there ? sums + strip * kStripRows + i % 2 * 16 : nullptr;
    }
    line.finish<false>(x.scale, rows);
    line.finish<true>(x.scale, rows);
  }
}

void add_rests(const Bricks& w, Span strips, const RestInputs* x, int64_t count, float* sums) {
  const int64_t blocks = (count + kBlockInputs - 1) / kBlockInputs;
  for (int64_t b = 0; b < blocks; ++b) add_block(w, strips, x[b], x[min(b + 1, blocks - 1)], sums);
}

}  // namespace
}  // namespace tda
