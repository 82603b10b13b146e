#include <tda/error.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

#include "base/text_of.h"
#include "sparsity/sparsity.h"

namespace tda {

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

std::vector<std::int32_t> mask_top_share(std::span<const float> scores, double active) {
  if (scores.empty()) return {};
  const std::int64_t count = share_count(active, std::ssize(scores));
  std::vector<std::int32_t> kept(scores.size());
  std::iota(kept.begin(), kept.end(), 0);
  std::nth_element(kept.begin(), kept.begin() + (count - 1), kept.end(),
                   [&](std::int32_t a, std::int32_t b) {
                     return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
                   });
  kept.resize(count);
  std::sort(kept.begin(), kept.end());
  return kept;
}

TokenThresholdPair thresholds_of_shares(std::span<float> estimates, double exact, double coarse) {
  const auto smallest_of_top = [&](double share) {
    const auto count = std::llround(share * static_cast<double>(estimates.size()));
    if (count >= std::ssize(estimates)) return 0.0f;  // everything passes
    if (count < 1) return std::numeric_limits<float>::infinity();
    const auto nth = estimates.begin() + (count - 1);
    std::nth_element(estimates.begin(), nth, estimates.end(), std::greater<>());
    return *nth;
  };
  TokenThresholdPair result;
  result.exact = smallest_of_top(exact);
  result.coarse = coarse > 0 ? smallest_of_top(exact + coarse) : result.exact;
  return result;
}

void TdaOptions::validate() const {
  const bool token = scope == "token";
  if (!token && scope != "sequence") {
    throw OptionError("tda scope \"" + scope + "\": expected \"sequence\" or \"token\"");
  }
  if (estimate != "contribution" && estimate != (token ? "gate" : "hidden")) {
    throw OptionError("tda estimate \"" + estimate + "\" with scope \"" + scope +
                      "\": expected \"contribution\" or \"" + (token ? "gate" : "hidden") + "\"");
  }
  std::vector<std::string> given;
  if (error) given.push_back("error");
  if (active) given.push_back("active");
  if (thresholds) given.push_back("thresholds");
  if (given.size() != 1) {
    std::string found = given.empty() ? "none" : given[0];
    for (std::size_t i = 1; i < given.size(); ++i) found += " and " + given[i];
    throw OptionError("tda: found " + found +
                      ", expected exactly one of error, active and thresholds");
  }
  // Written so that NaN, for which every comparison is false, is out of range.
  const auto check = [](bool in_range, const char* name, double found, const char* expected) {
    if (in_range) return;
    throw OptionError(std::string("tda ") + name + " " + text_of(found) + ": expected " + expected);
  };
  if (error) check(*error >= 0 && *error < 1, "error", *error, "0 or more, less than 1");
  if (active) check(*active > 0 && *active <= 1, "active", *active, "more than 0, at most 1");
  check(coarse >= 0 && coarse <= 1, "coarse", coarse, "0 to 1");
  if (coarse > 0 && (!token || !active || estimate != "contribution")) {
    throw OptionError(
        "tda coarse: expected only with scope \"token\", estimate \"contribution\" and active");
  }
  if (active) check(*active + coarse <= 1 + 1e-9, "active + coarse", *active + coarse, "at most 1");
  if (estimate != "contribution" && !active) {
    throw OptionError("tda estimate \"" + estimate + "\": expected with active only");
  }
  if (token && refresh > 0) {
    throw OptionError(
        "tda refresh: expected only with scope \"sequence\", scope \"token\" decides afresh for "
        "every token anyway");
  }
  if (token && compact) {
    throw OptionError(
        "tda compact: expected only with scope \"sequence\", which has a mask to copy");
  }
  check(head >= 0 && head <= 1, "head", head, "0 (all of it exact) to 1");
  check(refresh >= 0, "refresh", static_cast<double>(refresh),
        "0 (never) or a positive number of tokens");
}

}  // namespace tda
