// Kernels of decode for int4 rows.
#include "cpu/int4.h"
#include "cpu/integer_rows.h"
#include "cpu/kernels_isa.h"

namespace tda {
namespace {

/// A group's products with some rows. Lane i of out[r][part] belongs to the fours' i-th.
template <bool kExact, int kCount>
inline void products(const Int4Row (&rows)[kCount], int64_t g, const Group& x,
                     Ints (&out)[kCount][kParts]) {
#if defined(__AVX512VNNI__)
  const __m512i q = load_once(x.q), start = load_once(x.start);
#pragma GCC unroll 4
  for (int r = 0; r < kCount; ++r)
    out[r][0] = (Ints)_mm512_dpbusd_epi32(start, rows[r].codes(g), q);
#else
  for (int r = 0; r < kCount; ++r) {
    Bytes codes[kParts];
    expand(rows[r].nibbles + g * kGroupBytes, codes);
    for (int part = 0; part < kParts; ++part)
      out[r][part] = load_as<Ints>(x.start + part * kLanes) +
                     sums_of_four<1>(codes[part], x.q + part * kVectorBytes);
  }
#endif
}

inline void want(Wanted& wanted, const Int4Row& row, int64_t n) {
  wanted.add(row.nibbles, int4_row_bytes(n));
}

/// Gates and ups are exact for all; down rows are read of the selected ones alone.
SelectedCounts selected_by_contribution(const NeuronRows& rows, Activation activation,
                                        const Selection& selection, const NeuronIds& all,
                                        const Vector<Int4Row>& x, float* h, float* y) {
  SelectedCounts counts;
  for_batches(rows, activation, all, x,
              [&](int64_t first, const Gated& gated, int64_t count, Wanted& wanted) {
                Down<Int4Row> downs[kBatch];
                int64_t used = 0;
                for (int64_t i = 0; i < count; ++i) {
                  const int32_t id = all[first + i];
                  const float estimate = __builtin_fabsf(gated.h[i]) * selection.lengths[id];
                  const bool use = !(estimate < selection.exact);  // a NaN is kept, and seen
                  h[first + i] = use ? gated.h[i] : 0.0f;
                  if (use) downs[used++] = {Int4Row(rows.down, id), gated.h[i]};
                }
                add_rows<true>(downs, used, x.count, y, wanted);
                counts.exact += used;
              });
  return counts;
}

SelectedCounts selected(const NeuronRows& rows, Activation activation, const Selection& selection,
                        const NeuronIds& ids, const void* prepared, float* h, float* y) {
  const Vector<Int4Row> x(prepared, rows.gate.n);
  clear(y, x);
  const auto select = selection.by_gate ? selected_by_gate<Int4Row> : selected_by_contribution;
  return select(rows, activation, selection, ids, x, h, y);
}

}  // namespace

namespace TDA_ISA {
const RowKernels int4_rows = {prepared_bytes<Int4Row>, prepare<Int4Row>,
                              load<Int4Row>,           dot<Int4Row>,
                              neurons<Int4Row>,        selected};
}  // namespace TDA_ISA

}  // namespace tda
