#include <cmath>
#include <limits>

#include "base/parallel.h"
#include "base/text_of.h"
#include "engine/budget.h"
#include "engine/session_impl.h"

namespace tda {

void CalibrateOptions::validate() const {
  const auto at_least_one = [](const char* name, std::int64_t found) {
    if (found < 1) {
      throw OptionError(std::string(name) + " " + std::to_string(found) + ": expected 1 or more");
    }
  };
  if (!(error >= 0 && error < 1)) {
    throw OptionError("error " + text_of(error) + ": expected 0 or more, less than 1");
  }
  if (bytes && scope != Scope::token) {
    throw OptionError("bytes: expected with scope \"token\" only");
  }
  if (bytes && !(*bytes > 0 && *bytes <= 1)) {
    throw OptionError("bytes " + text_of(*bytes) + ": expected more than 0, at most 1");
  }
  at_least_one("max_tokens", max_tokens);
  at_least_one("sample_tokens", sample_tokens);
  at_least_one("self_texts", self_texts);
  at_least_one("self_tokens", self_tokens);
}

namespace {

/// Texts sampled from the model itself at temperature 1, starting from its BOS token.
std::vector<std::vector<Token>> write_texts(const Engine& engine, const CalibrateOptions& options) {
  const ModelConfig& config = engine.config();
  if (!config.bos_token && config.eos_tokens.empty()) {
    throw OptionError(
        "calibrate: the model has no beginning- or end-of-text token to start from, "
        "so texts must be given");
  }
  const Token first = config.bos_token ? *config.bos_token : config.eos_tokens.front();
  std::vector<std::vector<Token>> texts;
  for (std::int64_t i = 0; i < options.self_texts; ++i) {
    GenerateOptions generate;
    generate.max_new_tokens = options.self_tokens;
    generate.temperature = 1.0;
    generate.seed = options.seed + static_cast<std::uint64_t>(i);
    generate.ignore_eos = true;
    texts.push_back(engine.generate({&first, 1}, generate).tokens);
  }
  return texts;
}

/// Weights in bricks have no thresholds to search: those of inputs come from each prompt.
void expect_no_target(const CalibrateOptions& options, WeightFormat format) {
  const CalibrateOptions defaults;
  if (options.scope != defaults.scope || options.error != defaults.error || options.bytes ||
      options.sample_tokens != defaults.sample_tokens)
    throw OptionError("calibrate: found " + std::string(name_of(format)) +
                      " weights, expected neither scope, error, bytes nor sample_tokens: "
                      "it measures what every share of inputs costs, for tda loss");
}

// Shares of inputs from harmless to harmful.
constexpr double kShares[] = {0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05, 0};

/// What each share costs in log-probability of the second halves of the texts.
void measure_losses(const Engine& engine, std::span<const std::vector<Token>> texts,
                    const CalibrateOptions& options, Thresholds& result, const Progress& progress) {
  constexpr std::size_t kCount = std::size(kShares);
  double sums[kCount] = {}, squares[kCount] = {};
  std::int64_t scored = 0, done = 0;
  for (const std::vector<Token>& text : texts) {
    const auto length = std::min(static_cast<std::int64_t>(text.size()), options.max_tokens);
    if (length < 2)
      throw OptionError("calibrate: text " + std::to_string(done) + " has " +
                        std::to_string(length) + " tokens, expected 2 or more");
    const Tokens tokens = Tokens(text).first(length);
    const std::vector<float> dense = engine.score(tokens, length / 2).log_probabilities;
    for (std::size_t i = 0; i < kCount; ++i) {
      const ScoreResult found = engine.score(tokens, length / 2, TdaOptions{.inputs = kShares[i]});
      for (std::size_t t = 0; t < dense.size(); ++t) {
        const double rise = static_cast<double>(dense[t]) - found.log_probabilities[t];
        sums[i] += rise;
        squares[i] += rise * rise;
      }
    }
    scored += std::ssize(dense);
    result.tokens += length;
    if (progress) progress(++done, result.texts);
  }
  const auto n = static_cast<double>(scored);
  for (std::size_t i = 0; i < kCount; ++i) {
    const double mean = sums[i] / n, variance = std::max(squares[i] / n - mean * mean, 0.0);
    result.inputs.push_back(static_cast<float>(kShares[i]));
    result.losses.push_back(static_cast<float>(std::expm1(mean)));
    result.loss_errors.push_back(static_cast<float>(std::sqrt(variance / n)));
  }
}

void token_thresholds(const std::shared_ptr<const Runtime>& runtime,
                      std::span<const std::vector<Token>> texts, const CalibrateOptions& options,
                      const std::vector<std::vector<FfnSample>>& samples, Thresholds& result,
                      const Progress& progress) {
  const Model& model = runtime->model();
  const std::int64_t layers = model.config.num_layers, neurons = model.config.intermediate_size;
  std::vector<std::vector<float>> h(layers), contributions(layers);  // of all texts' sampled tokens
  for (std::int64_t layer = 0; layer < layers; ++layer) {
    for (const FfnSample& sample : samples[layer])
      h[layer].insert(h[layer].end(), sample.h.begin(), sample.h.end());
    contributions[layer] = estimates_of(h[layer], model.layers[layer].down_lengths.data(), neurons);
  }
  result.values.resize(layers);
  result.reached.resize(layers);
  if (!options.bytes) {
    parallel_for(runtime->backend->threads(), layers, [&](std::int64_t layer) {
      const ThresholdSearch found = search_token_threshold(h[layer], contributions[layer],
                                                           model.layers[layer].down, options.error);
      result.values[layer] = found.threshold;
      result.reached[layer] = static_cast<float>(found.error);
    });
    return;
  }
  const Spent spent =
      spend(measure_harm(runtime, texts, contributions, progress), contributions, *options.bytes);
  for (std::int64_t layer = 0; layer < layers; ++layer) {
    // JSON has no infinity; the largest float is as unreachable.
    result.values[layer] = std::min(spent.thresholds[layer], std::numeric_limits<float>::max());
    result.reached[layer] = static_cast<float>(spent.bytes[layer]);
  }
}

/// Makes Thresholds::prior of the texts' statistics, and joins each text's own with that of the
/// other texts, as a prompt's will be: a text that met itself in the prior would look too easy.
void join_with_prior(std::span<const std::int64_t> lengths,
                     std::span<std::vector<FfnSample>> samples, Thresholds& result) {
  const auto tokens = static_cast<double>(result.tokens);
  for (std::vector<FfnSample>& texts : samples) {
    std::vector<double> all(texts.front().scores.size());
    const auto sum = [&](std::size_t text, std::size_t j) {
      const double r = texts[text].scores[j];
      return r * r * static_cast<double>(lengths[text]);
    };
    for (std::size_t text = 0; text < texts.size(); ++text)
      for (std::size_t j = 0; j < all.size(); ++j) all[j] += sum(text, j);
    for (const double total : all)
      result.prior.push_back(kPriorUnit * static_cast<float>(std::llround(
                                              std::min(total / tokens, 1.0) / kPriorUnit)));
    if (texts.size() == 1) continue;
    for (std::size_t text = 0; text < texts.size(); ++text) {
      const auto length = static_cast<double>(lengths[text]);
      std::vector<double> own(all.size());
      std::vector<float> others(all.size());
      for (std::size_t j = 0; j < all.size(); ++j) {
        own[j] = sum(text, j);
        others[j] = static_cast<float>((all[j] - own[j]) / (tokens - length));
      }
      texts[text].scores = relative_magnitudes(std::move(own), length, others);
    }
  }
}

}  // namespace

Thresholds Engine::calibrate(std::span<const std::vector<Token>> texts,
                             const CalibrateOptions& options, const Progress& progress) const {
  options.validate();
  const WeightFormat format = runtime_->model().format;
  const bool by_input = in_bricks(format);
  if (by_input) expect_no_target(options, format);
  std::vector<std::vector<Token>> own;
  if (texts.empty()) {
    own = write_texts(*this, options);
    texts = own;
  }
  const Model& model = runtime_->model();
  const std::int64_t layers = model.config.num_layers;
  Thresholds result;
  result.model = model.name;
  result.fingerprint = model.fingerprint;
  result.weights = name_of(model.format);
  result.scope = options.scope;
  result.error = options.bytes ? 0 : options.error;
  result.bytes = options.bytes.value_or(0);
  result.source = own.empty() ? "texts" : "self-generated";
  result.texts = static_cast<std::int64_t>(texts.size());

  if (by_input) {
    measure_losses(*this, texts, options, result, progress);
    return result;
  }
  std::vector<std::vector<FfnSample>> samples(layers);  // [L][texts]
  std::vector<std::int64_t> lengths;                    // [texts]
  for (const std::vector<Token>& text : texts) {
    const auto length = std::min(static_cast<std::int64_t>(text.size()), options.max_tokens);
    Session::Impl session(runtime_, std::max<std::int64_t>(length, 1), options.sample_tokens);
    session.open();
    session.prefill(Tokens(text).first(length), FfnMode::gather, 0);
    for (std::int64_t layer = 0; layer < layers; ++layer) {
      samples[layer].push_back({session.statistic(layer), session.samples(layer)});
    }
    lengths.push_back(length);
    result.tokens += length;
    if (progress) progress(static_cast<std::int64_t>(samples[0].size()), result.texts);
  }
  if (options.scope == Scope::token) {
    token_thresholds(runtime_, texts, options, samples, result, progress);
    return result;
  }
  join_with_prior(lengths, samples, result);
  result.values.resize(layers);
  result.reached.resize(layers);
  parallel_for(threads(), layers, [&](std::int64_t layer) {
    const ThresholdSearch found =
        search_threshold(samples[layer], model.layers[layer].down, options.error);
    result.values[layer] = found.threshold;
    result.reached[layer] = static_cast<float>(found.error);
  });
  return result;
}

}  // namespace tda
