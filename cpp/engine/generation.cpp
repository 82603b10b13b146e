#include <algorithm>
#include <mutex>

#include "engine/generation_impl.h"

namespace tda {

std::optional<Token> Generation::Impl::next(TokenMask allowed) {
  enter();
  try {
    const std::optional<Token> token = advance(allowed);
    leave();
    return token;
  } catch (const Cancelled&) {
    leave(FinishReason::cancelled);
    return {};
  } catch (...) {
    leave(FinishReason::cancelled);  // half a step is nothing to go on from
    throw;
  }
}

void Generation::Impl::enter() {
  const std::lock_guard lock(mutex);
  if (in_use)
    throw OptionError("generation: found it in use by another thread, expected one at a time");
  in_use = true;
}

/// Ends it if there is a reason, or if it was cancelled meanwhile.
void Generation::Impl::leave(FinishReason reason) {
  const std::lock_guard lock(mutex);
  in_use = false;
  if (reason == FinishReason::none && run && cancel.stop_requested())
    reason = FinishReason::cancelled;
  if (reason != FinishReason::none) end(reason);
}

void Generation::Impl::stop() {
  cancel.request_stop();
  const std::lock_guard lock(mutex);
  if (!in_use && run) end(FinishReason::cancelled);
}

std::optional<Token> Generation::Impl::advance(TokenMask allowed) {
  if (finish_reason != FinishReason::none) return {};
  if (new_tokens == options.max_new_tokens) {
    end(FinishReason::length);
    return {};
  }
  const Token token = choose(allowed);
  if (!options.ignore_eos && std::ranges::count(run->config().eos_tokens, token)) {
    end(FinishReason::stop);
    return {};
  }
  if (++new_tokens == options.max_new_tokens) free_run();
  return last = token;
}

Token Generation::Impl::choose(TokenMask allowed) {
  const bool only_draws = sampler.only_draws() && allowed.empty() && !options.logprobs;
  if (only_draws && new_tokens > 0)
    return run->decode_and_draw(last, options.temperature, sampler.uniform());
  const std::span<const float> logits = new_tokens == 0 ? run->prefill() : run->decode(last);
  const Token token = sampler.sample(logits, allowed);
  if (options.logprobs) logprobs = logprobs_of(logits, token, *options.logprobs);
  return token;
}

void Generation::Impl::end(FinishReason reason) {
  finish_reason = reason;
  if (run) free_run();
}

void Generation::Impl::free_run() {
  last_stats = run->stats();
  run.reset();
}

FinishReason Generation::Impl::reason() const {
  const std::lock_guard lock(mutex);
  return finish_reason;
}

GenerationStats Generation::Impl::stats() const {
  const std::lock_guard lock(mutex);
  GenerationStats stats = run ? run->stats() : last_stats;
  stats.new_tokens = new_tokens;
  return stats;
}

Generation::Generation(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Generation::Generation(Generation&&) noexcept = default;
Generation& Generation::operator=(Generation&&) noexcept = default;
Generation::~Generation() = default;

std::optional<Token> Generation::next(TokenMask allowed) { return impl_->next(allowed); }
const Logprobs& Generation::logprobs() const { return impl_->logprobs; }
void Generation::cancel() { impl_->stop(); }
FinishReason Generation::finish_reason() const { return impl_->reason(); }
GenerationStats Generation::stats() const { return impl_->stats(); }

}  // namespace tda
