// The one interface that both devices implement: six verbs and the state they work on.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "backend/logits.h"
#include "sparsity/sparsity.h"
#include "weights/model.h"

namespace tda {

enum class FfnMode {
  dense,   // all neurons
  gather,  // all neurons; the tokens join the state's statistic
  sparse,  // of the state's mask, those that its selection takes for the token at hand
};

/// What decides, token by token, which neurons of a mask are computed: an estimate of their
/// contribution's length |h[j]| * ||down[j]||. From `exact` on a neuron is computed exactly, from
/// `coarse` on at 4 bits (int8 weights only), else not at all. The default takes all.
struct TokenThresholds {
  float exact = 0, coarse = 0;  // 0 <= coarse <= exact; equal: no neuron is coarse
  bool by_gate = false;         // the estimate is |act(gate[j])|, as in CATS; needs coarse == exact
};

/// What sparse and dense decode steps have read.
struct FfnReads {
  std::int64_t exact = 0, coarse = 0;  // neurons
  std::int64_t bytes = 0;              // of weights

  FfnReads operator-(const FfnReads& o) const {
    return {exact - o.exact, coarse - o.coarse, bytes - o.bytes};
  }
};

/// What a gathering step's statistic and samples are about.
enum class Estimate {
  contribution,  // statistic of |n|, samples of h
  hidden,        // statistic of |h|, samples of h
  gate,          // statistic of |n|, samples of act(gate)
};

/// One run of the model over T new tokens.
struct Step {
  Tokens tokens;              // [T]
  std::int64_t position = 0;  // of tokens[0]; keys and values of earlier ones are in the cache
  /// Tokens in the whole sequence of which this step may be a part: what dynamic RoPE scales by.
  std::int64_t sequence_length = 0;
  FfnMode ffn = FfnMode::dense;
  Estimate estimate = Estimate::contribution;
  /// Ascending indices of tokens that join the state's samples; of no use in a sparse step.
  std::span<const std::int64_t> samples = {};
  /// Of a single token's logits, those of tokens that are estimated to be at least `head` times as
  /// likely as the likeliest are exact, the others are the estimates, from the head's high plane
  /// alone (int8 only). 0: all are exact.
  float head = 0;
};

/// KV cache, scratch, statistic, samples and masks of one session; each backend derives its own.
class State {
 public:
  virtual ~State() = default;
};

/// Bytes of one head's key or value, of n numbers. int8: the numbers, then their scale, f32.
constexpr std::int64_t kv_row_bytes(KvFormat format, std::int64_t n) {
  return format == KvFormat::f32 ? 4 * n : format == KvFormat::int8 ? n + 4 : 2 * n;
}

/// A model made ready on a device. Const: all that changes is in a State. One call at a
/// time, of what takes a State; callers serialise (Session does).
class Backend {
 public:
  virtual ~Backend() = default;
  virtual const Model& model() const = 0;
  virtual std::string name() const = 0;  // e.g. "cpu (avx2)"
  virtual int threads() const = 0;

  // Memory.
  /// `capacity`: tokens the KV cache holds. Throws DeviceError if memory is short.
  virtual std::unique_ptr<State> new_state(std::int64_t capacity, KvFormat kv) const = 0;
  /// Largest T of one step.
  virtual std::int64_t max_step() const = 0;

  // The six verbs, in the order forward() calls them. The residual stream x: [T, H] f32 lives in
  // the state; `begin` sizes scratch and computes RoPE angles for the step, whose data must stay
  // alive until its last verb.
  virtual void begin(State&, const Step&) const = 0;
  /// x = embedding[tokens]
  virtual void embed(State&) const = 0;
  /// q, k, v = RoPE(qk_norm(W_qkv rmsnorm(x) + b)); k and v are appended to the cache
  virtual void qkv(State&, std::int64_t layer) const = 0;
  /// a = softmax(q kᵀ / sqrt(head_dim)) v, causal, within the sliding window
  virtual void attention(State&, std::int64_t layer) const = 0;
  /// x += W_o a + b
  virtual void attention_out(State&, std::int64_t layer) const = 0;
  /// x += FFN(rmsnorm(x)), by the step's FfnMode
  virtual void ffn(State&, std::int64_t layer) const = 0;
  /// Logits [rows, V] f32 of the step's last `rows` tokens; valid until the state's next verb.
  virtual std::span<const float> logits(State&, std::int64_t rows) const = 0;
  /// draw() after the step's last token, for those who need no more: a device need not hand over
  /// the logits then.
  virtual Token draw(State& state, double temperature, double u) const {
    return tda::draw(logits(state, 1), temperature, u);
  }

  // TDA: the statistic and the samples of tokens. Both may stay on the device.
  /// sum over gathered tokens t of (|n[t,j]| / ||n[t,:]||)^2, [F].
  virtual std::vector<double> statistic(const State&, std::int64_t layer) const = 0;
  /// How many tokens that is.
  virtual double gathered(const State&, std::int64_t layer) const = 0;
  /// Scales sums and token count of all layers: what came before counts `factor` as much.
  virtual void fade_statistic(State&, double factor) const = 0;
  /// Forgets all samples and makes room for so many tokens.
  virtual void reserve_samples(State&, std::int64_t tokens) const = 0;
  /// h or act(gate), see Estimate, of the tokens that Step::samples named since, [tokens, F].
  virtual std::vector<float> samples(const State&, std::int64_t layer) const = 0;

  // TDA: thresholds and masks. The first three are for all layers at once; here they are
  // cpp/sparsity's on the host, which a device may replace by its own. They need a statistic of
  // one token or more, and throw Error if it is not finite.
  /// [L] The thresholds on R that meet a CETT of `target` on the samples, of h.
  virtual std::vector<ThresholdSearch> search_thresholds(State&, double target) const;
  /// R[j] >= thresholds[layer] stays. thresholds: [L]
  virtual void mask_at_least(State&, std::span<const float> thresholds) const;
  /// The share `active` of the neurons, those with the largest R, stays; see tda::mask_top_share.
  virtual void mask_top_share(State&, double active) const;
  /// Strictly ascending ids in [0, F).
  virtual void set_mask(State&, std::int64_t layer, std::vector<std::int32_t> neurons) const = 0;
  virtual std::vector<std::int32_t> mask(const State&, std::int64_t layer) const = 0;
  /// Whether this device reads rows that follow each other faster than those of a mask.
  virtual bool can_compact() const { return false; }
  /// Copies the rows of all masks to memory of the state, where they follow each other; a mask set
  /// later is read in place. Changes no result. Throws DeviceError if memory is short.
  virtual void compact_masks(State&) const {}
  /// Throws OptionError for thresholds that contradict each other or the weight format.
  virtual void set_thresholds(State&, std::int64_t layer, const TokenThresholds&) const = 0;
  /// What single-token steps of this state have read so far, counted where read.
  virtual FfnReads ffn_reads(const State&, std::int64_t layer) const = 0;
  /// Bytes of the head that logits of single rows have read so far.
  virtual std::int64_t head_bytes(const State&) const = 0;

 protected:
  /// What set_mask and set_thresholds demand; throw OptionError.
  void check_mask(std::int64_t layer, std::span<const std::int32_t> neurons) const;
  void check_thresholds(std::int64_t layer, const TokenThresholds&) const;
};

/// `threads` 0: as many as this process may run on. Throws OptionError.
std::unique_ptr<Backend> make_cpu_backend(std::shared_ptr<const Model> model, int threads);
/// What keeps this build or machine from using CUDA; empty if nothing does.
std::string cuda_missing();
/// `threads` of the host, for searches. Throws DeviceError if this build or machine has no CUDA or
/// too little memory, OptionError for weights it cannot take.
std::unique_ptr<Backend> make_cuda_backend(std::shared_ptr<const Model> model, int threads);

}  // namespace tda
