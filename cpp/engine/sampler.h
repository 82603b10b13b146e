// From logits to the next token.
#pragma once

#include <tda/engine.h>

#include <random>
#include <span>
#include <vector>

#include "backend/backend.h"

namespace tda {

class Sampler {
 public:
  /// options: already validated. prompt: its tokens count for the repetition penalty.
  Sampler(const GenerateOptions& options, Tokens prompt);

  /// Chooses and remembers a token. logits: [V], finite, as Session::Impl::run gives them; a plain
  /// draw throws Error if they are not.
  Token sample(std::span<const float> logits);
  /// Whether sample() is the same as draw(logits, temperature, uniform()).
  bool only_draws() const;
  /// The next random number, in [0, 1).
  double uniform() { return static_cast<double>(random_() >> 11) * 0x1p-53; }

 private:
  Token choose();
  void sort_best(std::size_t count);

  GenerateOptions options_;
  std::mt19937_64 random_;
  std::vector<Token> seen_;  // distinct tokens of prompt and output; kept only with a penalty
  std::vector<bool> is_seen_;
  struct Candidate {
    Token token;
    float logit;
  };
  std::vector<Candidate> candidates_;  // [V], scratch
  void remember(Token token);
};

/// Natural logarithm of the softmax probability of `token`.
float log_probability(std::span<const float> logits, Token token);

}  // namespace tda
