#include "engine/run.h"

#include <algorithm>
#include <chrono>
#include <mutex>
#include <thread>

namespace tda {
namespace {

/// How many of the prompt's tokens the search for TdaOptions::error uses. It costs about as much as
/// one down projection of these tokens.
constexpr std::int64_t kPromptSamples = 64;
/// The same for TdaOptions::inputs, whose thresholds are quantiles of all inputs of these tokens.
constexpr std::int64_t kInputSamples = 32;
/// They are taken from the last tokens of the prompt: those before may come from a PrefixCache.
constexpr std::int64_t kSampleWindow = 256;

/// How often a prompt looks whether another is prefilled.
constexpr std::chrono::milliseconds kPoll{1};

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
         const std::optional<TdaOptions>& tda, std::shared_ptr<PrefixCache> cache)
    : session_(std::move(runtime), capacity, 0),
      prompt_(prompt.begin(), prompt.end()),
      tda_(session_.resolve(tda, std::ssize(prompt))),
      cache_(std::move(cache)) {
  session_.sample_window = kSampleWindow;
  if (!tda_.options) return;
  if (needs_samples(*tda_.options))
    session_.sample_tokens = tda_.options->inputs ? kInputSamples : kPromptSamples;
}

std::span<const float> Run::prefill() {
  session_.open_when_it_fits();
  if (tda_.options) session_.state->estimate = tda_.options->estimate;
  Stopwatch watch;
  // Masks are made of the statistic; thresholds need samples alone, a predictor needs nothing.
  const bool gather = tda_.options && tda_.options->scope == Scope::sequence &&
                      !tda_.options->inputs && !tda_.options->predictor;
  const FfnMode mode = gather ? FfnMode::gather : FfnMode::dense;
  const auto logits = cache_ ? prefill_rest(mode) : session_.prefill(prompt_, mode);
  stats_.prefill_seconds = watch.lap();
  if (tda_.options) {
    session_.apply(tda_.options);
    stats_.mask_seconds = watch.lap();
  }
  return logits;
}

/// Prefills what the cache does not have, and keeps it there.
std::span<const float> Run::prefill_rest(FfnMode mode) {
  const bool gather = mode == FfnMode::gather;
  PrefixCache::Impl& cache = cache_->impl();
  const std::int64_t total = std::ssize(prompt_);
  Prefix prefix;
  prefix.tokens.assign(prompt_.begin(), prompt_.end() - total % session_.backend.cut_multiple());
  prefix.estimate = session_.state->estimate;
  if (gather) prefix.statistics.resize(total / session_.backend.max_step());
  const PrefixPromise promise(cache, prefix);

  const PrefixUse use = find_prefix(gather, promise);
  if (use.prefix) session_.resume(use, gather);
  session_.records_statistics = gather;
  stats_.cached_tokens = use.length;
  const auto logits = session_.prefill(Tokens(prompt_).subspan(use.length), mode);

  prefix.statistics = std::move(session_.statistics);
  if (use.prefix && !gather) prefix.estimate = use.prefix->estimate;
  if (!cache.wants(prefix)) return logits;
  {
    const std::lock_guard lock(session_.runtime->computing);
    prefix.rows = session_.backend.key_value_rows(*session_.state, std::ssize(prefix.tokens));
  }
  cache.keep(std::make_shared<const Prefix>(std::move(prefix)));
  return logits;
}

/// Waits for a prompt that this one begins with, if it is being prefilled.
PrefixUse Run::find_prefix(bool gather, const PrefixPromise& promise) const {
  const std::int64_t total = std::ssize(prompt_), step = session_.backend.max_step();
  const std::int64_t multiple = session_.backend.cut_multiple();
  // The last token gives the logits, samples are of the last ones.
  const std::int64_t anew = session_.sample_tokens > 0 ? std::min(total, kSampleWindow) : 1;
  const auto usable = [&](const Prefix& prefix, std::int64_t common) {
    std::int64_t length = std::min(common, total - anew);
    if (gather) {
      if (prefix.estimate != session_.state->estimate) return std::int64_t{0};
      return std::min(length / step, std::ssize(prefix.statistics)) * step;
    }
    length -= length % multiple;
    // One token alone is computed as in decoding: only where it is alone without the cache, too.
    if (total - length == 1 && length % step != 0) length -= multiple;
    return length;
  };
  while (true) {
    if (const auto use = cache_->impl().find(prompt_, usable, promise.prefix())) return *use;
    session_.before_step();  // so that cancel and Ctrl-C end this, too
    std::this_thread::sleep_for(kPoll);
  }
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
