// JSON as checkpoints need it: every fault is a CheckpointError that names the file.
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

// Compiled once, in json.cpp, instead of in every file that includes this.
extern template class nlohmann::basic_json<>;

namespace tda {

// Far beyond what any checkpoint has; a hostile one shall not cost more memory than these allow.
inline constexpr std::int64_t kMaxJsonBytes = 100'000'000;  // safetensors' own limit for a header
inline constexpr int kMaxJsonDepth = 64;
inline constexpr std::int64_t kMaxJsonValues = std::int64_t{1} << 22;

/// For messages, which quote files: plain ASCII, and not all of a long string.
std::string describe(const nlohmann::json& value);

/// Parses an object within the limits above, and refuses repeated keys, which nlohmann::json alone
/// would silently drop. Throws CheckpointError; `file` is its name in messages.
nlohmann::json parse_json_object(std::string_view text, const std::string& file);

/// The object that makes up a file. Throws CheckpointError.
nlohmann::json read_json_object(const std::filesystem::path& path);

}  // namespace tda
