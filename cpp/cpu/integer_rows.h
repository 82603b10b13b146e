// Decode for integer rows, int8: dot products with an x that is quantised, too.
#pragma once

#include <type_traits>

#include "cpu/integer_inputs.h"

namespace tda {
namespace {

#if defined(__AVX512VNNI__)
/// Keeps compilers from loading the same bytes again for each use.
inline __m512i load_once(const void* p) {
  __m512i v = _mm512_loadu_si512(p);
  asm("" : "+v"(v));
  return v;
}

/// The index of each lane's scale: those of a pair of groups start at `first`.
template <int kScales>
inline __m512i scales_of_lanes(int first = 0) {
  const __m512i index = kScales == 2
                            ? _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0)
                            : _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  return _mm512_add_epi32(index, _mm512_set1_epi32(first));
}

/// The products of a row's codes, of lower and of upper nibbles, with a pair of groups of x, summed by
/// lanes. q, start: as the pair has them
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

/// lanes[v][r]: dot products of kCount rows (or of their high planes) with x[v], one partial sum per
/// lane. Rows share each load of an x, and each x the unpacked codes of a row; `ahead` prefetches
/// meanwhile. The loop is bound by its instruction count, and takes a fifth longer if called instead
/// of inlined. The order of lines within a block does not change the result: the last of four has an
/// accumulator of its own, and the others keep their order.
template <bool kExact, class Row, int kCount, int kX, class Ahead>
[[gnu::always_inline]] inline void multiply(const Row (&rows)[kCount], const Ahead& ahead,
                                            const Vector<Row> (&x)[kX],
                                            Floats (&lanes)[kX][kCount]) {
  constexpr int kOfPair = 2 * Row::kScales;                 // scales
  constexpr int kVectors = kBlockLines * kOfPair / kLanes;  // of scales: 1 or 2
  float steps[kCount];  // read first, since they are at the rows' ends: saves 10% of the time
  for (int r = 0; r < kCount; ++r) steps[r] = rows[r].scales.step();
  Floats sums[kX][kCount][2] = {};

  // Adds pair p: load(address) gives a row's line, scale(v, r) the scales of its lanes in row r.
  const auto add_pair = [&](int64_t p, int sum, const auto& ahead_here, const auto& load,
                            const auto& scale) __attribute__((always_inline)) {
    const Pair& one = x[0].pairs[p];
    const __m512i q[2] = {load_once(one.q[0]), load_once(one.q[1])};
    const __m512i start = load_once(kExact ? one.start : one.coarse_start);
#pragma GCC unroll 4
    for (int r = 0; r < kCount; ++r) {
      const __m512i high = load(rows[r].plane(0) + p * kPairBytes);
      ahead_here.prefetch(0, r, p * kPairBytes);
      __m512i codes[2] = {lower_nibbles(high), upper_nibbles(high)};
      if (kExact) {
        const __m512i low = load(rows[r].plane(1) + p * kPairBytes);
        ahead_here.prefetch(1, r, p * kPairBytes);
        codes[0] = merge(_mm512_slli_epi16(high, 4), low);
        codes[1] = merge(high, _mm512_srli_epi16(low, 4));
      }
#pragma GCC unroll 4
      for (int v = 0; v < kX; ++v) {
        const Pair& pair = x[v].pairs[p];
        const Floats products =
            v == 0 ? products_of<kExact>(codes, one, q[0], q[1], start)
                   : products_of<kExact>(
                         codes, pair, _mm512_load_si512(pair.q[0]), _mm512_load_si512(pair.q[1]),
                         _mm512_load_si512(kExact ? pair.start : pair.coarse_start));
        sums[v][r][sum] = multiply_add(scale(v, r), products, sums[v][r][sum]);
      }
    }
  };
  // Adds kBlockLines pairs from p on or, if not `all`, those that are left; the last may be half a
  // pair.
  const auto add_pairs = [&](int64_t p, bool all) __attribute__((always_inline)) {
    const auto& ahead_here = ahead.at_block(p / kBlockLines);
    Floats scales[kX][kCount][kVectors];
    const auto load_scales = [&](int i) __attribute__((always_inline)) {
      const int64_t s = p * kOfPair + i * kLanes;
#pragma GCC unroll 4
      for (int r = 0; r < kCount; ++r) {
        const Floats of_row = rows[r].scales.from(s);
#pragma GCC unroll 4
        for (int v = 0; v < kX; ++v)
          scales[v][r][i] =
              of_row * load_as<Floats>((kExact ? x[v].scales : x[v].coarse_scales) + s);
        ahead.prefetch_scales(r, s);
      }
    };
    for (int i = 0; all && i < kVectors; ++i) load_scales(i);
#pragma GCC unroll 4
    for (int i = 0; i < kBlockLines; ++i) {
      const int line = line_in_block(i, !all || Ahead::kInOrder), at = line * kOfPair;
      const int64_t groups = x[0].count - 2 * (p + line);
      if (!all && groups <= 0) break;
      if (!all && at % kLanes == 0) load_scales(at / kLanes);
      __mmask64 there = groups > 1 ? ~0ull : 0xffffffffull;
      asm("" : "+Yk"(there));  // masked even if all are there, see load_no_hw_prefetch
      const __m512i index = scales_of_lanes<Row::kScales>(at % kLanes);
      add_pair(
          p + line, line == kBlockLines - 1, ahead_here,
          [&](const std::uint8_t* from) { return _mm512_maskz_loadu_epi8(there, from); },
          [&](int v, int r) {
            return (Floats)_mm512_permutexvar_ps(index, (__m512)scales[v][r][at / kLanes]);
          });
    }
  };
  int64_t p = 0;
  for (; 2 * (p + kBlockLines) <= x[0].count; p += kBlockLines) add_pairs(p, true);
  if (2 * p < x[0].count) add_pairs(p, false);
  for (int v = 0; v < kX; ++v)
    for (int r = 0; r < kCount; ++r) lanes[v][r] = steps[r] * (sums[v][r][0] + sums[v][r][1]);
}

#else

/// Lane i: kTimes * the sum of four codes * q.
template <int kTimes>
inline Ints sums_of_four(Bytes codes, const std::int8_t* q) {
#if defined(__AVX2__)
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)codes, _mm256_loadu_si256((const __m256i*)q));
  return (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(kTimes));
#else
  Ints sums = {};
  for (int i = 0; i < kVectorBytes; ++i) sums[i / 4] += codes[i] * q[i];
  return kTimes * sums;
#endif
}

/// Floats first ... first + kCount - 1 of kLanes, each repeated over kLanes / kCount lanes.
template <int kCount>
inline Floats spread(const float* all, int first) {
#if defined(__AVX2__)  // a load of the width it was stored with is forwarded
  Ints index;
  for (int lane = 0; lane < kLanes; ++lane) index[lane] = lane * kCount / kLanes;
  const __m256i from = _mm256_add_epi32((__m256i)index, _mm256_set1_epi32(first));
  return (Floats)_mm256_permutevar8x32_ps(_mm256_loadu_ps(all), from);
#else
  Floats out;
  for (int lane = 0; lane < kLanes; ++lane) out[lane] = all[first + lane * kCount / kLanes];
  return out;
#endif
}

/// Dot products of kCount rows (or of their high planes) with x, one partial sum per lane; `ahead`
/// prefetches meanwhile.
template <bool kExact, class Row, int kCount, class Ahead>
inline void multiply(const Row (&rows)[kCount], const Ahead& ahead, const Vector<Row> (&one)[1],
                     Floats (&lanes)[1][kCount]) {
  const Vector<Row>& x = one[0];
  constexpr int64_t kGroups = kLanes / Row::kScales;
  constexpr int kPerVector = 2 * kVectorBytes * Row::kScales / kGroup;  // scales
  Floats sums[kCount] = {};
  for (int64_t g0 = 0; g0 < x.count; g0 += kGroups) {
    const int64_t s = g0 * Row::kScales;
    float scales[kCount][kLanes];
    for (int r = 0; r < kCount; ++r) {
      const Floats of_x = load_as<Floats>((kExact ? x.scales : x.coarse_scales) + s);
      store(scales[r], rows[r].scales.from(s) * of_x);
      ahead.prefetch_scales(r, s);
    }
    for (int64_t g = g0; g < min(g0 + kGroups, x.count); ++g) {
      const Pair& pair = x.pairs[g / 2];
#pragma GCC unroll 4
      for (int r = 0; r < kCount; ++r) {
        Bytes high[kParts], low[kParts];
        expand(rows[r].plane(0) + g * kGroupBytes, high);
        if (kExact) expand(rows[r].plane(1) + g * kGroupBytes, low);
        if (g % 2 == 0)
          for (int plane = 0; plane < (kExact ? 2 : 1); ++plane)
            ahead.prefetch(plane, r, g * kGroupBytes);
#pragma GCC unroll 4
        for (int part = 0; part < kParts / 2; ++part) {
          const int64_t first = part * kVectorBytes, at = g % 2 * kGroupBytes + first;
          const auto of_codes = [&](int i, const std::int8_t* q) {
            return kExact ? sums_of_four<16>(high[i], q) + sums_of_four<1>(low[i], q)
                          : sums_of_four<1>(high[i], q);
          };
          const auto products = [&](const std::int8_t (&q)[2][kPairBytes]) {
            return of_codes(part, q[0] + at) + of_codes(part + kParts / 2, q[1] + at);
          };
          const auto& start = kExact ? pair.start : pair.coarse_start;
          Ints integers = load_as<Ints>(start + at / 4) + products(pair.q);
          if (kExact && pair.has_residual)
            integers = (integers << 8) + load_as<Ints>(pair.residual_start + at / 4) +
                       products(pair.residual);
          const int64_t of_part = (g - g0) * Row::kScales + 2 * first * Row::kScales / kGroup;
          const Floats scale = spread<kPerVector>(scales[r], static_cast<int>(of_part));
          sums[r] = multiply_add(scale, to_floats(integers), sums[r]);
        }
      }
    }
  }
  for (int r = 0; r < kCount; ++r) lanes[0][r] = rows[r].scales.step() * sums[r];
}

#endif

/// Calls multiply<kExact> of some rows with each x, then take(v, lanes). Only the first reads memory.
template <bool kExact, class Row, int kCount, class Ahead, class Take>
[[gnu::always_inline]] inline void multiply_each(const Row (&rows)[kCount], const Ahead& ahead,
                                                 const Vector<Row>& x, const Take& take) {
  Floats lanes[1][kCount];
  multiply<kExact>(rows, ahead, {x}, lanes);
  take(0, lanes[0]);
}
#if defined(__AVX2__) && !defined(__AVX512VNNI__)

/// Dot products of a row, the r-th of those that `ahead` knows, with kCount x, one partial sum per
/// lane: what `multiply` gives for each, from codes of 16 bits.
template <int kCount, class Row, class Ahead>
[[gnu::always_inline]] inline void multiply_wide(const Row& row, int r, const Ahead& ahead,
                                                 const WideGroup* x, int64_t groups,
                                                 Floats* lanes) {
  constexpr int64_t kGroups = kLanes / Row::kScales;
  const __m256i low_four = _mm256_set1_epi8(15), low_byte = _mm256_set1_epi16(255);
  Floats sums[kCount];
#pragma GCC unroll 8
  for (int v = 0; v < kCount; ++v) sums[v] = Floats{};
  for (int64_t g0 = 0; g0 < groups; g0 += kGroups) {
    float scales[kLanes];
    store(scales, row.scales.from(g0 * Row::kScales));
    ahead.prefetch_scales(r, g0 * Row::kScales);
    for (int64_t g = g0; g < min(g0 + kGroups, groups); ++g) {
      const __m256i high = load_as<__m256i>(row.plane(0) + g * kGroupBytes);
      const __m256i low = load_as<__m256i>(row.plane(1) + g * kGroupBytes);
      if (g % 2 == 0)
        for (int plane = 0; plane < 2; ++plane) ahead.prefetch(plane, r, g * kGroupBytes);
      const __m256i lower = _mm256_or_si256(_mm256_slli_epi16(_mm256_and_si256(high, low_four), 4),
                                            _mm256_and_si256(low, low_four));
      const __m256i upper = _mm256_or_si256(_mm256_andnot_si256(low_four, high),
                                            _mm256_and_si256(_mm256_srli_epi16(low, 4), low_four));
      const __m256i codes[4] = {_mm256_and_si256(lower, low_byte), _mm256_srli_epi16(lower, 8),
                                _mm256_and_si256(upper, low_byte), _mm256_srli_epi16(upper, 8)};
      constexpr int kPerVector = Row::kScales;
      const Floats of_row = spread<kPerVector>(scales, static_cast<int>((g - g0) * kPerVector));
      const WideGroup* const of_group = x + g * kCount;
#pragma GCC unroll 8
      for (int v = 0; v < kCount; ++v) {
        const WideGroup& group = of_group[v];
        __m256i integers = load_as<__m256i>(group.start);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          integers =
              _mm256_add_epi32(integers, _mm256_madd_epi16(codes[i], load_as<__m256i>(group.q[i])));
        sums[v] = multiply_add(of_row * load_as<Floats>(group.scales), to_floats((Ints)integers),
                               sums[v]);
      }
    }
  }
  const float step = row.scales.step();
#pragma GCC unroll 8
  for (int v = 0; v < kCount; ++v) lanes[v] = step * sums[v];
}

template <bool kExact, class Row, int kRows, class Ahead, class Take>
[[gnu::always_inline]] inline void multiply_each(const Row (&rows)[kRows], const Ahead& ahead,
                                                 const VectorsOf<Row>& x, const Take& take) {
  static_assert(kExact);
  Floats lanes[kRows][Vectors::kMost];
  for_blocks<VectorsOf<Row>::kMostAtOnce>(
      x.count, [&](auto size, int64_t first) __attribute__((always_inline)) {
        const WideGroup* const block = x.wide.get() + first * x.groups;
        for (int r = 0; r < kRows; ++r)
          if (first == 0)
            multiply_wide<size.value>(rows[r], r, ahead, block, x.groups, lanes[r]);
          else
            multiply_wide<size.value>(rows[r], r, NothingAhead(), block, x.groups,
                                      lanes[r] + first);
      });
  for (int64_t v = 0; v < x.count; ++v) {
    Floats own[kRows];
    for (int r = 0; r < kRows; ++r) own[r] = lanes[r][v];
    take(v, own);
  }
}

#else

template <bool kExact, class Row, int kCount, class Ahead, class Take>
[[gnu::always_inline]] inline void multiply_each(const Row (&rows)[kCount], const Ahead& ahead,
                                                 const VectorsOf<Row>& x, const Take& take) {
  for_blocks<VectorsOf<Row>::kMostAtOnce>(
      x.count, [&](auto size, int64_t first) __attribute__((always_inline)) {
        Vector<Row> some[size.value];
        Floats lanes[size.value][kCount];
        for (int64_t v = 0; v < size.value; ++v) some[v] = x[first + v];
        if (first == 0)
          multiply<kExact>(rows, ahead, some, lanes);
        else
          multiply<kExact>(rows, NothingAhead(), some, lanes);
        for (int64_t v = 0; v < size.value; ++v) take(first + v, lanes[v]);
      });
}

#endif

/// products[v].lanes[i] = those of w[first + i]·x[v], or of the high plane, i < count <= kBatch. w
/// has `rows` rows. x: a Vector or VectorsOf
template <bool kExact, class Row, class X>
void dot_batch(const Rows& w, int64_t first, int64_t count, int64_t rows, const NextRead& next,
               const X& x, Products* products) {
  constexpr int kRowsPerPass = 2;  // they reuse each load of x
  const Row row(w, first);
  const int64_t bytes = w.stride + (kExact ? w.low_stride : 0);
  const Streams own = {{row.plane(0), row.plane(1)}, {w.stride, w.low_stride}};
  const ReadPath path = {own, rows - first, next_streams(next, own, w.stride, w.low_stride)};
  const auto work = [&](int64_t i, const auto& ahead) __attribute__((always_inline)) {
    Row some[kRowsPerPass];
    for (int j = 0; j < kRowsPerPass; ++j) some[j] = row.after(w, min(i + j, count - 1));
    multiply_each<kExact>(some, ahead, x,
                          [&](int64_t v, const Floats* lanes) __attribute__((always_inline)) {
                            for (int j = 0; j < kRowsPerPass; ++j)
                              products[v].lanes[i + j] = lanes[j];
                          });
  };
  constexpr bool kOnce = kExact && std::is_same_v<X, Vector<Row>>;
  prefetch_along<kOnce, kRowsPerPass, kRowsPerPass>(
      path, count, rows_ahead(bytes, 2 * kRowsPerPass), (groups_of(w.n) + 1) / 2, work);
}

template <class Row>
void dot(const Rows& w, int64_t rows, const void* prepared, float* y, bool add, NextRead next) {
  const Vector<Row> x(prepared, w.n);
  for (int64_t first = 0; first < rows; first += kBatch, y += kBatch) {
    const int64_t count = min(kBatch, rows - first);
    Products products;
    float results[kBatch];
    dot_batch<true, Row>(w, first, count, rows, next, x, &products);
    products.store_to(results, count);
    for (int64_t r = 0; r < count; ++r) y[r] = results[r] + (add ? y[r] : 0.0f);
  }
}

template <class Row>
void dot_each(const Rows& w, int64_t rows, const Vectors& vectors, bool add) {
  const VectorsOf<Row> x(vectors, w.n);
  for (int64_t first = 0; first < rows; first += kBatch) {
    const int64_t count = min(kBatch, rows - first);
    Products products[Vectors::kMost];
    float results[kBatch];
    dot_batch<true, Row>(w, first, count, rows, {}, x, products);
    for (int64_t v = 0; v < vectors.count; ++v) {
      products[v].store_to(results, count);
      float* const y = vectors.y[v] + first;
      for (int64_t r = 0; r < count; ++r) y[r] = results[r] + (add ? y[r] : 0.0f);
    }
  }
}

/// out[i] = w[batch.id(i)]·x, i < batch.count, with room for whole vectors.
template <class Row>
void dot_ids(const Rows& w, const Batch& batch, const Vector<Row>& x, float* out) {
  const auto ahead = [&](int64_t i) { return batch.ahead<Row>(w, batch.next.a, i); };
  Products products;
  for (int64_t i = 0; i < batch.count; i += 2) {
    const Row pair[2] = {Row(w, batch.id(i)), Row(w, batch.id(i + 1))};  // if odd, the last twice
    multiply_each<true>(pair, RowsAhead<Row, 2>{{ahead(i), ahead(i + 1)}}, x,
                        [&](int64_t, const Floats* lanes) {
                          products.lanes[i] = lanes[0];
                          products.lanes[i + 1] = lanes[1];
                        });
  }
  products.store_to(out, batch.count);
}

template <class Row>
void load(const Rows& w, float* out, int64_t stride) {
  const Row row(w, 0);
  for (int64_t i = 0; i < w.n; i += 16) {
    float values[16];
    row.load(i, values);
    for (int64_t j = 0; j < min(16, w.n - i); ++j) out[(i + j) * stride] = values[j];
  }
}

}  // namespace
}  // namespace tda
