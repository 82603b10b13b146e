#pragma once

#include <stop_token>

#include "base/fork_safe.h"
#include "engine/run.h"
#include "engine/sampler.h"

namespace tda {

struct Generation::Impl {
  std::optional<Token> next(TokenMask allowed);
  /// From any thread.
  void stop();
  // Not while another thread is in `next`.
  FinishReason reason() const;
  GenerationStats stats() const;

  std::optional<Run> run;  // until the last token: what it holds is free from then on
  Sampler sampler;
  GenerateOptions options;
  Token last = 0;
  Logprobs logprobs = {};
  std::int64_t new_tokens = 0;
  FinishReason finish_reason = FinishReason::none;
  std::stop_source cancel = {};
  GenerationStats last_stats = {};   // once there is no run
  bool in_use = false;               // by `next`, which alone changes all of this meanwhile
  mutable ForkSafeMutex mutex = {};  // held while in_use is read or changed, and by stop()

 private:
  void enter();
  void leave(FinishReason reason = FinishReason::none);
  std::optional<Token> advance(TokenMask allowed);
  Token choose(TokenMask allowed);
  void end(FinishReason);
  void free_run();
};

}  // namespace tda
