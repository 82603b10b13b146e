#include "sparsity/thresholds.h"

#include <tda/error.h>
#include <tda/sparsity.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "base/atomic_file.h"
#include "base/json.h"
#include "base/text_of.h"

namespace tda {
namespace {

constexpr const char* kFormat = "tdaengine-thresholds";
constexpr std::int64_t kVersion = 3;

/// Throws CheckpointError for one key of the file.
[[noreturn]] void reject(const std::filesystem::path& path, const std::string& key,
                         const std::string& found, const std::string& expected) {
  throw CheckpointError(path.string() + ": " + key + ": found " + found + ", expected " + expected);
}

/// Whether the file is for weights that TDA reads by input.
bool by_input(const Thresholds& t) {
  return t.weights == name_of(WeightFormat::graded) || t.weights == name_of(WeightFormat::int4);
}

/// Of weights read by input.
void check_losses(const Thresholds& t, const std::filesystem::path& path) {
  if (!t.values.empty())
    reject(path, "values", std::to_string(t.values.size()) + " numbers",
           "none for " + t.weights + " weights");
  if (t.inputs.empty()) reject(path, "inputs", "none", "one or more shares");
  for (std::size_t i = 0; i < t.inputs.size(); ++i) {
    const float above = i == 0 ? 1 : t.inputs[i - 1];
    if (!(t.inputs[i] >= 0 && t.inputs[i] < above))
      reject(path, "inputs[" + std::to_string(i) + "]", text_of(t.inputs[i]),
             "0 or more, less than " + text_of(above));
  }
  const auto one_each = [&](const char* key, const std::vector<float>& numbers) {
    if (numbers.size() != t.inputs.size())
      reject(path, key, std::to_string(numbers.size()) + " numbers",
             std::to_string(t.inputs.size()) + ", as many as inputs");
    for (std::size_t i = 0; i < numbers.size(); ++i)
      if (!std::isfinite(numbers[i]))
        reject(path, std::string(key) + "[" + std::to_string(i) + "]", text_of(numbers[i]),
               "a finite number");
  };
  one_each("losses", t.losses);
  one_each("loss_errors", t.loss_errors);
}

/// R² lies between 0 and 1.
void check_prior(const Thresholds& t, const std::filesystem::path& path) {
  if (!t.prior.empty() &&
      (t.scope != Scope::sequence || t.values.empty() || t.prior.size() % t.values.size() != 0))
    reject(path, "prior", std::to_string(t.prior.size()) + " numbers",
           "none, or with scope \"sequence\" as many for each of values");
  for (std::size_t i = 0; i < t.prior.size(); ++i)
    if (!(t.prior[i] >= 0 && t.prior[i] <= 1))
      reject(path, "prior[" + std::to_string(i) + "]", text_of(t.prior[i] / kPriorUnit),
             "0 to " + std::to_string(std::lround(1 / kPriorUnit)));
}

/// What a file may hold; checked before writing one and after reading one.
void check_values(const Thresholds& t, const std::filesystem::path& path) {
  const auto at_least_zero = [&](const std::string& key, auto number) {
    if (!(number >= 0 && std::isfinite(number))) {
      reject(path, key, text_of(number), "a finite number, 0 or more");
    }
  };
  const auto all_at_least_zero = [&](const std::string& key, const std::vector<float>& numbers) {
    for (std::size_t i = 0; i < numbers.size(); ++i) {
      at_least_zero(key + "[" + std::to_string(i) + "]", numbers[i]);
    }
  };
  if (t.source != "texts" && t.source != "self-generated") {
    reject(path, "source", describe(t.source), "\"texts\" or \"self-generated\"");
  }
  if (!(t.error >= 0 && t.error < 1)) {
    reject(path, "error", text_of(t.error), "0 or more, less than 1");
  }
  if (by_input(t)) {
    check_losses(t, path);
  } else {
    if (t.values.empty()) reject(path, "values", "none", "one for each layer");
    if (!t.inputs.empty())
      reject(path, "inputs", std::to_string(t.inputs.size()) + " numbers",
             "none but for graded and int4 weights");
  }
  if (t.reached.size() != t.values.size()) {
    reject(path, "reached", std::to_string(t.reached.size()) + " numbers",
           std::to_string(t.values.size()) + ", as many as values");
  }
  all_at_least_zero("values", t.values);
  all_at_least_zero("reached", t.reached);
  check_prior(t, path);
  at_least_zero("bytes", t.bytes);
  at_least_zero("texts", t.texts);
  at_least_zero("tokens", t.tokens);
}

/// The fields of one file, by type.
class Fields {
 public:
  Fields(const nlohmann::json& object, const std::filesystem::path& path)
      : path_(path), json_(object) {}

  std::string string(const char* key) const {
    const json& field = at(key);
    expect(field.is_string(), key, field, "a string");
    return field.get<std::string>();
  }

  double number(const char* key) const { return number(key, at(key)); }

  bool has(const char* key) const { return json_.contains(key); }

  std::vector<float> numbers(const char* key) const {
    const json& field = at(key);
    expect(field.is_array(), key, field, "an array of numbers");
    std::vector<float> values;
    for (const json& element : field) {
      const std::string name = key + ("[" + std::to_string(values.size()) + "]");
      const double value = number(name, element);
      expect(std::abs(value) <= std::numeric_limits<float>::max(), name, element, "an f32 number");
      values.push_back(static_cast<float>(value));
    }
    return values;
  }

  std::int64_t integer(const char* key) const {
    const json& field = at(key);
    // What exceeds int64 is held as unsigned.
    const bool fits = !field.is_number_unsigned() ||
                      field.get<std::uint64_t>() <= std::numeric_limits<std::int64_t>::max();
    expect(field.is_number_integer() && fits, key, field, "a 64-bit integer");
    return field.get<std::int64_t>();
  }

 private:
  using json = nlohmann::json;

  const json& at(const char* key) const {
    const auto field = json_.find(key);
    if (field == json_.end()) reject(path_, std::string("\"") + key + '"', "no such key", "it");
    return *field;
  }

  void expect(bool good, const std::string& key, const json& found, const char* expected) const {
    if (!good) reject(path_, key, describe(found), expected);
  }

  double number(const std::string& key, const json& field) const {
    expect(field.is_number(), key, field, "a number");
    return field.get<double>();
  }

  const std::filesystem::path& path_;
  const json& json_;
};

}  // namespace

/// A key to a line: a line for each of a hundred thousand numbers would help nobody.
static std::string text_of(const nlohmann::ordered_json& object) {
  std::string text;
  for (const auto& [key, value] : object.items())
    // Folder names need not be UTF-8, JSON must: `model` is for messages only.
    text += (text.empty() ? "{\n  \"" : ",\n  \"") + key +
            "\": " + value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  return text + "\n}\n";
}

void Thresholds::save(const std::filesystem::path& path) const {
  check_values(*this, path);
  nlohmann::ordered_json json = {{"format", kFormat},  {"version", kVersion},
                                 {"model", model},     {"fingerprint", fingerprint},
                                 {"weights", weights}, {"scope", name_of(scope)},
                                 {"error", error},     {"bytes", bytes},
                                 {"values", values},   {"reached", reached},
                                 {"source", source},   {"texts", texts},
                                 {"tokens", tokens}};
  if (!inputs.empty()) {
    json["inputs"] = inputs;
    json["losses"] = losses;
    json["loss_errors"] = loss_errors;
  }
  if (!prior.empty()) {
    std::vector<std::int64_t> units;
    for (const float r : prior) units.push_back(std::lround(r / kPriorUnit));
    json["prior"] = units;
  }
  write_file_atomically(path, {text_of(json)});
}

Thresholds Thresholds::load(const std::filesystem::path& path) {
  return parse_thresholds(read_json_object(path), path);
}

Thresholds parse_thresholds(const nlohmann::json& content, const std::filesystem::path& path) {
  const Fields fields(content, path);
  if (const std::string format = fields.string("format"); format != kFormat) {
    reject(path, "format", describe(format), std::string("\"") + kFormat + '"');
  }
  if (const std::int64_t version = fields.integer("version"); version != kVersion) {
    reject(path, "version", std::to_string(version), std::to_string(kVersion));
  }
  Thresholds result;
  result.model = fields.string("model");
  result.fingerprint = fields.string("fingerprint");
  result.weights = fields.string("weights");
  const std::string scope = fields.string("scope");
  if (scope != name_of(Scope::sequence) && scope != name_of(Scope::token)) {
    reject(path, "scope", describe(scope), "\"sequence\" or \"token\"");
  }
  result.scope = parse_scope(scope);
  result.bytes = fields.number("bytes");
  result.error = fields.number("error");
  result.values = fields.numbers("values");
  result.reached = fields.numbers("reached");
  if (by_input(result)) {
    result.inputs = fields.numbers("inputs");
    result.losses = fields.numbers("losses");
    result.loss_errors = fields.numbers("loss_errors");
  }
  if (fields.has("prior")) {
    result.prior = fields.numbers("prior");
    for (float& r : result.prior) r *= kPriorUnit;
  }
  result.source = fields.string("source");
  result.texts = fields.integer("texts");
  result.tokens = fields.integer("tokens");
  check_values(result, path);
  return result;
}

}  // namespace tda
