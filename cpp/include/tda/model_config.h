// A checkpoint's config.json in a form independent of the model family.
#pragma once

#include <tda/types.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace [[gnu::visibility("default")]] tda {

enum class Activation { silu, gelu, gelu_tanh, relu };

/// Rotary position embedding (Su et al., arXiv 2104.09864) and its context extensions.
struct RopeConfig {
  enum class Scaling { none, linear, dynamic, llama3, yarn, longrope };
  Scaling scaling = Scaling::none;
  double theta = 10000.0;
  double factor = 1.0;                     // of all scalings except `none`
  double low_freq_factor = 1.0;            // llama3
  double high_freq_factor = 4.0;           // llama3
  double beta_fast = 32.0;                 // yarn (Peng et al., arXiv 2309.00071)
  double beta_slow = 1.0;                  // yarn
  bool truncate = true;                    // yarn: round the ramp's ends to whole dimensions
  double attention_factor = 1.0;           // yarn, longrope: multiplies cos and sin
  std::int64_t original_max_position = 0;  // dynamic, llama3, yarn, longrope
  /// longrope (Ding et al., arXiv 2402.13753): what wavelengths are multiplied by, [head_dim / 2],
  /// in texts of up to original_max_position tokens, and in longer ones.
  std::vector<float> short_factor, long_factor;
  bool off = false;  // no rotation at all
};

struct ModelConfig {
  std::string model_type;              // "llama", "gemma3_text", ...
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
  std::optional<RopeConfig> other_rope;  // of some layers, if they differ from the rest
  std::vector<bool> uses_other_rope;     // [L]; empty without other_rope
  bool tied_embeddings = false;          // the output head is the embedding
  bool fused_matrices = false;           // q, k and v are one tensor, gate and up another (Phi-3)
  bool qkv_bias = false;
  bool output_bias = false;           // on the attention's output projection
  bool qk_norm = false;               // RMSNorm over each head of q and k (Qwen3, Gemma 3)
  bool qk_norm_of_all_heads = false;  // or over all heads together (OLMo 2)
  bool pre_norms = true;              // RMSNorm before attention and feed-forward
  bool post_norms = false;            // RMSNorm behind them, before the residual is added
  float norm_offset = 0;              // added to the weights of every norm: 1 in Gemma
  float embedding_scale = 1;          // of the embeddings, where they enter the residual stream
  float embedding_scale_bf16 = 1;     // the same unless weights are f32
  float residual_scale = 1;           // of what attention and feed-forward add (Granite)
  float logit_scale = 1;              // of the logits (Granite)
  std::optional<float> score_scale;   // of q k before softmax; 1 / sqrt(head_dim) without
  float score_cap = 0;                // soft-capping c tanh(s / c) of scores, behind their scale
  float logit_cap = 0;                // the same of logits (Gemma 2); 0: none
  /// Per layer: how many of the latest positions a token sees, including its own; 0: all.
  std::vector<std::int64_t> sliding_window;
  std::optional<Token> bos_token;
  /// Every id that ends a text: those of generation_config.json, or of config.json without one.
  std::vector<Token> eos_tokens;

  std::int64_t q_size() const { return num_heads * head_dim; }
  std::int64_t kv_size() const { return num_kv_heads * head_dim; }
  float attention_scale() const {
    return score_scale ? *score_scale : 1.0f / std::sqrt(static_cast<float>(head_dim));
  }
};

}  // namespace tda
