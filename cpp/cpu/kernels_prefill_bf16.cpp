// Prefill kernels for bricks and for bf16, bf16c and int8 rows with AVX512-BF16 (VDPBF16PS): tokens
// and dequantised integer weights are rounded to bf16, and products are summed in f32.
// kernels_prefill_integer.cpp and kernels_prefill.cpp are for other machines.
//
// Byte products (VPDPBUSD) would be twice as many per instruction, but quantising x accurately
// enough costs more time than they save (int8: 0.92 of this speed, and less accurate).
#include "cpu/bf16c.h"
#include "cpu/bricks_bf16.h"
#include "cpu/dwords.h"
#include "cpu/int8.h"
#include "cpu/kernels_isa.h"

#if defined(__AVX512BF16__)

namespace tda {
namespace {

constexpr int kDwords = 16;              // of a row or token in a strip
constexpr int64_t kStrip = 2 * kDwords;  // values of a strip; a row is converted by groups of two
using Strip = PanelDwords<kDwords>;
static_assert(kGroup == 2 * kStrip);

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

constexpr int64_t strips_of(int64_t n) { return (n + kStrip - 1) / kStrip; }

/// The mask of the first `count` lanes of 16 bits.
inline __mmask32 first_lanes(int64_t count) {
  return count <= 0 ? 0 : 0xffffffffu >> (32 - min(32, count));
}

/// The interface of Int8Row, for bf16.
struct Bf16Row {
  static constexpr int kScales = 0;
  static constexpr int64_t kGroupBytes = 2 * kGroup;
  static constexpr int64_t bytes(int64_t n) { return 2 * n; }
  static int64_t stride(const Rows& w) { return 2 * w.n; }
  const std::uint16_t* row;
  int64_t n;

  Bf16Row(const Rows& w, int64_t r)
      : row(reinterpret_cast<const std::uint16_t*>(w.data) + r * w.n), n(w.n) {}
  const void* group(int64_t i) const { return row + i * kGroup; }
  const void* scales_at(int64_t) const { return nullptr; }
  void bf16(int64_t group, __m512i out[2]) const {
    for (int64_t i = 0, first = group * kGroup; i < 2; ++i, first += kStrip)
      out[i] = _mm512_maskz_loadu_epi16(first_lanes(n - first), row + first);
  }
};

struct Bf16cPanelRow : Bf16cRow {
  static constexpr int kScales = 1;  // stands for the row's head
  static constexpr int64_t kGroupBytes = kBf16cGroupBytes;
  static int64_t stride(const Rows& w) { return w.stride; }

  using Bf16cRow::Bf16cRow;
  const void* scales_at(int64_t) const { return row; }
  void bf16(int64_t i, __m512i out[2]) const {
    interleave(i, out);
    std::uint16_t order[32];  // even lanes, then odd ones
    for (int j = 0; j < 32; ++j) order[j] = static_cast<std::uint16_t>(j % 16 * 2 + j / 16);
    for (int j = 0; j < 2; ++j)
      out[j] = _mm512_permutexvar_epi16(_mm512_loadu_si512(order), out[j]);
    for (int64_t j = 0; j < apart(); ++j)
      if (column(j) / kGroup == i) {
        std::uint16_t values[kGroup];
        __builtin_memcpy(values, out, sizeof values);
        values[column(j) % kGroup] = bits(j);
        __builtin_memcpy(out, values, sizeof values);
      }
  }
};

/// The permutation that interleaves the 16-bit lanes of two vectors, from lane `first` on.
inline __m512i interleaving(int first) {
  std::uint16_t order[32];
  for (int i = 0; i < 32; ++i) order[i] = static_cast<std::uint16_t>(first + i / 2 + i % 2 * 32);
  return _mm512_loadu_si512(order);
}

/// Converts `count` <= kStrip rows of a panel, padded with zeros.
inline void pack(const float* b, int64_t count, Strip& out) {
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

int64_t prepared_bytes(int64_t n) { return strips_of(n) * sizeof(Strip); }

void prepare(const float* b, int64_t n, void* prepared) {
  Strip* const strips = static_cast<Strip*>(prepared);
  for (int64_t s = 0; s < strips_of(n); ++s)
    pack(b + s * kStrip * kPanel, min(kStrip, n - s * kStrip), strips[s]);
}

constexpr int kTileRows = 12;    // x 2 vectors
constexpr int kTileColumns = 8;  // x 2 vectors
static_assert(kBlockRows % kTileRows == 0);

/// c[m] = row m times b, or += with `add`, for m < rows <= kRows and `depth` strips; see
/// add_products. Rows are kRowStep bytes apart, their strips kStripStep. Not inlined, since GCC 12
/// would spill the sums.
template <int kRows, int kRowStep, int kStep, int64_t kStripStep>
[[gnu::noinline]] void tile(const void* w, const Strip* b, int64_t depth, float* c, int64_t rows,
                            bool add) {
  const auto* row = static_cast<const std::byte*>(w);
  __m512i sums[kRows][2];
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m) sums[m][0] = sums[m][1] = _mm512_setzero_si512();
  for (int64_t k = 0; k < depth; ++k, row += kStripStep)
    add_products<AddPairs, kRows, kStep>([row](int m) { return row + m * kRowStep; }, b[k], sums);
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m) {
    if (m >= rows) break;
    for (int half = 0; half < 2; ++half) {
      float* const out = c + m * kPanel + half * kLanes;
      store(out, (Floats)sums[m][half] + (add ? load_as<Floats>(out) : Floats{}));
    }
  }
}

template <class Row>
void multiply(const Rows& w, int64_t rows, PreparedPanels b, Panels c, int64_t count, bool add) {
  constexpr int64_t kDepth = 8;  // strips of a panel that stay in L1
  alignas(64) std::uint16_t a[kDepth][kBlockRows][kStrip];
  const int64_t strips = strips_of(w.n);
  for (int64_t r0 = 0; r0 < rows; r0 += kBlockRows) {
    const int64_t block = min(kBlockRows, rows - r0), tiles = (block + kTileRows - 1) / kTileRows;
    NextRowsOf<Row> next(w, r0 + kBlockRows, kBlockRows,
                         (strips + kDepth - 1) / kDepth * count * tiles);
    for (int64_t s0 = 0; s0 < strips; s0 += kDepth) {
      const int64_t depth = min(kDepth, strips - s0);
      for (int64_t r = 0; r < tiles * kTileRows; ++r) {
        const Row row(w, r0 + min(r, block - 1));  // past the end, the last row again
        for (int64_t k = 0; k < depth; k += 2) {
          __m512i values[2];
          row.bf16((s0 + k) / 2, values);
          for (int i = 0; i < 2; ++i) _mm512_store_si512(a[k + i][r], values[i]);
        }
      }
      for (int64_t p = 0; p < count; ++p) {
        const auto* const panel = static_cast<const Strip*>(b.from(p).data);
        for (int64_t r = 0; r < block; r += kTileRows) {
          next.prefetch();
          tile<kTileRows, 2 * kStrip, 4, sizeof a[0]>(a[0][r], panel + s0, depth,
                                                      c.data + p * c.stride + (r0 + r) * kPanel,
                                                      block - r, add || s0 > 0);
        }
      }
    }
  }
}

/// kStrip rows of a group of columns, interleaved in pairs.
struct Square {
  alignas(64) std::int32_t pairs[kDwords][kGroup];

  /// Rows [first, first + count), padded with zeros.
  template <class Row>
  void load(const Rows& w, int64_t first, int64_t count, int64_t group) {
    const __m512i low = interleaving(0), high = interleaving(16);
    for (int k = 0; k < kDwords; ++k) {
      __m512i rows[2][2] = {};
      for (int i = 0; i < 2; ++i)
        if (2 * k + i < count) Row(w, first + 2 * k + i).bf16(group, rows[i]);
      for (int i = 0; i < 2; ++i) {
        std::int32_t* const out = pairs[k] + i * kStrip;
        _mm512_store_si512(out, _mm512_permutex2var_epi16(rows[0][i], low, rows[1][i]));
        _mm512_store_si512(out + 16, _mm512_permutex2var_epi16(rows[0][i], high, rows[1][i]));
      }
    }
  }
};

template <class Row>
void multiply_transposed(const Rows& w, int64_t rows, int64_t first, int64_t columns, ConstPanels b,
                         Panels c, int64_t count) {
  constexpr int64_t kDepth = 4;
  Square squares[kDepth];
  alignas(64) Strip packed[kDepth];
  for (int64_t c0 = 0; c0 < columns; c0 += kGroup) {
    const int64_t block = min(kGroup, columns - c0), group = (first + c0) / kGroup;
    for (int64_t k0 = 0; k0 < rows; k0 += kDepth * kStrip) {
      const int64_t depth = strips_of(min(kDepth * kStrip, rows - k0));
      const int64_t tiles = (block + kTileColumns - 1) / kTileColumns;
      NextRowsOf<Row> next(w, k0 + kDepth * kStrip, kDepth * kStrip, count * tiles, group);
      for (int64_t k = 0; k < depth; ++k) {
        const int64_t row = k0 + k * kStrip;
        squares[k].load<Row>(w, row, min(kStrip, rows - row), group);
      }
      for (int64_t p = 0; p < count; ++p) {
        for (int64_t k = 0; k < depth; ++k) {
          const int64_t row = k0 + k * kStrip;
          pack(b.data + p * b.stride + row * kPanel, min(kStrip, rows - row), packed[k]);
        }
        for (int64_t i = 0; i < block; i += kTileColumns) {
          next.prefetch();
          tile<kTileColumns, 4, 4 * kGroup, sizeof squares[0]>(
              squares[0].pairs[0] + i, packed, depth, c.data + p * c.stride + (c0 + i) * kPanel,
              block - i, true);
        }
      }
    }
  }
}

/// NextRows of a strip: its bricks and rests.
class NextStrip {
 public:
  NextStrip(const Bricks& w, int64_t strip, int64_t steps)
      : NextStrip(w, strip, steps,
                  w.kind == BrickKind::lines ? sizeof(LineBrick) : sizeof(CentredBrick)) {}
  void prefetch() {
    bricks_.prefetch();
    rests_.prefetch();
  }

 private:
  NextStrip(const Bricks& w, int64_t strip, int64_t steps, int64_t bytes)
      : bricks_(w.bricks + (w.by_block ? strip : strip * w.blocks) * bytes,
                w.by_block ? w.strips * bytes : bytes, bytes, w.blocks, steps),
        rests_(w.has_rests() ? w.rest(0) + 32 * strip : nullptr, w.rest_stride, kStripRows / 2,
               w.has_rests() ? w.cols : 0, steps) {}

  NextRows bricks_, rests_;
};

template <class Row>
constexpr PanelKernels panel_kernels() {
  return {prepared_bytes, prepare, multiply<Row>, multiply_transposed<Row>, kGroup};
}

}  // namespace

namespace TDA_ISA {
const PanelKernels bf16_panels = panel_kernels<Bf16Row>();
const PanelKernels bf16c_panels = panel_kernels<Bf16cPanelRow>();
const PanelKernels int8_panels = panel_kernels<Int8Row>();

void multiply_bricks(const Bricks& w, int64_t strip, PreparedPanels b, Panels c, int64_t count,
                     bool add) {
  constexpr int kRows = 8;       // of a tile; twelve would not divide a strip
  constexpr int64_t kDepth = 8;  // blocks of a panel that stay in L1
  static_assert(kStripRows % kRows == 0 && kBlockInputs == kStrip);
  alignas(64) Bf16Brick a[kDepth];
  const int64_t rows = min(kStripRows, w.rows - strip * kStripRows);
  NextStrip next(w, strip + 1,
                 (w.blocks + kDepth - 1) / kDepth * count * ((rows + kRows - 1) / kRows));
  for (int64_t k0 = 0; k0 < w.blocks; k0 += kDepth) {
    const int64_t depth = min(kDepth, w.blocks - k0);
    expand(w, strip, k0, depth, a);
    for (int64_t p = 0; p < count; ++p) {
      const Strip* const panel = static_cast<const Strip*>(b.from(p).data) + k0;
      for (int64_t r = 0; r < rows; r += kRows) {
        next.prefetch();
        tile<kRows, 2 * kStrip, 4, sizeof a[0]>(
            a[0][r], panel, depth, c.data + p * c.stride + r * kPanel, rows - r, add || k0 > 0);
      }
    }
  }
}
}  // namespace TDA_ISA

}  // namespace tda

#endif
