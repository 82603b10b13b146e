// A checkpoint folder: config.json, and safetensors files with tensors or with packed weights.
#pragma once

#include <tda/model_config.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/file.h"

namespace tda {

enum class DType { f32, f16, bf16, other };

/// A tensor of a safetensors file, which is read piece by piece: a checkpoint's files may be
/// replaced or cut short at any time, and then reading, not the process, fails.
struct TensorView {
  std::string name;
  DType dtype = DType::other;
  std::string dtype_name;  // as the file spells it, e.g. "BF16"
  std::vector<std::int64_t> shape;
  std::int64_t begin = 0;  // where its data is in the file, at any alignment
  std::int64_t bytes = 0;
  std::shared_ptr<const File> file;

  /// Bytes [first, first + count) of the data. Throws CheckpointError.
  void read(std::int64_t first, std::int64_t count, void* out) const {
    file->read(begin + first, count, out);
  }
};

using TensorMap = std::map<std::string, TensorView, std::less<>>;

/// The tensors of one file. Every header field is checked: sizes, offsets inside the file, no
/// overlap, no holes, bytes equal to shape times dtype. Throws CheckpointError.
TensorMap read_safetensors(const std::filesystem::path& path);

/// Weights that pack_checkpoint has brought into engine layout: one tensor of bytes, which is used
/// in place. config.json says what they are.
struct PackedWeights {
  static constexpr const char* kKey = "tdaengine";  // in config.json
  static constexpr const char* kTensor = "arena";
  static constexpr std::int64_t kLayout =
      5;  // changes with every byte that layout.cpp would place elsewhere
  static constexpr std::int64_t kAlignment = 4096;  // of the data in the file: a page
  WeightFormat format = WeightFormat::automatic;    // anything but automatic
  std::string fingerprint;                          // of the checkpoint they were made of,
  std::int64_t parameters = 0;                      // and its numbers
  TensorView arena;
  /// Its bytes, in the file's pages. Whoever shortens the file now ends the process (see
  /// File::map): an engine folder is replaced by renaming, as pack_checkpoint does, never written.
  std::shared_ptr<const std::byte> data;
};

/// Nothing if config.json does not make the folder an engine folder. Throws CheckpointError.
std::optional<PackedWeights> read_packed(const std::filesystem::path& folder);

/// Tensor name -> shard, as model.safetensors.index.json states it in `index`, its content. A shard
/// is a plain file name in the same folder. Throws CheckpointError.
std::map<std::string, std::string> parse_weight_map(const nlohmann::json& index,
                                                    const std::string& file);

class Checkpoint {
 public:
  /// Reads config.json, generation_config.json if there, and model.safetensors or the shards that
  /// model.safetensors.index.json lists. Throws CheckpointError.
  explicit Checkpoint(const std::filesystem::path& folder);

  const ModelConfig& config() const { return config_; }
  const std::string& name() const { return name_; }
  /// 16 hex digits over names, dtypes, shapes and samples of the data of all tensors; of packed
  /// weights what those had that they were made of.
  const std::string& fingerprint() const { return fingerprint_; }

  /// How many numbers all tensors hold.
  std::int64_t parameters() const { return parameters_; }

  bool contains(std::string_view tensor) const;
  /// Throws CheckpointError if absent, of another shape, or of a dtype other than f32, f16, bf16.
  const TensorView& tensor(std::string_view name, std::vector<std::int64_t> expected_shape) const;
  /// f32 if any weight matrix is f32, else bf16: what WeightFormat::automatic means here.
  WeightFormat natural_format() const;
  /// Null for a checkpoint of single tensors.
  const PackedWeights* packed() const { return packed_ ? &*packed_ : nullptr; }

 private:
  std::string name_;
  ModelConfig config_;
  std::string fingerprint_;
  std::int64_t parameters_ = 0;
  std::optional<PackedWeights> packed_;
  TensorMap tensors_;  // of all files
};

/// config.json (and generation_config.json, which may be absent) of `folder`, checked for every
/// field the engine relies on. Throws CheckpointError naming file, key, found and expected.
ModelConfig read_config(const std::filesystem::path& folder);
/// The same of the files' contents; `generation` may be null.
ModelConfig parse_config(const nlohmann::json& config, const nlohmann::json* generation,
                         const std::filesystem::path& folder);

}  // namespace tda
