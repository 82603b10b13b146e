// The feed-forward network: dense, gathering the statistic of TDA, or sparse.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <vector>

#include "cpu/cpu_backend.h"

namespace tda {
namespace {

/// Decode: neurons per task, and the maximum number of tasks, each of which has a partial sum.
constexpr std::int64_t kTaskNeurons = 192;
constexpr std::int64_t kMostTasks = 64;
/// When partial sums are added: numbers per task, and columns at a time.
constexpr std::int64_t kTaskSums = 32768;
constexpr std::int64_t kColumns = 256;

Tasks tasks_of(std::int64_t neurons) {
  return {neurons, std::min((neurons + kTaskNeurons - 1) / kTaskNeurons, kMostTasks)};
}

}  // namespace

NextRead CpuBackend::first_ffn_read(std::int64_t layer, int thread) const {
  const Tasks tasks = tasks_of(model_->config.intermediate_size);
  return rows_of(model_->layers[layer].gate, tasks.first_of(pool_.first_task(thread, tasks.count)));
}

void CpuBackend::ffn(State& s, std::int64_t layer) const {
  CpuState& state = CpuState::of(s);
  const LayerWeights& weights = model_->layers[layer];
  const FfnMode mode = state.step.ffn;
  const float* const in = normed(state, weights.ffn_norm);
  begin_branch(state, weights.ffn_post_norm);
  if (in_bricks() || mode != FfnMode::sparse)
    sample_inputs(state, in, model_->config.hidden_size,
                  state.layers[layer].input_samples[static_cast<int>(Product::gate_up)]);
  if (in_bricks()) {
    if (state.layout.width == 1)
      ffn_bricks(state, layer, in);
    else
      ffn_bricks_panels(state, layer, in);
  } else if (mode == FfnMode::sparse) {
    ffn_sparse(state, layer, in);
  } else if (state.layout.width == 1) {
    ffn_neurons(state, layer, all_neurons_, in, state.sum, 1);
  } else {
    ffn_panels(state, layer, in);
  }
  end_branch(state, weights.ffn_post_norm);
  if (in_bricks() && layer + 1 == model_->config.num_layers) sample_head(state);
  if (mode == FfnMode::gather) gather(state, layer);
  if (in_bricks() || mode != FfnMode::sparse) sample(state, layer);
}

namespace {

/// Planes that are interleaved in memory: each neuron has `stride` bytes that hold a row of each.
struct Record {
  std::int64_t stride;
  std::vector<const std::byte**> planes;  // their first rows
};

/// Groups the planes of the three matrices by how they are interleaved.
std::vector<Record> records_of(NeuronRows& rows) {
  std::vector<Record> planes, records;
  for (Rows* r : {&rows.gate, &rows.up, &rows.down}) {
    planes.push_back({r->stride, {&r->data}});
    if (r->low) planes.push_back({r->low_stride, {&r->low}});
  }
  std::sort(planes.begin(), planes.end(),
            [](const Record& a, const Record& b) { return *a.planes[0] < *b.planes[0]; });
  for (const Record& plane : planes) {
    if (!records.empty() && *plane.planes[0] < *records.back().planes[0] + records.back().stride)
      records.back().planes.push_back(plane.planes[0]);
    else
      records.push_back(plane);
  }
  return records;
}

}  // namespace

void CpuBackend::compact_masks(State& s) const {
  CpuState& state = CpuState::of(s);
  Size bytes = 64;  // kernels may read past the last row's end
  for (std::size_t l = 0; l < state.layers.size(); ++l) {
    NeuronRows rows = rows_of(model_->layers[l]);
    for (const Record& record : records_of(rows))
      bytes = bytes + (Size(std::ssize(state.layers[l].mask)) * record.stride).rounded_up(64);
  }
  for (CpuState::Layer& layer : state.layers) layer.copy.reset();
  std::byte* to = state.copies.reserve(bytes, "the rows of TDA's masks");
  advise_huge_pages(to, bytes.value());
  for (std::size_t l = 0; l < state.layers.size(); ++l) {
    const std::vector<std::int32_t>& mask = state.layers[l].mask;
    const std::int64_t count = std::ssize(mask);
    NeuronRows rows = rows_of(model_->layers[l]);
    for (const Record& record : records_of(rows)) {
      const std::byte* const from = *record.planes[0];
      const std::int64_t stride = record.stride;
      pool_.run((count + kBlockRows - 1) / kBlockRows, [&](std::int64_t block, int) {
        for (std::int64_t i = block * kBlockRows; i < std::min(count, (block + 1) * kBlockRows);
             ++i)
          std::memcpy(to + i * stride, from + mask[i] * stride, stride);
      });
      for (const std::byte** plane : record.planes) *plane = to + (*plane - from);
      to += (count * stride + 63) / 64 * 64;
    }
    state.layers[l].copy = rows;
  }
}

void CpuBackend::ffn_sparse(CpuState& state, std::int64_t layer, const float* in) const {
  const Layout& layout = state.layout;
  const std::vector<std::int32_t>& active = state.layers[layer].mask;
  const std::int64_t n = model_->config.hidden_size;
  std::vector<float> row(n);
  for (std::int64_t t = 0; t < layout.tokens; ++t) {
    for (std::int64_t i = 0; i < n; ++i) row[i] = in[layout.at(t, n) + i * layout.width];
    const std::vector<std::int32_t> chosen =
        state.step.predictor ? predicted(state, layer, row.data()) : std::vector<std::int32_t>();
    ffn_neurons(state, layer, state.step.predictor ? chosen : active, row.data(),
                state.sum + layout.at(t, n), layout.width);
  }
}

/// x += FFN(in) of one token over the given neurons or, in a sparse step, over those of them that
/// the layer's thresholds select. The split into tasks depends only on the number of neurons, so a
/// mask of all and thresholds of 0 give the result of a dense step, bit for bit.
void CpuBackend::ffn_neurons(CpuState& state, std::int64_t layer,
                             std::span<const std::int32_t> neurons, const float* in, float* x,
                             std::int64_t x_stride) const {
  const LayerWeights& weights = model_->layers[layer];
  const std::int64_t n = model_->config.hidden_size;
  const std::int64_t count = static_cast<std::int64_t>(neurons.size());
  const Tasks tasks = tasks_of(count);
  const std::int64_t stride = (n + 63) / 64 * 64;  // whole groups, and no cache line is shared
  float* partials = state.partials.reserve(Size(kMostTasks) * stride, "partial sums");
  const void* prepared = prepare(state, weights.gate.format, in, n);
  const Activation activation = model_->config.activation;
  const TokenThresholds& thresholds = state.layers[layer].thresholds;
  const Selection selection = {thresholds.exact, thresholds.coarse, by_gate(state.estimate),
                               weights.down_lengths.data()};
  const bool select = state.step.ffn == FfnMode::sparse && thresholds.exact > 0;
  const std::optional<NeuronRows>& copy = state.layers[layer].copy;
  const bool copied = copy && state.step.ffn == FfnMode::sparse && !select;
  const NeuronRows rows_in_use = copied ? *copy : rows_of(weights);
  const std::span<const std::int32_t> row_ids =
      copied ? std::span(all_neurons_).first(neurons.size()) : neurons;
  std::atomic<std::int64_t> exact = 0, coarse = 0;
  const auto next = [&](int thread) {
    const bool more = layer + 1 < model_->config.num_layers;
    return first_read(more ? model_->layers[layer + 1].qkv : model_->head, thread);
  };

  pool_.run(tasks.count, [&](std::int64_t task, int thread) {
    const std::int64_t first = tasks.first_of(task), end = tasks.first_of(task + 1);
    const bool last = pool_.is_last_task(task, thread, tasks.count);
    const RowKernels& kernels = rows(weights.gate.format);
    const NeuronIds ids = {row_ids.data() + first, end - first, last ? 0 : count - end,
                           last ? next(thread) : NextRead()};
    float *h = state.hidden.data() + first, *y = partials + task * stride;
    if (select) {
      const SelectedCounts counts =
          kernels.ffn_selected(rows_in_use, activation, selection, ids, prepared, h, y);
      exact += counts.exact;
      coarse += counts.coarse;
    } else {
      kernels.ffn_fused(rows_in_use, activation, ids, prepared, h, y);
      exact += end - first;
    }
  });
  if (state.layout.tokens == 1 && state.step.ffn != FfnMode::gather)
    state.add_reads(state.layers[layer].reads, weights.gate, count, exact, coarse);
  const auto add_up = [&](std::int64_t first, std::int64_t end) {
    float sums[kColumns] = {};
    for (std::int64_t task = 0; task < tasks.count; ++task)
      for (std::int64_t i = first; i < end; ++i) sums[i - first] += partials[task * stride + i];
    for (std::int64_t i = first; i < end; ++i) x[i * x_stride] += sums[i - first];
  };
  const std::int64_t blocks = (n + kColumns - 1) / kColumns;
  const std::int64_t add_tasks = std::clamp<std::int64_t>(tasks.count * n / kTaskSums, 1, blocks);
  pool_.run(add_tasks, [&](std::int64_t task, int) {
    const std::int64_t end = (task + 1) * blocks / add_tasks;
    for (std::int64_t block = task * blocks / add_tasks; block < end; ++block)
      add_up(block * kColumns, std::min(n, (block + 1) * kColumns));
  });
  add_outliers(weights, neurons, state.hidden.data(), 1, x, x_stride, 1);
}

void CpuBackend::add_outliers(const LayerWeights& weights, std::span<const std::int32_t> neurons,
                              const float* h, std::int64_t h_stride, float* x,
                              std::int64_t x_stride, std::int64_t lanes) {
  for (const std::int32_t neuron : weights.outlier_neurons) {
    const auto at = std::lower_bound(neurons.begin(), neurons.end(), neuron);
    if (at == neurons.end() || *at != neuron) continue;
    const Outlier& outlier = weights.down.outliers[neuron];
    const float* const from = h + (at - neurons.begin()) * h_stride;
    float* const to = x + outlier.column * x_stride;
    for (std::int64_t lane = 0; lane < lanes; ++lane) to[lane] += from[lane] * outlier.value;
  }
}

/// Prefill: h = act(gate) * up, then x += Wᵀ_down h, dense.
void CpuBackend::ffn_panels(CpuState& state, std::int64_t layer, const float* in) const {
  const LayerWeights& weights = model_->layers[layer];
  const PanelKernels& kernels = panels(weights.gate.format);
  const std::int64_t width = state.layout.width, panels = state.layout.panels;
  const std::int64_t n = model_->config.hidden_size, neurons = model_->config.intermediate_size;
  const std::int64_t x_stride = n * width, h_stride = neurons * width;

  float* const gates =
      state.samples_gates() ? state.gates.reserve(Size(panels) * h_stride, "gates") : nullptr;

  const PreparedPanels prepared = prepare(state, state.layout, weights.gate.format, in, n);
  for_blocks(neurons, panels, [&](const Block& block, int thread) {
    const PreparedPanels b = prepared.from(block.panel);
    const Panels h = {state.hidden.data() + block.panel * h_stride + block.row * width, h_stride};
    const Panels up = {scratch(state, thread), kBlockRows * width};
    kernels.multiply(rows_of(weights.gate, block.row), block.rows, b, h, block.panels, false);
    kernels.multiply(rows_of(weights.up, block.row), block.rows, b, up, block.panels, false);
    for (std::int64_t p = 0; p < block.panels; ++p) {
      float* gate = h.data + p * h.stride;
      if (gates) {
        const std::vector<float> ones(block.rows * width, 1.0f);
        kernels_.gated(model_->config.activation, gate, ones.data(),
                       gates + (gate - state.hidden.data()), block.rows * width);
      }
      kernels_.gated(model_->config.activation, gate, up.data + p * up.stride, gate,
                     block.rows * width);
    }
  });
  const auto down = [&](const Block& block, int) {
    kernels.multiply_transposed(rows_of(weights.down), neurons, block.row, block.rows,
                                {state.hidden.data() + block.panel * h_stride, h_stride},
                                {state.sum + block.panel * x_stride + block.row * width, x_stride},
                                block.panels);
  };
  for_blocks(n, panels, down, kernels.block_columns);
  for (std::int64_t panel = 0; panel < panels; ++panel)
    add_outliers(weights, all_neurons_, state.hidden.data() + panel * h_stride, width,
                 state.sum + panel * x_stride, width, width);
}

/// Adds the step's tokens to the statistic: for each token the squares of h[j] * w[j], relative to
/// the norm of all of them.
void CpuBackend::gather(CpuState& state, std::int64_t layer) const {
  const Layout& layout = state.layout;
  const std::int64_t neurons = model_->config.intermediate_size, width = layout.width;
  const float* const of_neuron =
      estimate_weights(state.estimate, model_->layers[layer].down_lengths.data());
  const auto w = [&](std::int64_t j) { return of_neuron ? of_neuron[j] : 1.0f; };
  CpuState::Layer& statistic = state.layers[layer];

  // 1 / ||contributions||² per token; 0 for a token without any, and for lanes past the last token.
  std::vector<double> weights(layout.lanes());
  pool_.run(layout.panels, [&](std::int64_t panel, int) {
    double* weight = weights.data() + panel * width;
    const float* h = state.hidden.data() + panel * neurons * width;
    for (std::int64_t j = 0; j < neurons; ++j)
      for (std::int64_t lane = 0; lane < width; ++lane) {
        const double length = static_cast<double>(h[j * width + lane]) * w(j);
        weight[lane] += length * length;
      }
    for (std::int64_t lane = 0; lane < width; ++lane) {
      const bool counts = panel * width + lane < layout.tokens && weight[lane] > 0;
      weight[lane] = counts ? 1 / weight[lane] : 0;
    }
  });
  pool_.run((neurons + kBlockRows - 1) / kBlockRows, [&](std::int64_t block, int) {
    const std::int64_t first = block * kBlockRows, end = std::min(neurons, first + kBlockRows);
    for (std::int64_t j = first; j < end; ++j)
      for (std::int64_t panel = 0; panel < layout.panels; ++panel)
        // Only real tokens: past the last one a window may hold no keys, which makes h NaN.
        for (std::int64_t lane = 0; lane < std::min(width, layout.tokens - panel * width); ++lane) {
          const double length =
              static_cast<double>(state.hidden.data()[(panel * neurons + j) * width + lane]) * w(j);
          statistic.sums[j] += length * length * weights[panel * width + lane];
        }
  });
  statistic.tokens += static_cast<double>(layout.tokens);
}

/// Appends the tokens named by the step to the samples.
void CpuBackend::sample(CpuState& state, std::int64_t layer) const {
  sample_inputs(state, (state.samples_gates() ? state.gates : state.hidden).data(),
                model_->config.intermediate_size, state.layers[layer].samples);
}

}  // namespace tda
