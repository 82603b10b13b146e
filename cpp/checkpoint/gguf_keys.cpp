#include "checkpoint/gguf_keys.h"

#include <tda/error.h>

#include <algorithm>
#include <charconv>
#include <cmath>

#include "base/json.h"

namespace tda {
namespace {

using nlohmann::json;

constexpr int kQuantizationVersion = 2;  // what the blocks of quantised tensors look like

/// The shortest decimal number that is this one in 32 bits. NaN and infinity stay what they are.
double shortest(double value) {
  const float rounded = static_cast<float>(value);
  if (!std::isfinite(rounded)) return rounded;
  char text[32];
  char* const end = std::to_chars(text, text + sizeof text, rounded).ptr;
  return json::parse(std::string(text, end)).get<double>();
}

}  // namespace

GgufKeys::GgufKeys(const GgufFile& file) : file_(file) {
  architecture_ = text("general.architecture");
}

void GgufKeys::check_architecture(std::span<const char* const> architectures) {
  if (std::ranges::find(architectures, architecture_) == architectures.end()) {
    std::string names;
    for (const char* name : architectures) names += (names.empty() ? "" : ", ") + std::string(name);
    const std::string found = architecture_;
    fail("general.architecture", found, names);
  }
  expect("general.type", json::array({"model"}));
  expect("general.quantization_version", json::array({kQuantizationVersion}));
}

std::string GgufKeys::full(std::string key) const {
  if (key.starts_with('@')) key.replace(0, 1, architecture_);
  return key;
}

void GgufKeys::fail(const std::string& key, const json& found, const std::string& expected) const {
  throw CheckpointError(file_.name() + ": " + full(key).substr(0, 100) + " is " +
                        (found.is_null() ? "missing" : describe(found)) + ", expected " + expected);
}

json GgufKeys::find(const std::string& key) {
  const std::string name = full(key);
  asked_.insert(name);
  return file_.value(name);
}

std::int64_t GgufKeys::integer(const std::string& key, std::optional<std::int64_t> absent) {
  const json value = find(key);
  if (value.is_null() && absent) return *absent;
  constexpr std::uint64_t largest = std::numeric_limits<std::int64_t>::max();
  if (!value.is_number_integer() ||
      (value.is_number_unsigned() && value.get<std::uint64_t>() > largest))
    fail(key, value, "an integer below 2^63");
  return value.get<std::int64_t>();
}

std::string GgufKeys::text(const std::string& key, std::optional<std::string> absent) {
  const json value = find(key);
  if (value.is_null() && absent) return *absent;
  if (!value.is_string()) fail(key, value, "a string");
  return value.get<std::string>();
}

bool GgufKeys::flag(const std::string& key, bool absent) {
  const json value = find(key);
  if (value.is_null()) return absent;
  if (!value.is_boolean()) fail(key, value, "true or false");
  return value.get<bool>();
}

json GgufKeys::list(const std::string& key, bool may_be_missing) {
  json value = find(key);
  if (value.is_null() && may_be_missing) return json::array();
  if (!value.is_array()) fail(key, value, "a list");
  return value;
}

double GgufKeys::number(const std::string& key, std::optional<double> absent) {
  const json value = find(key);
  if (value.is_null() && absent) return *absent;
  if (!value.is_number_float()) fail(key, value, "a floating-point number");
  const double number = shortest(value.get<double>());
  if (!std::isfinite(number)) fail(key, value, "a finite number of 32 bits");
  return number;
}

std::int64_t GgufKeys::integer_of_layers(const std::string& key, std::int64_t layers,
                                         std::optional<std::int64_t> absent) {
  const json value = find(key);
  if (!value.is_array()) return integer(key, absent);
  const bool same = std::ranges::all_of(value, [&](const json& v) { return v == value[0]; });
  if (value.empty() || std::ssize(value) != layers || !same || !value[0].is_number_integer())
    fail(key, value, "one integer, or the same for each of " + std::to_string(layers) + " layers");
  return value[0].get<std::int64_t>();
}

std::int64_t GgufKeys::token(const std::string& key, const json& id, std::int64_t tokens) const {
  const std::int64_t value = id.is_number_integer() ? id.get<std::int64_t>() : -1;
  if (value < 0 || value >= tokens) fail(key, id, "0 to " + std::to_string(tokens - 1));
  return value;
}

std::int64_t GgufKeys::special_token(const std::string& name, std::int64_t tokens,
                                     std::int64_t absent) {
  const std::string key = "tokenizer.ggml." + name + "_token_id";
  const json id = find(key);
  return id.is_null() ? absent : token(key, id, tokens);
}

void GgufKeys::expect(const std::string& key, const json& values, std::string_view condition) {
  json value = find(key);
  if (value.is_number_float()) value = shortest(value.get<double>());
  if (value.is_null() || std::ranges::find(values, value) != values.end()) return;
  std::string expected;
  for (const json& each : values) expected += (expected.empty() ? "" : " or ") + describe(each);
  fail(key, value, expected + (condition.empty() ? "" : " ") + std::string(condition));
}

void GgufKeys::refuse_unread(std::span<const char* const> without_effect) {
  const std::string prefix = architecture_ + ".";
  for (const auto& [key, value] : file_.values()) {
    if (!key.starts_with(prefix) || asked_.contains(key)) continue;
    const std::string_view rest = std::string_view(key).substr(prefix.size());
    if (std::ranges::find(without_effect, rest) == without_effect.end())
      fail(key, file_.value(key), "no key of unknown effect");
  }
}

}  // namespace tda
