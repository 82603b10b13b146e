// Scales that make the channels of int8 keys alike.
#pragma once

#include <vector>

#include "weights/model.h"

namespace tda {

/// Keys of some models have channels that are tens of times as large as the others, by their bias
/// (Qwen2) or by the norm of keys (Qwen3). These would leave the others of their group few of the 8
/// bits. So each channel of a key is divided by its usual size before it is stored, and that of
/// the queries multiplied by it, which leaves the scores as they are: the sizes are powers of two,
/// and both channels of a pair that RoPE rotates have the same.
struct KeyScales {
  std::vector<float> queries, keys;  // [kv_heads, head_dim] factors; empty: all are 1
};

/// For a layer. Without bias and norm of keys nothing tells the channels apart.
KeyScales key_scales(const ModelConfig& config, const LayerWeights& weights);

}  // namespace tda
