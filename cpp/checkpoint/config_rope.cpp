// The RoPE of config.json, by modeling_rope_utils.py of Hugging Face transformers 5.
#include <cmath>

#include "checkpoint/config_parts.h"

namespace tda {
namespace {

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

/// [head_dim / 2] Within what leaves the frequencies finite in f32.
std::vector<float> longrope_factors(const Object& rope, const char* key, std::int64_t head_dim) {
  const std::string expected =
      "an array of " + std::to_string(head_dim / 2) + " numbers from 0.001 to 1000000";
  if (!rope.has(key) || !rope.find(key)->is_array() || std::ssize(*rope.find(key)) != head_dim / 2)
    rope.fail(key, expected);
  std::vector<float> factors;
  for (const nlohmann::json& factor : *rope.find(key)) {
    if (!factor.is_number() || !(factor >= 1e-3 && factor <= 1e6))
      rope.fail(key, expected + ", not " + describe(factor));
    factors.push_back(factor.get<float>());
  }
  return factors;
}

/// The factor on cos and sin is the file's, or else that of Phi-3.
void read_longrope(const Object& rope, const ModelConfig& model, RopeConfig& result) {
  const auto original = static_cast<double>(result.original_max_position);
  result.short_factor = longrope_factors(rope, "short_factor", model.head_dim);
  result.long_factor = longrope_factors(rope, "long_factor", model.head_dim);
  result.factor =
      rope.number("factor", 0).value_or(static_cast<double>(model.max_position) / original);
  if (result.factor > 1 && original < 2) rope.fail("original_max_position_embeddings", "2 or more");
  const double inferred =
      result.factor <= 1 ? 1 : std::sqrt(1 + std::log(result.factor) / std::log(original));
  result.attention_factor = rope.number("attention_factor", 0).value_or(inferred);
  if (!(result.attention_factor <= 1e6))
    rope.fail("attention_factor", "a number above 0, at most 1000000");
}

/// `theta`: the base, unless the parameters name one.
RopeConfig read_parameters(const Object& config, const Object& rope, double theta,
                           const ModelConfig& model) {
  const std::int64_t max_position = model.max_position;
  rope.expect_flat("one set of RoPE parameters for all layers");
  for (const Object* object : {&config, &rope})
    if (object->number("partial_rotary_factor", 0).value_or(1) != 1)
      object->fail("partial_rotary_factor", "1");

  RopeConfig result;
  result.theta = rope.number("rope_theta", 1).value_or(theta);
  const char* type_key = rope.has("rope_type") ? "rope_type" : "type";
  const std::string type = rope.text(type_key).value_or("default");
  const bool is_longrope = type == "longrope" || type == "su";  // the old name
  if (type == "llama3" || type == "yarn" || is_longrope) {
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
  } else if (is_longrope) {
    result.scaling = RopeConfig::Scaling::longrope;
    read_longrope(rope, model, result);
  } else if (type != "default") {
    rope.fail(type_key, "default, linear, dynamic, llama3, yarn or longrope");
  }
  // Outside this range the frequencies would not be finite in f32.
  if (!(result.factor >= 1e-3 && result.factor <= 1e6))
    rope.fail("factor", "a number from 0.001 to 1000000");
  if (result.scaling == RopeConfig::Scaling::dynamic && model.head_dim < 4)
    config.fail("head_dim", "at least 4 with dynamic RoPE");
  return result;
}

/// The parameters under `key`, or none.
Object parameters(const Object& config, const char* key) {
  static const nlohmann::json nothing = nlohmann::json::object();
  return config.object(key).value_or(Object(nothing, ""));
}

}  // namespace

/// Two spellings: top-level rope_theta and rope_scaling (transformers 4), or rope_parameters with
/// both in it (transformers 5). If a file has both, rope_scaling wins except for theta.
RopeConfig read_rope(const Object& config, double theta, const ModelConfig& model) {
  const char* const key = config.object("rope_scaling") ? "rope_scaling" : "rope_parameters";
  return read_parameters(config, parameters(config, key),
                         config.number("rope_theta", 1).value_or(theta), model);
}

/// The same for a set for each kind of layer. In transformers 4 the keys of layers with a sliding
/// window were apart, and rope_scaling was that of the others.
RopesByLayer read_ropes_by_layer(const Object& config, double theta, double sliding_theta,
                                 const ModelConfig& model) {
  const Object given = parameters(config, "rope_parameters");
  const bool scaled = config.object("rope_scaling").has_value();
  const auto of = [&](const char* kind) { return parameters(given, kind); };
  if (config.object("rope_parameters") && !given.has("full_attention") &&
      !given.has("sliding_attention"))
    config.fail("rope_parameters", "an object with full_attention and sliding_attention");
  if (scaled && given.has("full_attention"))
    config.fail("rope_scaling", "none beside rope_parameters.full_attention");
  theta = config.number("rope_theta", 1).value_or(theta);
  sliding_theta = config.number("rope_local_base_freq", 1).value_or(sliding_theta);
  const Object full = scaled ? parameters(config, "rope_scaling") : of("full_attention");
  return {read_parameters(config, full, theta, model),
          read_parameters(config, of("sliding_attention"), sliding_theta, model)};
}

}  // namespace tda
