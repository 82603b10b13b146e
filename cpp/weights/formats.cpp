#include "weights/formats.h"

#include <algorithm>
#include <initializer_list>
#include <string>

namespace tda {
namespace {

std::string format_text(const Matrix& matrix) {
  if (matrix.format != WeightFormat::int4) return std::string(name_of(matrix.format));
  switch (matrix.kind) {
    case BrickKind::graded:
      return "graded";
    case BrickKind::lines:
      return "int4, scale and minimum";
    default:
      return "int4, scale";
  }
}

}  // namespace

std::vector<MatrixFormat> formats_of(const Model& model) {
  std::vector<MatrixFormat> result;
  const auto add = [&](const char* name, std::initializer_list<const Matrix*> matrices,
                       std::int64_t weights, bool in_layer) {
    std::int64_t bytes = 0;
    for (const Matrix* matrix : matrices) bytes += matrix->bytes();
    const std::string format = format_text(**matrices.begin());
    const auto is_same = [&](const MatrixFormat& each) {
      return each.matrices == name && each.format == format;
    };
    auto found = std::ranges::find_if(result, is_same);
    if (found == result.end())
      found = result.insert(
          found,
          {name, format, 0, 8.0 * static_cast<double>(bytes) / static_cast<double>(weights)});
    if (in_layer) ++found->layers;
  };
  const ModelConfig& config = model.config;
  const std::int64_t hidden = config.hidden_size;
  const std::int64_t vocabulary = config.vocab_size * hidden;
  const std::int64_t neurons = config.intermediate_size * hidden;
  const bool tied = model.head.data == model.embedding.data;
  add(tied ? "embedding, head" : "embedding", {&model.embedding}, vocabulary, false);
  for (const LayerWeights& w : model.layers) {
    add("q, k, v", {&w.qkv}, w.qkv.rows * hidden, true);
    add("attention output", {&w.output}, w.output.cols * hidden, true);
    if (in_bricks(model.format))
      add("gate, up", {&w.gate_up}, 2 * neurons, true);
    else
      add("gate, up", {&w.gate, &w.up}, 2 * neurons, true);
    add("down", {&w.down}, neurons, true);
  }
  if (!tied) add("head", {&model.head}, vocabulary, false);
  return result;
}

}  // namespace tda
