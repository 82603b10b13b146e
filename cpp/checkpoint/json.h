// JSON as checkpoints need it: every fault is a CheckpointError that names the file.
#pragma once

#include <tda/error.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/file.h"

namespace tda {

// Far beyond what any checkpoint has; a hostile one shall not cost more memory than these allow.
inline constexpr std::int64_t kMaxJsonBytes = 100'000'000;  // safetensors' own limit for a header
inline constexpr int kMaxJsonDepth = 64;
inline constexpr std::int64_t kMaxJsonValues = std::int64_t{1} << 22;

/// For messages, which quote files: plain ASCII, and not all of a long string.
inline std::string describe(const nlohmann::json& value) {
  if (value.is_structured()) return value.is_object() ? "an object" : "an array";
  const std::string text = value.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
  return text.size() <= 80 ? text : text.substr(0, 80) + "...";
}

/// Parses an object within the limits above, and refuses repeated keys, which nlohmann::json alone
/// would silently drop.
inline nlohmann::json parse_json_object(std::string_view text, const std::string& file) {
  using nlohmann::json;
  std::vector<std::set<std::string>> keys;  // of the objects that are open
  std::int64_t values = 0;
  const auto limit = [&](std::int64_t most, const char* what) {
    throw CheckpointError(file + ": JSON has more than " + std::to_string(most) + " " + what +
                          ", expected a checkpoint's");
  };
  const auto watch = [&](int depth, json::parse_event_t event, json& parsed) {
    const bool opens =
        event == json::parse_event_t::object_start || event == json::parse_event_t::array_start;
    if (opens && depth >= kMaxJsonDepth) limit(kMaxJsonDepth, "levels");
    if ((opens || event == json::parse_event_t::value) && ++values > kMaxJsonValues)
      limit(kMaxJsonValues, "values");
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
  const File file(path, "a JSON file");
  if (file.bytes() > kMaxJsonBytes)
    throw CheckpointError(file.name() + ": found " + std::to_string(file.bytes()) +
                          " bytes, expected JSON of at most " + std::to_string(kMaxJsonBytes));
  std::string text(static_cast<std::size_t>(file.bytes()), '\0');
  file.read(0, file.bytes(), text.data());
  return parse_json_object(text, file.name());
}

}  // namespace tda
