// Frequencies of rotary position embedding, on the host, for every backend.
#pragma once

#include <tda/model_config.h>

#include <cstdint>
#include <vector>

namespace tda {

/// Radians per position of each rotated pair, [head_dim / 2]; in float32 step by step as
/// checkpoints were trained with. `sequence_length` matters to Scaling::dynamic alone.
std::vector<float> rope_frequencies(const RopeConfig& rope, std::int64_t head_dim,
                                    std::int64_t sequence_length);

}  // namespace tda
