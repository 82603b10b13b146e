// Kernels of decode for int4 rows.
#include "cpu/int4.h"
#include "cpu/integer_rows.h"
#include "cpu/kernels_isa.h"

namespace tda {
namespace {

inline void want(Wanted& wanted, const Int4Row& row) {
  wanted.add(row.high, int4_row_bytes(row.n));
}

/// Gates and ups are exact for all; down rows are read of the selected ones alone.
SelectedCounts selected_by_contribution(const NeuronRows& rows, Activation activation,
                                        const Selection& selection, const NeuronIds& all,
                                        const Vector<Int4Row>& x, float* h, float* sums) {
  SelectedCounts counts;
  for_batches(rows, all, x, [&](int64_t first, const Gated& gated, int64_t count, Wanted& wanted) {
    float batch_h[kBatch];
    gated.activate_to(activation, count, batch_h);
    Down<Int4Row> downs[kBatch];
    int64_t used = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t id = all[first + i];
      const float estimate = __builtin_fabsf(batch_h[i]) * selection.lengths[id];
      const bool use = !(estimate < selection.exact);  // a NaN is kept, and seen
      h[first + i] = use ? batch_h[i] : 0.0f;
      if (use) downs[used++] = {Int4Row(rows.down, id), batch_h[i]};
    }
    add_exact(downs, used, x.groups, sums, wanted);
    counts.exact += used;
  });
  return counts;
}

SelectedCounts selected(const NeuronRows& rows, Activation activation, const Selection& selection,
                        const NeuronIds& ids, const void* prepared, float* h, float* y) {
  const Vector<Int4Row> x(prepared, rows.gate.n);
  float* const sums = begin_sums(y, x);
  const auto select = selection.by_gate ? selected_by_gate<Int4Row> : selected_by_contribution;
  const SelectedCounts counts = select(rows, activation, selection, ids, x, h, sums);
  reorder<Int4Row>(sums, x.groups, y);
  return counts;
}

}  // namespace

namespace TDA_ISA {
const RowKernels int4_rows = {prepared_bytes<Int4Row>, prepare<Int4Row>,
                              load<Int4Row>,           dot<Int4Row>,
                              neurons<Int4Row>,        selected};
}  // namespace TDA_ISA

}  // namespace tda
