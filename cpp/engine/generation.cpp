#include <algorithm>

#include "engine/generation_impl.h"

namespace tda {

Token Generation::Impl::choose(TokenMask allowed) {
  const bool only_draws = sampler.only_draws() && allowed.empty() && !options.logprobs;
  if (only_draws && new_tokens > 0)
    return run.decode_and_draw(last, options.temperature, sampler.uniform());
  const std::span<const float> logits = new_tokens == 0 ? run.prefill() : run.decode(last);
  const Token token = sampler.sample(logits, allowed);
  if (options.logprobs) logprobs = logprobs_of(logits, token, *options.logprobs);
  return token;
}

std::optional<Token> Generation::Impl::next(TokenMask allowed) {
  const InUse guard(in_use, "generation");
  if (finish_reason != FinishReason::none) return {};
  try {
    return advance(allowed);
  } catch (const Cancelled&) {
    finish_reason = FinishReason::cancelled;
    return {};
  } catch (...) {
    finish_reason = FinishReason::cancelled;  // half a step is nothing to go on from
    throw;
  }
}

std::optional<Token> Generation::Impl::advance(TokenMask allowed) {
  if (new_tokens == options.max_new_tokens) {
    finish_reason = FinishReason::length;
    return {};
  }
  const Token token = choose(allowed);
  if (!options.ignore_eos && std::ranges::count(run.config().eos_tokens, token)) {
    finish_reason = FinishReason::stop;
    return {};
  }
  ++new_tokens;
  return last = token;
}

Generation::Generation(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Generation::Generation(Generation&&) noexcept = default;
Generation& Generation::operator=(Generation&&) noexcept = default;
Generation::~Generation() = default;

std::optional<Token> Generation::next(TokenMask allowed) { return impl_->next(allowed); }
const Logprobs& Generation::logprobs() const { return impl_->logprobs; }
void Generation::cancel() { impl_->cancel.request_stop(); }
FinishReason Generation::finish_reason() const { return impl_->finish_reason; }

GenerationStats Generation::stats() const {
  GenerationStats stats = impl_->run.stats();
  stats.new_tokens = impl_->new_tokens;
  return stats;
}

}  // namespace tda
