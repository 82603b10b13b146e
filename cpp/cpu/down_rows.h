// Sums of down rows: y += h[i] row[i] for a batch of neurons. Included by kernel sources only, like
// simd.h.
//
// y is kept in the order in which sums come out of the instructions, and put into its own at the
// end, by `reorder`.
#pragma once

#include "cpu/batch.h"
#include "cpu/chunks.h"

namespace tda {
namespace {

/// A neuron's down row and what it is taken times.
template <class Row>
struct Down {
  Row row;
  float h;
};

template <Plane kPlane, class Row>
inline const std::uint8_t* plane_of(const Row& row) {
  if constexpr (kPlane == Plane::low)
    return row.low;
  else
    return row.high;
}

/// What a code of the plane counts, in scales.
template <Plane kPlane, class Row>
constexpr float kCodeSize = Row::kPlanes && kPlane == Plane::high ? 16.0f : 1.0f;

#if defined(__AVX512VNNI__)

constexpr int kQuads = kBatch / 4;

/// Lane L's four sums of a vector follow these others.
constexpr int64_t place_of_lane(int64_t lane) { return lane % 4 * 16 + lane / 4 * 4; }

/// What a batch's rows are taken times, h * step * scale, as 16-bit integers of a common unit, and
/// these in halves of 8 bits, four rows to a dword, for byte products.
template <class Row>
struct Factors {
  static constexpr int64_t kBlock = 32;  // scales at a time
  float unit;
  std::int16_t weights[kBatch] = {};  // h * step, in 128 units
  // For the scales of a block: the halves' dwords.
  __m512i high[kQuads][2], fine[kQuads][2];
  // For a chunk: those of the lanes L = 4 i + j, by j; and what an offset of 8 in the codes adds.
  alignas(64) int32_t high_of[kQuads][4][16], fine_of[kQuads][4][16];
  __m512i high_offset, fine_offset;

  Factors(const Down<Row>* downs, int64_t count) {
    float exact[kBatch], most = 0.0f, strange = 0.0f;
    for (int64_t r = 0; r < count; ++r) {
      exact[r] = downs[r].h * step_of(downs[r].row);
      const float size = __builtin_fabsf(exact[r]);
      most = size > most ? size : most;
      strange += 0.0f * size;  // NaN if there is one, or infinity: that is to be seen
    }
    const float inverse = most > 0.0f ? 32767.0f / most : 0.0f;
    for (int64_t r = 0; r < count; ++r)
      weights[r] = static_cast<std::int16_t>(_mm_cvtss_si32(_mm_set_ss(exact[r] * inverse)));
    unit = most * (128.0f / 32767.0f) + strange;
  }

  /// The block of scales from `scale` on.
  void make_block(const Down<Row>* downs, int64_t count, int64_t scale, int64_t scales) {
    const __mmask32 there = scales - scale >= kBlock ? ~0u : (1u << (scales - scale)) - 1;
    const __m512i bytes = _mm512_set1_epi16(0x00ff);
    // a's bytes where the mask is set, else b's.
    const auto select = [](__m512i mask, __m512i a, __m512i b) {
      return _mm512_ternarylogic_epi64(mask, a, b, 0xca);
    };
    for (int64_t q = 0; 4 * q < count; ++q) {
      __m512i f[4], g[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Row& row = downs[min(4 * q + i, count - 1)].row;  // those beyond have no weight
        const __m512i s =
            _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(there, scales_of(row) + scale));
        f[i] = _mm512_mulhrs_epi16(_mm512_slli_epi16(s, 8), _mm512_set1_epi16(weights[4 * q + i]));
        g[i] = _mm512_add_epi16(f[i], _mm512_set1_epi16(128));  // rounds the upper half
      }
      deal(select(bytes, f[0], _mm512_slli_epi16(f[1], 8)),
           select(bytes, f[2], _mm512_slli_epi16(f[3], 8)), fine[q]);
      deal(select(bytes, _mm512_srli_epi16(g[0], 8), g[1]),
           select(bytes, _mm512_srli_epi16(g[2], 8), g[3]), high[q]);
    }
  }

  /// Hands them to the chunk's lanes; its scales begin at number `at` of the block.
  template <int kVectors>
  void make_chunk(int64_t count, int64_t at) {
    high_offset = fine_offset = _mm512_setzero_si512();
    const __m512i eights = _mm512_set1_epi8(8);
    for (int64_t q = 0; 4 * q < count; ++q) {
      const __m512i h = lanes<kVectors>(high[q], at), f = lanes<kVectors>(fine[q], at);
      high_offset = _mm512_dpbusd_epi32(high_offset, eights, h);
      fine_offset = _mm512_dpbusd_epi32(fine_offset, eights, f);
      by_remainder(h, high_of[q]);
      by_remainder(f, fine_of[q]);
    }
  }

 private:
  /// Pairs of bytes of 32 scales become the fours of 16 and 16.
  static void deal(__m512i a, __m512i b, __m512i out[2]) {
    const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
    out[0] = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high);
    out[1] = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), high);
  }
  template <int kVectors>
  static __m512i lanes(const __m512i block[2], int64_t at) {
    if constexpr (kVectors == Row::kVectors) return block[at / 16];
    Ints index;
    for (int lane = 0; lane < kLanes; ++lane)
      index[lane] = static_cast<int32_t>(at) + lane * kVectors / Row::kVectors;
    return _mm512_permutex2var_epi32(block[0], (__m512i)index, block[1]);
  }
  static void by_remainder(__m512i v, int32_t (*out)[16]) {
    _mm512_store_si512(out[0], _mm512_shuffle_epi32(v, _MM_PERM_AAAA));
    _mm512_store_si512(out[1], _mm512_shuffle_epi32(v, _MM_PERM_BBBB));
    _mm512_store_si512(out[2], _mm512_shuffle_epi32(v, _MM_PERM_CCCC));
    _mm512_store_si512(out[3], _mm512_shuffle_epi32(v, _MM_PERM_DDDD));
  }
};

/// sum += codes times x, by fours. GCC 12 copies sums about when it is left to it.
inline void add_fours(__m512i& sum, __m512i codes, const int32_t* x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "m"(*(const int32_t (*)[16])x));
}

/// One line of a chunk.
template <Plane kPlane, int kVectors, class Row>
inline void add_line(const Factors<Row>& factors, const std::uint8_t* const* rows, int64_t count,
                     int64_t line, float* y) {
  constexpr bool kPair = kVectors > 1;
  // The upper vector's codes stay where they are, 16 times too large.
  const __m512i lower = _mm512_set1_epi8(15), upper = _mm512_set1_epi8(static_cast<char>(0xf0));
  __m512i sums[2][4], fine_sums[2][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j)
    sums[0][j] = sums[1][j] = fine_sums[0][j] = fine_sums[1][j] = _mm512_setzero_si512();
  for (int64_t q = 0; 4 * q < count; ++q) {
    __m512i bytes[4], columns[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const std::uint8_t* const at = rows[4 * q + i] + line;
      if constexpr (kPair) {
        bytes[i] = _mm512_loadu_si512(at);
      } else {
        const __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)at));
        bytes[i] = _mm512_mask_srli_epi16(twice, 0xffff0000, twice, 4);
      }
    }
    interleave(bytes, columns);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const int32_t *h = factors.high_of[q][j], *f = factors.fine_of[q][j];
      const __m512i a = _mm512_and_si512(columns[j], lower);
      add_fours(sums[0][j], a, h);
      add_fours(fine_sums[0][j], a, f);
      if (!kPair) continue;
      const __m512i b = _mm512_and_si512(columns[j], upper);
      add_fours(sums[1][j], b, h);
      add_fours(fine_sums[1][j], b, f);
    }
  }
  const __m512i offset =
      _mm512_add_epi32(_mm512_slli_epi32(factors.high_offset, 8), factors.fine_offset);
  const __m512i offsets[4] = {
      _mm512_shuffle_epi32(offset, _MM_PERM_AAAA), _mm512_shuffle_epi32(offset, _MM_PERM_BBBB),
      _mm512_shuffle_epi32(offset, _MM_PERM_CCCC), _mm512_shuffle_epi32(offset, _MM_PERM_DDDD)};
  const float unit = kCodeSize<kPlane, Row> * factors.unit;
  for (int v = 0; v < line_vectors(kVectors); ++v)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(sums[v][j], 8), fine_sums[v][j]);
      sum = _mm512_sub_epi32(sum, v == 0 ? offsets[j] : _mm512_slli_epi32(offsets[j], 4));
      float* const out = y + v * lines_of(kVectors) * kGroup + j * kLanes;
      store(out, load_as<Floats>(out) + (v == 0 ? unit : unit / 16) * to_floats((Ints)sum));
    }
}

/// y += sum over i < count <= kBatch of h[i] row[i], as far as it is in the plane.
template <Plane kPlane, class Row>
[[gnu::noinline]] void add_rows(const Down<Row>* downs, int64_t count, int64_t groups, float* y,
                                Wanted& wanted) {
  if (count == 0) return;
  Factors<Row> factors(downs, count);
  const std::uint8_t* rows[kBatch];
  for (int64_t r = 0; r < (count + 3) / 4 * 4; ++r)
    rows[r] = plane_of<kPlane>(downs[min(r, count - 1)].row);
  for_chunks<Row>(groups, [&](auto vectors, int64_t first, int64_t) {
    const int64_t scale = first * Row::kScales, at = scale % factors.kBlock;
    if (at == 0) factors.make_block(downs, count, scale, groups * Row::kScales);
    factors.template make_chunk<vectors>(count, at);
    for (int64_t m = 0; m < lines_of(vectors); ++m) {
      wanted.ask(kLineUnits);
      add_line<kPlane, vectors>(factors, rows, count, first * kGroupBytes + m * 64,
                                y + (first + m) * kGroup);
    }
  });
}

#else

constexpr int64_t place_of_lane(int64_t lane) { return 4 * lane; }

/// y += sum over i < count <= kBatch of h[i] row[i], as far as it is in the plane.
template <Plane kPlane, class Row>
[[gnu::noinline]] void add_rows(const Down<Row>* downs, int64_t count, int64_t groups, float* y,
                                Wanted& wanted) {
  constexpr int kFloats = kVectorBytes / kLanes;  // vectors of floats for a vector of bytes
  float factors[kBatch][kGroup];
  for_chunks<Row>(groups, [&](auto vectors, int64_t first, int64_t) {
    for (int64_t r = 0; r < count; ++r) {
      const Row& row = downs[r].row;
      const float weight = kCodeSize<kPlane, Row> * downs[r].h * step_of(row);
      for (int64_t i = 0; i < kGroup; ++i)
        factors[r][i] =
            weight * scales_of(row)[first * Row::kScales + i / 4 * vectors / Row::kVectors];
    }
    for (int64_t m = 0; m < lines_of(vectors); ++m) {
      wanted.ask(kLineUnits);
      for (int part = 0; part < kParts; ++part) {
        constexpr int kCount = line_vectors(vectors);
        float* const out = y + (first + m) * kGroup + part * kVectorBytes;
        Floats sums[kCount][kFloats];
        for (int v = 0; v < kCount; ++v)
          for (int i = 0; i < kFloats; ++i)
            sums[v][i] = load_as<Floats>(out + v * lines_of(vectors) * kGroup + i * kLanes);
        for (int64_t r = 0; r < count; ++r) {
          Bytes codes[kCount];
          load_line<vectors>(plane_of<kPlane>(downs[r].row) + first * kGroupBytes + m * 64, part,
                             codes);
          for (int v = 0; v < kCount; ++v) {
            const Bytes centred = codes[v] - 8;
            std::int8_t bytes[kVectorBytes];
            __builtin_memcpy(bytes, &centred, sizeof bytes);
            for (int i = 0; i < kFloats; ++i)
              sums[v][i] += load_as<Floats>(factors[r] + part * kVectorBytes + i * kLanes) *
                            signed_floats(bytes + i * kLanes);
          }
        }
        for (int v = 0; v < kCount; ++v)
          for (int i = 0; i < kFloats; ++i)
            store(out + v * lines_of(vectors) * kGroup + i * kLanes, sums[v][i]);
      }
    }
  });
}

#endif

/// out = y in its own order. y, out: [groups of 64]
template <class Row>
void reorder(const float* y, int64_t groups, float* out) {
  for_chunks<Row>(groups, [&](auto vectors, int64_t first, int64_t) {
    for (int64_t v = 0; v < vectors; ++v)
      for (int64_t lane = 0; lane < kChunkLanes; ++lane)
        __builtin_memcpy(out + first * kGroup + 4 * (lane * vectors + v),
                         y + (first + v) * kGroup + place_of_lane(lane), 4 * sizeof(float));
  });
}

}  // namespace
}  // namespace tda
