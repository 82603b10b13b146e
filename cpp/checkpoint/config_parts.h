// The parts of config.json, each read by a file of its own.
#pragma once

#include <tda/model_config.h>

#include <cstdint>
#include <optional>

#include "checkpoint/config_object.h"

namespace tda {

/// What transformers assumes for keys that config.json does not have, and what sets a family apart.
struct Family {
  const char* model_type;
  const char* architecture;
  std::int64_t vocab_size, hidden_size, intermediate_size;
  std::int64_t num_layers, num_heads;
  std::int64_t num_kv_heads;  // 0: num_heads
  std::int64_t head_dim;      // 0: hidden_size / num_heads
  std::int64_t max_position;
  std::optional<Token> bos_token, eos_token;
  /// Reads what depends on the family; sizes are there already.
  void (*read)(const Object& config, ModelConfig& model);
  double rms_norm_eps = 1e-6;
  bool tied_embeddings = false;
};

/// Throws CheckpointError for a family that the engine does not have.
const Family& read_family(const Object& config);

RopeConfig read_rope(const Object& config, double theta, const ModelConfig& model);

struct RopesByLayer {
  RopeConfig full, sliding;
};
RopesByLayer read_ropes_by_layer(const Object& config, double theta, double sliding_theta,
                                 const ModelConfig& model);

}  // namespace tda
