// Kernels of decode: rows of weights, keys or values times one vector.
#include "cpu/bf16c.h"
#include "cpu/kernels_isa.h"
#include "cpu/simd.h"

namespace tda {
namespace {

// Rows are read one after the other, as they lie in memory, since decoding waits for it. Meanwhile
// those that will be read shortly after are asked for, wherever they lie.

/// How many rows to look ahead, so that memory has time to answer.
template <class Row>
inline int64_t lookahead(int64_t n) {
  return 1 + Row::kAhead / Row::bytes(n);
}

/// Rows i >= count are those that the thread reads on with, if that is known.
template <class Row>
inline Rows behind(const Rows& w, int64_t count, const ReadOn& then) {
  Rows rows = w;
  if (then.data) rows.data = then.data - count * Row::bytes(w.n);
  return rows;
}

/// Rows to ask for while another one is at work, and to ask for again, nearer.
template <class Row>
struct Ahead {
  Row far, near;
};

/// The cache lines of the next four vectors.
template <class Row>
[[gnu::always_inline]] inline void prefetch(const Ahead<Row>& ahead, int64_t first) {
  constexpr int64_t kLine = kLineBytes / sizeof(typename Row::T);
  for (int64_t i = first; i < first + 4 * kLanes; i += kLine) {
    prefetch_nta(ahead.far.w + i);
    prefetch_l1(ahead.near.w + i);
  }
}

/// kLanes elements of a row, see load_no_hw_prefetch.
#if defined(__AVX512F__)
inline Floats load_lanes(const float* p) { return (Floats)load_no_hw_prefetch(p); }
inline Floats load_lanes(const std::uint16_t* p) {
  return (Floats)(widen((Halves)load_half_no_hw_prefetch(p)) << 16);
}
#else
inline Floats load_lanes(const float* p) { return F32::load(p); }
inline Floats load_lanes(const std::uint16_t* p) { return Bf16::load(p); }
#endif

/// A row that is an array.
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

template <class Format>
inline float dot_row(const ArrayRow<Format>& row, const float* x,
                     const Ahead<ArrayRow<Format>>& ahead) {
  const int64_t n = row.n;
  Floats sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    prefetch(ahead, i);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      sums[j] += load_lanes(row.w + i + j * kLanes) * load_as<Floats>(x + i + j * kLanes);
  }
  for (; i < n; i += kLanes)
    sums[0] += load_part<Format>(row.w + i, n - i) * load_part<F32>(x + i, n - i);
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

/// y += h row
template <class Format>
inline void add_row(const ArrayRow<Format>& row, float h, float* y,
                    const Ahead<ArrayRow<Format>>& ahead) {
  const int64_t n = row.n;
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    prefetch(ahead, i);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      float* out = y + i + j * kLanes;
      store(out, load_as<Floats>(out) + h * load_lanes(row.w + i + j * kLanes));
    }
  }
  for (; i < n; ++i) y[i] += h * Format::load_one(row.w[i]);
}

template <class Format>
inline void load_row(const ArrayRow<Format>& row, float* out, int64_t stride) {
  for (int64_t i = 0; i < row.n; ++i) out[i * stride] = Format::load_one(row.w[i]);
}

/// The cache lines of a group of a row: two groups are three lines.
[[gnu::always_inline]] inline void prefetch(const Ahead<Bf16cRow>& ahead, int64_t group) {
  const Bf16cRow& row = ahead.far;
  prefetch_nta(row.group(group) + (group % 2 == 0 ? 0 : kGroup / 2));
  if (group % 2 == 0) prefetch_nta(row.group(group) + kGroup);
}

constexpr int kGroupVectors = kGroup / kLanes;

inline float dot_row(const Bf16cRow& row, const float* x, const Ahead<Bf16cRow>& ahead) {
  Floats sums[4] = {}, w[kGroupVectors];
  const int64_t whole = row.n / kGroup;
  for (int64_t g = 0; g < whole; ++g) {
    prefetch(ahead, g);
    row.load(g, w);
#pragma GCC unroll 16
    for (int j = 0; j < kGroupVectors; ++j)
      sums[j % 4] += w[j] * load_as<Floats>(x + g * kGroup + j * kLanes);
  }
  if (whole * kGroup < row.n) {
    row.load(whole, w);
    for (int64_t i = whole * kGroup, j = 0; i < row.n; i += kLanes, ++j)
      sums[0] += w[j] * load_part<F32>(x + i, row.n - i);
  }
  float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (int64_t i = 0; i < row.apart(); ++i) total += row.value(i) * x[row.column(i)];
  return total;
}

inline void add_row(const Bf16cRow& row, float h, float* y, const Ahead<Bf16cRow>& ahead) {
  for (int64_t g = 0; g < groups_of(row.n); ++g) {
    Floats w[kGroupVectors];
    prefetch(ahead, g);
    row.load(g, w);
#pragma GCC unroll 16
    for (int j = 0; j < kGroupVectors; ++j) {
      float* const out = y + g * kGroup + j * kLanes;  // there is room for whole groups
      store(out, load_as<Floats>(out) + h * w[j]);
    }
  }
  for (int64_t i = 0; i < row.apart(); ++i) y[row.column(i)] += h * row.value(i);
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

template <class Row>
void load(const Rows& w, float* out, int64_t stride) {
  load_row(Row(w, 0), out, stride);
}

template <class Row>
void dot(const Rows& w, int64_t rows, const void* vector, float* y, bool add, ReadOn then) {
  const auto* x = static_cast<const float*>(vector);
  const int64_t far = lookahead<Row>(w.n);
  const Rows next = behind<Row>(w, rows, then);
  const auto row = [&](int64_t r) { return Row(r < rows ? w : next, r); };
  for (int64_t r = 0; r < rows; ++r) {
    const Ahead<Row> ahead = {row(r + far), row(r + far / 2)};
    y[r] = dot_row(Row(w, r), x, ahead) + (add ? y[r] : 0.0f);
  }
}

template <class Row>
void neurons(const NeuronRows& rows, Activation activation, const NeuronIds& ids,
             const void* vector, float* h, float* y) {
  const auto* x = static_cast<const float*>(vector);
  const int64_t n = rows.gate.n, count = ids.count, far = lookahead<Row>(n);
  const Rows next = behind<Row>(rows.gate, 3 * count, ids.then);
  // All rows in the order they are read: gates, ups, downs, then the next call's gates or where
  // the thread reads on; past the end, the last one again.
  const auto row = [&](int64_t i) {
    if (i >= 3 * count && ids.next == 0 && ids.then.data) return Row(next, i);
    if (i >= 3 * count) return Row(rows.gate, ids[min(i - 2 * count, count + ids.next - 1)]);
    const Rows& matrix = i < count ? rows.gate : i < 2 * count ? rows.up : rows.down;
    const int64_t at = i < count ? i : i < 2 * count ? i - count : i - 2 * count;
    return Row(matrix, ids[at]);
  };
  const auto ahead = [&](int64_t i) { return Ahead<Row>{row(i + far), row(i + far / 2)}; };
  for (int64_t i = 0; i < count; ++i) h[i] = dot_row(row(i), x, ahead(i));
  for (int64_t i = 0; i < count; i += kLanes)
    store_part(h + i, activate(activation, load_part<F32>(h + i, count - i)), count - i);
  for (int64_t i = count; i < 2 * count; ++i) h[i - count] *= dot_row(row(i), x, ahead(i));
  for (int64_t i = 0; i < groups_of(n) * kGroup; ++i) y[i] = 0.0f;
  for (int64_t i = 2 * count; i < 3 * count; ++i) add_row(row(i), h[i - 2 * count], y, ahead(i));
}

/// Gates (and, unless they decide alone, ups) of all neurons, then what is left to read of those
/// that pass. Sums in the order of `neurons`, so thresholds of 0 give its bits.
template <class Row>
SelectedCounts selected(const NeuronRows& rows, Activation activation, const Selection& selection,
                        const NeuronIds& ids, const void* vector, float* h, float* y) {
  const auto* x = static_cast<const float*>(vector);
  const int64_t n = rows.gate.n, count = ids.count;
  const auto row = [&](const Rows& matrix, int64_t i) {
    return Row(matrix, ids[min(i, count - 1)]);
  };
  const int64_t far = lookahead<Row>(n);
  const auto ahead = [&](const Rows& matrix, int64_t i) {
    return Ahead<Row>{row(matrix, i + far), row(matrix, i + far / 2)};
  };
  for (int64_t i = 0; i < count; ++i) h[i] = dot_row(row(rows.gate, i), x, ahead(rows.gate, i));
  for (int64_t i = 0; i < count; i += kLanes)
    store_part(h + i, activate(activation, load_part<F32>(h + i, count - i)), count - i);
  const auto up = [&](int64_t i) { h[i] *= dot_row(row(rows.up, i), x, ahead(rows.up, i)); };
  if (!selection.by_gate)
    for (int64_t i = 0; i < count; ++i) up(i);
  for (int64_t i = 0; i < groups_of(n) * kGroup; ++i) y[i] = 0.0f;
  SelectedCounts counts;
  for (int64_t i = 0; i < count; ++i) {
    const float estimate = selection.by_gate ? __builtin_fabsf(h[i])
                                             : __builtin_fabsf(h[i]) * selection.lengths[ids[i]];
    if (estimate < selection.exact) {  // a NaN is kept, and seen
      h[i] = 0.0f;
      continue;
    }
    ++counts.exact;
    if (selection.by_gate) up(i);
    add_row(row(rows.down, i), h[i], y, ahead(rows.down, i));
  }
  return counts;
}

// Attention takes up to three queries at a time: keys and values are converted once for all.
constexpr int64_t kQueries = 3;
/// Scores of one query; behind those of the last key is room to fill up a vector.
constexpr int64_t kScores = kAttendKeys + kLanes;

/// scores[j][i] = k[i]·q[j], up to a whole vector of keys. Meanwhile memory brings the next keys
/// and the values.
template <class Format, int kCount>
void score(const typename Format::T* k, const typename Format::T* v, int64_t keys, int64_t n,
           const float* q, float* scores) {
  constexpr int kHalf = kLanes / 2;
  for (int64_t i0 = 0; i0 < keys; i0 += kLanes) {
    Floats halves[2][kCount];
    for (int half = 0; half < 2; ++half) {
      const typename Format::T*
          key[kHalf];  // what is missing in the last group repeats its last key
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
      store(scores + j * kScores + i0, join_halves(halves[0][j], halves[1][j]));
  }
}

/// out[j] = sum_i weights[j][i] v[i] for kVectors vectors of v's elements, of which `left` are
/// there; outputs are `stride` apart.
template <class Format, int kCount, int kVectors, class Load>
inline void weigh(const typename Format::T* v, int64_t keys, int64_t n, const float* weights,
                  float* out, int64_t stride, int64_t left, const Load& load) {
  Floats sums[kVectors][kCount] = {};
  for (int64_t i = 0; i < keys; ++i) {
#pragma GCC unroll 4
    for (int u = 0; u < kVectors; ++u) {
      const Floats value = load(v + i * cache_stride<Format>(n) + u * kLanes);
#pragma GCC unroll 4
      for (int j = 0; j < kCount; ++j) sums[u][j] += weights[j * kScores + i] * value;
    }
  }
#pragma GCC unroll 4
  for (int u = 0; u < kVectors; ++u)
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j)
      store_part(out + j * stride + u * kLanes, sums[u][j], left - u * kLanes);
}

template <class Format, int kCount>
void weigh(const typename Format::T* v, int64_t keys, int64_t n, const float* weights, float* out,
           int64_t stride) {
  constexpr int kVectors = 4;
  const auto whole = [](const typename Format::T* p) { return Format::load(p); };
  int64_t e = 0;
  for (; e + kVectors * kLanes <= n; e += kVectors * kLanes)
    weigh<Format, kCount, kVectors>(v + e, keys, n, weights, out + e, stride, n - e, whole);
  for (; e < n; e += kLanes) {
    const auto part = [&](const typename Format::T* p) { return load_part<Format>(p, n - e); };
    weigh<Format, kCount, 1>(v + e, keys, n, weights, out + e, stride, n - e, part);
  }
}

/// s[i] *= row i's scale
template <class Format>
inline void scale_scores(const typename Format::T* rows, int64_t keys, int64_t n, float* s) {
  if constexpr (__is_same(Format, Int8Cache))
    for (int64_t i = 0; i < keys; ++i) s[i] *= cache_scale(rows + i * cache_stride<Format>(n), n);
}

template <class Format, int kCount>
void attend_some(const void* k, const void* v, int64_t keys, int64_t n, const float* q, float scale,
                 float* partial) {
  using T = typename Format::T;
  float scores[kCount * kScores] = {};
  score<Format, kCount>(static_cast<const T*>(k), static_cast<const T*>(v), keys, n, q, scores);
  for (int j = 0; j < kCount; ++j) {
    float* s = scores + j * kScores;
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
  weigh<Format, kCount>(static_cast<const T*>(v), keys, n, scores, partial + 2, 2 + n);
}

template <class Format>
void attend(const void* k, const void* v, int64_t keys, int64_t n, const float* q, int64_t queries,
            float scale, float* partial) {
  for (int64_t some; queries > 0; queries -= some, q += some * n, partial += some * (2 + n)) {
    some = min(queries, kQueries);
    const auto kernel = some == 3   ? attend_some<Format, 3>
                        : some == 2 ? attend_some<Format, 2>
                                    : attend_some<Format, 1>;
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

template <class Row>
constexpr RowKernels row_kernels() {
  return {nullptr, nullptr, load<Row>, dot<Row>, neurons<Row>, selected<Row>};
}

}  // namespace

namespace TDA_ISA {
const RowKernels f32_rows = row_kernels<ArrayRow<F32>>();
const RowKernels bf16_rows = row_kernels<ArrayRow<Bf16>>();
const RowKernels bf16c_rows = row_kernels<Bf16cRow>();
const CacheKernels f32_cache = {store_row<F32>, attend<F32>};
const CacheKernels bf16_cache = {store_row<Bf16>, attend<Bf16>};
const CacheKernels int8_cache = {store_int8_row, attend<Int8Cache>};
}  // namespace TDA_ISA

}  // namespace tda
