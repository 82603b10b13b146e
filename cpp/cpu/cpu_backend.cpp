#include "cpu/cpu_backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <numeric>

#include "base/parallel.h"

namespace tda {

std::unique_ptr<Backend> make_cpu_backend(std::shared_ptr<const Model> model, int threads) {
  return std::make_unique<CpuBackend>(std::move(model), threads);
}

CpuBackend::CpuBackend(std::shared_ptr<const Model> model, int threads)
    : model_(std::move(model)), kernels_(choose_kernels()), pool_(threads), ropes_(model_->config) {
  const ModelConfig& config = model_->config;
  all_neurons_.resize(config.intermediate_size);
  std::iota(all_neurons_.begin(), all_neurons_.end(), 0);
  scratch_size_ = std::max(std::max(kBlockRows, kStripRows) * kTaskTokens, attention_scratch());
}

// ---- memory -------------------------------------------------------------------------------------

std::unique_ptr<State> CpuBackend::new_state(std::int64_t capacity, KvFormat kv) const {
  const ModelConfig& config = model_->config;
  if (capacity < 1)
    throw OptionError("capacity of the KV cache: " + std::to_string(capacity) +
                      " tokens, expected at least 1");
  auto state = std::make_unique<CpuState>();
  state->capacity = capacity;
  state->kv = kv != KvFormat::automatic             ? kv
              : model_->format == WeightFormat::f32 ? KvFormat::f32
                                                    : KvFormat::bf16;
  if (state->kv == KvFormat::int8) make_key_scales();
  const Size bytes =
      Size(config.num_layers) * config.num_kv_heads * capacity * cache_row_bytes(*state);
  const std::string needed_for = "the keys (and as many for the values) of a KV cache of " +
                                 std::to_string(capacity) + " tokens";
  state->keys.reserve(bytes, needed_for);
  state->values.reserve(bytes, needed_for);
  state->layers.resize(config.num_layers);
  for (CpuState::Layer& layer : state->layers) {
    layer.mask = all_neurons_;
    layer.sums.resize(config.intermediate_size);
  }
  return state;
}

/// Once for all states.
void CpuBackend::make_key_scales() const {
  const std::lock_guard lock(scaling_);
  if (!key_scales_.empty()) return;
  std::vector<KeyScales> scales(model_->layers.size());
  // Not by the pool, which may be at work on another state.
  parallel_for(threads(), std::ssize(scales), [&](std::int64_t layer) {
    scales[layer] = key_scales(model_->config, model_->layers[layer]);
  });
  key_scales_ = std::move(scales);
}

float* CpuBackend::scratch(const CpuState& state, int thread) const {
  return state.thread_scratch.data() + thread * scratch_size_;
}

std::int64_t CpuBackend::cache_row_bytes(const CpuState& state) const {
  return kv_row_bytes(state.kv, model_->config.head_dim);
}

std::byte* CpuBackend::cache(const CpuState& state, const Buffer<std::byte>& buffer,
                             std::int64_t layer, std::int64_t head) const {
  return buffer.data() +
         (layer * model_->config.num_kv_heads + head) * state.capacity * cache_row_bytes(state);
}

std::int64_t CpuBackend::cut_multiple() const { return kernels_.panel; }

/// Calls copy(kept, cached, bytes) for each head's rows of the first `tokens` tokens. rows: of `all`
/// tokens, as key_value_rows gives them.
template <class Byte, class Copy>
void CpuBackend::for_heads(const CpuState& state, Byte* rows, std::int64_t all, std::int64_t tokens,
                           const Copy& copy) const {
  const ModelConfig& config = model_->config;
  const std::int64_t row = cache_row_bytes(state);
  for (const auto* buffer : {&state.keys, &state.values})
    for (std::int64_t layer = 0; layer < config.num_layers; ++layer)
      for (std::int64_t head = 0; head < config.num_kv_heads; ++head) {
        copy(rows, cache(state, *buffer, layer, head), tokens * row);
        rows += all * row;
      }
}

std::vector<std::byte> CpuBackend::key_value_rows(const State& s, std::int64_t tokens) const {
  const CpuState& state = CpuState::of(s);
  const ModelConfig& config = model_->config;
  std::vector<std::byte> rows(2 * config.num_layers * config.num_kv_heads * tokens *
                              cache_row_bytes(state));
  for_heads(state, rows.data(), tokens, tokens,
            [](std::byte* kept, const std::byte* cached, std::int64_t bytes) {
              std::memcpy(kept, cached, bytes);
            });
  return rows;
}

void CpuBackend::set_key_value_rows(State& s, std::span<const std::byte> rows, std::int64_t all,
                                    std::int64_t tokens) const {
  for_heads(CpuState::of(s), rows.data(), all, tokens,
            [](const std::byte* kept, std::byte* cached, std::int64_t bytes) {
              std::memcpy(cached, kept, bytes);
            });
}

EachVector<const void*> CpuBackend::prepare_each(CpuState& state, std::int64_t tokens,
                                                 WeightFormat format, const float* x,
                                                 std::int64_t n) const {
  const RowKernels& kernels = rows(format);
  EachVector<const void*> each = {};
  if (!kernels.prepare) {
    for (std::int64_t t = 0; t < tokens; ++t) each[t] = x + t * n;
    return each;
  }
  const std::int64_t bytes = (kernels.prepared_bytes(n) + 63) / 64 * 64;
  std::byte* prepared = state.prepared.reserve(Size(tokens) * bytes, "prepared vectors");
  for (std::int64_t t = 0; t < tokens; ++t) each[t] = prepared + t * bytes;
  pool_.run(tokens,
            [&](std::int64_t t, int) { kernels.prepare(x + t * n, n, prepared + t * bytes); });
  return each;
}

PreparedPanels CpuBackend::prepare(CpuState& state, const Layout& layout, const Matrix& w,
                                   const float* x) const {
  const PanelKernels& kernels = panels(w.in_bricks() ? WeightFormat::bf16 : w.format);
  const std::int64_t n = w.cols, stride = n * layout.width;
  if (!kernels.prepare) return ConstPanels{x, stride};
  const std::int64_t bytes = kernels.prepared_bytes(n);
  std::byte* prepared = state.prepared.reserve(Size(layout.panels) * bytes, "prepared panels");
  pool_.run(layout.panels, [&](std::int64_t panel, int) {
    kernels.prepare(x + panel * stride, n, prepared + panel * bytes);
  });
  return {prepared, bytes};
}

// ---- begin and embed ----------------------------------------------------------------------------

void CpuBackend::check(const CpuState& state, const Step& step) const {
  const ModelConfig& config = model_->config;
  const std::int64_t tokens = static_cast<std::int64_t>(step.tokens.size());
  if (tokens < 1 || tokens > max_step())
    throw OptionError("step of " + std::to_string(tokens) + " tokens, expected 1 to " +
                      std::to_string(max_step()));
  if (step.position < 0 || step.position > state.capacity - tokens)
    throw ContextOverflow(std::to_string(tokens) + " tokens at position " +
                          std::to_string(step.position) + " do not fit into a KV cache of " +
                          std::to_string(state.capacity));
  if (step.sequence_length < step.position + tokens)
    throw OptionError("sequence_length " + std::to_string(step.sequence_length) + " of a step to " +
                      std::to_string(step.position + tokens) + " tokens, expected at least that");
  for (const Token token : step.tokens)
    if (token < 0 || token >= config.vocab_size)
      throw OptionError("token id " + std::to_string(token) + ", expected 0 to " +
                        std::to_string(config.vocab_size - 1));

  if (in_bricks() && step.ffn == FfnMode::sparse && tokens > 1)
    throw OptionError("sparse step of " + std::to_string(tokens) + " tokens with " +
                      std::string(name_of(model_->format)) + " weights, expected one token");
}

void CpuBackend::begin(State& s, const Step& step) const {
  CpuState& state = CpuState::of(s);
  const ModelConfig& config = model_->config;
  const std::int64_t tokens = static_cast<std::int64_t>(step.tokens.size());
  if (step.batch.empty()) {
    check(state, step);
    state.step = step;
  } else {
    for (State* const sequence : step.batch) check(CpuState::of(*sequence), sequence->step);
    state.step.batch = step.batch;
    state.step.tokens = step.tokens;
  }
  // Only the prefill path can record gates, so it also runs a single token whose gates are sampled.
  state.layout = state.is_batch()        ? layout_of(tokens, 1)
                 : state.samples_gates() ? layout_of(tokens, kernels_.panel)
                                         : layout_of(tokens);
  const Size lanes = state.layout.lanes();
  const char* needed_for = "a step's activations";
  state.x.reserve(lanes * config.hidden_size, needed_for);
  state.normed.reserve(lanes * config.hidden_size, needed_for);
  state.qkv.reserve(lanes * model_->layers.front().qkv.rows, needed_for);
  state.attended.reserve(lanes * config.q_size(), needed_for);
  state.hidden.reserve(lanes * (config.intermediate_size + kBlockInputs), needed_for);
  const Size angles_count = Size(ropes_.count()) * angles_size(state);
  state.cos.reserve(angles_count, needed_for);
  state.sin.reserve(angles_count, needed_for);
  state.thread_scratch.reserve(Size(threads()) * scratch_size_, needed_for);
  angles(state);
}

Layout CpuBackend::layout_of(std::int64_t tokens) const {
  return layout_of(tokens, tokens == 1 ? 1 : kernels_.panel);
}

Layout CpuBackend::layout_of(std::int64_t tokens, std::int64_t width) {
  return {tokens, width, (tokens + width - 1) / width};
}

std::int64_t CpuBackend::angles_size(const CpuState& state) const {
  return state.layout.lanes() * (model_->config.head_dim / 2);
}

void CpuBackend::angles(CpuState& state) const {
  const std::int64_t half = model_->config.head_dim / 2, width = state.layout.width;
  for (std::int64_t rope = 0; rope < ropes_.count(); ++rope) {
    const float factor = static_cast<float>(ropes_.config(rope).attention_factor);
    float* const cos = state.cos.data() + rope * angles_size(state);
    float* const sin = state.sin.data() + rope * angles_size(state);
    pool_.run(state.layout.panels, [&](std::int64_t panel, int) {
      const Step& step = state.sequence(panel).step;
      const std::vector<float> frequencies = ropes_.frequencies(rope, step.sequence_length);
      const std::int64_t first = step.position + (state.is_batch() ? 0 : panel * width);
      for (std::int64_t i = 0; i < half; ++i)
        for (std::int64_t lane = 0; lane < width; ++lane) {
          const std::int64_t position = first + lane;
          const float angle = static_cast<float>(position) * frequencies[i];
          const std::int64_t at = (panel * half + i) * width + lane;
          cos[at] = std::cos(angle) * factor;
          sin[at] = std::sin(angle) * factor;
        }
    });
  }
}

void CpuBackend::embed(State& s) const {
  CpuState& state = CpuState::of(s);
  const Matrix& embedding = model_->embedding;
  const Layout& layout = state.layout;
  float* x = state.x.data();
  if (layout.lanes() > layout.tokens)
    std::fill_n(x + (layout.panels - 1) * layout.width * embedding.cols,
                layout.width * embedding.cols, 0.0f);
  const float scale = model_->embedding_scale();
  const std::int64_t n = embedding.cols;
  pool_.run(layout.tokens, [&](std::int64_t t, int) {
    float* const to = x + layout.at(t, n);
    if (in_bricks()) {
      std::vector<float> row(n);
      read_row(embedding, state.step.tokens[t], 0, n, row.data());
      for (std::int64_t i = 0; i < n; ++i) to[i * layout.width] = row[i];
    } else {
      rows(embedding.format).load(rows_of(embedding, state.step.tokens[t]), to, layout.width);
    }
    if (scale != 1)
      for (std::int64_t i = 0; i < n; ++i) to[i * layout.width] *= scale;
  });
}

// ---- TDA ----------------------------------------------------------------------------------------

std::vector<double> CpuBackend::statistic(const State& state, std::int64_t layer) const {
  return CpuState::of(state).layers[layer].sums;
}

double CpuBackend::gathered(const State& state, std::int64_t layer) const {
  return CpuState::of(state).layers[layer].tokens;
}

void CpuBackend::set_statistic(State& state, std::int64_t layer, std::span<const double> sums,
                               double gathered) const {
  CpuState::of(state).layers[layer].sums.assign(sums.begin(), sums.end());
  CpuState::of(state).layers[layer].tokens = gathered;
}

void CpuBackend::fade_statistic(State& state, double factor) const {
  for (CpuState::Layer& layer : CpuState::of(state).layers) {
    layer.tokens *= factor;
    for (double& sum : layer.sums) sum *= factor;
  }
}

void CpuBackend::reserve_samples(State& state, std::int64_t tokens) const {
  CpuState::of(state).head_samples.clear();
  for (CpuState::Layer& layer : CpuState::of(state).layers) {
    for (std::vector<float>& samples : layer.input_samples) samples.clear();
    layer.samples.clear();
    layer.samples.reserve(tokens * model_->config.intermediate_size);
  }
}

std::vector<float> CpuBackend::samples(const State& state, std::int64_t layer) const {
  return CpuState::of(state).layers[layer].samples;
}

std::vector<float> CpuBackend::ffn_inputs(const State& state, std::int64_t layer) const {
  return CpuState::of(state).layers[layer].input_samples[static_cast<int>(Product::gate_up)];
}

void CpuBackend::set_mask(State& state, std::int64_t layer,
                          std::vector<std::int32_t> neurons) const {
  check_mask(layer, neurons);
  CpuState::of(state).layers[layer].mask = std::move(neurons);
  CpuState::of(state).layers[layer].copy.reset();
}

std::vector<std::int32_t> CpuBackend::mask(const State& state, std::int64_t layer) const {
  return CpuState::of(state).layers[layer].mask;
}

void CpuBackend::set_threshold(State& state, std::int64_t layer, float threshold) const {
  check_threshold(layer, threshold);
  CpuState::of(state).layers[layer].threshold = threshold;
}

FfnReads CpuBackend::ffn_reads(const State& state, std::int64_t layer) const {
  return CpuState::of(state).layers[layer].reads;
}

std::int64_t CpuBackend::head_bytes(const State& state) const {
  return CpuState::of(state).head_bytes;
}

}  // namespace tda
