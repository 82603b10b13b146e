// Kernels of decode for int8 rows, and the token scope's selection by their high planes.
#include "cpu/integer_rows.h"
#include "cpu/kernels_isa.h"

namespace tda {
namespace {

inline void want_high(Wanted& wanted, const Rows& w, int32_t id) {
  wanted.add(Int8Row(w, id).high, high_row_bytes(w.n));
}
inline void want_low(Wanted& wanted, const Rows& w, int32_t id) {
  wanted.add(Int8Row(w, id).low, low_row_bytes(w.n));
}
inline void want(Wanted& wanted, const Int8Row& row) {
  wanted.add(row.high, high_row_bytes(row.n));
  wanted.add(row.low, low_row_bytes(row.n));
}

/// Neurons that were found to be needed, until a batch of them is full and in the cache.
class Queue {
 public:
  struct Neuron {
    int64_t i;       // of the call's
    float gate, up;  // what the sketch gives
  };
  void add(const Neuron& neuron) { waiting_[count_++] = neuron; }
  bool empty() const { return count_ == 0; }
  /// All that is there has been asked for.
  void asked() { asked_ = count_; }
  /// How many may be taken: a batch, or at the end the rest of one.
  int64_t ready(bool at_end) const { return asked_ >= kBatch ? kBatch : at_end ? asked_ : 0; }
  const Neuron& operator[](int64_t i) const { return waiting_[i]; }
  void drop(int64_t some) {
    for (int64_t i = some; i < count_; ++i) waiting_[i - some] = waiting_[i];
    count_ -= some;
    asked_ -= some;
  }

 private:
  Neuron waiting_[4 * kBatch];
  int64_t count_ = 0, asked_ = 0;
};

/// Sketches, the products of high planes, by batches. What they show to be needed queues up for the
/// rest of the work, while memory brings it and the next ones are made.
SelectedCounts selected_by_sketch(const NeuronRows& rows, Activation activation,
                                  const Selection& selection, const NeuronIds& ids,
                                  const Vector<Int8Row>& x, float* h, float* sums) {
  SelectedCounts counts;
  Queue exact, coarse;
  Wanted wanted;
  Down<Int8Row> downs[kBatch];
  const auto finish_exact = [&](int64_t count) {
    int32_t these[kBatch];
    Gated gated;
    for (int64_t i = 0; i < count; ++i) {
      these[i] = ids[exact[i].i];
      gated.gates[i] = exact[i].gate;
      gated.ups[i] = exact[i].up;
    }
    multiply_neurons<Parts::rest>(rows, these, count, x, gated, wanted);
    float finished[kBatch];
    gated.activate_to(activation, count, finished);
    for (int64_t i = 0; i < count; ++i) {
      h[exact[i].i] = finished[i];
      downs[i] = {Int8Row(rows.down, these[i]), finished[i]};
    }
    exact.drop(count);
    add_exact(downs, count, x.groups, sums, wanted);
  };
  const auto finish_coarse = [&](int64_t count) {
    for (int64_t i = 0; i < count; ++i)
      downs[i] = {Int8Row(rows.down, ids[coarse[i].i]), h[coarse[i].i]};
    coarse.drop(count);
    add_rows<Plane::high>(downs, count, x.groups, sums, wanted);
  };
  const auto want_sketch = [&](int64_t first) {  // of the batch there, or of a next call's first
    const int64_t end = min(first + kBatch, ids.count + min(ids.next, kBatch));
    for (int64_t i = first; i < end; ++i)
      for (const Rows* w : {&rows.gate, &rows.up}) want_high(wanted, *w, ids[i]);
  };
  want_sketch(kBatch);
  for (int64_t first = 0; first < ids.count || !exact.empty() || !coarse.empty(); first += kBatch) {
    const int64_t count = max(min(kBatch, ids.count - first), 0);
    const int64_t exact_count = exact.ready(count == 0), coarse_count = coarse.ready(count == 0);
    const int64_t lines = (x.groups + 1) / 2;
    wanted.spread(count * x.groups * kSketchUnits + exact_count * x.groups * kRestUnits +
                  (2 * (exact_count > 0) + (coarse_count > 0)) * lines * kLineUnits);
    if (exact_count > 0) finish_exact(exact_count);
    if (coarse_count > 0) finish_coarse(coarse_count);
    Gated sketch;
    multiply_neurons<Parts::sketch>(rows, ids.data + first, count, x, sketch, wanted);
    float estimates[kBatch];
    sketch.activate_to(activation, count, estimates);
    wanted.ask_for_rest();
    wanted.clear();
    exact.asked();
    coarse.asked();
    for (int64_t i = 0; i < count; ++i) {
      const int32_t id = ids[first + i];
      const float estimate = __builtin_fabsf(estimates[i]) * selection.lengths[id];
      h[first + i] = 0.0f;
      // A NaN is no reason to leave a neuron out: it is to be seen.
      if (!(estimate < selection.exact)) {
        exact.add({first + i, sketch.gates[i], sketch.ups[i]});
        want_high(wanted, rows.down, id);
        for (const Rows* w : {&rows.gate, &rows.up, &rows.down}) want_low(wanted, *w, id);
        ++counts.exact;
      } else if (!(estimate < selection.coarse)) {
        coarse.add({first + i, 0.0f, 0.0f});
        want_high(wanted, rows.down, id);
        h[first + i] = estimates[i];
        ++counts.coarse;
      }
    }
    if (count > 0) want_sketch(first + 2 * kBatch);
  }
  return counts;
}

SelectedCounts selected(const NeuronRows& rows, Activation activation, const Selection& selection,
                        const NeuronIds& ids, const void* prepared, float* h, float* y) {
  const Vector<Int8Row> x(prepared, rows.gate.n);
  float* const sums = begin_sums(y, x);
  const auto select = selection.by_gate ? selected_by_gate<Int8Row> : selected_by_sketch;
  const SelectedCounts counts = select(rows, activation, selection, ids, x, h, sums);
  reorder<Int8Row>(sums, x.groups, y);
  return counts;
}

}  // namespace

namespace TDA_ISA {
const RowKernels int8_rows = {prepared_bytes<Int8Row>, prepare<Int8Row>,
                              load<Int8Row>,           dot<Int8Row>,
                              neurons<Int8Row>,        selected};
}  // namespace TDA_ISA

}  // namespace tda
