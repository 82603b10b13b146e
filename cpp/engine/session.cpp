#include <algorithm>
#include <cmath>
#include <mutex>

#include "backend/logits.h"
#include "base/size.h"
#include "engine/session_impl.h"
#include "sparsity/predictor.h"

namespace tda {

void check_tokens(const ModelConfig& config, Tokens tokens) {
  if (tokens.empty()) throw OptionError("tokens: found none, expected at least one");
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] < 0 || tokens[i] >= config.vocab_size) {
      throw OptionError("tokens[" + std::to_string(i) + "] = " + std::to_string(tokens[i]) +
                        ": expected 0 to " + std::to_string(config.vocab_size - 1));
    }
  }
}

Session::Impl::Impl(std::shared_ptr<const Runtime> shared, std::int64_t capacity,
                    std::int64_t sample_tokens)
    : runtime(std::move(shared)),
      backend(*runtime->backend),
      capacity(capacity),
      sample_tokens(sample_tokens),
      member(runtime->decoding),
      ropes_(runtime->config()),
      prefill_reads_(runtime->config().num_layers) {
  if (capacity < 1) {
    throw OptionError("capacity " + std::to_string(capacity) + ": expected at least 1 token");
  }
  if (capacity > runtime->max_context) {
    throw ContextOverflow(std::to_string(capacity) + " tokens do not fit: max_context is " +
                          std::to_string(runtime->max_context));
  }
  if (sample_tokens < 0) {
    throw OptionError("sample_tokens " + std::to_string(sample_tokens) + ": expected 0 or more");
  }
}

void Session::Impl::open() { state = backend.new_state(capacity, runtime->kv); }

void Session::Impl::open_when_it_fits() {
  const std::int64_t token_bytes = backend.kv_bytes_per_token(runtime->kv);
  runtime->cache_memory.check(capacity, token_bytes);
  memory =
      runtime->cache_memory.take((Size(capacity) * token_bytes).value(), [this] { before_step(); });
  open();
}

void Session::Impl::check_room(std::int64_t tokens) const {
  if (tokens <= capacity - position) return;
  throw ContextOverflow("session: " + std::to_string(tokens) + " tokens after " +
                        std::to_string(position) + " exceed its capacity of " +
                        std::to_string(capacity));
}

std::span<const float> Session::Impl::prefill(Tokens tokens, FfnMode mode, std::int64_t rows) {
  const ModelConfig& config = runtime->config();
  check_tokens(config, tokens);
  const std::int64_t window = std::min(sample_window, std::ssize(tokens));
  const std::int64_t first = std::ssize(tokens) - window;
  // Sample k is the token in the middle of the k-th of equal parts.
  std::vector<std::int64_t> sampled(std::min(sample_tokens, window));
  const auto count = std::ssize(sampled);
  for (std::int64_t k = 0; k < count; ++k) sampled[k] = first + (2 * k + 1) * window / (2 * count);
  {
    const std::lock_guard lock(runtime->computing);
    backend.reserve_samples(*state, count);
  }
  samples_ = count;
  Step step;
  step.tokens = tokens;
  step.ffn = mode;
  step.samples = sampled;
  std::span<const float> logits;
  uncounted([&] { logits = run(step, rows); });
  return logits;
}

void Session::Impl::uncounted(const std::function<void()>& work) {
  const std::int64_t head_before = backend.head_bytes(*state);
  const std::int64_t attention_before = backend.attention_bytes(*state);
  const std::vector<FfnReads> decoded = reads();
  work();
  prefill_head_bytes_ += backend.head_bytes(*state) - head_before;
  prefill_attention_bytes_ += backend.attention_bytes(*state) - attention_before;
  const std::lock_guard lock(runtime->computing);
  for (std::size_t l = 0; l < decoded.size(); ++l)
    prefill_reads_[l] = backend.ffn_reads(*state, static_cast<std::int64_t>(l)) - decoded[l];
}

std::vector<float> Session::Impl::all_logits(Tokens tokens) {
  check_tokens(runtime->config(), tokens);
  std::vector<float> all;
  const Size numbers = Size(std::ssize(tokens)) * runtime->config().vocab_size;
  try {
    all.reserve(static_cast<std::size_t>(numbers.value()));
  } catch (const std::exception&) {  // bad_alloc or length_error
    throw DeviceError("out of memory: " + std::to_string((numbers * sizeof(float)).value()) +
                      " bytes needed for the logits of " + std::to_string(tokens.size()) +
                      " tokens");
  }
  Step step;
  step.tokens = tokens;
  run(step, 0, &all);
  return all;
}

Token Session::Impl::decode_and_draw(Token token, double temperature, double u) {
  if (!backend.draws()) return draw(decode(token), temperature, u);
  run(next_step(token), 0);
  ++batch_sizes_;
  count_decoded(token);
  const std::lock_guard lock(runtime->computing);
  return backend.draw(*state, temperature, u);
}

std::span<const float> Session::Impl::decode(Token token) {
  const Step step = next_step(token);
  renew_keys(step.sequence_length);
  before_step();
  const std::span<const float> logits =
      runtime->decoding.decode(member, *state, step, batch_sizes_);
  check_finite(logits);
  cached_.resize(static_cast<std::size_t>(position));
  cached_.push_back(token);
  ++position;
  count_decoded(token);
  return logits;
}

Step Session::Impl::next_step(const Token& token) {
  check_tokens(runtime->config(), {&token, 1});
  if (refresh_every_ > 0 && std::ssize(recent_) == refresh_every_) refresh();
  check_room(1);
  Step step;
  step.tokens = {&token, 1};
  step.position = position;
  step.sequence_length = position + 1;
  step.ffn = decode_mode;
  step.head_inputs = head_inputs_;
  step.predictor = predictor_ ? predictor_->weights.get() : nullptr;
  step.predicted = predicted_;
  return step;
}

void Session::Impl::count_decoded(const Token& token) {
  const ModelConfig& config = runtime->config();
  if (refresh_every_ > 0) recent_.push_back(token);
  ++decoded_;
  const std::int64_t kv_token =
      2 * config.num_kv_heads * kv_row_bytes(runtime->kv, config.head_dim);
  for (const std::int64_t window : config.sliding_window)
    kv_bytes_ += kv_token * (window ? std::min(window, position) : position);
}

void Session::Impl::resume(const PrefixUse& use, bool gather) {
  const std::lock_guard lock(runtime->computing);
  const Prefix& prefix = *use.prefix;
  backend.set_key_value_rows(*state, prefix.rows, std::ssize(prefix.tokens), use.length);
  position = resumed_ = use.length;
  turned_for_ = use.length;
  const std::int64_t known =
      std::min(use.common / backend.max_step(), std::ssize(prefix.statistics));
  statistics.assign(prefix.statistics.begin(), prefix.statistics.begin() + known);
  if (!gather) return;
  const Statistic& so_far = statistics.at(use.length / backend.max_step() - 1);
  const std::int64_t neurons = runtime->config().intermediate_size;
  for (std::int64_t layer = 0; layer < runtime->config().num_layers; ++layer)
    backend.set_statistic(*state, layer, std::span(so_far.sums).subspan(layer * neurons, neurons),
                          so_far.tokens);
}

/// While the session computes.
Statistic Session::Impl::statistic_of_layers() const {
  Statistic result = {.sums = {}, .tokens = backend.gathered(*state, 0)};
  for (std::int64_t layer = 0; layer < runtime->config().num_layers; ++layer) {
    const std::vector<double> sums = backend.statistic(*state, layer);
    result.sums.insert(result.sums.end(), sums.begin(), sums.end());
  }
  return result;
}

void Session::Impl::rewind(std::int64_t length) {
  position = length;
  const std::lock_guard lock(runtime->computing);
  for (std::int64_t layer = 0; layer < runtime->config().num_layers; ++layer)
    prefill_reads_[layer] = backend.ffn_reads(*state, layer);
  prefill_head_bytes_ = backend.head_bytes(*state);
  prefill_attention_bytes_ = backend.attention_bytes(*state);
  decoded_ = 0;
  batch_sizes_ = 0;
  kv_bytes_ = 0;
}

std::vector<float> Session::Impl::statistic(std::int64_t layer) const {
  const std::lock_guard lock(runtime->computing);
  check_statistic();
  return relative_magnitudes(backend.statistic(*state, layer), backend.gathered(*state, layer));
}

void Session::Impl::check_statistic() const {
  if (backend.gathered(*state, 0) > 0) return;
  throw OptionError("session: no statistic yet, prefill a prompt first");
}

std::vector<float> Session::Impl::samples(std::int64_t layer) const {
  const std::lock_guard lock(runtime->computing);
  return backend.samples(*state, layer);
}

void Session::Impl::set_mask(std::int64_t layer, std::span<const std::int32_t> neurons) {
  const std::lock_guard lock(runtime->computing);
  backend.set_mask(*state, layer, {neurons.begin(), neurons.end()});
  decode_mode = FfnMode::sparse;
}

std::vector<FfnReads> Session::Impl::reads() const {
  const std::lock_guard lock(runtime->computing);
  std::vector<FfnReads> decoded;
  for (std::size_t l = 0; l < prefill_reads_.size(); ++l)
    decoded.push_back(backend.ffn_reads(*state, static_cast<std::int64_t>(l)) - prefill_reads_[l]);
  return decoded;
}

std::int64_t Session::Impl::ffn_bytes() const {
  std::int64_t bytes = refresh_bytes_;
  for (const FfnReads& layer : reads()) bytes += layer.bytes;
  return bytes;
}

void Session::Impl::add_to(GenerationStats& stats) const {
  const ModelConfig& config = runtime->config();
  const std::int64_t layers = config.num_layers;
  const std::int64_t neurons = config.intermediate_size;
  stats.ffn_active_by_layer.assign(layers, 1.0);
  stats.ffn_coarse_by_layer.assign(layers, 0.0);
  if (decoded_ == 0) return;
  stats.mean_batch = static_cast<double>(batch_sizes_) / static_cast<double>(decoded_);
  double exact = 0, coarse = 0;
  const std::vector<FfnReads> decoded = reads();
  for (std::int64_t layer = 0; layer < layers; ++layer) {
    const auto all = static_cast<double>(decoded_ * neurons);
    exact += static_cast<double>(decoded[layer].exact) / all;
    coarse += static_cast<double>(decoded[layer].coarse) / all;
    stats.ffn_active_by_layer[layer] =
        static_cast<double>(decoded[layer].exact + decoded[layer].coarse) / all;
    stats.ffn_coarse_by_layer[layer] = static_cast<double>(decoded[layer].coarse) / all;
  }
  stats.ffn_active = (exact + coarse) / static_cast<double>(layers);
  stats.ffn_coarse = coarse / static_cast<double>(layers);
  stats.ffn_bytes = ffn_bytes();
  const Model& model = runtime->model();
  const double dense =
      static_cast<double>(decoded_ * layers) * static_cast<double>(model.ffn_bytes());
  stats.ffn_bytes_fraction = static_cast<double>(stats.ffn_bytes) / dense;
  std::int64_t others = (backend.head_bytes(*state) - prefill_head_bytes_) / decoded_;
  stats.head_bytes_fraction =
      static_cast<double>(others) / static_cast<double>(model.head.read_bytes());
  if (in_bricks(model.format))
    others += (backend.attention_bytes(*state) - prefill_attention_bytes_) / decoded_;
  else
    for (const LayerWeights& layer : model.layers)
      others += layer.qkv.bytes() + layer.output.bytes();
  stats.bytes_per_token = others + (stats.ffn_bytes + kv_bytes_) / decoded_;
}

Session::Session(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Session::Session(Session&&) noexcept = default;
Session& Session::operator=(Session&&) noexcept = default;
Session::~Session() = default;

std::int64_t Session::position() const { return impl_->position; }
std::int64_t Session::capacity() const { return impl_->capacity; }
std::int64_t Session::ffn_bytes() const { return impl_->ffn_bytes(); }

std::vector<float> Session::prefill(Tokens tokens) {
  const InUse guard(impl_->in_use, "session");
  const auto logits = impl_->prefill(tokens, FfnMode::gather);
  return {logits.begin(), logits.end()};
}

std::vector<float> Session::decode(Token token) {
  const InUse guard(impl_->in_use, "session");
  const auto logits = impl_->decode(token);
  return {logits.begin(), logits.end()};
}

void check_layer(const ModelConfig& config, std::int64_t layer) {
  if (layer < 0 || layer >= config.num_layers) {
    throw OptionError("layer " + std::to_string(layer) + ": expected 0 to " +
                      std::to_string(config.num_layers - 1));
  }
}

std::vector<float> Session::statistic(std::int64_t layer) const {
  check_layer(impl_->runtime->config(), layer);
  return impl_->statistic(layer);
}

std::vector<float> Session::contributions(std::int64_t layer) const {
  const Model& model = impl_->runtime->model();
  check_layer(model.config, layer);
  const std::vector<float> values = impl_->samples(layer);
  if (values.empty())
    throw OptionError(
        "contributions: the session remembers no tokens, make it with sample_tokens > 0 "
        "and prefill a prompt");
  return estimates_of(values, model.layers[layer].down_lengths.data(),
                      model.config.intermediate_size);
}

std::vector<float> Session::ffn_inputs(std::int64_t layer) const {
  check_layer(impl_->runtime->config(), layer);
  const std::lock_guard lock(impl_->runtime->computing);
  std::vector<float> inputs = impl_->backend.ffn_inputs(*impl_->state, layer);
  if (inputs.empty())
    throw OptionError(
        "ffn_inputs: the session remembers no tokens, make it with sample_tokens > 0 on the CPU "
        "and prefill a prompt");
  return inputs;
}

std::vector<std::int32_t> Session::mask(std::int64_t layer) const {
  check_layer(impl_->runtime->config(), layer);
  const std::lock_guard lock(impl_->runtime->computing);
  return impl_->backend.mask(*impl_->state, layer);
}

void Session::set_mask(std::int64_t layer, std::span<const std::int32_t> neurons) {
  const InUse guard(impl_->in_use, "session");
  check_layer(impl_->runtime->config(), layer);
  impl_->set_mask(layer, neurons);
}

void Session::apply(const TdaOptions& options) {
  const InUse guard(impl_->in_use, "session");
  impl_->apply(impl_->resolve(options, impl_->position).options);
}

}  // namespace tda
