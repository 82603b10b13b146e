#pragma once

#include <filesystem>
#include <initializer_list>
#include <string_view>

namespace tda {

/// Writes `parts` one after the other to the file at `path`, completely or not at all: to a
/// temporary file in the same folder, which is flushed to disk and then renamed. Throws
/// CheckpointError naming the file and the system's reason, and leaves no temporary file behind.
void write_file_atomically(const std::filesystem::path& path,
                           std::initializer_list<std::string_view> parts);

}  // namespace tda
