// What sets the families apart: defaults, and keys that only some of them have.
#include <cmath>

#include "base/half.h"
#include "checkpoint/config_parts.h"

namespace tda {
namespace {

using nlohmann::json;

Activation read_activation(const Object& config, const char* key, const char* absent) {
  constexpr std::pair<const char*, Activation> names[] = {
      {"silu", Activation::silu},
      {"swish", Activation::silu},
      {"gelu", Activation::gelu},
      {"gelu_python", Activation::gelu},
      {"gelu_new", Activation::gelu_tanh},
      {"gelu_fast", Activation::gelu_tanh},
      {"gelu_accurate", Activation::gelu_tanh},
      {"gelu_pytorch_tanh", Activation::gelu_tanh},
      {"gelu_python_tanh", Activation::gelu_tanh},
      {"relu", Activation::relu},
  };
  const std::string act = config.text(key).value_or(absent);
  for (const auto& [name, activation] : names)
    if (act == name) return activation;
  config.fail(key, "silu, gelu, gelu_pytorch_tanh, relu or a synonym of these");
}

/// The window of each layer, [L]: by layer_types, or else of the layers that `sliding` names.
/// `window` is 0 where no sliding_window is in use.
std::vector<std::int64_t> read_layer_types(const Object& config, std::int64_t window,
                                           const std::vector<bool>& sliding) {
  std::vector<std::int64_t> result(sliding.size());
  for (std::size_t i = 0; i < result.size(); ++i) result[i] = sliding[i] ? window : 0;
  if (!config.has("layer_types")) return result;

  const json& types = *config.find("layer_types");
  if (!types.is_array() || types.size() != result.size())
    config.fail("layer_types", "an array of " + std::to_string(result.size()) + " names");
  for (std::size_t i = 0; i < result.size(); ++i) {
    const bool slides = types[i] == "sliding_attention";
    if (!slides && types[i] != "full_attention" && types[i] != "attention")
      config.fail("layer_types",
                  "\"full_attention\" or \"sliding_attention\", not " + describe(types[i]));
    if (slides && window == 0)
      config.fail("layer_types", "no \"sliding_attention\" where no sliding_window is in use");
    result[i] = slides ? window : 0;
  }
  return result;
}

std::vector<bool> layers_of(const ModelConfig& model, bool value) {
  return std::vector<bool>(static_cast<std::size_t>(model.num_layers), value);
}

std::int64_t read_window(const Object& config, std::int64_t absent) {
  if (config.is_null("sliding_window")) return 0;
  return config.integer("sliding_window", 1, max_window).value_or(absent);
}

void read_without_window(const Object& config, ModelConfig& model) {
  model.sliding_window = read_layer_types(config, 0, layers_of(model, false));
}

/// Biases of all four projections, or of none.
void read_biases(const Object& config, ModelConfig& model) {
  model.qkv_bias = model.output_bias = config.flag("attention_bias", false);
}

/// What Llama has and most others share. `theta`: RoPE's base.
void read_usual(const Object& config, ModelConfig& model, double theta = 10000) {
  model.activation = read_activation(config, "hidden_act", "silu");
  model.rope = read_rope(config, theta, model);
}

/// Within what gives finite results in f32.
double read_factor(const Object& config, const char* key, double absent) {
  const double factor = config.number(key, any_number).value_or(absent);
  if (!(factor >= 1e-6 && factor <= 1e6)) config.fail(key, "a number from 0.000001 to 1000000");
  return factor;
}

void read_llama(const Object& config, ModelConfig& model) {
  read_usual(config, model);
  read_biases(config, model);
  read_without_window(config, model);
}

void read_mistral(const Object& config, ModelConfig& model) {
  read_usual(config, model);
  const std::int64_t window = read_window(config, 4096);
  model.sliding_window = read_layer_types(config, window, layers_of(model, true));
  if (window != 0 && std::ranges::count(model.sliding_window, 0) != 0)
    config.fail("layer_types", "\"sliding_attention\" throughout, because sliding_window is set");
}

/// Windows of Qwen2 and Qwen3, which are used from one layer on.
void read_qwen(const Object& config, ModelConfig& model) {
  read_usual(config, model);
  const bool used = config.flag("use_sliding_window", false);
  const std::int64_t window = used ? read_window(config, 4096) : 0;
  const std::int64_t first = config.integer("max_window_layers", 0, max_window).value_or(28);
  std::vector<bool> sliding = layers_of(model, false);
  for (std::int64_t i = first; i < model.num_layers; ++i) sliding[i] = true;
  model.sliding_window = read_layer_types(config, window, sliding);
}

void read_qwen2(const Object& config, ModelConfig& model) {
  read_qwen(config, model);
  model.qkv_bias = true;
}

void read_qwen3(const Object& config, ModelConfig& model) {
  read_qwen(config, model);
  read_biases(config, model);
  model.qk_norm = true;
}

/// What Gemma 2 and 3 share: norms whose weights are stored less 1, before and behind attention and
/// feed-forward; embeddings times sqrt(H); layers with a sliding window and, in every `period`th
/// place, without.
void read_gemma(const Object& config, ModelConfig& model, std::int64_t period) {
  model.activation = read_activation(config, "hidden_activation", "gelu_pytorch_tanh");
  if (config.has("use_bidirectional_attention") &&
      config.flag("use_bidirectional_attention", false))
    config.fail("use_bidirectional_attention", "false: every token attends to earlier ones");
  read_biases(config, model);
  model.post_norms = true;
  model.norm_offset = 1;
  model.embedding_scale = std::sqrt(static_cast<float>(model.hidden_size));
  // transformers rounds the factor to the type of the embeddings.
  model.embedding_scale_bf16 = bf16_to_f32(f32_to_bf16(model.embedding_scale));
  model.score_scale =
      static_cast<float>(1 / std::sqrt(read_factor(config, "query_pre_attn_scalar", 256)));

  std::vector<bool> sliding = layers_of(model, true);
  for (std::int64_t i = period - 1; i < model.num_layers; i += period) sliding[i] = false;
  const std::int64_t window = read_window(config, 4096);
  if (window == 0 && !config.has("layer_types"))
    config.fail("sliding_window", "an integer from 1 to " + std::to_string(max_window));
  model.sliding_window = read_layer_types(config, window, sliding);
}

/// Soft-capping of scores and of logits.
void read_gemma2(const Object& config, ModelConfig& model) {
  read_gemma(config, model, 2);
  const auto cap = [&](const char* key, double absent) {
    return config.is_null(key) ? 0.0f : static_cast<float>(read_factor(config, key, absent));
  };
  model.score_cap = cap("attn_logit_softcapping", 50);
  model.logit_cap = cap("final_logit_softcapping", 30);
  model.rope = read_rope(config, 10000, model);
}

/// Norms of each head of q and k; a RoPE of their own for layers with a sliding window.
void read_gemma3(const Object& config, ModelConfig& model) {
  for (const char* key : {"attn_logit_softcapping", "final_logit_softcapping"})
    if (config.has(key)) config.fail(key, "null: soft-capping is not supported for gemma3_text");
  read_gemma(config, model, config.integer("sliding_window_pattern", 1, max_window).value_or(6));
  model.qk_norm = true;
  const RopesByLayer ropes = read_ropes_by_layer(config, 1e6, 1e4, model);
  model.rope = ropes.full;
  model.other_rope = ropes.sliding;
  for (const std::int64_t each : model.sliding_window) model.uses_other_rope.push_back(each > 0);
}

/// Norms behind attention and feed-forward only, and over all heads of q and of k.
void read_olmo2(const Object& config, ModelConfig& model) {
  read_llama(config, model);
  model.pre_norms = false;
  model.post_norms = model.qk_norm_of_all_heads = true;
}

/// Factors where Llama has 1.
void read_granite(const Object& config, ModelConfig& model) {
  read_llama(config, model);
  const auto factor = [&](const char* key) {
    return static_cast<float>(read_factor(config, key, 1));
  };
  model.embedding_scale = model.embedding_scale_bf16 = factor("embedding_multiplier");
  model.residual_scale = factor("residual_multiplier");
  model.score_scale = factor("attention_multiplier");
  model.logit_scale = 1 / factor("logits_scaling");
}

/// Fused matrices.
void read_phi3(const Object& config, ModelConfig& model) {
  read_usual(config, model);
  const bool is_longrope = model.rope.scaling == RopeConfig::Scaling::longrope;
  if (model.rope.scaling != RopeConfig::Scaling::none && !is_longrope)
    config.fail(config.has("rope_scaling") ? "rope_scaling" : "rope_parameters",
                "longrope or no scaling of RoPE");
  // Elsewhere it may be one of RoPE's parameters.
  if (is_longrope && !config.has("original_max_position_embeddings"))
    config.fail("original_max_position_embeddings", "an integer");
  model.fused_matrices = true;
  model.sliding_window = read_layer_types(config, read_window(config, 0), layers_of(model, true));
}

/// Some layers have no RoPE.
void read_smollm3(const Object& config, ModelConfig& model) {
  read_usual(config, model, 2e6);
  read_biases(config, model);
  if (config.flag("use_sliding_window", false))
    config.fail("use_sliding_window", "false: windows are not supported for smollm3");
  read_without_window(config, model);
  model.other_rope = RopeConfig();
  model.other_rope->off = true;
  const std::int64_t period = config.integer("no_rope_layer_interval", 1, max_window).value_or(4);
  const auto count = static_cast<std::size_t>(model.num_layers);
  if (!config.has("no_rope_layers")) {
    for (std::int64_t i = 1; i <= model.num_layers; ++i)
      model.uses_other_rope.push_back(i % period == 0);
    return;
  }
  const json& rotated = *config.find("no_rope_layers");  // 1: with RoPE
  if (!rotated.is_array() || rotated.size() < count)
    config.fail("no_rope_layers", "an array of at least " + std::to_string(count) + " of 0 and 1");
  for (std::size_t i = 0; i < count; ++i) {
    if (rotated[i] != 0 && rotated[i] != 1)
      config.fail("no_rope_layers", "0 and 1, not " + describe(rotated[i]));
    model.uses_other_rope.push_back(rotated[i] == 0);
  }
}

// clang-format off
constexpr Family families[] = {
    {"llama", "LlamaForCausalLM", 32000, 4096, 11008, 32, 32, 0, 0, 2048, 1, 2, read_llama},
    {"mistral", "MistralForCausalLM", 32000, 4096, 14336, 32, 32, 8, 0, 131072, 1, 2, read_mistral},
    {"qwen2", "Qwen2ForCausalLM", 151936, 4096, 22016, 32, 32, 32, 0, 32768, {}, {}, read_qwen2},
    {"qwen3", "Qwen3ForCausalLM", 151936, 4096, 22016, 32, 32, 32, 128, 32768, {}, {}, read_qwen3},
    {"gemma2", "Gemma2ForCausalLM", 256000, 2304, 9216, 26, 8, 4, 256, 8192, 2, 1, read_gemma2,
     1e-6, true},
    {"gemma3_text", "Gemma3ForCausalLM", 262208, 2304, 9216, 26, 8, 4, 256, 131072, 2, 1,
     read_gemma3, 1e-6, true},
    {"olmo2", "Olmo2ForCausalLM", 50304, 4096, 11008, 32, 32, 0, 0, 2048, {}, 50279, read_olmo2,
     1e-5},
    {"granite", "GraniteForCausalLM", 32000, 4096, 11008, 32, 32, 0, 0, 2048, 1, 2, read_granite},
    {"phi3", "Phi3ForCausalLM", 32064, 3072, 8192, 32, 32, 0, 0, 4096, 1, 32000, read_phi3, 1e-5},
    {"smollm3", "SmolLM3ForCausalLM", 128256, 2048, 11008, 36, 16, 4, 0, 32768, 128000, 128001,
     read_smollm3, 1e-6, true},
};
// clang-format on

}  // namespace

const Family& read_family(const Object& config) {
  const std::string type = config.text("model_type").value_or("");
  std::string expected;
  for (const Family& family : families) {
    expected += (expected.empty()                    ? "\""
                 : &family == std::end(families) - 1 ? " or \""
                                                     : ", \"") +
                std::string(family.model_type) + "\"";
    if (type != family.model_type) continue;
    if (config.has("architectures") &&
        *config.find("architectures") != json::array({family.architecture}))
      config.fail("architectures", std::string("[\"") + family.architecture + "\"]");
    return family;
  }
  config.fail("model_type", expected);
}

}  // namespace tda
