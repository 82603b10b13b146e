// GGUF files: keys with values, a table of tensors, then the tensors' data.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <set>
#include <string>
#include <vector>

#include "base/file.h"
#include "checkpoint/checkpoint.h"

namespace tda {

/// What a key stands for, where it lies in the file. Values are decoded when they are asked for, so
/// that a file costs no memory for what nobody needs.
struct GgufValue {
  std::uint32_t kind = 0;  // as numbered by the format; of an array that of its items
  bool is_array = false;
  std::int64_t count = 1;  // items
  std::int64_t begin = 0;  // offset in the file
  std::int64_t bytes = 0;  // with the lengths of strings
};

/// One file, every field of which is checked: sizes, counts and offsets lie within the file, types
/// are known, names are unique, tensors follow each other without holes but for alignment. All
/// that is wrong is a CheckpointError.
class GgufFile {
 public:
  explicit GgufFile(const std::filesystem::path& path);

  const std::string& name() const { return file_->name(); }
  /// Null if there is no such key. Strings are bytes, whether UTF-8 or not. Throws CheckpointError
  /// for an array beyond any vocabulary.
  nlohmann::json value(const std::string& key) const;
  const std::map<std::string, GgufValue>& values() const { return values_; }
  void prefetch() const { file_->prefetch(); }
  /// By their names in the file.
  const TensorMap& tensors() const { return tensors_; }

 private:
  std::shared_ptr<const File> file_;
  std::map<std::string, GgufValue> values_;
  TensorMap tensors_;
};

/// The file or, if it is the first of several of a model, all of them in order. Throws
/// CheckpointError.
std::vector<GgufFile> read_gguf_parts(const std::filesystem::path& path);

/// A model in a GGUF file, or in several of which the path is the first. Keys mean what they mean
/// to llama.cpp; one that changes results and is not supported is refused by name.
class GgufModel {
 public:
  explicit GgufModel(const std::filesystem::path& path);

  /// What config.json and generation_config.json would say.
  const std::shared_ptr<const nlohmann::json>& config() const { return config_; }
  const nlohmann::json& generation() const { return *generation_; }
  const ModelConfig& parsed() const { return parsed_; }
  /// By the names they have in Hugging Face checkpoints, rows in the order they have there.
  const TensorMap& tensors() const { return tensors_; }
  const std::vector<GgufFile>& files() const { return files_; }
  /// The file with the keys.
  const GgufFile& first() const { return files_.front(); }

 private:
  std::vector<GgufFile> files_;
  TensorMap tensors_;
  ModelConfig parsed_;
  std::shared_ptr<const nlohmann::json> config_, generation_;
};

}  // namespace tda
