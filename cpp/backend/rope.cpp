#include "backend/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace tda {
namespace {

constexpr double kTurn = 2 * std::numbers::pi;

/// NTK-aware scaling: the base grows once the sequence is longer than the model was trained for.
double dynamic_base(const RopeConfig& rope, double dim, double sequence_length) {
  const double trained = static_cast<double>(rope.original_max_position);
  const double stretch =
      rope.factor * std::max(sequence_length, trained) / trained - (rope.factor - 1);
  return rope.theta * std::pow(stretch, dim / (dim - 2));
}

/// Llama 3.1: frequencies of long wavelengths are divided by the factor, those of short ones are
/// kept, with a linear ramp between.
float llama3_frequency(const RopeConfig& rope, float frequency) {
  const double trained = static_cast<double>(rope.original_max_position);
  const float factor = static_cast<float>(rope.factor);
  const float wavelength = static_cast<float>(kTurn) / frequency;
  if (wavelength < trained / rope.high_freq_factor) return frequency;
  if (wavelength > trained / rope.low_freq_factor) return frequency / factor;
  const float smooth =
      (static_cast<float>(trained) / wavelength - static_cast<float>(rope.low_freq_factor)) /
      static_cast<float>(rope.high_freq_factor - rope.low_freq_factor);
  return (1 - smooth) * frequency / factor + smooth * frequency;
}

/// YaRN: a linear ramp, from pair `low` to pair `high`, from the original frequencies to those
/// divided by the factor.
struct YarnRamp {
  double low = 0, high = 1;

  float share(std::int64_t pair) const {
    const float start = static_cast<float>(low);
    return std::clamp((static_cast<float>(pair) - start) / static_cast<float>(high - low), 0.0f,
                      1.0f);
  }
};

YarnRamp yarn_ramp(const RopeConfig& rope, double dim) {
  const auto pair_that_turns = [&](double times) {
    const double trained = static_cast<double>(rope.original_max_position);
    return dim * std::log(trained / (times * kTurn)) / (2 * std::log(rope.theta));
  };
  double low = pair_that_turns(rope.beta_fast), high = pair_that_turns(rope.beta_slow);
  if (rope.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, dim - 1);
  return {low, low == high ? high + 0.001 : high};
}

bool depends(const RopeConfig& rope) {
  return rope.scaling == RopeConfig::Scaling::dynamic ||
         rope.scaling == RopeConfig::Scaling::longrope;
}

}  // namespace

std::vector<float> rope_frequencies(const RopeConfig& rope, std::int64_t head_dim,
                                    std::int64_t sequence_length) {
  using Scaling = RopeConfig::Scaling;
  if (rope.off) return std::vector<float>(head_dim / 2);
  const double dim = static_cast<double>(head_dim);
  const float base =
      static_cast<float>(rope.scaling == Scaling::dynamic
                             ? dynamic_base(rope, dim, static_cast<double>(sequence_length))
                             : rope.theta);
  const float factor = static_cast<float>(rope.factor);
  const YarnRamp ramp = rope.scaling == Scaling::yarn ? yarn_ramp(rope, dim) : YarnRamp{};
  std::vector<float> frequencies(head_dim / 2);
  for (std::int64_t i = 0; i < head_dim / 2; ++i) {
    const float power = std::pow(base, static_cast<float>(2 * i) / static_cast<float>(head_dim));
    float frequency = 1.0f / power;
    switch (rope.scaling) {
      case Scaling::none:
      case Scaling::dynamic:
        break;
      case Scaling::linear:
        frequency /= factor;
        break;
      case Scaling::llama3:
        frequency = llama3_frequency(rope, frequency);
        break;
      case Scaling::longrope: {
        const bool is_long = sequence_length > rope.original_max_position;
        frequency = 1.0f / ((is_long ? rope.long_factor : rope.short_factor)[i] * power);
        break;
      }
      case Scaling::yarn: {
        const float kept = 1.0f - ramp.share(i);
        frequency = 1.0f / (factor * power) * (1.0f - kept) + frequency * kept;
        break;
      }
    }
    frequencies[i] = frequency;
  }
  return frequencies;
}

Ropes::Ropes(const ModelConfig& config)
    : head_dim_(config.head_dim), layers_(config.uses_other_rope) {
  ropes_.push_back({config.rope, rope_frequencies(config.rope, head_dim_, 0)});
  if (config.other_rope)
    ropes_.push_back({*config.other_rope, rope_frequencies(*config.other_rope, head_dim_, 0)});
}

bool Ropes::depend_on_length() const {
  return std::ranges::any_of(ropes_, [](const Rope& rope) { return depends(rope.config); });
}

bool Ropes::share_keys(std::int64_t length, std::int64_t other) const {
  return std::ranges::none_of(ropes_, [&](const Rope& rope) {
    const std::int64_t most = rope.config.original_max_position;
    return rope.config.scaling == RopeConfig::Scaling::longrope &&
           (length > most) != (other > most);
  });
}

std::vector<float> Ropes::frequencies(std::int64_t rope, std::int64_t sequence_length) const {
  const auto& [config, kept] = ropes_[rope];
  return depends(config) ? rope_frequencies(config, head_dim_, sequence_length) : kept;
}

}  // namespace tda
