#include "backend/backend.h"

#include <tda/error.h>

#include <algorithm>
#include <cmath>
#include <numeric>

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

}  // namespace tda
