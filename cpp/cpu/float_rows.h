// Rows of f32, bf16 and bf16c in decode: products with one vector or several, and what is prefetched
// meanwhile. Included by kernel sources only, like simd.h.
#pragma once

#include "cpu/bf16c.h"
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace tda {
namespace {

// Decode is bound by memory: rows are read one after the other in address order, and those that
// will be read shortly after are prefetched, wherever they are.

/// The prefetch distance in rows, which covers memory latency.
template <class Row>
inline int64_t rows_ahead(int64_t n) {
  return 1 + Row::kAhead / Row::bytes(n);
}

/// Rows whose index i >= count stands for row i - count of what is read next; w itself if that is
/// unknown.
template <class Row>
inline Rows rows_after(const Rows& w, int64_t count, const NextRead& next) {
  Rows rows = w;
  if (next.data) rows.data = next.data - count * Row::bytes(w.n);
  return rows;
}

/// Rows to prefetch while another one is processed: `far` for the first time, `near` again.
template <class Row>
struct Ahead {
  Row far, near;
};

/// Prefetches the lines of the next four vectors.
template <class Row>
[[gnu::always_inline]] inline void prefetch(const Ahead<Row>& ahead, int64_t first) {
  constexpr int64_t kLine = kLineBytes / sizeof(typename Row::T);
  for (int64_t i = first; i < first + 4 * kLanes; i += kLine) {
    prefetch_nta(ahead.far.w + i);
    prefetch_l1(ahead.near.w + i);
  }
}

/// While a row is multiplied with several vectors: these take so much of L1 that lines would be lost
/// there before they are used.
template <class Row>
struct AheadInL2 {
  Row row;
};
template <class Row>
[[gnu::always_inline]] inline void prefetch(const AheadInL2<Row>& ahead, int64_t first) {
  constexpr int64_t kLine = kLineBytes / sizeof(typename Row::T);
  for (int64_t i = first; i < first + 4 * kLanes; i += kLine) prefetch_l2(ahead.row.w + i);
}

/// For rows that are in the cache.
struct NothingAhead {};
inline void prefetch(NothingAhead, int64_t) {}

/// kLanes elements of a row; see load_no_hw_prefetch.
#if defined(__AVX512F__)
inline Floats load_lanes(const float* p) { return (Floats)load_no_hw_prefetch(p); }
inline Floats load_lanes(const std::uint16_t* p) {
  return (Floats)(widen((Halves)load_half_no_hw_prefetch(p)) << 16);
}
#else
inline Floats load_lanes(const float* p) { return F32::load(p); }
inline Floats load_lanes(const std::uint16_t* p) { return Bf16::load(p); }
#endif

/// A row of f32 or bf16: an array.
template <class Format>
struct ArrayRow {
  static constexpr int64_t kAhead = 8192;  // bytes
  using T = typename Format::T;
  const T* w;
  int64_t n;

  ArrayRow(const Rows& rows, int64_t r)
      : w(reinterpret_cast<const T*>(rows.data) + r * rows.n), n(rows.n) {}
  static int64_t bytes(int64_t n) { return n * static_cast<int64_t>(sizeof(T)); }
};

/// Compilers would clear an array of vectors as memory, which is slow, and keep it there.
template <int kCount>
[[gnu::always_inline]] inline void clear(Floats (&sums)[kCount][4]) {
#pragma GCC unroll 4
  for (int v = 0; v < kCount; ++v)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[v][j] = Floats{};
}

/// out[v] = row·x[v], v < kCount. What it does for one x does not depend on the others.
template <int kCount, class Format, class Ahead>
[[gnu::always_inline]] inline void dot_row(const ArrayRow<Format>& row, const float* const* x,
                                           const Ahead& ahead, float* out) {
  const int64_t n = row.n;
  Floats sums[kCount][4];
  clear(sums);
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    prefetch(ahead, i);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Floats w = load_lanes(row.w + i + j * kLanes);
#pragma GCC unroll 4
      for (int v = 0; v < kCount; ++v)
        sums[v][j] = multiply_add(w, load_as<Floats>(x[v] + i + j * kLanes), sums[v][j]);
    }
  }
  for (; i < n; i += kLanes)
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v)
      sums[v][0] = multiply_add(load_part<Format>(row.w + i, n - i),
                                load_part<F32>(x[v] + i, n - i), sums[v][0]);
#pragma GCC unroll 4
  for (int v = 0; v < kCount; ++v)
    out[v] = sum((sums[v][0] + sums[v][1]) + (sums[v][2] + sums[v][3]));
}

/// y[v] += h[v] row, v < kCount
template <int kCount, class Format, class Ahead>
[[gnu::always_inline]] inline void add_row(const ArrayRow<Format>& row, const float* h,
                                           float* const* y, const Ahead& ahead) {
  const int64_t n = row.n;
  float* to[kCount];  // copies, since the stores below might be to h and y for all compilers know
  float by[kCount];
#pragma GCC unroll 4
  for (int v = 0; v < kCount; ++v) to[v] = y[v], by[v] = h[v];
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    prefetch(ahead, i);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Floats w = load_lanes(row.w + i + j * kLanes);
#pragma GCC unroll 4
      for (int v = 0; v < kCount; ++v) {
        float* const out = to[v] + i + j * kLanes;
        store(out, multiply_add(splat(by[v]), w, load_as<Floats>(out)));
      }
    }
  }
  for (; i < n; ++i)
    for (int v = 0; v < kCount; ++v)
      to[v][i] = multiply_add(by[v], Format::load_one(row.w[i]), to[v][i]);
}

/// y[v] += h[r][v] rows[r] for r = 0, 1, ..., v < kCount, as `add_row` does for one after the other.
/// Rows share the loads and stores of y.
template <int kRows, int kCount, class Format, class Ahead>
[[gnu::always_inline]] inline void add_rows(const ArrayRow<Format> (&rows)[kRows],
                                            const float* const (&h)[kRows], float* const* y,
                                            const Ahead (&ahead)[kRows]) {
  const int64_t n = rows[0].n;
  float* to[kCount];  // copies, since the stores below might be to h and y for all compilers know
  float by[kRows][kCount];
#pragma GCC unroll 4
  for (int v = 0; v < kCount; ++v) {
    to[v] = y[v];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) by[r][v] = h[r][v];
  }
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) prefetch(ahead[r], i);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      Floats w[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) w[r] = load_lanes(rows[r].w + i + j * kLanes);
#pragma GCC unroll 4
      for (int v = 0; v < kCount; ++v) {
        float* const out = to[v] + i + j * kLanes;
        Floats sum = load_as<Floats>(out);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) sum = multiply_add(splat(by[r][v]), w[r], sum);
        store(out, sum);
      }
    }
  }
  for (; i < n; ++i)
    for (int v = 0; v < kCount; ++v)
      for (int r = 0; r < kRows; ++r)
        to[v][i] = multiply_add(by[r][v], Format::load_one(rows[r].w[i]), to[v][i]);
}

template <class Format>
inline void load_row(const ArrayRow<Format>& row, float* out, int64_t stride) {
  for (int64_t i = 0; i < row.n; ++i) out[i * stride] = Format::load_one(row.w[i]);
}

/// Prefetches the lines of a group; two groups are three lines.
[[gnu::always_inline]] inline void prefetch(const Ahead<Bf16cRow>& ahead, int64_t group) {
  const Bf16cRow& row = ahead.far;
  prefetch_nta(row.group(group) + (group % 2 == 0 ? 0 : kGroup / 2));
  if (group % 2 == 0) prefetch_nta(row.group(group) + kGroup);
}

[[gnu::always_inline]] inline void prefetch(const AheadInL2<Bf16cRow>& ahead, int64_t group) {
  prefetch_l2(ahead.row.group(group) + (group % 2 == 0 ? 0 : kGroup / 2));
  if (group % 2 == 0) prefetch_l2(ahead.row.group(group) + kGroup);
}

constexpr int kGroupVectors = kGroup / kLanes;

template <int kCount, class Ahead>
[[gnu::always_inline]] inline void dot_row(const Bf16cRow& row, const float* const* x,
                                           const Ahead& ahead, float* out) {
  Floats sums[kCount][4], w[kGroupVectors];
  clear(sums);
  const int64_t whole = row.n / kGroup;
  for (int64_t g = 0; g < whole; ++g) {
    prefetch(ahead, g);
    row.load(g, w);
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v)
#pragma GCC unroll 16
      for (int j = 0; j < kGroupVectors; ++j)
        sums[v][j % 4] =
            multiply_add(w[j], load_as<Floats>(x[v] + g * kGroup + j * kLanes), sums[v][j % 4]);
  }
  if (whole * kGroup < row.n) {
    row.load(whole, w);
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v)
      for (int64_t i = whole * kGroup, j = 0; i < row.n; i += kLanes, ++j)
        sums[v][0] = multiply_add(w[j], load_part<F32>(x[v] + i, row.n - i), sums[v][0]);
  }
#pragma GCC unroll 4
  for (int v = 0; v < kCount; ++v) {
    float total = sum((sums[v][0] + sums[v][1]) + (sums[v][2] + sums[v][3]));
    for (int64_t i = 0; i < row.apart(); ++i)
      total = multiply_add(row.value(i), x[v][row.column(i)], total);
    out[v] = total;
  }
}

template <int kCount, class Ahead>
[[gnu::always_inline]] inline void add_row(const Bf16cRow& row, const float* h, float* const* y,
                                           const Ahead& ahead) {
  for (int64_t g = 0; g < groups_of(row.n); ++g) {
    Floats w[kGroupVectors];
    prefetch(ahead, g);
    row.load(g, w);
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v)
#pragma GCC unroll 16
      for (int j = 0; j < kGroupVectors; ++j) {
        float* const out = y[v] + g * kGroup + j * kLanes;  // y is padded to whole groups
        store(out, multiply_add(splat(h[v]), w[j], load_as<Floats>(out)));
      }
  }
  for (int v = 0; v < kCount; ++v)
    for (int64_t i = 0; i < row.apart(); ++i) {
      float& out = y[v][row.column(i)];
      out = multiply_add(h[v], row.value(i), out);
    }
}

template <int kRows, int kCount, class Ahead>
[[gnu::always_inline]] inline void add_rows(const Bf16cRow (&rows)[kRows],
                                            const float* const (&h)[kRows], float* const* y,
                                            const Ahead (&ahead)[kRows]) {
  for (int r = 0; r < kRows; ++r) add_row<kCount>(rows[r], h[r], y, ahead[r]);
}

inline void load_row(const Bf16cRow& row, float* out, int64_t stride) {
  for (int64_t g = 0; g < groups_of(row.n); ++g) {
    Floats w[kGroupVectors];
    row.load(g, w);
    float values[kGroup];
    __builtin_memcpy(values, w, sizeof w);
    const int64_t first = g * kGroup;
    for (int64_t i = first; i < min(row.n, first + kGroup); ++i)
      out[i * stride] = values[i - first];
  }
  for (int64_t i = 0; i < row.apart(); ++i) out[row.column(i) * stride] = row.value(i);
}

}  // namespace
}  // namespace tda
