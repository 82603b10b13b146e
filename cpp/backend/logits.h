// What is done with logits once a model has given them: the largest, and a draw by their softmax.
#pragma once

#include <tda/types.h>

#include <cstddef>
#include <span>
#include <vector>

namespace tda {

/// The lowest id among the largest logits. Throws Error if the largest is not finite.
Token argmax(std::span<const float> logits);
/// Its check: a NaN anywhere poisons every layer's sums, so it shows in all logits.
void check_finite(float largest, float first);

/// softmax(logits / temperature), not normalised: the largest logit has 1.
std::vector<double> softmax_weights(std::span<const float> logits, double temperature);
/// Where the running sum of the weights passes the share u in [0, 1) of the whole: what happens as
/// often as its weight says, if u is uniform.
std::size_t pick(std::span<const double> weights, double u);
/// A token of softmax(logits / temperature), picked by u in the order of ids; argmax() at
/// temperature 0. Throws Error as that.
Token draw(std::span<const float> logits, double temperature, double u);

}  // namespace tda
