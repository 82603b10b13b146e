// Kernels of decode for int8 rows, and the token scope's selection by their high planes.
#include "cpu/int8.h"
#include "cpu/integer_neurons.h"
#include "cpu/kernels_isa.h"

namespace tda {
namespace {

/// Estimates for a chunk of neurons, from their high planes; then the rest of those that they show
/// to be needed.
SelectedCounts selected_by_sketch(const NeuronRows& rows, Activation activation,
                                  const Selection& selection, const NeuronIds& all,
                                  const Vector<Int8Row>& x, float* h, float* y) {
  SelectedCounts counts;
  for (int64_t first = 0; first < all.count; first += kChunk) {
    const int64_t end = min(first + kChunk, all.count);
    Chosen exact, coarse;
    for (int64_t i = first; i < end; i += kBatch) {
      const Follow rests = {&rows.gate, &rows.up, exact.ids, exact.count, false, true};
      const Batch batch(all.data, end, i, rests);
      multiply_neurons<false>(rows, activation, batch, x, h + i);
      for (int64_t j = i; j < i + batch.count; ++j) {
        const float estimate = __builtin_fabsf(h[j]) * selection.lengths[all[j]];
        // A NaN is no reason to leave a neuron out: it is to be seen.
        if (!(estimate < selection.exact))
          exact.add(all[j], j, 0.0f);
        else if (!(estimate < selection.coarse))
          coarse.add(all[j], j, h[j]);
        else
          h[j] = 0.0f;
      }
    }
    const Follow downs = {&rows.down, nullptr, exact.ids, exact.count};
    const Follow coarse_downs = {&rows.down, nullptr, coarse.ids, coarse.count, true, false};
    const Follow sketches = {&rows.gate, &rows.up, all.data + end, all.count + all.next - end,
                             true,       false};
    multiply_all(rows, activation, exact.ids, exact.count, downs, x, exact.h);
    exact.store_to(h);
    add_all<true, Int8Row>(rows.down, exact.ids, exact.count,
                           coarse.count > 0 ? coarse_downs : sketches, exact.h, y);
    add_all<false, Int8Row>(rows.down, coarse.ids, coarse.count, sketches, coarse.h, y);
    counts.exact += exact.count;
    counts.coarse += coarse.count;
  }
  return counts;
}

float sketch(const Rows& w, int64_t rows, const void* prepared, float* y) {
  const Vector<Int8Row> x(prepared, w.n);
  float largest = -__builtin_inff();
  for (int64_t first = 0; first < rows; first += kBatch, y += kBatch) {
    const int64_t count = min(kBatch, rows - first);
    float results[kBatch];
    multiply_next<false>(w, first, count, rows, {}, x, results);
    for (int64_t r = 0; r < count; ++r) {
      y[r] = results[r];
      largest = y[r] > largest ? y[r] : largest;
    }
  }
  return largest;
}

void dot_some(const Rows& w, const int32_t* ids, int64_t count, const void* prepared, float* y) {
  const Vector<Int8Row> x(prepared, w.n);
  const Follow nothing;
  for (int64_t i = 0; i < count; i += kBatch) {
    const Batch batch(ids, count, i, nothing);
    float results[kBatch];
    multiply_one_each(w, batch, x, results);
    for (int64_t j = 0; j < batch.count; ++j) y[batch.id(j)] = results[j];
  }
}

}  // namespace

namespace TDA_ISA {
const RowKernels int8_rows = {prepared_bytes<Int8Row>,
                              prepare<Int8Row>,
                              load<Int8Row>,
                              dot<Int8Row>,
                              neurons<Int8Row>,
                              selected<Int8Row, selected_by_sketch>,
                              sketch,
                              dot_some};
}  // namespace TDA_ISA

}  // namespace tda
