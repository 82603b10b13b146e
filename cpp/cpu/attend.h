// Attention in decode, and storing keys and values in the cache. Included by kernel sources only,
// like simd.h.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace tda {
namespace {

/// Queries processed together, for which keys and values are loaded and converted once.
constexpr int64_t kQueries = 3;
/// Scores of one query: of the keys, padded by a vector.
constexpr int64_t kScoreStride = kAttendKeys + kLanes;

constexpr int kHalf = kLanes / 2;  // keys whose products are summed at a time

/// products[j][i] += key[i] times q[j], summed per lane.
template <class Format, int kCount>
[[gnu::always_inline]] inline void multiply_keys(const typename Format::T* const (&key)[kHalf],
                                                 int64_t n, const float* q,
                                                 Floats (&products)[kCount][kHalf]) {
  for (int64_t e = 0; e < n; e += kLanes) {
    Floats x[kCount];
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) x[j] = load_part<F32>(q + j * n + e, n - e);
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i) {
      const Floats w = load_part<Format>(key[i] + e, n - e);
#pragma GCC unroll 4
      for (int j = 0; j < kCount; ++j) products[j][i] += w * x[j];
    }
  }
}

/// The same for keys whose groups have scales.
template <int kCount>
[[gnu::always_inline]] inline void multiply_int8_keys(const std::int8_t* const (&key)[kHalf],
                                                      int64_t n, const float* q,
                                                      Floats (&products)[kCount][kHalf]) {
  for (int64_t first = 0; first < n; first += kKvGroup) {
    Floats scales[kHalf];
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i) scales[i] = splat_cache_scale(key[i], n, first);
    const auto add = [&](int64_t e, const auto& load, const auto& load_q) {
      Floats x[kCount];
#pragma GCC unroll 4
      for (int j = 0; j < kCount; ++j) x[j] = load_q(q + j * n + e);
#pragma GCC unroll 8
      for (int i = 0; i < kHalf; ++i) {
        const Floats w = scales[i] * load(key[i] + e);
#pragma GCC unroll 4
        for (int j = 0; j < kCount; ++j) products[j][i] += w * x[j];
      }
    };
    if (first + kKvGroup <= n) {
#pragma GCC unroll 4
      for (int64_t e = first; e < first + kKvGroup; e += kLanes)
        add(e, Int8Cache::load, [](const float* p) { return load_as<Floats>(p); });
      continue;
    }
    for (int64_t e = first; e < n; e += kLanes)
      add(
          e, [&](const std::int8_t* p) { return load_part<Int8Cache>(p, n - e); },
          [&](const float* p) { return load_part<F32>(p, n - e); });
  }
}

/// scores[j][i] = k[i]·q[j], for whole vectors of keys. Prefetches the following keys, and the
/// values.
template <class Format, int kCount>
void dot_keys(const typename Format::T* k, const typename Format::T* v, int64_t keys, int64_t n,
              const float* q, float* scores) {
  for (int64_t i0 = 0; i0 < keys; i0 += kLanes) {
    Floats halves[2][kCount];
    for (int half = 0; half < 2; ++half) {
      const typename Format::T* key[kHalf];  // past the end, the last key again
      for (int i = 0; i < kHalf; ++i) {
        const int64_t at = min(i0 + half * kHalf + i, keys - 1) * cache_stride<Format>(n);
        key[i] = k + at;
        for (int64_t e = 0; e < n; e += kLineBytes / static_cast<int64_t>(sizeof *v)) {
          prefetch_nta(k + at + kLanes * cache_stride<Format>(n) + e);
          prefetch_l1(v + at + e);
        }
      }
      Floats products[kCount][kHalf] = {};
      if constexpr (__is_same(Format, Int8Cache))
        multiply_int8_keys<kCount>(key, n, q, products);
      else
        multiply_keys<Format, kCount>(key, n, q, products);
#pragma GCC unroll 4
      for (int j = 0; j < kCount; ++j) halves[half][j] = half_sums(products[j]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j)
      store(scores + j * kScoreStride + i0, join_halves(halves[0][j], halves[1][j]));
  }
}

/// The weights of key i, for the columns of v from `column` on, in all lanes; of int8 values times
/// the scale of the group there.
template <class Format, int kCount>
[[gnu::always_inline]] inline void load_weights(const float* weights, int64_t i,
                                                const typename Format::T* row, int64_t n,
                                                int64_t column, Floats (&out)[kCount]) {
#pragma GCC unroll 4
  for (int j = 0; j < kCount; ++j) out[j] = splat(weights[j * kScoreStride + i]);
  if constexpr (__is_same(Format, Int8Cache)) {
    const Floats scale = splat_cache_scale(row, n, column);
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) out[j] *= scale;
  }
}

/// out[j] = sum_i weights[j][i] v[i] for kVectors vectors of columns from `first` on; out[j] are
/// `stride` apart.
template <class Format, int kCount, int kVectors, class Load>
inline void weighted_sums(const typename Format::T* v, int64_t keys, int64_t n, int64_t first,
                          const float* weights, float* out, int64_t stride, const Load& load) {
  // Vectors with the same weights.
  constexpr int kTogether = min(kVectors, static_cast<int64_t>(kKvGroup) / kLanes);
  Floats sums[kVectors][kCount] = {};
  for (int64_t i = 0; i < keys; ++i) {
    const typename Format::T* const row = v + i * cache_stride<Format>(n);
#pragma GCC unroll 4
    for (int u0 = 0; u0 < kVectors; u0 += kTogether) {
      Floats weight[kCount];
      load_weights<Format, kCount>(weights, i, row, n, first + u0 * kLanes, weight);
#pragma GCC unroll 4
      for (int u = u0; u < u0 + kTogether; ++u) {
        const Floats value = load(row + first + u * kLanes);
#pragma GCC unroll 4
        for (int j = 0; j < kCount; ++j) sums[u][j] += weight[j] * value;
      }
    }
  }
#pragma GCC unroll 4
  for (int u = 0; u < kVectors; ++u)
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) {
      const int64_t at = first + u * kLanes;
      store_part(out + j * stride + at, sums[u][j], n - at);
    }
}

template <class Format, int kCount>
void weighted_sums(const typename Format::T* v, int64_t keys, int64_t n, const float* weights,
                   float* out, int64_t stride) {
  constexpr int kVectors = 4;
  const auto whole = [](const typename Format::T* p) { return Format::load(p); };
  int64_t e = 0;
  for (; e + kVectors * kLanes <= n; e += kVectors * kLanes)
    weighted_sums<Format, kCount, kVectors>(v, keys, n, e, weights, out, stride, whole);
  for (; e < n; e += kLanes) {
    const auto part = [&](const typename Format::T* p) { return load_part<Format>(p, n - e); };
    weighted_sums<Format, kCount, 1>(v, keys, n, e, weights, out, stride, part);
  }
}

template <class Format, int kCount>
void attend_queries(const void* k, const void* v, int64_t keys, int64_t n, const float* q,
                    ScoreScale by, float* partial) {
  using T = typename Format::T;
  float scores[kCount * kScoreStride] = {};
  dot_keys<Format, kCount>(static_cast<const T*>(k), static_cast<const T*>(v), keys, n, q, scores);
  if (by.cap > 0) {
    for (int j = 0; j < kCount; ++j)
      for (int64_t i = j * kScoreStride; i < j * kScoreStride + keys; i += kLanes)
        store(scores + i, soft_cap(by.scale * load_as<Floats>(scores + i), by.cap));
    by.scale = 1;
  }
  for (int j = 0; j < kCount; ++j) {
    float* s = scores + j * kScoreStride;
    for (int64_t i = keys; i < keys + kLanes; ++i) s[i] = -__builtin_inff();
    Floats maxima = load_as<Floats>(s);
    for (int64_t i = kLanes; i < keys; i += kLanes) maxima = max(maxima, load_as<Floats>(s + i));
    float largest = maxima[0];
    for (int lane = 1; lane < kLanes; ++lane)
      largest = maxima[lane] > largest ? maxima[lane] : largest;
    Floats total = {};
    for (int64_t i = 0; i < keys; i += kLanes) {
      const Floats weights = exp(by.scale * (load_as<Floats>(s + i) - largest));
      total += weights;
      store(s + i, weights);
    }
    partial[j * (2 + n)] = by.scale * largest;
    partial[j * (2 + n) + 1] = sum(total);
  }
  weighted_sums<Format, kCount>(static_cast<const T*>(v), keys, n, scores, partial + 2, 2 + n);
}

template <class Format>
void attend(const void* k, const void* v, int64_t keys, int64_t n, const float* q, int64_t queries,
            ScoreScale by, float* partial) {
  for (int64_t some; queries > 0; queries -= some, q += some * n, partial += some * (2 + n)) {
    some = min(queries, kQueries);
    const auto kernel = some == 3   ? attend_queries<Format, 3>
                        : some == 2 ? attend_queries<Format, 2>
                                    : attend_queries<Format, 1>;
    kernel(k, v, keys, n, q, by, partial);
  }
}

/// What is not finite is stored as NaN: a key's score of -infinity would hide it.
template <class Format>
void store_row(const float* in, int64_t stride, int64_t n, void* row) {
  auto* out = static_cast<typename Format::T*>(row);
  for (int64_t i = 0; i < n; ++i) {
    out[i] = Format::store_one(in[i * stride]);
    const float stored = Format::load_one(out[i]);
    if (!(stored - stored == 0.0f)) out[i] = Format::store_one(__builtin_nanf(""));
  }
}

/// A group's scale is its largest size / 127, rounded to bf16; the scale of a group that is not
/// finite is NaN.
void store_int8_row(const float* in, int64_t stride, int64_t n, void* row) {
  auto* const out = static_cast<std::int8_t*>(row);
  for (int64_t first = 0; first < n; first += kKvGroup) {
    const int64_t end = min(n, first + kKvGroup);
    float most = 0.0f, zero = 0.0f;
    for (int64_t i = first; i < end; ++i) {
      const float v = in[i * stride], size = __builtin_fabsf(v);
      most = size > most ? size : most;
      zero += v - v;  // NaN for infinity and NaN
    }
    const std::uint16_t rounded = f32_to_bf16(most / 127.0f + zero);
    const float scale = bf16_to_f32(rounded);
    // Of numbers below 1e-36 nothing is kept: the scale would have too few bits.
    const float inverse = scale > 1e-38f ? 1.0f / scale : 0.0f;
    for (int64_t i = first; i < end; ++i)
      out[i] = inverse > 0.0f ? static_cast<std::int8_t>(__builtin_rintf(in[i * stride] * inverse))
                              : std::int8_t{0};
    __builtin_memcpy(out + n + 2 * (first / kKvGroup), &rounded, 2);
  }
}

}  // namespace
}  // namespace tda
