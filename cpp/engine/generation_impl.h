#pragma once

#include <stop_token>

#include "engine/in_use.h"
#include "engine/run.h"
#include "engine/sampler.h"

namespace tda {

struct Generation::Impl {
  std::optional<Token> next(TokenMask allowed);
  std::optional<Token> advance(TokenMask allowed);
  Token choose(TokenMask allowed);

  Run run;
  Sampler sampler;
  GenerateOptions options;
  Token last = 0;
  Logprobs logprobs = {};
  std::int64_t new_tokens = 0;
  FinishReason finish_reason = FinishReason::none;
  std::stop_source cancel = {};
  UseFlag in_use = {};
};

}  // namespace tda
