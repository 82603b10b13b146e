// Decode kernels of bricks: what all instruction sets share.
#include "base/half.h"
#include "cpu/bricks.h"
#include "cpu/kernels_isa.h"
#include "cpu/simd.h"

namespace tda {
namespace {

/// How many parts of a brick's inputs have scales of their own, and what is taken off their codes.
template <class Brick>
constexpr int kParts = 2;
template <class Brick>
constexpr float kCentre = 8;
template <>
constexpr int kParts<LineBrick> = 1;
template <>
constexpr float kCentre<LineBrick> = 0;

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

inline float largest_size(const float* x, int64_t count) {
  int32_t largest = 0;
  for (int64_t i = 0; i < count; ++i)
    largest = size_bits(x[i]) > largest ? size_bits(x[i]) : largest;
  return __builtin_bit_cast(float, largest);
}

/// 127 / limit; 0 for NaN, and for limits so small that it would be infinite.
inline float inverse_of(float limit) { return limit > 1e-36f ? 127.0f / limit : 0.0f; }

/// Rounds a number of |v| <= 2^22.
inline float round_to_nearest(float v) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23 leaves the nearest integer in the low bits
  return (v + kShift) - kShift;
}

/// Whatever is not finite gets a scale that is not, so that all products become NaN or infinite.
void prepare(const float* x, int64_t blocks, HighInputs* out) {
  for (int64_t b = 0; b < blocks; ++b, x += kBlockInputs) {
    HighInputs& block = out[b];
    int32_t largest = 0, second = 0;
    int64_t at = 0;
    for (int64_t i = 0; i < kBlockInputs; ++i) {
      const int32_t size = size_bits(x[i]);
      if (size > largest) {
        second = largest;
        largest = size;
        at = i;
      } else if (size > second) {
        second = size;
      }
    }
    const float most = __builtin_bit_cast(float, largest), next = __builtin_bit_cast(float, second);
    const bool apart = most > 2 * next && most < __builtin_inff();
    const float limit = apart ? next : most;
    const float inverse = inverse_of(limit);
    block.scale = limit / 127.0f;
    int32_t sums[2] = {};
    for (int64_t i = 0; i < kBlockInputs; ++i) {
      const float scaled = x[i] * inverse;
      const float within = scaled > 127.0f ? 127.0f : scaled < -127.0f ? -127.0f : scaled;
      block.q[i] = static_cast<std::int8_t>(static_cast<int32_t>(round_to_nearest(within)));
      sums[i / kScaleInputs] += block.q[i];
    }
    for (int half = 0; half < 2; ++half)
      block.sums[half] = block.scale * static_cast<float>(sums[half]);
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
  RestInputs* block = out;
  int64_t total = 0;
  int32_t count = 0;
  for (int64_t first = inputs.first; first < inputs.end; first += kBlockInputs) {
    const int64_t end = min(inputs.end, first + kBlockInputs);
    int32_t chosen[kBlockInputs];
    int32_t found = 0;
    for (int64_t i = first; i < end; ++i) {
      chosen[found] = static_cast<int32_t>(i);
      found += !(__builtin_fabsf(x[i]) * lengths[i] < threshold);  // NaN compares false: chosen
    }
    total += found;
    for (int32_t k = 0; k < found; ++k) {
      if (count == kBlockInputs) {
        ++block;
        count = 0;
      }
      block->ids[count++] = chosen[k];
      block->count = count;
    }
  }
  for (RestInputs* b = out; b < out + (total + kBlockInputs - 1) / kBlockInputs; ++b) {
    float values[kBlockInputs] = {};
    for (int32_t k = 0; k < b->count; ++k) values[k] = x[b->ids[k]];
    const float most = largest_size(values, kBlockInputs);
    const float inverse = inverse_of(most);
    b->scale = most / 127.0f;
    for (int64_t k = 0; k < kBlockInputs; ++k)
      b->q[k] =
          static_cast<std::int8_t>(static_cast<int32_t>(round_to_nearest(values[k] * inverse)));
    for (int64_t k = b->count; k < kBlockInputs; ++k) b->ids[k] = b->ids[b->count - 1];
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
