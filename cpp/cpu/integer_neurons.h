// Decode for feed-forward neurons of integer formats: gates and ups of many, then their down rows.
// Included by kernel sources only, like simd.h.
#pragma once

#include "cpu/down_rows.h"
#include "cpu/integer_rows.h"

namespace tda {
namespace {

/// h of a batch of neurons, by twos, which share what is loaded of x; but int8 rows that are read
/// whole, as they follow each other, one by one: from memory two are 2% to 6% slower, though 6%
/// faster in the cache. Not inlined: GCC would keep constants of other loops in registers that this
/// one needs.
template <bool kExact, bool kStream, class Row>
[[gnu::noinline]] void multiply_neurons(const NeuronRows& rows, Activation activation,
                                        const Batch& batch, const Vector<Row>& x, float* h) {
  constexpr int kTogether = kExact && kStream && Row::kPlanes ? 1 : 2;
  const Follow& follow = batch.follow;
  const Row gates(rows.gate, 0), ups(rows.up, 0);
  Gated gated;
  const auto work = [&](int64_t i, const auto& ahead) __attribute__((always_inline)) {
    Row taken[2 * kTogether];
    for (int j = 0; j < kTogether; ++j) {  // the last of an odd number twice
      taken[2 * j] = gates.after(rows.gate, batch.id(i + j));
      taken[2 * j + 1] = ups.after(rows.up, batch.id(i + j));
    }
    Floats lanes[2 * kTogether];
    multiply<kExact>(taken, ahead, x, lanes);
    for (int j = 0; j < kTogether; ++j) {
      gated.gates.lanes[i + j] = lanes[2 * j];
      gated.ups.lanes[i + j] = lanes[2 * j + 1];
    }
  };
  if constexpr (kStream) {
    const int64_t stride = rows.gate.stride, low_stride = rows.gate.low_stride;
    const Row first(rows.gate, batch.ids[0]);
    const Streams own = {{first.plane(0), first.plane(1)}, {stride, low_stride}};
    Route route = {own, batch.left, read_on(follow.then, own, stride, low_stride)};
    if (follow.count > 0) {  // as many bytes of down rows
      const std::uint8_t* const down = Row(*follow.a, follow.ids[0]).plane(0);
      route.then = {{down, down + stride}, {2 * follow.a->stride, 2 * follow.a->stride}};
    }
    follow_route<kExact, 2 * kTogether, kTogether>(
        route, batch.count, neurons_ahead((stride + low_stride) / 2), (x.count + 1) / 2, work);
  } else {
    const auto gate = [&](int64_t i) { return batch.ahead<Row>(rows.gate, follow.a, i); };
    const auto up = [&](int64_t i) { return batch.ahead<Row>(rows.up, follow.b, i); };
    for (int64_t i = 0; i < batch.count; i += kTogether)
      work(i, RowsAhead<Row, 4>{{gate(i), up(i), gate(i + 1), up(i + 1)}});
  }
  gated.finish(activation, batch.count, h);
}

template <bool kExact, class Row>
void multiply_neurons(const NeuronRows& rows, Activation activation, const Batch& batch,
                      const Vector<Row>& x, float* h) {
  const auto multiply = batch.is_stream_ahead() ? multiply_neurons<kExact, true, Row>
                                                : multiply_neurons<kExact, false, Row>;
  multiply(rows, activation, batch, x, h);
}

template <class Row>
void clear(float* y, const Vector<Row>& x) {
  for (int64_t i = 0; i < x.count * kGroup; ++i) y[i] = 0.0f;
}

/// Neurons that pass one stage before any of them passes the next: few enough for the second-level
/// cache to keep what was read of them.
constexpr int64_t kChunk = 12 * kBatch;

/// h of many neurons, exactly.
template <class Row>
void multiply_all(const NeuronRows& rows, Activation activation, const int32_t* ids, int64_t count,
                  const Follow& follow, const Vector<Row>& x, float* h) {
  for (int64_t i = 0; i < count; i += kBatch)
    multiply_neurons<true>(rows, activation, Batch(ids, count, i, follow), x, h + i);
}

/// y += sum over many rows of h[i] row[i].
template <bool kExact, class Row>
void add_all(const Rows& down, const int32_t* ids, int64_t count, const Follow& follow,
             const float* h, float* y) {
  const int64_t some = down_batch(down.stride);
  const auto add = some == kManyDownRows ? add_rows<kExact, Row, kManyDownRows>
                                         : add_rows<kExact, Row, kFewDownRows>;
  for (int64_t i = 0; i < count; i += some) add(down, Batch(ids, count, i, follow, some), h + i, y);
}

template <class Row>
void neurons(const NeuronRows& rows, Activation activation, const NeuronIds& all,
             const void* prepared, float* h, float* y) {
  const Vector<Row> x(prepared, rows.gate.n);
  clear(y, x);
  multiply_all(rows, activation, all.data, all.count, {&rows.down, nullptr, all.data, all.count}, x,
               h);
  add_all<true, Row>(rows.down, all.data, all.count,
                     {&rows.gate, &rows.up, all.data + all.count, all.next, true, true, all.then},
                     h, y);
}

/// Neurons of a chunk on their way through the stages.
struct Chosen {
  int32_t ids[kChunk], at[kChunk];  // `at`: their places in the call
  float h[kChunk];
  int64_t count = 0;

  void add(int32_t id, int64_t place, float value) {
    ids[count] = id;
    at[count] = static_cast<int32_t>(place);
    h[count++] = value;
  }
  void store_to(float* all) const {
    for (int64_t i = 0; i < count; ++i) all[at[i]] = h[i];
  }
};

/// CATS: gates of all neurons, then ups and downs of those whose gate is open.
template <class Row>
SelectedCounts selected_by_gate(const NeuronRows& rows, Activation activation,
                                const Selection& selection, const NeuronIds& all,
                                const Vector<Row>& x, float* h, float* y) {
  SelectedCounts counts;
  for (int64_t first = 0; first < all.count; first += kChunk) {
    const int64_t end = min(first + kChunk, all.count);
    Chosen open;
    for (int64_t i = first; i < end; i += kBatch) {
      const Follow ups = {&rows.up, nullptr, open.ids, open.count};
      const Batch batch(all.data, end, i, ups);
      float gates[kBatch];
      multiply_one_each(rows.gate, batch, x, gates);
      activate(activation, gates, batch.count);
      for (int64_t j = 0; j < batch.count; ++j) {
        h[i + j] = 0.0f;
        if (!(__builtin_fabsf(gates[j]) < selection.exact)) open.add(batch.id(j), i + j, gates[j]);
      }
    }
    const Follow downs = {&rows.down, nullptr, open.ids, open.count};
    for (int64_t i = 0; i < open.count; i += kBatch) {
      const Batch batch(open.ids, open.count, i, downs);
      float ups[kBatch];
      multiply_one_each(rows.up, batch, x, ups);
      for (int64_t j = 0; j < batch.count; ++j) open.h[i + j] *= ups[j];
    }
    open.store_to(h);
    add_all<true, Row>(rows.down, open.ids, open.count,
                       {&rows.gate, nullptr, all.data + end, all.count + all.next - end}, open.h,
                       y);
    counts.exact += open.count;
  }
  return counts;
}

/// RowKernels::selected: by the gate, or by the contribution as the format estimates it.
template <class Row, auto kByContribution>
SelectedCounts selected(const NeuronRows& rows, Activation activation, const Selection& selection,
                        const NeuronIds& ids, const void* prepared, float* h, float* y) {
  const Vector<Row> x(prepared, rows.gate.n);
  clear(y, x);
  const auto select = selection.by_gate ? selected_by_gate<Row> : kByContribution;
  return select(rows, activation, selection, ids, x, h, y);
}

}  // namespace
}  // namespace tda
