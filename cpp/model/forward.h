#pragma once

#include "backend/backend.h"

namespace tda {

/// Runs `step` and returns the logits [rows, V] of its last `rows` tokens (0: none).
/// 1 <= T <= backend.max_step(); the result is valid until the state's next step.
std::span<const float> forward(const Backend& backend, State& state, const Step& step,
                               std::int64_t rows);

}  // namespace tda
