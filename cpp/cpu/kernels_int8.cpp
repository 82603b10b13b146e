// Kernels of decode for int8 rows: integer products with an x that is rounded to int8, too.
//
// A group's product with x is   sx sw (16 sum((high - 8) q) + sum((low - 8) q)),
// x = sx q in the group. Nibbles are unsigned, as the instructions want it; the -8 sum(q) is where
// the integer sums start. The planes' sums stay apart to the end, exact = 16 high + low: so a
// neuron that is finished after a look at its high planes has the bits of one computed at once.
#include "cpu/int8.h"
#include "cpu/kernels_isa.h"

namespace tda {
namespace {

/// Neurons worked on at a time: their down rows share what is loaded and stored of y.
constexpr int64_t kBatch = 16;

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

/// Loads are what these loops run out of, and compilers like to repeat them.
inline void keep_in_register([[maybe_unused]] Ints& v) {
#if defined(__AVX2__)
  asm("" : "+v"(v));
#endif
}

inline Floats to_floats(Ints v) { return __builtin_convertvector(v, Floats); }

/// The groups' scales as floats, kLanes of them from g on.
inline Floats scales_of(const Int8Row& row, int64_t g) {
  return (Floats)(widen(load_as<Halves>(row.scales + g)) << 16);
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
      store(factors[r], scales_of(rows[r], g0) * load_as<Floats>(x.scales + g0));
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

/// Per-lane sums of up to kBatch rows on their way to one float each.
struct Products {
  Floats lanes[kBatch];

  /// The first `count`, up to a whole vector of them; whatever stands behind them becomes 0.
  void store_to(float* out, int64_t count) {
    for (int64_t i = count; i % kLanes != 0; ++i) lanes[i] = Floats{};
    for (int64_t i = 0; i < count; i += kLanes) store(out + i, sums(lanes + i));
  }
};
inline Floats exact_lanes(Floats high, Floats low) { return level(16.0f * high + low); }
inline Floats coarse_lanes(Floats high) { return level(16.0f * high); }
inline Floats exact_lanes(const Int8Row& row, const Vector& x) {
  const Int8Row rows[1] = {row};
  Floats high[1], low[1];
  multiply<true, true>(rows, x, high, low);
  return exact_lanes(high[0], low[0]);
}

/// A neuron's down row and what it is taken times; coarse: its high plane alone.
struct Down {
  Int8Row row;
  float h;
  bool exact;
};

#if defined(__AVX512VNNI__)

/// What a batch's rows are taken times, h * scale, for kLanes groups: as 16-bit integers relative
/// to the group's largest. In halves of 8 bits, four rows to an int32, for byte products.
struct Factors {
  static constexpr int kQuads = kBatch / 4;
  alignas(64) float step[kLanes];
  alignas(64) int32_t high_start[kLanes], low_start[kLanes];  // -136 sum of the halves
  alignas(64) int32_t high[kQuads][kLanes], low[kQuads][kLanes];

  Factors(const Down* downs, int64_t count, int64_t g) {
    __m512 exact[kBatch] = {}, largest = _mm512_setzero_ps();
    for (int64_t r = 0; r < count; ++r) {
      exact[r] = (__m512)(downs[r].h * scales_of(downs[r].row, g));
      largest = _mm512_max_ps(largest, _mm512_abs_ps(exact[r]));
    }
    const __m512 most = _mm512_set1_ps(32512.0f);  // 127 * 256
    _mm512_store_ps(step, _mm512_div_ps(largest, most));
    const __mmask16 some = _mm512_cmp_ps_mask(largest, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    const __m512 inverse = _mm512_maskz_div_ps(some, most, largest);
    __m512i high_sum = _mm512_setzero_si512(), low_sum = _mm512_setzero_si512();
    for (int64_t q = 0; 4 * q < count; ++q) {
      __m128i high_bytes[4], low_bytes[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m512i integers = _mm512_cvtps_epi32(_mm512_mul_ps(exact[4 * q + i], inverse));
        const __m512i highs =
            _mm512_srai_epi32(_mm512_add_epi32(integers, _mm512_set1_epi32(128)), 8);
        const __m512i lows = _mm512_sub_epi32(integers, _mm512_slli_epi32(highs, 8));
        high_sum = _mm512_add_epi32(high_sum, highs);
        low_sum = _mm512_add_epi32(low_sum, lows);
        high_bytes[i] = _mm512_cvtepi32_epi8(highs);
        low_bytes[i] = _mm512_cvtepi32_epi8(lows);
      }
      interleave(high_bytes, high[q]);
      interleave(low_bytes, low[q]);
    }
    const __m512i offset = _mm512_set1_epi32(-136);
    _mm512_store_si512(high_start, _mm512_mullo_epi32(high_sum, offset));
    _mm512_store_si512(low_start, _mm512_mullo_epi32(low_sum, offset));
  }

 private:
  /// out[g] = byte g of each of the four.
  static void interleave(const __m128i bytes[4], int32_t* out) {
    const __m128i a = _mm_unpacklo_epi8(bytes[0], bytes[1]);
    const __m128i b = _mm_unpackhi_epi8(bytes[0], bytes[1]);
    const __m128i c = _mm_unpacklo_epi8(bytes[2], bytes[3]);
    const __m128i d = _mm_unpackhi_epi8(bytes[2], bytes[3]);
    auto* const p = reinterpret_cast<__m128i*>(out);
    _mm_store_si128(p, _mm_unpacklo_epi16(a, c));
    _mm_store_si128(p + 1, _mm_unpackhi_epi16(a, c));
    _mm_store_si128(p + 2, _mm_unpacklo_epi16(b, d));
    _mm_store_si128(p + 3, _mm_unpackhi_epi16(b, d));
  }
};

/// y += sum over i < count <= kBatch of h[i] row[i]. y: whole groups
inline void add_rows(const Down* downs, int64_t count, int64_t groups, float* y) {
  if (count == 0) return;
  for (int64_t g0 = 0; g0 < groups; g0 += kLanes) {
    const Factors factors(downs, count, g0);
    for (int64_t g = 0; g < min(kLanes, groups - g0); ++g, y += kGroup) {
      const __m512i high_start = _mm512_set1_epi32(factors.high_start[g]);
      const __m512i low_start = _mm512_set1_epi32(factors.low_start[g]);
      __m512i high[4] = {high_start, high_start, high_start, high_start};
      __m512i low[4] = {low_start, low_start, low_start, low_start};
      for (int64_t q = 0; 4 * q < count; ++q) {
        const int64_t last = count - 1;  // in the place of rows beyond it, times zero
        __m512i codes[4], columns[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const Down& down = downs[min(4 * q + i, last)];
          codes[i] = down.row.codes(g0 + g, down.exact);
        }
        interleave(codes, columns);
        const __m512i high_factors = _mm512_set1_epi32(factors.high[q][g]);
        const __m512i low_factors = _mm512_set1_epi32(factors.low[q][g]);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          high[i] = _mm512_dpbusd_epi32(high[i], columns[i], high_factors);
          low[i] = _mm512_dpbusd_epi32(low[i], columns[i], low_factors);
        }
      }
      __m512i s[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) s[i] = _mm512_add_epi32(_mm512_slli_epi32(high[i], 8), low[i]);
      // The 128-bit lanes of the four, transposed, are the columns in order.
      const __m512i ab = _mm512_shuffle_i32x4(s[0], s[1], 0x88);
      const __m512i AB = _mm512_shuffle_i32x4(s[0], s[1], 0xdd);
      const __m512i cd = _mm512_shuffle_i32x4(s[2], s[3], 0x88);
      const __m512i CD = _mm512_shuffle_i32x4(s[2], s[3], 0xdd);
      const __m512i ordered[4] = {
          _mm512_shuffle_i32x4(ab, cd, 0x88), _mm512_shuffle_i32x4(AB, CD, 0x88),
          _mm512_shuffle_i32x4(ab, cd, 0xdd), _mm512_shuffle_i32x4(AB, CD, 0xdd)};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        float* const out = y + i * kLanes;
        store(out, load_as<Floats>(out) + factors.step[g] * to_floats((Ints)ordered[i]));
      }
    }
  }
}

#else

/// y += sum over i < count <= kBatch of h[i] row[i]. y: whole groups
inline void add_rows(const Down* downs, int64_t count, int64_t groups, float* y) {
  constexpr int kVectors = kGroup / kLanes;
  float factors[kBatch][kLanes];
  for (int64_t g = 0; g < groups; ++g, y += kGroup) {
    if (g % kLanes == 0)
      for (int64_t r = 0; r < count; ++r)
        store(factors[r], downs[r].h * scales_of(downs[r].row, g));
    Floats sums[kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) sums[i] = load_as<Floats>(y + i * kLanes);
    for (int64_t r = 0; r < count; ++r) {
      std::int8_t codes[kGroup];
      downs[r].row.codes(g, downs[r].exact, codes);
      const float factor = factors[r][g % kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; ++i) sums[i] += factor * signed_floats(codes + i * kLanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) store(y + i * kLanes, sums[i]);
  }
}

#endif

// ---- memory ---------------------------------------------------------------------------------
//
// Rows that follow each other are read in order and left to the hardware, which prefetches plain
// streams best. What a selection wants is scattered: its cache lines are asked for a few at a time,
// between rows that are worked on, so that memory is never idle and never overrun; into the
// second-level cache, since the first level can have only few misses under way.

class Wanted {
 public:
  void clear() { next_ = count_ = 0; }
  void add_high(const Rows& w, int64_t r) {
    rows_[count_] = Int8Row(w, r).high;
    lines_[count_++] = static_cast<int>((high_row_bytes(w.n) + 63) / 64);
  }
  void add_low(const Rows& w, int64_t r) {
    rows_[count_] = Int8Row(w, r).low;
    lines_[count_++] = static_cast<int>((low_row_bytes(w.n) + 63) / 64);
  }
  void add(const Rows& w, int64_t r) {
    add_high(w, r);
    add_low(w, r);
  }
  /// All that is left, spread over so many calls of `ask`.
  void spread(int64_t calls) { step_ = (count_ - next_ + calls - 1) / calls; }
  void ask() {
    for (const int64_t end = min(next_ + step_, count_); next_ < end; ++next_)
      for (int i = 0; i < lines_[next_]; ++i) __builtin_prefetch(rows_[next_] + i * 64, 0, 2);
  }

 private:
  static constexpr int64_t kMost = 6 * kBatch;
  const std::uint8_t* rows_[kMost];
  int lines_[kMost];
  int64_t count_ = 0, next_ = 0, step_ = 0;
};

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

/// Whole vectors of them.
inline void activate(Activation activation, float* values, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes)
    store(values + i, activate(activation, load_as<Floats>(values + i)));
}

/// act(gate) * up for the exact products of some neurons.
struct Gated {
  Products gates, ups;
  float h[kBatch];

  void finish(Activation activation, int64_t count) {
    float up[kBatch];
    gates.store_to(h, count);
    ups.store_to(up, count);
    activate(activation, h, count);
    for (int64_t i = 0; i < count; ++i) h[i] *= up[i];
  }
};

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
    for (int64_t i = 0; i < some; ++i) wanted.add(rows.down, ids[i]);
    for (int64_t i = some; i < some + next; ++i) {
      wanted.add(rows.gate, ids[i]);
      wanted.add(rows.up, ids[i]);
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
    Down downs[kBatch];
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

  void want(const NeuronRows& rows, const Selection& selection, Wanted& wanted) const {
    for (int64_t i = 0; i < count; ++i) {
      if (is_exact(i, selection)) {
        wanted.add_low(rows.gate, ids[i]);
        wanted.add_low(rows.up, ids[i]);
        wanted.add(rows.down, ids[i]);
      } else if (is_used(i, selection)) {
        wanted.add_high(rows.down, ids[i]);
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
    Down downs[kBatch];
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
  for (int64_t first = 0, turn = 0; first < ids.count + kBatch; first += kBatch, ++turn) {
    Sketch& sketch = sketches[turn % 2];
    if (first < ids.count) {
      sketch.ids = ids.data + first;
      sketch.count = min(kBatch, ids.count - first);
      sketch.make(rows, activation, selection, x, wanted);
      wanted.clear();
      sketch.want(rows, selection, wanted);
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
    Down downs[kBatch];
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
