// From logits to the next token.
#pragma once

#include <tda/engine.h>

#include <map>
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
  /// draw throws Error if they are not. Throws OptionError if no token is allowed.
  Token sample(std::span<const float> logits, TokenMask allowed = {});
  /// Whether sample() without a mask is the same as draw(logits, temperature, uniform()).
  bool only_draws() const;
  /// The next random number, in [0, 1).
  double uniform() { return static_cast<double>(random_() >> 11) * 0x1p-53; }

 private:
  bool changes_logits() const;
  void change_logits();
  void drop_forbidden(TokenMask allowed);
  Token choose();
  void sort_best(std::size_t count);

  GenerateOptions options_;
  std::mt19937_64 random_;
  std::vector<Token> seen_;  // distinct tokens of prompt and output; kept only with a penalty
  std::vector<bool> is_seen_;
  std::map<Token, std::int64_t> counts_;  // of generated tokens; kept only with their penalties
  struct Candidate {
    Token token;
    float logit;
  };
  std::vector<Candidate> candidates_;  // [V], scratch
  void remember(Token token);
};

/// Natural logarithm of the softmax probability of `token`.
float log_probability(std::span<const float> logits, Token token);
/// The same of the chosen token and of the `count` likeliest ones; of equal ones the lower id first.
Logprobs logprobs_of(std::span<const float> logits, Token chosen, std::int64_t count);

}  // namespace tda
