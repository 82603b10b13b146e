#pragma once

#include "engine/run.h"
#include "engine/sampler.h"

namespace tda {

struct Generation::Impl {
  std::optional<Token> next();
  Token choose();

  Run run;
  Sampler sampler;
  GenerateOptions options;
  Token last = 0;
  std::int64_t new_tokens = 0;
  FinishReason finish_reason = FinishReason::none;
};

}  // namespace tda
