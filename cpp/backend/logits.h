// Operations on a model's logits: the largest one, and drawing a token from their softmax.
#pragma once

#include <tda/types.h>

#include <cstddef>
#include <span>
#include <vector>

namespace tda {

/// Throws Error unless all logits are finite. [V], or those of several tokens
void check_finite(std::span<const float> logits);
/// The lowest id among the largest logits. Throws Error unless all are finite.
Token argmax(std::span<const float> logits);

/// softmax(logits / temperature), not normalised: the weight of the largest logit is 1.
std::vector<double> softmax_weights(std::span<const float> logits, double temperature);
/// The index at which the running sum of the weights passes the share u in [0, 1) of their total.
/// For uniform u each index is drawn with a probability proportional to its weight.
std::size_t pick(std::span<const double> weights, double u);
/// A token drawn from softmax(logits / temperature) by pick(); argmax() at temperature 0. Throws
/// like argmax().
Token draw(std::span<const float> logits, double temperature, double u);

}  // namespace tda
