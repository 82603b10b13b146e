// Decode for integer rows, int8: dot products with an x that is quantised, too.
//
// Activations are quantised per weight group: x = scale q, with q of 8 bits and one scale for each
// scale of the weights. VPDPBUSD multiplies unsigned by signed bytes, so codes carry the offset
// Row::kOffset, and accumulators start at -kOffset * sum(q). Where x has outliers, int8 rows are
// also multiplied with the residual of x, another 8 bits.
#pragma once

#include "cpu/batch.h"

namespace tda {
namespace {

/// An outlier of x is this many times the root mean square of x. It leaves the other values that
/// share its scale only a few steps of it, so for these the rounding residual is kept:
/// x = scale / 256 (256 q + residual).
constexpr float kOutlier = 6;

constexpr int64_t kPairBytes = 2 * kGroupBytes;  // a cache line

/// Two groups of a prepared x in the order of a row's nibbles: q[0] is multiplied with the lower
/// nibbles, q[1] with the upper ones. A lane sums the products of four bytes.
struct alignas(64) Pair {
  std::int8_t q[2][kPairBytes];
  int32_t start[kPairBytes / 4];  // -kOffset * sum(q) of the lane
  // int8 only:
  int32_t coarse_start[kPairBytes / 4];  // the same for the high plane alone
  std::int8_t residual[2][kPairBytes];
  int32_t residual_start[kPairBytes / 4];
  bool has_residual;  // if so, scales are divided by 256
};

/// A prepared x: pairs, then their scales, padded with zeros to whole vectors.
template <class Row>
struct Vector {
  Pair* pairs;
  float* scales;
  float* coarse_scales;  // int8 only: for the high plane alone
  int64_t count;         // groups

  Vector(const void* prepared, int64_t n)
      : pairs(static_cast<Pair*>(const_cast<void*>(prepared))),
        scales(reinterpret_cast<float*>(pairs + pairs_of(n))),
        coarse_scales(scales + scale_count(n)),
        count(groups_of(n)) {}
  static int64_t pairs_of(int64_t n) { return (groups_of(n) + 1) / 2; }
  static int64_t scale_count(int64_t n) {
    return (groups_of(n) * Row::kScales + kLanes - 1) / kLanes * kLanes;
  }
};

template <class Row>
int64_t prepared_bytes(int64_t n) {
  return Vector<Row>::pairs_of(n) * sizeof(Pair) + 2 * Vector<Row>::scale_count(n) * sizeof(float);
}

/// Rounds kLanes floats of |v| <= 127, stores them as bytes and returns the rounded values.
inline Floats store_rounded(std::int8_t* p, Floats v) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23 leaves the nearest integer in the low bits
  const Floats shifted = v + kShift;
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)shifted));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<std::int8_t>(((Ints)shifted)[i]);
#endif
  return shifted - kShift;
}

/// |v| as integers, which are in the order of the values; infinity is above all numbers, and NaN
/// above infinity, so that neither gets lost in a maximum.
inline Ints size_bits(Floats v) { return (Ints)v & 0x7fffffff; }

inline float largest_size(Ints sizes) {
#if defined(__AVX512F__)
  return __builtin_bit_cast(float, _mm512_reduce_max_epi32((__m512i)sizes));
#else
  int32_t largest = sizes[0];
  for (int lane = 1; lane < kLanes; ++lane) largest = sizes[lane] > largest ? sizes[lane] : largest;
  return __builtin_bit_cast(float, largest);
#endif
}

/// out[i] = times * the sum of the q that lane i multiplies.
inline void sum_lanes(const std::int8_t (&q)[2][kPairBytes], int32_t times, int32_t* out) {
#if defined(__AVX512VNNI__)
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, _mm512_loadu_si512(q[0]));
  sums = _mm512_dpbusd_epi32(sums, ones, _mm512_loadu_si512(q[1]));
  _mm512_storeu_si512(out, _mm512_mullo_epi32(sums, _mm512_set1_epi32(times)));
#else
  for (int64_t i = 0; i < kPairBytes / 4; ++i) {
    out[i] = 0;
    for (int64_t j = 4 * i; j < 4 * i + 4; ++j) out[i] += times * (q[0][j] + q[1][j]);
  }
#endif
}

inline float root_mean_square(const float* x, int64_t n) {
  Floats squares = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Floats v = load_part<F32>(x + i, n - i);
    squares += v * v;
  }
  return __builtin_sqrtf(sum(squares) / static_cast<float>(n));
}

/// A group of x that is not finite gets a scale that is not, with which all products become NaN or
/// infinite.
template <class Row>
void prepare(const float* x, int64_t n, void* prepared) {
  constexpr int kPart = kGroup / Row::kScales, kVectors = kPart / kLanes;
  const Vector<Row> out(prepared, n);
  const float limit = kOutlier * root_mean_square(x, n);
  for (int64_t part = 0; part < 2 * Vector<Row>::pairs_of(n) * Row::kScales; ++part) {
    const int64_t first = part * kPart, in_pair = part % (2 * Row::kScales);
    Pair& pair = out.pairs[first / (2 * kGroup)];
    Floats values[kVectors];
    Ints largest = {};
    for (int i = 0; i < kVectors; ++i) {
      const int64_t left = n - first - i * kLanes;
      values[i] = left > 0 ? load_part<F32>(x + first + i * kLanes, left) : Floats{};
      const Ints sizes = size_bits(values[i]);
      largest = sizes > largest ? sizes : largest;
    }
    const float most = largest_size(largest), inverse = most > 0.0f ? 127.0f / most : 0.0f;
    std::int8_t q[kPart], residual[kPart];
    for (int i = 0; i < kVectors; ++i) {
      const Floats scaled = values[i] * inverse;
      const Floats rounded = store_rounded(q + i * kLanes, scaled);
      store_rounded(residual + i * kLanes, min(256.0f * (scaled - rounded), splat(127.0f)));
    }
    for (int half = 0; half < 2; ++half) {
      const int64_t to = in_pair * (kPart / 2), from = half * (kPart / 2);
      __builtin_memcpy(pair.q[half] + to, q + from, kPart / 2);
      __builtin_memcpy(pair.residual[half] + to, residual + from, kPart / 2);
    }
    pair.has_residual = (in_pair != 0 && pair.has_residual) || most > limit;
    if (part < out.count * Row::kScales) out.scales[part] = most / 127.0f;
  }
  for (int64_t i = out.count * Row::kScales; i < Vector<Row>::scale_count(n); ++i)
    out.scales[i] = 0.0f;
  for (int64_t i = 0; i < Vector<Row>::scale_count(n); ++i)
    out.coarse_scales[i] = 16.0f * out.scales[i];
  for (int64_t p = 0; p < Vector<Row>::pairs_of(n); ++p) {
    Pair& pair = out.pairs[p];
    sum_lanes(pair.q, -Row::kOffset, pair.start);
    sum_lanes(pair.q, -8, pair.coarse_start);
    if (!pair.has_residual) continue;
    sum_lanes(pair.residual, -Row::kOffset, pair.residual_start);
    const int64_t end = min(2 * (p + 1), out.count) * Row::kScales;
    for (int64_t i = 2 * p * Row::kScales; i < end; ++i) out.scales[i] /= 256.0f;
  }
}

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

/// Dot products of kCount rows (or of their high planes) with x, one partial sum per lane. The rows
/// share each load of x; `ahead` prefetches meanwhile. The loop is bound by its instruction count,
/// and takes a fifth longer if called instead of inlined. The order of lines within a block does
/// not change the result: the last of four has an accumulator of its own, and the others keep their
/// order.
template <bool kExact, class Row, int kCount, class Ahead>
[[gnu::always_inline]] inline void multiply(const Row (&rows)[kCount], const Ahead& ahead,
                                            const Vector<Row>& x, Floats (&lanes)[kCount]) {
  constexpr int kOfPair = 2 * Row::kScales;                 // scales
  constexpr int kVectors = kBlockLines * kOfPair / kLanes;  // of scales: 1 or 2
  const float* const x_scales = kExact ? x.scales : x.coarse_scales;
  float steps[kCount];  // read first, since they are at the rows' ends: saves 10% of the time
  for (int r = 0; r < kCount; ++r) steps[r] = rows[r].scales.step();
  Floats sums[kCount][2] = {};

  // Adds pair p: load(address) gives a row's line, scale(r) the scales of its lanes in row r.
  const auto add_pair = [&](int64_t p, int sum, const auto& ahead_here, const auto& load,
                            const auto& scale) __attribute__((always_inline)) {
    const Pair& pair = x.pairs[p];
    const bool has_residual = kExact && pair.has_residual;
    const __m512i q[2] = {load_once(pair.q[0]), load_once(pair.q[1])};
    const __m512i start = load_once(kExact ? pair.start : pair.coarse_start);
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
      __m512i integers = _mm512_dpbusd_epi32(start, codes[0], q[0]);
      integers = _mm512_dpbusd_epi32(integers, codes[1], q[1]);
      if (has_residual) {
        const __m512i shifted = _mm512_slli_epi32(integers, 8);
        integers = _mm512_add_epi32(shifted, _mm512_load_si512(pair.residual_start));
        for (int i = 0; i < 2; ++i)
          integers = _mm512_dpbusd_epi32(integers, codes[i], _mm512_load_si512(pair.residual[i]));
      }
      sums[r][sum] += scale(r) * to_floats((Ints)integers);
    }
  };
  // Adds kBlockLines pairs from p on or, if not `all`, those that are left; the last may be half a
  // pair.
  const auto add_pairs = [&](int64_t p, bool all) __attribute__((always_inline)) {
    const auto& ahead_here = ahead.at_block(p / kBlockLines);
    Floats scales[kCount][kVectors];
    const auto load_scales = [&](int v) __attribute__((always_inline)) {
      const int64_t s = p * kOfPair + v * kLanes;
      const Floats of_x = load_as<Floats>(x_scales + s);
#pragma GCC unroll 4
      for (int r = 0; r < kCount; ++r) {
        scales[r][v] = rows[r].scales.from(s) * of_x;
        ahead.prefetch_scales(r, s);
      }
    };
    if (all) load_scales(0);
    if (all && kVectors == 2) load_scales(1);
#pragma GCC unroll 4
    for (int i = 0; i < kBlockLines; ++i) {
      const int line = line_in_block(i, !all || Ahead::kInOrder), at = line * kOfPair;
      const int64_t groups = x.count - 2 * (p + line);
      if (!all && groups <= 0) break;
      if (!all && at % kLanes == 0) load_scales(at / kLanes);
      __mmask64 there = groups > 1 ? ~0ull : 0xffffffffull;
      asm("" : "+Yk"(there));  // masked even if all are there, see load_no_hw_prefetch
      const __m512i index = scales_of_lanes<Row::kScales>(at % kLanes);
      add_pair(
          p + line, line == kBlockLines - 1, ahead_here,
          [&](const std::uint8_t* from) { return _mm512_maskz_loadu_epi8(there, from); },
          [&](int r) {
            return (Floats)_mm512_permutexvar_ps(index, (__m512)scales[r][at / kLanes]);
          });
    }
  };
  int64_t p = 0;
  for (; 2 * (p + kBlockLines) <= x.count; p += kBlockLines) add_pairs(p, true);
  if (2 * p < x.count) add_pairs(p, false);
  for (int r = 0; r < kCount; ++r) lanes[r] = steps[r] * (sums[r][0] + sums[r][1]);
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
inline void multiply(const Row (&rows)[kCount], const Ahead& ahead, const Vector<Row>& x,
                     Floats (&lanes)[kCount]) {
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
          sums[r] += scale * to_floats(integers);
        }
      }
    }
  }
  for (int r = 0; r < kCount; ++r) lanes[r] = rows[r].scales.step() * sums[r];
}

#endif

/// out[i] = w[first + i]·x, or that of the high plane, i < count <= kBatch. w has `rows` rows.
template <bool kExact, class Row>
void dot_batch(const Rows& w, int64_t first, int64_t count, int64_t rows, const NextRead& next,
               const Vector<Row>& x, float* out) {
  constexpr int kRowsPerPass = 2;  // they reuse each load of x
  const Row row(w, first);
  const int64_t bytes = w.stride + (kExact ? w.low_stride : 0);
  const Streams own = {{row.plane(0), row.plane(1)}, {w.stride, w.low_stride}};
  const ReadPath path = {own, rows - first, next_streams(next, own, w.stride, w.low_stride)};
  Products products;
  const auto work = [&](int64_t i, const auto& ahead) __attribute__((always_inline)) {
    Row some[kRowsPerPass];
    for (int j = 0; j < kRowsPerPass; ++j) some[j] = row.after(w, min(i + j, count - 1));
    Floats lanes[kRowsPerPass];
    multiply<kExact>(some, ahead, x, lanes);
    for (int j = 0; j < kRowsPerPass; ++j) products.lanes[i + j] = lanes[j];
  };
  prefetch_along<kExact, kRowsPerPass, kRowsPerPass>(
      path, count, rows_ahead(bytes, 2 * kRowsPerPass), (x.count + 1) / 2, work);
  products.store_to(out, count);
}

template <class Row>
void dot(const Rows& w, int64_t rows, const void* prepared, float* y, bool add, NextRead next) {
  const Vector<Row> x(prepared, w.n);
  for (int64_t first = 0; first < rows; first += kBatch, y += kBatch) {
    const int64_t count = min(kBatch, rows - first);
    float results[kBatch];
    dot_batch<true>(w, first, count, rows, next, x, results);
    for (int64_t r = 0; r < count; ++r) y[r] = results[r] + (add ? y[r] : 0.0f);
  }
}

/// out[i] = w[batch.id(i)]·x, i < batch.count, with room for whole vectors.
template <class Row>
void dot_ids(const Rows& w, const Batch& batch, const Vector<Row>& x, float* out) {
  const auto ahead = [&](int64_t i) { return batch.ahead<Row>(w, batch.next.a, i); };
  Products products;
  for (int64_t i = 0; i < batch.count; i += 2) {
    const Row pair[2] = {Row(w, batch.id(i)), Row(w, batch.id(i + 1))};  // if odd, the last twice
    Floats lanes[2];
    multiply<true>(pair, RowsAhead<Row, 2>{{ahead(i), ahead(i + 1)}}, x, lanes);
    products.lanes[i] = lanes[0];
    products.lanes[i + 1] = lanes[1];
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
