// Decode with rows of f32, bf16 and bf16c: their kernel table. Included by kernel sources only, like
// simd.h.
#pragma once

#include <utility>

#include "cpu/float_rows.h"

namespace tda {
namespace {

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

/// Down rows that share the loads and stores of several vectors' sums.
constexpr int kDownRows = 4;

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
/// Rows of f32 and bf16 are read up to a tenth faster if this is inlined, those of bf16c more slowly.
template <class Format>
[[gnu::always_inline]] inline float dot_row(const ArrayRow<Format>& row, const float* x,
                                            const Ahead<ArrayRow<Format>>& ahead) {
  float out;
  dot_row<1>(row, &x, ahead, &out);
  return out;
}

/// out[v] = row·x[v] of all vectors, which read it together.
template <class Row>
inline void dot_row(const Row& row, const Vectors& vectors, const AheadInL2<Row>& ahead,
                    float* out) {
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

/// Calls body(vectors) for at most eight at a time: more would not fit L1, and each row would wait for
/// L2. So a second eight reads the same rows again, from L2.
template <class Body>
inline void for_eights(const Vectors& all, const Body& body) {
  for (int64_t v = 0; v < all.count; v += 8)
    body(Vectors{min(8, all.count - v), all.x + v, all.y + v, all.h ? all.h + v : nullptr});
}

template <class Row>
void dot_each(const Rows& w, int64_t rows, const Vectors& all, bool add) {
  const int64_t far = rows_ahead<Row>(w.n);
  for (int64_t first = 0; first < rows; first += kBlockRows)
    for_eights(all, [&](const Vectors& vectors) {
      for (int64_t r = first; r < min(rows, first + kBlockRows); ++r) {
        const AheadInL2<Row> ahead = {Row(w, r + far)};
        float results[Vectors::kMost];
        dot_row(Row(w, r), vectors, ahead, results);
        for (int64_t v = 0; v < vectors.count; ++v)
          vectors.y[v][r] = results[v] + (add ? vectors.y[v][r] : 0.0f);
      }
    });
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
  AheadInL2<Row> ahead_in_l2(int64_t i) const { return {row(i + far)}; }
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

/// y[v] += h[v][i] down[i] of kRows neurons, from `first` on, and all vectors.
template <int kRows, class Row>
inline void add_downs(const FusedRows<Row>& of, int64_t first, const Vectors& vectors) {
  const auto row = [&](int64_t i) { return of.row(2 * of.ids.count + i); };
  float all[kRows][Vectors::kMost];
  for (int64_t v = 0; v < vectors.count; ++v)
    for (int64_t r = 0; r < kRows; ++r) all[r][v] = vectors.h[v][first + r];
  const auto add = [&]<std::size_t... r>(std::index_sequence<r...>) {
    const Row rows[kRows] = {row(first + r)...};
    const AheadInL2<Row> ahead[kRows] = {{row(first + r + of.far)}...};
    const NothingAhead nothing[kRows] = {};
    for_groups(vectors.count, [&](auto count, int64_t v) __attribute__((always_inline)) {
      const float* const h[kRows] = {all[r] + v...};
      if (v == 0)
        add_rows<kRows, count.value>(rows, h, vectors.y, ahead);
      else
        add_rows<kRows, count.value>(rows, h, vectors.y + v, nothing);
    });
  };
  add(std::make_index_sequence<kRows>());
}

/// `ffn_fused` of vectors that fit L1.
template <class Row>
void ffn_some(const FusedRows<Row>& of, Activation activation, const Vectors& vectors) {
  const int64_t n = of.rows.gate.n, count = of.ids.count;
  float products[Vectors::kMost];
  for (int64_t i = 0; i < count; ++i) {
    dot_row(of.row(i), vectors, of.ahead_in_l2(i), products);
    for (int64_t v = 0; v < vectors.count; ++v) vectors.h[v][i] = products[v];
  }
  for (int64_t v = 0; v < vectors.count; ++v) activate(activation, vectors.h[v], count);
  for (int64_t i = 0; i < count; ++i) {
    dot_row(of.row(count + i), vectors, of.ahead_in_l2(count + i), products);
    for (int64_t v = 0; v < vectors.count; ++v) vectors.h[v][i] *= products[v];
  }
  for (int64_t v = 0; v < vectors.count; ++v)
    for (int64_t i = 0; i < groups_of(n) * kGroup; ++i) vectors.y[v][i] = 0.0f;
  int64_t i = 0;
  for (; i + kDownRows <= count; i += kDownRows) add_downs<kDownRows>(of, i, vectors);
  for (; i < count; ++i) add_downs<1>(of, i, vectors);
}

template <class Row>
void ffn_each(const NeuronRows& rows, Activation activation, const NeuronIds& ids,
              const Vectors& vectors) {
  const FusedRows<Row> of(rows, ids);
  for_eights(vectors, [&](const Vectors& some) { ffn_some(of, activation, some); });
}

/// Reads the gate rows of all neurons, and their up rows unless the gate alone decides; then the
/// other rows of those selected. Adds in the order of `ffn_fused`, so thresholds of 0 give the same
/// result.
template <class Row>
int64_t ffn_selected(const NeuronRows& rows, Activation activation, const Selection& selection,
                     const NeuronIds& ids, const void* vector, float* h, float* y) {
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
  int64_t selected = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float estimate = selection.by_gate ? __builtin_fabsf(h[i])
                                             : __builtin_fabsf(h[i]) * selection.lengths[ids[i]];
    if (estimate < selection.threshold) {  // NaN compares false: kept, it reaches the logits
      h[i] = 0.0f;
      continue;
    }
    ++selected;
    if (selection.by_gate) up(i);
    add_row(row(rows.down, i), h[i], y, ahead(rows.down, i));
  }
  return selected;
}

template <class Row>
constexpr RowKernels row_kernels() {
  return {nullptr,        nullptr,       load<Row>,     dot<Row>,
          ffn_fused<Row>, dot_each<Row>, ffn_each<Row>, ffn_selected<Row>};
}

}  // namespace
}  // namespace tda
