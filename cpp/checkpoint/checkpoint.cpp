#include "checkpoint/checkpoint.h"

#include <tda/error.h>

#include <algorithm>
#include <set>

#include "base/hash.h"
#include "base/json.h"
#include "base/size.h"
#include "checkpoint/config_object.h"
#include "checkpoint/gguf.h"
#include "checkpoint/quantization.h"

namespace tda {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

/// Hashes samples, so that a fingerprint does not require reading the whole model. A few bytes of
/// every tensor are enough: they differ between any two separately trained models.
void add_samples(Hash& hash, const TensorView& tensor) {
  constexpr std::int64_t pieces = 16, piece = 64;  // 16 samples of 64 bytes
  std::byte sample[pieces * piece];
  const auto add = [&](std::int64_t first, std::int64_t count) {
    tensor.read(first, count, sample);
    hash.add(sample, count);
  };
  if (tensor.bytes <= pieces * piece) return add(0, tensor.bytes);
  for (std::int64_t i = 0; i < pieces; ++i) add((tensor.bytes - piece) / (pieces - 1) * i, piece);
}

bool are_equal(const TensorView& a, const TensorView& b) {
  if (a.dtype_name != b.dtype_name || a.shape != b.shape) return false;
  constexpr std::int64_t piece = 1 << 20;
  std::vector<std::byte> of_a(piece), of_b(piece);
  for (std::int64_t at = 0; at < a.bytes; at += piece) {
    const std::int64_t count = std::min(piece, a.bytes - at);
    a.read(at, count, of_a.data());
    b.read(at, count, of_b.data());
    if (!std::equal(of_a.begin(), of_a.begin() + count, of_b.begin())) return false;
  }
  return true;
}

std::string fingerprint_of(const TensorMap& tensors) {
  Hash hash;
  for (const auto& [name, view] : tensors) {
    hash.add(name);
    hash.add(view.dtype_name);
    hash.add(static_cast<std::int64_t>(view.shape.size()));
    for (std::int64_t size : view.shape) hash.add(size);
    add_samples(hash, view);
  }
  return hash.hex();
}

std::int64_t parameters_of(const TensorMap& tensors) {
  Size parameters = 0;
  for (const auto& [name, view] : tensors) {
    Size count = 1;
    for (std::int64_t size : view.shape) count = count * size;
    parameters = parameters + count;
  }
  return parameters.value();  // cannot overflow: bounded by the files' sizes
}

bool is_all_zeros(const TensorView& tensor) {
  std::vector<std::byte> data(tensor.bytes);
  tensor.read(0, tensor.bytes, data.data());
  return std::ranges::all_of(data, [](std::byte b) { return b == std::byte{}; });
}

}  // namespace

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text;
  for (std::int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

std::map<std::string, std::string> parse_weight_map(const json& index, const std::string& file) {
  const auto entries = index.find("weight_map");
  if (entries == index.end() || !entries->is_object() || entries->empty())
    throw CheckpointError(file +
                          ": weight_map is missing or empty, expected tensor names and files");
  std::map<std::string, std::string> result;
  for (const auto& [tensor, shard] : entries->items()) {
    const std::string name = shard.is_string() ? shard.get<std::string>() : "";
    if (name.empty() || name.size() > 255 || name == "." || name == ".." ||
        name.find_first_of({"/\\\0", 3}) != name.npos)
      throw CheckpointError(file + ": weight_map of " + describe(tensor) + " is " +
                            describe(shard) + ", expected a file name without folders");
    result.emplace(tensor, name);
  }
  return result;
}

void TensorView::read(std::int64_t first, std::int64_t count, void* out) const {
  if (quantized) return quantized->read(begin + first, count, static_cast<std::byte*>(out));
  file->read(begin + first, count, out);
}

std::shared_ptr<const void> TensorView::keep() const {
  return quantized ? quantized->contents() : nullptr;
}

void TensorView::read_rows(std::int64_t first, std::int64_t count, std::byte* out) const {
  const bool is_vector = shape.size() == 1;
  const std::int64_t row = is_vector ? bytes : bytes / shape[0];
  if (rotary_heads == 0) return read(first * row, count * row, out);
  // What lies in another order: rows, or a vector's values.
  const std::int64_t unit = bytes / shape[0], units = is_vector ? shape[0] : 1;
  const std::int64_t head = shape[0] / rotary_heads, half = head / 2;
  for (std::int64_t i = first * units; i < (first + count) * units; ++i, out += unit) {
    const std::int64_t in_head = i % head;
    read((i - in_head + in_head % half * 2 + in_head / half) * unit, unit, out);
  }
}

Checkpoint::Checkpoint(const fs::path& path) {
  std::error_code ignored;
  name_ = fs::canonical(path, ignored).filename().string();
  if (fs::is_directory(path, ignored)) {
    read_folder(path);
  } else if (fs::exists(path, ignored)) {
    const GgufModel model(path);
    config_ = model.parsed();
    config_json_ = model.config();
    tensors_ = model.tensors();
    fingerprint_ = fingerprint_of(tensors_);
    for (const GgufFile& file : model.files()) file.prefetch();
  } else {
    throw CheckpointError(path.string() +
                          ": no such folder, expected one with config.json and "
                          "model.safetensors, or a GGUF file");
  }
  if (!packed_) parameters_ = parameters_of(tensors_);
}

void Checkpoint::read_folder(const fs::path& folder) {
  config_ = read_config(folder);
  config_json_ =
      std::make_shared<const json>(read_json_object(folder / "config.json", NonFinite::as_text));
  packed_ = read_packed(folder, *config_json_);
  if (packed_) {
    fingerprint_ = packed_->fingerprint;
    parameters_ = packed_->parameters;
    return;
  }
  read_tensors(folder);
  fingerprint_ = fingerprint_of(tensors_);
  const Object config(*config_json_, (folder / "config.json").string());
  if (const auto quantization = read_quantization(config)) {
    join_quantized(tensors_, *quantization);
    drop_empty_biases();
  }
  // A head of its own that is stored counts more than a configuration that knows of none.
  const auto head = tensors_.find("lm_head.weight"),
             in = tensors_.find("model.embed_tokens.weight");
  if (config_.tied_embeddings && head != tensors_.end() && in != tensors_.end())
    config_.tied_embeddings = are_equal(head->second, in->second);
}

void Checkpoint::read_tensors(const fs::path& folder) {
  std::error_code ignored;
  const fs::path single = folder / "model.safetensors";
  const fs::path index = folder / "model.safetensors.index.json";
  std::map<std::string, std::string> weight_map;
  std::set<std::string> names;
  if (fs::exists(single, ignored)) {
    names.insert(single.filename().string());
  } else if (fs::exists(index, ignored)) {
    weight_map = parse_weight_map(read_json_object(index), index.string());
    for (const auto& [tensor, shard] : weight_map) names.insert(shard);
  } else {
    throw CheckpointError(folder.string() +
                          ": no weights found, expected model.safetensors, or shards and "
                          "model.safetensors.index.json");
  }

  for (const std::string& name : names) {
    TensorMap tensors = read_safetensors(folder / name);
    if (!tensors.empty()) tensors.begin()->second.file->prefetch();
    tensors_.merge(tensors);
    if (!tensors.empty()) {  // merge() leaves the names that are already there
      const auto& [tensor, view] = *tensors.begin();
      throw CheckpointError(view.file->name() + ": tensor " + describe(tensor) + " is also in " +
                            tensors_.at(tensor).file->name() + ", expected in one file");
    }
  }
  for (const auto& [tensor, shard] : weight_map) {
    const auto found = tensors_.find(tensor);
    if (found == tensors_.end() || found->second.file->name() != (folder / shard).string())
      throw CheckpointError((folder / shard).string() + ": tensor " + describe(tensor) +
                            " is missing, expected here by " + index.string());
  }
}

/// Quantisers write biases of zeros for layers that have none.
void Checkpoint::drop_empty_biases() {
  const auto expected = [&](std::string_view layer) {
    const bool qkv =
        layer.ends_with("q_proj") || layer.ends_with("k_proj") || layer.ends_with("v_proj");
    return (qkv && config_.qkv_bias) || (layer.ends_with("o_proj") && config_.output_bias);
  };
  std::erase_if(tensors_, [&](const auto& item) {
    const auto& [name, view] = item;
    if (!name.ends_with(".bias")) return false;
    const std::string layer = name.substr(0, name.size() - 5);
    const auto weights = tensors_.find(layer + ".weight");
    return weights != tensors_.end() && weights->second.quantized && !expected(layer) &&
           is_all_zeros(view);
  });
}

bool Checkpoint::contains(std::string_view tensor) const {
  return tensors_.find(tensor) != tensors_.end();
}

const TensorView& Checkpoint::tensor(std::string_view name,
                                     std::vector<std::int64_t> expected_shape) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) {
    const std::string layer(name.substr(0, name.rfind('.')));
    for (const char* part : {".qweight", ".weight_packed"})
      if (contains(layer + part))
        throw CheckpointError(tensors_.at(layer + part).file->name() + ": found tensor \"" + layer +
                              part +
                              "\", expected quantization_config in config.json to say what "
                              "it is");
    throw CheckpointError("checkpoint " + name_ + ": tensor \"" + std::string(name) +
                          "\" is missing, expected with shape " + shape_text(expected_shape));
  }
  const TensorView& view = found->second;
  if (view.shape != expected_shape)
    throw CheckpointError(view.file->name() + ": tensor \"" + view.name + "\" has shape " +
                          shape_text(view.shape) + ", expected " + shape_text(expected_shape));
  if (view.dtype == DType::other)
    throw CheckpointError(view.file->name() + ": tensor \"" + view.name + "\" has dtype " +
                          view.dtype_name + ", expected F32, F16 or BF16");
  return view;
}

void Checkpoint::refuse_unused(const std::set<std::string_view>& used) const {
  for (const auto& [name, view] : tensors_) {
    // Old checkpoints store the frequencies of RoPE, which follow from the configuration.
    if (used.contains(name) || name.ends_with("rotary_emb.inv_freq")) continue;
    if (name == "lm_head.weight" && config_.tied_embeddings) continue;
    throw CheckpointError(view.file->name() + ": tensor " + describe(name) +
                          " is none that config.json makes part of a " + config_.model_type +
                          " model, expected none that would be left out");
  }
}

bool Checkpoint::has_four_bits() const {
  return std::ranges::any_of(tensors_,
                             [](const auto& tensor) { return tensor.second.has_four_bits(); });
}

WeightFormat Checkpoint::natural_format() const {
  bool quantised = false, full = false;
  std::int64_t weights = 0, of_four_bits = 0;  // of the layers
  for (const auto& [name, view] : tensors_) {
    if (view.shape.size() != 2) continue;
    quantised |= block_of(view.dtype).values > 1 || view.quantized;
    full |= view.dtype == DType::f32 && !view.quantized;
    if (!name.starts_with("model.layers.")) continue;
    const std::int64_t size = view.shape[0] * view.shape[1];
    weights += size;
    if (view.has_four_bits()) of_four_bits += size;
  }
  if (of_four_bits > 0 && 2 * of_four_bits >= weights) return WeightFormat::int4;
  return quantised ? WeightFormat::int8 : full ? WeightFormat::f32 : WeightFormat::bf16;
}

}  // namespace tda
