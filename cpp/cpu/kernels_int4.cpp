// Kernels of decode for int4 rows: integer products with an x that is rounded to int8 by groups of
// 16, too.
//
// A group's product with x is   step scale sx (sum(code q) - 8 sum(q)),   x = sx q in the group:
// four neighbours are a lane's share of it, and four lanes have a scale in common.
#include "cpu/batch.h"
#include "cpu/int4.h"
#include "cpu/kernels_isa.h"

namespace tda {
namespace {

constexpr int kScales = Int4Row::kScales, kFours = kGroup / 4;

struct Group {  // of a prepared x
  std::int8_t q[kGroup];
  int32_t start[kFours];  // -8 sum of four q
};

/// A prepared x: groups, and kScales scales for each, filled up with zeros to whole vectors.
struct Vector {
  Group* groups;
  float* scales;
  int64_t count;

  Vector(const void* prepared, int64_t n)
      : groups(static_cast<Group*>(const_cast<void*>(prepared))),
        scales(reinterpret_cast<float*>(groups + groups_of(n))),
        count(groups_of(n)) {}
  static int64_t scale_count(int64_t n) {
    return (groups_of(n) * kScales + kLanes - 1) / kLanes * kLanes;
  }
};

int64_t prepared_bytes(int64_t n) {
  return groups_of(n) * sizeof(Group) + Vector::scale_count(n) * sizeof(float);
}

void prepare(const float* x, int64_t n, void* prepared) {
  const Vector out(prepared, n);
  for (int64_t g = 0; g < Vector::scale_count(n); ++g) {
    const int64_t first = g * 16, left = n - first;
    float values[16] = {}, most = 0.0f;
    for (int64_t i = 0; i < min(16, left); ++i) {
      values[i] = x[first + i];
      const float size = __builtin_fabsf(values[i]);
      most = size > most ? size : most;
    }
    out.scales[g] = most / 127.0f;
    if (first >= out.count * kGroup) continue;
    const float inverse = most > 0.0f ? 127.0f / most : 0.0f;
    Group& group = out.groups[first / kGroup];
    std::int8_t* const q = group.q + first % kGroup;
    for (int i = 0; i < 16; ++i) {
      // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
      const float shifted = values[i] * inverse + 12582912.0f;
      int32_t bits;
      __builtin_memcpy(&bits, &shifted, 4);
      q[i] = static_cast<std::int8_t>(bits);
    }
    for (int i = 0; i < 16; i += 4)
      group.start[(first % kGroup + i) / 4] = -8 * (q[i] + q[i + 1] + q[i + 2] + q[i + 3]);
  }
}

/// A part of a group: kVectorBytes values. Lane i of the result belongs to the fours' i-th.
#if defined(__AVX512VNNI__)
inline void products(const Int4Row& row, int64_t g, const Group& x, Ints out[kParts]) {
  out[0] =
      (Ints)_mm512_dpbusd_epi32(_mm512_loadu_si512(x.start), row.codes(g), _mm512_loadu_si512(x.q));
}
#else
inline void products(const Int4Row& row, int64_t g, const Group& x, Ints out[kParts]) {
  Bytes codes[kParts];
  expand(row.nibbles + g * kGroupBytes, codes);
  for (int part = 0; part < kParts; ++part) {
    out[part] = load_as<Ints>(x.start + part * kLanes);
#if defined(__AVX2__)
    const __m256i q = _mm256_loadu_si256((const __m256i*)x.q + part);
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)codes[part], q);
    out[part] += (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    for (int i = 0; i < kVectorBytes; ++i)
      out[part][i / 4] += codes[part][i] * x.q[part * kVectorBytes + i];
#endif
  }
}
#endif

/// kLanes / 4 numbers, each for four lanes.
inline Floats four_times(const float* p) {
#if defined(__AVX512F__)
  const __m512i index = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  return (Floats)_mm512_permutexvar_ps(index, _mm512_broadcast_f32x4(_mm_loadu_ps(p)));
#else
  Floats out;
  for (int lane = 0; lane < kLanes; ++lane) out[lane] = p[lane / 4];
  return out;
#endif
}

/// The products of kCount rows with x, still one sum per lane; they share what is loaded of x.
template <int kCount>
inline void multiply(const Int4Row (&rows)[kCount], const Vector& x, Floats (&lanes)[kCount]) {
  constexpr int64_t kGroups = kLanes / kScales;
  Floats sums[kCount] = {};
  for (int64_t g0 = 0; g0 < x.count; g0 += kGroups) {
    float factors[kCount][kLanes];
    for (int r = 0; r < kCount; ++r)
      store(factors[r],
            rows[r].scales_from(g0 * kScales) * load_as<Floats>(x.scales + g0 * kScales));
    for (int64_t g = g0; g < min(g0 + kGroups, x.count); ++g)
#pragma GCC unroll 4
      for (int r = 0; r < kCount; ++r) {
        Ints integers[kParts];
        products(rows[r], g, x.groups[g], integers);
        const float* const factor = factors[r] + (g - g0) * kScales;
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part)
          sums[r] += four_times(factor + part * kLanes / 4) * to_floats(integers[part]);
      }
  }
  for (int r = 0; r < kCount; ++r) lanes[r] = sums[r];
}

void dot(const Rows& w, int64_t rows, const void* prepared, float* y, bool add) {
  const Vector x(prepared, w.n);
  for (int64_t first = 0; first < rows; first += kBatch, y += kBatch) {
    const int64_t count = min(kBatch, rows - first);
    Products products;
    for (int64_t r = 0; r < count; ++r) {
      const Int4Row row[1] = {{w, first + r}};
      Floats lanes[1];
      multiply(row, x, lanes);
      products.lanes[r] = lanes[0];
    }
    float results[kBatch];
    products.store_to(results, count);
    for (int64_t r = 0; r < count; ++r) y[r] = results[r] + (add ? y[r] : 0.0f);
  }
}

/// All of a neuron that a call will need.
inline void want(Wanted& wanted, const NeuronRows& rows, int32_t id) {
  for (const Rows* w : {&rows.gate, &rows.up, &rows.down})
    wanted.add(Int4Row(*w, id).nibbles, int4_row_bytes(w->n));
}

/// Gates and ups of the call's neurons by batches, each handed to do_batch(ids, h, count), where h
/// are their activations; meanwhile memory brings the next batch.
template <class Do>
inline void for_batches(const NeuronRows& rows, Activation activation, const NeuronIds& all,
                        const Vector& x, const Do& do_batch) {
  Wanted wanted;
  for (int64_t first = 0; first < all.count; first += kBatch) {
    const int32_t* ids = all.data + first;
    const int64_t count = min(kBatch, all.count - first);
    const int64_t next = min(kBatch, all.count + all.next - first - count);
    wanted.clear();
    for (int64_t i = count; i < count + next; ++i) want(wanted, rows, ids[i]);
    wanted.spread(count);
    Gated gated;
    for (int64_t i = 0; i < count; ++i) {
      wanted.ask();
      const Int4Row pair[2] = {{rows.gate, ids[i]}, {rows.up, ids[i]}};
      Floats lanes[2];
      multiply(pair, x, lanes);
      gated.gates.lanes[i] = lanes[0];
      gated.ups.lanes[i] = lanes[1];
    }
    gated.finish(activation, count);
    do_batch(first, ids, gated, count);
  }
}

void clear(float* y, int64_t n) {
  for (int64_t i = 0; i < groups_of(n) * kGroup; ++i) y[i] = 0.0f;
}

void neurons(const NeuronRows& rows, Activation activation, const NeuronIds& all,
             const void* prepared, float* h, float* y) {
  clear(y, rows.gate.n);
  const auto add = [&](int64_t first, const int32_t* ids, const Gated& gated, int64_t count) {
    Down<Int4Row> downs[kBatch];
    for (int64_t i = 0; i < count; ++i) {
      h[first + i] = gated.h[i];
      downs[i] = {Int4Row(rows.down, ids[i]), gated.h[i], true};
    }
    add_rows(downs, count, groups_of(rows.gate.n), y);
  };
  for_batches(rows, activation, all, Vector(prepared, rows.gate.n), add);
}

/// Gates and ups are exact for all; down rows are read of the selected ones alone.
SelectedCounts selected_by_contribution(const NeuronRows& rows, Activation activation,
                                        const Selection& selection, const NeuronIds& all,
                                        const Vector& x, float* h, float* y) {
  SelectedCounts counts;
  const auto add = [&](int64_t first, const int32_t* ids, const Gated& gated, int64_t count) {
    Down<Int4Row> downs[kBatch];
    int64_t used = 0;
    for (int64_t i = 0; i < count; ++i) {
      const float estimate = __builtin_fabsf(gated.h[i]) * selection.lengths[ids[i]];
      const bool use = !(estimate < selection.exact);  // a NaN is kept, and seen
      h[first + i] = use ? gated.h[i] : 0.0f;
      if (use) downs[used++] = {Int4Row(rows.down, ids[i]), gated.h[i], true};
    }
    add_rows(downs, used, groups_of(rows.gate.n), y);
    counts.exact += used;
  };
  for_batches(rows, activation, all, x, add);
  return counts;
}

/// CATS: gates of all neurons, then ups and downs of those whose gate is open.
SelectedCounts selected_by_gate(const NeuronRows& rows, Activation activation,
                                const Selection& selection, const NeuronIds& all, const Vector& x,
                                float* h, float* y) {
  const auto product = [&](const Rows& w, int32_t id) {
    const Int4Row row[1] = {Int4Row(w, id)};
    Floats lanes[1];
    multiply(row, x, lanes);
    return lanes[0];
  };
  SelectedCounts counts;
  for (int64_t first = 0; first < all.count; first += kBatch, h += kBatch) {
    const int32_t* ids = all.data + first;
    const int64_t some = min(kBatch, all.count - first);
    Products products;
    float gates[kBatch], ups[kBatch];
    for (int64_t i = 0; i < some; ++i) products.lanes[i] = product(rows.gate, ids[i]);
    products.store_to(gates, some);
    activate(activation, gates, some);
    Down<Int4Row> downs[kBatch];
    int64_t which[kBatch], open = 0;
    for (int64_t i = 0; i < some; ++i) {
      h[i] = 0.0f;
      if (__builtin_fabsf(gates[i]) < selection.exact) continue;
      products.lanes[open] = product(rows.up, ids[i]);
      which[open++] = i;
    }
    products.store_to(ups, open);
    for (int64_t i = 0; i < open; ++i) {
      h[which[i]] = gates[which[i]] * ups[i];
      downs[i] = {Int4Row(rows.down, ids[which[i]]), h[which[i]], true};
    }
    add_rows(downs, open, x.count, y);
    counts.exact += open;
  }
  return counts;
}

SelectedCounts selected(const NeuronRows& rows, Activation activation, const Selection& selection,
                        const NeuronIds& ids, const void* prepared, float* h, float* y) {
  clear(y, rows.gate.n);
  const auto select = selection.by_gate ? selected_by_gate : selected_by_contribution;
  return select(rows, activation, selection, ids, Vector(prepared, rows.gate.n), h, y);
}

void load(const Rows& w, float* out, int64_t stride) {
  const Int4Row row(w, 0);
  for (int64_t i = 0; i < w.n; i += 16) {
    float values[16];
    row.load(i, values);
    for (int64_t j = 0; j < min(16, w.n - i); ++j) out[(i + j) * stride] = values[j];
  }
}

}  // namespace

namespace TDA_ISA {
const RowKernels int4_rows = {prepared_bytes, prepare, load, dot, neurons, selected};
}  // namespace TDA_ISA

}  // namespace tda
