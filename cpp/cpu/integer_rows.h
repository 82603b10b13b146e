// Decode for rows of integers, int8 and int4: products with an x that is rounded to integers, too.
//
// Where weights have a scale of their own, so has x. int4:  x = scale q,  q of 8 bits. int8 has
// finer weights:  x = scale (q + rest / 256),  both of 8 bits. Instructions want codes unsigned, so
// they are Row::kOffset too large; -kOffset sum(x) is where the integer sums start.
#pragma once

#include "cpu/batch.h"

namespace tda {
namespace {

constexpr int kFours = kGroup / 4;  // a lane adds up the products of four neighbours

/// How much too large the upper half of a high plane's nibbles is taken.
#if defined(__AVX512VNNI__)
constexpr int32_t kUpper = 16;
#else
constexpr int32_t kUpper = 1;
#endif

struct Group {  // of a prepared x
  std::int8_t q[kGroup];
  std::int8_t rest[kGroup];      // int8 only
  int32_t start[kFours];         // -kOffset sum of four, int8: of 256 q + rest
  int32_t coarse_start[kFours];  // int8 only: for q times the high plane
};

/// A prepared x: groups, and their scales, filled up with zeros to whole vectors.
template <class Row>
struct Vector {
  Group* groups;
  float* scales;         // int8: of 256 x
  float* coarse_scales;  // int8 only: for products of q and the high plane
  int64_t count;

  Vector(const void* prepared, int64_t n)
      : groups(static_cast<Group*>(const_cast<void*>(prepared))),
        scales(reinterpret_cast<float*>(groups + groups_of(n))),
        coarse_scales(scales + scale_count(n)),
        count(groups_of(n)) {}
  static int64_t scale_count(int64_t n) {
    return (groups_of(n) * Row::kScales + kLanes - 1) / kLanes * kLanes;
  }
};

template <class Row>
int64_t prepared_bytes(int64_t n) {
  return groups_of(n) * sizeof(Group) + 2 * Vector<Row>::scale_count(n) * sizeof(float);
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
  for (int lane = 1; lane < kLanes; ++lane) largest = v[lane] > largest ? v[lane] : largest;
  return largest;
#endif
}

/// Sums of each four of a group's bytes.
inline void sum_fours(const std::int8_t* bytes, int32_t sums[kFours]) {
#if defined(__AVX512VNNI__)
  const __m512i ones = _mm512_set1_epi8(1), all = _mm512_loadu_si512(bytes);
  _mm512_storeu_si512(sums, _mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, all));
#else
  for (int i = 0; i < kFours; ++i)
    sums[i] = bytes[4 * i] + bytes[4 * i + 1] + bytes[4 * i + 2] + bytes[4 * i + 3];
#endif
}

template <class Row>
void prepare(const float* x, int64_t n, void* prepared) {
  constexpr int kPart = kGroup / Row::kScales, kVectors = kPart / kLanes;
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23 leaves the nearest integer in the low bits
  const Vector<Row> out(prepared, n);
  for (int64_t g = 0; g < out.count; ++g) {
    Group& group = out.groups[g];
    for (int64_t part = 0; part < Row::kScales; ++part) {
      const int64_t first = g * kGroup + part * kPart;
      Floats values[kVectors], largest = {};
      for (int i = 0; i < kVectors; ++i) {
        const int64_t left = n - first - i * kLanes;
        values[i] = left > 0 ? load_part<F32>(x + first + i * kLanes, left) : Floats{};
        largest = max(values[i] < 0.0f ? -values[i] : values[i], largest);
      }
      const float most = largest_lane(largest), inverse = most > 0.0f ? 127.0f / most : 0.0f;
      out.scales[g * Row::kScales + part] = most / 127.0f / (Row::kPlanes ? 256.0f : 1.0f);
      for (int i = 0; i < kVectors; ++i) {
        const int64_t at = part * kPart + i * kLanes;
        const Floats shifted = values[i] * inverse + kShift;
        store_bytes(group.q + at, (Ints)shifted);
        if (!Row::kPlanes) continue;
        const Floats left = values[i] * inverse - (shifted - kShift);
        store_bytes(group.rest + at, (Ints)(min(256.0f * left, Floats{} + 127.0f) + kShift));
      }
    }
    int32_t sums[kFours], rest_sums[kFours] = {};
    sum_fours(group.q, sums);
    if (Row::kPlanes) sum_fours(group.rest, rest_sums);
    for (int i = 0; i < kFours; ++i) {
      group.start[i] = -Row::kOffset * (Row::kPlanes ? 256 * sums[i] + rest_sums[i] : sums[i]);
      group.coarse_start[i] = -8 * (i < kFours / 2 ? 1 : kUpper) * sums[i];
    }
  }
  for (int64_t i = 0; i < Vector<Row>::scale_count(n); ++i) {
    if (i >= out.count * Row::kScales) out.scales[i] = 0.0f;
    // 256 q times 16 high; the lanes of every other scale may see their nibbles too large.
    out.coarse_scales[i] = out.scales[i] * (i % 2 == 0 ? 4096.0f : 4096.0f / kUpper);
  }
}

#if defined(__AVX512VNNI__)
/// Compilers like to repeat loads.
inline __m512i load_once(const void* p) {
  __m512i v = _mm512_loadu_si512(p);
  asm("" : "+v"(v));
  return v;
}
#else
/// Lane i: the sum of four codes times q, kTimes over.
template <int kTimes>
inline Ints sums_of_four(Bytes codes, const std::int8_t* q) {
#if defined(__AVX2__)
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)codes, _mm256_loadu_si256((const __m256i*)q));
  return (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(kTimes));
#else
  Ints sums = {};
  for (int i = 0; i < kVectorBytes; ++i) sums[i / 4] += codes[i] * q[i];
  return kTimes * sums;
#endif
}
#endif

/// kLanes scales in a row, handed out group by group: kScales numbers, each for as many lanes.
template <int kScales>
struct Scales {
#if defined(__AVX512F__)
  Floats values;
  Scales() = default;
  explicit Scales(Floats v) : values(v) {}
  /// Which of them the lanes take.
  static Ints first() {
    Ints index;
    for (int lane = 0; lane < kLanes; ++lane) index[lane] = lane * kScales / kLanes;
    return index;
  }
  static Ints next(Ints index) { return index + kScales; }
  Floats at(Ints index, int) const {
    return (Floats)_mm512_permutexvar_ps((__m512i)index, (__m512)values);
  }
#else
  float values[kLanes];
  Scales() = default;
  explicit Scales(Floats v) { store(values, v); }
  static int first() { return 0; }
  static int next(int index) { return index + kScales; }
  Floats at(int index, int part) const {
    Floats out;
    for (int lane = 0; lane < kLanes; ++lane)
      out[lane] = values[index + (part * kLanes + lane) * kScales / kFours];
    return out;
  }
#endif
};

/// The products of kCount rows, or of their high planes, with x, still one sum per lane. They share
/// what is loaded of x: loads are what this loop runs out of.
template <bool kExact, class Row, int kCount>
inline void multiply(const Row (&rows)[kCount], const Vector<Row>& x, Floats (&lanes)[kCount]) {
  constexpr int64_t kGroups = kLanes / Row::kScales;
  Floats sums[kCount] = {};
  for (int64_t g0 = 0; g0 < x.count; g0 += kGroups) {
    const int64_t s = g0 * Row::kScales;
    Scales<Row::kScales> scales[kCount];
    for (int r = 0; r < kCount; ++r) {
      const Floats of_x = load_as<Floats>((kExact ? x.scales : x.coarse_scales) + s);
      scales[r] = Scales<Row::kScales>(rows[r].scales.from(s) * of_x);
    }
    auto index = Scales<Row::kScales>::first();
    const int64_t end = min(g0 + kGroups, x.count);
    for (int64_t g = g0; g < end; ++g) {
      Ints integers[kCount][kParts];
      products<kExact>(rows, g, x.groups[g], integers);
#pragma GCC unroll 4
      for (int r = 0; r < kCount; ++r)
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part)
          sums[r] += scales[r].at(index, part) * to_floats(integers[r][part]);
      index = Scales<Row::kScales>::next(index);
    }
  }
  for (int r = 0; r < kCount; ++r) lanes[r] = rows[r].scales.step * sums[r];
}

template <class Row>
void dot(const Rows& w, int64_t rows, const void* prepared, float* y, bool add) {
  const Vector<Row> x(prepared, w.n);
  for (int64_t first = 0; first < rows; first += kBatch, y += kBatch) {
    const int64_t count = min(kBatch, rows - first);
    Products products;
    for (int64_t r = 0; r < count; r += 2) {
      // The last of an odd number is taken twice.
      const Row pair[2] = {{w, first + r}, {w, first + min(r + 1, count - 1)}};
      Floats lanes[2];
      multiply<true>(pair, x, lanes);
      products.lanes[r] = lanes[0];
      products.lanes[r + 1] = lanes[1];
    }
    float results[kBatch];
    products.store_to(results, count);
    for (int64_t r = 0; r < count; ++r) y[r] = results[r] + (add ? y[r] : 0.0f);
  }
}

/// A batch of gates and ups; between neurons memory is asked for what is wanted. Not inlined: GCC
/// would keep constants of other loops in registers that this one needs.
template <bool kExact, class Row>
[[gnu::noinline]] void multiply_neurons(const NeuronRows& rows, const int32_t* ids, int64_t count,
                                        const Vector<Row>& x, Gated& gated, Wanted& wanted) {
  for (int64_t i = 0; i < count; i += 2) {
    wanted.ask(2 * (kExact ? kNeuronUnits : kSketchUnits));
    const int32_t a = ids[i], b = ids[min(i + 1, count - 1)];  // the last of an odd number twice
    const Row pair[4] = {{rows.gate, a}, {rows.up, a}, {rows.gate, b}, {rows.up, b}};
    Floats lanes[4];
    multiply<kExact>(pair, x, lanes);
    gated.gates.lanes[i] = lanes[0];
    gated.ups.lanes[i] = lanes[1];
    gated.gates.lanes[i + 1] = lanes[2];
    gated.ups.lanes[i + 1] = lanes[3];
  }
}

template <class Row>
void clear(float* y, const Vector<Row>& x) {
  for (int64_t i = 0; i < x.count * kGroup; ++i) y[i] = 0.0f;
}

/// Gates and ups of the call's neurons by batches, each handed to do_batch(first, gated, count,
/// wanted);
/// meanwhile memory brings the next batch.
template <class Row, class Do>
inline void for_batches(const NeuronRows& rows, Activation activation, const NeuronIds& all,
                        const Vector<Row>& x, const Do& do_batch) {
  Wanted wanted;
  for (int64_t first = 0; first < all.count; first += kBatch) {
    const int32_t* const ids = all.data + first;
    const int64_t count = min(kBatch, all.count - first);
    const int64_t next = min(kBatch, all.count + all.next - first - count);
    wanted.clear();
    for (int64_t i = count; i < count + next; ++i)
      for (const Rows* w : {&rows.gate, &rows.up, &rows.down}) want(wanted, Row(*w, ids[i]), w->n);
    wanted.spread(count * kNeuronUnits + x.count * kAddUnits);
    Gated gated;
    multiply_neurons<true>(rows, ids, count, x, gated, wanted);
    gated.finish(activation, count);
    do_batch(first, gated, count, wanted);
  }
}

template <class Row>
void neurons(const NeuronRows& rows, Activation activation, const NeuronIds& all,
             const void* prepared, float* h, float* y) {
  const Vector<Row> x(prepared, rows.gate.n);
  clear(y, x);
  for_batches(rows, activation, all, x,
              [&](int64_t first, const Gated& gated, int64_t count, Wanted& wanted) {
                Down<Row> downs[kBatch];
                for (int64_t i = 0; i < count; ++i) {
                  h[first + i] = gated.h[i];
                  downs[i] = {Row(rows.down, all[first + i]), gated.h[i]};
                }
                add_rows<true>(downs, count, x.count, y, wanted);
              });
}

/// CATS: gates of all neurons, then ups and downs of those whose gate is open.
template <class Row>
SelectedCounts selected_by_gate(const NeuronRows& rows, Activation activation,
                                const Selection& selection, const NeuronIds& all,
                                const Vector<Row>& x, float* h, float* y) {
  const auto product = [&](const Rows& w, int32_t id) {
    const Row row[1] = {{w, id}};
    Floats lanes[1];
    multiply<true>(row, x, lanes);
    return lanes[0];
  };
  SelectedCounts counts;
  Wanted nothing;
  for (int64_t first = 0; first < all.count; first += kBatch, h += kBatch) {
    const int32_t* ids = all.data + first;
    const int64_t some = min(kBatch, all.count - first);
    Products products;
    float gates[kBatch], ups[kBatch];
    for (int64_t i = 0; i < some; ++i) products.lanes[i] = product(rows.gate, ids[i]);
    products.store_to(gates, some);
    activate(activation, gates, some);
    Down<Row> downs[kBatch];
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
      downs[i] = {Row(rows.down, ids[which[i]]), h[which[i]]};
    }
    add_rows<true>(downs, open, x.count, y, nothing);
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
