// Kernels of prefill for int8 rows by byte products, where there is an instruction for four of them
// at once; kernels_prefill.cpp has those for other machines.
//
// The tokens of a panel are rounded to bytes by groups of 64, as in decode:  x = scale q. A dword
// of four neighbours of a row is broadcast to the lanes and multiplied with the same four of each
// token. Weights take part as 16 high + low, 136 too large: -136 sum(q) is where the sums start.
#include "cpu/dwords.h"
#include "cpu/int8.h"
#include "cpu/kernels_isa.h"

#if defined(__AVX512VNNI__)

namespace tda {
namespace {

static_assert(kDwords == kGroup / 4);

/// A group of a panel's vectors.
struct Group {
  PanelDwords q;          // four bytes each
  int32_t start[kPanel];  // -136 sum of the token's q
  float scale[kPanel];
};

// ---- rounding -------------------------------------------------------------------------------

/// Rounds value(0) ... value(count - 1), each of kLanes tokens, to the group's half `half`; zeros
/// behind them.
template <class Value>
inline void quantize(int64_t count, const Value& value, Group& out, int half) {
  Floats largest = {};
  for (int64_t i = 0; i < count; ++i)
    largest = (Floats)_mm512_max_ps((__m512)largest, _mm512_abs_ps((__m512)value(i)));
  const Floats inverse = largest > 0.0f ? 127.0f / largest : Floats{};
  // Packing leaves four tokens' first, then their second, third and fourth values next to each
  // other.
  const __m512i order =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  __m512i sums = _mm512_setzero_si512();
  const auto quad = [&](int i, const auto& integers) {
    const __m512i bytes =
        _mm512_packs_epi16(_mm512_packs_epi32(integers(4 * i), integers(4 * i + 1)),
                           _mm512_packs_epi32(integers(4 * i + 2), integers(4 * i + 3)));
    const __m512i q = _mm512_shuffle_epi8(bytes, order);
    _mm512_storeu_si512(out.q[i] + half * kLanes, q);
    sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), q);
  };
  const auto integer = [&](int64_t i) { return _mm512_cvtps_epi32((__m512)(value(i) * inverse)); };
  int i = 0;
  for (; 4 * i + 4 <= count; ++i) quad(i, integer);
  for (; i < kDwords; ++i)
    quad(i, [&](int64_t j) { return j < count ? integer(j) : _mm512_setzero_si512(); });
  _mm512_storeu_si512(out.start + half * kLanes, _mm512_mullo_epi32(sums, _mm512_set1_epi32(-136)));
  store(out.scale + half * kLanes, largest / 127.0f);
}

int64_t prepared_bytes(int64_t n) { return groups_of(n) * sizeof(Group); }

void prepare(const float* b, int64_t n, void* prepared) {
  Group* const groups = static_cast<Group*>(prepared);
  for (int64_t g = 0; g < groups_of(n); ++g, b += kGroup * kPanel)
    for (int half = 0; half < 2; ++half)
      quantize(
          min(kGroup, n - g * kGroup),
          [&](int64_t i) { return load_as<Floats>(b + i * kPanel + half * kLanes); }, groups[g],
          half);
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

/// The products of kRows rows with a group, from its start on; see add_products.
template <int kRows, int kStep, class At>
inline void products(const At& at, const Group& b, __m512i sums[kRows][2]) {
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m)
    for (int half = 0; half < 2; ++half)
      sums[m][half] = _mm512_loadu_si512(b.start + half * kLanes);
  add_products<AddQuads, kRows, kStep>(at, b.q, sums);
}

inline Floats to_floats(__m512i v) { return (Floats)_mm512_cvtepi32_ps(v); }

constexpr int kTileRows = 12;  // x 2 vectors
static_assert(kBlockRows % kTileRows == 0);

/// c[m] += (or =) scales[m] * codes[m] b for m < rows, while codes has kTileRows.
inline void tile(const std::uint8_t (*codes)[kGroup], const float* scales, const Group& b, float* c,
                 int64_t rows, bool add) {
  __m512i sums[kTileRows][2];
  products<kTileRows, 4>([&](int m) { return codes[m]; }, b, sums);
#pragma GCC unroll 12
  for (int m = 0; m < kTileRows; ++m) {
    if (m >= rows) break;
    for (int half = 0; half < 2; ++half) {
      float* const out = c + m * kPanel + half * kLanes;
      const Floats sum = load_as<Floats>(b.scale + half * kLanes) * to_floats(sums[m][half]);
      store(out, scales[m] * sum + (add ? load_as<Floats>(out) : Floats{}));
    }
  }
}

void multiply(const Rows& w, int64_t rows, PreparedPanels b, Panels c, int64_t count, bool add) {
  constexpr int64_t kDepth = 8;  // groups of a panel that stay in the first-level cache
  alignas(64) std::uint8_t codes[kDepth][kBlockRows][kGroup];
  float scales[kDepth][kBlockRows];
  const int64_t groups = groups_of(w.n);
  for (int64_t r0 = 0; r0 < rows; r0 += kBlockRows) {
    const int64_t block = min(kBlockRows, rows - r0);
    for (int64_t g0 = 0; g0 < groups; g0 += kDepth) {
      const int64_t depth = min(kDepth, groups - g0);
      for (int64_t r = 0; r < (block + kTileRows - 1) / kTileRows * kTileRows; ++r) {
        const Int8Row row(w, r0 + min(r, block - 1));  // whatever stands behind the last one
        for (int64_t g = 0; g < depth; ++g) {
          _mm512_store_si512(codes[g][r], row.codes(g0 + g));
          scales[g][r] = bf16_to_f32(row.scales[g0 + g]);
        }
      }
      for (int64_t p = 0; p < count; ++p) {
        const Group* const panel =
            reinterpret_cast<const Group*>(static_cast<const std::byte*>(b.data) + p * b.stride);
        for (int64_t r = 0; r < block; r += kTileRows)
          for (int64_t g = 0; g < depth; ++g)
            tile(codes[g] + r, scales[g] + r, panel[g0 + g],
                 c.data + p * c.stride + (r0 + r) * kPanel, block - r, add || g0 + g > 0);
      }
    }
  }
}

// ---- transposed -----------------------------------------------------------------------------
//
// Here a token's sum is over the rows, whose scales differ: they are taken into b before it is
// rounded, once for each group of columns.

constexpr int kTileColumns = 8;  // x 2 vectors

/// One group of kGroup rows: four at a time, their bytes interleaved. Column 16 i + 4 j + k of the
/// rows' quad is dword (4 j + i) 4 + k.
struct Square {
  alignas(64) std::uint8_t quads[kDwords][4 * kGroup];
  float scales[kGroup];

  /// Rows [first, first + count) of a column group; zeros behind them.
  void load(const Rows& w, int64_t first, int64_t count, int64_t group) {
    for (int i = 0; i < kDwords; ++i) {
      __m512i rows[4];
      for (int j = 0; j < 4; ++j) {
        const int64_t r = 4 * i + j;
        const bool there = r < count;
        const Int8Row row(w, first + (there ? r : 0));
        rows[j] = there ? row.codes(group) : _mm512_setzero_si512();
        scales[r] = there ? bf16_to_f32(row.scales[group]) : 0.0f;
      }
      __m512i columns[4];
      interleave(rows, columns);
      for (int j = 0; j < 4; ++j) _mm512_store_si512(quads[i] + j * kGroup, columns[j]);
    }
  }
  /// The first quad of a column; the next ones are 4 kGroup bytes apart.
  const std::uint8_t* column(int64_t c) const {
    return quads[0] + c % 16 / 4 * kGroup + c / 16 * 16 + c % 4 * 4;
  }
};

/// c[m] += squareᵀ b for the columns first + m, m < columns, kTileColumns of them at most.
inline void tile_transposed(const Square& square, int64_t first, const Group& b, float* c,
                            int64_t columns) {
  __m512i sums[kTileColumns][2];
  const std::uint8_t* const start = square.column(first);
  products<kTileColumns, 4 * kGroup>([&](int m) { return start + m / 4 * kGroup + m % 4 * 4; }, b,
                                     sums);
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

void multiply_transposed(const Rows& w, int64_t rows, int64_t first, int64_t columns, ConstPanels b,
                         Panels c, int64_t count) {
  Square square;
  Group group;
  for (int64_t c0 = 0; c0 < columns; c0 += kGroup) {
    const int64_t block = min(kGroup, columns - c0);
    for (int64_t k0 = 0; k0 < rows; k0 += kGroup) {
      const int64_t depth = min(kGroup, rows - k0);
      square.load(w, k0, depth, (first + c0) / kGroup);
      for (int64_t p = 0; p < count; ++p) {
        const float* const in = b.data + p * b.stride + k0 * kPanel;
        for (int half = 0; half < 2; ++half)
          quantize(
              depth,
              [&](int64_t i) {
                return square.scales[i] * load_as<Floats>(in + i * kPanel + half * kLanes);
              },
              group, half);
        for (int64_t i = 0; i < block; i += kTileColumns)
          tile_transposed(square, i, group, c.data + p * c.stride + (c0 + i) * kPanel, block - i);
      }
    }
  }
}

}  // namespace

namespace TDA_ISA {
const PanelKernels int8_panels = {prepared_bytes, prepare, multiply, multiply_transposed, kGroup};
}  // namespace TDA_ISA

}  // namespace tda

#endif
