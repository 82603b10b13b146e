#include <algorithm>

#include "engine/generation_impl.h"

namespace tda {

Token Generation::Impl::choose() {
  if (new_tokens == 0) return sampler.sample(run.prefill());
  if (!sampler.only_draws()) return sampler.sample(run.decode(last));
  return run.decode_and_draw(last, options.temperature, sampler.uniform());
}

std::optional<Token> Generation::Impl::next() {
  const InUse guard(in_use, "generation");
  if (finish_reason != FinishReason::none) return {};
  try {
    return advance();
  } catch (const Cancelled&) {
    finish_reason = FinishReason::cancelled;
    return {};
  } catch (...) {
    finish_reason = FinishReason::cancelled;  // half a step is nothing to go on from
    throw;
  }
}

std::optional<Token> Generation::Impl::advance() {
  if (new_tokens == options.max_new_tokens) {
    finish_reason = FinishReason::length;
    return {};
  }
  const Token token = choose();
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

std::optional<Token> Generation::next() { return impl_->next(); }
void Generation::cancel() { impl_->cancel.request_stop(); }
FinishReason Generation::finish_reason() const { return impl_->finish_reason; }

GenerationStats Generation::stats() const {
  GenerationStats stats = impl_->run.stats();
  stats.new_tokens = impl_->new_tokens;
  return stats;
}

}  // namespace tda
