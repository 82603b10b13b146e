#include "cpu/layer_inputs.h"

#include <algorithm>
#include <numeric>

namespace tda {

LayerInputs::LayerInputs(std::shared_ptr<const Model> model, int threads,
                         std::span<const std::vector<Token>> texts)
    : backend_(std::move(model), threads),
      texts_(texts),
      state_(backend_.new_state(kMostTokens, KvFormat::automatic)),
      x_(texts.size()) {}

void LayerInputs::run_layer(std::int64_t layer, const Take& take) {
  CpuState& state = CpuState::of(*state_);
  std::vector<std::int64_t> all(kMostTokens);
  std::iota(all.begin(), all.end(), 0);
  for (std::size_t i = 0; i < texts_.size(); ++i) {
    const Tokens tokens = texts_[i];
    Step step;
    step.tokens = tokens;
    step.sequence_length = std::ssize(tokens);
    step.samples = std::span(all).first(tokens.size());
    backend_.reserve_samples(state, 0);
    backend_.begin(state, step);
    if (layer == 0)
      backend_.embed(state);
    else
      std::ranges::copy(x_[i], state.x.data());
    backend_.qkv(state, layer);
    backend_.attention(state, layer);
    backend_.attention_out(state, layer);
    backend_.ffn(state, layer);
    x_[i].assign(state.x.data(),
                 state.x.data() + state.layout.lanes() * backend_.model().config.hidden_size);
    const CpuState::Layer& own = state.layers[layer];
    for (const Product product : {Product::qkv, Product::output, Product::gate_up})
      take(product, own.input_samples[static_cast<int>(product)]);
    take(Product::down, own.samples);
  }
}

}  // namespace tda
