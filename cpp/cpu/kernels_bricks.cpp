// Decode kernels of bricks: what all instruction sets share.
#include "base/half.h"
#include "cpu/bricks.h"
#include "cpu/kernels_isa.h"
#include "cpu/simd.h"

namespace tda {
namespace {

/// How far ahead bricks are prefetched.
template <class Brick>
constexpr int64_t kBrickDistance = 8 * sizeof(Brick);

/// Calls body(brick, s, b, ahead) for each in the order of memory: s, b: its strip and block among
/// those given, ahead: what to prefetch meanwhile, never past the last brick.
template <class Brick, class Body>
[[gnu::always_inline]] inline void for_bricks(const Bricks& w, Span strips, Span blocks,
                                              const Body& body) {
  const auto* const end =
      reinterpret_cast<const char*>(&w.brick<Brick>(strips.end - 1, blocks.end - 1));
  const auto visit = [&](int64_t s, int64_t b) __attribute__((always_inline)) {
    const auto& brick = w.brick<Brick>(s, b);
    const char* const ahead = reinterpret_cast<const char*>(&brick) + kBrickDistance<Brick>;
    body(brick, s - strips.first, b - blocks.first, ahead < end ? ahead : end);
  };
  if (w.by_block)
    for (int64_t b = blocks.first; b < blocks.end; ++b)
      for (int64_t s = strips.first; s < strips.end; ++s) visit(s, b);
  else
    for (int64_t s = strips.first; s < strips.end; ++s)
      for (int64_t b = blocks.first; b < blocks.end; ++b) visit(s, b);
}

}  // namespace
}  // namespace tda

#if defined(__AVX512VNNI__)
#include "cpu/bricks_avx512.h"
#elif defined(__AVX2__)
#include "cpu/bricks_avx2.h"
#else
#include "cpu/bricks_portable.h"
#endif

namespace tda {
namespace {

/// |v| as an integer, in the order of the values; infinity is above all numbers and NaN above that,
/// so that neither gets lost in a maximum.
inline int32_t size_bits(float v) { return __builtin_bit_cast(int32_t, v) & 0x7fffffff; }

/// The sizes of a block of x. Its loops have 32 steps and no branches, so that compilers make vectors
/// of them: one thread prepares x while the others wait.
struct Sizes {
  int32_t of[kBlockInputs];

  explicit Sizes(const float* x) {
    for (int64_t i = 0; i < kBlockInputs; ++i) of[i] = size_bits(x[i]);
  }
  int32_t largest() const {
    int32_t found = 0;
    for (const int32_t size : of) found = size > found ? size : found;
    return found;
  }
  /// The first place of a size.
  int32_t place_of(int32_t size) const {
    int32_t found = kBlockInputs;
    for (int32_t i = 0; i < kBlockInputs; ++i) {
      const int32_t here = of[i] == size ? i : static_cast<int32_t>(kBlockInputs);
      found = here < found ? here : found;
    }
    return found;
  }
};

/// 127 / limit; 0 for NaN, and for limits so small that it would be infinite.
inline float inverse_of(float limit) { return limit > 1e-36f ? 127.0f / limit : 0.0f; }

/// out = the nearest integers of x * inverse, within 127 of 0. x: [32]
inline void quantize(const float* x, float inverse, int32_t* out) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: the nearest integer is in the low bits
  const Ints zero = (Ints)splat(kRound);
  for (int64_t i = 0; i < kBlockInputs; i += kLanes) {
    const Floats scaled = load_as<Floats>(x + i) * inverse;
    const Ints rounded = (Ints)(min(max(scaled, splat(-127.0f)), splat(127.0f)) + kRound) - zero;
    __builtin_memcpy(out + i, &rounded, sizeof rounded);
  }
}

/// Whatever is not finite gets a scale that is not, so that all products become NaN or infinite.
void prepare(const float* x, int64_t blocks, HighInputs* out) {
  for (int64_t b = 0; b < blocks; ++b, x += kBlockInputs) {
    HighInputs& block = out[b];
    Sizes sizes(x);
    const int32_t largest = sizes.largest(), at = sizes.place_of(largest);
    sizes.of[at] = 0;
    const float most = __builtin_bit_cast(float, largest);
    const float next = __builtin_bit_cast(float, sizes.largest());
    const bool apart = most > 2 * next && most < __builtin_inff();
    const float limit = apart ? next : most;
    block.scale = limit / 127.0f;
    int32_t q[kBlockInputs];
    quantize(x, inverse_of(limit), q);
    for (int64_t half = 0; half < 2; ++half) {
      int32_t sum = 0;
      for (int64_t i = 0; i < kScaleInputs; ++i) sum += q[half * kScaleInputs + i];
      block.sums[half] = block.scale * static_cast<float>(sum);
    }
    for (int64_t i = 0; i < kBlockInputs; ++i) block.q[i] = static_cast<std::int8_t>(q[i]);
    block.excess_quad = -1;
    if (!apart) continue;
    const float excess = x[at] - block.scale * block.q[at];
    for (std::int8_t& q : block.excess) q = 0;
    block.excess[at % 4] = excess < 0 ? -127 : 127;
    block.excess_scale = __builtin_fabsf(excess) / 127.0f;
    block.excess_quad = static_cast<int32_t>(at / 4);
    block.sums[at / kScaleInputs] += excess;
  }
}

int64_t choose(const float* x, const float* lengths, Span inputs, float threshold,
               RestInputs* out) {
  int64_t total = 0;
  for (int64_t i = inputs.first; i < inputs.end; ++i) {
    out[total / kBlockInputs].ids[total % kBlockInputs] = static_cast<int32_t>(i);
    total += !(__builtin_fabsf(x[i]) * lengths[i] < threshold);  // NaN compares false: chosen
  }
  for (int64_t first = 0; first < total; first += kBlockInputs) {
    RestInputs& block = out[first / kBlockInputs];
    block.count = static_cast<int32_t>(min(kBlockInputs, total - first));
    float values[kBlockInputs] = {};
    for (int32_t k = 0; k < block.count; ++k) values[k] = x[block.ids[k]];
    const float most = __builtin_bit_cast(float, Sizes(values).largest());
    block.scale = most / 127.0f;
    int32_t q[kBlockInputs];
    quantize(values, inverse_of(most), q);
    for (int64_t k = 0; k < kBlockInputs; ++k) block.q[k] = static_cast<std::int8_t>(q[k]);
    for (int64_t k = block.count; k < kBlockInputs; ++k) block.ids[k] = block.ids[block.count - 1];
  }
  return total;
}

void add_high(const Bricks& w, Span strips, Span blocks, const HighVectors& vectors) {
  const bool lines = w.kind == BrickKind::lines;
  (lines ? add_bricks<LineBrick> : add_bricks<CentredBrick>)(w, strips, blocks, vectors);
}

}  // namespace

namespace TDA_ISA {
const BrickKernels bricks = {prepare, choose, add_high, add_rests};
}  // namespace TDA_ISA

}  // namespace tda
