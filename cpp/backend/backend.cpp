#include "backend/backend.h"

#include <tda/error.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "backend/parallel.h"

namespace tda {

Token argmax(std::span<const float> logits) {
  const auto best = std::max_element(logits.begin(), logits.end());
  check_finite(*best, logits.front());
  return static_cast<Token>(best - logits.begin());
}

void check_finite(float largest, float first) {
  if (std::isfinite(largest) && !std::isnan(first)) return;
  throw Error("the model's logits are not finite: found " + std::to_string(largest) +
              ", expected numbers");
}

std::vector<double> softmax_weights(std::span<const float> logits, double temperature) {
  const float largest = *std::max_element(logits.begin(), logits.end());
  std::vector<double> weights;
  weights.reserve(logits.size());
  for (const float logit : logits) weights.push_back(std::exp((logit - largest) / temperature));
  return weights;
}

std::size_t pick(std::span<const double> weights, double u) {
  double left = std::accumulate(weights.begin(), weights.end(), 0.0) * u;
  std::size_t picked = 0;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    if (weights[i] == 0) continue;  // not even where rounding leaves more than there is
    picked = i;
    if (left < weights[i]) break;
    left -= weights[i];
  }
  return picked;
}

Token draw(std::span<const float> logits, double temperature, double u) {
  const Token best = argmax(logits);
  if (temperature == 0) return best;
  return static_cast<Token>(pick(softmax_weights(logits, temperature), u));
}

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

}  // namespace tda
