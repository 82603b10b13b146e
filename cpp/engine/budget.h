// Thresholds for token-scope TDA from a budget of feed-forward bytes.
//
// Leaving a neuron out changes the residual stream by its contribution n. To second order the harm to
// the model's predictions (the KL divergence from dense) is proportional to |n|², with a factor w per
// layer. The bytes of a down row are the same in all layers, so for a given number of them the harm
// is least where all layers read the rows with
//   |n|² >= lambda / w
// w is measured by decoding text with one layer changed at a time. lambda follows from the budget by
// bisection over the calibration text's contributions.
#pragma once

#include <tda/engine.h>

#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "engine/runtime.h"

namespace tda {

/// [L] w. contributions: [L] |n| of sampled tokens, in any order. texts: at least one with two tokens
/// or more. `progress(done, total)` counts layers.
std::vector<double> measure_harm(const std::shared_ptr<const Runtime>& runtime,
                                 std::span<const std::vector<Token>> texts,
                                 const std::vector<std::vector<float>>& contributions,
                                 const Progress& progress);

struct Spent {
  std::vector<float> thresholds;  // [L]
  std::vector<double> bytes;      // [L] the share of the layer's bytes that they read
};

/// The thresholds of least harm that read at most `bytes`, a share over all layers, for these
/// contributions. Throws OptionError if dropping every neuron would still read more.
Spent spend(const std::vector<double>& harm, const std::vector<std::vector<float>>& contributions,
            double bytes);

}  // namespace tda
