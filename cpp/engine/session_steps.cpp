// The steps of a session that are more than one decoded token.
#include <algorithm>
#include <mutex>

#include "backend/logits.h"
#include "engine/session_impl.h"
#include "model/forward.h"

namespace tda {

void Session::Impl::before_step() const {
  if (stop.stop_requested()) throw Cancelled();
  if (runtime->before_step) runtime->before_step();
}

/// Runs tokens in steps of at most the backend's largest. Returns the logits of the last `rows`
/// tokens, or appends those of every token to `all`; throws Error if they are not finite. After an
/// error the session is where it was: what the cache holds beyond `position` is overwritten.
std::span<const float> Session::Impl::run(Step step, std::int64_t rows, std::vector<float>* all) {
  const Tokens tokens = step.tokens;
  check_room(std::ssize(tokens));
  step.position = position;
  step.sequence_length = position + std::ssize(tokens);
  renew_keys(step.sequence_length);
  const std::span<const float> logits = run_steps(step, rows, all);
  cached_.resize(static_cast<std::size_t>(position));
  cached_.insert(cached_.end(), tokens.begin(), tokens.end());
  position += std::ssize(tokens);
  return logits;
}

/// Keys are turned by angles for texts of some length. Where `length` is of another kind, on the
/// other side of longrope's original length, the cached tokens are prefilled anew, densely.
void Session::Impl::renew_keys(std::int64_t length) {
  if (position > 0 && !(turned_for_ && ropes_.share_keys(*turned_for_, length))) {
    turned_for_.reset();  // until all keys are, should this be interrupted
    Step step;
    step.tokens = Tokens(cached_).first(static_cast<std::size_t>(position));
    step.sequence_length = length;
    uncounted([&] { run_steps(step, 0, nullptr); });
  }
  turned_for_ = length;
}

/// run() from step.position on; moves no position.
std::span<const float> Session::Impl::run_steps(Step step, std::int64_t rows,
                                                std::vector<float>* all) {
  const Tokens tokens = step.tokens;
  const std::span<const std::int64_t> samples = step.samples;
  std::span<const float> logits;
  std::int64_t next = step.position;
  // Behind a kept prefix steps end where they would without it.
  const std::int64_t origin = next == resumed_ ? 0 : next;
  for (std::size_t done = 0; done < tokens.size();) {
    const std::int64_t room = backend.max_step() - (next - origin) % backend.max_step();
    const std::size_t count = std::min(tokens.size() - done, static_cast<std::size_t>(room));
    step.tokens = tokens.subspan(done, count);
    step.position = next;
    std::vector<std::int64_t> sampled;
    for (const std::int64_t i : samples) {
      const std::int64_t t = i - static_cast<std::int64_t>(done);
      if (t >= 0 && t < static_cast<std::int64_t>(count)) sampled.push_back(t);
    }
    step.samples = sampled;
    done += count;
    before_step();
    const std::lock_guard turn(runtime->prefilling);
    runtime->decoding.let_through();
    const std::lock_guard lock(runtime->computing);
    const std::int64_t last_rows = done == tokens.size() ? rows : 0;
    logits = forward(backend, *state, step, all ? std::ssize(step.tokens) : last_rows);
    check_finite(logits);
    if (all) all->insert(all->end(), logits.begin(), logits.end());
    next += static_cast<std::int64_t>(count);
    if (records_statistics && next == (std::ssize(statistics) + 1) * backend.max_step())
      statistics.push_back(statistic_of_layers());
  }
  return logits;
}

}  // namespace tda
