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

/// scores[j][i] = k[i]·q[j], for whole vectors of keys. Prefetches the following keys, and the
/// values.
template <class Format, int kCount>
void dot_keys(const typename Format::T* k, const typename Format::T* v, int64_t keys, int64_t n,
              const float* q, float* scores) {
  constexpr int kHalf = kLanes / 2;
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
#pragma GCC unroll 4
      for (int j = 0; j < kCount; ++j) halves[half][j] = half_sums(products[j]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j)
      store(scores + j * kScoreStride + i0, join_halves(halves[0][j], halves[1][j]));
  }
}

/// out[j] = sum_i weights[j][i] v[i] for kVectors vectors of columns, of which `left` elements
/// exist; out[j] are `stride` apart.
template <class Format, int kCount, int kVectors, class Load>
inline void weighted_sums(const typename Format::T* v, int64_t keys, int64_t n,
                          const float* weights, float* out, int64_t stride, int64_t left,
                          const Load& load) {
  Floats sums[kVectors][kCount] = {};
  for (int64_t i = 0; i < keys; ++i) {
#pragma GCC unroll 4
    for (int u = 0; u < kVectors; ++u) {
      const Floats value = load(v + i * cache_stride<Format>(n) + u * kLanes);
#pragma GCC unroll 4
      for (int j = 0; j < kCount; ++j) sums[u][j] += weights[j * kScoreStride + i] * value;
    }
  }
#pragma GCC unroll 4
  for (int u = 0; u < kVectors; ++u)
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j)
      store_part(out + j * stride + u * kLanes, sums[u][j], left - u * kLanes);
}

template <class Format, int kCount>
void weighted_sums(const typename Format::T* v, int64_t keys, int64_t n, const float* weights,
                   float* out, int64_t stride) {
  constexpr int kVectors = 4;
  const auto whole = [](const typename Format::T* p) { return Format::load(p); };
  int64_t e = 0;
  for (; e + kVectors * kLanes <= n; e += kVectors * kLanes)
    weighted_sums<Format, kCount, kVectors>(v + e, keys, n, weights, out + e, stride, n - e, whole);
  for (; e < n; e += kLanes) {
    const auto part = [&](const typename Format::T* p) { return load_part<Format>(p, n - e); };
    weighted_sums<Format, kCount, 1>(v + e, keys, n, weights, out + e, stride, n - e, part);
  }
}

/// s[i] *= row i's scale
template <class Format>
inline void scale_scores(const typename Format::T* rows, int64_t keys, int64_t n, float* s) {
  if constexpr (__is_same(Format, Int8Cache))
    for (int64_t i = 0; i < keys; ++i) s[i] *= cache_scale(rows + i * cache_stride<Format>(n), n);
}

template <class Format, int kCount>
void attend_queries(const void* k, const void* v, int64_t keys, int64_t n, const float* q,
                    float scale, float* partial) {
  using T = typename Format::T;
  float scores[kCount * kScoreStride] = {};
  dot_keys<Format, kCount>(static_cast<const T*>(k), static_cast<const T*>(v), keys, n, q, scores);
  for (int j = 0; j < kCount; ++j) {
    float* s = scores + j * kScoreStride;
    scale_scores<Format>(static_cast<const T*>(k), keys, n, s);
    for (int64_t i = keys; i < keys + kLanes; ++i) s[i] = -__builtin_inff();
    Floats maxima = load_as<Floats>(s);
    for (int64_t i = kLanes; i < keys; i += kLanes) maxima = max(maxima, load_as<Floats>(s + i));
    float largest = maxima[0];
    for (int lane = 1; lane < kLanes; ++lane)
      largest = maxima[lane] > largest ? maxima[lane] : largest;
    Floats total = {};
    for (int64_t i = 0; i < keys; i += kLanes) {
      const Floats weights = exp(scale * (load_as<Floats>(s + i) - largest));
      total += weights;
      store(s + i, weights);
    }
    partial[j * (2 + n)] = scale * largest;
    partial[j * (2 + n) + 1] = sum(total);
    scale_scores<Format>(static_cast<const T*>(v), keys, n, s);
  }
  weighted_sums<Format, kCount>(static_cast<const T*>(v), keys, n, scores, partial + 2, 2 + n);
}

template <class Format>
void attend(const void* k, const void* v, int64_t keys, int64_t n, const float* q, int64_t queries,
            float scale, float* partial) {
  for (int64_t some; queries > 0; queries -= some, q += some * n, partial += some * (2 + n)) {
    some = min(queries, kQueries);
    const auto kernel = some == 3   ? attend_queries<Format, 3>
                        : some == 2 ? attend_queries<Format, 2>
                                    : attend_queries<Format, 1>;
    kernel(k, v, keys, n, q, scale, partial);
  }
}

template <class Format>
void store_row(const float* in, int64_t stride, int64_t n, void* row) {
  auto* out = static_cast<typename Format::T*>(row);
  for (int64_t i = 0; i < n; ++i) out[i] = Format::store_one(in[i * stride]);
}

void store_int8_row(const float* in, int64_t stride, int64_t n, void* row) {
  auto* const out = static_cast<std::int8_t*>(row);
  float most = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    const float size = __builtin_fabsf(in[i * stride]);
    most = size > most ? size : most;
  }
  const float inverse = most > 0.0f ? 127.0f / most : 0.0f, scale = most / 127.0f;
  for (int64_t i = 0; i < n; ++i)
    out[i] = static_cast<std::int8_t>(__builtin_rintf(in[i * stride] * inverse));
  __builtin_memcpy(out + n, &scale, 4);
}

}  // namespace
}  // namespace tda
