// Products of a few int8 rows with prepared x, with AVX-512 and VNNI.
#pragma once

#include "cpu/integer_inputs.h"

namespace tda {
namespace {

/// Keeps compilers from loading the same bytes again for each use.
inline __m512i load_once(const void* p) {
  __m512i v = _mm512_loadu_si512(p);
  asm("" : "+v"(v));
  return v;
}

/// Scales of a pair of groups. Those of kBlockLines pairs fill a vector.
template <class Row>
constexpr int64_t kOfPair = 2 * Row::kScales;
static_assert(kBlockLines * kOfPair<Int8Row> == kLanes);

/// The line's scales of kBlockLines pairs of groups, each in the lanes of its values.
inline Floats scales_of_line(Floats scales, int line) {
  const __m512i lanes = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  return (Floats)_mm512_permutexvar_ps(_mm512_add_epi32(lanes, _mm512_set1_epi32(4 * line)),
                                       (__m512)scales);
}

/// The codes of a pair of groups: of lower nibbles, and of upper.
inline void unpack(__m512i high, __m512i low, __m512i (&codes)[2]) {
  codes[0] = merge(_mm512_slli_epi16(high, 4), low);
  codes[1] = merge(high, _mm512_srli_epi16(low, 4));
}

/// The products of a row's codes with a pair of groups of x, summed by lanes. q, start: as the pair
/// has them
template <bool kExact>
[[gnu::always_inline]] inline Floats products_of(const __m512i (&codes)[2], const Pair& pair,
                                                 __m512i q0, __m512i q1, __m512i start) {
  __m512i integers = _mm512_dpbusd_epi32(start, codes[0], q0);
  integers = _mm512_dpbusd_epi32(integers, codes[1], q1);
  if (kExact && pair.has_residual) {
    const __m512i shifted = _mm512_slli_epi32(integers, 8);
    integers = _mm512_add_epi32(shifted, _mm512_load_si512(pair.residual_start));
    for (int i = 0; i < 2; ++i)
      integers = _mm512_dpbusd_epi32(integers, codes[i], _mm512_load_si512(pair.residual[i]));
  }
  return to_floats((Ints)integers);
}
template <bool kExact>
[[gnu::always_inline]] inline Floats products_of(const __m512i (&codes)[2], const Pair& pair) {
  return products_of<kExact>(codes, pair, _mm512_load_si512(pair.q[0]),
                             _mm512_load_si512(pair.q[1]),
                             _mm512_load_si512(kExact ? pair.start : pair.coarse_start));
}

/// A pair of groups of x in registers, for several rows.
template <bool kExact>
struct LoadedPair {
  const Pair& pair;
  __m512i q0, q1, start;

  explicit LoadedPair(const Pair& from)
      : pair(from),
        q0(load_once(from.q[0])),
        q1(load_once(from.q[1])),
        start(load_once(kExact ? from.start : from.coarse_start)) {}
  [[gnu::always_inline]] Floats times(const __m512i (&codes)[2]) const {
    return products_of<kExact>(codes, pair, q0, q1, start);
  }
};

/// Calls take(v, r, lanes) with the dot product of row r (or of its high plane) and x[v], one partial
/// sum per lane, for kCount rows and kX vectors. Rows share each load of an x, and each x the unpacked
/// codes of a row; `ahead` prefetches meanwhile. The loop is bound by its instruction count, and takes
/// a fifth longer if called instead of inlined. The order of lines within a block does not change the
/// result: the last of four has an accumulator of its own, and the others keep their order.
template <bool kExact, class Row, int kCount, int kX, class Ahead, class Take>
[[gnu::always_inline]] inline void multiply(const Row (&rows)[kCount], const Ahead& ahead,
                                            const Vector<Row> (&x)[kX], const Take& take) {
  float steps[kCount];  // read first, since they are at the rows' ends: saves 10% of the time
  for (int r = 0; r < kCount; ++r) steps[r] = rows[r].scales.step();
  Floats sums[kX][kCount][2] = {};

  // Adds kBlockLines pairs from p on or, if not `all`, those that are left; the last may be half a
  // pair.
  const auto add_pairs = [&](int64_t p, bool all) __attribute__((always_inline)) {
    const auto& ahead_here = ahead.at_block(p / kBlockLines);
    const int64_t s = p * kOfPair<Row>;
    Floats scales[kX][kCount];
#pragma GCC unroll 4
    for (int r = 0; r < kCount; ++r) {
      const Floats of_row = rows[r].scales.from(s);
#pragma GCC unroll 2
      for (int v = 0; v < kX; ++v)
        scales[v][r] = of_row * load_as<Floats>((kExact ? x[v].scales : x[v].coarse_scales) + s);
      ahead.prefetch_scales(r, s);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kBlockLines; ++i) {
      const int line = line_in_block(i, !all || Ahead::kInOrder);
      const int64_t at = (p + line) * kPairBytes, groups = x[0].count - 2 * (p + line);
      if (!all && groups <= 0) break;
      __mmask64 there = groups > 1 ? ~0ull : 0xffffffffull;
      asm("" : "+Yk"(there));  // masked even if all are there, see load_no_hw_prefetch
      const LoadedPair<kExact> first(x[0].pairs[p + line]);
#pragma GCC unroll 4
      for (int r = 0; r < kCount; ++r) {
        const __m512i high = _mm512_maskz_loadu_epi8(there, rows[r].plane(0) + at);
        ahead_here.prefetch(0, r, at);
        __m512i codes[2] = {lower_nibbles(high), upper_nibbles(high)};
        if (kExact) {
          unpack(high, _mm512_maskz_loadu_epi8(there, rows[r].plane(1) + at), codes);
          ahead_here.prefetch(1, r, at);
        }
#pragma GCC unroll 2
        for (int v = 0; v < kX; ++v) {
          const Floats products =
              v == 0 ? first.times(codes) : products_of<kExact>(codes, x[v].pairs[p + line]);
          Floats& sum = sums[v][r][line == kBlockLines - 1];
          sum = multiply_add(scales_of_line(scales[v][r], line), products, sum);
        }
      }
    }
  };
  int64_t p = 0;
  for (; 2 * (p + kBlockLines) <= x[0].count; p += kBlockLines) add_pairs(p, true);
  if (2 * p < x[0].count) add_pairs(p, false);
  for (int v = 0; v < kX; ++v)
    for (int r = 0; r < kCount; ++r) take(v, r, steps[r] * (sums[v][r][0] + sums[v][r][1]));
}

template <bool kExact, class Row, int kCount, class Ahead, class Take>
[[gnu::always_inline]] inline void multiply_each(const Row (&rows)[kCount], const Ahead& ahead,
                                                 const Vector<Row>& x, const Take& take) {
  const Vector<Row> one[1] = {x};
  multiply<kExact>(rows, ahead, one, take);
}

/// The same for a few x, two at a time.
template <bool kExact, class Row, int kCount, class Ahead, class Take>
[[gnu::always_inline]] inline void multiply_each(const Row (&rows)[kCount], const Ahead& ahead,
                                                 const FewVectors<Row>& x, const Take& take) {
  for_blocks<2>(x.count, [&](auto size, int64_t first) __attribute__((always_inline)) {
    Vector<Row> some[size.value];
    for (int64_t v = 0; v < size.value; ++v) some[v] = x.of[first + v];
    const auto take_of = [&](int64_t v, int r, Floats lanes)
                             __attribute__((always_inline)) { take(first + v, r, lanes); };
    if (first == 0)
      multiply<kExact>(rows, ahead, some, take_of);
    else
      multiply<kExact>(rows, NothingAhead(), some, take_of);
  });
}

/// Codes of kRows rows, unpacked once for many x, which find them in L1.
template <class Row, int kRows>
struct UnpackedRows {
  static constexpr int64_t kMost = 4 * kBlockLines;  // pairs of groups: 8 KiB of codes
  __m512i codes[kMost][kRows][2];
  Floats scales[kMost / kBlockLines][kRows];

  /// Pairs first to end - 1 of rows that have so many groups.
  [[gnu::always_inline]] UnpackedRows(const Row (&rows)[kRows], int64_t first, int64_t end,
                                      int64_t groups) {
    for (int64_t p = first; p < end; ++p) {
      const __mmask64 there = groups - 2 * p > 1 ? ~0ull : 0xffffffffull;
      const int64_t i = p - first, at = p * kPairBytes;
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        unpack(_mm512_maskz_loadu_epi8(there, rows[r].plane(0) + at),
               _mm512_maskz_loadu_epi8(there, rows[r].plane(1) + at), codes[i][r]);
        if (i % kBlockLines == 0)
          scales[i / kBlockLines][r] = rows[r].scales.from(p * kOfPair<Row>);
      }
    }
  }

  /// sums[r] += row r times pairs first to end - 1 of x, in the order of `multiply`.
  [[gnu::always_inline]] void add_products(const Vector<Row>& x, int64_t first, int64_t end,
                                           Floats (&sums)[kRows][2]) const {
    for (int64_t p = first; p < end; p += kBlockLines) {
      const Floats of_x = load_as<Floats>(x.scales + p * kOfPair<Row>);
      Floats of_rows[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) of_rows[r] = scales[(p - first) / kBlockLines][r] * of_x;
#pragma GCC unroll 4
      for (int line = 0; line < kBlockLines; ++line) {
        if (p + line >= end) break;
        const LoadedPair<true> pair(x.pairs[p + line]);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          Floats& sum = sums[r][line == kBlockLines - 1];
          sum = multiply_add(scales_of_line(of_rows[r], line),
                             pair.times(codes[p + line - first][r]), sum);
        }
      }
    }
  }
};

/// The same for many x. `ahead` prefetches a part of its lines for each.
template <bool kExact, class Row, int kRows, class Ahead, class Take>
[[gnu::always_inline]] inline void multiply_each(const Row (&rows)[kRows], const Ahead& ahead,
                                                 const ManyVectors<Row>& x, const Take& take) {
  static_assert(kExact);
  using Unpacked = UnpackedRows<Row, kRows>;
  const int64_t groups = x.of[0].count, pairs = (groups + 1) / 2;
  float steps[kRows];
  for (int r = 0; r < kRows; ++r) steps[r] = rows[r].scales.step();
  Shares<Ahead> shares(ahead, ahead.lines(pairs), x.count);
  Floats so_far[Vectors::kMost][kRows][2];
  for (int64_t first = 0; first < pairs; first += Unpacked::kMost) {
    const int64_t end = min(pairs, first + Unpacked::kMost);
    const Unpacked unpacked(rows, first, end, groups);
    for (int64_t v = 0; v < x.count; ++v) {
      if (first == 0) shares.prefetch_next();
      Floats sums[kRows][2] = {};
      if (first > 0) __builtin_memcpy(sums, so_far[v], sizeof sums);
      unpacked.add_products(x.of[v], first, end, sums);
      if (end < pairs) {
        __builtin_memcpy(so_far[v], sums, sizeof sums);
        continue;
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) take(v, r, steps[r] * (sums[r][0] + sums[r][1]));
    }
  }
}

}  // namespace
}  // namespace tda
