// The feed-forward network: dense, gathering the statistic of TDA, or sparse.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <vector>

#include "cpu/cpu_backend.h"
#include "sparsity/predictor.h"

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
    const float* const ordered = in_order(state, weights.gate_up, in);
    if (state.layout.width == 1)
      ffn_bricks(state, layer, ordered);
    else
      ffn_bricks_panels(state, layer, ordered);
  } else if (state.layout.width == 1) {
    ffn_decode(state, layer, in);
  } else if (mode == FfnMode::sparse) {
    ffn_sparse(state, layer, in);
  } else {
    ffn_panels(state, layer, in);
  }
  end_branch(state, weights.ffn_post_norm);
  if (in_bricks() && layer + 1 == model_->config.num_layers) sample_head(state);
  if (mode == FfnMode::gather) gather(state, layer);
  if (in_bricks() || mode != FfnMode::sparse) sample(state, layer);
}

namespace {

/// Matrices whose rows take turns in memory: each neuron has `stride` bytes that hold a row of each.
struct Record {
  std::int64_t stride;
  std::vector<const std::byte**> matrices;  // their first rows
};

std::vector<Record> records_of(NeuronRows& rows) {
  std::vector<Record> records;
  for (Rows* r : {&rows.gate, &rows.up, &rows.down}) {
    const bool in_turn = !records.empty() && r->data > *records.back().matrices[0] &&
                         r->data < *records.back().matrices[0] + records.back().stride;
    if (in_turn)
      records.back().matrices.push_back(&r->data);
    else
      records.push_back({r->stride, {&r->data}});
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
      const std::byte* const from = *record.matrices[0];
      const std::int64_t stride = record.stride;
      pool_.run((count + kBlockRows - 1) / kBlockRows, [&](std::int64_t block, int) {
        for (std::int64_t i = block * kBlockRows; i < std::min(count, (block + 1) * kBlockRows);
             ++i)
          std::memcpy(to + i * stride, from + mask[i] * stride, stride);
      });
      for (const std::byte** data : record.matrices) *data = to + (*data - from);
      to += (count * stride + 63) / 64 * 64;
    }
    state.layers[l].copy = rows;
  }
}

/// Those that a token may use; a predictor's choice is kept in `chosen`.
std::span<const std::int32_t> CpuBackend::neurons_of(CpuState& state, std::int64_t layer,
                                                     const float* in,
                                                     std::vector<std::int32_t>& chosen) const {
  if (state.step.ffn != FfnMode::sparse) return all_neurons_;
  if (!state.step.predictor) return state.layers[layer].mask;
  chosen = predicted(state, layer, in);
  return chosen;
}

void CpuBackend::ffn_decode(CpuState& state, std::int64_t layer, const float* in) const {
  const std::int64_t n = model_->config.hidden_size;
  std::array<std::vector<std::int32_t>, Vectors::kMost> chosen;
  std::vector<FfnToken> tokens;
  for (std::int64_t t = 0; t < state.layout.tokens; ++t) {
    CpuState& own = state.sequence(t);
    const float* const x = in + t * n;
    tokens.push_back({own, neurons_of(own, layer, x, chosen[t]), x, state.sum + t * n});
    if (own.step.ffn == FfnMode::sparse && own.step.predictor)
      own.layers[layer].reads.bytes += own.step.predictor->layers[layer].bytes();
  }
  ffn_neurons(state, layer, tokens);
}

/// A sparse step of several tokens of one sequence.
void CpuBackend::ffn_sparse(CpuState& state, std::int64_t layer, const float* in) const {
  const Layout& layout = state.layout;
  const std::int64_t n = model_->config.hidden_size;
  std::vector<float> row(n);
  for (std::int64_t t = 0; t < layout.tokens; ++t) {
    for (std::int64_t i = 0; i < n; ++i) row[i] = in[layout.at(t, n) + i * layout.width];
    std::vector<std::int32_t> chosen;
    const FfnToken token = {state, neurons_of(state, layer, row.data(), chosen), row.data(),
                            state.sum + layout.at(t, n), layout.width};
    ffn_neurons(state, layer, {&token, 1});
  }
}

/// How a token's neurons are computed.
struct Neurons {
  Tasks tasks;
  NeuronRows rows;
  const std::int32_t* ids;  // in `rows`
  Selection selection;
  bool select, copied;
  const void* x;
  float *h, *partials;
  std::atomic<std::int64_t> used = 0;

  /// Whether it takes all rows, in place: such tokens read them together.
  bool dense(std::span<const std::int32_t> all) const {
    return !select && !copied && ids == all.data();
  }
};

/// Floats of a task's sums: whole groups, and no cache line is shared.
std::int64_t CpuBackend::partial_size() const {
  return (model_->config.hidden_size + 63) / 64 * 64;
}

/// Prepares the tokens' x and memory for their results.
void CpuBackend::plan_neurons(CpuState& state, std::int64_t layer, std::span<const FfnToken> tokens,
                              EachVector<Neurons>& each) const {
  const LayerWeights& weights = model_->layers[layer];
  const std::int64_t n = model_->config.hidden_size;
  const std::int64_t count = std::ssize(tokens), size = kMostTasks * partial_size();
  float* const partials = state.partials.reserve(Size(count) * size, "partial sums");
  const auto prepared = prepare_each(state, count, weights.gate.format, tokens[0].in, n);
  for (std::int64_t t = 0; t < count; ++t) {
    const FfnToken& token = tokens[t];
    const CpuState::Layer& own = token.sequence.layers[layer];
    const bool sparse = token.sequence.step.ffn == FfnMode::sparse;
    Neurons& its = each[t];
    its.tasks = tasks_of(std::ssize(token.neurons));
    its.selection = {own.threshold, by_gate(token.sequence.estimate), weights.down_lengths.data()};
    its.select = sparse && own.threshold > 0;
    its.copied = own.copy && sparse && !its.select;
    its.rows = its.copied ? *own.copy : rows_of(weights);
    its.ids = its.copied ? all_neurons_.data() : token.neurons.data();
    its.x = prepared[t];
    its.h = state.hidden.data() + t * model_->config.intermediate_size;
    its.partials = partials + t * size;
  }
}

/// x += FFN(in) of each token over its neurons or, in a sparse step, over those of them that the
/// layer's thresholds select. The split into tasks depends only on the number of neurons, so a mask
/// of all and thresholds of 0 give the result of a dense step, bit for bit. Tokens of a batch read
/// the rows of a task one after the other, while these are in the cache.
void CpuBackend::ffn_neurons(CpuState& state, std::int64_t layer,
                             std::span<const FfnToken> tokens) const {
  const LayerWeights& weights = model_->layers[layer];
  const std::int64_t count = std::ssize(tokens), stride = partial_size();
  EachVector<Neurons> each;
  plan_neurons(state, layer, tokens, each);
  std::int64_t most_tasks = 0, dense = 0;
  for (std::int64_t t = 0; t < count; ++t) {
    most_tasks = std::max(most_tasks, each[t].tasks.count);
    dense += each[t].dense(all_neurons_);
  }
  const auto next = [&](int thread) {
    const bool more = layer + 1 < model_->config.num_layers;
    return first_read(more ? model_->layers[layer + 1].qkv : model_->head, thread);
  };

  const RowKernels& kernels = rows(weights.gate.format);
  const Activation activation = model_->config.activation;
  pool_.run(most_tasks, [&](std::int64_t task, int thread) {
    EachVector<const void*> x;
    EachVector<float*> h, y;
    std::int64_t together = 0;
    for (std::int64_t t = 0; t < count; ++t) {
      Neurons& its = each[t];
      if (task >= its.tasks.count) continue;
      const std::int64_t first = its.tasks.first_of(task), end = its.tasks.first_of(task + 1);
      const bool last = count == 1 && pool_.is_last_task(task, thread, its.tasks.count);
      const NeuronIds ids = {its.ids + first, end - first, last ? 0 : its.tasks.items - end,
                             last ? next(thread) : NextRead()};
      float* const sums = its.partials + task * stride;
      if (its.select) {
        its.used += kernels.ffn_selected(its.rows, activation, its.selection, ids, its.x,
                                         its.h + first, sums);
        continue;
      }
      its.used += end - first;
      if (dense < 2 || !its.dense(all_neurons_)) {
        kernels.ffn_fused(its.rows, activation, ids, its.x, its.h + first, sums);
        continue;
      }
      x[together] = its.x;
      h[together] = its.h + first;
      y[together++] = sums;
      if (together == dense)
        kernels.ffn_each(its.rows, activation, ids, {dense, x.data(), y.data(), h.data()});
    }
  });
  for (std::int64_t t = 0; t < count; ++t) {
    CpuState& own = tokens[t].sequence;
    if (state.layout.width == 1 && own.step.ffn != FfnMode::gather)
      own.add_reads(own.layers[layer].reads, weights.gate, each[t].tasks.items, each[t].used);
  }

  add_partials(tokens, each, most_tasks);
  for (std::int64_t t = 0; t < count; ++t)
    add_outliers(weights, tokens[t].neurons, each[t].h, 1, tokens[t].x, tokens[t].stride, 1);
}

/// x += the sums of all tasks, in their order.
void CpuBackend::add_partials(std::span<const FfnToken> tokens, const EachVector<Neurons>& each,
                              std::int64_t most_tasks) const {
  const std::int64_t n = model_->config.hidden_size, stride = partial_size();
  const std::int64_t count = std::ssize(tokens);
  const auto add_up = [&](std::int64_t t, std::int64_t first, std::int64_t end) {
    float sums[kColumns] = {};
    for (std::int64_t task = 0; task < each[t].tasks.count; ++task)
      for (std::int64_t i = first; i < end; ++i)
        sums[i - first] += each[t].partials[task * stride + i];
    for (std::int64_t i = first; i < end; ++i) tokens[t].x[i * tokens[t].stride] += sums[i - first];
  };
  const std::int64_t blocks = (n + kColumns - 1) / kColumns;
  const std::int64_t add_tasks =
      std::clamp<std::int64_t>(count * most_tasks * n / kTaskSums, 1, count * blocks);
  pool_.run(add_tasks, [&](std::int64_t task, int) {
    const std::int64_t end = (task + 1) * count * blocks / add_tasks;
    for (std::int64_t i = task * count * blocks / add_tasks; i < end; ++i) {
      const std::int64_t first = i % blocks * kColumns;
      add_up(i / blocks, first, std::min(n, first + kColumns));
    }
  });
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

  const PreparedPanels prepared = prepare(state, state.layout, weights.gate, in);
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
