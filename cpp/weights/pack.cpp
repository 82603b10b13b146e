// Writes engine folders: the arena as it is in memory, and a config.json that describes it.
#include <tda/engine.h>

#include <nlohmann/json.hpp>

#include "base/atomic_file.h"
#include "base/json.h"
#include "checkpoint/checkpoint.h"
#include "weights/model.h"

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

void write_config(const Model& model, json config, const fs::path& path) {
  config[PackedWeights::kKey] = {{"layout", PackedWeights::kLayout},
                                 {"weights", name_of(model.format)},
                                 {"fingerprint", model.fingerprint},
                                 {"parameters", model.parameters}};
  if (model.format == WeightFormat::int4) {
    json& kinds = config[PackedWeights::kKey]["matrices"];
    kinds = {kBrickKinds[static_cast<int>(model.embedding.kind)]};
    for (const LayerWeights& layer : model.layers)
      for (const Matrix* matrix : layer.in_bricks())
        kinds.push_back(kBrickKinds[static_cast<int>(matrix->kind)]);
  }
  // The checkpoint may say that its head is the embedding and hold another one, which counts.
  if (!model.config.tied_embeddings && config.contains("tie_word_embeddings"))
    config["tie_word_embeddings"] = false;
  write_file_atomically(path, {config.dump(2), "\n"});
}

}  // namespace

std::vector<std::string> pack_checkpoint(const fs::path& source, const fs::path& destination,
                                         WeightFormat weights, int threads,
                                         const Progress& progress) {
  std::error_code ignored;
  if (!fs::is_directory(destination, ignored))
    throw OptionError(destination.string() + ": no such folder, expected one to write into");
  for (const char* name : {"config.json", "model.safetensors"})
    if (fs::exists(destination / name, ignored))
      throw OptionError(destination.string() + ": found " + name + ", expected a folder without");
  const Checkpoint checkpoint(source);
  const auto model = load_model(checkpoint, weights, threads, progress);
  write_weights(*model, destination / "model.safetensors");
  // Last, because config.json makes the folder an engine folder.
  write_config(*model, checkpoint.config_json(), destination / "config.json");
  return model->notices;
}

}  // namespace tda
