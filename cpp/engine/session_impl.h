// The implementation of Session, also used by Generation, score and calibrate.
#pragma once

#include <tda/engine.h>

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <stop_token>
#include <vector>

#include "backend/backend.h"
#include "backend/rope.h"
#include "engine/in_use.h"
#include "engine/prefixes.h"
#include "engine/runtime.h"
#include "sparsity/setting.h"
#include "sparsity/sparsity.h"

namespace tda {

/// Thrown by a step whose generation was cancelled; caught inside the library.
struct Cancelled {};

struct Session::Impl {
  /// `sample_tokens` as in Engine::session. Throws ContextOverflow if capacity exceeds max_context.
  /// There is no state before one of the next two.
  Impl(std::shared_ptr<const Runtime> runtime, std::int64_t capacity, std::int64_t sample_tokens);
  /// Makes the state, of which EngineOptions::cache_memory knows nothing.
  void open();
  /// Makes it once there is memory for it. Throws OptionError if there never will be, and what
  /// before_step() throws.
  void open_when_it_fits();

  /// Logits [rows, V] of the last `rows` tokens; dense. Valid until the next call.
  std::span<const float> prefill(Tokens tokens, FfnMode mode, std::int64_t rows = 1);
  /// Logits [T, V] of all tokens.
  std::vector<float> all_logits(Tokens tokens);
  /// Logits [V], valid until the next step.
  std::span<const float> decode(Token token);
  /// decode(), then the token that draw() takes.
  Token decode_and_draw(Token token, double temperature, double u);
  /// Throws Cancelled if `stop` is requested, or what Runtime::before_step throws.
  void before_step() const;
  /// Before anything else: begins with the first `use.length` tokens of a kept prompt and, with
  /// `gather`, their statistic.
  void resume(const PrefixUse& use, bool gather);
  /// Forgets the tokens after the first `length`, which were prefilled, and what decoding has read.
  void rewind(std::int64_t length);
  std::vector<float> statistic(std::int64_t layer) const;
  /// [T, F] of the last prefill's sampled tokens, see Backend::samples.
  std::vector<float> samples(std::int64_t layer) const;
  /// What the options come to for this model and so many prompt tokens, before any work. Throws
  /// CheckpointError or OptionError where they do not fit the model.
  TdaSetting resolve(const std::optional<TdaOptions>& asked, std::int64_t prompt_tokens) const;
  /// Follows a resolved setting from the next token on.
  void apply(const std::optional<TdaOptions>& options);
  void set_mask(std::int64_t layer, std::span<const std::int32_t> neurons);
  std::vector<FfnReads> reads() const;  // [L] by decoded tokens
  std::int64_t ffn_bytes() const;
  /// Fills the fields about decoding, except seconds and token counts, which the caller knows.
  void add_to(GenerationStats& stats) const;

  std::shared_ptr<const Runtime> runtime;
  const Backend& backend;
  CacheMemory::Share memory;
  std::unique_ptr<State> state;
  std::int64_t capacity;
  std::int64_t sample_tokens;
  std::int64_t sample_window = std::numeric_limits<std::int64_t>::max();  // of the last tokens
  std::int64_t position = 0;
  std::vector<Statistic> statistics;  // after each full step from the first token on, if recorded
  bool records_statistics = false;
  DecodeQueue::Member member;
  std::stop_token stop;  // checked before every step
  UseFlag in_use;
  FfnMode decode_mode = FfnMode::dense;

 private:
  Step next_step(const Token& token);
  void count_decoded(const Token& token);
  void check_room(std::int64_t tokens) const;
  std::span<const float> run(Step step, std::int64_t rows, std::vector<float>* all = nullptr);
  std::span<const float> run_steps(Step step, std::int64_t rows, std::vector<float>* all);
  void renew_keys(std::int64_t length);
  /// What `work` reads is none of decoding's.
  void uncounted(const std::function<void()>& work);
  void apply_sequence(const TdaOptions& options);
  void apply_token(const TdaOptions& options);
  void apply_inputs(const TdaOptions& options);
  void apply_predictor(const TdaOptions& options);
  void check_statistic() const;
  void check(const TdaOptions& options) const;
  void check_thresholds(const Thresholds& file, std::optional<Scope> scope) const;
  void mask_none();                                          // all neurons are active
  void set_token_thresholds(std::span<const float> chosen);  // [L]
  void mask_from_statistic();
  void mask_with_prior();
  void refresh();
  Statistic statistic_of_layers() const;

  Ropes ropes_;
  std::vector<Token> cached_;                // [position]
  std::optional<std::int64_t> turned_for_;   // the length of the text that all keys are of
  std::int64_t resumed_ = 0;                 // tokens of a kept prefix
  std::vector<float> thresholds_;            // [L]; empty if masks are made by active_
  std::shared_ptr<const Thresholds> prior_;  // whose prior masks are made with; may be null
  double active_ = 1;
  bool compact_ = false;
  std::int64_t samples_ = 0;  // tokens sampled in the last prefill
  std::int64_t refresh_every_ = 0;
  std::vector<Token> recent_;  // decoded since the masks were made
  std::int64_t refresh_bytes_ = 0;
  std::shared_ptr<const Predictor> predictor_;  // of decoded tokens, may be null
  std::int64_t predicted_ = 0;                  // Step::predicted of theirs
  float head_inputs_ = 0;                       // Step::head_inputs of decoded tokens
  std::int64_t prefill_attention_bytes_ = 0;
  std::int64_t prefill_head_bytes_ = 0;  // the backend's count after prefill
  std::int64_t decoded_ = 0;
  std::int64_t batch_sizes_ = 0;         // the sum, over decoded tokens
  std::int64_t kv_bytes_ = 0;            // read while decoding
  std::vector<FfnReads> prefill_reads_;  // [L] the backend's count after prefill
};

}  // namespace tda
