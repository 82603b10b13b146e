#pragma once

#include <memory>
#include <optional>
#include <span>
#include <stop_token>
#include <vector>

#include "engine/session_impl.h"

namespace tda {

/// A prompt and the tokens after it, with timings. Used by generation and scoring.
class Run {
 public:
  /// capacity: of prompt and continuation together, in tokens. cache: may be null
  Run(std::shared_ptr<const Runtime> runtime, Tokens prompt, std::int64_t capacity,
      const std::optional<TdaOptions>& tda, std::shared_ptr<PrefixCache> cache = {});

  /// Waits for memory, runs the prompt dense, then makes the masks. Returns the logits [V] of its
  /// last token.
  std::span<const float> prefill();
  /// Decodes a token with the masks. Returns its logits [V].
  std::span<const float> decode(Token token);
  /// The same, but returns the token that draw() takes next.
  Token decode_and_draw(Token token, double temperature, double u);
  /// Back to the end of the prompt. False, and nothing is done, if masks are renewed on the way: then
  /// what came after the prompt has changed them.
  bool rewind();
  /// All fields except new_tokens.
  GenerationStats stats() const;
  /// A running step throws Cancelled once `stop` is requested.
  void listen(std::stop_token stop) { session_.stop = std::move(stop); }
  const ModelConfig& config() const { return session_.runtime->config(); }

 private:
  std::span<const float> prefill_rest(FfnMode);
  PrefixUse find_prefix(bool gather, const PrefixPromise&) const;

  Session::Impl session_;
  std::vector<Token> prompt_;
  TdaSetting tda_;
  std::shared_ptr<PrefixCache> cache_;
  std::int64_t decoded_ = 0;
  GenerationStats stats_;  // seconds
};

}  // namespace tda
