// Loads a checkpoint: converts it to engine layout in one arena, or maps an engine folder's.
#include <tda/error.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <set>
#include <span>
#include <string>

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

/// Checks the f32 vectors of a matrix in bricks, and the places of its outliers.
template <class Check>
void check_bricks(const Matrix& matrix, const std::string& file, const std::string& where,
                  const Check& check) {
  if (!matrix.in_bricks()) return;
  const Bricks w = matrix.bricks();
  const auto count = static_cast<std::size_t>(w.strips * kStripRows);
  check(where + "steps", {w.steps, count});
  if (w.has_rests()) {
    check(where + "steps of the rests", {w.rest_steps, count});
    check(where + "lengths of the rests",
          {w.rest_lengths, static_cast<std::size_t>(w.blocks * kBlockInputs)});
  }
  for (std::int64_t k = 0; k < w.strips * kStripOutliers; ++k) {
    const StripOutlier& outlier = w.outliers[k];
    const std::int64_t first = k / kStripOutliers * kStripRows;
    check(where + "outlier", {&outlier.value, 1});
    if (outlier.value == 0) continue;
    if (outlier.row < first || outlier.row >= std::min(w.rows, first + kStripRows) ||
        outlier.input < 0 || outlier.input >= w.cols)
      throw CheckpointError(file + ": " + where + "outlier in row " + std::to_string(outlier.row) +
                            ", input " + std::to_string(outlier.input) + ", expected rows " +
                            std::to_string(first) + " to " +
                            std::to_string(first + kStripRows - 1) + ", inputs 0 to " +
                            std::to_string(w.cols - 1) + ": the file is damaged");
  }
}

/// Checks that every input is there once, because kernels read x by it.
void check_order(const Matrix& matrix, const std::string& file, const std::string& where) {
  std::vector<bool> seen(matrix.input_order.size());
  for (const std::int32_t input : matrix.input_order) {
    const bool exists = input >= 0 && input < matrix.cols;
    if (!exists || seen[input])
      throw CheckpointError(file + ": " + where + "order of inputs has " + std::to_string(input) +
                            (exists ? " twice" : "") + ", expected 0 to " +
                            std::to_string(matrix.cols - 1) + " once each: the file is damaged");
    seen[input] = true;
  }
}

void check_vectors(const Model& model, const std::string& file) {
  const auto check = [&](const std::string& what, std::span<const float> values) {
    const auto bad = std::ranges::find_if_not(values, [](float v) { return std::isfinite(v); });
    if (bad != values.end())
      throw CheckpointError(file + ": " + what + ", value " + std::to_string(bad - values.begin()) +
                            " is " + std::to_string(*bad) +
                            ", expected a finite number: the file is damaged");
  };
  for (std::size_t l = 0; l < model.layers.size(); ++l) {
    const LayerWeights& w = model.layers[l];
    const std::string layer = "layer " + std::to_string(l) + ", ";
    check(layer + "norm before attention", w.attention_norm);
    check(layer + "norm behind attention", w.attention_post_norm);
    check(layer + "bias of q, k and v", w.qkv_bias);
    check(layer + "norm of q", w.q_norm);
    check(layer + "norm of k", w.k_norm);
    check(layer + "bias behind attention", w.output_bias);
    check(layer + "norm before the feed-forward network", w.ffn_norm);
    check(layer + "norm behind the feed-forward network", w.ffn_post_norm);
    check(layer + "lengths of the down rows", w.down_lengths);
    for (const Matrix* m : w.in_bricks()) {
      check_bricks(*m, file, layer, check);
      check_order(*m, file, layer);
    }
    for (const std::int32_t j : w.outlier_neurons)
      check(layer + "outlier of neuron " + std::to_string(j), {&w.down.outliers[j].value, 1});
  }
  check("last norm", model.final_norm);
  check_bricks(model.head, file, "head, ", check);
  check_bricks(model.embedding, file, "embedding, ", check);
}

/// Checks that an int4 folder names what the embedding and each matrix of the layers is.
void check_kinds(const PackedWeights& packed, const ModelConfig& config) {
  const auto fail = [&](const std::string& what) {
    const auto file =
        std::filesystem::path(packed.arena.file->name()).replace_filename("config.json");
    throw CheckpointError(file.string() + ": " + PackedWeights::kKey + ".matrices" + what);
  };
  const std::int64_t found = std::ssize(packed.matrices);
  const std::int64_t expected = packed.format == WeightFormat::int4 ? 1 + 4 * config.num_layers : 0;
  if (found != expected)
    fail(" has " + std::to_string(found) + " names, expected " + std::to_string(expected));
  for (std::int64_t i = 0; i < found; ++i) {
    const bool may_be_ordered = i % 4 != 0;  // not the embedding, nor down
    if (std::ranges::find(kBrickKinds, packed.matrices[i]) == std::end(kBrickKinds) &&
        !(may_be_ordered && packed.matrices[i] == kOrderedLines))
      fail("[" + std::to_string(i) + "] is \"" + packed.matrices[i] +
           "\", expected \"graded\", \"int4\" or \"lines\"" +
           (may_be_ordered ? " or \"ordered lines\"" : ""));
  }
}

/// Uses the file's pages in place: processes share them, and each is read at its first use. Checked
/// are the size and the f32 vectors. Matrices were checked when they were packed, and a search for
/// NaN would read every page: what is damaged there since shows in the logits, which are checked.
std::shared_ptr<const Model> map_model(const Checkpoint& checkpoint, WeightFormat format) {
  const PackedWeights& packed = *checkpoint.packed();
  const std::string& file = packed.arena.file->name();
  if (format != WeightFormat::automatic && format != packed.format)
    throw OptionError("weights is \"" + std::string(name_of(format)) + "\", but " + file +
                      " is packed as " + std::string(name_of(packed.format)) +
                      ", expected that or auto");
  check_kinds(packed, checkpoint.config());
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
  check_vectors(*model, file);
  return model;
}

void check_rounds_int4(const Model& model) {
  for (const LayerWeights& layer : model.layers)
    for (const Matrix* matrix : layer.in_bricks())
      if (matrix->kind == BrickKind::int4) return;
  throw OptionError("texts: found " + model.name +
                    ", whose weights keep the bits they have in int4, expected one with weights of "
                    "16 bits or more");
}

}  // namespace

std::shared_ptr<const Model> load_model(
    const Checkpoint& checkpoint, WeightFormat format, int threads, const Progress& progress,
    const std::function<LayerFactors(std::int64_t)>& factors_of) {
  if (checkpoint.packed()) return map_model(checkpoint, format);
  ThreadPool pool(threads);
  const bool chosen = format == WeightFormat::automatic;
  if (chosen) format = checkpoint.natural_format();

  Layout measured(checkpoint, format, nullptr);
  measured.model();
  const std::shared_ptr<std::byte> arena = allocate_arena(measured.bytes());
  Layout layout(checkpoint, format, arena.get());
  auto model = std::make_shared<Model>(layout.model());
  model->storage = arena;
  std::set<std::string_view> used;
  for (const Copy& copy : layout.copies()) used.insert(copy.source->name);
  for (const BrickCopy& copy : layout.brick_copies())
    for (const TensorView* source : copy.sources) used.insert(source->name);
  checkpoint.refuse_unused(used);
  if (factors_of) check_rounds_int4(*model);
  LayerFactors factors;
  const auto factor_of = [&](const Matrix& target) -> const InputFactor* {
    for (std::size_t l = 0; factors_of && l < model->layers.size(); ++l)
      for (std::size_t i = 0; const Matrix* matrix : model->layers[l].in_bricks()) {
        if (matrix->data == target.data && i == 0)
          factors = factors_of(static_cast<std::int64_t>(l));
        if (matrix->data == target.data)
          return matrix->kind == BrickKind::int4 ? &factors[i] : nullptr;
        ++i;
      }
    return nullptr;
  };
  run_copies(layout.copies(), layout.brick_copies(), pool, progress, factor_of);
  const bool rounds =
      format == WeightFormat::bf16 && std::ranges::any_of(layout.copies(), [](const Copy& copy) {
        return copy.source->dtype == DType::f16 && copy.target.rows > 1;
      });
  if (chosen && rounds)
    model->notices.push_back(
        "weights \"auto\": " + checkpoint.name() +
        " holds f16, which bf16 rounds from 11 significant bits to 8; \"f32\" keeps them all in "
        "twice the memory, \"bf16\" says that this is meant");
  list_outliers(*model);
  return model;
}

}  // namespace tda
