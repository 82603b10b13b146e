// Kernels of decode for int8 rows, and the token scope's selection by their high planes.
#include "cpu/int8.h"
#include "cpu/integer_rows.h"
#include "cpu/kernels_isa.h"

namespace tda {
namespace {

/// A group's products with some rows: 256 times those with q and those with the rest, or the high
/// planes' with q. Lane i of out[r][part] belongs to the fours' i-th.
template <bool kExact, int kCount>
inline void products(const Int8Row (&rows)[kCount], int64_t g, const Group& x,
                     Ints (&out)[kCount][kParts]) {
#if defined(__AVX512VNNI__)
  const __m512i q = load_once(x.q), rest = load_once(x.rest);
  const __m512i start = load_once(kExact ? x.start : x.coarse_start);
  // Nibbles of the upper half of the lanes stay where they are, 16 times too large.
  const __m512i masks = _mm512_set_epi64(0xf0f0f0f0f0f0f0f0, 0xf0f0f0f0f0f0f0f0, 0xf0f0f0f0f0f0f0f0,
                                         0xf0f0f0f0f0f0f0f0, 0x0f0f0f0f0f0f0f0f, 0x0f0f0f0f0f0f0f0f,
                                         0x0f0f0f0f0f0f0f0f, 0x0f0f0f0f0f0f0f0f);
#pragma GCC unroll 4
  for (int r = 0; r < kCount; ++r) {
    if (kExact) {
      const __m512i codes = rows[r].codes(g);
      const __m512i with_q = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, q);
      const __m512i with_rest = _mm512_dpbusd_epi32(start, codes, rest);
      out[r][0] = (Ints)_mm512_add_epi32(_mm512_slli_epi32(with_q, 8), with_rest);
    } else {
      const __m512i twice = _mm512_broadcast_i64x4(
          _mm256_loadu_si256((const __m256i*)(rows[r].high + g * kGroupBytes)));
      out[r][0] = (Ints)_mm512_dpbusd_epi32(start, _mm512_and_si512(twice, masks), q);
    }
  }
#else
  for (int r = 0; r < kCount; ++r) {
    Bytes high[kParts], low[kParts];
    expand(rows[r].high + g * kGroupBytes, high);
    if (kExact) expand(rows[r].low + g * kGroupBytes, low);
    for (int part = 0; part < kParts; ++part) {
      const std::int8_t *q = x.q + part * kVectorBytes, *rest = x.rest + part * kVectorBytes;
      const int at = part * kLanes;
      out[r][part] = kExact
                         ? load_as<Ints>(x.start + at) + sums_of_four<4096>(high[part], q) +
                               sums_of_four<256>(low[part], q) +
                               sums_of_four<16>(high[part], rest) + sums_of_four<1>(low[part], rest)
                         : load_as<Ints>(x.coarse_start + at) + sums_of_four<1>(high[part], q);
    }
  }
#endif
}

inline void want(Wanted& wanted, const Int8Row& row, int64_t n) {
  wanted.add(row.high, high_row_bytes(n));
  wanted.add(row.low, low_row_bytes(n));
}

/// Some neurons' estimates, from their high planes.
struct Sketch {
  float h[kBatch], estimates[kBatch];  // the latter of |h| ||down||

  Sketch(const NeuronRows& rows, Activation activation, const Selection& selection,
         const int32_t* ids, int64_t count, const Vector<Int8Row>& x, Wanted& wanted) {
    Gated gated;
    multiply_neurons<false>(rows, ids, count, x, gated, wanted);
    gated.finish(activation, count);
    for (int64_t i = 0; i < count; ++i) {
      h[i] = gated.h[i];
      estimates[i] = __builtin_fabsf(h[i]) * selection.lengths[ids[i]];
    }
  }
};

/// Neurons that were found to be needed, until a batch of them is full and in the cache.
class Queue {
 public:
  void add(int64_t i) { waiting_[count_++] = static_cast<int32_t>(i); }
  bool empty() const { return count_ == 0; }
  /// All that is there has been asked for.
  void asked() { asked_ = count_; }
  /// How many may be taken: a batch, or at the end the rest of one.
  int64_t ready(bool at_end) const { return asked_ >= kBatch ? kBatch : at_end ? asked_ : 0; }
  /// Hands over the first batch.
  const int32_t* take(int64_t some) {
    for (int64_t i = 0; i < some; ++i) taken_[i] = waiting_[i];
    for (int64_t i = some; i < count_; ++i) waiting_[i - some] = waiting_[i];
    count_ -= some;
    asked_ -= some;
    return taken_;
  }

 private:
  int32_t waiting_[4 * kBatch], taken_[kBatch];
  int64_t count_ = 0, asked_ = 0;
};

/// Sketches by batches. What they show to be needed queues up for the rest of the work, while
/// memory brings it and the next ones are made.
SelectedCounts selected_by_sketch(const NeuronRows& rows, Activation activation,
                                  const Selection& selection, const NeuronIds& ids,
                                  const Vector<Int8Row>& x, float* h, float* y) {
  SelectedCounts counts;
  Queue exact, coarse;
  Wanted wanted;
  Down<Int8Row> downs[kBatch];
  const auto finish_exact = [&](int64_t count) {
    const int32_t* const which = exact.take(count);
    int32_t these[kBatch];
    for (int64_t i = 0; i < count; ++i) these[i] = ids[which[i]];
    Gated gated;
    multiply_neurons<true>(rows, these, count, x, gated, wanted);
    gated.finish(activation, count);
    for (int64_t i = 0; i < count; ++i) {
      h[which[i]] = gated.h[i];
      downs[i] = {Int8Row(rows.down, these[i]), gated.h[i]};
    }
    add_rows<true>(downs, count, x.count, y, wanted);
  };
  const auto finish_coarse = [&](int64_t count) {
    const int32_t* const which = coarse.take(count);
    for (int64_t i = 0; i < count; ++i) downs[i] = {Int8Row(rows.down, ids[which[i]]), h[which[i]]};
    add_rows<false>(downs, count, x.count, y, wanted);
  };
  const auto want_sketch = [&](int64_t first) {  // of the batch there, or of a next call's first
    const int64_t end = min(first + kBatch, ids.count + min(ids.next, kBatch));
    for (int64_t i = first; i < end; ++i)
      for (const Rows* w : {&rows.gate, &rows.up})
        wanted.add(Int8Row(*w, ids[i]).high, high_row_bytes(w->n));
  };
  want_sketch(kBatch);
  for (int64_t first = 0; first < ids.count || !exact.empty() || !coarse.empty(); first += kBatch) {
    const int64_t count = max(min(kBatch, ids.count - first), 0);
    const int64_t exact_count = exact.ready(count == 0), coarse_count = coarse.ready(count == 0);
    wanted.spread(count * kSketchUnits + exact_count * kNeuronUnits +
                  ((exact_count > 0) + (coarse_count > 0)) * x.count * kAddUnits);
    if (exact_count > 0) finish_exact(exact_count);
    if (coarse_count > 0) finish_coarse(coarse_count);
    const Sketch sketch(rows, activation, selection, ids.data + first, count, x, wanted);
    wanted.ask_for_rest();
    wanted.clear();
    exact.asked();
    coarse.asked();
    for (int64_t i = 0; i < count; ++i) {
      const int32_t id = ids[first + i];
      h[first + i] = 0.0f;
      // A NaN is no reason to leave a neuron out: it is to be seen.
      if (!(sketch.estimates[i] < selection.exact)) {
        exact.add(first + i);
        for (const Rows* w : {&rows.gate, &rows.up})
          wanted.add(Int8Row(*w, id).low, low_row_bytes(w->n));
        want(wanted, Int8Row(rows.down, id), rows.down.n);
        ++counts.exact;
      } else if (!(sketch.estimates[i] < selection.coarse)) {
        coarse.add(first + i);
        wanted.add(Int8Row(rows.down, id).high, high_row_bytes(rows.down.n));
        h[first + i] = sketch.h[i];
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
  clear(y, x);
  const auto select = selection.by_gate ? selected_by_gate<Int8Row> : selected_by_sketch;
  return select(rows, activation, selection, ids, x, h, y);
}

}  // namespace

namespace TDA_ISA {
const RowKernels int8_rows = {prepared_bytes<Int8Row>, prepare<Int8Row>,
                              load<Int8Row>,           dot<Int8Row>,
                              neurons<Int8Row>,        selected};
}  // namespace TDA_ISA

}  // namespace tda
