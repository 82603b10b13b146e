// JSON of checkpoints: every error is a CheckpointError that names the file.
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace tda {

// Far beyond what any checkpoint has; they limit the memory that a hostile file can use.
inline constexpr std::int64_t kMaxJsonBytes = 100'000'000;  // safetensors' own limit for a header
inline constexpr int kMaxJsonDepth = 64;
inline constexpr std::int64_t kMaxJsonValues = std::int64_t{1} << 22;

/// For messages that quote a file: ASCII, with long values cut short.
std::string describe(const nlohmann::json& value);

/// NaN, Infinity and -Infinity, which Python's json writes and reads, are not JSON.
enum class NonFinite { refused, as_text };
/// Puts them in quotation marks, so that whoever expects a number there rejects them.
std::string quote_non_finite(std::string_view text);

/// Parses an object within the limits above and rejects repeated keys, which nlohmann::json would
/// silently drop. Throws CheckpointError; file: the name in messages.
nlohmann::json parse_json_object(std::string_view text, const std::string& file,
                                 NonFinite = NonFinite::refused);

/// Reads a file that contains one JSON object. Throws CheckpointError.
nlohmann::json read_json_object(const std::filesystem::path& path, NonFinite = NonFinite::refused);

}  // namespace tda
