// Predictors of active neurons, trained beforehand, for comparison with TDA. For a token's x
//   s = second (first x)                     DejaVu: one score for each neuron
//   s = second tanh(first x / ||x||_2)       MoEfication: one for each expert
// and the neurons with the largest scores, or those of the experts with the largest, are computed.
#pragma once

#include <tda/sparsity.h>

#include <cstdint>
#include <span>
#include <vector>

#include "base/buffer.h"
#include "weights/model.h"

namespace tda {

struct PredictorWeights {
  struct Layer {
    Matrix first;                         // [rank, H] bf16
    Matrix second;                        // [F or experts, rank] bf16
    std::vector<std::int32_t> expert_of;  // [F]; empty without experts

    std::int64_t bytes() const { return first.bytes() + second.bytes(); }
    /// Ascending ids of the neurons that belong to the `count` largest scores. NaN counts as the
    /// largest, so that it reaches the logits. scores: [second.rows]
    std::vector<std::int32_t> neurons(std::span<const float> scores, std::int64_t count) const;
  };
  std::vector<Layer> layers;
  Buffer<std::byte> storage;
};

/// Throws CheckpointError for a predictor of another model.
void check_predictor(const Predictor&, const Model&);

/// How many scores the options choose: experts, or a share of `neurons`.
std::int64_t predicted_count(const TdaOptions&, std::int64_t neurons);

}  // namespace tda
