#include "sparsity/predictor.h"

#include <tda/error.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <string>

#include "base/half.h"
#include "base/json.h"
#include "base/size.h"
#include "checkpoint/checkpoint.h"
#include "sparsity/sparsity.h"

namespace tda {
namespace {

constexpr const char* kKey = "tdaengine-predictor";  // in the metadata: JSON
constexpr std::int64_t kMostLayers = 10'000;

/// One file, checked. Its metadata says what it is, in JSON under one key, so that the same content
/// is the same bytes. Layer l has the tensors layers.l.first, layers.l.second and, with experts,
/// layers.l.expert_of.
class Reader {
 public:
  explicit Reader(const std::filesystem::path& path) : path_(path.string()) {
    std::map<std::string, std::string> metadata;
    tensors_ = read_safetensors(path, &metadata);
    const auto found = metadata.find(kKey);
    if (found == metadata.end())
      reject("metadata", std::string("no ") + kKey, "it in the file of a predictor");
    fields_ = parse_json_object(found->second, path_);
    for (const char* key : {"version", "model", "fingerprint", "layers", "rank", "experts"})
      if (!fields_.contains(key)) reject(key, "none", "it in the metadata");
  }

  [[noreturn]] void reject(const std::string& what, const std::string& found,
                           const std::string& expected) const {
    throw CheckpointError(path_ + ": " + what + ": found " + found + ", expected " + expected);
  }

  std::string text(const char* key) const {
    const nlohmann::json& value = fields_[key];
    if (!value.is_string()) reject(key, describe(value), "a string");
    return value;
  }

  std::int64_t count(const char* key, std::int64_t least) const {
    const nlohmann::json& value = fields_[key];
    if (!value.is_number_integer() || value < least ||
        value > std::numeric_limits<std::int32_t>::max())
      reject(key, describe(value), "an integer of " + std::to_string(least) + " or more");
    return value;
  }

  std::int64_t layers() const {
    const std::int64_t count = this->count("layers", 1);
    if (count > kMostLayers)
      reject("layers", std::to_string(count), "at most " + std::to_string(kMostLayers));
    return count;
  }

  /// [rows, cols]; 0 rows or columns stand for any number of them.
  const TensorView& tensor(std::int64_t layer, const char* name, const char* dtype,
                           std::vector<std::int64_t> shape) const {
    const std::string full = "layers." + std::to_string(layer) + "." + name;
    const auto found = tensors_.find(full);
    if (found == tensors_.end()) reject("tensor " + full, "none", "it in every layer");
    const TensorView& view = found->second;
    if (view.dtype_name != dtype) reject("tensor " + full, view.dtype_name, dtype);
    bool fits = view.shape.size() == shape.size();
    for (std::size_t i = 0; fits && i < shape.size(); ++i)
      fits = view.shape[i] > 0 && (shape[i] == 0 || view.shape[i] == shape[i]);
    if (!fits) reject("tensor " + full, shown(view.shape), shown(shape));
    return view;
  }

  std::size_t tensors() const { return tensors_.size(); }

  /// Copies the matrix to `to`, as it is.
  Matrix matrix(const TensorView& view, std::byte* to) const {
    view.read(0, view.bytes, to);
    for (std::int64_t i = 0; i < view.bytes / 2; ++i) {
      std::uint16_t bits;
      std::memcpy(&bits, to + 2 * i, 2);
      if ((bits & 0x7f80) == 0x7f80)
        reject("tensor " + view.name + ", number " + std::to_string(i),
               std::to_string(bf16_to_f32(bits)), "a finite number");
    }
    Matrix matrix;
    matrix.format = WeightFormat::bf16;
    matrix.rows = view.shape[0];
    matrix.cols = view.shape[1];
    matrix.data = to;
    return matrix;
  }

  std::vector<std::int32_t> experts_of(const TensorView& view, std::int64_t experts) const {
    std::vector<std::int32_t> ids(view.shape[0]);
    view.read(0, view.bytes, ids.data());
    for (std::size_t i = 0; i < ids.size(); ++i)
      if (ids[i] < 0 || ids[i] >= experts)
        reject("tensor " + view.name + ", neuron " + std::to_string(i), std::to_string(ids[i]),
               "0 to " + std::to_string(experts - 1));
    return ids;
  }

 private:
  static std::string shown(const std::vector<std::int64_t>& shape) {
    std::string text;
    for (const std::int64_t size : shape)
      text += (text.empty() ? "" : ", ") + (size ? std::to_string(size) : std::string("any"));
    return "shape [" + text + "]";
  }

  std::string path_;
  nlohmann::json fields_;
  TensorMap tensors_;
};

}  // namespace

std::shared_ptr<const Predictor> Predictor::load(const std::filesystem::path& path) {
  const Reader reader(path);
  if (const std::int64_t version = reader.count("version", 0); version != 1)
    reader.reject("version", std::to_string(version), "1");
  auto result = std::make_shared<Predictor>();
  result->file = path.string();
  result->model = reader.text("model");
  result->fingerprint = reader.text("fingerprint");
  result->rank = reader.count("rank", 1);
  result->experts = reader.count("experts", 0);
  const std::int64_t layers = reader.layers(), experts = result->experts;

  std::int64_t hidden = 0, neurons = 0;
  std::vector<std::pair<const TensorView*, const TensorView*>> views;
  Size bytes = 64;  // kernels may read past the last row's end
  for (std::int64_t l = 0; l < layers; ++l) {
    const TensorView& first = reader.tensor(l, "first", "BF16", {result->rank, hidden});
    const TensorView& second =
        reader.tensor(l, "second", "BF16", {experts ? experts : neurons, result->rank});
    hidden = first.shape[1];
    if (!experts) neurons = second.shape[0];
    bytes = bytes + Size(first.bytes).rounded_up(64) + Size(second.bytes).rounded_up(64);
    views.emplace_back(&first, &second);
  }
  const std::size_t expected = static_cast<std::size_t>(layers) * (experts ? 3 : 2);
  if (reader.tensors() != expected)
    reader.reject("tensors", std::to_string(reader.tensors()),
                  std::to_string(expected) + " for " + std::to_string(layers) + " layers");

  auto weights = std::make_shared<PredictorWeights>();
  std::byte* to = weights->storage.reserve(bytes, "a predictor");
  for (std::int64_t l = 0; l < layers; ++l) {
    PredictorWeights::Layer layer;
    const auto place = [&](const TensorView& view) {
      const Matrix matrix = reader.matrix(view, to);
      to += (view.bytes + 63) / 64 * 64;
      return matrix;
    };
    layer.first = place(*views[l].first);
    layer.second = place(*views[l].second);
    if (experts) {
      const TensorView& view = reader.tensor(l, "expert_of", "I32", {neurons});
      neurons = view.shape[0];
      layer.expert_of = reader.experts_of(view, experts);
    }
    result->bytes += layer.bytes();
    weights->layers.push_back(std::move(layer));
  }
  result->weights = std::move(weights);
  return result;
}

std::vector<std::int32_t> PredictorWeights::Layer::neurons(std::span<const float> scores,
                                                           std::int64_t count) const {
  std::vector<float> ordered(scores.begin(), scores.end());
  for (float& score : ordered)
    if (score != score) score = std::numeric_limits<float>::infinity();
  const std::vector<std::int32_t> chosen = mask_largest(ordered, count);
  if (expert_of.empty()) return chosen;
  std::vector<char> active(scores.size());
  for (const std::int32_t expert : chosen) active[expert] = 1;
  std::vector<std::int32_t> kept;
  for (std::size_t j = 0; j < expert_of.size(); ++j)
    if (active[expert_of[j]]) kept.push_back(static_cast<std::int32_t>(j));
  return kept;
}

void check_predictor(const Predictor& predictor, const Model& model) {
  const std::string who = predictor.file + ": predictor of model \"" + predictor.model + "\"";
  if (predictor.fingerprint != model.fingerprint)
    throw CheckpointError(who + " (fingerprint " + predictor.fingerprint +
                          ") does not fit model \"" + model.name + "\" (fingerprint " +
                          model.fingerprint + ")");
  const ModelConfig& config = model.config;
  const auto expect = [&](const char* what, std::int64_t found, std::int64_t expected) {
    if (found != expected)
      throw CheckpointError(who + ": found " + std::to_string(found) + " " + what + ", expected " +
                            std::to_string(expected));
  };
  const auto& layers = predictor.weights->layers;
  expect("layers", std::ssize(layers), config.num_layers);
  expect("inputs", layers[0].first.cols, config.hidden_size);
  expect("neurons", predictor.experts ? std::ssize(layers[0].expert_of) : layers[0].second.rows,
         config.intermediate_size);
}

std::int64_t predicted_count(const TdaOptions& options, std::int64_t neurons) {
  return options.predictor->experts ? options.experts : share_count(*options.active, neurons);
}

}  // namespace tda
