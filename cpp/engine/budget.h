// Thresholds for token-scope TDA from a budget of feed-forward bytes.
//
// Leaving a neuron out changes the residual stream by its contribution n; computing it at 4 bits
// changes it by an error of e |n|. To second order the harm to the model's predictions (the KL
// divergence from dense) is proportional to the squares of such changes, with a factor w per layer:
//   dropped: w |n|²        coarse: w e² |n|²        exact: 0
// A coarse neuron costs its high down row, an exact one also its three low rows. For a given number
// of bytes the harm is least where all layers have the same harm per byte, lambda:
//   coarse if  |n|² >= lambda  high / (w (1 - e²))
//   exact  if  |n|² >= lambda 3 low / (w e²)
// w and e are measured by decoding text with one layer changed at a time. lambda follows from the
// budget by bisection over the calibration text's contributions.
#pragma once

#include <tda/engine.h>

#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "engine/runtime.h"

namespace tda {

struct LayerHarm {
  double dropped = 0;  // w
  double coarse = 0;   // w e²; 0 for weights without planes
};

/// contributions: [L] |n| of sampled tokens, in any order. texts: at least one with two tokens or
/// more. `progress(done, total)` counts layers.
std::vector<LayerHarm> measure_harm(const std::shared_ptr<const Runtime>& runtime,
                                    std::span<const std::vector<Token>> texts,
                                    const std::vector<std::vector<float>>& contributions,
                                    const Progress& progress);

struct Spent {
  std::vector<TokenThresholds> thresholds;  // [L]
  std::vector<double> bytes;                // [L] the share of the layer's bytes that they read
};

/// The thresholds of least harm that read at most `bytes`, a share over all layers, for these
/// contributions. Throws OptionError if dropping every neuron would still read more.
Spent spend(const Model& model, const std::vector<LayerHarm>& harm,
            const std::vector<std::vector<float>>& contributions, double bytes);

}  // namespace tda
