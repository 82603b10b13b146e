// Fills a model's arena from a checkpoint's tensors.
#pragma once

#include <tda/types.h>

#include <functional>
#include <span>
#include <vector>

#include "base/thread_pool.h"
#include "checkpoint/checkpoint.h"
#include "weights/input_factor.h"
#include "weights/model.h"

namespace tda {

/// A tensor to convert to the weight format and store in the arena.
struct Copy {
  const TensorView* source;
  Matrix target;    // in the arena, so writable
  bool transposed;  // the target's rows are the source's columns
  float* lengths;   // [rows] where to put the L2 norms of the target's rows; null: not wanted
  float offset = 0, factor = 1;  // stored is (value + offset) * factor; not if transposed
};

/// Whether samples of a tensor [rows, cols] tell that its groups of 32 values had 4 bits before, as
/// GGUF's Q4_0 and Q4_1, and most others, have them. Throws CheckpointError.
bool had_four_bits(const TensorView& tensor);

/// Tensors to convert to one matrix in bricks.
struct BrickCopy {
  std::vector<const TensorView*> sources;
  std::vector<std::int64_t> rows;  // of each
  Matrix target;                   // in the arena
  bool in_turn;                    // 32 rows of each source in turn, else one after the other
  float* lengths;  // [cols] where to put the L2 norms of the columns; null: not wanted
  std::span<const std::int32_t> row_order = {};  // of rows in turn: where each source has them
};

/// What a matrix in bricks is rounded by; null: by its values alone.
using FactorOf = std::function<const InputFactor*(const Matrix& target)>;

/// Throws CheckpointError for values that are not finite or that the format cannot hold, and for
/// files that change meanwhile. `progress` counts bytes written.
void run_copies(const std::vector<Copy>& copies, const std::vector<BrickCopy>& bricks,
                ThreadPool& pool, const Progress& progress, const FactorOf& factor_of);

}  // namespace tda
