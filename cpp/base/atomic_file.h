#pragma once

#include <filesystem>
#include <initializer_list>
#include <string_view>

namespace tda {

/// Writes `parts` one after the other to the file at `path`, completely or not at all: to a
/// temporary file in the same folder, which is flushed to disk, read back and renamed. A file that
/// was there passes on its permissions; of a symbolic link the target is written and the link stays.
/// Throws CheckpointError naming the file and the reason, also for a device, a pipe, a folder or a
/// read-only file, and leaves no temporary file behind.
void write_file_atomically(const std::filesystem::path& path,
                           std::initializer_list<std::string_view> parts);

/// Throws CheckpointError unless the file holds just `parts`, one after the other.
void expect_contents(const std::filesystem::path& path,
                     std::initializer_list<std::string_view> parts);

}  // namespace tda
