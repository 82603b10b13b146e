#include "backend/logits.h"

#include <tda/error.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>

namespace tda {

namespace {

/// The larger of `least` and the largest value, or NaN if a value is not finite. Independent chains
/// hide the latency of comparisons: one chain takes 30 microseconds for a vocabulary of 49152.
float largest_of(std::span<const float> values, float least) {
  constexpr std::size_t kChains = 32;
  float most[kChains], zeros[kChains] = {};  // v - v is NaN for infinity and NaN
  std::fill_n(most, kChains, least);
  const auto take = [&](float v, std::size_t chain) {
    most[chain] = v > most[chain] ? v : most[chain];
    zeros[chain] += v - v;
  };
  std::size_t i = 0;
  for (; i + kChains <= values.size(); i += kChains)
    for (std::size_t j = 0; j < kChains; ++j) take(values[i + j], j);
  for (; i < values.size(); ++i) take(values[i], 0);
  return *std::max_element(most, most + kChains) + std::accumulate(zeros, zeros + kChains, 0.0f);
}

[[noreturn]] void refuse(std::span<const float> logits) {
  const auto bad = std::ranges::find_if_not(logits, [](float v) { return std::isfinite(v); });
  throw Error("the model's logits are not finite: found " + std::to_string(*bad) +
              ", expected numbers");
}

}  // namespace

void check_finite(std::span<const float> logits) {
  if (std::isnan(largest_of(logits, 0))) refuse(logits);
}

Token argmax(std::span<const float> logits) {
  constexpr std::size_t kBlock = 1024;
  float largest = logits.front();
  std::size_t where = 0;  // the first block that contains it
  for (std::size_t i = 0; i < logits.size(); i += kBlock) {
    const float most = largest_of(logits.subspan(i, std::min(kBlock, logits.size() - i)), largest);
    if (std::isnan(most)) refuse(logits);
    if (most > largest) where = i;
    largest = most;
  }
  return static_cast<Token>(
      std::find(logits.begin() + static_cast<std::ptrdiff_t>(where), logits.end(), largest) -
      logits.begin());
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
    if (weights[i] == 0) continue;  // never picked, even if rounding leaves `left` too large
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

}  // namespace tda
