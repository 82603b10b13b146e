// Which neurons a trained predictor chooses for a token.
#include "sparsity/predictor.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/cpu_backend.h"

namespace tda {

std::vector<std::int32_t> CpuBackend::predicted(CpuState& state, std::int64_t layer,
                                                const float* x) const {
  const PredictorWeights::Layer& weights = state.step.predictor->layers[layer];
  const auto product = [&](const Matrix& w, const float* in) {
    std::vector<float> out(w.rows);
    const void* prepared = prepare_each(state, 1, w.format, in, w.cols)[0];
    pool_.run((w.rows + kBlockRows - 1) / kBlockRows, [&](std::int64_t block, int) {
      const std::int64_t first = block * kBlockRows;
      rows(w.format).dot(rows_of(w, first), std::min(kBlockRows, w.rows - first), prepared,
                         out.data() + first, false, {});
    });
    return out;
  };
  std::vector<float> hidden = product(weights.first, x);
  if (!weights.expert_of.empty()) {
    double squares = 0;
    for (std::int64_t i = 0; i < weights.first.cols; ++i) squares += double{x[i]} * x[i];
    const float scale = squares > 0 ? static_cast<float>(1 / std::sqrt(squares)) : 1.0f;
    for (float& value : hidden) value = std::tanh(value * scale);
  }
  return weights.neurons(product(weights.second, hidden.data()), state.step.predicted);
}

}  // namespace tda
