#include "backend/backend.h"

#include <tda/error.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/parallel.h"

namespace tda {

static std::vector<float> scores_of(const Backend& backend, const State& state,
                                    std::int64_t layer) {
  return relative_magnitudes(backend.statistic(state, layer), backend.gathered(state, layer));
}

std::vector<ThresholdSearch> Backend::search_thresholds(State& state, double target) const {
  std::vector<ThresholdSearch> found(model().layers.size());
  parallel_for(threads(), std::ssize(found), [&](std::int64_t layer) {
    const FfnSample sample = {scores_of(*this, state, layer), samples(state, layer)};
    found[layer] = search_threshold({&sample, 1}, model().layers[layer].down, target);
  });
  return found;
}

void Backend::mask_at_least(State& state, std::span<const float> thresholds) const {
  for (std::int64_t layer = 0; layer < std::ssize(thresholds); ++layer)
    set_mask(state, layer, tda::mask_at_least(scores_of(*this, state, layer), thresholds[layer]));
}

void Backend::mask_top_share(State& state, double active) const {
  for (std::int64_t layer = 0; layer < model().config.num_layers; ++layer)
    set_mask(state, layer, tda::mask_top_share(scores_of(*this, state, layer), active));
}

void Backend::check_mask(std::int64_t layer, std::span<const std::int32_t> neurons) const {
  const std::int64_t size = model().config.intermediate_size;
  if (in_bricks(model().format))
    throw OptionError("mask of layer " + std::to_string(layer) + ": found " +
                      std::string(name_of(model().format)) +
                      " weights, which decide by input, expected others");
  for (std::size_t i = 0; i < neurons.size(); ++i)
    if (neurons[i] < 0 || neurons[i] >= size || (i > 0 && neurons[i] <= neurons[i - 1]))
      throw OptionError("mask of layer " + std::to_string(layer) + ": neuron " +
                        std::to_string(neurons[i]) + " at index " + std::to_string(i) +
                        ", expected strictly ascending ids from 0 to " + std::to_string(size - 1));
}

void Backend::check_threshold(std::int64_t layer, float threshold) const {
  if (!(threshold >= 0))
    throw OptionError("threshold of layer " + std::to_string(layer) + ": found " +
                      std::to_string(threshold) + ", expected 0 or more");
}

}  // namespace tda
