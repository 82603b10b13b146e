// A checkpoint: a folder with config.json and safetensors files, of tensors or of packed weights, or
// a GGUF file.
#pragma once

#include <tda/model_config.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "base/file.h"
#include "checkpoint/ggml_types.h"

namespace tda {

class QuantizedMatrix;

/// A tensor of a safetensors or GGUF file. Its data is read in pieces instead of mapped, so that a file
/// that is replaced or truncated meanwhile makes a read fail and does not end the process.
struct TensorView {
  std::string name;
  DType dtype = DType::other;
  std::string dtype_name;  // as the file spells it, e.g. "BF16"
  std::vector<std::int64_t> shape;
  std::int64_t begin = 0;  // offset of its data in the file, not aligned
  std::int64_t bytes = 0;
  std::shared_ptr<const File> file;
  /// If not null, the data is made from this instead, and `file` is where its codes are.
  std::shared_ptr<const QuantizedMatrix> quantized;
  /// If not null, the same with columns in the order that `quantized` there has: with 4 bits.
  std::shared_ptr<const TensorView> sorted;
  /// If not 0, each of so many heads has its rows in the file in rotary pairs, (0, h), (1, h + 1) and
  /// so on with h half of the head, instead of in order.
  std::int64_t rotary_heads = 0;
  float added = 0;  // to every value of the file: dequantize() gives so much more than meant

  /// Whether the values have 4 bits, if need be sorted; see tda::has_four_bits.
  bool has_four_bits() const { return sorted || tda::has_four_bits(dtype); }
  /// Bytes [first, first + count) of the data. Throws CheckpointError.
  void read(std::int64_t first, std::int64_t count, void* out) const;
  /// Rows [first, first + count) in order; a vector is one row. dequantize() gives their values.
  void read_rows(std::int64_t first, std::int64_t count, std::byte* out) const;
  /// Until the result is gone, what reading in pieces would else prepare for each of them is kept.
  std::shared_ptr<const void> keep() const;
};

std::string shape_text(const std::vector<std::int64_t>& shape);  // "[2, 3]"

using TensorMap = std::map<std::string, TensorView, std::less<>>;

/// The tensors of one file. Every header field is checked: sizes, offsets inside the file, no
/// overlap, no holes, bytes equal to shape times dtype. `metadata` receives what the file says of
/// itself. Throws CheckpointError.
TensorMap read_safetensors(const std::filesystem::path& path,
                           std::map<std::string, std::string>* metadata = nullptr);

/// Weights in engine layout, as pack_checkpoint writes them: one tensor of bytes, used in place.
/// config.json describes it.
struct PackedWeights {
  static constexpr const char* kKey = "tdaengine";  // in config.json
  static constexpr const char* kTensor = "arena";
  static constexpr std::int64_t kLayout =
      8;  // increment when layout.cpp or a weight format changes any byte
  static constexpr std::int64_t kAlignment = 4096;  // of the data in the file: a page
  WeightFormat format = WeightFormat::automatic;    // anything but automatic
  std::string fingerprint;                          // of the checkpoint they were made from
  std::int64_t parameters = 0;                      // in that checkpoint
  // int4: what the embedding and each matrix of the layers is, in the order of the arena; see
  // weights/bricks.h
  std::vector<std::string> matrices;
  TensorView arena;
  /// The arena, mapped from the file. Truncating the file while it is mapped ends the process (see
  /// File::map), so an engine folder is replaced by renaming, as pack_checkpoint does, never
  /// written in place.
  std::shared_ptr<const std::byte> data;
};

/// nullopt if config.json, whose content is `config`, does not describe an engine folder. Throws
/// CheckpointError.
std::optional<PackedWeights> read_packed(const std::filesystem::path& folder,
                                         const nlohmann::json& config);

/// Tensor name -> shard, from the content of model.safetensors.index.json. A shard is a plain file
/// name in the same folder. Throws CheckpointError.
std::map<std::string, std::string> parse_weight_map(const nlohmann::json& index,
                                                    const std::string& file);

class Checkpoint {
 public:
  /// Of a folder reads config.json, generation_config.json if there, and model.safetensors or the
  /// shards that model.safetensors.index.json lists. A file is taken for a GGUF file, of several the
  /// first. Throws CheckpointError.
  explicit Checkpoint(const std::filesystem::path& path);

  const ModelConfig& config() const { return config_; }
  /// What config.json says, or would say of a GGUF file.
  const nlohmann::json& config_json() const { return *config_json_; }
  const std::string& name() const { return name_; }
  /// 16 hex digits: a hash of all stored tensors' names, dtypes, shapes and samples of their data. Packed
  /// weights have the fingerprint of the checkpoint they were made from.
  const std::string& fingerprint() const { return fingerprint_; }

  /// Total number of elements.
  std::int64_t parameters() const { return parameters_; }

  /// None for packed weights.
  const TensorMap& tensors() const { return tensors_; }
  bool contains(std::string_view tensor) const;
  /// Throws CheckpointError if absent, of another shape, or of a dtype without f32 values.
  const TensorView& tensor(std::string_view name, std::vector<std::int64_t> expected_shape) const;
  /// Throws CheckpointError if there are further tensors that would change results.
  void refuse_unused(const std::set<std::string_view>& used) const;
  /// Whether any matrix has 4 bits.
  bool has_four_bits() const;
  /// What WeightFormat::automatic means here, by the matrices' types: int4 if half of the layers'
  /// weights or more have 4 bits, int8 if any matrix is quantised otherwise, f32 if any is f32, else
  /// bf16.
  WeightFormat natural_format() const;
  /// Null for a checkpoint of single tensors.
  const PackedWeights* packed() const { return packed_ ? &*packed_ : nullptr; }

 private:
  void read_folder(const std::filesystem::path& folder);
  void read_tensors(const std::filesystem::path& folder);
  void drop_empty_biases();

  std::string name_;
  ModelConfig config_;
  std::shared_ptr<const nlohmann::json> config_json_;
  std::string fingerprint_;
  std::int64_t parameters_ = 0;
  std::optional<PackedWeights> packed_;
  TensorMap tensors_;  // of all files
};

/// config.json (and generation_config.json, which may be absent) of `folder`, checked for every
/// field the engine relies on. Throws CheckpointError naming file, key, found and expected.
ModelConfig read_config(const std::filesystem::path& folder);
/// The same for the files' contents; `generation` may be null.
ModelConfig parse_config(const nlohmann::json& config, const nlohmann::json* generation,
                         const std::filesystem::path& folder);

}  // namespace tda
