#include "backend/backend.h"

#include <tda/error.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "backend/parallel.h"

namespace tda {

namespace {

/// The larger of `least` and the largest value, NaNs apart: in chains beside each other, for one
/// comparison waits for the other (a vocabulary of 49152: 30 microseconds in one chain).
float largest_of(std::span<const float> values, float least) {
  constexpr std::size_t kChains = 32;
  float most[kChains];
  std::fill_n(most, kChains, least);
  std::size_t i = 0;
  for (; i + kChains <= values.size(); i += kChains)
    for (std::size_t j = 0; j < kChains; ++j)
      most[j] = values[i + j] > most[j] ? values[i + j] : most[j];
  for (; i < values.size(); ++i) most[0] = values[i] > most[0] ? values[i] : most[0];
  return *std::max_element(most, most + kChains);
}

}  // namespace

Token argmax(std::span<const float> logits) {
  constexpr std::size_t kSome = 1024;
  float largest = logits.front();
  std::size_t where = 0;  // the first ones that have it
  for (std::size_t i = 0; i < logits.size(); i += kSome) {
    const float most = largest_of(logits.subspan(i, std::min(kSome, logits.size() - i)), largest);
    if (most > largest) where = i;
    largest = most;
  }
  check_finite(largest, logits.front());
  return static_cast<Token>(
      std::find(logits.begin() + static_cast<std::ptrdiff_t>(where), logits.end(), largest) -
      logits.begin());
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

void Backend::check_mask(std::int64_t layer, std::span<const std::int32_t> neurons) const {
  const std::int64_t size = model().config.intermediate_size;
  for (std::size_t i = 0; i < neurons.size(); ++i)
    if (neurons[i] < 0 || neurons[i] >= size || (i > 0 && neurons[i] <= neurons[i - 1]))
      throw OptionError("mask of layer " + std::to_string(layer) + ": neuron " +
                        std::to_string(neurons[i]) + " at index " + std::to_string(i) +
                        ", expected strictly ascending ids from 0 to " + std::to_string(size - 1));
}

void Backend::check_thresholds(std::int64_t layer, const TokenThresholds& thresholds) const {
  const auto [exact, coarse, by_gate] = thresholds;
  const std::string where = "thresholds of layer " + std::to_string(layer) + ": exact " +
                            std::to_string(exact) + ", coarse " + std::to_string(coarse);
  if (!(coarse >= 0 && exact >= coarse))
    throw OptionError(where + ", expected 0 <= coarse <= exact");
  if (exact > coarse && (by_gate || !model().layers[layer].gate.low))
    throw OptionError(where + (by_gate ? " with a gate estimate" : " with weights of one plane") +
                      ", expected the same, since no neuron can be coarse");
}

}  // namespace tda
