// TDA's arithmetic: statistics -> thresholds -> masks. Pure functions on host memory. The method is
// described in <tda/sparsity.h>.
#pragma once

#include <tda/sparsity.h>

#include <cstdint>
#include <span>
#include <vector>

#include "weights/model.h"

namespace tda {

// What an Estimate means. Neuron j is judged by |v[j]| * w[j]:
//                 v           w
//   contribution  h           ||down[j]||
//   hidden        h           1
//   gate          act(gate)   1            known before up is read
// The statistic is of h * w, samples are v, and a threshold on a token is compared with |v| * w.

/// Whether v is act(gate), so that up is read for the selected neurons alone.
inline bool by_gate(Estimate estimate) { return estimate == Estimate::gate; }

/// w, given ||down[j]||; null: all 1
inline const float* estimate_weights(Estimate estimate, const float* lengths) {
  return estimate == Estimate::contribution ? lengths : nullptr;
}

/// |v| * w, [T, F]. v: [T, F]; w: [F] or null
std::vector<float> estimates_of(std::vector<float> v, const float* w, std::int64_t neurons);

/// Bytes of weights read for `considered` neurons of which so many are selected. gate: its rows are
/// as long as those of up and down.
std::int64_t selected_bytes(Estimate, const Matrix& gate, std::int64_t considered,
                            std::int64_t selected);

/// R[j] = sqrt(sums[j] / tokens), [F]. tokens > 0.
std::vector<float> relative_magnitudes(std::span<const double> sums, double tokens);

/// How many tokens of a prompt a prior weighs as much as.
inline constexpr double kPriorTokens = 512;

/// The same joined with R² of other text: R²[j] = (sums[j] + kPriorTokens prior[j]) /
/// (tokens + kPriorTokens), [F].
std::vector<float> relative_magnitudes(std::vector<double> sums, double tokens,
                                       std::span<const float> prior);

/// Ascending ids of the neurons with scores[j] >= threshold.
std::vector<std::int32_t> mask_at_least(std::span<const float> scores, float threshold);

/// round(active * neurons), at least 1 of them.
std::int64_t share_count(double active, std::int64_t neurons);

/// Ascending ids of the `count` largest scores, 1 <= count <= F; of equal scores the lower id stays.
std::vector<std::int32_t> mask_largest(std::span<const float> scores, std::int64_t count);

/// The same for share_count(active, F).
std::vector<std::int32_t> mask_top_share(std::span<const float> scores, double active);

/// The threshold that the share `share` of the values reaches; 0 for all of them, infinity for none.
/// values: not negative, in any order; gets reordered.
float threshold_of_share(std::span<float> values, double share);

/// What one layer computed for a calibration text or prompt.
struct FfnSample {
  std::vector<float> scores;  // [F] R over the whole text
  std::vector<float> h;       // [T, F] of the tokens on which CETT is measured
};

/// Mean over all tokens of all samples of
///   ||sum_{j: scores[j] < threshold} h[t,j] down[j]|| / ||sum_j h[t,j] down[j]||
/// (0 for a token whose FFN is zero). down: [F, H].
double cett(std::span<const FfnSample> samples, const Matrix& down, float threshold);

struct ThresholdSearch {
  float threshold = 0;  // 0 keeps every neuron
  double error = 0;     // cett at the threshold
};

/// Bisection over the samples' pooled scores for the largest threshold with cett <= target, 0 <=
/// target < 1. CETT need not be monotone in the threshold: the result's own CETT was computed and
/// meets the target, the next larger score's exceeds it. Target 0 gives threshold 0.
ThresholdSearch search_threshold(std::span<const FfnSample> samples, const Matrix& down,
                                 double target);

/// The same for a threshold on each token's own estimates. h, estimates: [T, F].
ThresholdSearch search_token_threshold(std::span<const float> h, std::span<const float> estimates,
                                       const Matrix& down, double target);

}  // namespace tda
