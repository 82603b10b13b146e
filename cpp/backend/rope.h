// Frequencies of rotary position embedding, on the host, for every backend.
#pragma once

#include <tda/model_config.h>

#include <cstdint>
#include <vector>

namespace tda {

/// Radians per position of each rotated pair, [head_dim / 2]. Every step is in float32, as in the
/// code that checkpoints were trained with. Only Scaling::dynamic uses `sequence_length`.
std::vector<float> rope_frequencies(const RopeConfig& rope, std::int64_t head_dim,
                                    std::int64_t sequence_length);

}  // namespace tda
