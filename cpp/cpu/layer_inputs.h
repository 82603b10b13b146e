// Runs texts through a model layer by layer, all of them through one layer before the next: what
// calibration needs of a layer is then never more than that layer's.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "cpu/cpu_backend.h"

namespace tda {

class LayerInputs {
 public:
  /// model: graded or int4. texts: each of 1 to max_step() tokens of the vocabulary; kept, not
  /// copied
  LayerInputs(std::shared_ptr<const Model> model, int threads,
              std::span<const std::vector<Token>> texts);

  static constexpr std::int64_t kMostTokens = CpuBackend::kMaxStep;  // of a text

  /// Calls take(product, x) with each product's inputs of each text, x: [tokens, inputs].
  using Take = std::function<void(Product, std::span<const float> x)>;
  void run_layer(std::int64_t layer, const Take& take);  // 0, 1, 2, ...

 private:
  CpuBackend backend_;
  std::span<const std::vector<Token>> texts_;
  std::unique_ptr<State> state_;
  std::vector<std::vector<float>> x_;  // of each text, the residual stream before the next layer
};

}  // namespace tda
