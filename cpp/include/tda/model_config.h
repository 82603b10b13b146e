// A checkpoint's config.json in a form independent of the model family.
#pragma once

#include <tda/types.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace [[gnu::visibility("default")]] tda {

enum class Activation { silu, gelu, gelu_tanh, relu };

/// Rotary position embedding (Su et al., arXiv 2104.09864) and its context extensions.
struct RopeConfig {
  enum class Scaling { none, linear, dynamic, llama3, yarn };
  Scaling scaling = Scaling::none;
  double theta = 10000.0;
  double factor = 1.0;                     // of all scalings except `none`
  double low_freq_factor = 1.0;            // llama3
  double high_freq_factor = 4.0;           // llama3
  double beta_fast = 32.0;                 // yarn (Peng et al., arXiv 2309.00071)
  double beta_slow = 1.0;                  // yarn
  bool truncate = true;                    // yarn: round the ramp's ends to whole dimensions
  double attention_factor = 1.0;           // yarn: multiplies cos and sin
  std::int64_t original_max_position = 0;  // dynamic, llama3, yarn
};

struct ModelConfig {
  std::string model_type;              // "llama", "mistral", "qwen2", "qwen3"
  std::int64_t vocab_size = 0;         // V
  std::int64_t hidden_size = 0;        // H
  std::int64_t intermediate_size = 0;  // F, neurons per layer
  std::int64_t num_layers = 0;         // L
  std::int64_t num_heads = 0;          // query heads
  std::int64_t num_kv_heads = 0;       // divides num_heads (grouped-query attention)
  std::int64_t head_dim = 0;           // even
  std::int64_t max_position = 0;       // max_position_embeddings
  double rms_norm_eps = 1e-6;
  Activation activation = Activation::silu;
  RopeConfig rope;
  bool tied_embeddings = false;  // the output head is the embedding
  bool qkv_bias = false;
  bool output_bias = false;  // on the attention's output projection
  bool qk_norm = false;      // RMSNorm over each head of q and k (Qwen3)
  /// Per layer: how many of the latest positions a token sees, including its own; 0: all.
  std::vector<std::int64_t> sliding_window;
  std::optional<Token> bos_token;
  /// Every id that ends a text: those of generation_config.json, or of config.json without one.
  std::vector<Token> eos_tokens;

  std::int64_t q_size() const { return num_heads * head_dim; }
  std::int64_t kv_size() const { return num_kv_heads * head_dim; }
};

}  // namespace tda
