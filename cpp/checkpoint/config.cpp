// config.json -> ModelConfig. Defaults and meaning of every key are those of the configuration
// classes and modeling_rope_utils.py of Hugging Face transformers 5.
#include <tda/error.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "base/json.h"
#include "checkpoint/checkpoint.h"

namespace tda {
namespace {

using nlohmann::json;

// Larger than any real model, but small enough that no size in bytes overflows 63 bits: a matrix
// has at most 2^22 x 2^22 x 4 bytes, and a layer seven matrices.
constexpr std::int64_t max_size = std::int64_t{1} << 22;
constexpr std::int64_t max_layers = std::int64_t{1} << 12;
constexpr std::int64_t max_positions = std::int64_t{1} << 24;
constexpr std::int64_t max_window = std::numeric_limits<std::int32_t>::max();

constexpr double any_number = std::numeric_limits<double>::lowest();

/// A JSON object of a configuration file, with checked access to its keys.
class Object {
 public:
  Object(const json& object, std::string file, std::string prefix = "")
      : object_(&object), file_(std::move(file)), prefix_(std::move(prefix)) {}

  [[noreturn]] void fail(const std::string& key, const std::string& expected) const {
    const json* value = find(key);
    throw CheckpointError(file_ + ": " + prefix_ + key + " is " +
                          (value ? describe(*value) : "missing") + ", expected " + expected);
  }

  const json* find(const std::string& key) const {
    const auto found = object_->find(key);
    return found == object_->end() ? nullptr : &*found;
  }
  bool is_null(const std::string& key) const { return find(key) && find(key)->is_null(); }
  /// Present and not null.
  bool has(const std::string& key) const { return find(key) && !find(key)->is_null(); }

  /// nullopt if absent; null is an error.
  std::optional<std::int64_t> integer(const std::string& key, std::int64_t least,
                                      std::int64_t most) const {
    const json* value = find(key);
    if (!value) return std::nullopt;
    return checked_integer(key, *value, least, most);
  }

  /// nullopt if absent or null; must be greater than `bound`.
  std::optional<double> number(const std::string& key, double bound) const {
    if (!has(key)) return std::nullopt;
    const json& value = *find(key);
    if (!value.is_number() || !(value.get<double>() > bound))
      fail(key, bound == any_number ? "a number" : "a number above " + json(bound).dump());
    return value.get<double>();
  }
  double required_number(const std::string& key, double bound) const {
    const std::optional<double> value = number(key, bound);
    if (!value) fail(key, "a number above " + json(bound).dump());
    return *value;
  }

  /// Null is an error.
  bool flag(const std::string& key, bool absent) const {
    const json* value = find(key);
    if (value && !value->is_boolean()) fail(key, "true or false");
    return value ? value->get<bool>() : absent;
  }

  /// nullopt if absent or null.
  std::optional<std::string> text(const std::string& key) const {
    if (!has(key)) return std::nullopt;
    if (!find(key)->is_string()) fail(key, "a string");
    return find(key)->get<std::string>();
  }

  /// An id, or a list of them, appended to `ids` without repeats.
  void append_tokens(const std::string& key, std::int64_t vocab_size,
                     std::vector<Token>& ids) const {
    if (!has(key)) return;
    const json& value = *find(key);
    const auto append = [&](const json& item) {
      const auto id = static_cast<Token>(checked_integer(key, item, 0, vocab_size - 1));
      if (std::find(ids.begin(), ids.end(), id) == ids.end()) ids.push_back(id);
    };
    if (value.is_array())
      for (const json& item : value) append(item);
    else
      append(value);
  }

  /// The object under `key`; nullopt if absent, null or empty.
  std::optional<Object> object(const std::string& key) const {
    if (!has(key)) return std::nullopt;
    const json& value = *find(key);
    if (!value.is_object()) fail(key, "an object");
    if (value.empty()) return std::nullopt;
    return Object(value, file_, prefix_ + key + ".");
  }

  /// Rejects entries that are objects.
  void expect_flat(const char* expected) const {
    for (const auto& [key, value] : object_->items())
      if (value.is_object())
        throw CheckpointError(file_ + ": " + prefix_ + describe(key) + " is an object, expected " +
                              expected);
  }

 private:
  std::int64_t checked_integer(const std::string& key, const json& value, std::int64_t least,
                               std::int64_t most) const {
    constexpr std::uint64_t largest = std::numeric_limits<std::int64_t>::max();
    const bool fits = value.is_number_unsigned() ? value.get<std::uint64_t>() <= largest
                                                 : value.is_number_integer();
    if (!fits || value.get<std::int64_t>() < least || value.get<std::int64_t>() > most)
      throw CheckpointError(file_ + ": " + prefix_ + key + " is " + describe(value) +
                            ", expected an integer from " + std::to_string(least) + " to " +
                            std::to_string(most));
    return value.get<std::int64_t>();
  }

  const json* object_;
  std::string file_;
  std::string prefix_;
};

/// What transformers assumes for keys that config.json does not have.
struct Family {
  const char* model_type;
  const char* architecture;
  std::int64_t vocab_size, hidden_size, intermediate_size;
  std::int64_t num_layers, num_heads;
  std::int64_t num_kv_heads;  // 0: num_heads
  std::int64_t head_dim;      // 0: hidden_size / num_heads
  std::int64_t max_position;
  std::optional<Token> bos_token, eos_token;
};

constexpr Family families[] = {
    {"llama", "LlamaForCausalLM", 32000, 4096, 11008, 32, 32, 0, 0, 2048, 1, 2},
    {"mistral", "MistralForCausalLM", 32000, 4096, 14336, 32, 32, 8, 0, 131072, 1, 2},
    {"qwen2", "Qwen2ForCausalLM", 151936, 4096, 22016, 32, 32, 32, 0, 32768, {}, {}},
    {"qwen3", "Qwen3ForCausalLM", 151936, 4096, 22016, 32, 32, 32, 128, 32768, {}, {}},
};

const Family& read_family(const Object& config) {
  const std::string type = config.text("model_type").value_or("");
  for (const Family& family : families) {
    if (type != family.model_type) continue;
    if (config.has("architectures") &&
        *config.find("architectures") != json::array({family.architecture}))
      config.fail("architectures", std::string("[\"") + family.architecture + "\"]");
    return family;
  }
  config.fail("model_type", "\"llama\", \"mistral\", \"qwen2\" or \"qwen3\"");
}

Activation read_activation(const Object& config) {
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
  const std::string act = config.text("hidden_act").value_or("silu");
  for (const auto& [name, activation] : names)
    if (act == name) return activation;
  config.fail("hidden_act", "silu, gelu, gelu_pytorch_tanh, relu or a synonym of these");
}

/// The factor on cos and sin: the file's, or else the YaRN paper's.
double yarn_attention_factor(const Object& rope, double factor) {
  const auto stretched = [factor](double scale) {
    return factor <= 1 ? 1.0 : 0.1 * scale * std::log(factor) + 1.0;
  };
  const double scale = rope.number("mscale", any_number).value_or(0);
  const double scale_all = rope.number("mscale_all_dim", any_number).value_or(0);
  const double inferred =
      scale != 0 && scale_all != 0 ? stretched(scale) / stretched(scale_all) : stretched(1);
  const double result = rope.number("attention_factor", 0).value_or(inferred);
  if (!(result > 0 && std::isfinite(result)))
    rope.fail("mscale", "values that give a positive attention factor");
  return result;
}

void read_yarn(const Object& rope, std::int64_t max_position, RopeConfig& result) {
  result.factor = rope.number("factor", 0)
                      .value_or(static_cast<double>(max_position) /
                                static_cast<double>(result.original_max_position));
  result.attention_factor = yarn_attention_factor(rope, result.factor);
  result.beta_fast = rope.number("beta_fast", 0).value_or(32);
  result.beta_slow = rope.number("beta_slow", 0).value_or(1);
  if (result.beta_fast < result.beta_slow) rope.fail("beta_fast", "at least beta_slow");
  result.truncate = rope.flag("truncate", true);
}

void read_llama3(const Object& rope, RopeConfig& result) {
  result.factor = rope.required_number("factor", 0);
  result.low_freq_factor = rope.required_number("low_freq_factor", 0);
  result.high_freq_factor = rope.required_number("high_freq_factor", 0);
  if (result.high_freq_factor <= result.low_freq_factor)
    rope.fail("high_freq_factor", "more than low_freq_factor");
}

/// Two spellings: top-level rope_theta and rope_scaling (transformers 4), or rope_parameters with
/// both in it (transformers 5). If a file has both, rope_scaling wins except for theta.
RopeConfig read_rope(const Object& config, std::int64_t max_position) {
  static const json nothing = json::object();
  std::optional<Object> given = config.object("rope_scaling");
  if (!given) given = config.object("rope_parameters");
  const Object rope = given.value_or(Object(nothing, ""));
  rope.expect_flat("one set of RoPE parameters for all layers");
  for (const Object* object : {&config, &rope})
    if (object->number("partial_rotary_factor", 0).value_or(1) != 1)
      object->fail("partial_rotary_factor", "1");

  RopeConfig result;
  result.theta =
      rope.number("rope_theta", 1).value_or(config.number("rope_theta", 1).value_or(10000));
  const char* type_key = rope.has("rope_type") ? "rope_type" : "type";
  const std::string type = rope.text(type_key).value_or("default");
  if (type == "llama3" || type == "yarn") {
    const Object& owner = config.has("original_max_position_embeddings") ? config : rope;
    if (owner.has("original_max_position_embeddings"))
      result.original_max_position =
          *owner.integer("original_max_position_embeddings", 1, max_positions);
    else
      result.original_max_position = max_position;
  }
  if (type == "linear") {
    result.scaling = RopeConfig::Scaling::linear;
    result.factor = rope.required_number("factor", 0);
  } else if (type == "dynamic") {
    result.scaling = RopeConfig::Scaling::dynamic;
    result.factor = rope.required_number("factor", 0);
    result.original_max_position = max_position;
  } else if (type == "llama3") {
    result.scaling = RopeConfig::Scaling::llama3;
    read_llama3(rope, result);
  } else if (type == "yarn") {
    result.scaling = RopeConfig::Scaling::yarn;
    read_yarn(rope, max_position, result);
  } else if (type != "default") {
    rope.fail(type_key, "default, linear, dynamic, llama3 or yarn");
  }
  // Outside this range the frequencies would not be finite in f32.
  if (!(result.factor >= 1e-3 && result.factor <= 1e6))
    rope.fail("factor", "a number from 0.001 to 1000000");
  return result;
}

/// The window of each layer, [L]. Only Qwen can have layers with and without one.
std::vector<std::int64_t> read_sliding_window(const Object& config, const ModelConfig& model) {
  const bool qwen = model.model_type == "qwen2" || model.model_type == "qwen3";
  const bool used = qwen ? config.flag("use_sliding_window", false) : model.model_type == "mistral";
  std::int64_t window = 0;
  if (used && !config.is_null("sliding_window"))
    window = config.integer("sliding_window", 1, max_window).value_or(4096);
  const std::int64_t first =
      qwen ? config.integer("max_window_layers", 0, max_window).value_or(28) : 0;

  std::vector<std::int64_t> result(static_cast<std::size_t>(model.num_layers), 0);
  for (std::int64_t i = first; i < model.num_layers; ++i) result[i] = window;
  if (!config.has("layer_types")) return result;

  const json& types = *config.find("layer_types");
  if (!types.is_array() || types.size() != result.size())
    config.fail("layer_types", "an array of " + std::to_string(result.size()) + " names");
  for (std::size_t i = 0; i < result.size(); ++i) {
    const bool sliding = types[i] == "sliding_attention";
    if (!sliding && types[i] != "full_attention" && types[i] != "attention")
      config.fail("layer_types",
                  "\"full_attention\" or \"sliding_attention\", not " + describe(types[i]));
    if (sliding && window == 0)
      config.fail("layer_types", "no \"sliding_attention\" where no sliding_window is in use");
    if (!qwen && !sliding && window != 0)
      config.fail("layer_types", "\"sliding_attention\" throughout, because sliding_window is set");
    result[i] = sliding ? window : 0;
  }
  return result;
}

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
  if (config.has("quantization_config"))
    config.fail("quantization_config", "none: only unquantized checkpoints are supported");
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
  model.rms_norm_eps = config.number("rms_norm_eps", 0).value_or(1e-6);
  model.activation = read_activation(config);
  model.rope = read_rope(config, model.max_position);
  if (model.rope.scaling == RopeConfig::Scaling::dynamic && model.head_dim < 4)
    config.fail("head_dim", "at least 4 with dynamic RoPE");
  model.tied_embeddings = config.flag("tie_word_embeddings", false);
  model.qk_norm = model.model_type == "qwen3";
  if (model.model_type == "llama" || model.model_type == "qwen3")
    model.qkv_bias = model.output_bias = config.flag("attention_bias", false);
  else
    model.qkv_bias = model.model_type == "qwen2";
  model.sliding_window = read_sliding_window(config, model);

  if (config.find("bos_token_id") == nullptr)
    model.bos_token = family.bos_token;
  else if (!config.is_null("bos_token_id"))
    model.bos_token = static_cast<Token>(*config.integer("bos_token_id", 0, model.vocab_size - 1));
  model.eos_tokens = read_eos(config, generation, family, model.vocab_size);
  return model;
}

}  // namespace tda
