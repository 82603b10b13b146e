// What the keys of a GGUF model mean, as in llama.cpp: keys -> config.json.
#include <tda/error.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <utility>

#include "base/json.h"
#include "checkpoint/gguf_keys.h"

namespace tda {
namespace {

using nlohmann::json;

constexpr std::int64_t kMostLayers = 4096;  // as parse_config allows

// What Llama 3.1 and later state in config.json and GGUF doesn't keep.
constexpr double kLowFrequency = 1, kHighFrequency = 4, kOriginalContext = 8192;

/// Keys of features that the engine doesn't have, with the values that leave the feature off.
const std::vector<std::pair<const char*, json>>& features_off() {
  static const std::vector<std::pair<const char*, json>> off = {
      {"@.attention.causal", json::array({true})},
      {"@.attention.clamp_kqv", json::array({0})},
      {"@.attention.max_alibi_bias", json::array({0})},
      {"@.attention.temperature_scale", json::array({0})},
      {"@.logit_scale", json::array({0, 1})},
      {"@.residual_scale", json::array({0, 1})},
      {"@.embedding_scale", json::array({0, 1})},
      {"@.expert_count", json::array({0})},
      {"@.expert_used_count", json::array({0})},
      {"@.nextn_predict_layers", json::array({0})},
      {"@.use_parallel_residual", json::array({false})},
      {"@.rope.scaling.alpha", json::array({0, 1})},
      {"@.rope.scaling.yarn_log_multiplier", json::array({0})},
      {"@.rope.scaling.yarn_attn_factor", json::array({1})},
      // Neighbouring rows rotate together.
      {"@.tensor_data_layout", json::array({"Meta AI original pth"})},
  };
  return off;
}

struct Gemma {
  const char *architecture, *model_type, *class_name;
  std::int64_t window;  // of a file that does not say
  std::int64_t period;  // of layers, the last of which has no sliding window
  /// Of the model whose attention scale is that of hidden / heads instead of the head's size.
  std::int64_t layers_of_27b;
};
constexpr Gemma gemmas[] = {
    {"gemma2", "gemma2", "Gemma2ForCausalLM", 4096, 2, 46},
    {"gemma3", "gemma3_text", "Gemma3ForCausalLM", 0, 6, 62},
};
constexpr const char* kScoreCap = "@.attn_logit_softcapping";
constexpr const char* kLogitCap = "@.final_logit_softcapping";

/// rope_scaling with the parameters that give these divisors of the rotary frequencies.
json llama3_scaling(const TensorView& tensor, std::int64_t head_dim, double theta) {
  std::vector<std::byte> data(static_cast<std::size_t>(tensor.bytes));
  tensor.read(0, tensor.bytes, data.data());
  std::vector<float> divisors(static_cast<std::size_t>(tensor.shape.back()));
  if (tensor.shape.size() == 1)
    dequantize(tensor.dtype, data.data(), std::ssize(divisors), divisors.data());
  const float factor = *std::ranges::max_element(divisors);
  bool same = std::ssize(divisors) == head_dim / 2 && tensor.shape.size() == 1;
  for (std::int64_t i = 0; same && i < head_dim / 2; ++i) {
    const double wavelength =
        2 * std::numbers::pi *
        std::pow(theta, 2 * static_cast<double>(i) / static_cast<double>(head_dim));
    const double share =
        (kOriginalContext / wavelength - kLowFrequency) / (kHighFrequency - kLowFrequency);
    const double smooth = std::clamp(share, 0.0, 1.0);
    const double expected = 1 / ((1 - smooth) / factor + smooth);
    same = std::abs(divisors[i] - expected) <= 1e-4 * std::abs(expected);
  }
  if (!same)
    throw CheckpointError(tensor.file->name() + ": tensor \"" + kRopeFactors + "\" of shape " +
                          json(tensor.shape).dump() + " and at most " + describe(factor) +
                          " holds other values than Llama 3's, expected the divisors that follow " +
                          "from factor, theta and a context of 8192");
  return {{"rope_type", "llama3"},
          {"factor", factor},
          {"low_freq_factor", kLowFrequency},
          {"high_freq_factor", kHighFrequency},
          {"original_max_position_embeddings", static_cast<std::int64_t>(kOriginalContext)}};
}

/// config.json's rope_scaling, null for none.
json rope_scaling(GgufKeys& keys, const TensorMap& stored, const json& config) {
  const std::string kind = keys.text("@.rope.scaling.type", "linear");
  if (kind != "none" && kind != "linear" && kind != "yarn")
    keys.fail("@.rope.scaling.type", kind, "none, linear or yarn");
  const double older = keys.number("@.rope.scale_linear", 0);
  double factor = keys.number("@.rope.scaling.factor", older);
  if (factor < 0) keys.fail("@.rope.scaling.factor", factor, "a number above 0");
  if (kind == "none" || factor == 0) factor = 1;  // 0, too, means none
  const bool yarn = kind == "yarn";
  const char* const used = yarn ? "with yarn" : "without yarn";
  keys.expect("@.rope.scaling.yarn_ext_factor", yarn ? json::array({-1, 1}) : json::array({-1, 0}),
              used);
  const double attention = keys.number("@.rope.scaling.attn_factor", 1);
  if (!yarn || factor == 1) keys.expect("@.rope.scaling.attn_factor", json::array({1}), used);
  const auto factors = stored.find(kRopeFactors);
  if (factors != stored.end() && keys.architecture() == "llama") {
    if (factor != 1)
      keys.fail("@.rope.scaling.factor", factor, std::string("none beside ") + kRopeFactors);
    return llama3_scaling(factors->second, config.at("head_dim").get<std::int64_t>(),
                          config.at("rope_theta").get<double>());
  }
  if (factor == 1) return nullptr;
  if (!yarn) return {{"rope_type", "linear"}, {"factor", factor}};
  json rope = {{"rope_type", "yarn"},
               {"factor", factor},
               {"original_max_position_embeddings",
                keys.integer("@.rope.scaling.original_context_length",
                             config.at("max_position_embeddings").get<std::int64_t>())},
               {"beta_fast", keys.number("@.rope.scaling.yarn_beta_fast", 32)},
               {"beta_slow", keys.number("@.rope.scaling.yarn_beta_slow", 1)}};
  if (attention != 1)  // on top of what YaRN itself multiplies cos and sin by
    rope["attention_factor"] = attention * (1 + 0.1 * std::log(std::max(factor, 1.0)));
  return rope;
}

/// Of scores before softmax; 0 stands for the usual one.
void check_attention_scale(GgufKeys& keys, std::int64_t head_dim) {
  const double scale = keys.number("@.attention.scale", 0);
  const double usual = head_dim > 0 ? 1 / std::sqrt(static_cast<double>(head_dim)) : 0;
  if (scale != 0 && !(std::abs(scale - usual) <= 1e-6 * usual))
    keys.fail("@.attention.scale", scale,
              "1 / sqrt(" + std::to_string(head_dim) + ") = " + std::to_string(usual));
}

/// config.json of Gemma 2 or 3, from what it has in common with other models.
json gemma_config(GgufKeys& keys, const Gemma& gemma, json config) {
  const std::int64_t layers = config["num_hidden_layers"], heads = config["num_attention_heads"];
  const std::int64_t window = keys.integer("@.attention.sliding_window", gemma.window);
  const std::int64_t period = keys.integer("@.attention.sliding_window_pattern", gemma.period);
  if (window < 0) keys.fail("@.attention.sliding_window", window, "0 or more");
  if (period < 0) keys.fail("@.attention.sliding_window_pattern", period, "0 or more");
  if (layers < 1 || layers > kMostLayers)
    keys.fail("@.block_count", layers, "1 to " + std::to_string(kMostLayers));
  json types = json::array();
  for (std::int64_t i = 1; i <= layers; ++i) {
    const bool slides = window > 0 && (period == 0 || i % period != 0);
    types.push_back(slides ? "sliding_attention" : "full_attention");
  }
  config["architectures"] = {gemma.class_name};
  config["model_type"] = gemma.model_type;
  config.erase("hidden_act");
  config["hidden_activation"] = "gelu_pytorch_tanh";
  config["query_pre_attn_scalar"] = layers == gemma.layers_of_27b
                                        ? json(config["hidden_size"].get<std::int64_t>() / heads)
                                        : config["head_dim"];
  config["sliding_window"] = window > 0 ? json(window) : json();
  config["layer_types"] = types;
  if (keys.architecture() == "gemma2") {
    config["attn_logit_softcapping"] = keys.number(kScoreCap, 50);
    config["final_logit_softcapping"] = keys.number(kLogitCap, 30);
    keys.expect("@.rope.freq_base_swa", json::array({config["rope_theta"]}));
  } else {
    config["rope_local_base_freq"] = keys.number("@.rope.freq_base_swa", 10000);
  }
  return config;
}

}  // namespace

json gguf_config(GgufKeys& keys, const TensorMap& stored) {
  for (const auto& [key, values] : features_off()) keys.expect(key, values);
  if (keys.architecture() != "gemma2")
    for (const char* const cap : {kScoreCap, kLogitCap}) keys.expect(cap, json::array({0}));
  const std::int64_t layers = keys.integer("@.block_count");
  const std::int64_t hidden = keys.integer("@.embedding_length");
  const std::int64_t heads = keys.integer_of_layers("@.attention.head_count", layers);
  if (hidden < 1) keys.fail("@.embedding_length", hidden, "1 or more");
  if (heads < 1) keys.fail("@.attention.head_count", heads, "1 or more");
  const std::int64_t head_dim = keys.integer("@.attention.key_length", hidden / heads);
  const std::int64_t vocabulary = stored.at("token_embd.weight").shape[0];
  for (const auto& [key, value] : std::initializer_list<std::pair<const char*, std::int64_t>>{
           {"@.attention.value_length", head_dim},
           {"@.attention.key_length_swa", head_dim},
           {"@.attention.value_length_swa", head_dim},
           {"@.rope.dimension_count", head_dim},
           {"@.rope.dimension_count_swa", head_dim},
           {"@.embedding_length_out", hidden},
           {"@.vocab_size", vocabulary}})
    keys.expect(key, json::array({value}));
  check_attention_scale(keys, head_dim);
  const double base = keys.number("@.rope.freq_base", 10000);
  json config = {
      {"hidden_size", hidden},
      {"intermediate_size", keys.integer_of_layers("@.feed_forward_length", layers)},
      {"num_hidden_layers", layers},
      {"num_attention_heads", heads},
      {"num_key_value_heads", keys.integer_of_layers("@.attention.head_count_kv", layers, heads)},
      {"head_dim", head_dim},
      {"vocab_size", vocabulary},
      {"max_position_embeddings", keys.integer("@.context_length")},
      {"rms_norm_eps", keys.number("@.attention.layer_norm_rms_epsilon")},
      {"hidden_act", "silu"},
      {"tie_word_embeddings", !stored.contains("output.weight")},
      {"rope_theta", base}};
  const json scaling = rope_scaling(keys, stored, config);
  if (!scaling.is_null()) config["rope_scaling"] = scaling;

  for (const Gemma& gemma : gemmas)
    if (keys.architecture() == gemma.architecture)
      return gemma_config(keys, gemma, std::move(config));
  keys.expect("@.rope.freq_base_swa", json::array({base}));
  keys.expect("@.attention.sliding_window_pattern", json::array({0, 1}));
  const bool biased = stored.contains("blk.0.attn_q.bias");
  std::string family = keys.architecture();
  const std::int64_t window = keys.integer("@.attention.sliding_window", 0);
  if (window != 0) {
    if (family != "llama")
      keys.fail("@.attention.sliding_window", window, "none for this architecture");
    if (biased) keys.fail("@.attention.sliding_window", window, "none with biases");
    family = "mistral";
    config["sliding_window"] = window;
  } else if (family != "qwen2") {
    config["attention_bias"] = biased;
  }
  config["model_type"] = family;
  family[0] = static_cast<char>(family[0] - 'a' + 'A');
  config["architectures"] = {family + "ForCausalLM"};
  return config;
}

}  // namespace tda
