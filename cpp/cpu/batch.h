// What the decode kernels of integer formats share: a batch of neurons on its way from products to
// y. A Row (int8.h, int4.h) has kScales scales per group of 64, each for as many neighbours, and
// its codes are kOffset too large. Included by kernel sources only, like simd.h.
#pragma once

#include "cpu/int8.h"

namespace tda {
namespace {

/// Neurons worked on at a time: their down rows share what is loaded and stored of y.
constexpr int64_t kBatch = 16;

inline Floats to_floats(Ints v) { return __builtin_convertvector(v, Floats); }

/// Per-lane sums of up to kBatch rows on their way to one float each.
struct Products {
  Floats lanes[kBatch];

  /// The first `count`, up to a whole vector of them; whatever stands behind them becomes 0.
  void store_to(float* out, int64_t count) {
    for (int64_t i = count; i % kLanes != 0; ++i) lanes[i] = Floats{};
    for (int64_t i = 0; i < count; i += kLanes) store(out + i, sums(lanes + i));
  }
};

/// Whole vectors of them.
inline void activate(Activation activation, float* values, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes)
    store(values + i, activate(activation, load_as<Floats>(values + i)));
}

/// act(gate) * up for the exact products of some neurons.
struct Gated {
  Products gates, ups;
  float h[kBatch];

  void finish(Activation activation, int64_t count) {
    float up[kBatch];
    gates.store_to(h, count);
    ups.store_to(up, count);
    activate(activation, h, count);
    for (int64_t i = 0; i < count; ++i) h[i] *= up[i];
  }
};

// ---- memory ---------------------------------------------------------------------------------
//
// Rows that follow each other are read in order and left to the hardware, which prefetches plain
// streams best. What a selection wants is scattered: its cache lines are asked for a few at a time,
// between other work, so that memory is never idle and never overrun; into the second-level cache,
// since the first level can have only few misses under way.

/// Units of time: a neuron's gate and up, the same from the high planes alone, and a group of a
/// batch's down rows.
constexpr int64_t kNeuronUnits = 3, kSketchUnits = 2, kAddUnits = 3;

class Wanted {
 public:
  void clear() { count_ = next_ = left_ = 0; }
  void add(const std::uint8_t* row, int64_t bytes) {
    Lines& lines = rows_[count_++];
    lines = {row, row + (bytes + 63) / 64 * 64};
    left_ += (bytes + 63) / 64;
  }
  /// All that is left, spread evenly over so many units of time.
  void spread(int64_t units) { step_ = (left_ + units - 1) / max(units, 1); }
  /// What a piece of work that takes so many units may ask for.
  void ask(int64_t units) {
    int64_t lines = min(step_ * units, left_);
    left_ -= lines;
    while (lines > 0) {
      Lines& row = rows_[next_];
      const std::uint8_t* const end =
          lines < (row.end - row.begin) / 64 ? row.begin + lines * 64 : row.end;
      lines -= (end - row.begin) / 64;
      for (; row.begin != end; row.begin += 64) __builtin_prefetch(row.begin, 0, 2);
      next_ += end == row.end;
    }
  }
  void ask_for_rest() { spread(1), ask(1); }

 private:
  struct Lines {
    const std::uint8_t *begin, *end;
  };
  static constexpr int64_t kMost = 6 * kBatch;
  int64_t count_ = 0, next_ = 0, left_ = 0, step_ = 0;  // step: lines per unit
  Lines rows_[kMost];
};

// ---- down rows ------------------------------------------------------------------------------

/// A neuron's down row and what it is taken times.
template <class Row>
struct Down {
  Row row;
  float h;
};

#if defined(__AVX512VNNI__)

/// What a batch's rows are taken times, h * scale, for kLanes scales: as 16-bit integers relative
/// to the largest of them. In halves of 8 bits, four rows to an int32, for byte products.
template <class Row>
struct Factors {
  static constexpr int kQuads = kBatch / 4;
  alignas(64) float step[kLanes];
  alignas(64) int32_t high_start[kLanes], low_start[kLanes];  // -kOffset sum of the halves
  alignas(64) int32_t high[kQuads][kLanes], low[kQuads][kLanes];

  Factors(const Down<Row>* downs, int64_t count, int64_t s) {
    __m512 exact[kBatch], largest = _mm512_setzero_ps();
    for (int64_t r = count; r % 4 != 0; ++r) exact[r] = _mm512_setzero_ps();
    for (int64_t r = 0; r < count; ++r) {
      exact[r] = (__m512)(downs[r].h * downs[r].row.scales.step * downs[r].row.scales.from(s));
      largest = _mm512_max_ps(largest, _mm512_abs_ps(exact[r]));
    }
    const __m512 most = _mm512_set1_ps(32512.0f);  // 127 * 256
    _mm512_store_ps(step, _mm512_div_ps(largest, most));
    const __mmask16 some = _mm512_cmp_ps_mask(largest, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    const __m512 inverse = _mm512_maskz_div_ps(some, most, largest);
    __m512i high_sum = _mm512_setzero_si512(), low_sum = _mm512_setzero_si512();
    for (int64_t q = 0; 4 * q < count; ++q) {
      __m128i high_bytes[4], low_bytes[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m512i integers = _mm512_cvtps_epi32(_mm512_mul_ps(exact[4 * q + i], inverse));
        const __m512i highs =
            _mm512_srai_epi32(_mm512_add_epi32(integers, _mm512_set1_epi32(128)), 8);
        const __m512i lows = _mm512_sub_epi32(integers, _mm512_slli_epi32(highs, 8));
        high_sum = _mm512_add_epi32(high_sum, highs);
        low_sum = _mm512_add_epi32(low_sum, lows);
        high_bytes[i] = _mm512_cvtepi32_epi8(highs);
        low_bytes[i] = _mm512_cvtepi32_epi8(lows);
      }
      interleave(high_bytes, high[q]);
      interleave(low_bytes, low[q]);
    }
    const __m512i offset = _mm512_set1_epi32(-Row::kOffset);
    _mm512_store_si512(high_start, _mm512_mullo_epi32(high_sum, offset));
    _mm512_store_si512(low_start, _mm512_mullo_epi32(low_sum, offset));
  }

 private:
  /// out[g] = byte g of each of the four.
  static void interleave(const __m128i bytes[4], int32_t* out) {
    const __m128i a = _mm_unpacklo_epi8(bytes[0], bytes[1]);
    const __m128i b = _mm_unpackhi_epi8(bytes[0], bytes[1]);
    const __m128i c = _mm_unpacklo_epi8(bytes[2], bytes[3]);
    const __m128i d = _mm_unpackhi_epi8(bytes[2], bytes[3]);
    auto* const p = reinterpret_cast<__m128i*>(out);
    _mm_store_si128(p, _mm_unpacklo_epi16(a, c));
    _mm_store_si128(p + 1, _mm_unpackhi_epi16(a, c));
    _mm_store_si128(p + 2, _mm_unpacklo_epi16(b, d));
    _mm_store_si128(p + 3, _mm_unpackhi_epi16(b, d));
  }
};

/// A group's kScales integers, each for as many lanes.
template <int kScales>
inline __m512i spread(const int32_t* p) {
  if constexpr (kScales == 2)
    return _mm512_permutexvar_epi32(
        _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0),
        _mm512_castsi128_si512(_mm_loadl_epi64((const __m128i*)p)));
  const __m512i index = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  return _mm512_permutexvar_epi32(index,
                                  _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)p)));
}

/// y += sum over i < count <= kBatch of h[i] row[i]; not exact: of the rows' high planes. y: whole
/// groups
template <bool kExact, class Row>
inline void add_rows(const Down<Row>* downs, int64_t count, int64_t groups, float* y,
                     Wanted& wanted) {
  constexpr int kScales = Row::kScales;
  if (count == 0) return;
  for (int64_t g0 = 0; g0 < groups; g0 += kLanes / kScales) {
    const Factors<Row> factors(downs, count, g0 * kScales);
    for (int64_t g = 0; g < min(kLanes / kScales, groups - g0); ++g, y += kGroup) {
      wanted.ask(kAddUnits);
      const int64_t at = g * kScales;
      const __m512i high_start = spread<kScales>(factors.high_start + at);
      const __m512i low_start = spread<kScales>(factors.low_start + at);
      __m512i high[4] = {high_start, high_start, high_start, high_start};
      __m512i low[4] = {low_start, low_start, low_start, low_start};
      for (int64_t q = 0; 4 * q < count; ++q) {
        const int64_t last = count - 1;  // in the place of rows beyond it, times zero
        __m512i codes[4], columns[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const Down<Row>& down = downs[min(4 * q + i, last)];
          codes[i] = down.row.template codes<kExact>(g0 + g);
        }
        interleave(codes, columns);
        const __m512i high_factors = spread<kScales>(factors.high[q] + at);
        const __m512i low_factors = spread<kScales>(factors.low[q] + at);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          high[i] = _mm512_dpbusd_epi32(high[i], columns[i], high_factors);
          low[i] = _mm512_dpbusd_epi32(low[i], columns[i], low_factors);
        }
      }
      __m512i s[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) s[i] = _mm512_add_epi32(_mm512_slli_epi32(high[i], 8), low[i]);
      // The 128-bit lanes of the four, transposed, are the columns in order.
      const __m512i ab = _mm512_shuffle_i32x4(s[0], s[1], 0x88);
      const __m512i AB = _mm512_shuffle_i32x4(s[0], s[1], 0xdd);
      const __m512i cd = _mm512_shuffle_i32x4(s[2], s[3], 0x88);
      const __m512i CD = _mm512_shuffle_i32x4(s[2], s[3], 0xdd);
      const __m512i ordered[4] = {
          _mm512_shuffle_i32x4(ab, cd, 0x88), _mm512_shuffle_i32x4(AB, CD, 0x88),
          _mm512_shuffle_i32x4(ab, cd, 0xdd), _mm512_shuffle_i32x4(AB, CD, 0xdd)};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        float* const out = y + i * kLanes;
        const float step = factors.step[at + i * kScales / 4];
        store(out, load_as<Floats>(out) + step * to_floats((Ints)ordered[i]));
      }
    }
  }
}

#else

/// y += sum over i < count <= kBatch of h[i] row[i]; not exact: of the rows' high planes. y: whole
/// groups
template <bool kExact, class Row>
inline void add_rows(const Down<Row>* downs, int64_t count, int64_t groups, float* y,
                     Wanted& wanted) {
  constexpr int kVectors = kGroup / kLanes, kScales = Row::kScales;
  static_assert(kLanes % kScales == 0);
  float factors[kBatch][kLanes];
  for (int64_t g = 0; g < groups; ++g, y += kGroup) {
    wanted.ask(kAddUnits);
    const int64_t at = g * kScales % kLanes;
    if (at == 0)
      for (int64_t r = 0; r < count; ++r)
        store(factors[r],
              downs[r].h * downs[r].row.scales.step * downs[r].row.scales.from(g * kScales));
    Floats sums[kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) sums[i] = load_as<Floats>(y + i * kLanes);
    for (int64_t r = 0; r < count; ++r) {
      std::int8_t codes[kGroup];
      downs[r].row.template codes<kExact>(g, codes);
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; ++i)
        sums[i] += factors[r][at + i * kScales / kVectors] * signed_floats(codes + i * kLanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) store(y + i * kLanes, sums[i]);
  }
}

#endif

}  // namespace
}  // namespace tda
