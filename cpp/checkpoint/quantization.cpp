// quantization_config of config.json.
#include "checkpoint/quantization.h"

#include <algorithm>

#include "checkpoint/config_object.h"

namespace tda {
namespace {

constexpr const char* kInstead =
    "; the checkpoint that it was made from loads, with weights int8 or int4";

void expect_text(const Object& object, const char* key, std::string_view absent,
                 std::initializer_list<std::string_view> allowed) {
  const std::string found = object.text(key).value_or(std::string(absent));
  if (std::ranges::find(allowed, found) != allowed.end()) return;
  std::string expected;
  for (std::string_view each : allowed)
    expected += (expected.empty() ? "\"" : " or \"") + std::string(each) + "\"";
  object.fail(key, expected + kInstead);
}

/// Refuses what is there and not null, empty or false.
void expect_none(const Object& object, const char* key, const char* what) {
  if (!object.has(key)) return;
  const nlohmann::json& value = *object.find(key);
  if (value != false && !(value.is_structured() && value.empty()))
    object.fail(key, std::string("none: ") + what + kInstead);
}

std::int64_t bits_of(const Object& object, const char* key, std::int64_t absent,
                     std::initializer_list<std::int64_t> allowed) {
  const std::int64_t bits = object.integer(key, 1, 32).value_or(absent);
  std::string expected;
  for (std::int64_t each : allowed)
    expected += (expected.empty() ? "" : " or ") + std::to_string(each);
  if (std::ranges::find(allowed, bits) == allowed.end()) object.fail(key, expected + kInstead);
  return bits;
}

/// -1, all inputs, becomes 0.
std::int64_t group_of(const Object& object, std::int64_t absent) {
  const std::int64_t group = object.integer("group_size", -1, max_size).value_or(absent);
  if (group == 0) object.fail("group_size", "a number of inputs, or -1 for all of them");
  return std::max<std::int64_t>(group, 0);
}

Quantization read_gptq(const Object& object) {
  // Packages call it checkpoint_format or format.
  const char* const key = object.has("checkpoint_format") ? "checkpoint_format" : "format";
  expect_text(object, key, "gptq", {"gptq", "gptq_v2"});
  expect_none(object, "is_marlin_format", "the packing of Marlin is not supported");
  expect_none(object, "dynamic", "settings of single layers are not supported");
  expect_text(object, "pack_dtype", "int32", {"int32"});
  const std::int64_t bits = bits_of(object, "bits", 4, {4, 8});
  return {Quantization::Method::gptq,
          {{bits, group_of(object, 128), true}},
          object.text(key).value_or("gptq") == "gptq"};
}

Quantization read_awq(const Object& object) {
  const char* const key = object.has("version") ? "version" : "format";
  expect_text(object, key, "gemm", {"gemm", "GEMM"});
  if (!object.flag("zero_point", true)) object.fail("zero_point", std::string("true") + kInstead);
  const char* const bits = object.has("w_bit") ? "w_bit" : "bits";
  return {Quantization::Method::awq,
          {{bits_of(object, bits, 4, {4}), group_of(object, 128), true}}};
}

Quantization::Scheme read_scheme(const Object& group, const Object& all) {
  // Where groups differ in it, each has its own.
  const Object& with_format = group.has("format") ? group : all;
  expect_text(with_format, "format", "", {"pack-quantized", "int-quantized", "naive-quantized"});
  expect_none(group, "output_activations", "layers' outputs are not rounded");
  // Inputs rounded as they come need no data, and whether they are is the engine's choice.
  if (const std::optional<Object> inputs = group.object("input_activations")) {
    expect_text(*inputs, "type", "int", {"int"});
    if (!inputs->flag("dynamic", false))
      inputs->fail("dynamic", std::string("true: scales of inputs are not supported") + kInstead);
  }
  const std::optional<Object> weights = group.object("weights");
  if (!weights) group.fail("weights", "an object");
  expect_text(*weights, "type", "int", {"int"});
  expect_text(*weights, "strategy", weights->has("group_size") ? "group" : "tensor",
              {"group", "channel", "tensor"});
  const bool grouped = weights->text("strategy").value_or("group") == "group";
  const bool has_group = weights->has("group_size");
  return {bits_of(*weights, "num_bits", 8, {4, 8}),
          grouped && has_group ? group_of(*weights, -1) : 0, !weights->flag("symmetric", true)};
}

Quantization read_compressed_tensors(const Object& object) {
  expect_none(object, "kv_cache_scheme", "scales of keys and values are not supported");
  expect_none(object, "transform_config", "rotations of weights are not supported");
  if (const std::optional<Object> sparsity = object.object("sparsity_config"))
    expect_text(*sparsity, "format", "dense", {"dense"});
  const std::optional<Object> groups = object.object("config_groups");
  if (!groups) object.fail("config_groups", "an object that says how weights are rounded");
  Quantization result{Quantization::Method::compressed_tensors, {}};
  for (const std::string& name : groups->keys()) {
    const std::optional<Object> group = groups->object(name);
    if (!group) groups->fail(name, "an object");
    result.schemes.push_back(read_scheme(*group, object));
  }
  return result;
}

}  // namespace

std::optional<Quantization> read_quantization(const Object& config) {
  if (!config.has("quantization_config")) return std::nullopt;
  const std::optional<Object> object = config.object("quantization_config");
  if (!object) config.fail("quantization_config", "an object with a quant_method");
  const std::string method = object->text("quant_method").value_or("");
  if (method == "gptq") return read_gptq(*object);
  if (method == "awq") return read_awq(*object);
  if (method == "compressed-tensors") return read_compressed_tensors(*object);
  object->fail("quant_method",
               std::string("\"gptq\", \"awq\" or \"compressed-tensors\"") + kInstead);
}

}  // namespace tda
