// The interface that both devices implement: six verbs and the state they work on.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "backend/kv_format.h"
#include "backend/logits.h"
#include "sparsity/sparsity.h"
#include "weights/model.h"

namespace tda {

enum class FfnMode {
  dense,   // all neurons
  gather,  // all neurons; the tokens are added to the state's statistic
  sparse,  // the neurons of the state's mask that its thresholds select for each token
};

/// The products of a layer whose inputs precision by input judges (graded weights).
enum class Product { qkv, output, gate_up, down };
inline constexpr int kProducts = 4;

/// Of graded weights: inputs with |x[i]| * ||rest[:, i]|| of at least the threshold are read at 8
/// bits, the others at 4. 0: all are.
struct InputThresholds {
  float of[kProducts] = {};
};

/// What sparse and dense decode steps have read so far.
struct FfnReads {
  std::int64_t exact = 0, coarse = 0;  // neurons; coarse: at 4 bits, of graded weights
  std::int64_t bytes = 0;              // of weights

  FfnReads operator-(const FfnReads& o) const {
    return {exact - o.exact, coarse - o.coarse, bytes - o.bytes};
  }
};

class State;

/// One run of the model over T new tokens.
struct Step {
  Tokens tokens;              // [T]
  std::int64_t position = 0;  // of tokens[0]; keys and values of earlier ones are in the cache
  /// The length of the whole sequence, of which this step may be a part; dynamic RoPE and longrope
  /// go by it.
  std::int64_t sequence_length = 0;
  FfnMode ffn = FfnMode::dense;
  /// Ascending indices of tokens to add to the state's samples; ignored in a sparse step.
  std::span<const std::int64_t> samples = {};
  /// For a sparse step with graded weights: the threshold of the head's inputs.
  float head_inputs = 0;
  /// For a sparse step on the CPU: chooses each token's neurons instead of the mask, by so many of
  /// its scores.
  const PredictorWeights* predictor = nullptr;
  std::int64_t predicted = 0;
  /// A step of several sequences: the states of the sequences, [T]. tokens[t] is batch[t]'s next
  /// one, and its own `step`, of this one token, says the rest; of the fields above only `tokens`
  /// count. Verbs are called with the first. Each sequence gets what it gets alone, bit for bit.
  std::span<State* const> batch = {};
};

/// KV cache, scratch, statistic, samples and masks of one session; each backend derives its own.
class State {
 public:
  virtual ~State() = default;

  /// Whether the current step's samples are of act(gate).
  bool samples_gates() const { return !step.samples.empty() && by_gate(estimate); }
  /// Adds what was read for `considered` neurons of a layer, see selected_bytes.
  void add_reads(FfnReads& reads, const Matrix& gate, std::int64_t considered,
                 std::int64_t selected) const {
    reads.exact += selected;
    reads.bytes += selected_bytes(estimate, gate, considered, selected);
  }

  Estimate estimate = Estimate::contribution;  // what neurons are judged by; set before all steps
  std::span<const float> logits;               // [V] of the last token of a step of a batch
  Step step;                                   // the current one
};

/// A model on a device. Const: everything that changes is in a State. Calls with a State are not
/// thread-safe; callers serialise them (Session does).
class Backend {
 public:
  virtual ~Backend() = default;
  virtual const Model& model() const = 0;
  virtual std::string name() const = 0;  // e.g. "cpu (avx2)"
  virtual int threads() const = 0;

  // Memory.
  /// capacity: tokens that fit into the KV cache. Throws DeviceError if memory is short.
  virtual std::unique_ptr<State> new_state(std::int64_t capacity, KvFormat kv) const = 0;
  /// Of the keys and values of one token of that capacity, all layers.
  virtual std::int64_t kv_bytes_per_token(KvFormat kv) const {
    const ModelConfig& config = model().config;
    return 2 * config.num_layers * config.num_kv_heads * kv_row_bytes(kv, config.head_dim);
  }
  /// The largest T of one step.
  virtual std::int64_t max_step() const = 0;
  /// The most sequences of one step (see Step::batch).
  virtual std::int64_t max_batch() const { return 1; }

  // A prompt's beginning, kept for others that begin like it.
  /// A prompt may be cut after a multiple of so many tokens: prefilling the rest behind the rows
  /// of a first part, in steps that end at multiples of max_step(), changes no bit of any result.
  /// 0: the device keeps nothing.
  virtual std::int64_t cut_multiple() const { return 0; }
  /// The keys and values of the first `tokens` tokens, [2, L, kv heads, tokens] rows.
  virtual std::vector<std::byte> key_value_rows(const State&, std::int64_t /*tokens*/) const {
    return {};
  }
  /// Takes over the first `tokens` of the rows of `all` tokens.
  virtual void set_key_value_rows(State&, std::span<const std::byte> /*rows*/, std::int64_t /*all*/,
                                  std::int64_t /*tokens*/) const {}
  virtual void set_statistic(State&, std::int64_t /*layer*/, std::span<const double> /*sums*/,
                             double /*gathered*/) const {}

  // The six verbs, in the order in which forward() calls them. The residual stream x: [T, H] f32 is
  // part of the state. `begin` sizes scratch memory and computes RoPE angles for the step, whose
  // data must stay alive until its last verb.
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
  /// Logits of the step's last `rows` tokens, [rows, V] f32, valid until the state's next verb. Of
  /// a batch (rows: T): State::logits of each, valid until that state's next step.
  virtual std::span<const float> logits(State&, std::int64_t rows) const = 0;
  /// Whether the device draws without bringing the logits to the host.
  virtual bool draws() const { return false; }
  /// draw() from the logits of the step's last token.
  virtual Token draw(State& state, double temperature, double u) const {
    return tda::draw(logits(state, 1), temperature, u);
  }

  // TDA: the statistic and the samples of tokens (v and w: see sparsity.h), maybe in device memory.
  /// sum over gathered tokens t of (h[t,j] w[j])^2 / ||h[t,:] w||^2, [F].
  virtual std::vector<double> statistic(const State&, std::int64_t layer) const = 0;
  /// The number of gathered tokens.
  virtual double gathered(const State&, std::int64_t layer) const = 0;
  /// Multiplies the sums and token counts of all layers by `factor`, the weight of earlier tokens.
  virtual void fade_statistic(State&, double factor) const = 0;
  /// Drops all samples and makes room for those of `tokens` tokens.
  virtual void reserve_samples(State&, std::int64_t tokens) const = 0;
  /// v of the tokens named by Step::samples since then, [tokens, F].
  virtual std::vector<float> samples(const State&, std::int64_t layer) const = 0;
  /// x, the feed-forward network's input, of the same tokens, [tokens, H]; the CPU's alone.
  virtual std::vector<float> ffn_inputs(const State&, std::int64_t /*layer*/) const { return {}; }

  // TDA: thresholds and masks. The first three work on all layers, by default with the functions of
  // cpp/sparsity on the host; a device may override them. They need a statistic of at least one
  // token, and throw Error if it is not finite.
  /// [L] The thresholds on R that meet a CETT of `target` on the samples (of h).
  virtual std::vector<ThresholdSearch> search_thresholds(State&, double target) const;
  /// Keeps the neurons with R[j] >= thresholds[layer]. thresholds: [L]
  virtual void mask_at_least(State&, std::span<const float> thresholds) const;
  /// Keeps the share `active` of the neurons, those with the largest R; see tda::mask_top_share.
  virtual void mask_top_share(State&, double active) const;
  /// neurons: strictly ascending ids in [0, F)
  virtual void set_mask(State&, std::int64_t layer, std::vector<std::int32_t> neurons) const = 0;
  virtual std::vector<std::int32_t> mask(const State&, std::int64_t layer) const = 0;
  /// Whether compact_masks() makes this device faster.
  virtual bool can_compact() const { return false; }
  /// Copies the rows of all masks to contiguous memory of the state; rows of a mask that is set
  /// later are read in place. Changes no result. Throws DeviceError if memory is short.
  virtual void compact_masks(State&) const {}
  /// Tokens use the neurons of the mask whose estimates reach it; 0: all. Throws OptionError if it is
  /// below 0.
  virtual void set_threshold(State&, std::int64_t layer, float threshold) const = 0;
  /// |x[i]| * ||rest[:, i]|| of a product's inputs, of the tokens named by Step::samples,
  /// [tokens, inputs]; graded weights only. Without a layer: of the head's inputs.
  virtual std::vector<float> input_contributions(const State&, std::int64_t /*layer*/,
                                                 Product) const {
    return {};
  }
  virtual std::vector<float> head_contributions(const State&) const { return {}; }
  virtual void set_input_thresholds(State&, std::int64_t /*layer*/, const InputThresholds&) const {}
  /// What single-token steps of this state have read so far.
  virtual FfnReads ffn_reads(const State&, std::int64_t layer) const = 0;
  /// Bytes of q, k, v and output projections read so far by single-token steps, of all layers.
  virtual std::int64_t attention_bytes(const State&) const { return 0; }
  /// Bytes of the head read so far for logits of single rows.
  virtual std::int64_t head_bytes(const State&) const = 0;

 protected:
  /// The checks of set_mask and set_threshold; throw OptionError.
  void check_mask(std::int64_t layer, std::span<const std::int32_t> neurons) const;
  void check_threshold(std::int64_t layer, float threshold) const;
};

/// threads: 0 means all cores this process may use. Throws OptionError.
std::unique_ptr<Backend> make_cpu_backend(std::shared_ptr<const Model> model, int threads);
/// Why this build or machine cannot use CUDA; empty if it can.
std::string cuda_missing();
/// threads: of the host, for searches. Throws DeviceError if this build or machine has no CUDA or
/// too little memory, OptionError for unsupported weights.
std::unique_ptr<Backend> make_cuda_backend(std::shared_ptr<const Model> model, int threads);

}  // namespace tda
