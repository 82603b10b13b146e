// Kernels of decode for int8 rows: integer products with an x that is rounded to int8, too.
//
// A group's product with x is   sx sw (16 sum((high - 8) q) + sum((low - 8) q)),
// x = sx q in the group. Nibbles are unsigned, as the instructions want it; the -8 sum(q) is where
// the integer sums start. The planes' sums stay apart to the end, exact = 16 high + low: so a
// neuron that is finished after a look at its high planes has the bits of one computed at once.
#include "cpu/batch.h"
#include "cpu/kernels_isa.h"

namespace tda {
namespace {

#if defined(__AVX512VNNI__)
/// The upper half of the lanes works on nibbles that stay where they are, 16 times too large.
inline int32_t lane_factor(int lane) { return lane < 8 ? 1 : 16; }
inline Floats level(Floats v) {
  return v * (Floats)_mm512_set_ps(0.0625f, 0.0625f, 0.0625f, 0.0625f, 0.0625f, 0.0625f, 0.0625f,
                                   0.0625f, 1, 1, 1, 1, 1, 1, 1, 1);
}
#else
inline int32_t lane_factor(int) { return 1; }
inline Floats level(Floats v) { return v; }
#endif

struct Group {  // of a prepared x
  std::int8_t q[kGroup];
  int32_t start[kLanes];  // -8 sum of the q that the lane adds up
};

/// A prepared x: groups, and their scales, filled up with zeros to whole vectors.
struct Vector {
  Group* groups;
  float* scales;
  int64_t count;

  Vector(const void* prepared, int64_t n)
      : groups(static_cast<Group*>(const_cast<void*>(prepared))),
        scales(reinterpret_cast<float*>(groups + groups_of(n))),
        count(groups_of(n)) {}
};

int64_t prepared_bytes(int64_t n) {
  return groups_of(n) * sizeof(Group) + (groups_of(n) + kLanes) * sizeof(float);
}

void prepare(const float* x, int64_t n, void* prepared) {
  const Vector out(prepared, n);
  for (int64_t g = 0; g < out.count; ++g) {
    Group& group = out.groups[g];
    const int64_t left = n - g * kGroup;
    Floats values[kGroup / kLanes];
    Floats largest = {};
    for (int i = 0; i < kGroup / kLanes; ++i) {
      const int64_t count = left - i * kLanes;
      values[i] = count > 0 ? load_part<F32>(x + g * kGroup + i * kLanes, count) : Floats{};
      largest = max(values[i] < 0.0f ? -values[i] : values[i], largest);
    }
    float most = largest[0];
    for (int lane = 1; lane < kLanes; ++lane) most = largest[lane] > most ? largest[lane] : most;
    const float inverse = most > 0.0f ? 127.0f / most : 0.0f;
    out.scales[g] = most / 127.0f;
    int32_t bits[kGroup];
    for (int i = 0; i < kGroup / kLanes; ++i) {
      // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
      const Floats shifted = values[i] * inverse + 12582912.0f;
      __builtin_memcpy(bits + i * kLanes, &shifted, sizeof shifted);
    }
    int32_t start[kLanes] = {};
    for (int i = 0; i < kGroup; ++i) {
      group.q[i] = static_cast<std::int8_t>(bits[i]);
      start[i % kVectorBytes / 4] -= 8 * group.q[i];
    }
    for (int lane = 0; lane < kLanes; ++lane) group.start[lane] = lane_factor(lane) * start[lane];
  }
  for (int lane = 0; lane < kLanes; ++lane) out.scales[out.count + lane] = 0.0f;
}

/// start + sums of nibbles times q over four neighbours each
inline Ints add_products(const std::uint8_t* nibbles, const std::int8_t* q, Ints start) {
#if defined(__AVX512VNNI__)
  const __m512i masks = _mm512_set_epi64(0xf0f0f0f0f0f0f0f0, 0xf0f0f0f0f0f0f0f0, 0xf0f0f0f0f0f0f0f0,
                                         0xf0f0f0f0f0f0f0f0, 0x0f0f0f0f0f0f0f0f, 0x0f0f0f0f0f0f0f0f,
                                         0x0f0f0f0f0f0f0f0f, 0x0f0f0f0f0f0f0f0f);
  const __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)nibbles));
  return (Ints)_mm512_dpbusd_epi32((__m512i)start, _mm512_and_si512(twice, masks),
                                   _mm512_loadu_si512(q));
#elif defined(__AVX2__)
  Bytes w[kParts];
  expand(nibbles, w);
  const __m256i q0 = _mm256_loadu_si256((const __m256i*)q);
  const __m256i q1 = _mm256_loadu_si256((const __m256i*)q + 1);
  const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16((__m256i)w[0], q0),
                                         _mm256_maddubs_epi16((__m256i)w[1], q1));
  return start + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  Bytes w[kParts];
  expand(nibbles, w);
  Ints sums = start;
  for (int part = 0; part < kParts; ++part)
    for (int i = 0; i < kVectorBytes; ++i) sums[i / 4] += w[part][i] * q[part * kVectorBytes + i];
  return sums;
#endif
}

/// The planes' shares in the products of kCount rows with x, still one sum per lane. Two rows share
/// what is loaded of x.
template <bool kHigh, bool kLow, int kCount>
inline void multiply(const Int8Row (&rows)[kCount], const Vector& x, Floats (&highs)[kCount],
                     Floats (&lows)[kCount]) {
  Floats high[kCount] = {}, low[kCount] = {};
  for (int64_t g0 = 0; g0 < x.count; g0 += kLanes) {
    float factors[kCount][kLanes];
    for (int r = 0; r < kCount; ++r)
      store(factors[r], rows[r].scales_from(g0) * load_as<Floats>(x.scales + g0));
    const int64_t end = min(g0 + kLanes, x.count);
    for (int64_t g = g0; g < end; ++g) {
      const Group& group = x.groups[g];
      Ints start = load_as<Ints>(group.start);
      keep_in_register(start);
      const int64_t at = g * kGroupBytes;
#pragma GCC unroll 2
      for (int r = 0; r < kCount; ++r) {
        const float factor = factors[r][g - g0];
        if (kHigh) high[r] += factor * to_floats(add_products(rows[r].high + at, group.q, start));
        if (kLow) low[r] += factor * to_floats(add_products(rows[r].low + at, group.q, start));
      }
    }
  }
  for (int r = 0; r < kCount; ++r) {
    if (kHigh) highs[r] = high[r];
    if (kLow) lows[r] = low[r];
  }
}

inline Floats exact_lanes(Floats high, Floats low) { return level(16.0f * high + low); }
inline Floats coarse_lanes(Floats high) { return level(16.0f * high); }
inline Floats exact_lanes(const Int8Row& row, const Vector& x) {
  const Int8Row rows[1] = {row};
  Floats high[1], low[1];
  multiply<true, true>(rows, x, high, low);
  return exact_lanes(high[0], low[0]);
}

inline void want_high(Wanted& wanted, const Rows& w, int64_t r) {
  wanted.add(Int8Row(w, r).high, high_row_bytes(w.n));
}
inline void want_low(Wanted& wanted, const Rows& w, int64_t r) {
  wanted.add(Int8Row(w, r).low, low_row_bytes(w.n));
}
inline void want(Wanted& wanted, const Rows& w, int64_t r) {
  want_high(wanted, w, r);
  want_low(wanted, w, r);
}

// ---- kernels --------------------------------------------------------------------------------

void dot(const Rows& w, int64_t rows, const void* prepared, float* y, bool add) {
  const Vector x(prepared, w.n);
  for (int64_t first = 0; first < rows; first += kBatch, y += kBatch) {
    const int64_t count = min(kBatch, rows - first);
    Products products;
    for (int64_t r = 0; r < count; ++r) products.lanes[r] = exact_lanes(Int8Row(w, first + r), x);
    float results[kBatch];
    products.store_to(results, count);
    for (int64_t r = 0; r < count; ++r) y[r] = results[r] + (add ? y[r] : 0.0f);
  }
}

void neurons(const NeuronRows& rows, Activation activation, const NeuronIds& all,
             const void* prepared, float* h, float* y) {
  const Vector x(prepared, rows.gate.n);
  Wanted wanted;
  for (int64_t i = 0; i < x.count * kGroup; ++i) y[i] = 0.0f;
  for (int64_t first = 0; first < all.count; first += kBatch, h += kBatch) {
    const int32_t* ids = all.data + first;
    const int64_t some = min(kBatch, all.count - first);
    const int64_t next = min(kBatch, all.count + all.next - first - some);
    wanted.clear();
    for (int64_t i = 0; i < some; ++i) want(wanted, rows.down, ids[i]);
    for (int64_t i = some; i < some + next; ++i) {
      want(wanted, rows.gate, ids[i]);
      want(wanted, rows.up, ids[i]);
    }
    wanted.spread(some);
    Gated gated;
    for (int64_t i = 0; i < some; ++i) {
      wanted.ask();
      const Int8Row pair[2] = {{rows.gate, ids[i]}, {rows.up, ids[i]}};
      Floats highs[2], lows[2];
      multiply<true, true>(pair, x, highs, lows);
      gated.gates.lanes[i] = exact_lanes(highs[0], lows[0]);
      gated.ups.lanes[i] = exact_lanes(highs[1], lows[1]);
    }
    gated.finish(activation, some);
    Down<Int8Row> downs[kBatch];
    for (int64_t i = 0; i < some; ++i) {
      h[i] = gated.h[i];
      downs[i] = {Int8Row(rows.down, ids[i]), h[i], true};
    }
    add_rows(downs, some, x.count, y);
  }
}

/// Some neurons between the look at their high planes and the rest of the work.
struct Sketch {
  const int32_t* ids;
  int64_t count = 0;
  Floats highs[kBatch][2];  // the high planes' shares in gate and up
  float estimates[kBatch];  // of |h| ||down||
  float coarse_h[kBatch];

  /// Meanwhile memory brings what is wanted.
  void make(const NeuronRows& rows, Activation activation, const Selection& selection,
            const Vector& x, Wanted& wanted) {
    Gated gated;
    wanted.spread(count);
    for (int64_t i = 0; i < count; ++i) {
      wanted.ask();
      const Int8Row pair[2] = {{rows.gate, ids[i]}, {rows.up, ids[i]}};
      Floats unused[2];
      multiply<true, false>(pair, x, highs[i], unused);
      gated.gates.lanes[i] = coarse_lanes(highs[i][0]);
      gated.ups.lanes[i] = coarse_lanes(highs[i][1]);
    }
    gated.finish(activation, count);
    for (int64_t i = 0; i < count; ++i) {
      coarse_h[i] = gated.h[i];
      estimates[i] = __builtin_fabsf(gated.h[i]) * selection.lengths[ids[i]];
    }
  }

  // A NaN is no reason to leave a neuron out: it is to be seen.
  bool is_used(int64_t i, const Selection& s) const { return !(estimates[i] < s.coarse); }
  bool is_exact(int64_t i, const Selection& s) const { return !(estimates[i] < s.exact); }

  void ask_for(const NeuronRows& rows, const Selection& selection, Wanted& wanted) const {
    for (int64_t i = 0; i < count; ++i) {
      if (is_exact(i, selection)) {
        want_low(wanted, rows.gate, ids[i]);
        want_low(wanted, rows.up, ids[i]);
        want(wanted, rows.down, ids[i]);
      } else if (is_used(i, selection)) {
        want_high(wanted, rows.down, ids[i]);
      }
    }
  }

  SelectedCounts finish(const NeuronRows& rows, Activation activation, const Selection& selection,
                        const Vector& x, float* h, float* y) const {
    SelectedCounts counts;
    int64_t exact[kBatch];
    Gated gated;
    for (int64_t i = 0; i < count; ++i) {
      h[i] = is_used(i, selection) ? coarse_h[i] : 0.0f;
      if (!is_exact(i, selection)) continue;
      const Int8Row pair[2] = {{rows.gate, ids[i]}, {rows.up, ids[i]}};
      Floats unused[2], lows[2];
      multiply<false, true>(pair, x, unused, lows);
      gated.gates.lanes[counts.exact] = exact_lanes(highs[i][0], lows[0]);
      gated.ups.lanes[counts.exact] = exact_lanes(highs[i][1], lows[1]);
      exact[counts.exact++] = i;
    }
    gated.finish(activation, counts.exact);
    for (int64_t i = 0; i < counts.exact; ++i) h[exact[i]] = gated.h[i];
    Down<Int8Row> downs[kBatch];
    int64_t used = 0;
    for (int64_t i = 0; i < count; ++i)
      if (is_used(i, selection))
        downs[used++] = {Int8Row(rows.down, ids[i]), h[i], is_exact(i, selection)};
    counts.coarse = used - counts.exact;
    add_rows(downs, used, x.count, y);
    return counts;
  }
};

/// By batches: while memory brings what one sketch has shown to be needed, the next one is made.
SelectedCounts selected_by_sketch(const NeuronRows& rows, Activation activation,
                                  const Selection& selection, const NeuronIds& ids, const Vector& x,
                                  float* h, float* y) {
  SelectedCounts counts;
  Wanted wanted;
  Sketch sketches[2];
  const auto want_sketch =
      [&](int64_t first) {  // of the batch there, or of a next call's first one
        const int64_t end = min(first + kBatch, ids.count + ids.next);
        for (int64_t i = first; i < end; ++i) {
          want_high(wanted, rows.gate, ids[i]);
          want_high(wanted, rows.up, ids[i]);
        }
      };
  want_sketch(kBatch);
  for (int64_t first = 0, turn = 0; first < ids.count + kBatch; first += kBatch, ++turn) {
    Sketch& sketch = sketches[turn % 2];
    if (first < ids.count) {
      sketch.ids = ids.data + first;
      sketch.count = min(kBatch, ids.count - first);
      sketch.make(rows, activation, selection, x, wanted);
      wanted.clear();
      sketch.ask_for(rows, selection, wanted);
      want_sketch(first + 2 * kBatch);
    } else {
      wanted.spread(1);
      wanted.ask();
    }
    if (first == 0) continue;
    const SelectedCounts some =
        sketches[(turn + 1) % 2].finish(rows, activation, selection, x, h + first - kBatch, y);
    counts.exact += some.exact;
    counts.coarse += some.coarse;
  }
  return counts;
}

/// CATS: exact gates of all neurons, then ups and downs of those whose gate is open.
SelectedCounts selected_by_gate(const NeuronRows& rows, Activation activation,
                                const Selection& selection, const NeuronIds& all, const Vector& x,
                                float* h, float* y) {
  SelectedCounts counts;
  for (int64_t first = 0; first < all.count; first += kBatch, h += kBatch) {
    const int32_t* ids = all.data + first;
    const int64_t some = min(kBatch, all.count - first);
    Products products;
    float gates[kBatch], ups[kBatch];
    for (int64_t i = 0; i < some; ++i)
      products.lanes[i] = exact_lanes(Int8Row(rows.gate, ids[i]), x);
    products.store_to(gates, some);
    activate(activation, gates, some);
    Down<Int8Row> downs[kBatch];
    int64_t which[kBatch], open = 0;
    for (int64_t i = 0; i < some; ++i) {
      h[i] = 0.0f;
      if (__builtin_fabsf(gates[i]) < selection.exact) continue;
      products.lanes[open] = exact_lanes(Int8Row(rows.up, ids[i]), x);
      which[open++] = i;
    }
    products.store_to(ups, open);
    for (int64_t i = 0; i < open; ++i) {
      h[which[i]] = gates[which[i]] * ups[i];
      downs[i] = {Int8Row(rows.down, ids[which[i]]), h[which[i]], true};
    }
    add_rows(downs, open, x.count, y);
    counts.exact += open;
  }
  return counts;
}

SelectedCounts selected(const NeuronRows& rows, Activation activation, const Selection& selection,
                        const NeuronIds& ids, const void* prepared, float* h, float* y) {
  const Vector x(prepared, rows.gate.n);
  for (int64_t i = 0; i < x.count * kGroup; ++i) y[i] = 0.0f;
  const auto select = selection.by_gate ? selected_by_gate : selected_by_sketch;
  return select(rows, activation, selection, ids, x, h, y);
}

void load(const Rows& w, float* out, int64_t stride) {
  const Int8Row row(w, 0);
  for (int64_t i = 0; i < w.n; i += 16) {
    float values[16];
    row.load(i, values);
    for (int64_t j = 0; j < min(16, w.n - i); ++j) out[(i + j) * stride] = values[j];
  }
}

}  // namespace

namespace TDA_ISA {
const RowKernels int8_rows = {prepared_bytes, prepare, load, dot, neurons, selected};
}  // namespace TDA_ISA

}  // namespace tda
