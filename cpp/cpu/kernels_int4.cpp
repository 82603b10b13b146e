// Decode kernels for int4 rows.
#include "cpu/int4.h"
#include "cpu/integer_neurons.h"
#include "cpu/kernels_isa.h"

namespace tda {
namespace {

/// Contributions are exact: gate and up rows of all neurons are read, down rows only of those
/// selected.
SelectedCounts ffn_selected_by_contribution(const NeuronRows& rows, Activation activation,
                                            const Selection& selection, const NeuronIds& all,
                                            const Vector<Int4Row>& x, float* h, float* y) {
  SelectedCounts counts;
  for (int64_t first = 0; first < all.count; first += kChunk) {
    const int64_t end = min(first + kChunk, all.count);
    SelectedNeurons used;
    for (int64_t i = first; i < end; i += kBatch) {
      const NextNeurons downs = {&rows.down, nullptr, used.ids, used.count};
      const Batch batch(all.data, end, i, downs);
      gate_up<true>(rows, activation, batch, x, h + i);
      for (int64_t j = i; j < i + batch.count; ++j) {
        const float estimate = __builtin_fabsf(h[j]) * selection.lengths[all[j]];
        if (!(estimate < selection.exact))  // NaN compares false: kept
          used.add(all[j], j, h[j]);
        else
          h[j] = 0.0f;
      }
    }
    add_down_rows<true, Int4Row>(rows.down, used.ids, used.count,
                                 {&rows.gate, &rows.up, all.data + end, all.count + all.more - end},
                                 used.h, y);
    counts.exact += used.count;
  }
  return counts;
}

}  // namespace

namespace TDA_ISA {
const RowKernels int4_rows = {
    prepared_bytes<Int4Row>, prepare<Int4Row>,
    load<Int4Row>,           dot<Int4Row>,
    ffn_fused<Int4Row>,      ffn_selected<Int4Row, ffn_selected_by_contribution>};
}  // namespace TDA_ISA

}  // namespace tda
