// Decode kernels for int8 rows, and the token scope's selection by their high planes.
#include "cpu/int8.h"
#include "cpu/integer_neurons.h"
#include "cpu/kernels_isa.h"

namespace tda {
namespace {

/// Estimates the contributions of a chunk of neurons from their high planes, then reads the low
/// planes and down rows of those selected.
SelectedCounts ffn_selected_by_estimate(const NeuronRows& rows, Activation activation,
                                        const Selection& selection, const NeuronIds& all,
                                        const Vector<Int8Row>& x, float* h, float* y) {
  SelectedCounts counts;
  for (int64_t first = 0; first < all.count; first += kChunk) {
    const int64_t end = min(first + kChunk, all.count);
    SelectedNeurons exact, coarse;
    for (int64_t i = first; i < end; i += kBatch) {
      const NextNeurons low_planes = {&rows.gate, &rows.up, exact.ids, exact.count, false, true};
      const Batch batch(all.data, end, i, low_planes);
      float* const estimates = h + i;
      gate_up<false, Int8Row>(rows, activation, batch, x, &estimates);
      for (int64_t j = i; j < i + batch.count; ++j) {
        const float estimate = __builtin_fabsf(h[j]) * selection.lengths[all[j]];
        // NaN compares false, so the neuron is kept and NaN reaches the logits.
        if (!(estimate < selection.exact))
          exact.add(all[j], j, 0.0f);
        else if (!(estimate < selection.coarse))
          coarse.add(all[j], j, h[j]);
        else
          h[j] = 0.0f;
      }
    }
    const NextNeurons downs = {&rows.down, nullptr, exact.ids, exact.count};
    const NextNeurons coarse_downs = {&rows.down, nullptr, coarse.ids, coarse.count, true, false};
    const NextNeurons estimates = {&rows.gate, &rows.up, all.data + end, all.count + all.more - end,
                                   true,       false};
    gate_up_all(rows, activation, exact.ids, exact.count, downs, x, exact.h);
    exact.store_to(h);
    add_down_rows<true, Int8Row>(rows.down, exact.ids, exact.count,
                                 coarse.count > 0 ? coarse_downs : estimates, exact.h, y);
    add_down_rows<false, Int8Row>(rows.down, coarse.ids, coarse.count, estimates, coarse.h, y);
    counts.exact += exact.count;
    counts.coarse += coarse.count;
  }
  return counts;
}

float dot_high_plane(const Rows& w, int64_t rows, const void* prepared, float* y) {
  const Vector<Int8Row> x(prepared, w.n);
  float largest = -__builtin_inff();
  for (int64_t first = 0; first < rows; first += kBatch, y += kBatch) {
    const int64_t count = min(kBatch, rows - first);
    Products products;
    float results[kBatch];
    dot_batch<false, Int8Row>(w, first, count, rows, {}, x, &products);
    products.store_to(results, count);
    for (int64_t r = 0; r < count; ++r) {
      y[r] = results[r];
      largest = y[r] > largest ? y[r] : largest;
    }
  }
  return largest;
}

void dot_rows(const Rows& w, const int32_t* ids, int64_t count, const void* prepared, float* y) {
  const Vector<Int8Row> x(prepared, w.n);
  const NextNeurons nothing;
  for (int64_t i = 0; i < count; i += kBatch) {
    const Batch batch(ids, count, i, nothing);
    float results[kBatch];
    dot_ids(w, batch, x, results);
    for (int64_t j = 0; j < batch.count; ++j) y[batch.id(j)] = results[j];
  }
}

}  // namespace

namespace TDA_ISA {
const RowKernels int8_rows = {
    prepared_bytes<Int8Row>, prepare<Int8Row>,
    load<Int8Row>,           dot<Int8Row>,
    ffn_fused<Int8Row>,      dot_each<Int8Row>,
    ffn_each<Int8Row>,       ffn_selected<Int8Row, ffn_selected_by_estimate>,
    dot_high_plane,          dot_rows};
}  // namespace TDA_ISA

}  // namespace tda
