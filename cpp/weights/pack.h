// Engine folders on disk, see PackedWeights.
#pragma once

#include <cstdint>
#include <filesystem>

#include "checkpoint/checkpoint.h"
#include "weights/model.h"

namespace tda {

/// Throws OptionError if the folder does not exist or has such files already.
void check_engine_folder(const std::filesystem::path& folder);

/// Each file is written whole or not at all. calibration_tokens: how many the weights were rounded by
void write_engine_folder(const Model& model, const Checkpoint& checkpoint,
                         const std::filesystem::path& folder, std::int64_t calibration_tokens = 0);

}  // namespace tda
