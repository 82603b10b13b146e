// Decode for integer rows, int8: dot products with an x that is quantised, too.
#pragma once

#if defined(__AVX512VNNI__)
#include "cpu/integer_products_avx512.h"
#else
#include "cpu/integer_products_portable.h"
#endif

namespace tda {
namespace {

/// products[v].lanes[i] = those of w[first + i]·x[v], or of the high plane, i < count <= kBatch. w
/// has `rows` rows. x: a Vector, or those of several
template <bool kExact, class Row, class X>
void dot_batch(const Rows& w, int64_t first, int64_t count, int64_t rows, const NextRead& next,
               const X& x, Products* products) {
  constexpr int kRowsPerPass = X::kRows;
  const Row row(w, first);
  const int64_t bytes = w.stride + (kExact ? w.low_stride : 0);
  const Streams own = {{row.plane(0), row.plane(1)}, {w.stride, w.low_stride}};
  const ReadPath path = {own, rows - first, next_streams(next, own, w.stride, w.low_stride)};
  const auto work = [&](int64_t i, const auto& ahead) __attribute__((always_inline)) {
    Row some[kRowsPerPass];
    for (int j = 0; j < kRowsPerPass; ++j) some[j] = row.after(w, min(i + j, count - 1));
    multiply_each<kExact>(some, ahead, x,
                          [&](int64_t v, int r, Floats lanes)
                              __attribute__((always_inline)) { products[v].lanes[i + r] = lanes; });
  };
  constexpr bool kOnce = kExact && !X::kSeveral;
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
  Rows next = w;  // most likely those of the thread's next task
  next.data += rows * w.stride;
  next.low += rows * w.low_stride;
  with_vectors<Row>(vectors, w.n, [&](const auto& x) {
    for (int64_t first = 0; first < rows; first += kBatch) {
      const int64_t count = min(kBatch, rows - first);
      Products products[Vectors::kMost];
      float results[kBatch];
      dot_batch<true, Row>(w, first, count, rows, next, x, products);
      for (int64_t v = 0; v < vectors.count; ++v) {
        products[v].store_to(results, count);
        float* const y = vectors.y[v] + first;
        for (int64_t r = 0; r < count; ++r) y[r] = results[r] + (add ? y[r] : 0.0f);
      }
    }
  });
}

/// out[i] = w[batch.id(i)]·x, i < batch.count, with room for whole vectors.
template <class Row>
void dot_ids(const Rows& w, const Batch& batch, const Vector<Row>& x, float* out) {
  const auto ahead = [&](int64_t i) { return batch.ahead<Row>(w, batch.next.a, i); };
  Products products;
  for (int64_t i = 0; i < batch.count; i += 2) {
    const Row pair[2] = {Row(w, batch.id(i)), Row(w, batch.id(i + 1))};  // if odd, the last twice
    multiply_each<true>(pair, RowsAhead<Row, 2>{{ahead(i), ahead(i + 1)}}, x,
                        [&](int64_t, int r, Floats lanes) { products.lanes[i + r] = lanes; });
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
