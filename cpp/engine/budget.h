// Where a budget of feed-forward bytes is spent best: thresholds for token-scope TDA.
//
// Leaving a neuron out changes the residual stream by its contribution n; computing it at 4 bits
// changes it by an error of e |n|. To second order the harm to the model's predictions (the KL
// divergence from dense) grows with the squares of such changes, by a factor w of the layer's own:
//   dropped: w |n|²        coarse: w e² |n|²        exact: 0
// A coarse neuron costs its high down row, an exact one the three low rows on top. The least harm
// at a given number of bytes is where every layer pays the same harm per byte, lambda:
//   coarse from  |n|² = lambda  high / (w (1 - e²))  on,
//   exact  from  |n|² = lambda 3 low / (w e²)        on.
// w and e are measured: by decoding some text with one layer changed at a time. lambda follows from
// the budget by bisection on what the calibration text's contributions are.
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

/// contributions: [L] |n| of sampled tokens, in any order. texts: at least one of two tokens or
/// more. `progress(done, total)` counts layers and the dense runs.
std::vector<LayerHarm> measure_harm(const std::shared_ptr<const Runtime>& runtime,
                                    std::span<const std::vector<Token>> texts,
                                    const std::vector<std::vector<float>>& contributions,
                                    const Progress& progress);

struct Spent {
  std::vector<TokenThresholds> thresholds;  // [L]
  std::vector<double> bytes;                // [L] share of the layer's bytes that they read
};

/// Thresholds of least harm that read `bytes` (a share, over all layers) of the given
/// contributions. Throws OptionError if not even dropping everything brings the bytes down that
/// far.
Spent spend(const Model& model, const std::vector<LayerHarm>& harm,
            const std::vector<std::vector<float>>& contributions, double bytes);

}  // namespace tda
