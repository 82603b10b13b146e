// Writes engine folders, int4 by what calibration texts say of the inputs of each product.
#include "weights/pack.h"

#include <array>
#include <string>
#include <vector>

#include "base/thread_pool.h"
#include "checkpoint/checkpoint.h"
#include "cpu/input_products.h"
#include "cpu/isa.h"
#include "cpu/layer_inputs.h"
#include "engine/runtime.h"

namespace tda {
namespace {

/// Texts of at most a step of a prompt, or a context.
std::vector<std::vector<Token>> parts_of(std::span<const std::vector<Token>> texts,
                                         std::int64_t max_position) {
  const auto most = static_cast<std::size_t>(std::min(LayerInputs::kMostTokens, max_position));
  std::vector<std::vector<Token>> parts;
  for (const std::vector<Token>& text : texts)
    for (std::size_t first = 0; first < text.size(); first += most) {
      const std::size_t end = std::min(text.size(), first + most);
      parts.emplace_back(text.begin() + first, text.begin() + end);
    }
  return parts;
}

/// The inputs are those of graded weights, whose 8 bits change them little. That the layers before
/// will be rounded to 4 is left out: letting them be would win less than the noise of 16 articles.
class Calibration {
 public:
  Calibration(const Checkpoint& checkpoint, std::span<const std::vector<Token>> texts, int threads)
      : config_(checkpoint.config()),
        texts_(parts_of(texts, config_.max_position)),
        pool_(threads),
        inputs_(load_model(checkpoint, WeightFormat::graded, threads), threads, texts_) {}

  LayerFactors factors(std::int64_t layer) {
    std::array<InputProducts, kProducts> sums = {
        InputProducts(kernels_, config_.hidden_size), InputProducts(kernels_, config_.q_size()),
        InputProducts(kernels_, config_.hidden_size),
        InputProducts(kernels_, config_.intermediate_size)};
    inputs_.run_layer(layer, [&](Product product, std::span<const float> x) {
      sums[static_cast<int>(product)].add(pool_, x);
    });
    LayerFactors result;
    for (const InputProducts& each : sums) result.push_back(each.factor(pool_));
    return result;
  }

 private:
  const ModelConfig& config_;
  const std::vector<std::vector<Token>> texts_;
  const Kernels& kernels_ = choose_kernels();
  ThreadPool pool_;
  LayerInputs inputs_;
};

}  // namespace

std::vector<std::string> pack_checkpoint(const std::filesystem::path& source,
                                         const std::filesystem::path& destination,
                                         WeightFormat weights, int threads,
                                         const Progress& progress,
                                         std::span<const std::vector<Token>> texts) {
  check_engine_folder(destination);
  const Checkpoint checkpoint(source);
  if (texts.empty()) {
    const auto model = load_model(checkpoint, weights, threads, progress);
    write_engine_folder(*model, checkpoint, destination);
    return model->notices;
  }
  if (weights != WeightFormat::int4)
    throw OptionError("texts: found weights " + std::string(name_of(weights)) +
                      ", expected int4: other formats are rounded without texts");
  if (checkpoint.packed())
    throw OptionError("texts: found engine folder " + source.string() +
                      ", expected the checkpoint it was made from");
  std::int64_t tokens = 0;
  for (const std::vector<Token>& text : texts) {
    check_tokens(checkpoint.config(), text);
    tokens += std::ssize(text);
  }
  std::optional<Calibration> calibration;
  const auto model = load_model(checkpoint, weights, threads, progress, [&](std::int64_t layer) {
    if (!calibration) calibration.emplace(checkpoint, texts, threads);
    return calibration->factors(layer);
  });
  write_engine_folder(*model, checkpoint, destination, tokens);
  return model->notices;
}

}  // namespace tda
