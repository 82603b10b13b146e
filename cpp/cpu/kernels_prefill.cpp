// Prefill kernels in f32: weights, keys or values times panels of tokens; softmax and RMS norm of
// panels.
#include "base/half.h"
#include "cpu/bf16c.h"
#include "cpu/bricks.h"
#include "cpu/int8.h"
#include "cpu/kernels_isa.h"
#include "cpu/simd.h"

namespace tda {
namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 12;  // x 2 vectors: 24 accumulators of 32 registers
#else
constexpr int kTileRows = 6;  // x 2 vectors: 12 accumulators of 16 registers
#endif
constexpr int64_t kPanel = 2 * kLanes;
/// Rows of b that stay in L1 (16 KiB) while a block of weights is multiplied with them.
constexpr int64_t kDepth = min(256, 4096 / kPanel);
static_assert(kBlockRows % kTileRows == 0);

/// c[m] = sum_k a[m, k] b[k], or += with `add`, for m < rows <= kTileRows, k < depth. a[m, k] is at
/// a + m * kRowStep + k * a_step and must be readable for all m < kTileRows.
template <int64_t kRowStep>
inline void tile(const float* a, int64_t a_step, const float* b, int64_t depth, float* c,
                 int64_t rows, bool add) {
  Floats sums[kTileRows][2] = {};
  for (int64_t k = 0; k < depth; ++k, a += a_step, b += kPanel) {
    const Floats b0 = load_as<Floats>(b), b1 = load_as<Floats>(b + kLanes);
#pragma GCC unroll 12
    for (int m = 0; m < kTileRows; ++m) {
      sums[m][0] += a[m * kRowStep] * b0;
      sums[m][1] += a[m * kRowStep] * b1;
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < kTileRows; ++m) {
    if (m >= rows) break;
    float* out = c + m * kPanel;
    store(out, sums[m][0] + (add ? load_as<Floats>(out) : Floats{}));
    store(out + kLanes, sums[m][1] + (add ? load_as<Floats>(out + kLanes) : Floats{}));
  }
}

/// out[i] = w[r][first + i], i < n. For Int8 `first` is a multiple of 16, and n is rounded
/// up to one.
template <class Format>
inline void convert(const Rows& w, int64_t r, int64_t first, int64_t n, float* out) {
  const auto* row = reinterpret_cast<const typename Format::T*>(w.data) + r * w.n + first;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, Format::load(row + i));
  for (; i < n; ++i) out[i] = Format::load_one(row[i]);
}

template <>
inline void convert<Int8>(const Rows& w, int64_t r, int64_t first, int64_t n, float* out) {
  const Int8Row row(w, r);
  for (int64_t i = 0; i < n; i += 16) row.load(first + i, out + i);
}

struct Bf16c {};

template <>
inline void convert<Bf16c>(const Rows& w, int64_t r, int64_t first, int64_t n, float* out) {
  const Bf16cRow row(w, r);
  for (int64_t at = first; at < first + n;) {
    Floats group[kGroup / kLanes];
    row.load(at / kGroup, group);
    const int64_t from = at % kGroup, count = min(kGroup - from, first + n - at);
    __builtin_memcpy(out + at - first, reinterpret_cast<const float*>(group) + from, 4 * count);
    at += count;
  }
  for (int64_t i = 0; i < row.apart(); ++i)
    if (row.column(i) >= first && row.column(i) < first + n)
      out[row.column(i) - first] = row.value(i);
}

template <>
inline void convert<Int8Cache>(const Rows& w, int64_t r, int64_t first, int64_t n, float* out) {
  const auto* const row =
      reinterpret_cast<const std::int8_t*>(w.data) + r * cache_stride<Int8Cache>(w.n);
  const int64_t end = first + n;
  for (int64_t i = first; i < end;) {
    const float scale = cache_scale(row, w.n, i);
    const int64_t of_group = min(end, (i / kKvGroup + 1) * kKvGroup);
    for (; i < of_group; ++i) *out++ = scale * row[i];
  }
}

inline int64_t whole_tiles(int64_t rows) { return (rows + kTileRows - 1) / kTileRows * kTileRows; }

inline ConstPanels f32_panels_of(PreparedPanels b) {
  return {static_cast<const float*>(b.data), b.stride / 4};
}

template <class Format>
void multiply(const Rows& w, int64_t rows, PreparedPanels prepared, Panels c, int64_t count,
              bool add) {
  const ConstPanels b = f32_panels_of(prepared);
  const int64_t n = w.n;
  constexpr int64_t kStride = kDepth + 16;  // a power of two would map all rows to the same sets
  alignas(64) float a[kBlockRows * kStride];
  for (int64_t r0 = 0; r0 < rows; r0 += kBlockRows) {
    const int64_t block = min(kBlockRows, rows - r0);
    for (int64_t k0 = 0; k0 < n; k0 += kDepth) {
      const int64_t depth = min(kDepth, n - k0);
      for (int64_t r = 0; r < block; ++r) convert<Format>(w, r0 + r, k0, depth, a + r * kStride);
      for (int64_t r = block; r < whole_tiles(block); ++r)
        for (int64_t k = 0; k < depth; ++k) a[r * kStride + k] = 0.0f;
      for (int64_t p = 0; p < count; ++p)
        for (int64_t r = 0; r < block; r += kTileRows)
          tile<kStride>(a + r * kStride, 1, b.data + p * b.stride + k0 * kPanel, depth,
                        c.data + p * c.stride + (r0 + r) * kPanel, block - r, add || k0 > 0);
    }
  }
}

template <class Format>
void multiply_transposed(const Rows& w, int64_t rows, int64_t first, int64_t columns, ConstPanels b,
                         Panels c, int64_t count) {
  alignas(64) float a[kDepth * kBlockRows];
  for (int64_t c0 = 0; c0 < columns; c0 += kBlockRows) {
    const int64_t block = min(kBlockRows, columns - c0);
    for (int64_t k0 = 0; k0 < rows; k0 += kDepth) {
      const int64_t depth = min(kDepth, rows - k0);
      for (int64_t k = 0; k < depth; ++k) {
        convert<Format>(w, k0 + k, first + c0, block, a + k * kBlockRows);
        for (int64_t r = block; r < whole_tiles(block); ++r) a[k * kBlockRows + r] = 0.0f;
      }
      for (int64_t p = 0; p < count; ++p)
        for (int64_t r = 0; r < block; r += kTileRows)
          tile<1>(a + r, kBlockRows, b.data + p * b.stride + k0 * kPanel, depth,
                  c.data + p * c.stride + (c0 + r) * kPanel, block - r, true);
    }
  }
}

template <class Format>
constexpr PanelKernels panel_kernels() {
  return {nullptr, nullptr, multiply<Format>, multiply_transposed<Format>, kBlockRows};
}

#if !defined(__AVX512BF16__)  // kernels_prefill_bf16.cpp

/// Inputs of a strip that are expanded at a time.
constexpr int64_t kBrickDepth = 128;
static_assert(kBrickDepth % kBlockInputs == 0);

/// The codes of rows r ... r + kLanes - 1 for input i of a brick.
inline Floats codes_of(const BrickCodes& codes, int64_t r, int64_t i) {
  const Words quads = load_as<Words>(codes[i / 4] + r % 32 * 4);
  return __builtin_convertvector(quads >> (i % 4 * 8 + (r < 32 ? 0 : 4)) & 15, Floats);
}

/// a[k][r] = w[64 strip + r][32 block + k], k < 32, without outliers.
inline void expand_centred(const Bricks& w, int64_t strip, int64_t block, float* a) {
  const auto& brick = w.brick<CentredBrick>(strip, block);
  for (int64_t half = 0; half < 2; ++half) {
    float unit[kStripRows], base[kStripRows];
    for (int64_t r = 0; r < kStripRows; ++r) {
      unit[r] = w.steps[strip * kStripRows + r] * brick.scales[half][r];
      base[r] = -8 * unit[r];
    }
    for (int64_t i = half * kScaleInputs; i < (half + 1) * kScaleInputs; ++i)
      for (int64_t r = 0; r < kStripRows; r += kLanes)
        store(a + i * kStripRows + r,
              codes_of(brick.codes, r, i) * load_as<Floats>(unit + r) + load_as<Floats>(base + r));
  }
}

inline void expand_lines(const Bricks& w, int64_t strip, int64_t block, float* a) {
  const auto& brick = w.brick<LineBrick>(strip, block);
  float unit[kStripRows], base[kStripRows];
  for (int64_t r = 0; r < kStripRows; ++r) {
    const float step = w.steps[strip * kStripRows + r];
    unit[r] = step * f16_to_f32(brick.scales[r]);
    base[r] = step * f16_to_f32(brick.minima[r]);
  }
  for (int64_t i = 0; i < kBlockInputs; ++i)
    for (int64_t r = 0; r < kStripRows; r += kLanes)
      store(a + i * kStripRows + r,
            codes_of(brick.codes, r, i) * load_as<Floats>(unit + r) + load_as<Floats>(base + r));
}

inline void add_rests(const Bricks& w, int64_t strip, int64_t block, float* a) {
  const float* const unit = w.rest_steps + strip * kStripRows;
  for (int64_t i = 0; i < kBlockInputs; ++i) {
    const std::uint8_t* const rest = w.rest(block * kBlockInputs + i) + 32 * strip;
    std::int8_t rests[kStripRows];
    for (int64_t r = 0; r < kStripRows / 2; ++r) {
      rests[r] = static_cast<std::int8_t>((rest[r] & 15) - 8);
      rests[r + kStripRows / 2] = static_cast<std::int8_t>((rest[r] >> 4) - 8);
    }
    for (int64_t r = 0; r < kStripRows; r += kLanes) {
      float* const at = a + i * kStripRows + r;
      store(at, signed_floats(rests + r) * load_as<Floats>(unit + r) + load_as<Floats>(at));
    }
  }
}

inline void expand(const Bricks& w, int64_t strip, int64_t block, float* a) {
  (w.kind == BrickKind::lines ? expand_lines : expand_centred)(w, strip, block, a);
  if (w.has_rests()) add_rests(w, strip, block, a);
}

#endif

inline Floats root(Floats v) {
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
}

}  // namespace

namespace TDA_ISA {

const std::int64_t panel = kPanel;
const PanelKernels f32_panels = panel_kernels<F32>();
const PanelKernels f32_cache_panels = panel_kernels<F32>();
const PanelKernels bf16_cache_panels = panel_kernels<Bf16>();
const PanelKernels int8_cache_panels = panel_kernels<Int8Cache>();
#if !defined(__AVX512BF16__)  // kernels_prefill_bf16.cpp
const PanelKernels bf16_panels = panel_kernels<Bf16>();
const PanelKernels bf16c_panels = panel_kernels<Bf16c>();
#endif
#if !defined(__AVX512VNNI__)  // kernels_prefill_integer.cpp
const PanelKernels int8_panels = panel_kernels<Int8>();
#endif

#if !defined(__AVX512BF16__)  // kernels_prefill_bf16.cpp
void multiply_bricks(const Bricks& w, int64_t strip, PreparedPanels prepared, Panels c,
                     int64_t count, bool add) {
  const ConstPanels b = f32_panels_of(prepared);
  alignas(64) float a[kBrickDepth * kStripRows + kTileRows];  // tiles read past the last row
  for (int64_t r = 0; r < kTileRows; ++r) a[kBrickDepth * kStripRows + r] = 0.0f;
  const int64_t rows = min(kStripRows, w.rows - strip * kStripRows);
  for (int64_t k0 = 0; k0 < w.cols; k0 += kBrickDepth) {
    const int64_t depth = min(kBrickDepth, w.cols - k0);
    for (int64_t k = 0; k < depth; k += kBlockInputs)
      expand(w, strip, (k0 + k) / kBlockInputs, a + k * kStripRows);
    for (int64_t i = 0; i < kStripOutliers; ++i) {
      const StripOutlier& outlier = w.outliers[strip * kStripOutliers + i];
      if (outlier.value != 0 && outlier.input >= k0 && outlier.input < k0 + depth)
        a[(outlier.input - k0) * kStripRows + outlier.row % kStripRows] += outlier.value;
    }
    for (int64_t p = 0; p < count; ++p)
      for (int64_t r = 0; r < rows; r += kTileRows)
        tile<1>(a + r, kStripRows, b.data + p * b.stride + k0 * kPanel, depth,
                c.data + p * c.stride + r * kPanel, rows - r, add || k0 > 0);
  }
}
#endif

void softmax(const SoftmaxBlock& block, ScoreScale by, float* s, float* m, float* l, float* o) {
  for (int half = 0; half < 2; ++half) {
    float* scores = s + half * kLanes;
    float* out = o + half * kLanes;
    const Floats previous = load_as<Floats>(m + half * kLanes);
    Floats largest = previous;
    for (int64_t i = 0; i < block.keys; ++i) {
      Floats score = by.scale * load_as<Floats>(scores + i * kPanel);
      if (by.cap > 0) score = soft_cap(score, by.cap);
      const int64_t position = block.first + i;
      if (position > half * kLanes || position <= (half + 1) * kLanes - 1 - block.window)
        for (int lane = 0; lane < kLanes; ++lane) {
          const int64_t query = half * kLanes + lane;
          if (position > query || position <= query - block.window) score[lane] = -__builtin_inff();
        }
      store(scores + i * kPanel, score);
      largest = max(score, largest);
    }
    const Floats fade = exp(previous - largest);
    Floats total = fade * load_as<Floats>(l + half * kLanes);
    for (int64_t i = 0; i < block.keys; ++i) {
      const Floats weight = exp(load_as<Floats>(scores + i * kPanel) - largest);
      store(scores + i * kPanel, weight);
      total += weight;
    }
    for (int64_t i = 0; i < block.n; ++i)
      store(out + i * kPanel, fade * load_as<Floats>(out + i * kPanel));
    store(m + half * kLanes, largest);
    store(l + half * kLanes, total);
  }
}

void rms_norm_panel(const float* x, const float* weight, float eps, int64_t n, float* out) {
  Floats squares[2] = {};
  for (int64_t i0 = 0; i0 < n; i0 += 64) {  // in blocks, to keep rounding errors small
    Floats block[2] = {};
    for (int64_t i = i0; i < min(i0 + 64, n); ++i)
      for (int half = 0; half < 2; ++half) {
        const Floats v = load_as<Floats>(x + i * kPanel + half * kLanes);
        block[half] += v * v;
      }
    for (int half = 0; half < 2; ++half) squares[half] += block[half];
  }
  for (int half = 0; half < 2; ++half) {
    const Floats mean = squares[half] / static_cast<float>(n);
    squares[half] = 1.0f / root(mean + eps) + 0.0f * mean;  // see rms_norm
  }
  for (int64_t i = 0; i < n; ++i)
    for (int half = 0; half < 2; ++half) {
      const int64_t at = i * kPanel + half * kLanes;
      store(out + at, load_as<Floats>(x + at) * squares[half] * weight[i]);
    }
}

}  // namespace TDA_ISA
}  // namespace tda
