#include "base/json.h"

#include <tda/error.h>

#include <algorithm>
#include <set>
#include <vector>

#include "base/file.h"

namespace tda {

std::string describe(const nlohmann::json& value) {
  if (value.is_structured()) return value.is_object() ? "an object" : "an array";
  const std::string text = value.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
  return text.size() <= 80 ? text : text.substr(0, 80) + "...";
}

std::string quote_non_finite(std::string_view text) {
  std::string result;
  bool in_string = false;
  for (std::size_t at = 0; at < text.size();) {
    std::size_t size = 1;
    if (in_string && text[at] == '\\')
      size = 2;
    else if (text[at] == '"')
      in_string = !in_string;
    else if (!in_string)
      for (std::string_view word : {"NaN", "Infinity", "-Infinity"})
        if (text.substr(at).starts_with(word)) size = word.size();
    const std::string_view part = text.substr(at, size);
    const bool quoted = !in_string && size > 2;
    result.append(quoted ? "\"" : "").append(part).append(quoted ? "\"" : "");
    at += size;
  }
  return result;
}

nlohmann::json parse_json_object(std::string_view text, const std::string& file,
                                 NonFinite non_finite) {
  using nlohmann::json;
  std::vector<std::set<std::string>> keys;  // of each enclosing object
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
    json result = non_finite == NonFinite::refused ? json::parse(text, watch)
                                                   : json::parse(quote_non_finite(text), watch);
    if (result.is_object()) return result;
    throw CheckpointError(file + ": found " + describe(result) + ", expected a JSON object");
  } catch (const json::exception& e) {
    // The part from "last read" on quotes the file: it may be long, or not even text.
    const std::string found = e.what();
    const std::size_t end = std::min(found.find("; last read"), std::size_t{160});
    throw CheckpointError(file + ": expected JSON, found: " + found.substr(0, end));
  }
}

nlohmann::json read_json_object(const std::filesystem::path& path, NonFinite non_finite) {
  return parse_json_object(read_file(path, "a JSON file", kMaxJsonBytes), path.string(),
                           non_finite);
}

}  // namespace tda
