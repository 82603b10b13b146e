// Decode kernels for int8 rows: products with an x that is quantised, too, and the feed-forward
// network, whose gate and up products of many neurons are followed by their down rows.
#include "cpu/int8.h"
#include "cpu/int8_down.h"
#include "cpu/int8_products.h"
#include "cpu/kernels_isa.h"
#include "cpu/prefetch.h"

namespace tda {
namespace {

/// Whether X is the prepared x of several sequences.
template <class X>
constexpr bool kSeveral = false;
template <>
constexpr bool kSeveral<VectorsOf> = true;

int64_t count_of(const Vector&) { return 1; }
int64_t count_of(const VectorsOf& x) { return x.count; }
template <class X>
constexpr int64_t kMostOf = kSeveral<X> ? Vectors::kMost : 1;

/// Dot products of up to kBatch rows, each still one partial sum per lane.
struct Products {
  Floats lanes[kBatch];

  /// Stores the first `count`, rounded up to whole vectors; the padding is 0.
  void store_to(float* out, int64_t count) {
    for (int64_t i = count; i % kLanes != 0; ++i) lanes[i] = Floats{};
    for (int64_t i = 0; i < count; i += kLanes) store(out + i, sums(lanes + i));
  }
};

// ---- matrices -----------------------------------------------------------------------------------

/// products[v].lanes[i] = those of w[first + i]·x[v], i < count <= kBatch. w has `rows` rows.
template <class X>
void dot_batch(const Rows& w, int64_t first, int64_t count, int64_t rows, NextRead next, const X& x,
               Products* products) {
  constexpr int kRows = X::kRows;
  const Int8Row row(w, first);
  const ReadPath path = {row.data, w.stride, rows - first,
                         reinterpret_cast<const std::uint8_t*>(next.data)};
  prefetch_along<!kSeveral<X>, kRows>(
      path, count, rows_ahead(w.stride, 2 * kRows), kRows * groups_of(w.n),
      [&](int64_t i, auto& ahead) __attribute__((always_inline)) {
        Int8Row some[kRows];
        for (int j = 0; j < kRows; ++j) some[j] = row.after(w, min(i + j, count - 1));
        multiply_each(some, ahead, x,
                      [&](int64_t v, int r, Floats lanes)
                          __attribute__((always_inline)) { products[v].lanes[i + r] = lanes; });
      });
}

/// y[v][r] = w[r]·x[v], or += with `add`, r < rows
template <class X>
void dot_all(const Rows& w, int64_t rows, const X& x, float* const* y, bool add, NextRead next) {
  for (int64_t first = 0; first < rows; first += kBatch) {
    const int64_t count = min(kBatch, rows - first);
    Products products[kMostOf<X>];
    float results[kBatch];
    dot_batch(w, first, count, rows, next, x, products);
    for (int64_t v = 0; v < count_of(x); ++v) {
      products[v].store_to(results, count);
      float* const out = y[v] + first;
      for (int64_t r = 0; r < count; ++r) out[r] = results[r] + (add ? out[r] : 0.0f);
    }
  }
}

void dot(const Rows& w, int64_t rows, const void* prepared, float* y, bool add, NextRead next) {
  dot_all(w, rows, Vector(prepared, w.n), &y, add, next);
}

void dot_each(const Rows& w, int64_t rows, const Vectors& vectors, bool add) {
  Rows next = w;  // most likely those of the thread's next task
  next.data += rows * w.stride;
  dot_all(w, rows, VectorsOf(vectors, w.n), vectors.y, add, next);
}

/// out[i] = w[batch.id(i)]·x, i < batch.count, with room for whole vectors.
void dot_ids(const Rows& w, const Batch& batch, const Vector& x, float* out) {
  const auto ahead = [&](int64_t i) { return batch.ahead(w, batch.next.a, i); };
  Products products;
  for (int64_t i = 0; i < batch.count; i += 2) {
    // If their number is odd, the last one twice.
    const Int8Row pair[2] = {Int8Row(w, batch.id(i)), Int8Row(w, batch.id(i + 1))};
    RowsAhead<2> later = {{ahead(i), ahead(i + 1)}};
    multiply_each(pair, later, x,
                  [&](int64_t, int r, Floats lanes) { products.lanes[i + r] = lanes; });
  }
  products.store_to(out, batch.count);
}

void load(const Rows& w, float* out, int64_t stride) {
  const Int8Row row(w, 0);
  for (int64_t i = 0; i < w.n; i += 16) {
    float values[16];
    row.load(i, values);
    for (int64_t j = 0; j < min(16, w.n - i); ++j) out[(i + j) * stride] = values[j];
  }
}

// ---- gate and up --------------------------------------------------------------------------------

/// In place; `count` is rounded up to whole vectors.
void activate(Activation activation, float* values, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes)
    store(values + i, activate(activation, load_as<Floats>(values + i)));
}

/// Gate and up products of a batch.
struct Gated {
  Products gates, ups;

  /// h[i] = act(gate[i]) * up[i], i < count
  void finish(Activation activation, int64_t count, float* h) {
    float gate[kBatch], up[kBatch];
    gates.store_to(gate, count);
    ups.store_to(up, count);
    activate(activation, gate, count);
    for (int64_t i = 0; i < count; ++i) h[i] = gate[i] * up[i];
  }
};

/// h of a batch of neurons, of each x. Two neurons per iteration reuse each load of x, except of a
/// single x with contiguous rows: there two are 2% to 6% slower from memory, though 6% faster from
/// the cache. Not inlined, since GCC would keep constants of other loops in registers needed here.
template <bool kStream, class X>
[[gnu::noinline]] void gate_up(const NeuronRows& rows, Activation activation, const Batch& batch,
                               const X& x, float* const* h) {
  constexpr int kNeurons = kStream && !kSeveral<X> ? 1 : 2;
  const NextNeurons& next = batch.next;
  const Int8Row gates(rows.gate, 0), ups(rows.up, 0);
  Gated gated[kMostOf<X>];
  const auto work = [&](int64_t i, auto& ahead) __attribute__((always_inline)) {
    Int8Row some[2 * kNeurons];
    for (int j = 0; j < kNeurons; ++j) {  // if their number is odd, the last one twice
      some[2 * j] = gates.after(rows.gate, batch.id(i + j));
      some[2 * j + 1] = ups.after(rows.up, batch.id(i + j));
    }
    multiply_each(some, ahead, x,
                  [&](int64_t v, int r, Floats lanes) __attribute__((always_inline)) {
                    Products& of = r % 2 == 0 ? gated[v].gates : gated[v].ups;
                    of.lanes[i + r / 2] = lanes;
                  });
  };
  if constexpr (kStream) {
    ReadPath path = {Int8Row(rows.gate, batch.ids[0]).data, rows.gate.stride, batch.left,
                     reinterpret_cast<const std::uint8_t*>(next.otherwise.data)};
    if (next.count > 0) path.next = Int8Row(*next.a, next.ids[0]).data;
    prefetch_along<!kSeveral<X>, kNeurons>(path, batch.count, neurons_ahead(rows.gate.stride / 2),
                                           2 * kNeurons * groups_of(rows.gate.n), work);
  } else {
    const auto gate = [&](int64_t i) { return batch.ahead(rows.gate, next.a, i); };
    const auto up = [&](int64_t i) { return batch.ahead(rows.up, next.b, i); };
    for (int64_t i = 0; i < batch.count; i += kNeurons) {
      RowsAhead<4> ahead = {{gate(i), up(i), gate(i + 1), up(i + 1)}};
      work(i, ahead);
    }
  }
  for (int64_t v = 0; v < count_of(x); ++v) gated[v].finish(activation, batch.count, h[v]);
}

template <class X>
void gate_up(const NeuronRows& rows, Activation activation, const Batch& batch, const X& x,
             float* const* h) {
  (batch.is_stream_ahead() ? gate_up<true, X> : gate_up<false, X>)(rows, activation, batch, x, h);
}

/// h[v] of all neurons of a list, of each x.
template <class X>
void gate_up_all(const NeuronRows& rows, Activation activation, const int32_t* ids, int64_t count,
                 const NextNeurons& next, const X& x, float* const* h) {
  for (int64_t i = 0; i < count; i += kBatch) {
    float* out[kMostOf<X>];
    for (int64_t v = 0; v < count_of(x); ++v) out[v] = h[v] + i;
    gate_up(rows, activation, Batch(ids, count, i, next), x, out);
  }
}

// ---- down ---------------------------------------------------------------------------------------

void clear(float* y, int64_t n) {
  for (int64_t i = 0; i < groups_of(n) * kGroup; ++i) y[i] = 0.0f;
}

/// Calls add(size, first, batch, ahead) for batches of kRows down rows; size is a constant.
template <int kRows, class Add>
void for_down_batches(const Rows& down, const int32_t* ids, int64_t count, const NextNeurons& next,
                      const Add& add) {
  for (int64_t i = 0; i < count; i += kRows) {
    const Batch batch(ids, count, i, next, kRows);
    if (batch.is_stream_ahead()) {
      StreamAhead<true> ahead = stream_of_down_rows<kRows>(down, batch);
      add(Constant<kRows>(), i, batch, ahead);
    } else {
      DownRowsAhead<kRows> ahead(down, batch);
      add(Constant<kRows>(), i, batch, ahead);
    }
  }
}
template <class Add>
void for_down_batches(const Rows& down, const int32_t* ids, int64_t count, const NextNeurons& next,
                      const Add& add) {
  const bool large = down_batch(down.stride) == kLargeDownBatch;
  (large ? for_down_batches<kLargeDownBatch, Add>
         : for_down_batches<kSmallDownBatch, Add>)(down, ids, count, next, add);
}

/// y += sum_i h[i] row[ids[i]], i < count
void add_down_rows(const Rows& down, const int32_t* ids, int64_t count, const NextNeurons& next,
                   const float* h, float* y) {
  for_down_batches(down, ids, count, next,
                   [&](auto size, int64_t first, const Batch& batch, auto& ahead) {
                     add_down_batch<size.value>(down, batch, ahead, h + first, y);
                   });
}

/// The same of each vector.
void add_down_rows_each(const Rows& down, const int32_t* ids, int64_t count,
                        const NextNeurons& next, const Vectors& vectors) {
  for_down_batches(down, ids, count, next,
                   [&](auto size, int64_t first, const Batch& batch, auto& ahead) {
                     const float* h[Vectors::kMost];
                     for (int64_t v = 0; v < vectors.count; ++v) h[v] = vectors.h[v] + first;
                     add_down_batch_each<size.value>(down, batch, ahead, h, vectors);
                   });
}

// ---- the feed-forward network -------------------------------------------------------------------

/// What is read after the down rows of a call: the gate and up rows of the next one.
NextNeurons gates_after(const NeuronRows& rows, const NeuronIds& all, int64_t end) {
  return {&rows.gate, &rows.up, all.data + end, all.count + all.more - end, all.next};
}

void ffn_fused(const NeuronRows& rows, Activation activation, const NeuronIds& all,
               const void* prepared, float* h, float* y) {
  const NextNeurons downs = {&rows.down, nullptr, all.data, all.count};
  const Vector x(prepared, rows.gate.n);
  gate_up_all(rows, activation, all.data, all.count, downs, x, &h);
  clear(y, rows.gate.n);
  add_down_rows(rows.down, all.data, all.count, gates_after(rows, all, all.count), h, y);
}

void ffn_each(const NeuronRows& rows, Activation activation, const NeuronIds& all,
              const Vectors& vectors) {
  const NextNeurons downs = {&rows.down, nullptr, all.data, all.count};
  const VectorsOf x(vectors, rows.gate.n);
  gate_up_all(rows, activation, all.data, all.count, downs, x, vectors.h);
  for (int64_t v = 0; v < vectors.count; ++v) clear(vectors.y[v], rows.gate.n);
  add_down_rows_each(rows.down, all.data, all.count, gates_after(rows, all, all.count), vectors);
}

/// Neurons that go through one stage of the selection before any goes through the next: few enough
/// for L2 to hold what was read of them.
constexpr int64_t kChunk = 12 * kBatch;

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
};

/// The neurons of a chunk whose contributions reach the threshold. NaN compares false, so such a
/// neuron is kept and NaN reaches the logits.
void select_by_contribution(const NeuronRows& rows, Activation activation,
                            const Selection& selection, const NeuronIds& all, int64_t first,
                            int64_t end, const Vector& x, float* h, SelectedNeurons& open) {
  const NextNeurons nothing;
  float* const out = h + first;
  gate_up_all(rows, activation, all.data + first, end - first, nothing, x, &out);
  for (int64_t i = first; i < end; ++i) {
    if (!(__builtin_fabsf(h[i]) * selection.lengths[all[i]] < selection.threshold))
      open.add(all[i], i, h[i]);
    else
      h[i] = 0.0f;
  }
}

/// CATS: the gates of all, then the up rows of those whose gate reaches the threshold.
void select_by_gate(const NeuronRows& rows, Activation activation, const Selection& selection,
                    const NeuronIds& all, int64_t first, int64_t end, const Vector& x, float* h,
                    SelectedNeurons& open) {
  for (int64_t i = first; i < end; i += kBatch) {
    const NextNeurons ups = {&rows.up, nullptr, open.ids, open.count};
    const Batch batch(all.data, end, i, ups);
    float gates[kBatch];
    dot_ids(rows.gate, batch, x, gates);
    activate(activation, gates, batch.count);
    for (int64_t j = 0; j < batch.count; ++j) {
      h[i + j] = 0.0f;
      if (!(__builtin_fabsf(gates[j]) < selection.threshold))
        open.add(batch.id(j), i + j, gates[j]);
    }
  }
  const NextNeurons downs = {&rows.down, nullptr, open.ids, open.count};
  for (int64_t i = 0; i < open.count; i += kBatch) {
    const Batch batch(open.ids, open.count, i, downs);
    float ups[kBatch];
    dot_ids(rows.up, batch, x, ups);
    for (int64_t j = 0; j < batch.count; ++j) {
      open.h[i + j] *= ups[j];
      h[open.at[i + j]] = open.h[i + j];
    }
  }
}

int64_t ffn_selected(const NeuronRows& rows, Activation activation, const Selection& selection,
                     const NeuronIds& all, const void* prepared, float* h, float* y) {
  const Vector x(prepared, rows.gate.n);
  clear(y, rows.gate.n);
  const auto select = selection.by_gate ? select_by_gate : select_by_contribution;
  int64_t count = 0;
  for (int64_t first = 0; first < all.count; first += kChunk) {
    const int64_t end = min(first + kChunk, all.count);
    SelectedNeurons open;
    select(rows, activation, selection, all, first, end, x, h, open);
    NextNeurons next = gates_after(rows, all, end);
    if (selection.by_gate) next.b = nullptr;
    add_down_rows(rows.down, open.ids, open.count, next, open.h, y);
    count += open.count;
  }
  return count;
}

}  // namespace

namespace TDA_ISA {
const RowKernels int8_rows = {prepared_bytes, prepare,  load,     dot,
                              ffn_fused,      dot_each, ffn_each, ffn_selected};
}  // namespace TDA_ISA

}  // namespace tda
