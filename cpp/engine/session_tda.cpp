// What TdaOptions make of a session: thresholds, masks and their refreshing.
#include <algorithm>
#include <cmath>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

#include "base/parallel.h"
#include "base/text_of.h"
#include "engine/session_impl.h"
#include "sparsity/predictor.h"

namespace tda {

static OptionError no_samples(const std::string& what) {
  return OptionError("tda " + what +
                     ": the session remembers no tokens to search thresholds on, "
                     "make it with sample_tokens > 0 and prefill a prompt");
}

/// NaN would be neither above nor below any threshold.
static void check_finite(std::span<const float> values, const std::string& what,
                         std::int64_t layer) {
  if (std::ranges::all_of(values, [](float v) { return std::isfinite(v); })) return;
  throw Error(what + " of layer " + std::to_string(layer) +
              " in the prompt are not finite, expected finite numbers: activations overflow");
}

TdaSetting Session::Impl::resolve(const std::optional<TdaOptions>& asked,
                                  std::int64_t prompt_tokens) const {
  const Model& model = runtime->model();
  std::optional<TdaOptions> options = asked;
  const std::filesystem::path& file = runtime->calibration;
  if (options && options->loss && !options->thresholds && std::filesystem::exists(file))
    options->thresholds = std::make_shared<const Thresholds>(Thresholds::load(file));
  TdaSetting setting = tda::resolve(options, {.weights = model.format,
                                              .layers_have_rests = model.layers_have_rests(),
                                              .cuda = backend.name().starts_with("cuda"),
                                              .parameters = model.parameters,
                                              .prompt_tokens = prompt_tokens});
  if (setting.options) check(*setting.options);
  return setting;
}

void Session::Impl::check(const TdaOptions& options) const {
  if (options.thresholds) check_thresholds(*options.thresholds, options.scope);
  if (options.predictor) check_predictor(*options.predictor, runtime->model());
  if (options.compact && !backend.can_compact())
    throw OptionError("tda compact: expected device cpu, found " + backend.name());
}

void Session::Impl::apply(const std::optional<TdaOptions>& options) {
  predictor_ = nullptr;
  if (!options) {
    head_inputs_ = 0;
    refresh_every_ = 0;
    decode_mode = FfnMode::dense;
    return;
  }
  if (options->estimate != state->estimate)
    throw OptionError("tda estimate \"" + std::string(name_of(options->estimate)) +
                      "\": found a session that judges neurons by \"" +
                      std::string(name_of(state->estimate)) +
                      "\", expected a call of generate or score");
  head_inputs_ = 0;
  if (options->inputs)
    apply_inputs(*options);
  else if (options->predictor)
    apply_predictor(*options);
  else if (options->scope == Scope::token)
    apply_token(*options);
  else
    apply_sequence(*options);
  decode_mode = FfnMode::sparse;
}

void Session::Impl::check_thresholds(const Thresholds& file, std::optional<Scope> scope) const {
  const Model& model = runtime->model();
  const std::string who = "thresholds of model \"" + file.model + "\"";
  if (file.fingerprint != model.fingerprint) {
    throw CheckpointError(who + " (fingerprint " + file.fingerprint + ") do not fit model \"" +
                          model.name + "\" (fingerprint " + model.fingerprint + ")");
  }
  if (file.weights != name_of(model.format)) {
    throw CheckpointError(who + " are for " + file.weights + " weights, found " +
                          std::string(name_of(model.format)));
  }
  if (!scope) return;  // of inputs
  if (file.scope != *scope) {
    throw OptionError(who + " are for scope \"" + std::string(name_of(file.scope)) +
                      "\", found scope \"" + std::string(name_of(*scope)) + "\"");
  }
  if (std::ssize(file.values) != model.config.num_layers) {
    throw CheckpointError(who + ": found " + std::to_string(file.values.size()) +
                          " values, expected one for each of " +
                          std::to_string(model.config.num_layers) + " layers");
  }
  const std::int64_t neurons = model.config.num_layers * model.config.intermediate_size;
  if (!file.prior.empty() && std::ssize(file.prior) != neurons)
    throw CheckpointError(who + ": found a prior of " + std::to_string(file.prior.size()) +
                          " neurons, expected " + std::to_string(neurons));
}

void Session::Impl::apply_sequence(const TdaOptions& options) {
  thresholds_.clear();
  prior_ = options.thresholds && !options.thresholds->prior.empty() ? options.thresholds : nullptr;
  if (options.thresholds && !options.active) {
    thresholds_ = options.thresholds->values;
  } else if (options.error) {
    if (samples_ == 0) throw no_samples("error");
    const std::lock_guard lock(runtime->computing);
    check_statistic();
    for (const ThresholdSearch& found : backend.search_thresholds(*state, *options.error))
      thresholds_.push_back(found.threshold);
  } else {
    active_ = *options.active;
  }
  set_token_thresholds(std::vector<float>(runtime->config().num_layers));
  refresh_every_ = options.refresh;
  compact_ = options.compact;
  recent_.clear();
  mask_from_statistic();
}

/// Thresholds on single contributions; the prompt's own tokens say where shares or errors lie.
void Session::Impl::apply_token(const TdaOptions& options) {
  const Model& model = runtime->model();
  const std::int64_t layers = model.config.num_layers, neurons = model.config.intermediate_size;
  std::vector<float> chosen(layers);
  if (options.thresholds) {
    chosen = options.thresholds->values;
  } else {
    if (samples_ == 0) throw no_samples(options.error ? "error" : "active, scope \"token\"");
    parallel_for(backend.threads(), layers, [&](std::int64_t layer) {
      const LayerWeights& weights = model.layers[layer];
      const std::vector<float> values = samples(layer);
      check_finite(values, "feed-forward activations", layer);
      std::vector<float> estimates = estimates_of(
          values, estimate_weights(state->estimate, weights.down_lengths.data()), neurons);
      chosen[layer] =
          options.error
              ? search_token_threshold(values, estimates, weights.down, *options.error).threshold
              : threshold_of_share(estimates, *options.active);
    });
  }
  mask_none();
  set_token_thresholds(chosen);
  refresh_every_ = 0;
}

/// A predictor needs nothing from the prompt.
void Session::Impl::apply_predictor(const TdaOptions& options) {
  const ModelConfig& config = runtime->config();
  mask_none();
  set_token_thresholds(std::vector<float>(config.num_layers));
  predictor_ = options.predictor;
  predicted_ = predicted_count(options, config.intermediate_size);
  refresh_every_ = 0;
}

void Session::Impl::mask_none() {
  std::vector<std::int32_t> all(runtime->config().intermediate_size);
  std::iota(all.begin(), all.end(), 0);
  for (std::int64_t layer = 0; layer < runtime->config().num_layers; ++layer) set_mask(layer, all);
}

/// Thresholds on the contributions of inputs, from those of the prompt's sampled tokens.
void Session::Impl::apply_inputs(const TdaOptions& options) {
  if (samples_ == 0) throw no_samples("inputs");
  const std::lock_guard lock(runtime->computing);
  const std::int64_t layers = runtime->config().num_layers;
  std::vector<InputThresholds> chosen(layers);
  parallel_for(backend.threads(), layers * kProducts + 1, [&](std::int64_t i) {
    const std::int64_t layer = i / kProducts;
    const auto product = static_cast<Product>(i % kProducts);
    const double share = layer == layers            ? head_share(options)
                         : product == Product::down ? down_share(options)
                                                    : *options.inputs;
    std::vector<float> values = layer == layers
                                    ? backend.head_contributions(*state)
                                    : backend.input_contributions(*state, layer, product);
    check_finite(values, "inputs", layer);
    float& threshold = layer == layers ? head_inputs_ : chosen[layer].of[i % kProducts];
    threshold = threshold_of_share(values, share);
  });
  for (std::int64_t layer = 0; layer < layers; ++layer)
    backend.set_input_thresholds(*state, layer, chosen[layer]);
  refresh_every_ = 0;
}

void Session::Impl::set_token_thresholds(std::span<const float> chosen) {
  const std::lock_guard lock(runtime->computing);
  for (std::int64_t layer = 0; layer < std::ssize(chosen); ++layer)
    backend.set_threshold(*state, layer, chosen[layer]);
}

void Session::Impl::mask_from_statistic() {
  const std::lock_guard lock(runtime->computing);
  check_statistic();
  if (prior_)
    mask_with_prior();
  else if (thresholds_.empty())
    backend.mask_top_share(*state, active_);
  else
    backend.mask_at_least(*state, thresholds_);
  if (compact_) backend.compact_masks(*state);
}

void Session::Impl::mask_with_prior() {
  const std::int64_t neurons = runtime->config().intermediate_size;
  for (std::int64_t layer = 0; layer < runtime->config().num_layers; ++layer) {
    const std::vector<float> scores =
        relative_magnitudes(backend.statistic(*state, layer), backend.gathered(*state, layer),
                            std::span(prior_->prior).subspan(layer * neurons, neurons));
    backend.set_mask(*state, layer,
                     thresholds_.empty() ? mask_top_share(scores, active_)
                                         : mask_at_least(scores, thresholds_[layer]));
  }
}

/// The last refresh_every_ tokens again, dense: their keys and values become exact, their
/// activations join the statistic with the weight of all before, and the masks follow.
void Session::Impl::refresh() {
  const auto count = static_cast<double>(recent_.size());
  {
    const std::lock_guard lock(runtime->computing);
    backend.fade_statistic(*state, count / backend.gathered(*state, 0));
  }
  const std::int64_t end = position;
  position -= std::ssize(recent_);
  Step step;
  step.tokens = recent_;
  step.ffn = FfnMode::gather;
  try {
    run(step, 0);
  } catch (...) {  // interrupted: the next decode renews again
    position = end;
    throw;
  }
  const std::int64_t steps = (std::ssize(recent_) + backend.max_step() - 1) / backend.max_step();
  refresh_bytes_ += steps * runtime->model().neuron_bytes() * runtime->config().intermediate_size *
                    runtime->config().num_layers;
  recent_.clear();
  mask_from_statistic();
  if (!compact_) return;
  const std::lock_guard lock(runtime->computing);
  for (std::int64_t layer = 0; layer < runtime->config().num_layers; ++layer)
    refresh_bytes_ += std::ssize(backend.mask(*state, layer)) * runtime->model().neuron_bytes();
}

}  // namespace tda
