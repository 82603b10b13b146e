// Kernels of decode for int4 rows.
#include "cpu/int4.h"
#include "cpu/integer_neurons.h"
#include "cpu/kernels_isa.h"

namespace tda {
namespace {

/// Gates and ups are exact for all; down rows are read of the selected ones alone.
SelectedCounts selected_by_contribution(const NeuronRows& rows, Activation activation,
                                        const Selection& selection, const NeuronIds& all,
                                        const Vector<Int4Row>& x, float* h, float* y) {
  SelectedCounts counts;
  for (int64_t first = 0; first < all.count; first += kChunk) {
    const int64_t end = min(first + kChunk, all.count);
    Chosen used;
    for (int64_t i = first; i < end; i += kBatch) {
      const Follow downs = {&rows.down, nullptr, used.ids, used.count};
      const Batch batch(all.data, end, i, downs);
      multiply_neurons<true>(rows, activation, batch, x, h + i);
      for (int64_t j = i; j < i + batch.count; ++j) {
        const float estimate = __builtin_fabsf(h[j]) * selection.lengths[all[j]];
        if (!(estimate < selection.exact))  // a NaN is kept, and seen
          used.add(all[j], j, h[j]);
        else
          h[j] = 0.0f;
      }
    }
    add_all<true, Int4Row>(rows.down, used.ids, used.count,
                           {&rows.gate, &rows.up, all.data + end, all.count + all.next - end},
                           used.h, y);
    counts.exact += used.count;
  }
  return counts;
}

}  // namespace

namespace TDA_ISA {
const RowKernels int4_rows = {prepared_bytes<Int4Row>, prepare<Int4Row>,
                              load<Int4Row>,           dot<Int4Row>,
                              neurons<Int4Row>,        selected<Int4Row, selected_by_contribution>};
}  // namespace TDA_ISA

}  // namespace tda
