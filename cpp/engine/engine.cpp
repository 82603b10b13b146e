#include <algorithm>
#include <cstdlib>
#include <new>
#include <ranges>

#include "backend/rope.h"
#include "checkpoint/checkpoint.h"
#include "engine/generation_impl.h"
#include "weights/formats.h"

namespace tda {
namespace {

Device preferred_device() {
  const char* forced = std::getenv("TDA_DEVICE");
  if (!forced) return Device::automatic;
  try {
    return parse_device(forced);
  } catch (const OptionError& error) {
    throw OptionError("environment variable TDA_DEVICE: " + std::string(error.what()));
  }
}

/// cpu or cuda. `automatic` is the CPU for what CUDA does not support; otherwise the environment
/// variable TDA_DEVICE decides, and without it CUDA is used if present.
Device device_of(const EngineOptions& options, WeightFormat weights) {
  if (options.device != Device::automatic) return options.device;
  const Device preferred = preferred_device();
  const bool taken = (weights == WeightFormat::f32 || weights == WeightFormat::bf16) &&
                     options.kv != KvFormat::int8;
  if (!taken) return Device::cpu;
  if (preferred != Device::automatic) return preferred;
  return cuda_missing().empty() ? Device::cuda : Device::cpu;
}

std::shared_ptr<const Runtime> open_runtime(const std::filesystem::path& folder,
                                            const EngineOptions& options) try {
  if (options.max_context < 0) {
    throw OptionError("max_context " + std::to_string(options.max_context) +
                      ": expected 0 (the checkpoint's own) or more");
  }
  if (options.cache_memory < 0) {
    throw OptionError("cache_memory " + std::to_string(options.cache_memory) +
                      ": expected 0 (no limit) or more bytes");
  }
  const Checkpoint checkpoint(folder);
  const auto model = load_model(checkpoint, options.weights, options.threads, options.progress);
  const bool cuda = device_of(options, model->format) == Device::cuda;
  auto backend =
      cuda ? make_cuda_backend(model, options.threads) : make_cpu_backend(model, options.threads);
  if (options.max_batch < 0 || options.max_batch > backend->max_batch()) {
    throw OptionError("max_batch " + std::to_string(options.max_batch) + ": expected 1 to " +
                      std::to_string(backend->max_batch()) +
                      ", the most sequences of a step on this device, or 0 for as many");
  }
  const KvFormat natural = model->format == WeightFormat::f32 ? KvFormat::f32 : KvFormat::bf16;
  return std::make_shared<const Runtime>(std::move(backend),
                                         options.kv == KvFormat::automatic ? natural : options.kv,
                                         options, folder);
} catch (const std::bad_alloc&) {
  throw DeviceError("out of memory while loading " + folder.string());
}

}  // namespace

std::string Runtime::keeps_no_prefixes() const {
  if (backend->cut_multiple() == 0) return "on " + backend->name();
  if (Ropes(config()).depend_on_length())
    return "of a model with dynamic RoPE or longrope, whose keys depend on the text's length";
  return "";
}

void Runtime::serve(const std::shared_ptr<PrefixCache>& cache) const {
  if (const std::string why = keeps_no_prefixes(); !why.empty())
    throw OptionError("prefix_cache: found one, expected none: nothing is kept " + why);
  cache->impl().serve({.fingerprint = model().fingerprint,
                       .weights = std::string(name_of(model().format)),
                       .kv = std::string(name_of(kv)),
                       .device = backend->name(),
                       .token_bytes = backend->kv_bytes_per_token(kv),
                       .statistic_size = config().num_layers * config().intermediate_size});
}

namespace {

void check_bias(const ModelConfig& config, const std::map<Token, double>& bias) {
  for (const Token token : std::views::keys(bias)) {
    if (token < 0 || token >= config.vocab_size) {
      throw OptionError("logit_bias: token " + std::to_string(token) + ": expected 0 to " +
                        std::to_string(config.vocab_size - 1));
    }
  }
}

/// Scores tokens behind the run's prompt, whose last logits are `logits`.
ScoreResult score_behind(Run& run, std::span<const float> logits, Tokens tokens) {
  ScoreResult result;
  for (std::size_t i = 0;; ++i) {
    result.log_probabilities.push_back(log_probability(logits, tokens[i]));
    result.top_tokens.push_back(argmax(logits));
    if (i + 1 == tokens.size()) break;
    logits = run.decode(tokens[i]);
  }
  result.stats = run.stats();
  return result;
}

}  // namespace

Engine::Engine(const std::filesystem::path& checkpoint, const EngineOptions& options)
    : runtime_(open_runtime(checkpoint, options)) {}
Engine::~Engine() = default;
Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&&) noexcept = default;

const ModelConfig& Engine::config() const { return runtime_->config(); }
const std::string& Engine::fingerprint() const { return runtime_->model().fingerprint; }
std::int64_t Engine::parameters() const { return runtime_->model().parameters; }
WeightFormat Engine::weights() const { return runtime_->model().format; }
KvFormat Engine::kv() const { return runtime_->kv; }
std::int64_t Engine::kv_bytes_per_token() const {
  return runtime_->backend->kv_bytes_per_token(runtime_->kv);
}
std::int64_t Engine::cache_memory() const { return runtime_->cache_memory.limit(); }
std::int64_t Engine::max_context() const { return runtime_->max_context; }
std::int64_t Engine::max_batch() const { return runtime_->max_batch; }
const std::vector<std::string>& Engine::notices() const { return runtime_->notices; }
std::int64_t Engine::weight_bytes() const { return runtime_->model().weight_bytes; }
std::vector<MatrixFormat> Engine::matrices() const { return formats_of(runtime_->model()); }
int Engine::threads() const { return runtime_->backend->threads(); }
std::string Engine::device() const { return runtime_->backend->name(); }

Generation Engine::start(Tokens prompt, const GenerateOptions& options,
                         const std::optional<TdaOptions>& tda) const {
  options.validate();
  check_tokens(config(), prompt);
  check_bias(config(), options.logit_bias);
  // A subtraction, because the sum could overflow.
  if (options.max_new_tokens > max_context() - std::ssize(prompt)) {
    throw ContextOverflow("prompt of " + std::to_string(prompt.size()) +
                          " tokens and max_new_tokens " + std::to_string(options.max_new_tokens) +
                          " exceed max_context " + std::to_string(max_context()));
  }
  const std::int64_t capacity = std::ssize(prompt) + options.max_new_tokens;
  runtime_->cache_memory.check(capacity, kv_bytes_per_token());
  if (options.prefix_cache) runtime_->serve(options.prefix_cache);
  const auto& cache = options.prefix_cache ? options.prefix_cache : runtime_->prefix_cache;
  std::unique_ptr<Generation::Impl> impl(
      new Generation::Impl{.run = Run(runtime_, prompt, capacity, tda, cache),
                           .sampler = {options, prompt},
                           .options = options});
  impl->run->listen(impl->cancel.get_token());
  return Generation(std::move(impl));
}

GenerationResult Engine::generate(Tokens prompt, const GenerateOptions& options,
                                  const std::optional<TdaOptions>& tda,
                                  const std::function<bool(Token)>& on_token) const {
  Generation generation = start(prompt, options, tda);
  GenerationResult result;
  while (const std::optional<Token> token = generation.next()) {
    result.tokens.push_back(*token);
    if (options.logprobs) result.logprobs.push_back(generation.logprobs());
    if (on_token && !on_token(*token)) generation.cancel();
  }
  result.finish_reason = generation.finish_reason();
  result.stats = generation.stats();
  return result;
}

std::vector<float> Engine::logits(Tokens tokens) const {
  check_tokens(config(), tokens);
  Session::Impl session(runtime_, std::ssize(tokens), 0);
  session.open_when_it_fits();
  return session.all_logits(tokens);
}

ScoreResult Engine::score(Tokens tokens, std::int64_t prompt_tokens,
                          const std::optional<TdaOptions>& tda) const {
  check_tokens(config(), tokens);
  if (prompt_tokens < 1 || prompt_tokens >= std::ssize(tokens)) {
    throw OptionError("prompt_tokens " + std::to_string(prompt_tokens) + ": expected 1 to " +
                      std::to_string(std::ssize(tokens) - 1) + ", one less than the tokens given");
  }
  const Tokens rest = tokens.subspan(prompt_tokens);
  const std::vector<Token> continuation(rest.begin(), rest.end());
  return score_each(tokens.first(prompt_tokens), {&continuation, 1}, tda).front();
}

std::vector<ScoreResult> Engine::score_each(Tokens prompt,
                                            std::span<const std::vector<Token>> continuations,
                                            const std::optional<TdaOptions>& tda) const {
  check_tokens(config(), prompt);
  std::int64_t longest = 0;
  for (std::size_t i = 0; i < continuations.size(); ++i) {
    try {
      check_tokens(config(), continuations[i]);
    } catch (const OptionError& error) {
      throw OptionError("continuations[" + std::to_string(i) + "]: " + error.what());
    }
    longest = std::max<std::int64_t>(longest, std::ssize(continuations[i]));
  }
  std::optional<Run> run;
  std::vector<float> first;  // logits [V] behind the prompt
  std::vector<ScoreResult> results;
  for (const std::vector<Token>& continuation : continuations) {
    if (!run || !run->rewind()) {
      run.emplace(runtime_, prompt, std::ssize(prompt) + longest, tda);
      const std::span<const float> logits = run->prefill();
      first.assign(logits.begin(), logits.end());
    }
    results.push_back(score_behind(*run, first, continuation));
  }
  return results;
}

std::vector<float> Engine::gate(std::int64_t layer) const {
  check_layer(config(), layer);
  const Model& model = runtime_->model();
  if (in_bricks(model.format))
    throw OptionError("gate: expected f32, bf16, bf16c or int8 weights, found " +
                      std::string(name_of(model.format)));
  const Matrix& gate = model.layers[layer].gate;
  std::vector<float> values(gate.rows * gate.cols);
  for (std::int64_t row = 0; row < gate.rows; ++row)
    read_row(gate, row, 0, gate.cols, values.data() + row * gate.cols);
  return values;
}

Session Engine::session(std::int64_t capacity, std::int64_t sample_tokens) const {
  auto impl = std::make_unique<Session::Impl>(runtime_, capacity, sample_tokens);
  impl->open();
  return Session(std::move(impl));
}

}  // namespace tda
