// The loops in which rounding weights to bricks spends its time, compiled once per instruction set.
// All give the same bits: an engine folder does not depend on the CPU that wrote it.
#pragma once

#include <cstdint>
#include <vector>

#include "weights/bricks.h"

namespace tda {

/// Where the codes of a row go, 0 to 15 for -8 to 7.
struct CentredRow {
  std::int8_t* scales;  // [blocks * 2], 64 apart
  std::uint8_t* codes;  // [blocks * 32]
  std::uint8_t* rests;  // [blocks * 32]; null without rests
};

struct BrickLoops {
  const char* name;
  /// Rounds a row, which becomes what codes and rests miss of it in steps. Values are brought to
  /// steps by way of units, a power of 2 near the largest, whose inverses are floats. Returns the
  /// step of the rests in steps.
  float (*round_centred)(float* row, std::int64_t blocks, float unit, float step,
                         const CentredRow& to);
  /// Puts a block's codes, of 64 rows `stride` bytes apart, into a brick or the rests.
  void (*store_codes)(const std::uint8_t* codes, std::int64_t stride, BrickCodes& to);
  void (*store_rests)(const std::uint8_t* codes, std::int64_t stride, const Bricks& to,
                      std::int64_t strip, std::int64_t block);
  /// Adds the squares of a block's 32 columns, or of their rests in units of `unit`.
  void (*add_squares)(const Bricks& source, std::int64_t block, double* squares);
  void (*add_rest_squares)(const Bricks& source, std::int64_t block, float unit, double* squares);
};

/// Those that this build and CPU have; portable ones first.
std::vector<const BrickLoops*> available_brick_loops();
/// The last of them, or the portable ones if TDA_CPU_ISA asks for these.
const BrickLoops& brick_loops();

}  // namespace tda
