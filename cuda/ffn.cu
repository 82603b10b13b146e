// The feed-forward network: dense, dense while gathering TDA's statistic, or sparse.
#include <algorithm>

#include "cuda_backend.h"
#include "ffn.h"

namespace tda {

using namespace cuda;

namespace {

template <class W>
auto gate_up_for(Select s) {
  return s == Select::all            ? gate_up_kernel<W, Select::all>
         : s == Select::contribution ? gate_up_kernel<W, Select::contribution>
                                     : gate_up_kernel<W, Select::gate>;
}

template <class W>
auto down_for(bool all) {  // the same kernel for both kinds of threshold
  return all ? down_kernel<W, Select::all> : down_kernel<W, Select::contribution>;
}

}  // namespace

std::int64_t CudaBackend::down_groups() const {
  const std::int64_t slices = blocks_of(model_->config.hidden_size, kSlice);
  return std::clamp<std::int64_t>(kBlocksEach * processors_ / slices, 1, 64);
}

void CudaBackend::ffn(State& s, std::int64_t layer) const {
  CudaState& state = CudaState::of(s);
  const Step& step = state.step;
  if (!skips(state)) {
    if (step.ffn == FfnMode::sparse || (state.tokens() == 1 && !state.samples_gates()))
      for (std::int64_t t = 0; t < state.tokens(); ++t) ffn_one(state, layer, t);
    else
      ffn_tokens(state, layer);
    join(state, layers_[layer].ffn_post_norm);
    if (step.ffn == FfnMode::gather) gather(state, layer);
    if (step.ffn != FfnMode::sparse && !step.samples.empty()) sample(state, layer);
  }
  if (layer + 1 < model_->config.num_layers) return;
  if (state.recording != CudaState::Recording::none) {
    Graph& graph = state.graphs[step.ffn == FfnMode::sparse];
    if (state.recording == CudaState::Recording::recording) graph.end(stream_);
    state.recording = CudaState::Recording::none;
    graph.launch(stream_);
  }
  if (state.counts_reads()) ++state.uncounted;
}

/// x[token] (or the branch) += FFN(norm(x[token])); in a sparse step, of the neurons that mask and threshold keep.
void CudaBackend::ffn_one(CudaState& state, std::int64_t layer, std::int64_t token) const {
  const ModelConfig& config = model_->config;
  const DeviceLayer& weights = layers_[layer];
  const bool sparse = state.step.ffn == FfnMode::sparse;
  const Select select = !sparse || state.layers[layer].threshold <= 0 ? Select::all
                        : by_gate(state.estimate)                     ? Select::gate
                                                                      : Select::contribution;
  const std::int64_t hidden = config.hidden_size, neurons = config.intermediate_size;
  Neurons a = {};
  a.gate = weights.gate.data();
  a.up = weights.up.data();
  a.down = weights.down.data();
  a.lengths = weights.down_lengths.data();
  a.list = sparse ? state.lists.data() + layer * neurons : nullptr;
  a.count = sparse ? state.counts.data() + layer : nullptr;
  a.threshold = state.thresholds.data() + layer;
  a.norm = weights.ffn_norm.data();
  a.x = state.x.data() + token * hidden;
  a.out = sum_of(state) + token * hidden;
  a.add = !joins();
  a.h = state.hidden.data() + token * neurons;
  a.selected = state.selected.data();
  a.partials = state.partials.data();
  a.counters = state.counters.data();
  a.exact = state.counts_reads() ? state.exact.data() + layer : nullptr;
  a.hidden = static_cast<int>(hidden);
  a.neurons = static_cast<int>(neurons);
  a.eps = static_cast<float>(config.rms_norm_eps);
  a.activation = config.activation;
  const bool f32 = model_->format == WeightFormat::f32;
  const unsigned blocks = std::min(blocks_of(neurons, kWarps), kBlocksEach * processors_);
  launch_early(stream_, {blocks, 1, 1}, kThreads, (padded(hidden) + 2 * kWarps) * 4,
               f32 ? gate_up_for<float>(select) : gate_up_for<bf16>(select), a);
  const std::int64_t groups = down_groups(), most = neurons / groups + 1;
  launch_early(stream_, {blocks_of(hidden, kSlice), static_cast<unsigned>(groups), 1}, kThreads,
               (kWarps * kSlice + kWarps + 1 + (select == Select::all ? 1 : 2) * most) * 4,
               f32 ? down_for<float>(select == Select::all) : down_for<bf16>(select == Select::all),
               a);
}

/// Prefill: h = act(gate) * up, then x += W_down h, dense.
void CudaBackend::ffn_tokens(CudaState& state, std::int64_t layer) const {
  const DeviceLayer& weights = layers_[layer];
  const std::int64_t hidden = model_->config.hidden_size, tokens = state.tokens();
  const std::int64_t neurons = model_->config.intermediate_size, n = tokens * neurons;
  if (model_->config.pre_norms) norm(state, state.x.data(), tokens, weights.ffn_norm);
  const float* in = model_->config.pre_norms ? state.normed.data() : state.x.data();
  float *h = state.hidden.data(), *ups = state.ups.data();
  gemm(state, weights.gate, false, in, nullptr, h, tokens, neurons, hidden, false);
  gemm(state, weights.up, false, in, nullptr, ups, tokens, neurons, hidden, false);
  launch(stream_, {blocks_of(n, kThreads), 1, 1}, kThreads, 0, gated_kernel,
         model_->config.activation, h, ups, n);
  gemm(state, weights.down, true, h, nullptr, sum_of(state), tokens, hidden, neurons, !joins());
}

/// Adds the step's tokens to the statistic: each neuron's h[j] w[j] squared, relative to the token's
/// sum of them.
void CudaBackend::gather(CudaState& state, std::int64_t layer) const {
  const int neurons = static_cast<int>(model_->config.intermediate_size);
  const int tokens = static_cast<int>(state.tokens());
  const float* lengths = estimate_weights(state.estimate, layers_[layer].down_lengths.data());
  launch(stream_, {static_cast<unsigned>(tokens), 1, 1}, kThreads, kWarps * 8, token_weights_kernel,
         state.hidden.data(), lengths, neurons, state.token_weights.data());
  launch(stream_, {blocks_of(neurons, kThreads), 1, 1}, kThreads, 0, gather_kernel,
         state.hidden.data(), lengths, state.token_weights.data(), tokens, neurons,
         state.sums.data() + layer * neurons);
  state.layers[layer].tokens += tokens;
}

/// Adds the tokens that the step names to the samples.
void CudaBackend::sample(CudaState& state, std::int64_t layer) const {
  const std::int64_t neurons = model_->config.intermediate_size, pitch = state.sample_room;
  const auto count = std::ssize(state.step.samples);
  CudaState::Layer& of_layer = state.layers[layer];
  launch(stream_, {static_cast<unsigned>(count), 1, 1}, kThreads, 0, sample_kernel,
         (state.samples_gates() ? state.ups : state.hidden).data(), inputs(state).samples,
         static_cast<int>(neurons), static_cast<int>(pitch),
         state.samples.data() + layer * neurons * pitch + of_layer.sampled);
  of_layer.sampled += count;
}

}  // namespace tda
