// Prefill kernels for int8 rows with AVX512-VNNI (VPDPBUSD), for machines without
// AVX512-BF16 (kernels_prefill_bf16.cpp); kernels_prefill.cpp is for all others.
//
// Activations are quantised with one scale for each scale of the weights (parts of 16 would
// cost a third of the speed and gain 0.1% perplexity), to two bytes, x = scale (256 q + residual),
// since 8 bits alone would cost as much perplexity as the int8 weights do. A dword of four consecutive
// values of a row is broadcast to all lanes and multiplied with the same four of each token. Codes
// keep their offset, so accumulators start at -kOffset sum(q).
#include "cpu/dwords.h"
#include "cpu/int8.h"
#include "cpu/kernels_isa.h"

#if defined(__AVX512VNNI__) && !defined(__AVX512BF16__)

namespace tda {
namespace {

/// kSize consecutive values of each of a panel's tokens, with one scale per token.
template <int64_t kSize>
struct alignas(64) Part {
  static constexpr int kDwords = kSize / 4;
  struct Bytes {
    PanelDwords<kDwords> dwords;  // four bytes each
    int32_t start[kPanel];        // -kOffset * the sum of the token's bytes
  };
  Bytes q, residual;
  float scale[kPanel];
};

// ---- quantisation ---------------------------------------------------------------------------

/// Values of a row per scale.
template <class Row>
constexpr int64_t kPerScale = kGroup / Row::kScales;

inline Floats to_floats(__m512i v) { return (Floats)_mm512_cvtepi32_ps(v); }
inline __m512i nearest(Floats v) { return _mm512_cvtps_epi32((__m512)v); }

/// The largest |value(i)|, i < count, of each of kLanes tokens; compared as integers, so that
/// infinity and NaN are larger than any number.
template <class Value>
inline Floats largest(int64_t count, const Value& value) {
  __m512i most = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; ++i)
    most = _mm512_max_epi32(most, (__m512i)_mm512_abs_ps((__m512)value(i)));
  return (Floats)most;
}

/// Packs integers(0) ... integers(count - 1), each of kLanes tokens, as bytes into half `half` of
/// the tokens of `out`, padded with zeros.
template <class Row, class Bytes, class Integers>
inline void pack(int64_t count, const Integers& integers, Bytes& out, int half) {
  // After packing, a 128-bit lane holds four tokens' first values, then their second, third and
  // fourth.
  const __m512i order =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  __m512i sums = _mm512_setzero_si512();
  const auto quad = [&](int i, const auto& in) {
    const __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(in(4 * i), in(4 * i + 1)),
                                             _mm512_packs_epi32(in(4 * i + 2), in(4 * i + 3)));
    const __m512i q = _mm512_shuffle_epi8(bytes, order);
    _mm512_storeu_si512(out.dwords[i] + half * kLanes, q);
    sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), q);
  };
  int i = 0;
  for (; 4 * i + 4 <= count; ++i) quad(i, integers);
  for (; i < static_cast<int>(std::size(out.dwords)); ++i)
    quad(i, [&](int64_t j) { return j < count ? integers(j) : _mm512_setzero_si512(); });
  _mm512_storeu_si512(out.start + half * kLanes,
                      _mm512_mullo_epi32(sums, _mm512_set1_epi32(-Row::kOffset)));
}

/// Quantises value(0) ... value(count - 1), each of kLanes tokens, to half `half` of the part.
template <class Row, int64_t kSize, class Value>
inline void quantize(int64_t count, const Value& value, Part<kSize>& out, int half) {
  const Floats most = largest(count, value);
  const Floats inverse = most > 0.0f ? 127.0f / most : Floats{};
  const auto scaled = [&](int64_t i) { return value(i) * inverse; };
  pack<Row>(count, [&](int64_t i) { return nearest(scaled(i)); }, out.q, half);
  store(out.scale + half * kLanes, most / (256 * 127.0f));
  const auto residual = [&](int64_t i) {
    return nearest(256.0f * (scaled(i) - to_floats(nearest(scaled(i)))));
  };
  pack<Row>(count, residual, out.residual, half);
}

template <class Row>
constexpr int64_t parts_of(int64_t n) {
  return (n + kPerScale<Row> - 1) / kPerScale<Row>;
}

template <class Row>
int64_t prepared_bytes(int64_t n) {
  return parts_of<Row>(n) * sizeof(Part<kPerScale<Row>>);
}

/// A function of j: value j of the kLanes tokens of a half panel.
inline auto values(const float* b, int half) {
  return [at = b + half * kLanes](int64_t j) { return load_as<Floats>(at + j * kPanel); };
}

template <class Row>
void prepare(const float* b, int64_t n, void* prepared) {
  constexpr int64_t kSize = kPerScale<Row>;
  auto* const parts = static_cast<Part<kSize>*>(prepared);
  for (int64_t i = 0; i < parts_of<Row>(n); ++i, b += kSize * kPanel)
    for (int half = 0; half < 2; ++half)
      quantize<Row>(min(kSize, n - i * kSize), values(b, half), parts[i], half);
}

// ---- products -------------------------------------------------------------------------------

struct AddQuads {
  static void add(__m512i sums[2], const std::uint8_t* quad, __m512i b0, __m512i b1) {
    __m512i w;
    asm("vpbroadcastd %3, %2\n\t"
        "vpdpbusd %4, %2, %0\n\t"
        "vpdpbusd %5, %2, %1"
        : "+&v"(sums[0]), "+&v"(sums[1]), "=&v"(w)
        : "m"(*(const std::uint8_t (*)[4])quad), "v"(b0), "v"(b1));
  }
};

/// Integer dot products of kRows rows with a part; see add_products.
template <class Row, int kRows, int kStep, int64_t kSize, class At>
inline void products(const At& at, const Part<kSize>& b, __m512i sums[kRows][2]) {
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m)
    for (int half = 0; half < 2; ++half)
      sums[m][half] = _mm512_loadu_si512(b.q.start + half * kLanes);
  add_products<AddQuads, kRows, kStep>(at, b.q.dwords, sums);
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m)
    for (int half = 0; half < 2; ++half)
      sums[m][half] = _mm512_add_epi32(_mm512_slli_epi32(sums[m][half], 8),
                                       _mm512_loadu_si512(b.residual.start + half * kLanes));
  add_products<AddQuads, kRows, kStep>(at, b.residual.dwords, sums);
}

constexpr int kTileRows = 6;  // x 2 vectors x (integer sums and float totals)
static_assert(kBlockRows % kTileRows == 0);

/// Codes and scales of kBlockRows rows, by parts.
template <int64_t kSize, int64_t kDepth>
struct CodeBlock {
  alignas(64) std::uint8_t codes[kDepth][kBlockRows][kSize];
  float scales[kDepth][kBlockRows];
};

/// c[m] = row first + m of `a` times b, or += with `add`, for `depth` parts and m < rows; `a` has
/// kTileRows rows from `first` on.
template <class Row, int64_t kSize, int64_t kDepth>
inline void tile(const CodeBlock<kSize, kDepth>& a, int64_t first, const Part<kSize>* b,
                 int64_t depth, float* c, int64_t rows, bool add) {
  Floats totals[kTileRows][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    __m512i sums[kTileRows][2];
    products<Row, kTileRows, 4>([&](int m) { return a.codes[k][first + m]; }, b[k], sums);
#pragma GCC unroll 6
    for (int m = 0; m < kTileRows; ++m)
      for (int half = 0; half < 2; ++half) {
        const Floats of_b = load_as<Floats>(b[k].scale + half * kLanes);
        totals[m][half] += a.scales[k][first + m] * (of_b * to_floats(sums[m][half]));
      }
  }
#pragma GCC unroll 6
  for (int m = 0; m < kTileRows; ++m) {
    if (m >= rows) break;
    for (int half = 0; half < 2; ++half) {
      float* const out = c + m * kPanel + half * kLanes;
      store(out, totals[m][half] + (add ? load_as<Floats>(out) : Floats{}));
    }
  }
}

template <class Row>
void multiply(const Rows& w, int64_t rows, PreparedPanels b, Panels c, int64_t count, bool add) {
  constexpr int64_t kSize = kPerScale<Row>;
  constexpr int64_t kDepth = 512 / kSize;  // parts of a panel that stay in L1
  CodeBlock<kSize, kDepth> a;
  const int64_t parts = parts_of<Row>(w.n);
  for (int64_t r0 = 0; r0 < rows; r0 += kBlockRows) {
    const int64_t block = min(kBlockRows, rows - r0);
    NextRowsOf<Row> next(
        w, r0 + kBlockRows, kBlockRows,
        (parts + kDepth - 1) / kDepth * count * ((block + kTileRows - 1) / kTileRows));
    for (int64_t k0 = 0; k0 < parts; k0 += kDepth) {
      const int64_t depth = min(kDepth, parts - k0);
      for (int64_t r = 0; r < (block + kTileRows - 1) / kTileRows * kTileRows; ++r) {
        const Row row(w, r0 + min(r, block - 1));  // past the end, the last row again
        for (int64_t k = 0; k < depth; k += Row::kScales) {
          alignas(64) std::uint8_t group[Row::kScales][kSize];
          _mm512_store_si512(group, row.codes((k0 + k) / Row::kScales));
          for (int64_t i = k; i < k + Row::kScales; ++i) {
            __builtin_memcpy(a.codes[i][r], group[i - k], kSize);
            a.scales[i][r] = row.scales[k0 + i];
          }
        }
      }
      for (int64_t p = 0; p < count; ++p) {
        const auto* const panel = reinterpret_cast<const Part<kSize>*>(
            static_cast<const std::byte*>(b.data) + p * b.stride);
        for (int64_t r = 0; r < block; r += kTileRows) {
          next.prefetch();
          tile<Row>(a, r, panel + k0, depth, c.data + p * c.stride + (r0 + r) * kPanel, block - r,
                    add || k0 > 0);
        }
      }
    }
  }
}

// ---- transposed -----------------------------------------------------------------------------
//
// Here sums run over the rows, which have different scales. So b is multiplied by these before it
// is quantised, kRowsAtOnce values with one scale, once for each part of the columns.

constexpr int kTileColumns = 8;  // x 2 vectors
constexpr int64_t kRowsAtOnce = 32;

/// kRowsAtOnce rows of one group of columns, the bytes of each four rows interleaved: column
/// 16 i + 4 j + k of four rows is dword 16 j + 4 i + k.
template <class Row>
struct Block {
  static constexpr int kDwords = kRowsAtOnce / 4;
  alignas(64) std::uint8_t quads[kDwords][4 * kGroup];
  float scales[Row::kScales][kRowsAtOnce];

  /// Rows [first, first + count) of a column group, padded with zeros.
  void load(const Rows& w, int64_t first, int64_t count, int64_t group) {
    for (int i = 0; i < kDwords; ++i) {
      __m512i rows[4];
      for (int j = 0; j < 4; ++j) {
        const int64_t r = 4 * i + j;
        const bool there = r < count;
        const Row row(w, first + (there ? r : 0));
        rows[j] = there ? row.codes(group) : _mm512_setzero_si512();
        for (int part = 0; part < Row::kScales; ++part)
          scales[part][r] = there ? row.scales[group * Row::kScales + part] : 0.0f;
      }
      __m512i columns[4];
      interleave(rows, columns);
      for (int j = 0; j < 4; ++j) _mm512_store_si512(quads[i] + j * kGroup, columns[j]);
    }
  }
  /// The first four rows of a column; the next ones are 4 kGroup bytes apart.
  const std::uint8_t* column(int64_t c) const {
    return quads[0] + c % 16 / 4 * kGroup + c / 16 * 16 + c % 4 * 4;
  }
};

/// c[m] += column first + m of the block times b, m < columns <= kTileColumns.
template <class Row>
inline void tile_transposed(const Block<Row>& block, int64_t first, const Part<kRowsAtOnce>& b,
                            float* c, int64_t columns) {
  __m512i sums[kTileColumns][2];
  const std::uint8_t* const start = block.column(first);
  products<Row, kTileColumns, 4 * kGroup>([&](int m) { return start + m / 4 * kGroup + m % 4 * 4; },
                                          b, sums);
#pragma GCC unroll 12
  for (int m = 0; m < kTileColumns; ++m) {
    if (m >= columns) break;
    for (int half = 0; half < 2; ++half) {
      float* const out = c + m * kPanel + half * kLanes;
      store(out, load_as<Floats>(b.scale + half * kLanes) * to_floats(sums[m][half]) +
                     load_as<Floats>(out));
    }
  }
}

template <class Row>
void multiply_transposed(const Rows& w, int64_t rows, int64_t first, int64_t columns, ConstPanels b,
                         Panels c, int64_t count) {
  static_assert(kPerScale<Row> % kTileColumns == 0);
  Block<Row> block;
  Part<kRowsAtOnce> part;
  for (int64_t c0 = 0; c0 < columns; c0 += kGroup)
    for (int64_t k0 = 0; k0 < rows; k0 += kRowsAtOnce) {
      const int64_t depth = min(kRowsAtOnce, rows - k0);
      const int64_t group = (first + c0) / kGroup;
      block.load(w, k0, depth, group);
      NextRowsOf<Row> next(w, k0 + kRowsAtOnce, kRowsAtOnce, count * (kGroup / kTileColumns),
                           group);
      for (int64_t p = 0; p < count; ++p) {
        const float* const in = b.data + p * b.stride + k0 * kPanel;
        for (int64_t i = 0; i < min(kGroup, columns - c0); i += kTileColumns) {
          if (i % kPerScale<Row> == 0) {
            const float* const scales = block.scales[i / kPerScale<Row>];
            for (int half = 0; half < 2; ++half)
              quantize<Row>(
                  depth, [&](int64_t j) { return scales[j] * values(in, half)(j); }, part, half);
          }
          next.prefetch();
          tile_transposed(block, i, part, c.data + p * c.stride + (c0 + i) * kPanel,
                          columns - c0 - i);
        }
      }
    }
}

template <class Row>
constexpr PanelKernels panel_kernels() {
  return {prepared_bytes<Row>, prepare<Row>, multiply<Row>, multiply_transposed<Row>, kGroup};
}

}  // namespace

namespace TDA_ISA {
const PanelKernels int8_panels = panel_kernels<Int8Row>();
}  // namespace TDA_ISA

}  // namespace tda

#endif
