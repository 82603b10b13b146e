// Products of bricks with AVX2.
#pragma once

#include <immintrin.h>

#include "cpu/bricks.h"
#include "cpu/simd.h"

namespace tda {
namespace {

inline __m256i load_bytes(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline __m256i lower_four(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
inline __m256i upper_four(__m256i v) { return lower_four(_mm256_srli_epi16(v, 4)); }
inline __m256 floats_of(__m256i v) { return _mm256_cvtepi32_ps(v); }

/// Adds two products of bytes to each of 16 sums: eight steps of codes up to 15 stay below 2^15.
inline __m256i add_quads(__m256i sums, __m256i codes, __m256i q) {
  return _mm256_add_epi16(sums, _mm256_maddubs_epi16(codes, q));
}
/// The 8 sums of four products.
inline __m256 total_of(__m256i sums) {
  return floats_of(_mm256_madd_epi16(sums, _mm256_set1_epi16(1)));
}

inline __m256i four_inputs(const std::int8_t* q) {
  int32_t four;
  __builtin_memcpy(&four, q, 4);
  return _mm256_set1_epi32(four);
}

/// A strip's products of some quads' codes and q, two to each sum: the rows 8 k ... 8 k + 7.
struct QuadSums {
  __m256i of[8];

  explicit QuadSums(__m256i start) {
    for (__m256i& sums : of) sums = start;
  }
  void add(const std::uint8_t* codes, __m256i q) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const __m256i both = load_bytes(codes + 32 * k);
      of[k] = add_quads(of[k], lower_four(both), q);
      of[4 + k] = add_quads(of[4 + k], upper_four(both), q);
    }
  }
  /// Those of the brick's quads [first, first + count). Prefetches the same quads `ahead`.
  template <class Brick>
  [[gnu::always_inline]] void add_quads_of(const Brick& brick, const std::int8_t* inputs, int first,
                                           int count, const char* ahead) {
#pragma GCC unroll 8
    for (int q = first; q < first + count; ++q) {
      prefetch_l1(ahead + 128 * q);
      prefetch_l1(ahead + 128 * q + kLineBytes);
      add(brick.codes[q], four_inputs(inputs + 4 * q));
    }
  }
};

/// Prefetches the lines of the brick at `ahead` that its quads do not.
template <class Brick>
inline void prefetch_last_lines(const char* ahead) {
  for (int64_t line = sizeof(BrickCodes); line < static_cast<int64_t>(sizeof(Brick));
       line += kLineBytes)
    prefetch_l1(ahead + line);
}

/// Adds to the sums of two products each, of the rows from 8 k on.
inline void add_to(float* sums, int k, __m256i dots, __m256 scale) {
  float* const out = sums + 8 * k;
  _mm256_storeu_ps(out, _mm256_fmadd_ps(floats_of(dots), scale, _mm256_loadu_ps(out)));
}

/// What sums of two products start at, so that 8 is taken off each code.
inline __m256i centres_of(__m256i q) {
  return _mm256_sub_epi16(_mm256_setzero_si256(), _mm256_maddubs_epi16(_mm256_set1_epi8(8), q));
}
/// The same for all quads of each half of a brick.
struct Centres {
  __m256i of[2];

  explicit Centres(const std::int8_t* q) {
    __m256i sums = centres_of(load_bytes(q));  // of halves, a lane each
    sums = _mm256_add_epi16(sums, _mm256_shuffle_epi32(sums, 0x4e));
    sums = _mm256_add_epi16(sums, _mm256_shuffle_epi32(sums, 0xb1));
    of[0] = _mm256_permute2x128_si256(sums, sums, 0x00);
    of[1] = _mm256_permute2x128_si256(sums, sums, 0x11);
  }
};

/// Products of centred sums and the rows' scales, times kScaleUnit: below 2^30 with both halves.
inline __m256i times_scales(__m256i sums, const std::int8_t* scales, int k) {
  const __m256i sixteen = _mm256_broadcastsi128_si256(
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + 16 * (k / 2))));
  const __m256i four = _mm256_set1_epi32(static_cast<int>(0x01000100 * (8 * (k % 2)) + 0x00800080));
  const __m256i rows = _mm256_setr_epi32(0, 0x01000100, 0x02000200, 0x03000300, 0x04000400,
                                         0x05000500, 0x06000600, 0x07000700);
  return _mm256_madd_epi16(sums, _mm256_shuffle_epi8(sixteen, _mm256_add_epi8(rows, four)));
}
constexpr float kScaleUnit = 256;

/// sums: [64] += the brick's rows times x. Prefetches the brick at `ahead`.
template <bool kExcess>
[[gnu::always_inline]] inline void add_brick(const CentredBrick& brick, const HighInputs& x,
                                             float* sums, const char* ahead) {
  constexpr int kQuads = kScaleInputs / 4;
  const Centres centres(x.q);
  __m256i totals[8];
#pragma GCC unroll 2
  for (int part = 0; part < 2; ++part) {
    QuadSums dots(centres.of[part]);
    dots.add_quads_of(brick, x.q, part * kQuads, kQuads, ahead);
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) {
      const __m256i scaled = times_scales(dots.of[k], brick.scales[part], k);
      totals[k] = part == 0 ? scaled : _mm256_add_epi32(totals[k], scaled);
    }
  }
  const __m256 scale = _mm256_set1_ps(x.scale / kScaleUnit);
#pragma GCC unroll 8
  for (int k = 0; k < 8; ++k) add_to(sums, k, totals[k], scale);
  if (kExcess) {
    const __m256i q = four_inputs(x.excess);
    QuadSums dots(centres_of(q));
    dots.add(brick.codes[x.excess_quad], q);
    const __m256 excess_scale = _mm256_set1_ps(x.excess_scale / kScaleUnit);
    const std::int8_t* const scales = brick.scales[x.excess_quad / kQuads];
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) add_to(sums, k, times_scales(dots.of[k], scales, k), excess_scale);
  }
  prefetch_last_lines<CentredBrick>(ahead);
}

template <bool kExcess>
[[gnu::always_inline]] inline void add_brick(const LineBrick& brick, const HighInputs& x,
                                             float* sums, const char* ahead) {
  QuadSums dots(_mm256_setzero_si256());
  dots.add_quads_of(brick, x.q, 0, kBlockInputs / 4, ahead);
  QuadSums excess(_mm256_setzero_si256());
  if (kExcess) excess.add(brick.codes[x.excess_quad], four_inputs(x.excess));
  const __m256 sum_of_x = _mm256_set1_ps(x.sums[0] + x.sums[1]);
#pragma GCC unroll 8
  for (int k = 0; k < 8; ++k) {
    __m256 dot = _mm256_mul_ps(total_of(dots.of[k]), _mm256_set1_ps(x.scale));
    if (kExcess) dot = _mm256_fmadd_ps(total_of(excess.of[k]), _mm256_set1_ps(x.excess_scale), dot);
    __m256 total = _mm256_loadu_ps(sums + 8 * k);
    total = _mm256_fmadd_ps((__m256)half_floats(brick.scales + 8 * k), dot, total);
    total = _mm256_fmadd_ps((__m256)half_floats(brick.minima + 8 * k), sum_of_x, total);
    _mm256_storeu_ps(sums + 8 * k, total);
  }
  prefetch_last_lines<LineBrick>(ahead);
}

template <class Brick>
void add_bricks(const Bricks& w, Span strips, Span blocks, const HighVectors& vectors) {
  for_bricks<Brick>(w, strips, blocks,
                    [&](const Brick& brick, int64_t s, int64_t b, const char* ahead)
                        __attribute__((always_inline)) {
                          for (int64_t v = 0; v < vectors.count; ++v) {
                            const HighInputs& inputs = vectors.x[v][b];
                            float* const out = vectors.sums[v] + s * kStripRows;
                            if (inputs.excess_quad < 0)
                              add_brick<false>(brick, inputs, out, ahead);
                            else
                              add_brick<true>(brick, inputs, out, ahead);
                          }
                        });
}

// ---- rests ------------------------------------------------------------------------------------

/// Inputs per sweep over the rows. While one runs, the rests of the next are prefetched.
constexpr int kSweep = 8;
/// Rows of a sweep, whose sums stay in the first-level cache.
constexpr int64_t kSweepStrips = 32;

/// The sums of 16 products of signed bytes and codes of 4 bits fit into 16 bits only around their
/// centre: they start at -8 times the sum of q and may wrap around on the way.
struct alignas(32) RestSums {
  __m256i rows[4];  // of the rows {0 ... 7, 16 ... 23}, {8 ... 15, 24 ... 31}, and 32 + these
};

/// Adds the rests of inputs a and b. q: their coefficients, 16 times
[[gnu::always_inline]] inline void add_pair(const std::uint8_t* a, const std::uint8_t* b, __m256i q,
                                            RestSums& sums) {
  const __m256i of_a = load_bytes(a), of_b = load_bytes(b);
  const __m256i pairs[2] = {_mm256_unpacklo_epi8(of_a, of_b), _mm256_unpackhi_epi8(of_a, of_b)};
#pragma GCC unroll 2
  for (int k = 0; k < 2; ++k) {
    sums.rows[k] = _mm256_add_epi16(sums.rows[k], _mm256_maddubs_epi16(lower_four(pairs[k]), q));
    sums.rows[2 + k] =
        _mm256_add_epi16(sums.rows[2 + k], _mm256_maddubs_epi16(upper_four(pairs[k]), q));
  }
}

inline void add_to(float* out, __m128i sums, __m256 scale) {
  const __m256 values = floats_of(_mm256_cvtepi16_epi32(sums));
  _mm256_storeu_ps(out, _mm256_fmadd_ps(values, scale, _mm256_loadu_ps(out)));
}

inline void finish(const RestSums& sums, __m256 scale, float* out) {
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    float* const to = out + k / 2 * 32 + k % 2 * 8;
    add_to(to, _mm256_castsi256_si128(sums.rows[k]), scale);
    add_to(to + 16, _mm256_extracti128_si256(sums.rows[k], 1), scale);
  }
}

/// One sweep: inputs [first, end) of x over the strips; meanwhile prefetches the rests of the inputs
/// `later`. The sums lie in `partial`; the sweep that is the first of x starts them, and the last one
/// adds them to `sums`.
inline void sweep(const Bricks& w, Span strips, const RestInputs& x, int first, int end, int start,
                  const std::int32_t* later, RestSums* partial, float* sums) {
  __m256i q[kSweep / 2];
  const int pairs = (end - first + 1) / 2;
  for (int p = 0; p < pairs; ++p) {
    std::int16_t both;
    __builtin_memcpy(&both, x.q + first + 2 * p, 2);
    q[p] = _mm256_set1_epi16(both);
  }
  const std::uint8_t* runs[kSweep];
  const std::uint8_t* ahead[kSweep];
  for (int k = 0; k < kSweep; ++k) {
    runs[k] = w.rest(x.ids[first + k]);
    ahead[k] = w.rest(later[k]);
  }
  const bool last = end == x.count;
  const __m256 scale = _mm256_set1_ps(x.scale);
  for (int64_t s = strips.first; s < strips.end; ++s) {
    if (s % 2 == 0 || s == strips.first)
#pragma GCC unroll 8
      for (int k = 0; k < kSweep; ++k) prefetch_l1(ahead[k] + 32 * s);
    RestSums& kept = partial[s - strips.first];
    RestSums here;
    if (first == 0)
      for (__m256i& rows : here.rows) rows = _mm256_set1_epi16(static_cast<short>(start));
    else
      here = kept;
    if (pairs == kSweep / 2) {
#pragma GCC unroll 4
      for (int p = 0; p < kSweep / 2; ++p)
        add_pair(runs[2 * p] + 32 * s, runs[2 * p + 1] + 32 * s, q[p], here);
    } else {
      for (int p = 0; p < pairs; ++p)
        add_pair(runs[2 * p] + 32 * s, runs[2 * p + 1] + 32 * s, q[p], here);
    }
    if (last)
      finish(here, scale, sums + (s - strips.first) * kStripRows);
    else
      kept = here;
  }
}

void add_rests(const Bricks& w, Span strips, const RestInputs* x, int64_t count, float* sums) {
  RestSums partial[kSweepStrips];
  const int64_t last = (count - 1) / kSweep * kSweep;
  for (Span part = strips; part.first < strips.end; part.first = part.end) {
    part.end = min(strips.end, part.first + kSweepStrips);
    float* const out = sums + (part.first - strips.first) * kStripRows;
    int start = 0;
    for (int64_t k = 0; k < count; k += kSweep) {
      const RestInputs& inputs = x[k / kBlockInputs];
      const auto first = static_cast<int>(k % kBlockInputs);
      if (first == 0) {
        start = 0;
        for (const std::int8_t q : inputs.q) start -= 8 * q;
      }
      const int64_t later = min(k + kSweep, last);
      sweep(w, part, inputs, first, first + kSweep < inputs.count ? first + kSweep : inputs.count,
            start, x[later / kBlockInputs].ids + later % kBlockInputs, partial, out);
    }
  }
}

}  // namespace
}  // namespace tda
