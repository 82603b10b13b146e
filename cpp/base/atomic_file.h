#pragma once

#include <filesystem>
#include <initializer_list>
#include <string_view>

namespace tda {

/// Makes `parts`, one after the other, the file at `path`, whole or not at all: what was there
/// before stays until a temporary file in the same folder, flushed to disk, takes its name. Throws
/// CheckpointError naming the file and the system's reason; no temporary file stays behind.
void write_file_atomically(const std::filesystem::path& path,
                           std::initializer_list<std::string_view> parts);

}  // namespace tda
