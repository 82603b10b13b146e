#include "cpu/key_scales.h"

#include <algorithm>
#include <cmath>

namespace tda {
namespace {

/// How large key channels [kv_heads, head_dim] get before they are rotated.
std::vector<float> channel_sizes(const ModelConfig& config, const LayerWeights& weights) {
  std::vector<float> sizes(config.kv_size());
  for (std::int64_t c = 0; c < config.kv_size(); ++c) {
    if (!weights.k_norm.empty()) {
      sizes[c] = std::abs(weights.k_norm[c % std::ssize(weights.k_norm)]);
      continue;
    }
    // The bias, and three standard deviations for an input whose normed channels are independent.
    const std::int64_t row = config.q_size() + c;
    std::vector<float> values(config.hidden_size);
    read_row(weights.qkv, row, 0, config.hidden_size, values.data());
    double squares = 0;
    for (std::int64_t i = 0; i < config.hidden_size; ++i) {
      const double v = double{values[i]} * weights.attention_norm[weights.qkv.input_of(i)];
      squares += v * v;
    }
    sizes[c] = std::abs(weights.qkv_bias[row]) + 3 * static_cast<float>(std::sqrt(squares));
  }
  return sizes;
}

}  // namespace

KeyScales key_scales(const ModelConfig& config, const LayerWeights& weights) {
  if (weights.k_norm.empty() && weights.qkv_bias.empty()) return {};
  const std::vector<float> sizes = channel_sizes(config, weights);
  KeyScales scales = {std::vector<float>(sizes.size()), std::vector<float>(sizes.size())};
  const std::int64_t half = config.head_dim / 2;
  for (std::int64_t c = 0; c < config.kv_size(); ++c) {
    const std::int64_t in_head = c % config.head_dim, other = in_head < half ? c + half : c - half;
    const double size = std::hypot(sizes[c], sizes[other]);
    // Within what queries and keys can be multiplied by without leaving the range of f32.
    const double power = size > 0 ? std::clamp(std::round(std::log2(size)), -60.0, 60.0) : 0;
    scales.queries[c] = static_cast<float>(std::exp2(power));
    scales.keys[c] = static_cast<float>(std::exp2(-power));
  }
  return scales;
}

}  // namespace tda
