// config.json -> ModelConfig. Defaults and meaning of every key are those of the configuration
// classes of Hugging Face transformers 5.
#include "checkpoint/checkpoint.h"
#include "checkpoint/config_parts.h"
#include "checkpoint/quantization.h"

namespace tda {
namespace {

using nlohmann::json;

void read_sizes(const Object& config, const Family& family, ModelConfig& model) {
  const auto size = [&](const char* key, std::int64_t absent, std::int64_t most = max_size) {
    return config.integer(key, 1, most).value_or(absent);
  };
  model.vocab_size = size("vocab_size", family.vocab_size);
  model.hidden_size = size("hidden_size", family.hidden_size);
  model.intermediate_size = size("intermediate_size", family.intermediate_size);
  model.num_layers = size("num_hidden_layers", family.num_layers, max_layers);
  model.num_heads = size("num_attention_heads", family.num_heads);
  model.max_position = size("max_position_embeddings", family.max_position, max_positions);

  if (!config.is_null("num_key_value_heads"))
    model.num_kv_heads = size("num_key_value_heads", family.num_kv_heads);
  if (model.num_kv_heads == 0) model.num_kv_heads = model.num_heads;
  if (model.num_heads % model.num_kv_heads != 0)
    config.fail("num_key_value_heads",
                "a divisor of num_attention_heads (" + std::to_string(model.num_heads) + ")");

  if (config.has("head_dim") || (family.head_dim != 0 && !config.is_null("head_dim"))) {
    model.head_dim = size("head_dim", family.head_dim);
  } else {
    if (model.hidden_size % model.num_heads != 0)
      config.fail("hidden_size", "a multiple of num_attention_heads (" +
                                     std::to_string(model.num_heads) + ") without head_dim");
    model.head_dim = model.hidden_size / model.num_heads;
  }
  if (model.head_dim % 2 != 0)
    config.fail("head_dim", "an even number, because RoPE rotates pairs (here it is " +
                                std::to_string(model.head_dim) + ")");
  if (model.q_size() > max_size)
    config.fail("num_attention_heads", "at most 2^22 when multiplied by head_dim (" +
                                           std::to_string(model.head_dim) + ")");
}

void refuse_unsupported(const Object& config) {
  read_quantization(config);
  if (config.flag("mlp_bias", false))
    config.fail("mlp_bias", "false: biases in the feed-forward layers are not supported");
}

/// The ids that end a text. generation_config.json, where there is one, decides alone, even by
/// saying nothing; the family's default holds only if config.json says nothing either.
std::vector<Token> read_eos(const Object& config, const std::optional<Object>& generation,
                            const Family& family, std::int64_t vocab_size) {
  std::vector<Token> of_config, of_generation;
  config.append_tokens("eos_token_id", vocab_size, of_config);
  if (generation) {
    generation->append_tokens("eos_token_id", vocab_size, of_generation);
    return of_generation;
  }
  if (!config.find("eos_token_id") && family.eos_token) of_config.push_back(*family.eos_token);
  return of_config;
}

}  // namespace

ModelConfig read_config(const std::filesystem::path& folder) {
  const json config = read_json_object(folder / "config.json", NonFinite::as_text);
  const std::filesystem::path path = folder / "generation_config.json";
  std::error_code ignored;
  // A link to nowhere is not nothing: opening it says what is wrong.
  if (!std::filesystem::exists(std::filesystem::symlink_status(path, ignored)))
    return parse_config(config, nullptr, folder);
  const json generation = read_json_object(path, NonFinite::as_text);
  return parse_config(config, &generation, folder);
}

ModelConfig parse_config(const json& content, const json* generation_content,
                         const std::filesystem::path& folder) {
  const Object config(content, (folder / "config.json").string());
  std::optional<Object> generation;
  if (generation_content)
    generation.emplace(*generation_content, (folder / "generation_config.json").string());
  const Family& family = read_family(config);
  refuse_unsupported(config);

  ModelConfig model;
  model.model_type = family.model_type;
  read_sizes(config, family, model);
  if (config.is_null("rms_norm_eps")) config.fail("rms_norm_eps", "a number above 0");
  model.rms_norm_eps = config.number("rms_norm_eps", 0).value_or(family.rms_norm_eps);
  model.tied_embeddings = config.flag("tie_word_embeddings", family.tied_embeddings);
  family.read(config, model);

  if (config.find("bos_token_id") == nullptr)
    model.bos_token = family.bos_token;
  else if (!config.is_null("bos_token_id"))
    model.bos_token = static_cast<Token>(*config.integer("bos_token_id", 0, model.vocab_size - 1));
  model.eos_tokens = read_eos(config, generation, family, model.vocab_size);
  return model;
}

}  // namespace tda
