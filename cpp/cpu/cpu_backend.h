// The CPU backend and its state. Each family of verbs is implemented in a file of its own.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "backend/rope.h"
#include "base/buffer.h"
#include "base/fork_safe.h"
#include "base/thread_pool.h"
#include "cpu/bricks.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/key_scales.h"

namespace tda {

/// Tokens per task of prefill: their panels stay in the core's cache.
inline constexpr std::int64_t kTaskTokens = 128;

/// The layout of the vectors of T tokens in panels (see kernels.h). P is 1 for one token of each
/// sequence and Kernels::panel for more; lanes past the last token are zero.
struct Layout {
  std::int64_t tokens = 0;  // T
  std::int64_t width = 0;   // P
  std::int64_t panels = 0;  // ceil(T / P)

  std::int64_t lanes() const { return panels * width; }
  /// The offset of token t's vector of length n; its elements are `width` apart.
  std::int64_t at(std::int64_t t, std::int64_t n) const {
    return t / width * width * n + t % width;
  }
};

/// The matrix's rows from `first` on, for kernels.
inline Rows rows_of(const Matrix& w, std::int64_t first = 0) {
  return {w.row(first), w.cols, w.stride()};
}

/// A layer's feed-forward rows, for kernels.
inline NeuronRows rows_of(const LayerWeights& layer) {
  return {rows_of(layer.gate), rows_of(layer.up), rows_of(layer.down)};
}

struct CpuState final : State {
  static CpuState& of(State& state) { return static_cast<CpuState&>(state); }
  static const CpuState& of(const State& state) { return static_cast<const CpuState&>(state); }

  /// Whose token the step's t-th is.
  CpuState& sequence(std::int64_t t) { return step.batch.empty() ? *this : of(*step.batch[t]); }
  const CpuState& sequence(std::int64_t t) const {
    return step.batch.empty() ? *this : of(*step.batch[t]);
  }
  bool is_batch() const { return !step.batch.empty(); }

  struct Layer {
    std::vector<std::int32_t> mask;  // active neurons, ascending
    std::optional<NeuronRows> copy;  // their rows, contiguous
    std::vector<double> sums;        // [F] the statistic
    double tokens = 0;               // gathered in `sums`
    std::vector<float> samples;      // [tokens, F]
    float threshold = 0;             // of estimates; 0: all neurons of the mask
    InputThresholds inputs;
    // [tokens, inputs] x of the product gate_up and, with bricks, of the others, but of down,
    // whose inputs are `samples`
    std::vector<float> input_samples[kProducts - 1];
    FfnReads reads;
  };

  std::int64_t capacity = 0;
  KvFormat kv = KvFormat::automatic;
  Buffer<std::byte> keys, values;    // [L, kv heads, capacity, head_dim]
  std::vector<Layer> layers;         // [L]
  Buffer<std::byte> copies;          // the rows of all masks
  std::int64_t head_bytes = 0;       // read so far for single rows of logits
  std::int64_t attention_bytes = 0;  // read so far by single-token steps with bricks
  std::vector<float> head_samples;   // [tokens, H] the head's x

  // Of the current step.
  Layout layout;
  Buffer<float> x;               // [panels, H, P] the residual stream
  Buffer<float> normed;          // [panels, H, P]
  Buffer<float> ordered;         // see CpuBackend::in_order
  Buffer<float> branch;          // [panels, H, P] see CpuBackend::begin_branch
  float* sum = nullptr;          // what attention or feed-forward adds to: x, or branch
  Buffer<float> qkv;             // [panels, q_size + 2 kv_size, P]
  Buffer<float> attended;        // [panels, q_size, P]
  Buffer<float> hidden;          // [panels, F, P] h; decode: of the active neurons, in mask order
  Buffer<float> gates;           // [panels, F, P] act(gate), if the step samples it
  Buffer<float> cos, sin;        // [ropes, panels, head_dim / 2, P]
  Buffer<float> partials;        // decode: partial sums of tasks
  Buffer<float> thread_scratch;  // [threads, scratch_size]
  Buffer<std::byte> prepared;    // see RowKernels::prepare, PanelKernels::prepare
  Buffer<float> all_logits;      // [rows, V]
  Buffer<std::int32_t> likely;   // [V] tokens whose logits are computed exactly
  Buffer<float> padded;          // bricks: x in whole blocks
  Buffer<HighInputs> high;       // bricks: x quantised
  Buffer<RestInputs> rests;      // graded: the inputs whose rests are read
};

/// Decode: rows or neurons split evenly into tasks, in whole kernel batches.
struct Tasks {
  std::int64_t items, count;

  std::int64_t first_of(std::int64_t task) const {
    const std::int64_t batches = (items + kDecodeBatch - 1) / kDecodeBatch;
    return std::min(items, task * batches / count * kDecodeBatch);
  }
};

/// One of each token of a decode step.
template <class T>
using EachVector = std::array<T, Vectors::kMost>;

/// out[t] = first + t * stride, t < count
inline EachVector<float*> each_vector(float* first, std::int64_t count, std::int64_t stride) {
  EachVector<float*> out = {};
  for (std::int64_t t = 0; t < count; ++t) out[t] = first + t * stride;
  return out;
}

struct Neurons;  // ffn.cpp

/// A token in a decode step's feed-forward.
struct FfnToken {
  CpuState& sequence;
  std::span<const std::int32_t> neurons;
  const float* in;  // [H]
  float* x;         // [H], `stride` apart
  std::int64_t stride = 1;
};

/// A task of prefill: a block of rows times a block of panels.
struct Block {
  std::int64_t row, rows;      // at most `block_rows`
  std::int64_t panel, panels;  // at most kTaskTokens in them
};

class CpuBackend final : public Backend {
 public:
  CpuBackend(std::shared_ptr<const Model> model, int threads);

  const Model& model() const override { return *model_; }
  std::string name() const override { return std::string("cpu (") + kernels_.name + ")"; }
  int threads() const override { return pool_.threads(); }
  std::unique_ptr<State> new_state(std::int64_t capacity, KvFormat kv) const override;
  static constexpr std::int64_t kMaxStep = 256;
  std::int64_t max_step() const override { return kMaxStep; }
  std::int64_t max_batch() const override { return Vectors::kMost; }
  std::int64_t cut_multiple() const override;
  std::vector<std::byte> key_value_rows(const State&, std::int64_t tokens) const override;
  void set_key_value_rows(State&, std::span<const std::byte> rows, std::int64_t all,
                          std::int64_t tokens) const override;

  void begin(State&, const Step&) const override;
  void embed(State&) const override;
  void qkv(State&, std::int64_t layer) const override;
  void attention(State&, std::int64_t layer) const override;
  void attention_out(State&, std::int64_t layer) const override;
  void ffn(State&, std::int64_t layer) const override;
  std::span<const float> logits(State&, std::int64_t rows) const override;

  std::vector<double> statistic(const State&, std::int64_t layer) const override;
  double gathered(const State&, std::int64_t layer) const override;
  void set_statistic(State&, std::int64_t layer, std::span<const double> sums,
                     double gathered) const override;
  void fade_statistic(State&, double factor) const override;
  void reserve_samples(State&, std::int64_t tokens) const override;
  std::vector<float> samples(const State&, std::int64_t layer) const override;
  std::vector<float> ffn_inputs(const State&, std::int64_t layer) const override;
  void set_mask(State&, std::int64_t layer, std::vector<std::int32_t> neurons) const override;
  std::vector<std::int32_t> mask(const State&, std::int64_t layer) const override;
  bool can_compact() const override { return true; }
  void compact_masks(State&) const override;
  void set_threshold(State&, std::int64_t layer, float threshold) const override;
  FfnReads ffn_reads(const State&, std::int64_t layer) const override;
  std::int64_t head_bytes(const State&) const override;
  std::int64_t attention_bytes(const State&) const override;
  std::vector<float> input_contributions(const State&, std::int64_t layer, Product) const override;
  std::vector<float> head_contributions(const State&) const override;
  void set_input_thresholds(State&, std::int64_t layer, const InputThresholds&) const override;

 private:
  // cpu_backend.cpp
  void check(const CpuState&, const Step&) const;
  Layout layout_of(std::int64_t tokens) const;
  static Layout layout_of(std::int64_t tokens, std::int64_t width);
  void angles(CpuState&) const;
  std::int64_t angles_size(const CpuState&) const;  // of one RoPE
  const RowKernels& rows(WeightFormat format) const { return row_kernels(kernels_, format); }
  const PanelKernels& panels(WeightFormat format) const { return panel_kernels(kernels_, format); }
  const CacheKernels& caches(KvFormat format) const { return cache_kernels(kernels_, format); }
  const PanelKernels& panels(KvFormat format) const {
    return cache_panel_kernels(kernels_, format);
  }
  /// RowKernels::prepare of each token's x: [T, n]; valid until the next call.
  EachVector<const void*> prepare_each(CpuState&, std::int64_t tokens, WeightFormat, const float* x,
                                       std::int64_t n) const;
  /// x as prefill kernels of w take it; valid until the next call. x: [layout.panels, w.cols, P]
  PreparedPanels prepare(CpuState&, const Layout&, const Matrix& w, const float* x) const;
  float* scratch(const CpuState&, int thread) const;
  /// The keys or values of head `head`, [capacity, head_dim].
  std::byte* cache(const CpuState&, const Buffer<std::byte>&, std::int64_t layer,
                   std::int64_t head) const;
  void make_key_scales() const;
  template <class Byte, class Copy>
  void for_heads(const CpuState&, Byte* rows, std::int64_t all, std::int64_t tokens,
                 const Copy& copy) const;
  std::int64_t cache_row_bytes(const CpuState&) const;

  // linear.cpp
  /// out = rmsnorm(in) of every token. in, out: [panels, H, P]
  void norm(const Layout&, const float* in, std::span<const float> weight, float* out) const;
  /// The input of attention or feed-forward: rmsnorm(x), or x itself without a norm before it.
  const float* normed(CpuState&, std::span<const float> weight) const;
  /// x in the order of w's columns; valid until the next call. x: [panels, w.cols, P]
  const float* in_order(CpuState&, const Matrix& w, const float* x) const;
  /// Sets state.sum to x or, where what is added to x must be normed or scaled before, to zeros;
  /// end_branch then does that. weight: of the norm behind, may be empty
  void begin_branch(CpuState&, std::span<const float> weight) const;
  void end_branch(CpuState&, std::span<const float> weight) const;
  /// Decode: the first rows a thread reads of a matrix, or of a layer's feed-forward (ffn.cpp).
  NextRead first_read(const Matrix&, int thread) const;
  NextRead first_ffn_read(std::int64_t layer, int thread) const;
  /// out = w in, or += with `add`. in: [panels, w.cols, P], out: [panels, w.rows, P]. Decode:
  /// next(thread) is what a thread reads after this.
  template <class Next>
  void multiply(CpuState&, const Layout&, const Matrix& w, const float* in, float* out, bool add,
                const Next& next) const;
  /// Decode: out[t] = w in[t]. in: [T, w.cols], out: [T] of [w.rows]
  template <class Next>
  void multiply_each(CpuState&, std::int64_t tokens, const Matrix& w, const float* in,
                     const EachVector<float*>& out, bool add, const Next& next) const;
  template <class Next>
  void project(CpuState&, std::int64_t layer, Product, const Matrix& w, const float* in, float* out,
               bool add, const Next& next) const;
  /// The same for several tokens, but out: [T, w.rows].
  void multiply_to_rows(CpuState&, const Layout&, const Matrix& w, const float* in,
                        float* out) const;
  /// The logits of a batch, or of a step of one token.
  void logits_each(CpuState&, const float* in) const;
  /// What ModelConfig::logit_cap says. logits: [n]
  void cap(float* logits, std::int64_t n) const;
  void add_bias(const Layout&, std::span<const float> bias, float* out) const;
  /// Prefill: calls body(Block, thread) for all tasks of a matrix times `panels` panels.
  template <class Body>
  void for_blocks(std::int64_t rows, std::int64_t panels, const Body& body,
                  std::int64_t block_rows = kBlockRows) const;

  // attention.cpp
  ScoreScale score_scale() const {
    return {model_->config.attention_scale(), model_->config.score_cap};
  }
  std::int64_t attention_scratch() const;
  void append(CpuState&, std::int64_t layer) const;
  void attend_decode(CpuState&, std::int64_t layer) const;
  void attend_panels(CpuState&, std::int64_t layer) const;
  void attend_panel(CpuState&, std::int64_t layer, std::int64_t kv_head, std::int64_t panel,
                    float* scratch) const;

  // ffn.cpp
  // in: [panels, H, P]
  std::span<const std::int32_t> neurons_of(CpuState&, std::int64_t layer, const float* in,
                                           std::vector<std::int32_t>& chosen) const;
  void ffn_decode(CpuState&, std::int64_t layer, const float* in) const;
  void ffn_sparse(CpuState&, std::int64_t layer, const float* in) const;
  std::int64_t partial_size() const;
  void plan_neurons(CpuState&, std::int64_t layer, std::span<const FfnToken>,
                    EachVector<Neurons>&) const;
  void ffn_neurons(CpuState&, std::int64_t layer, std::span<const FfnToken>) const;
  void add_partials(std::span<const FfnToken>, const EachVector<Neurons>&,
                    std::int64_t most_tasks) const;
  /// Adds the outliers of these neurons' down rows, which are stored apart: x += h * outlier, for
  /// `lanes` tokens. A token's elements are a stride apart.
  static void add_outliers(const LayerWeights&, std::span<const std::int32_t> neurons,
                           const float* h, std::int64_t h_stride, float* x, std::int64_t x_stride,
                           std::int64_t lanes);
  void ffn_panels(CpuState&, std::int64_t layer, const float* in) const;
  /// predictor.cpp: the neurons that Step::predictor chooses for a token. x: [H]
  std::vector<std::int32_t> predicted(CpuState&, std::int64_t layer, const float* x) const;
  void gather(CpuState&, std::int64_t layer) const;
  void sample(CpuState&, std::int64_t layer) const;

  // bricks.cpp
  /// x: [T, w.cols]; valid until the next call.
  EachVector<BrickInputs> brick_inputs(CpuState&, std::int64_t tokens, const Bricks& w,
                                       const float* x, const EachVector<float>& thresholds) const;
  bool in_bricks() const { return tda::in_bricks(model_->format); }
  /// The thresholds of each token's inputs; 0 in a dense step.
  EachVector<float> input_thresholds(const CpuState&, std::int64_t layer, Product) const;
  /// y[t] = w x[t], or += with `add`; of the rests, those of inputs at or above the token's threshold
  /// count. Returns the bytes read for each. x: [T, w.cols], y: [T] of [w.rows]
  EachVector<std::int64_t> multiply_bricks(CpuState&, std::int64_t tokens, const Matrix& w,
                                           const float* x, const EachVector<float>& thresholds,
                                           const EachVector<float*>& y, bool add) const;
  /// The same for several tokens and all rests. in: [panels, w.cols, P], out: [panels, w.rows, P]
  void multiply_bricks_panels(CpuState&, const Layout&, const Matrix& w, const float* in,
                              float* out, bool add) const;
  void ffn_bricks(CpuState&, std::int64_t layer, const float* in) const;
  void ffn_bricks_panels(CpuState&, std::int64_t layer, const float* in) const;
  /// Keeps the x of the tokens named by the step. x: [panels, n, P]
  void sample_inputs(CpuState&, const float* x, std::int64_t n, std::vector<float>& to) const;
  void sample_head(CpuState&) const;

  std::shared_ptr<const Model> model_;
  const Kernels& kernels_;
  mutable ThreadPool pool_;
  Ropes ropes_;
  std::vector<std::int32_t> all_neurons_;      // 0 ... F-1
  mutable ForkSafeMutex scaling_;              // while key_scales_ are made
  mutable std::vector<KeyScales> key_scales_;  // [L]; made with the first int8 cache
  std::int64_t scratch_size_ = 0;              // floats per thread
};

template <class Body>
void CpuBackend::for_blocks(std::int64_t rows, std::int64_t panels, const Body& body,
                            std::int64_t block_rows) const {
  const std::int64_t most = kTaskTokens / kernels_.panel;
  const std::int64_t groups = (panels + most - 1) / most;
  const std::int64_t blocks = (rows + block_rows - 1) / block_rows;
  pool_.run(blocks * groups, [&](std::int64_t i, int thread) {
    const std::int64_t row = i / groups * block_rows, panel = i % groups * most;
    const std::int64_t row_count = std::min(block_rows, rows - row);
    body(Block{row, row_count, panel, std::min(most, panels - panel)}, thread);
  });
}

}  // namespace tda
