// The feed-forward network in decode for integer formats: gate and up products of many neurons,
// then their down rows. Included by kernel sources only, like simd.h.
#pragma once

#include <type_traits>

#include "cpu/down_rows.h"
#include "cpu/integer_rows.h"

namespace tda {
namespace {

/// h of a batch of neurons, of each x. Two neurons per iteration reuse each load of x, except of a
/// single x with contiguous rows and both planes: there two are 2% to 6% slower from memory, though
/// 6% faster from the cache. Not inlined, since GCC would keep constants of other loops in registers
/// needed here. x: a Vector, or those of several
template <bool kExact, bool kStream, class Row, class X>
[[gnu::noinline]] void gate_up(const NeuronRows& rows, Activation activation, const Batch& batch,
                               const X& x, float* const* h) {
  constexpr int kNeurons = kExact && kStream ? X::kRows / 2 : 2;
  constexpr bool kEach = X::kSeveral;
  const NextNeurons& next = batch.next;
  const int64_t pairs_of_groups = (groups_of(rows.gate.n) + 1) / 2;
  const Row gates(rows.gate, 0), ups(rows.up, 0);
  Gated gated[kEach ? Vectors::kMost : 1];
  const auto work = [&](int64_t i, const auto& ahead) __attribute__((always_inline)) {
    Row pairs[2 * kNeurons];
    for (int j = 0; j < kNeurons; ++j) {  // if their number is odd, the last one twice
      pairs[2 * j] = gates.after(rows.gate, batch.id(i + j));
      pairs[2 * j + 1] = ups.after(rows.up, batch.id(i + j));
    }
    multiply_each<kExact>(pairs, ahead, x,
                          [&](int64_t v, int r, Floats lanes) __attribute__((always_inline)) {
                            Products& of = r % 2 == 0 ? gated[v].gates : gated[v].ups;
                            of.lanes[i + r / 2] = lanes;
                          });
  };
  if constexpr (kStream) {
    const int64_t stride = rows.gate.stride, low_stride = rows.gate.low_stride;
    const Row first(rows.gate, batch.ids[0]);
    const Streams own = {{first.plane(0), first.plane(1)}, {stride, low_stride}};
    ReadPath path = {own, batch.left, next_streams(next.otherwise, own, stride, low_stride)};
    if (next.count > 0) {  // two down rows per neuron are as many bytes
      const std::uint8_t* const down = Row(*next.a, next.ids[0]).plane(0);
      path.next = {{down, down + stride}, {2 * next.a->stride, 2 * next.a->stride}};
    }
    prefetch_along<kExact && !kEach, 2 * kNeurons, kNeurons>(
        path, batch.count, neurons_ahead((stride + low_stride) / 2), pairs_of_groups, work);
  } else {
    const auto gate = [&](int64_t i) { return batch.ahead<Row>(rows.gate, next.a, i); };
    const auto up = [&](int64_t i) { return batch.ahead<Row>(rows.up, next.b, i); };
    for (int64_t i = 0; i < batch.count; i += kNeurons)
      work(i, RowsAhead<Row, 4>{{gate(i), up(i), gate(i + 1), up(i + 1)}});
  }
  const int64_t vectors = [&] {
    if constexpr (kEach) return x.count;
    return int64_t{1};
  }();
  for (int64_t v = 0; v < vectors; ++v) gated[v].finish(activation, batch.count, h[v]);
}

template <bool kExact, class Row, class X>
void gate_up(const NeuronRows& rows, Activation activation, const Batch& batch, const X& x,
             float* const* h) {
  const auto multiply =
      batch.is_stream_ahead() ? gate_up<kExact, true, Row, X> : gate_up<kExact, false, Row, X>;
  multiply(rows, activation, batch, x, h);
}

inline void clear(float* y, int64_t n) {
  for (int64_t i = 0; i < groups_of(n) * kGroup; ++i) y[i] = 0.0f;
}

/// Neurons that go through one stage of the selection before any goes through the next: few enough
/// for L2 to hold what was read of them.
constexpr int64_t kChunk = 12 * kBatch;

/// h of many neurons, from both planes.
template <class Row>
void gate_up_all(const NeuronRows& rows, Activation activation, const int32_t* ids, int64_t count,
                 const NextNeurons& next, const Vector<Row>& x, float* h) {
  for (int64_t i = 0; i < count; i += kBatch) {
    float* const out = h + i;
    gate_up<true, Row>(rows, activation, Batch(ids, count, i, next), x, &out);
  }
}

/// y += sum_i h[i] row[ids[i]], i < count
template <bool kExact, class Row>
void add_down_rows(const Rows& down, const int32_t* ids, int64_t count, const NextNeurons& next,
                   const float* h, float* y) {
  const int64_t some = down_batch(down.stride);
  const auto add = some == kLargeDownBatch ? add_down_batch<kExact, Row, kLargeDownBatch>
                                           : add_down_batch<kExact, Row, kSmallDownBatch>;
  for (int64_t i = 0; i < count; i += some) add(down, Batch(ids, count, i, next, some), h + i, y);
}

template <class Row>
void ffn_fused(const NeuronRows& rows, Activation activation, const NeuronIds& all,
               const void* prepared, float* h, float* y) {
  const Vector<Row> x(prepared, rows.gate.n);
  clear(y, rows.gate.n);
  gate_up_all(rows, activation, all.data, all.count, {&rows.down, nullptr, all.data, all.count}, x,
              h);
  add_down_rows<true, Row>(
      rows.down, all.data, all.count,
      {&rows.gate, &rows.up, all.data + all.count, all.more, true, true, all.next}, h, y);
}

/// y[v] += sum_i h[v][i] row[ids[i]] of each vector
template <class Row, int kRows>
void add_down_each(const Rows& down, const NeuronIds& ids, const NextNeurons& next,
                   const Vectors& vectors) {
  for (int64_t i = 0; i < ids.count; i += kRows) {
    const Batch batch(ids.data, ids.count, i, next, kRows);
    const float* h[Vectors::kMost];
    for (int64_t v = 0; v < vectors.count; ++v) h[v] = vectors.h[v] + i;
    if (batch.is_stream_ahead())
      add_down_batch_each<Row, kRows>(down, batch, DownStreamsAhead<Row>(down, batch), h, vectors);
    else
      add_down_batch_each<Row, kRows>(down, batch, DownRowsAhead<Row, kRows>(down, batch), h,
                                      vectors);
  }
}

template <class Row>
void ffn_each(const NeuronRows& rows, Activation activation, const NeuronIds& all,
              const Vectors& vectors) {
  const NextNeurons downs = {&rows.down, nullptr, all.data, all.count};
  const NextNeurons gates = {&rows.gate, &rows.up, all.data + all.count, all.more, true,
                             true,       all.next};
  with_vectors<Row>(vectors, rows.gate.n, [&](const auto& x) {
    float* h[Vectors::kMost];
    for (int64_t i = 0; i < all.count; i += kBatch) {
      for (int64_t v = 0; v < vectors.count; ++v) h[v] = vectors.h[v] + i;
      gate_up<true, Row>(rows, activation, Batch(all.data, all.count, i, downs), x, h);
    }
  });
  for (int64_t v = 0; v < vectors.count; ++v) clear(vectors.y[v], rows.gate.n);
  const bool large = down_batch(rows.down.stride) == kLargeDownBatch;
  (large ? add_down_each<Row, kLargeDownBatch>
         : add_down_each<Row, kSmallDownBatch>)(rows.down, all, gates, vectors);
}

/// The neurons of a chunk that were selected.
struct SelectedNeurons {
  int32_t ids[kChunk], at[kChunk];  // at: their indices in the call
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

/// CATS: the gates of all neurons, then the up and down rows of those whose gate reaches the
/// threshold.
template <class Row>
SelectedCounts ffn_selected_by_gate(const NeuronRows& rows, Activation activation,
                                    const Selection& selection, const NeuronIds& all,
                                    const Vector<Row>& x, float* h, float* y) {
  SelectedCounts counts;
  for (int64_t first = 0; first < all.count; first += kChunk) {
    const int64_t end = min(first + kChunk, all.count);
    SelectedNeurons open;
    for (int64_t i = first; i < end; i += kBatch) {
      const NextNeurons ups = {&rows.up, nullptr, open.ids, open.count};
      const Batch batch(all.data, end, i, ups);
      float gates[kBatch];
      dot_ids(rows.gate, batch, x, gates);
      activate(activation, gates, batch.count);
      for (int64_t j = 0; j < batch.count; ++j) {
        h[i + j] = 0.0f;
        if (!(__builtin_fabsf(gates[j]) < selection.exact)) open.add(batch.id(j), i + j, gates[j]);
      }
    }
    const NextNeurons downs = {&rows.down, nullptr, open.ids, open.count};
    for (int64_t i = 0; i < open.count; i += kBatch) {
      const Batch batch(open.ids, open.count, i, downs);
      float ups[kBatch];
      dot_ids(rows.up, batch, x, ups);
      for (int64_t j = 0; j < batch.count; ++j) open.h[i + j] *= ups[j];
    }
    open.store_to(h);
    add_down_rows<true, Row>(rows.down, open.ids, open.count,
                             {&rows.gate, nullptr, all.data + end, all.count + all.more - end},
                             open.h, y);
    counts.exact += open.count;
  }
  return counts;
}

/// RowKernels::ffn_selected: by the gate, or by kByContribution, which estimates contributions as
/// the format allows.
template <class Row, auto kByContribution>
SelectedCounts ffn_selected(const NeuronRows& rows, Activation activation,
                            const Selection& selection, const NeuronIds& ids, const void* prepared,
                            float* h, float* y) {
  const Vector<Row> x(prepared, rows.gate.n);
  clear(y, rows.gate.n);
  const auto select = selection.by_gate ? ffn_selected_by_gate<Row> : kByContribution;
  return select(rows, activation, selection, ids, x, h, y);
}

}  // namespace
}  // namespace tda
