#include "engine/run.h"

#include <chrono>

namespace tda {
namespace {

/// How many of the prompt's tokens the search for TdaOptions::error uses. It costs about as much as
/// one down projection of these tokens.
constexpr std::int64_t kPromptSamples = 64;
/// The same for TdaOptions::inputs, whose thresholds are quantiles of all inputs of these tokens.
constexpr std::int64_t kInputSamples = 32;

bool needs_samples(const TdaOptions& tda) {
  if (tda.predictor) return false;
  return tda.inputs || tda.error || (tda.active && tda.scope == Scope::token);
}

class Stopwatch {
 public:
  /// Seconds since construction or the last call.
  double lap() {
    const auto now = std::chrono::steady_clock::now();
    const std::chrono::duration<double> passed = now - last_;
    last_ = now;
    return passed.count();
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

}  // namespace

Run::Run(std::shared_ptr<const Runtime> runtime, Tokens prompt, std::int64_t capacity,
         const std::optional<TdaOptions>& tda)
    : session_(std::move(runtime), capacity, 0),
      prompt_(prompt.begin(), prompt.end()),
      tda_(session_.resolve(tda, std::ssize(prompt))) {
  if (!tda_.options) return;
  if (needs_samples(*tda_.options))
    session_.sample_tokens = tda_.options->inputs ? kInputSamples : kPromptSamples;
  session_.state->estimate = tda_.options->estimate;
}

std::span<const float> Run::prefill() {
  Stopwatch watch;
  // Thresholds of inputs need samples alone, a predictor needs nothing.
  const bool gather = tda_.options && !tda_.options->inputs && !tda_.options->predictor;
  const auto logits = session_.prefill(prompt_, gather ? FfnMode::gather : FfnMode::dense);
  stats_.prefill_seconds = watch.lap();
  if (tda_.options) {
    session_.apply(tda_.options);
    stats_.mask_seconds = watch.lap();
  }
  return logits;
}

std::span<const float> Run::decode(Token token) {
  Stopwatch watch;
  const auto logits = session_.decode(token);
  stats_.decode_seconds += watch.lap();
  ++decoded_;
  return logits;
}

Token Run::decode_and_draw(Token token, double temperature, double u) {
  Stopwatch watch;
  const Token next = session_.decode_and_draw(token, temperature, u);
  stats_.decode_seconds += watch.lap();
  ++decoded_;
  return next;
}

bool Run::rewind() {
  if (tda_.options && tda_.options->refresh > 0) return false;
  session_.rewind(std::ssize(prompt_));
  stats_.decode_seconds = 0;
  decoded_ = 0;
  return true;
}

GenerationStats Run::stats() const {
  GenerationStats result = stats_;
  result.prompt_tokens = std::ssize(prompt_);
  if (decoded_ > 0)
    result.tokens_per_second = static_cast<double>(decoded_) / stats_.decode_seconds;
  result.tda = tda_.words;
  result.warnings = tda_.warnings;
  session_.add_to(result);
  return result;
}

}  // namespace tda
