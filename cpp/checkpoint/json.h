// JSON as checkpoints need it: every fault is a CheckpointError that names the file.
#pragma once

#include <tda/error.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace tda {

/// What was found, for messages: scalars as they are, the rest by kind, long strings cut short.
inline std::string describe(const nlohmann::json& value) {
  if (value.is_structured()) return value.is_object() ? "an object" : "an array";
  const std::string text = value.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
  return text.size() <= 60 ? text : text.substr(0, 60) + "...";
}

/// Parses an object and refuses repeated keys, which nlohmann::json alone would silently drop.
inline nlohmann::json parse_json_object(std::string_view text, const std::string& file) {
  using nlohmann::json;
  std::vector<std::set<std::string>> keys;  // of the objects that are open
  const auto watch = [&](int, json::parse_event_t event, json& parsed) {
    if (event == json::parse_event_t::object_start) keys.emplace_back();
    if (event == json::parse_event_t::object_end) keys.pop_back();
    if (event == json::parse_event_t::key && !keys.back().insert(parsed.get<std::string>()).second)
      throw CheckpointError(file + ": key " + describe(parsed) +
                            " appears twice in one object, expected once");
    return true;
  };
  try {
    json result = json::parse(text, watch);
    if (result.is_object()) return result;
    throw CheckpointError(file + ": found " + describe(result) + ", expected a JSON object");
  } catch (const json::exception& e) {
    // What follows "last read" quotes the file: of any length, and perhaps not even text.
    const std::string found = e.what();
    const std::size_t end = std::min(found.find("; last read"), std::size_t{160});
    throw CheckpointError(file + ": expected JSON, found: " + found.substr(0, end));
  }
}

/// The object that makes up a file.
inline nlohmann::json read_json_object(const std::filesystem::path& path) {
  std::error_code ignored;
  std::ifstream stream(path, std::ios::binary);
  if (!std::filesystem::is_regular_file(path, ignored) || !stream)
    throw CheckpointError(path.string() + ": missing or unreadable, expected a JSON file");
  std::string text;
  try {
    text = {std::istreambuf_iterator<char>(stream), {}};
  } catch (const std::ios_base::failure& e) {
    throw CheckpointError(path.string() + ": cannot be read: " + e.what());
  }
  return parse_json_object(text, path.string());
}

}  // namespace tda
