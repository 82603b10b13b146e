// Kernels of prefill for bf16 rows, where there is an instruction for two of their products at
// once: tokens are rounded to bf16 for it, and products added up in f32. kernels_prefill.cpp has
// the kernels for other machines.
#include "cpu/dwords.h"
#include "cpu/kernels_isa.h"

#if defined(__AVX512BF16__)

namespace tda {
namespace {

constexpr int kDwords = 16;              // of a row or token that are worked on at once
constexpr int64_t kGroup = 2 * kDwords;  // their values
using Group = PanelDwords<kDwords>;

struct AddPairs {
  static void add(__m512i sums[2], const void* pair, __m512i b0, __m512i b1) {
    __m512i w;
    asm("vpbroadcastd %3, %2\n\t"
        "vdpbf16ps %4, %2, %0\n\t"
        "vdpbf16ps %5, %2, %1"
        : "+&v"(sums[0]), "+&v"(sums[1]), "=&v"(w)
        : "m"(*static_cast<const std::uint8_t (*)[4]>(pair)), "v"(b0), "v"(b1));
  }
};

constexpr int64_t groups_of(int64_t n) { return (n + kGroup - 1) / kGroup; }

/// Lane 2 i is lane i of the first vector, lane 2 i + 1 that of the second one, 16 bits each;
/// `first`: the lane to begin with.
inline __m512i interleaving(int first) {
  std::uint16_t order[32];
  for (int i = 0; i < 32; ++i) order[i] = static_cast<std::uint16_t>(first + i / 2 + i % 2 * 32);
  return _mm512_loadu_si512(order);
}

/// Rounds `count` <= kGroup rows of a panel; zeros behind them.
inline void pack(const float* b, int64_t count, Group& out) {
  std::uint16_t order[32];
  for (int i = 0; i < 32; ++i) order[i] = static_cast<std::uint16_t>(i / 2 + i % 2 * 16);
  const __m512i interleave = _mm512_loadu_si512(order);
  for (int k = 0; k < kDwords; ++k)
    for (int half = 0; half < 2; ++half) {
      const float* const at = b + 2 * k * kPanel + half * kLanes;
      const __m512 first = 2 * k < count ? _mm512_loadu_ps(at) : _mm512_setzero_ps();
      const __m512 second = 2 * k + 1 < count ? _mm512_loadu_ps(at + kPanel) : _mm512_setzero_ps();
      const __m512i pair = (__m512i)_mm512_cvtne2ps_pbh(second, first);
      _mm512_storeu_si512(out[k] + half * kLanes, _mm512_permutexvar_epi16(interleave, pair));
    }
}

int64_t prepared_bytes(int64_t n) { return groups_of(n) * sizeof(Group); }

void prepare(const float* b, int64_t n, void* prepared) {
  Group* const groups = static_cast<Group*>(prepared);
  for (int64_t g = 0; g < groups_of(n); ++g)
    pack(b + g * kGroup * kPanel, min(kGroup, n - g * kGroup), groups[g]);
}

constexpr int kTileRows = 12;    // x 2 vectors
constexpr int kTileColumns = 8;  // x 2 vectors
static_assert(kBlockRows % kTileRows == 0);

/// c[m] += (or =) row m times b for m < rows <= kRows, `depth` groups long; see add_products. Rows
/// are kRowStep bytes apart, their groups kGroupStep. A function of its own, or else compilers
/// (GCC 12) keep sums in memory.
template <int kRows, int kRowStep, int kStep, int64_t kGroupStep>
[[gnu::noinline]] void tile(const void* w, const Group* b, int64_t depth, float* c, int64_t rows,
                            bool add) {
  const auto* row = static_cast<const std::byte*>(w);
  __m512i sums[kRows][2];
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m) sums[m][0] = sums[m][1] = _mm512_setzero_si512();
  for (int64_t g = 0; g < depth; ++g, row += kGroupStep)
    add_products<AddPairs, kRows, kStep>([row](int m) { return row + m * kRowStep; }, b[g], sums);
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m) {
    if (m >= rows) break;
    for (int half = 0; half < 2; ++half) {
      float* const out = c + m * kPanel + half * kLanes;
      store(out, (Floats)sums[m][half] + (add ? load_as<Floats>(out) : Floats{}));
    }
  }
}

inline const std::uint16_t* row_of(const Rows& w, int64_t r) {
  return reinterpret_cast<const std::uint16_t*>(w.data) + r * w.n;
}

/// The mask of the first `count` lanes of 16 bits.
inline __mmask32 first_lanes(int64_t count) {
  return count <= 0 ? 0 : 0xffffffffu >> (32 - min(32, count));
}

void multiply(const Rows& w, int64_t rows, PreparedPanels b, Panels c, int64_t count, bool add) {
  constexpr int64_t kDepth = 8;  // groups of a panel that stay in the first-level cache
  alignas(64) std::uint16_t a[kDepth][kBlockRows][kGroup];
  const int64_t groups = groups_of(w.n);
  for (int64_t r0 = 0; r0 < rows; r0 += kBlockRows) {
    const int64_t block = min(kBlockRows, rows - r0);
    const int64_t steps =
        (groups + kDepth - 1) / kDepth * count * ((block + kTileRows - 1) / kTileRows);
    NextRows next(row_of(w, r0 + kBlockRows), 2 * w.n, 2 * w.n, kBlockRows, steps);
    for (int64_t g0 = 0; g0 < groups; g0 += kDepth) {
      const int64_t depth = min(kDepth, groups - g0);
      for (int64_t r = 0; r < (block + kTileRows - 1) / kTileRows * kTileRows; ++r) {
        // Whatever stands behind the last row.
        const std::uint16_t* const row = row_of(w, r0 + min(r, block - 1)) + g0 * kGroup;
        for (int64_t g = 0; g < depth; ++g) {
          const __mmask32 mask = first_lanes(w.n - (g0 + g) * kGroup);
          _mm512_store_si512(a[g][r], _mm512_maskz_loadu_epi16(mask, row + g * kGroup));
        }
      }
      for (int64_t p = 0; p < count; ++p) {
        const auto* const panel = static_cast<const Group*>(b.from(p).data);
        for (int64_t r = 0; r < block; r += kTileRows) {
          next.ask();
          tile<kTileRows, 2 * kGroup, 4, sizeof a[0]>(a[0][r], panel + g0, depth,
                                                      c.data + p * c.stride + (r0 + r) * kPanel,
                                                      block - r, add || g0 > 0);
        }
      }
    }
  }
}

constexpr int64_t kBlockColumns = 64;

/// Pairs of rows, interleaved, of a block of columns.
struct Square {
  alignas(64) std::int32_t pairs[kDwords][kBlockColumns];

  /// Rows [first, first + count), columns [column, column + columns); zeros behind them.
  void load(const Rows& w, int64_t first, int64_t count, int64_t column, int64_t columns) {
    const __m512i low = interleaving(0), high = interleaving(16);
    for (int k = 0; k < kDwords; ++k)
      for (int part = 0; part < 2; ++part) {
        const __mmask32 mask = first_lanes(columns - 32 * part);
        const auto row = [&](int64_t r) {
          return _mm512_maskz_loadu_epi16(
              r < count ? mask : 0, row_of(w, first + min(r, count - 1)) + column + 32 * part);
        };
        const __m512i a = row(2 * k), b = row(2 * k + 1);
        _mm512_store_si512(pairs[k] + 32 * part, _mm512_permutex2var_epi16(a, low, b));
        _mm512_store_si512(pairs[k] + 32 * part + 16, _mm512_permutex2var_epi16(a, high, b));
      }
  }
};

void multiply_transposed(const Rows& w, int64_t rows, int64_t first, int64_t columns, ConstPanels b,
                         Panels c, int64_t count) {
  constexpr int64_t kDepth = 4;
  Square squares[kDepth];
  alignas(64) Group packed[kDepth];
  for (int64_t c0 = 0; c0 < columns; c0 += kBlockColumns) {
    const int64_t block = min(kBlockColumns, columns - c0);
    for (int64_t k0 = 0; k0 < rows; k0 += kDepth * kGroup) {
      const int64_t depth = groups_of(min(kDepth * kGroup, rows - k0));
      const int64_t tiles = (block + kTileColumns - 1) / kTileColumns;
      NextRows next(row_of(w, k0 + kDepth * kGroup) + first + c0, 2 * w.n, 2 * block,
                    kDepth * kGroup, count * tiles);
      for (int64_t g = 0; g < depth; ++g) {
        const int64_t row = k0 + g * kGroup;
        squares[g].load(w, row, min(kGroup, rows - row), first + c0, block);
      }
      for (int64_t p = 0; p < count; ++p) {
        for (int64_t g = 0; g < depth; ++g) {
          const int64_t row = k0 + g * kGroup;
          pack(b.data + p * b.stride + row * kPanel, min(kGroup, rows - row), packed[g]);
        }
        for (int64_t i = 0; i < block; i += kTileColumns) {
          next.ask();
          tile<kTileColumns, 4, 4 * kBlockColumns, sizeof squares[0]>(
              squares[0].pairs[0] + i, packed, depth, c.data + p * c.stride + (c0 + i) * kPanel,
              block - i, true);
        }
      }
    }
  }
}

}  // namespace

namespace TDA_ISA {
const PanelKernels bf16_panels = {prepared_bytes, prepare, multiply, multiply_transposed,
                                  kBlockColumns};
}  // namespace TDA_ISA

}  // namespace tda

#endif
