// Decode kernels for f32, bf16 and bf16c rows (weights times one vector), and for the KV cache.
#include "cpu/attend.h"
#include "cpu/bf16c.h"
#include "cpu/kernels_isa.h"
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
[[gnu::always_inline]] inline void dot_row(const ArrayRow<Format>& row, const float* const* x, const Ahead& ahead,
                    float* out) {
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
      for (int v = 0; v < kCount; ++v) sums[v][j] += w * load_as<Floats>(x[v] + i + j * kLanes);
    }
  }
  for (; i < n; i += kLanes)
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v)
      sums[v][0] += load_part<Format>(row.w + i, n - i) * load_part<F32>(x[v] + i, n - i);
#pragma GCC unroll 4
  for (int v = 0; v < kCount; ++v)
    out[v] = sum((sums[v][0] + sums[v][1]) + (sums[v][2] + sums[v][3]));
}

/// y[v] += h[v] row, v < kCount
template <int kCount, class Format, class Ahead>
[[gnu::always_inline]] inline void add_row(const ArrayRow<Format>& row, const float* h, float* const* y,
                    const Ahead& ahead) {
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
        store(out, load_as<Floats>(out) + by[v] * w);
      }
    }
  }
  for (; i < n; ++i)
    for (int v = 0; v < kCount; ++v) y[v][i] += h[v] * Format::load_one(row.w[i]);
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

constexpr int kGroupVectors = kGroup / kLanes;

template <int kCount, class Ahead>
[[gnu::always_inline]] inline void dot_row(const Bf16cRow& row, const float* const* x, const Ahead& ahead, float* out) {
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
        sums[v][j % 4] += w[j] * load_as<Floats>(x[v] + g * kGroup + j * kLanes);
  }
  if (whole * kGroup < row.n) {
    row.load(whole, w);
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v)
      for (int64_t i = whole * kGroup, j = 0; i < row.n; i += kLanes, ++j)
        sums[v][0] += w[j] * load_part<F32>(x[v] + i, row.n - i);
  }
#pragma GCC unroll 4
  for (int v = 0; v < kCount; ++v) {
    float total = sum((sums[v][0] + sums[v][1]) + (sums[v][2] + sums[v][3]));
    for (int64_t i = 0; i < row.apart(); ++i) total += row.value(i) * x[v][row.column(i)];
    out[v] = total;
  }
}

template <int kCount, class Ahead>
[[gnu::always_inline]] inline void add_row(const Bf16cRow& row, const float* h, float* const* y, const Ahead& ahead) {
  for (int64_t g = 0; g < groups_of(row.n); ++g) {
    Floats w[kGroupVectors];
    prefetch(ahead, g);
    row.load(g, w);
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v)
#pragma GCC unroll 16
      for (int j = 0; j < kGroupVectors; ++j) {
        float* const out = y[v] + g * kGroup + j * kLanes;  // y is padded to whole groups
        store(out, load_as<Floats>(out) + h[v] * w[j]);
      }
  }
  for (int v = 0; v < kCount; ++v)
    for (int64_t i = 0; i < row.apart(); ++i) y[v][row.column(i)] += h[v] * row.value(i);
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

/// How many vectors share a load of weights: their sums stay in registers.
#if defined(__AVX512F__)
constexpr int kTogether = 4;
#else
constexpr int kTogether = 3;
#endif

/// Calls body(count, first) for groups of vectors; count is a constant.
template <class Body>
[[gnu::always_inline]] inline void for_groups(int64_t vectors, const Body& body) {
  int64_t v = 0;
  for (; v + kTogether <= vectors; v += kTogether) body(Constant<kTogether>(), v);
  if (kTogether > 3 && vectors - v == 3) return body(Constant<3>(), v);
  if (vectors - v == 2) return body(Constant<2>(), v);
  if (vectors - v == 1) return body(Constant<1>(), v);
}

template <class Row>
inline float dot_row(const Row& row, const float* x, const Ahead<Row>& ahead) {
  float out;
  dot_row<1>(row, &x, ahead, &out);
  return out;
}

/// out[v] = row·x[v] of all vectors, which read it together.
template <class Row>
inline void dot_row(const Row& row, const Vectors& vectors, const Ahead<Row>& ahead, float* out) {
  const auto* const x = reinterpret_cast<const float* const*>(vectors.x);
  for_groups(vectors.count, [&](auto count, int64_t v) __attribute__((always_inline)) {
    if (v == 0)
      dot_row<count.value>(row, x, ahead, out);
    else
      dot_row<count.value>(row, x + v, NothingAhead(), out + v);
  });
}

template <class Row>
inline void add_row(const Row& row, float h, float* y, const Ahead<Row>& ahead) {
  add_row<1>(row, &h, &y, ahead);
}

template <class Row>
inline void add_row(const Row& row, const float* h, const Vectors& vectors,
                    const Ahead<Row>& ahead) {
  for_groups(vectors.count, [&](auto count, int64_t v) __attribute__((always_inline)) {
    if (v == 0)
      add_row<count.value>(row, h, vectors.y, ahead);
    else
      add_row<count.value>(row, h + v, vectors.y + v, NothingAhead());
  });
}

template <class Row>
void dot(const Rows& w, int64_t rows, const void* vector, float* y, bool add, NextRead next) {
  const auto* x = static_cast<const float*>(vector);
  const int64_t far = rows_ahead<Row>(w.n);
  const Rows after = rows_after<Row>(w, rows, next);
  const auto row = [&](int64_t r) { return Row(r < rows ? w : after, r); };
  for (int64_t r = 0; r < rows; ++r) {
    const Ahead<Row> ahead = {row(r + far), row(r + far / 2)};
    y[r] = dot_row(Row(w, r), x, ahead) + (add ? y[r] : 0.0f);
  }
}

template <class Row>
void dot_each(const Rows& w, int64_t rows, const Vectors& vectors, bool add) {
  const int64_t far = rows_ahead<Row>(w.n);
  for (int64_t r = 0; r < rows; ++r) {
    const Ahead<Row> ahead = {Row(w, r + far), Row(w, r + far / 2)};
    float results[Vectors::kMost];
    dot_row(Row(w, r), vectors, ahead, results);
    for (int64_t v = 0; v < vectors.count; ++v)
      vectors.y[v][r] = results[v] + (add ? vectors.y[v][r] : 0.0f);
  }
}

/// All rows of some neurons in reading order: gates, ups, downs, then the next call's gates or what
/// this thread reads next. Past the end it is the last row again.
template <class Row>
struct FusedRows {
  const NeuronRows& rows;
  const NeuronIds& ids;
  const Rows after;
  const int64_t far;

  FusedRows(const NeuronRows& neurons, const NeuronIds& some)
      : rows(neurons),
        ids(some),
        after(rows_after<Row>(rows.gate, 3 * ids.count, ids.next)),
        far(rows_ahead<Row>(rows.gate.n)) {}
  Row row(int64_t i) const {
    const int64_t count = ids.count;
    if (i >= 3 * count && ids.more == 0 && ids.next.data) return Row(after, i);
    if (i >= 3 * count) return Row(rows.gate, ids[min(i - 2 * count, count + ids.more - 1)]);
    const Rows& matrix = i < count ? rows.gate : i < 2 * count ? rows.up : rows.down;
    const int64_t at = i < count ? i : i < 2 * count ? i - count : i - 2 * count;
    return Row(matrix, ids[at]);
  }
  Ahead<Row> ahead(int64_t i) const { return {row(i + far), row(i + far / 2)}; }
};

/// In place.
inline void activate(Activation activation, float* h, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes)
    store_part(h + i, activate(activation, load_part<F32>(h + i, count - i)), count - i);
}

template <class Row>
void ffn_fused(const NeuronRows& rows, Activation activation, const NeuronIds& ids,
               const void* vector, float* h, float* y) {
  const auto* x = static_cast<const float*>(vector);
  const int64_t n = rows.gate.n, count = ids.count;
  const FusedRows<Row> of(rows, ids);
  for (int64_t i = 0; i < count; ++i) h[i] = dot_row(of.row(i), x, of.ahead(i));
  activate(activation, h, count);
  for (int64_t i = count; i < 2 * count; ++i) h[i - count] *= dot_row(of.row(i), x, of.ahead(i));
  for (int64_t i = 0; i < groups_of(n) * kGroup; ++i) y[i] = 0.0f;
  for (int64_t i = 2 * count; i < 3 * count; ++i)
    add_row(of.row(i), h[i - 2 * count], y, of.ahead(i));
}

template <class Row>
void ffn_each(const NeuronRows& rows, Activation activation, const NeuronIds& ids,
              const Vectors& vectors) {
  const int64_t n = rows.gate.n, count = ids.count;
  const FusedRows<Row> of(rows, ids);
  float products[Vectors::kMost];
  for (int64_t i = 0; i < count; ++i) {
    dot_row(of.row(i), vectors, of.ahead(i), products);
    for (int64_t v = 0; v < vectors.count; ++v) vectors.h[v][i] = products[v];
  }
  for (int64_t v = 0; v < vectors.count; ++v) activate(activation, vectors.h[v], count);
  for (int64_t i = 0; i < count; ++i) {
    dot_row(of.row(count + i), vectors, of.ahead(count + i), products);
    for (int64_t v = 0; v < vectors.count; ++v) vectors.h[v][i] *= products[v];
  }
  for (int64_t v = 0; v < vectors.count; ++v)
    for (int64_t i = 0; i < groups_of(n) * kGroup; ++i) vectors.y[v][i] = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t v = 0; v < vectors.count; ++v) products[v] = vectors.h[v][i];
    add_row(of.row(2 * count + i), products, vectors, of.ahead(2 * count + i));
  }
}

/// Reads the gate rows of all neurons, and their up rows unless the gate alone decides; then the
/// other rows of those selected. Adds in the order of `ffn_fused`, so thresholds of 0 give the same
/// result.
template <class Row>
SelectedCounts ffn_selected(const NeuronRows& rows, Activation activation,
                            const Selection& selection, const NeuronIds& ids, const void* vector,
                            float* h, float* y) {
  const auto* x = static_cast<const float*>(vector);
  const int64_t n = rows.gate.n, count = ids.count;
  const auto row = [&](const Rows& matrix, int64_t i) {
    return Row(matrix, ids[min(i, count - 1)]);
  };
  const int64_t far = rows_ahead<Row>(n);
  const auto ahead = [&](const Rows& matrix, int64_t i) {
    return Ahead<Row>{row(matrix, i + far), row(matrix, i + far / 2)};
  };
  for (int64_t i = 0; i < count; ++i) h[i] = dot_row(row(rows.gate, i), x, ahead(rows.gate, i));
  activate(activation, h, count);
  const auto up = [&](int64_t i) { h[i] *= dot_row(row(rows.up, i), x, ahead(rows.up, i)); };
  if (!selection.by_gate)
    for (int64_t i = 0; i < count; ++i) up(i);
  for (int64_t i = 0; i < groups_of(n) * kGroup; ++i) y[i] = 0.0f;
  SelectedCounts counts;
  for (int64_t i = 0; i < count; ++i) {
    const float estimate = selection.by_gate ? __builtin_fabsf(h[i])
                                             : __builtin_fabsf(h[i]) * selection.lengths[ids[i]];
    if (estimate < selection.exact) {  // NaN compares false: kept, it reaches the logits
      h[i] = 0.0f;
      continue;
    }
    ++counts.exact;
    if (selection.by_gate) up(i);
    add_row(row(rows.down, i), h[i], y, ahead(rows.down, i));
  }
  return counts;
}

template <class Row>
constexpr RowKernels row_kernels() {
  return {nullptr,   nullptr,        nullptr,       nullptr,       load<Row>,
          dot<Row>,  ffn_fused<Row>, dot_each<Row>, ffn_each<Row>, ffn_selected<Row>};
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
