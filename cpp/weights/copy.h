// Fills a model's arena from a checkpoint's tensors.
#pragma once

#include <tda/types.h>

#include <vector>

#include "base/thread_pool.h"
#include "checkpoint/checkpoint.h"
#include "weights/model.h"

namespace tda {

/// A tensor to convert to the weight format and store in the arena.
struct Copy {
  const TensorView* source;
  Matrix target;    // in the arena, so writable
  bool transposed;  // the target's rows are the source's columns
  float* lengths;   // [rows] where to put the L2 norms of the target's rows; null: not wanted
};

/// Throws CheckpointError for values that are not finite or that the format cannot hold, and for
/// files that change meanwhile. `progress` counts bytes written.
void run_copies(const std::vector<Copy>& copies, ThreadPool& pool, const Progress& progress);

}  // namespace tda
