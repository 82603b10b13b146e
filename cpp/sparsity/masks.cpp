#include <tda/error.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "sparsity/sparsity.h"

namespace tda {

std::vector<float> estimates_of(std::vector<float> v, const float* w, std::int64_t neurons) {
  for (std::size_t i = 0; i < v.size(); ++i)
    v[i] = std::abs(v[i]) * (w ? w[i % static_cast<std::size_t>(neurons)] : 1.0f);
  return v;
}

std::int64_t selected_bytes(Estimate estimate, const Matrix& gate, std::int64_t considered,
                            std::int64_t selected) {
  const bool up_of_all = !by_gate(estimate);
  return (considered + (up_of_all ? considered : selected) + selected) * gate.row_bytes();
}

std::vector<float> relative_magnitudes(std::span<const double> sums, double tokens) {
  std::vector<float> scores(sums.size());
  for (std::size_t j = 0; j < sums.size(); ++j) {
    // NaN would be neither above nor below any threshold.
    if (!std::isfinite(sums[j])) {
      throw Error("the statistic of feed-forward neuron " + std::to_string(j) + " is " +
                  std::to_string(sums[j]) + ", expected a finite number: its activations overflow");
    }
    scores[j] = static_cast<float>(std::sqrt(sums[j] / tokens));
  }
  return scores;
}

std::vector<float> relative_magnitudes(std::vector<double> sums, double tokens,
                                       std::span<const float> prior) {
  for (std::size_t j = 0; j < sums.size(); ++j)
    sums[j] += kPriorTokens * static_cast<double>(prior[j]);
  return relative_magnitudes(sums, tokens + kPriorTokens);
}

std::vector<std::int32_t> mask_at_least(std::span<const float> scores, float threshold) {
  std::vector<std::int32_t> kept;
  for (std::size_t j = 0; j < scores.size(); ++j) {
    if (scores[j] >= threshold) kept.push_back(static_cast<std::int32_t>(j));
  }
  return kept;
}

std::int64_t share_count(double active, std::int64_t neurons) {
  return std::max<std::int64_t>(1, std::llround(active * static_cast<double>(neurons)));
}

std::vector<std::int32_t> mask_largest(std::span<const float> scores, std::int64_t count) {
  std::vector<float> ordered(scores.begin(), scores.end());
  const auto last = ordered.begin() + (count - 1);
  std::nth_element(ordered.begin(), last, ordered.end(), std::greater<>());
  const float least = *last;
  std::int64_t ties = count - std::ranges::count_if(scores, [&](float s) { return s > least; });
  std::vector<std::int32_t> kept;
  kept.reserve(count);
  for (std::size_t j = 0; j < scores.size(); ++j)
    if (scores[j] > least || (scores[j] == least && ties-- > 0))
      kept.push_back(static_cast<std::int32_t>(j));
  return kept;
}

std::vector<std::int32_t> mask_top_share(std::span<const float> scores, double active) {
  if (scores.empty()) return {};
  return mask_largest(scores, share_count(active, std::ssize(scores)));
}

float threshold_of_share(std::span<float> values, double share) {
  const auto count = std::llround(share * static_cast<double>(values.size()));
  if (count >= std::ssize(values)) return 0.0f;  // everything passes
  if (count < 1) return std::numeric_limits<float>::infinity();
  const auto nth = values.begin() + (count - 1);
  std::nth_element(values.begin(), nth, values.end(), std::greater<>());
  // What contributes nothing (behind ReLU, most) does not pass with the others that tie at 0.
  return std::max(*nth, std::numeric_limits<float>::min());
}

}  // namespace tda
