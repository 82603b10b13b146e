// Loads a checkpoint: converts it to engine layout in one arena, or maps an engine folder's.
#include <tda/error.h>

#include <cstdlib>

#include "base/buffer.h"
#include "base/size.h"
#include "base/thread_pool.h"
#include "checkpoint/checkpoint.h"
#include "weights/layout.h"
#include "weights/model.h"

namespace tda {
namespace {

std::shared_ptr<std::byte> allocate_arena(Size bytes) {
  constexpr std::int64_t kHugePage = 2 << 20;
  const Size padded = bytes.rounded_up(kHugePage);
  const auto size = static_cast<std::size_t>(padded.value());
  void* const memory = padded.too_large() ? nullptr : std::aligned_alloc(kHugePage, size);
  if (!memory)
    throw DeviceError("cpu: out of memory: the weights need " + std::to_string(bytes.value()) +
                      " bytes");
  advise_huge_pages(memory, padded.value());
  return {static_cast<std::byte*>(memory), std::free};
}

/// Fills outlier_neurons. Checks the columns, because kernels write to them.
void list_outliers(Model& model) {
  for (std::size_t l = 0; l < model.layers.size(); ++l) {
    LayerWeights& layer = model.layers[l];
    const Matrix& down = layer.down;
    for (std::int64_t j = 0; down.outliers && j < down.rows; ++j) {
      const Outlier& outlier = down.outliers[j];
      if (outlier.value == 0) continue;
      if (outlier.column < 0 || outlier.column >= down.cols)
        throw CheckpointError(model.name + ": layer " + std::to_string(l) + ", neuron " +
                              std::to_string(j) + " has an outlier in column " +
                              std::to_string(outlier.column) + ", expected 0 to " +
                              std::to_string(down.cols - 1));
      layer.outlier_neurons.push_back(static_cast<std::int32_t>(j));
    }
  }
}

/// Uses the file's pages in place: processes share them, and each is read at its first use. Only
/// the size is checked: values were checked when they were packed, and a search for NaN would read
/// every page.
std::shared_ptr<const Model> map_model(const Checkpoint& checkpoint, WeightFormat format) {
  const PackedWeights& packed = *checkpoint.packed();
  const std::string& file = packed.arena.file->name();
  if (format != WeightFormat::automatic && format != packed.format)
    throw OptionError("weights is \"" + std::string(name_of(format)) + "\", but " + file +
                      " is packed as " + std::string(name_of(packed.format)) +
                      ", expected that or auto");
  Layout measured(checkpoint, packed.format, nullptr);
  measured.model();
  const std::int64_t expected = measured.bytes().value();
  if (expected != packed.arena.bytes)
    throw CheckpointError(file + ": the arena has " + std::to_string(packed.arena.bytes) +
                          " bytes, expected " + std::to_string(expected) + " by config.json");
  Layout layout(checkpoint, packed.format, const_cast<std::byte*>(packed.data.get()));
  auto model = std::make_shared<Model>(layout.model());
  model->storage = packed.data;
  list_outliers(*model);
  return model;
}

}  // namespace

std::shared_ptr<const Model> load_model(const Checkpoint& checkpoint, WeightFormat format,
                                        int threads, const Progress& progress) {
  if (checkpoint.packed()) return map_model(checkpoint, format);
  ThreadPool pool(threads);
  if (format == WeightFormat::automatic) format = checkpoint.natural_format();

  Layout measured(checkpoint, format, nullptr);
  measured.model();
  const std::shared_ptr<std::byte> arena = allocate_arena(measured.bytes());
  Layout layout(checkpoint, format, arena.get());
  auto model = std::make_shared<Model>(layout.model());
  model->storage = arena;
  run_copies(layout.copies(), pool, progress);
  list_outliers(*model);
  return model;
}

}  // namespace tda
