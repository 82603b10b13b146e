// Frequencies of rotary position embedding, on the host, for every backend.
#pragma once

#include <tda/model_config.h>

#include <cstdint>
#include <vector>

namespace tda {

/// Radians per position of each rotated pair, [head_dim / 2]. Every step is in float32, as in the
/// code that checkpoints were trained with. Only dynamic and longrope use `sequence_length`.
std::vector<float> rope_frequencies(const RopeConfig& rope, std::int64_t head_dim,
                                    std::int64_t sequence_length);

/// The one or two RoPEs of a model's layers.
class Ropes {
 public:
  explicit Ropes(const ModelConfig& config);

  std::int64_t count() const { return std::ssize(ropes_); }
  /// Which one a layer has.
  std::int64_t of_layer(std::int64_t layer) const {
    return !layers_.empty() && layers_[static_cast<std::size_t>(layer)] ? 1 : 0;
  }
  /// Whether keys depend on how long the whole text is.
  bool depend_on_length() const;
  /// Whether keys of a text of one length serve one of the other, too. Those of longrope do on one
  /// side of its original length; those of dynamic RoPE are kept as the text grows, as in
  /// transformers.
  bool share_keys(std::int64_t length, std::int64_t other) const;
  const RopeConfig& config(std::int64_t rope) const { return ropes_[rope].config; }
  /// rope_frequencies(), kept where they do not depend on the length.
  std::vector<float> frequencies(std::int64_t rope, std::int64_t sequence_length) const;

 private:
  struct Rope {
    RopeConfig config;
    std::vector<float> frequencies;  // of a sequence of any length, unless they depend on it
  };
  std::int64_t head_dim_;
  std::vector<Rope> ropes_;
  std::vector<bool> layers_;
};

}  // namespace tda
