// The CUDA backend and its per-session state. Each group of verbs has its own .cu file.
#pragma once

#include <array>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "backend/rope.h"
#include "cublas.h"
#include "memory.h"

namespace tda {

/// A step's inputs from the host, in one buffer and one copy.
struct Inputs {
  /// angles: of a token, head_dim / 2 for each RoPE
  Inputs(std::uint32_t* memory, std::int64_t tokens, std::int64_t angles)
      : position(reinterpret_cast<int*>(memory)),
        tokens(position + 1),
        cos(reinterpret_cast<float*>(memory + 1 + tokens)),
        sin(cos + tokens * angles),
        samples(reinterpret_cast<int*>(memory + 1 + tokens + 2 * tokens * angles)) {}
  static std::int64_t size(std::int64_t tokens, std::int64_t angles, std::int64_t samples) {
    return 1 + tokens + 2 * tokens * angles + samples;
  }
  int* position;     // [1]
  int* tokens;       // [T]
  float *cos, *sin;  // [ropes, T, head_dim / 2]
  int* samples;      // indices of the step's tokens to add to the samples
};

struct CudaState final : State {
  static CudaState& of(State& state) { return static_cast<CudaState&>(state); }
  static const CudaState& of(const State& state) { return static_cast<const CudaState&>(state); }

  struct Layer {
    std::int64_t active = 0;   // neurons in the mask
    double tokens = 0;         // in the statistic
    std::int64_t sampled = 0;  // tokens in the samples
    float threshold = 0;       // of estimates; 0: all neurons of the mask
    FfnReads reads;
  };
  enum class Recording { none, recording, replaying };

  std::int64_t capacity = 0;
  KvFormat kv = KvFormat::automatic;
  std::vector<Layer> layers;             // [L]
  cuda::Memory<std::byte> keys, values;  // [L, kv heads, capacity, padded(head_dim)]
  cuda::Memory<double> sums;             // [L, F]
  cuda::Memory<float> samples;           // [L, F, sample_room]
  std::int64_t sample_room = 0;          // tokens
  cuda::Memory<float> scores, cuts;      // [L, F] R, [L] thresholds on it
  cuda::Memory<int> ranks, overflows;    // [L, F] among the scores, [L] scores not finite
  cuda::Memory<double> gathered;         // [L] tokens in sums
  cuda::Memory<int> lists, counts;       // [L, F], [L] the masks
  cuda::Memory<float> thresholds;        // [L]
  cuda::Memory<std::int64_t> exact;  // [L] neurons computed by steps not yet in the layers' reads
  std::int64_t uncounted = 0;        // how many such steps
  std::int64_t head_bytes = 0;       // read of the head for single tokens
  cuda::Graph graphs[2];             // of single-token steps: dense, sparse

  // Of the current step.
  Recording recording = Recording::none;
  cuda::Memory<std::uint32_t> inputs;  // see Inputs
  cuda::PinnedMemory<std::uint32_t> host_inputs;
  cuda::Memory<float> x, normed;        // [T, H]
  cuda::Memory<float> branch;           // [T, H] see CudaBackend::joins
  cuda::Memory<float> qkv, attended;    // [T, q_size + 2 kv_size], [T, q_size]
  cuda::Memory<float> hidden, ups;      // [T, F]
  cuda::Memory<std::uint16_t> rounded;  // [T, up to padded(max(H, q_size, F))] bf16
  cuda::Memory<float> partials;         // partial sums of blocks
  cuda::Memory<unsigned> counters;
  cuda::Memory<std::uint8_t> selected;
  cuda::Memory<double> token_weights;  // [T]
  cuda::Memory<float> logits;          // [rows, V]
  cuda::Memory<std::uint64_t> best;    // for draw()
  cuda::Memory<double> draw_sums;      // for draw()
  cuda::PinnedMemory<float> host_logits;
  cuda::PinnedMemory<std::uint64_t> host_best;

  std::int64_t tokens() const { return static_cast<std::int64_t>(step.tokens.size()); }
  bool counts_reads() const { return tokens() == 1 && step.ffn != FfnMode::gather; }
};

class CudaBackend final : public Backend {
 public:
  /// `graphs` false: kernels are launched one by one, so that tests can look at each verb's result.
  CudaBackend(std::shared_ptr<const Model> model, int threads, bool graphs = true);

  const Model& model() const override { return *model_; }
  std::string name() const override { return "cuda (" + device_ + ")"; }
  int threads() const override { return threads_; }
  std::unique_ptr<State> new_state(std::int64_t capacity, KvFormat kv) const override;
  std::int64_t kv_bytes_per_token(KvFormat kv) const override;
  std::int64_t max_step() const override { return 256; }

  void begin(State&, const Step&) const override;
  void embed(State&) const override;
  void qkv(State&, std::int64_t layer) const override;
  void attention(State&, std::int64_t layer) const override;
  void attention_out(State&, std::int64_t layer) const override;
  void ffn(State&, std::int64_t layer) const override;
  std::span<const float> logits(State&, std::int64_t rows) const override;
  bool draws() const override { return true; }
  Token draw(State&, double temperature, double u) const override;

  std::vector<double> statistic(const State&, std::int64_t layer) const override;
  double gathered(const State&, std::int64_t layer) const override;
  void fade_statistic(State&, double factor) const override;
  void reserve_samples(State&, std::int64_t tokens) const override;
  std::vector<float> samples(const State&, std::int64_t layer) const override;
  std::vector<ThresholdSearch> search_thresholds(State&, double target) const override;
  void mask_at_least(State&, std::span<const float> thresholds) const override;
  void mask_top_share(State&, double active) const override;
  void set_mask(State&, std::int64_t layer, std::vector<std::int32_t> neurons) const override;
  std::vector<std::int32_t> mask(const State&, std::int64_t layer) const override;
  void set_threshold(State&, std::int64_t layer, float threshold) const override;
  FfnReads ffn_reads(const State&, std::int64_t layer) const override;
  std::int64_t head_bytes(const State&) const override;

  const cuda::Stream& stream() const { return stream_; }

 private:
  using Bytes = cuda::Memory<std::byte>;
  using Floats = cuda::Memory<float>;
  struct DeviceLayer {
    Floats attention_norm, qkv_bias, q_norm, k_norm, output_bias, attention_post_norm;
    Floats ffn_norm, down_lengths, ffn_post_norm;
    Bytes qkv, output, gate, up, down;  // rows padded to whole chunks
  };

  // cuda_backend.cu
  void check_memory() const;
  void upload(const Matrix& from, Bytes& to) const;
  void upload(std::span<const float> from, Floats& to) const;
  Inputs inputs(const CudaState& state) const {
    return {state.inputs.data(), state.tokens(), ropes_.count() * (model_->config.head_dim / 2)};
  }
  bool skips(const CudaState& state) const {
    return state.recording == CudaState::Recording::replaying;
  }
  void count_reads(const CudaState&) const;
  template <class T>
  void clear(const cuda::Memory<T>& memory) const {
    cuda::check(cudaMemsetAsync(memory.data(), 0, memory.size() * sizeof(T), stream_),
                "clearing memory");
  }

  // linear.cu
  /// y = W norm(x) + bias for each token, or += with `add`. x: [T, cols], y: [T, rows]
  void multiply(CudaState&, const Matrix& w, const Bytes& data, const float* x, std::int64_t tokens,
                const Floats* norm, const Floats& bias, float* y, bool add) const;
  void gemm(CudaState&, const Bytes& w, bool neuron_major, const float* a, const float* bias,
            float* c, std::int64_t tokens, std::int64_t n, std::int64_t depth, bool add) const;
  void make_logits(CudaState&, std::int64_t rows) const;
  void norm(CudaState&, const float* x, std::int64_t tokens, const Floats& weight) const;
  /// In place, over all heads of q or of k together.
  void norm_heads(CudaState&, float* heads, const Floats& weight) const;
  /// Whether what attention and feed-forward give is normed or scaled before it is added to x. It
  /// then goes to the branch, and join() adds it.
  bool joins() const { return model_->config.post_norms || model_->config.residual_scale != 1; }
  float* sum_of(CudaState&) const;
  /// weight: of the norm behind, may be empty
  void join(CudaState&, const Floats& weight) const;

  // ffn.cu
  void ffn_one(CudaState&, std::int64_t layer, std::int64_t token) const;
  void ffn_tokens(CudaState&, std::int64_t layer) const;
  void gather(CudaState&, std::int64_t layer) const;
  void sample(CudaState&, std::int64_t layer) const;
  std::int64_t down_groups() const;

  // masks.cu
  void score(CudaState&) const;
  void rank(CudaState&) const;
  void make_masks(CudaState&, const float* thresholds, std::int64_t first_rank) const;

  // attention.cu
  std::int64_t splits(std::int64_t tokens) const;

  std::shared_ptr<const Model> model_;
  int threads_;
  bool use_graphs_;
  std::string device_;
  unsigned processors_ = 0;  // the device's multiprocessors
  cuda::Stream stream_;
  cuda::Cublas cublas_;
  Ropes ropes_;
  Bytes embedding_, head_;  // head_ is empty if tied
  Floats final_norm_;
  std::vector<DeviceLayer> layers_;
};

}  // namespace tda
