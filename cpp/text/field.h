// A value in a tokenizer's JSON file, with its path for error messages.
#pragma once

#include <tda/error.h>
#include <tda/types.h>

#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/json.h"

namespace tda {

class Field {
 public:
  /// Larger ids than any real vocabulary has mean a damaged file, and would need huge tables.
  static constexpr std::int64_t max_tokens = std::int64_t{1} << 22;

  Field(const nlohmann::json* value, std::string file, std::string path = "")
      : value_(value), file_(std::move(file)), path_(std::move(path)) {}

  [[noreturn]] void fail(const std::string& expected) const {
    throw CheckpointError(file_ + ": " + (path_.empty() ? "it" : path_) + " is " +
                          (value_ ? describe(*value_) : "missing") + ", expected " + expected);
  }

  /// Missing or null.
  bool is_absent() const { return !value_ || value_->is_null(); }
  bool is_zero() const { return value_ && value_->is_number() && *value_ == 0; }
  bool is_object() const { return value_ && value_->is_object(); }
  bool is_array() const { return value_ && value_->is_array(); }

  const nlohmann::json& object() const {
    if (!value_ || !value_->is_object()) fail("an object");
    return *value_;
  }
  /// A member of an object, possibly missing.
  Field operator[](const std::string& key) const {
    const auto found = object().find(key);
    return {found == value_->end() ? nullptr : &*found, file_, path_of(key)};
  }
  std::vector<Field> elements() const {
    if (!is_array()) fail("an array");
    std::vector<Field> result;
    for (std::size_t i = 0; i < value_->size(); ++i)
      result.emplace_back(&(*value_)[i], file_, path_ + "[" + std::to_string(i) + "]");
    return result;
  }

  const std::string& text() const {
    if (!value_ || !value_->is_string()) fail("a string");
    return value_->get_ref<const std::string&>();
  }
  bool flag() const {
    if (!value_ || !value_->is_boolean()) fail("true or false");
    return value_->get<bool>();
  }
  bool flag_or(bool absent) const { return is_absent() ? absent : flag(); }
  Token id() const { return static_cast<Token>(count(max_tokens - 1)); }
  std::int64_t count(std::int64_t most) const {
    const bool fits =
        value_ && value_->is_number_integer() &&
        (value_->is_number_unsigned() ? std::cmp_less_equal(value_->get<std::uint64_t>(), most)
                                      : value_->get<std::int64_t>() >= 0);
    if (!fits) fail("an integer from 0 to " + std::to_string(most));
    return value_->get<std::int64_t>();
  }

 private:
  /// Keys may come from the file, so messages show them short and as plain text.
  std::string path_of(const std::string& key) const {
    constexpr const char* plain = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz_0123456789";
    if (key.size() > 40 || key.find_first_not_of(plain) != key.npos)
      return path_ + "[" + describe(key) + "]";
    return path_.empty() ? key : path_ + "." + key;
  }

  const nlohmann::json* value_;  // null: missing
  std::string file_;
  std::string path_;
};

}  // namespace tda
