// TDA's statistic and samples, and scope "sequence": thresholds and masks from them.
#include "cuda_backend.h"
#include "masks.h"

namespace tda {

using namespace cuda;

std::vector<double> CudaBackend::statistic(const State& s, std::int64_t layer) const {
  const std::int64_t neurons = model_->config.intermediate_size;
  std::vector<double> sums(neurons);
  copy(stream_, sums.data(), CudaState::of(s).sums.data() + layer * neurons, neurons);
  stream_.wait();
  return sums;
}

double CudaBackend::gathered(const State& s, std::int64_t layer) const {
  return CudaState::of(s).layers[layer].tokens;
}

void CudaBackend::fade_statistic(State& s, double factor) const {
  CudaState& state = CudaState::of(s);
  for (CudaState::Layer& layer : state.layers) layer.tokens *= factor;
  launch(stream_, {blocks_of(state.sums.size(), kThreads), 1, 1}, kThreads, 0, scale_kernel,
         state.sums.data(), factor, state.sums.size());
}

void CudaBackend::reserve_samples(State& s, std::int64_t tokens) const {
  CudaState& state = CudaState::of(s);
  state.samples.reserve(std::ssize(state.layers) * model_->config.intermediate_size * tokens,
                        "samples of " + std::to_string(tokens) + " tokens");
  state.sample_room = tokens;
  for (CudaState::Layer& layer : state.layers) layer.sampled = 0;
}

std::vector<float> CudaBackend::samples(const State& s, std::int64_t layer) const {
  const CudaState& state = CudaState::of(s);
  const std::int64_t neurons = model_->config.intermediate_size, pitch = state.sample_room;
  const std::int64_t tokens = state.layers[layer].sampled;
  std::vector<float> by_neuron(neurons * pitch), by_token(tokens * neurons);
  copy(stream_, by_neuron.data(), state.samples.data() + layer * neurons * pitch, neurons * pitch);
  stream_.wait();
  for (std::int64_t t = 0; t < tokens; ++t)
    for (std::int64_t j = 0; j < neurons; ++j) by_token[t * neurons + j] = by_neuron[j * pitch + t];
  return by_token;
}

// ---- masks --------------------------------------------------------------------------------------

/// state.scores = R of all layers. Copies four bytes per layer back, to check that all is finite.
void CudaBackend::score(CudaState& state) const {
  const std::int64_t layers = model_->config.num_layers, neurons = model_->config.intermediate_size;
  state.scores.reserve(layers * neurons, "scores");
  state.gathered.reserve(layers, "scores");
  state.overflows.reserve(layers, "scores");
  std::vector<double> gathered;
  for (const CudaState::Layer& layer : state.layers) gathered.push_back(layer.tokens);
  std::vector<int> overflows(layers);
  copy(stream_, state.gathered.data(), gathered.data(), layers);
  copy(stream_, state.overflows.data(), overflows.data(), layers);
  launch(stream_, {blocks_of(neurons, kThreads), static_cast<unsigned>(layers), 1}, kThreads, 0,
         score_kernel, state.sums.data(), state.gathered.data(), static_cast<int>(neurons),
         state.scores.data(), state.overflows.data());
  copy(stream_, overflows.data(), state.overflows.data(), layers);
  stream_.wait();
  for (std::int64_t layer = 0; layer < layers; ++layer)
    if (overflows[layer])  // throws, naming the neuron
      relative_magnitudes(statistic(state, layer), gathered[layer]);
}

/// state.ranks of the scores.
void CudaBackend::rank(CudaState& state) const {
  const std::int64_t layers = model_->config.num_layers, neurons = model_->config.intermediate_size;
  state.ranks.reserve(layers * neurons, "ranks");
  launch(stream_, {blocks_of(neurons, kThreads), static_cast<unsigned>(layers), 1}, kThreads,
         kThreads * 4, rank_kernel, state.scores.data(), static_cast<int>(neurons),
         state.ranks.data());
}

/// Keeps scores of at least thresholds [L], or, if they are null, ranks from first_rank on. Copies
/// four bytes per layer back: how many neurons are kept.
void CudaBackend::make_masks(CudaState& state, const float* thresholds,
                             std::int64_t first_rank) const {
  count_reads(state);  // with the old masks
  const std::int64_t layers = model_->config.num_layers, neurons = model_->config.intermediate_size;
  launch(stream_, {static_cast<unsigned>(layers), 1, 1}, kThreads, kWarps * 4, mask_kernel,
         state.scores.data(), thresholds, state.ranks.data(), static_cast<int>(first_rank),
         static_cast<int>(neurons), state.lists.data(), state.counts.data());
  std::vector<int> counts(layers);
  copy(stream_, counts.data(), state.counts.data(), layers);
  stream_.wait();
  for (std::int64_t layer = 0; layer < layers; ++layer) state.layers[layer].active = counts[layer];
}

void CudaBackend::mask_at_least(State& s, std::span<const float> thresholds) const {
  CudaState& state = CudaState::of(s);
  score(state);
  state.cuts.reserve(std::ssize(thresholds), "thresholds");
  copy(stream_, state.cuts.data(), thresholds.data(), std::ssize(thresholds));
  make_masks(state, state.cuts.data(), 0);
}

void CudaBackend::mask_top_share(State& s, double active) const {
  CudaState& state = CudaState::of(s);
  const std::int64_t neurons = model_->config.intermediate_size;
  score(state);
  rank(state);
  make_masks(state, nullptr, neurons - share_count(active, neurons));
}

void CudaBackend::set_mask(State& s, std::int64_t layer, std::vector<std::int32_t> neurons) const {
  CudaState& state = CudaState::of(s);
  check_mask(layer, neurons);
  const std::int64_t size = model_->config.intermediate_size;
  const int count = static_cast<int>(neurons.size());
  copy(stream_, state.lists.data() + layer * size, neurons.data(), count);
  copy(stream_, state.counts.data() + layer, &count, 1);
  stream_.wait();
  count_reads(state);
  state.layers[layer].active = count;
}

std::vector<std::int32_t> CudaBackend::mask(const State& s, std::int64_t layer) const {
  const CudaState& state = CudaState::of(s);
  std::vector<std::int32_t> neurons(state.layers[layer].active);
  copy(stream_, neurons.data(), state.lists.data() + layer * model_->config.intermediate_size,
       std::ssize(neurons));
  stream_.wait();
  return neurons;
}

// ---- thresholds ---------------------------------------------------------------------------------

/// Bisects all layers at once on the device. Copies 24 bytes per layer back at the end.
std::vector<ThresholdSearch> CudaBackend::search_thresholds(State& s, double target) const {
  CudaState& state = CudaState::of(s);
  const ModelConfig& config = model_->config;
  const std::int64_t layers = config.num_layers, neurons = config.intermediate_size;
  const std::int64_t tokens = state.layers.front().sampled, hidden = config.hidden_size;
  std::vector<ThresholdSearch> found(layers);
  if (target == 0) return found;
  score(state);
  rank(state);

  const char* needed_for = "the search for thresholds";
  Memory<int> order, starts;
  Memory<const void*> down;
  Memory<float> sums;
  Memory<double> lengths;
  Memory<Bisection> bisections;
  order.reserve(layers * neurons, needed_for);
  starts.reserve(layers * neurons, needed_for);
  down.reserve(layers, needed_for);
  sums.reserve(2 * layers * tokens * hidden, needed_for);
  lengths.reserve(layers * tokens, needed_for);
  bisections.reserve(layers, needed_for);
  std::vector<const void*> matrices;
  for (const DeviceLayer& layer : layers_) matrices.push_back(layer.down.data());
  copy(stream_, down.data(), matrices.data(), layers);
  check(cudaMemsetAsync(sums.data(), 0, layers * tokens * hidden * sizeof(float), stream_),
        "clearing sums");

  Search a = {};
  a.samples = state.samples.data();
  a.scores = state.scores.data();
  a.order = order.data();
  a.starts = starts.data();
  a.down = down.data();
  a.sums = sums.data();
  a.lengths = lengths.data();
  a.bisections = bisections.data();
  a.layers = static_cast<int>(layers);
  a.neurons = static_cast<int>(neurons);
  a.hidden = static_cast<int>(hidden);
  a.tokens = static_cast<int>(tokens);
  a.pitch = static_cast<int>(state.sample_room);
  a.target = target;
  const auto blocks = static_cast<unsigned>(layers);
  const auto try_threshold = [&](bool whole) {
    launch(stream_, {blocks_of(hidden, kTile), blocks_of(tokens, kTile), blocks}, kThreads,
           kTilesShared,
           model_->format == WeightFormat::f32 ? dropped_kernel<float> : dropped_kernel<bf16>, a,
           whole);
    launch(stream_, {blocks, 1, 1}, kThreads, kWarps * 8, judge_kernel, a, whole);
  };
  launch(stream_, {blocks, 1, 1}, kThreads, kWarps * 4, order_kernel, a, state.ranks.data());
  try_threshold(true);
  for (std::int64_t left = neurons; left > 1; left = (left + 1) / 2) try_threshold(false);
  std::vector<Bisection> ends(layers);
  copy(stream_, ends.data(), bisections.data(), layers);
  stream_.wait();
  for (std::int64_t layer = 0; layer < layers; ++layer)
    found[layer] = {ends[layer].threshold, ends[layer].error};
  return found;
}

}  // namespace tda
