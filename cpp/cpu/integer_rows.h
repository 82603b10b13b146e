// Decode for rows of integers, int8 and int4: products with an x that is rounded to integers, too.
//
// Where weights have a scale in common, so has x. int4:  x = scale q,  q of 8 bits. int8 has finer
// weights:  x = scale (256 q + rest),  both of 8 bits. A product then is
//
//   w x = scales ((16 high) (256 q) + (16 high) rest + low (256 q))
//
// of which the first part is the sketch. The last one, low times rest, would be less than what the
// weights themselves have lost to rounding, and is left out. Codes are 8 too large in each plane,
// since instructions want them unsigned; -8 sum(x) is where the sums start.
#pragma once

#include "cpu/down_rows.h"

namespace tda {
namespace {

/// A prepared x: bytes in the order of nibbles, and what each chunk's lanes have in common.
template <class Row>
struct Vector {
  struct Lanes {
    float scale[kChunkLanes];
    int32_t q_start[kChunkLanes];     // -8 sum(q)
    int32_t rest_start[kChunkLanes];  // int8 only: -8 sum(rest + 16 q)
  };
  Lanes* lanes;       // [chunks]
  std::int8_t* q;     // [groups][64]
  std::int8_t* rest;  // [groups][64], int8 only
  int64_t groups;

  Vector(const void* prepared, int64_t n)
      : lanes(static_cast<Lanes*>(const_cast<void*>(prepared))),
        q(reinterpret_cast<std::int8_t*>(lanes + chunks_of<Row>(groups_of(n)))),
        rest(q + groups_of(n) * kGroup),
        groups(groups_of(n)) {}
};

template <class Row>
int64_t prepared_bytes(int64_t n) {
  return chunks_of<Row>(groups_of(n)) * sizeof(typename Vector<Row>::Lanes) +
         groups_of(n) * kGroup * (Row::kPlanes ? 2 : 1);
}

/// kLanes integers as bytes.
inline void store_bytes(std::int8_t* p, Ints v) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)v));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<std::int8_t>(v[i]);
#endif
}
inline float largest_lane(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float largest = v[0];
  for (int i = 1; i < kLanes; ++i) largest = v[i] > largest ? v[i] : largest;
  return largest;
#endif
}

template <class Row>
void prepare(const float* x, int64_t n, void* prepared) {
  constexpr int64_t kPart = kGroup / Row::kScales;  // values with a scale in common
  constexpr int kFloats = kPart / kLanes;
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23 leaves the nearest integer in the low bits
  const Vector<Row> out(prepared, n);
  for_chunks<Row>(out.groups, [&](auto vectors, int64_t first, int64_t number) {
    constexpr int64_t kPartLanes = Row::kVectors / vectors;
    auto& lanes = out.lanes[number];
    for (int64_t part = 0; part < kChunkLanes / kPartLanes; ++part) {
      const int64_t start = first * kGroup + part * kPart;
      Floats values[kFloats], largest = {};
      for (int i = 0; i < kFloats; ++i) {
        const int64_t left = n - start - i * kLanes;
        values[i] = left > 0 ? load_part<F32>(x + start + i * kLanes, left) : Floats{};
        largest = max(values[i] < 0.0f ? -values[i] : values[i], largest);
      }
      const float most = largest_lane(largest), inverse = most > 0.0f ? 127.0f / most : 0.0f;
      std::int8_t q[kPart], rest[kPart];
      for (int i = 0; i < kFloats; ++i) {
        const Floats shifted = values[i] * inverse + kShift;
        store_bytes(q + i * kLanes, (Ints)shifted);
        if (!Row::kPlanes) continue;
        const Floats left = values[i] * inverse - (shifted - kShift);
        store_bytes(rest + i * kLanes, (Ints)(min(256.0f * left, Floats{} + 127.0f) + kShift));
      }
      for (int64_t lane = 0; lane < kPartLanes; ++lane) {
        const int64_t at = part * kPartLanes + lane;
        int32_t sum = 0, rest_sum = 0;
        for (int64_t v = 0; v < vectors; ++v) {
          const int64_t from = 4 * (lane * vectors + v), to = (first + v) * kGroup + 4 * at;
          __builtin_memcpy(out.q + to, q + from, 4);
          if (Row::kPlanes) __builtin_memcpy(out.rest + to, rest + from, 4);
        }
        for (int64_t i = 4 * lane * vectors; i < 4 * (lane + 1) * vectors; ++i) {
          sum += q[i];
          if (Row::kPlanes) rest_sum += rest[i];
        }
        lanes.scale[at] = most / 127.0f / (Row::kPlanes ? 256.0f : 1.0f);
        lanes.q_start[at] = -8 * sum;
        lanes.rest_start[at] = -8 * (rest_sum + 16 * sum);
      }
    }
  });
}

/// A lane's sum of codes times x.
struct Sum {
#if defined(__AVX512VNNI__)
  __m512i sum = _mm512_setzero_si512();
  void add(Bytes codes, Bytes x) { sum = _mm512_dpbusd_epi32(sum, (__m512i)codes, (__m512i)x); }
  Ints value() const { return (Ints)sum; }
#elif defined(__AVX2__)
  // 16 bits are enough: 8 vectors of 2 products, each 15 * 127 at most.
  __m256i pairs = _mm256_setzero_si256();
  void add(Bytes codes, Bytes x) {
    pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16((__m256i)codes, (__m256i)x));
  }
  Ints value() const { return (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }
#else
  Ints sum = {};
  void add(Bytes codes, Bytes x) {
    std::int8_t bytes[kVectorBytes];
    __builtin_memcpy(bytes, &x, sizeof x);
    for (int i = 0; i < kVectorBytes; ++i) sum[i / 4] += codes[i] * bytes[i];
  }
  Ints value() const { return sum; }
#endif
};

/// Compilers like to repeat loads.
inline Bytes load_once(const std::int8_t* p) {
  Bytes v = load_as<Bytes>(p);
#if defined(__AVX2__)
  asm("" : "+v"(v));
#endif
  return v;
}

/// What is added up of a product: its sketch (all there is of formats with one plane), the rest, or
/// both, as one sum or apart.
enum class Parts { sketch, rest, sum, apart };

/// What integer sums count, in scales.
template <class Row>
constexpr float kSketchSize = Row::kPlanes ? 4096.0f : 1.0f;
constexpr float kRestSize = 16.0f;

/// Sums of some rows, still one per lane.
template <int kCount>
struct RowSums {
  Floats sketch[kCount] = {};  // or the sum of both parts
  Floats rest[kCount] = {};
};

/// Adds what a chunk contributes to the rows' products with x. The rows share what is loaded of x.
template <Parts kOf, int kVectors, class Row, int kCount>
inline void add_chunk(const Row (&rows)[kCount], const Vector<Row>& x, int64_t first,
                      int64_t number, RowSums<kCount>& sums) {
  constexpr bool kSketch = kOf != Parts::rest, kRest = kOf != Parts::sketch;
  constexpr int kCodes = line_vectors(kVectors);
  const auto& lanes = x.lanes[number];
  for (int part = 0; part < kParts; ++part) {
    Sum high[kCount], fine[kCount], low[kCount];
    for (int m = 0; m < lines_of(kVectors); ++m) {
      Bytes q[kCodes], rest[kCodes];
      for (int v = 0; v < kCodes; ++v) {
        const int64_t at = (first + m + v * lines_of(kVectors)) * kGroup + part * kVectorBytes;
        q[v] = load_once(x.q + at);
        if (kRest) rest[v] = load_once(x.rest + at);
      }
      const int64_t line = first * kGroupBytes + m * 64;
#pragma GCC unroll 4
      for (int r = 0; r < kCount; ++r) {
        Bytes codes[kCodes];
        load_line<kVectors>(rows[r].high + line, part, codes);
        for (int v = 0; v < kCodes; ++v) {
          if (kSketch) high[r].add(codes[v], q[v]);
          if (kRest) fine[r].add(codes[v], rest[v]);
        }
        if constexpr (kRest) {
          load_line<kVectors>(rows[r].low + line, part, codes);
          for (int v = 0; v < kCodes; ++v) low[r].add(codes[v], q[v]);
        }
      }
    }
    const Floats scale = load_as<Floats>(lanes.scale + part * kLanes);
    const Ints q_start = load_as<Ints>(lanes.q_start + part * kLanes);
    const Ints rest_start = load_as<Ints>(lanes.rest_start + part * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kCount; ++r) {
      const Floats scales = scale * chunk_scales<Row, kVectors>(rows[r], first, part);
      Ints sketch = {}, rest = {};
      if constexpr (kSketch) sketch = high[r].value() + q_start;
      if constexpr (kRest) rest = fine[r].value() + (low[r].value() << 4) + rest_start;
      if constexpr (kOf == Parts::sum) sums.sketch[r] += scales * to_floats((sketch << 8) + rest);
      if constexpr (kOf == Parts::sketch || kOf == Parts::apart)
        sums.sketch[r] += scales * to_floats(sketch);
      if constexpr (kOf == Parts::rest || kOf == Parts::apart)
        sums.rest[r] += scales * to_floats(rest);
    }
  }
}

template <Parts kOf, class Row, int kCount>
inline RowSums<kCount> multiply(const Row (&rows)[kCount], const Vector<Row>& x) {
  RowSums<kCount> sums;
  for_chunks<Row>(x.groups, [&](auto vectors, int64_t first, int64_t number) {
    add_chunk<kOf, vectors>(rows, x, first, number, sums);
  });
  return sums;
}

template <class Row>
void dot(const Rows& w, int64_t rows, const void* prepared, float* y, bool add) {
  constexpr Parts kOf = Row::kPlanes ? Parts::sum : Parts::sketch;
  constexpr float kSize = Row::kPlanes ? kRestSize : 1.0f;
  const Vector<Row> x(prepared, w.n);
  for (int64_t first = 0; first < rows; first += kBatch, y += kBatch) {
    const int64_t count = min(kBatch, rows - first);
    // The last one takes the places of those beyond it.
    const auto row = [&](int64_t i) { return Row(w, first + min(i, count - 1)); };
    Products products;
    for (int64_t r = 0; r < count; r += 4) {
      const Row four[4] = {row(r), row(r + 1), row(r + 2), row(r + 3)};
      const auto sums = multiply<kOf>(four, x);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) products.lanes[r + i] = sums.sketch[i];
    }
    float results[kBatch];
    products.store_to(results, count);
    for (int64_t r = 0; r < count; ++r)
      y[r] = results[r] * (kSize * step_of(row(r))) + (add ? y[r] : 0.0f);
  }
}

// ---- neurons --------------------------------------------------------------------------------

/// Products with x of a batch of gates and ups.
struct Gated {
  float gates[kBatch], ups[kBatch];

  /// out[i] = act(gate) * up
  void activate_to(Activation activation, int64_t count, float* out) const {
    for (int64_t i = 0; i < count; i += kLanes)
      store(out + i, activate(activation, load_as<Floats>(gates + i)) * load_as<Floats>(ups + i));
  }
};

/// Products of some neurons' rows with x: out = their sketches, += the rest, or = the sum of both,
/// added up in the same order as if one after the other. Between neurons memory is asked for what
/// is wanted. Not inlined: GCC would keep constants of other loops in registers that this one
/// needs.
template <Parts kOf, class Row>
[[gnu::noinline]] void multiply_neurons(const NeuronRows& rows, const int32_t* ids, int64_t count,
                                        const Vector<Row>& x, Gated& out, Wanted& wanted) {
  constexpr bool kSketch = kOf != Parts::rest, kRest = kOf != Parts::sketch;
  static_assert(kOf != Parts::sum);
  Products gates, ups, rest_gates, rest_ups;
  for (int64_t i = 0; i < count; i += 2) {
    wanted.ask(2 * x.groups * (kSketch * kSketchUnits + kRest * kRestUnits));
    const int32_t a = ids[i], b = ids[min(i + 1, count - 1)];  // the last of an odd number twice
    const Row pair[4] = {{rows.gate, a}, {rows.gate, b}, {rows.up, a}, {rows.up, b}};
    const auto sums = multiply<kOf>(pair, x);
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      if (kSketch) gates.lanes[i + j] = sums.sketch[j], ups.lanes[i + j] = sums.sketch[2 + j];
      if (kRest) rest_gates.lanes[i + j] = sums.rest[j], rest_ups.lanes[i + j] = sums.rest[2 + j];
    }
  }
  const auto finish = [&](const Rows& w, Products& sketch, Products& rest, float* result) {
    float sketches[kBatch], rests[kBatch];
    if (kSketch) sketch.store_to(sketches, count);
    if (kRest) rest.store_to(rests, count);
    for (int64_t i = 0; i < count; ++i) {
      const float step = step_of(Row(w, ids[i]));
      if (kSketch) result[i] = sketches[i] * (kSketchSize<Row> * step);
      if (kRest) result[i] = __builtin_fmaf(rests[i], kRestSize * step, result[i]);
    }
  };
  finish(rows.gate, gates, rest_gates, out.gates);
  finish(rows.up, ups, rest_ups, out.ups);
}

/// All parts of a neuron's products that its format has, apart as the selection adds them up.
template <class Row>
constexpr Parts kAllParts = Row::kPlanes ? Parts::apart : Parts::sketch;

/// y += h[i] down[i] with all bits.
template <class Row>
void add_exact(const Down<Row>* downs, int64_t count, int64_t groups, float* y, Wanted& wanted) {
  add_rows<Plane::high>(downs, count, groups, y, wanted);
  if constexpr (Row::kPlanes) add_rows<Plane::low>(downs, count, groups, y, wanted);
}

/// Time of a batch's exact products, and of its down rows.
template <class Row>
int64_t product_units(int64_t count, int64_t groups) {
  return count * groups * (kSketchUnits + (Row::kPlanes ? kRestUnits : 0));
}
template <class Row>
int64_t down_units(int64_t groups) {
  return (groups + 1) / 2 * kLineUnits * (Row::kPlanes ? 2 : 1);
}

/// y in the kernels' order, in the scratch that lies behind its own.
template <class Row>
float* begin_sums(float* y, const Vector<Row>& x) {
  float* const sums = y + x.groups * kGroup;
  for (int64_t i = 0; i < x.groups * kGroup; ++i) sums[i] = 0.0f;
  return sums;
}

/// Gates and ups of the call's neurons by batches, each handed to do_batch(first, gated, count,
/// wanted); meanwhile memory brings the next batch.
template <class Row, class Do>
inline void for_batches(const NeuronRows& rows, const NeuronIds& all, const Vector<Row>& x,
                        const Do& do_batch) {
  Wanted wanted;
  for (int64_t first = 0; first < all.count; first += kBatch) {
    const int32_t* const ids = all.data + first;
    const int64_t count = min(kBatch, all.count - first);
    const int64_t next = min(kBatch, all.count + all.next - first - count);
    wanted.clear();
    for (int64_t i = count; i < count + next; ++i)
      for (const Rows* w : {&rows.gate, &rows.up, &rows.down}) want(wanted, Row(*w, ids[i]));
    wanted.spread(product_units<Row>(count, x.groups) + down_units<Row>(x.groups));
    Gated gated;
    multiply_neurons<kAllParts<Row>>(rows, ids, count, x, gated, wanted);
    do_batch(first, gated, count, wanted);
  }
}

template <class Row>
void neurons(const NeuronRows& rows, Activation activation, const NeuronIds& all,
             const void* prepared, float* h, float* y) {
  const Vector<Row> x(prepared, rows.gate.n);
  float* const sums = begin_sums(y, x);
  for_batches(rows, all, x, [&](int64_t first, const Gated& gated, int64_t count, Wanted& wanted) {
    float batch_h[kBatch];
    gated.activate_to(activation, count, batch_h);
    Down<Row> downs[kBatch];
    for (int64_t i = 0; i < count; ++i) {
      h[first + i] = batch_h[i];
      downs[i] = {Row(rows.down, all[first + i]), batch_h[i]};
    }
    add_exact(downs, count, x.groups, sums, wanted);
  });
  reorder<Row>(sums, x.groups, y);
}

/// CATS: gates of all neurons, then ups and downs of those whose gate is open.
template <class Row>
SelectedCounts selected_by_gate(const NeuronRows& rows, Activation activation,
                                const Selection& selection, const NeuronIds& all,
                                const Vector<Row>& x, float* h, float* sums) {
  // As the dense path adds up parts, so that thresholds of 0 give its bits.
  const auto products = [&](const Rows& w, const int32_t* ids, int64_t count, float* out) {
    Products sketches, rests;
    float rest[kBatch];
    for (int64_t i = 0; i < count; ++i) {
      const Row row[1] = {{w, ids[i]}};
      const auto sums = multiply<kAllParts<Row>>(row, x);
      sketches.lanes[i] = sums.sketch[0];
      rests.lanes[i] = sums.rest[0];
    }
    sketches.store_to(out, count);
    if (Row::kPlanes) rests.store_to(rest, count);
    for (int64_t i = 0; i < count; ++i) {
      const float step = step_of(Row(w, ids[i]));
      out[i] *= kSketchSize<Row> * step;
      if (Row::kPlanes) out[i] = __builtin_fmaf(rest[i], kRestSize * step, out[i]);
    }
  };
  SelectedCounts counts;
  Wanted nothing;
  for (int64_t first = 0; first < all.count; first += kBatch, h += kBatch) {
    const int32_t* ids = all.data + first;
    const int64_t some = min(kBatch, all.count - first);
    float gates[kBatch] = {}, ups[kBatch];
    products(rows.gate, ids, some, gates);
    activate(activation, gates, some);
    Down<Row> downs[kBatch];
    int64_t which[kBatch], open = 0;
    int32_t open_ids[kBatch];
    for (int64_t i = 0; i < some; ++i) {
      h[i] = 0.0f;
      if (__builtin_fabsf(gates[i]) < selection.exact) continue;
      open_ids[open] = ids[i];
      which[open++] = i;
    }
    products(rows.up, open_ids, open, ups);
    for (int64_t i = 0; i < open; ++i) {
      h[which[i]] = gates[which[i]] * ups[i];
      downs[i] = {Row(rows.down, open_ids[i]), h[which[i]]};
    }
    add_exact(downs, open, x.groups, sums, nothing);
    counts.exact += open;
  }
  return counts;
}

template <class Row>
void load(const Rows& w, float* out, int64_t stride) {
  const Row row(w, 0);
  for (int64_t i = 0; i < w.n; i += 16) {
    float values[16];
    row.load(i, values);
    for (int64_t j = 0; j < min(16, w.n - i); ++j) out[(i + j) * stride] = values[j];
  }
}

}  // namespace
}  // namespace tda
