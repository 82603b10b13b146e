#include "backend/backend.h"

#include <tda/error.h>

#include <algorithm>
#include <cmath>

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

}  // namespace tda
