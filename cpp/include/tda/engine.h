// Load a checkpoint, generate tokens. The engine speaks token ids; text is the caller's side.
//
//   tda::Engine engine("path/to/checkpoint");
//   std::vector<tda::Token> out = engine.generate(prompt, {.max_new_tokens = 64}).tokens;
#pragma once

#include <tda/error.h>
#include <tda/model_config.h>
#include <tda/prefix_cache.h>
#include <tda/sparsity.h>
#include <tda/types.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace [[gnu::visibility("default")]] tda {

struct EngineOptions {
  Device device = Device::automatic;
  WeightFormat weights = WeightFormat::automatic;
  KvFormat kv = KvFormat::automatic;
  int threads = 0;               // 0: as many as this process may run on, by affinity and CPU quota
  std::int64_t max_context = 0;  // in tokens; 0: the checkpoint's own
  std::int64_t max_batch = 0;    // the most sequences decoded together; 0: what the device can
  /// The most bytes of the KV caches of all generations, scores and logits under way; 0: no limit.
  /// One that does not fit beside the others waits at its first step, and so do all that come
  /// behind it; see Engine.
  std::int64_t cache_memory = 0;
  /// What keeps the beginnings of prompts; null: they are not kept. CPU, and not for models with
  /// dynamic RoPE or longrope, whose keys depend on the length of the whole text.
  std::shared_ptr<PrefixCache> prefix_cache = {};
  Progress progress = {};  // of packing, in bytes of weights; an engine folder needs none
  /// Called before each step, a token or a few hundred of a prompt, by the thread that computes,
  /// and again and again by one that waits. What it throws ends the call.
  std::function<void()> before_step = {};
};

/// Sampling follows the order logit bias, repetition penalty, presence and frequency penalty, mask,
/// temperature, top-k, top-p, min-p.
struct GenerateOptions {
  std::int64_t max_new_tokens = 128;
  double temperature = 0.0;         // 0: greedy
  std::int64_t top_k = 0;           // 0: off
  double top_p = 1.0;               // 1: off
  double min_p = 0.0;               // 0: off
  double repetition_penalty = 1.0;  // 1: off; prompt and generated tokens count
  // By the OpenAI API's formula a token generated n times before loses n * frequency_penalty, and
  // presence_penalty once. -2 to 2; 0: off.
  double presence_penalty = 0.0;
  double frequency_penalty = 0.0;
  std::map<Token, double> logit_bias = {};  // added to logits, -100 to 100; -100 forbids the token
  /// How many of the likeliest tokens Generation::logprobs tells beside the chosen one, 0 to 100.
  std::optional<std::int64_t> logprobs = {};
  std::optional<std::uint64_t> seed = {};  // unset: a fresh one
  bool ignore_eos = false;
  std::shared_ptr<PrefixCache> prefix_cache = {};  // instead of the engine's: of a chat, say

  /// Throws OptionError.
  void validate() const;
};

struct GenerationStats {
  std::int64_t prompt_tokens = 0;
  std::int64_t cached_tokens = 0;  // of them, those that a PrefixCache had
  std::int64_t new_tokens = 0;
  double prefill_seconds = 0;    // the prompt, up to the logits of the first new token
  double mask_seconds = 0;       // TDA: thresholds and masks, part of neither of the others
  double decode_seconds = 0;     // the other new tokens
  double tokens_per_second = 0;  // decode steps / decode_seconds
  double ffn_active = 1;         // mean share of neurons used while decoding
  double ffn_coarse = 0;         // of them, what was used at 4 bits, as a share of all neurons
  std::vector<double> ffn_active_by_layer;  // [L]
  std::vector<double> ffn_coarse_by_layer;  // [L]
  std::int64_t ffn_bytes = 0;         // feed-forward weight bytes read while decoding, as counted
  double ffn_bytes_fraction = 1;      // ffn_bytes relative to dense decoding in the same format
  double head_bytes_fraction = 1;     // bytes of the output head read, relative to all of it
  std::int64_t bytes_per_token = 0;   // mean of all weight and KV bytes read per decoded token
  double mean_batch = 1;              // sequences per step; the bytes are those of this one alone
  std::string tda = "dense";          // the setting used, in words
  std::vector<std::string> warnings;  // what to expect of this setting, model and prompt
};

enum class FinishReason { none, stop, length, cancelled };

/// Which tokens may come next: bit t % 32 of word t / 32 stands for token t. Empty: all may.
using TokenMask = std::span<const std::uint32_t>;

struct TokenLogprob {
  Token token = 0;
  float logprob = 0;  // natural logarithm
};

/// Of one place in a text. Log-probabilities are the model's own, before bias, penalties, masks and
/// temperature, as those of Engine::score.
struct Logprobs {
  TokenLogprob chosen;
  std::vector<TokenLogprob> top;  // GenerateOptions::logprobs of them, likeliest first
};

/// How a kind of matrix is stored in memory.
struct MatrixFormat {
  std::string matrices;     // as "gate, up"
  std::string format;       // as "int8", or what a matrix in int4 is: see docs/models.md
  std::int64_t layers = 0;  // in how many layers; 0: outside of them
  double bits = 0;          // per weight, with scales, minima and padding
};

class HarmProbe;
class Run;
class Runtime;
class Session;

/// One generation under way: `next` until it returns nothing. One thread at a time may use it, but
/// for `cancel`.
class Generation {
 public:
  Generation(Generation&&) noexcept;
  Generation& operator=(Generation&&) noexcept;
  ~Generation();

  /// The next token. Nothing after an end-of-text token (which is not returned; reason `stop`) or
  /// after max_new_tokens (reason `length`). The first call makes the KV cache, once there is
  /// memory for it, and runs the prompt; the last token, the end, `cancel` and an exception free
  /// it. `allowed` may change from call to call; throws OptionError if it is too short or leaves no
  /// token.
  std::optional<Token> next(TokenMask allowed = {});
  /// Of the token that `next` gave last; empty unless GenerateOptions::logprobs is set.
  const Logprobs& logprobs() const;
  /// From any thread: nothing more comes (reason `cancelled`, as after an exception). A `next`
  /// under way gives its token, or gives up the prompt, after the step it is in.
  void cancel();
  FinishReason finish_reason() const;
  GenerationStats stats() const;

 private:
  friend class Engine;
  struct Impl;
  explicit Generation(std::unique_ptr<Impl>);
  std::unique_ptr<Impl> impl_;
};

struct GenerationResult {
  std::vector<Token> tokens;
  std::vector<Logprobs> logprobs;  // one per token, if asked for
  FinishReason finish_reason = FinishReason::none;
  GenerationStats stats;
};

struct ScoreResult {
  std::vector<float> log_probabilities;  // [T - P], natural logarithm
  std::vector<Token> top_tokens;         // [T - P], what greedy decoding would have chosen
  GenerationStats stats;
};

/// A loaded model. Const: any number of threads may use one engine, each call has a session of its
/// own. Tokens that several threads decode at the same time are computed together, at most
/// EngineOptions::max_batch, and each sequence gets what it gets alone, bit for bit. An engine works
/// on in the child of a fork(), with threads started there; sessions that another thread was using
/// at that moment do not.
///
/// With EngineOptions::cache_memory, what needs a KV cache takes its turn in the order of coming
/// and has its whole cache from then to its end. A Session does not count, since its owner may hold
/// it for ever, nor do those of `calibrate`. So whoever waits only waits for what computes, or for
/// a Generation between two calls of `next`: a thread that goes on with several in turn needs room
/// for all of them, or it waits for itself. In the child of a fork() all memory is free again.
class Engine {
 public:
  /// checkpoint: a folder or GGUF file. Throws CheckpointError, OptionError or DeviceError.
  explicit Engine(const std::filesystem::path& checkpoint, const EngineOptions& options = {});
  ~Engine();
  Engine(Engine&&) noexcept;
  Engine& operator=(Engine&&) noexcept;

  const ModelConfig& config() const;
  const std::string& fingerprint() const;
  std::int64_t parameters() const;  // numbers in the checkpoint
  WeightFormat weights() const;
  KvFormat kv() const;
  /// Of a token's keys and values in a KV cache. A generation's has room for its prompt and
  /// max_new_tokens from its first step to its end.
  std::int64_t kv_bytes_per_token() const;
  std::int64_t cache_memory() const;  // 0: no limit
  std::int64_t max_context() const;
  std::int64_t max_batch() const;
  /// What the user should know of the choices that options left to the engine; one sentence each.
  const std::vector<std::string>& notices() const;
  std::int64_t weight_bytes() const;  // resident, all weights
  /// What each kind of matrix is, and where files mix types, each type of it.
  std::vector<MatrixFormat> matrices() const;
  int threads() const;
  std::string device() const;  // e.g. "cpu (avx2)"

  /// Starts a generation. Throws ContextOverflow if prompt and max_new_tokens exceed max_context,
  /// OptionError if their KV cache exceeds cache_memory.
  Generation start(Tokens prompt, const GenerateOptions& = {},
                   const std::optional<TdaOptions>& = {}) const;

  /// `start`, run to its end. `on_token`, if given, sees each token and stops by returning false.
  GenerationResult generate(Tokens prompt, const GenerateOptions& = {},
                            const std::optional<TdaOptions>& = {},
                            const std::function<bool(Token)>& on_token = {}) const;

  /// Dense logits of every position, row-major [T, V].
  std::vector<float> logits(Tokens tokens) const;

  /// Log-probabilities of tokens[P:], P = prompt_tokens >= 1: the prompt is prefilled, the rest
  /// goes token by token through the decode path that generation uses.
  ScoreResult score(Tokens tokens, std::int64_t prompt_tokens,
                    const std::optional<TdaOptions>& = {}) const;
  /// The same of several continuations of one prompt, which is prefilled once unless masks are
  /// renewed on the way; each one's stats count the whole prefill.
  std::vector<ScoreResult> score_each(Tokens prompt,
                                      std::span<const std::vector<Token>> continuations,
                                      const std::optional<TdaOptions>& = {}) const;

  /// Searches per layer the largest threshold whose mean CETT on the texts stays at or under
  /// options.error; with graded weights, what TdaOptions::inputs of one half down to 0 costs when
  /// each text's first half is the prompt and its second is scored. With no texts the model writes
  /// its own. `progress` counts texts, then (for a budget of bytes) layers.
  Thresholds calibrate(std::span<const std::vector<Token>> texts, const CalibrateOptions& = {},
                       const Progress& progress = {}) const;

  /// The layer's W_gate as f32, [F, H], of weights that are not graded or int4.
  std::vector<float> gate(std::int64_t layer) const;

  /// A session for stepwise use: research, tests, own generate loops. `capacity`: tokens it can
  /// hold. `sample_tokens`: how many tokens of each prefill it remembers for TdaOptions::error and
  /// `contributions`, 0 for none.
  Session session(std::int64_t capacity, std::int64_t sample_tokens = 0) const;

 private:
  std::shared_ptr<const Runtime> runtime_;
};

/// All that changes while a model runs: KV cache, position, statistic, masks.
class Session {
 public:
  Session(Session&&) noexcept;
  Session& operator=(Session&&) noexcept;
  ~Session();

  std::int64_t position() const;  // tokens in the cache
  std::int64_t capacity() const;

  // Where a text outgrows the original length of a model with longrope, or goes back below it, the
  // call that does so first computes the keys of all its tokens anew.

  /// Appends tokens, dense, adds them to the prompt statistic; logits of the last one, [V].
  std::vector<float> prefill(Tokens tokens);
  /// Appends one token through the masks; its logits, [V].
  std::vector<float> decode(Token token);

  /// R[j] of the layer over everything prefilled, [F].
  std::vector<float> statistic(std::int64_t layer) const;
  /// |n[t,j]| = |h[t,j]| ||down[j]|| of the tokens remembered of the last prefill, [T, F].
  std::vector<float> contributions(std::int64_t layer) const;
  /// x_t, the feed-forward network's normed input, of the same tokens, [T, H]. CPU.
  std::vector<float> ffn_inputs(std::int64_t layer) const;
  /// The layer's active neurons, strictly ascending; all of them until set.
  std::vector<std::int32_t> mask(std::int64_t layer) const;
  void set_mask(std::int64_t layer, std::span<const std::int32_t> neurons);
  /// Masks or thresholds of all layers by the rules of TdaOptions, from the prompt seen so far. Its
  /// statistic is that of contributions: throws OptionError for another Estimate.
  void apply(const TdaOptions& options);
  /// Feed-forward weight bytes that decode() has read so far.
  std::int64_t ffn_bytes() const;

 private:
  friend class Engine;
  friend class HarmProbe;
  friend class Run;
  struct Impl;
  explicit Session(std::unique_ptr<Impl>);
  std::unique_ptr<Impl> impl_;
};

/// Makes `destination`, a folder that exists, an engine folder: its model.safetensors holds the
/// weights of `checkpoint` as an Engine with such weights has them in memory, so that an Engine
/// maps and uses them in place, and its config.json says so. Throws CheckpointError or OptionError;
/// each of the two files is written whole or not at all. Returns such an Engine's notices.
/// texts: for int4 alone, weights of 16 bits or more are rounded so that the model's products on
/// these texts change least (GPTQ), which costs minutes; 10,000 tokens are enough.
std::vector<std::string> pack_checkpoint(const std::filesystem::path& checkpoint,
                                         const std::filesystem::path& destination,
                                         WeightFormat weights = WeightFormat::automatic,
                                         int threads = 0, const Progress& progress = {},
                                         std::span<const std::vector<Token>> texts = {});

/// Bytes per second of a streaming read over `megabytes` with `threads`: the memory read roof.
double measure_read_bandwidth(int threads, std::int64_t megabytes = 512);

}  // namespace tda
