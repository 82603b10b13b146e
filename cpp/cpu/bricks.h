// Decode kernels of bricks (weights/bricks.h): products of a matrix and one x.
//
// x is quantised per block of 32 inputs, x = scale q with q of 8 bits. An input that is more than
// twice as large as all others of its block would leave them few steps of that scale: what exceeds
// theirs is kept apart.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "weights/bricks.h"

namespace tda {

/// 32 quantised inputs: x = scale * q, and the excess of one input in the quad `excess_quad` (-1 if
/// there is none) is excess_scale * excess.
struct HighInputs {
  std::int8_t q[kBlockInputs];
  std::int8_t excess[4];
  float scale, excess_scale;
  float sums[2];  // of the quantised inputs of each half, excess included
  std::int32_t excess_quad;
};

/// Up to 32 inputs whose rests are read, in ascending order.
struct RestInputs {
  std::int32_t count;
  std::int32_t ids[kBlockInputs];
  std::int8_t q[kBlockInputs];  // 0 past the end
  float scale;
};

/// A product's x, quantised, and the inputs whose rests are read.
struct BrickInputs {
  const float* x;  // [blocks * 32]
  const HighInputs* high;
  const RestInputs* rests;
  std::int64_t chosen;
};

/// The quantised x of several sequences, and where their sums go.
struct HighVectors {
  std::int64_t count;
  const HighInputs* const* x;  // [count]
  float* const* sums;          // [count]
};

/// Strips or blocks [first, end).
struct Span {
  std::int64_t first, end;
  std::int64_t count() const { return end - first; }
};

/// The high parts of a product are sums of scale * code and offset, before a row's step; the rests'
/// are sums of code, before a row's rest_step.
struct BrickKernels {
  /// Quantises blocks of x. x: [blocks * 32], zeros where inputs pad.
  void (*prepare)(const float* x, std::int64_t blocks, HighInputs* out);
  /// Writes the inputs [first, end) with |x[i]| * lengths[i] of at least `threshold` to `out`.
  /// Returns their number; they fill that many / 32 of `out`, rounded up.
  std::int64_t (*choose)(const float* x, const float* lengths, Span inputs, float threshold,
                         RestInputs* out);
  /// sums[v][r] += the high part of each row in the strips, over the inputs in the blocks; each
  /// brick is read once for all x. x[v]: of the blocks; sums[v]: [strips * 64]
  void (*add_high)(const Bricks& w, Span strips, Span blocks, const HighVectors&);
  /// sums[r] += the rests of `count` inputs.
  void (*add_rests)(const Bricks& w, Span strips, const RestInputs* x, std::int64_t count,
                    float* sums);
};

}  // namespace tda
