// Writes engine folders: the arena as it is in memory, and a config.json that describes it.
#include "weights/pack.h"

#include <tda/error.h>

#include <nlohmann/json.hpp>

#include "base/atomic_file.h"
#include "base/json.h"

namespace tda {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

void write_weights(const Model& model, const fs::path& path) {
  const json arena = {
      {"dtype", "U8"}, {"shape", {model.weight_bytes}}, {"data_offsets", {0, model.weight_bytes}}};
  std::string header = json{{PackedWeights::kTensor, arena}}.dump();
  // Pads the header so that the data starts at a multiple of kAlignment. 8: the length before it.
  while ((8 + header.size()) % PackedWeights::kAlignment != 0) header += ' ';
  const std::uint64_t length = header.size();
  write_file_atomically(path, {{reinterpret_cast<const char*>(&length), 8},
                               header,
                               {static_cast<const char*>(model.storage.get()),
                                static_cast<std::size_t>(model.weight_bytes)}});
}

void describe_weights(const Model& model, std::int64_t calibration_tokens, json& config) {
  config[PackedWeights::kKey] = {{"layout", PackedWeights::kLayout},
                                 {"weights", name_of(model.format)},
                                 {"fingerprint", model.fingerprint},
                                 {"parameters", model.parameters}};
  if (model.format == WeightFormat::int4) {
    json& kinds = config[PackedWeights::kKey]["matrices"];
    kinds = {kBrickKinds[static_cast<int>(model.embedding.kind)]};
    for (const LayerWeights& layer : model.layers)
      for (const Matrix* matrix : layer.in_bricks())
        kinds.push_back(matrix->input_order.empty() ? kBrickKinds[static_cast<int>(matrix->kind)]
                                                    : kOrderedLines);
  }
  // The checkpoint may say that its head is the embedding and hold another one, which counts.
  if (!model.config.tied_embeddings && config.contains("tie_word_embeddings"))
    config["tie_word_embeddings"] = false;
  if (calibration_tokens > 0)
    config[PackedWeights::kKey]["calibration_tokens"] = calibration_tokens;
}

}  // namespace

void check_engine_folder(const fs::path& folder) {
  std::error_code ignored;
  if (!fs::is_directory(folder, ignored))
    throw OptionError(folder.string() + ": no such folder, expected one to write into");
  for (const char* name : {"config.json", "model.safetensors"})
    if (fs::exists(folder / name, ignored))
      throw OptionError(folder.string() + ": found " + name + ", expected a folder without");
}

void write_engine_folder(const Model& model, const Checkpoint& checkpoint, const fs::path& folder,
                         std::int64_t calibration_tokens) {
  write_weights(model, folder / "model.safetensors");
  json config = checkpoint.config_json();
  describe_weights(model, calibration_tokens, config);
  // Last, because config.json makes the folder an engine folder.
  write_file_atomically(folder / "config.json", {config.dump(2), "\n"});
}

}  // namespace tda
