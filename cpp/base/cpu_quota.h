// The share of the machine's CPUs that control groups leave a process, as containers set it.
#pragma once

#include <filesystem>
#include <optional>

namespace tda {

/// CPU time per time that this process may use, 1.5 for one and a half CPUs: the least quota of its
/// control groups (Linux, versions 1 and 2) and of those around them. Nothing if none has a quota,
/// or if they cannot be read. `root`: where /proc and the mount points are.
std::optional<double> cpu_quota(const std::filesystem::path& root = "/");

}  // namespace tda
