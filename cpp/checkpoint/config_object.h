// Checked access to the keys of config.json.
#pragma once

#include <tda/error.h>
#include <tda/types.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/json.h"

namespace tda {

// Larger than any real model, but small enough that no size in bytes overflows 63 bits: a matrix
// has at most 2^22 x 2^22 x 4 bytes, and a layer seven matrices.
inline constexpr std::int64_t max_size = std::int64_t{1} << 22;
inline constexpr std::int64_t max_layers = std::int64_t{1} << 12;
inline constexpr std::int64_t max_positions = std::int64_t{1} << 24;
inline constexpr std::int64_t max_window = std::numeric_limits<std::int32_t>::max();

inline constexpr double any_number = std::numeric_limits<double>::lowest();

/// A JSON object of a configuration file, with checked access to its keys.
class Object {
 public:
  Object(const nlohmann::json& object, std::string file, std::string prefix = "")
      : object_(&object), file_(std::move(file)), prefix_(std::move(prefix)) {}

  [[noreturn]] void fail(const std::string& key, const std::string& expected) const {
    const nlohmann::json* value = find(key);
    throw CheckpointError(file_ + ": " + prefix_ + key + " is " +
                          (value ? describe(*value) : "missing") + ", expected " + expected);
  }

  const nlohmann::json* find(const std::string& key) const {
    const auto found = object_->find(key);
    return found == object_->end() ? nullptr : &*found;
  }
  std::vector<std::string> keys() const {
    std::vector<std::string> keys;
    for (const auto& [key, value] : object_->items()) keys.push_back(key);
    return keys;
  }
  bool is_null(const std::string& key) const { return find(key) && find(key)->is_null(); }
  /// Present and not null.
  bool has(const std::string& key) const { return find(key) && !find(key)->is_null(); }

  /// nullopt if absent; null is an error.
  std::optional<std::int64_t> integer(const std::string& key, std::int64_t least,
                                      std::int64_t most) const {
    const nlohmann::json* value = find(key);
    if (!value) return std::nullopt;
    return checked_integer(key, *value, least, most);
  }

  /// nullopt if absent or null; must be greater than `bound`.
  std::optional<double> number(const std::string& key, double bound) const {
    if (!has(key)) return std::nullopt;
    const nlohmann::json& value = *find(key);
    if (!value.is_number() || !(value.get<double>() > bound))
      fail(key,
           bound == any_number ? "a number" : "a number above " + nlohmann::json(bound).dump());
    return value.get<double>();
  }
  double required_number(const std::string& key, double bound) const {
    const std::optional<double> value = number(key, bound);
    if (!value) fail(key, "a number above " + nlohmann::json(bound).dump());
    return *value;
  }

  /// Null is an error.
  bool flag(const std::string& key, bool absent) const {
    const nlohmann::json* value = find(key);
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
    const nlohmann::json& value = *find(key);
    const auto append = [&](const nlohmann::json& item) {
      const auto id = static_cast<Token>(checked_integer(key, item, 0, vocab_size - 1));
      if (std::find(ids.begin(), ids.end(), id) == ids.end()) ids.push_back(id);
    };
    if (value.is_array())
      for (const nlohmann::json& item : value) append(item);
    else
      append(value);
  }

  /// The object under `key`; nullopt if absent, null or empty.
  std::optional<Object> object(const std::string& key) const {
    if (!has(key)) return std::nullopt;
    const nlohmann::json& value = *find(key);
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
  std::int64_t checked_integer(const std::string& key, const nlohmann::json& value,
                               std::int64_t least, std::int64_t most) const {
    constexpr std::uint64_t largest = std::numeric_limits<std::int64_t>::max();
    const bool fits = value.is_number_unsigned() ? value.get<std::uint64_t>() <= largest
                                                 : value.is_number_integer();
    if (!fits || value.get<std::int64_t>() < least || value.get<std::int64_t>() > most)
      throw CheckpointError(file_ + ": " + prefix_ + key + " is " + describe(value) +
                            ", expected an integer from " + std::to_string(least) + " to " +
                            std::to_string(most));
    return value.get<std::int64_t>();
  }

  const nlohmann::json* object_;
  std::string file_;
  std::string prefix_;
};

}  // namespace tda
