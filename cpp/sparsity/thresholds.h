// How files of thresholds are read; what they hold is in <tda/sparsity.h>.
#pragma once

#include <tda/sparsity.h>

#include <filesystem>
#include <nlohmann/json_fwd.hpp>

namespace tda {

/// Thresholds::load of what the file at `path` holds.
Thresholds parse_thresholds(const nlohmann::json& content, const std::filesystem::path& path);

}  // namespace tda
