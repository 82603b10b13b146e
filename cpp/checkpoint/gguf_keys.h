// The keys of a GGUF model, checked as they are asked for.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/gguf.h"

namespace tda {

/// "@" in a key stands for the architecture. All that is wrong is a CheckpointError that names the
/// key.
class GgufKeys {
 public:
  explicit GgufKeys(const GgufFile& file);
  /// Throws if the file's is none of these.
  void check_architecture(std::span<const char* const> architectures);

  const std::string& file() const { return file_.name(); }
  const std::string& architecture() const { return architecture_; }

  /// Null if there is none.
  nlohmann::json find(const std::string& key);
  /// Each throws if the key is of another type, or missing and `absent` not given.
  std::int64_t integer(const std::string& key, std::optional<std::int64_t> absent = {});
  std::string text(const std::string& key, std::optional<std::string> absent = {});
  bool flag(const std::string& key, bool absent);
  /// An array, empty if the key may be missing and is.
  nlohmann::json list(const std::string& key, bool may_be_missing = false);
  /// Rounded to 32 bits and written as briefly as these allow: 1e-05 for 9.99999974738e-06.
  double number(const std::string& key, std::optional<double> absent = {});
  /// A size that is given once, or for each layer but then always the same.
  std::int64_t integer_of_layers(const std::string& key, std::int64_t layers,
                                 std::optional<std::int64_t> absent = {});

  /// `id`, which the key says, if there are so many tokens.
  std::int64_t token(const std::string& key, const nlohmann::json& id, std::int64_t tokens) const;
  /// That of "tokenizer.ggml.`name`_token_id", or `absent`.
  std::int64_t special_token(const std::string& name, std::int64_t tokens, std::int64_t absent);

  /// Throws for any other value than these. condition: for the message, such as "with yarn"
  void expect(const std::string& key, const nlohmann::json& values,
              std::string_view condition = "");
  /// Throws for a key of the architecture that nobody has asked for, but for these.
  void refuse_unread(std::span<const char* const> without_effect);

  [[noreturn]] void fail(const std::string& key, const nlohmann::json& found,
                         const std::string& expected) const;

 private:
  std::string full(std::string key) const;

  const GgufFile& file_;
  std::string architecture_;
  std::set<std::string> asked_;
};

/// The tensor with Llama 3's frequency divisors, which go to config.json.
inline constexpr const char* kRopeFactors = "rope_freqs.weight";
/// What config.json would say. stored: tensors by their names in the file, one of them
/// token_embd.weight
nlohmann::json gguf_config(GgufKeys& keys, const TensorMap& stored);
/// What generation_config.json would say: bos_token_id, and as eos_token_id all tokens that end a
/// text, a turn or a message: those that the file names, then those known by name.
nlohmann::json generation_ids(GgufKeys& keys, std::int64_t vocabulary);

}  // namespace tda
