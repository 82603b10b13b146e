// Products with weights in bricks: precision by input.
#include "cpu/bricks.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/cpu_backend.h"

namespace tda {
namespace {

/// Strips whose sums a task keeps at a time, and these times tokens.
constexpr std::int64_t kStripsAtOnce = 32, kMostSums = 128;
/// Blocks of neurons whose part of the down projection is summed apart: at most so many parts,
/// whatever the number of threads, so that the result does not depend on it.
constexpr std::int64_t kMostParts = 32;
constexpr std::int64_t kLeastPartBlocks = 4;
/// Columns of the parts that are added up at a time.
constexpr std::int64_t kSumColumns = 256;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// Sums over the high parts and the rests of some strips and tokens.
struct Sums {
  alignas(64) float high[kMostSums * kStripRows];
  alignas(64) float rests[kMostSums * kStripRows];

  void clear(std::int64_t strips) {
    std::memset(high, 0, static_cast<std::size_t>(strips * kStripRows) * sizeof(float));
    std::memset(rests, 0, static_cast<std::size_t>(strips * kStripRows) * sizeof(float));
  }
};

/// y[r] = the products of the strips' rows, without outliers. high, rests, y: [strips * 64]
void finish(const Bricks& w, Span strips, const float* high, const float* rests, float* y) {
  const std::int64_t first = strips.first * kStripRows, count = strips.count() * kStripRows;
  if (!w.has_rests())
    for (std::int64_t r = 0; r < count; ++r) y[r] = w.steps[first + r] * high[r];
  else
    for (std::int64_t r = 0; r < count; ++r)
      y[r] = w.steps[first + r] * high[r] + w.rest_steps[first + r] * rests[r];
}

void add_strip_outliers(const Bricks& w, Span strips, const float* x, float* y) {
  for (std::int64_t k = strips.first * kStripOutliers; k < strips.end * kStripOutliers; ++k) {
    const StripOutlier& outlier = w.outliers[k];
    if (outlier.value != 0)
      y[outlier.row - strips.first * kStripRows] += outlier.value * x[outlier.input];
  }
}

/// BrickKernels::choose, if there are rests to choose.
std::int64_t choose(const BrickKernels& kernels, const Bricks& w, const float* x, Span inputs,
                    float threshold, RestInputs* out) {
  return !w.has_rests() ? 0 : kernels.choose(x, w.rest_lengths, inputs, threshold, out);
}

/// Prefetches the rests of the first chosen inputs, while the high parts are read: add_rests itself
/// prefetches each next ones while it works.
void prefetch_rests(const Bricks& w, Span strips, const RestInputs* x, std::int64_t chosen) {
  const std::int64_t first = strips.first * kStripRows / 2, end = strips.end * kStripRows / 2;
  for (std::int64_t k = 0; k < std::min(chosen, kBlockInputs); ++k)
    for (std::int64_t at = first; at < end; at += 64) {
      __builtin_prefetch(w.rest(x->ids[k]) + at, 0, 2);
      asm volatile("");  // or GCC 12 takes this function for one without effect
    }
}

/// results[t] = the products of some strips with each x. strips: at most at_once(tokens); results[t]:
/// [strips * 64]
void multiply_strips(const BrickKernels& kernels, const Bricks& w, Span strips,
                     std::span<const BrickInputs> inputs, float* const* results) {
  const std::int64_t count = std::ssize(inputs), size = strips.count() * kStripRows;
  Sums all;
  all.clear(count * strips.count());
  EachVector<const HighInputs*> x;
  EachVector<float*> sums;
  for (std::int64_t t = 0; t < count; ++t) {
    x[t] = inputs[t].high;
    sums[t] = all.high + t * size;
    prefetch_rests(w, strips, inputs[t].rests, inputs[t].chosen);
  }
  kernels.add_high(w, strips, {0, w.blocks}, {count, x.data(), sums.data()});
  for (std::int64_t t = 0; t < count; ++t) {
    kernels.add_rests(w, strips, inputs[t].rests, inputs[t].chosen, all.rests + t * size);
    finish(w, strips, sums[t], all.rests + t * size, results[t]);
    add_strip_outliers(w, strips, inputs[t].x, results[t]);
  }
}

/// How many strips' sums of so many tokens a task keeps at a time.
std::int64_t at_once(std::int64_t tokens) { return std::min(kStripsAtOnce, kMostSums / tokens); }

/// Calls body(strips) for at most `most` at a time.
template <class Body>
void for_strips(Span strips, std::int64_t most, const Body& body) {
  for (std::int64_t first = strips.first; first < strips.end; first += most)
    body(Span{first, std::min(strips.end, first + most)});
}

/// out[t] = down times h[t] of the neurons in some blocks, without outliers. Adds to exact[t] how many
/// of them were read at 8 bits; without rests, none. h[t]: of all neurons; out[t]: [down.strips * 64]
void project_down(const BrickKernels& kernels, const Bricks& down, Span blocks, std::int64_t tokens,
                  const EachVector<const float*>& h, const EachVector<float>& thresholds,
                  const EachVector<float*>& out, std::atomic<std::int64_t>* exact) {
  const Span neurons = {blocks.first * kBlockInputs,
                        std::min(down.cols, blocks.end * kBlockInputs)};
  std::vector<HighInputs> high(blocks.count() * tokens);
  std::vector<RestInputs> rests(blocks.count() * tokens);
  EachVector<const HighInputs*> x;
  EachVector<std::int64_t> chosen;
  for (std::int64_t t = 0; t < tokens; ++t) {
    x[t] = high.data() + t * blocks.count();
    kernels.prepare(h[t] + neurons.first, blocks.count(), high.data() + t * blocks.count());
    chosen[t] =
        choose(kernels, down, h[t], neurons, thresholds[t], rests.data() + t * blocks.count());
    exact[t] += chosen[t];
  }
  for_strips({0, down.strips}, at_once(tokens), [&](Span strips) {
    const std::int64_t size = strips.count() * kStripRows;
    Sums all;
    all.clear(tokens * strips.count());
    const EachVector<float*> sums = each_vector(all.high, tokens, size);
    for (std::int64_t t = 0; t < tokens; ++t)
      prefetch_rests(down, strips, rests.data() + t * blocks.count(), chosen[t]);
    kernels.add_high(down, strips, blocks, {tokens, x.data(), sums.data()});
    for (std::int64_t t = 0; t < tokens; ++t) {
      kernels.add_rests(down, strips, rests.data() + t * blocks.count(), chosen[t],
                        all.rests + t * size);
      finish(down, strips, sums[t], all.rests + t * size, out[t] + strips.first * kStripRows);
    }
  });
}

}  // namespace

EachVector<float> CpuBackend::input_thresholds(const CpuState& state, std::int64_t layer,
                                               Product product) const {
  EachVector<float> thresholds = {};
  for (std::int64_t t = 0; t < state.layout.tokens; ++t) {
    const CpuState& own = state.sequence(t);
    if (own.step.ffn == FfnMode::sparse)
      thresholds[t] = own.layers[layer].inputs.of[static_cast<int>(product)];
  }
  return thresholds;
}

EachVector<BrickInputs> CpuBackend::brick_inputs(CpuState& state, std::int64_t tokens,
                                                 const Bricks& w, const float* x,
                                                 const EachVector<float>& thresholds) const {
  const std::int64_t whole = w.blocks * kBlockInputs;
  float* const padded =
      whole > w.cols ? state.padded.reserve(Size(tokens) * whole, "padded vectors") : nullptr;
  HighInputs* const high = state.high.reserve(Size(tokens) * w.blocks, "quantised vectors");
  RestInputs* const rests = state.rests.reserve(Size(tokens) * w.blocks, "vectors' rests");
  EachVector<BrickInputs> inputs = {};
  pool_.run(tokens, [&](std::int64_t t, int) {
    const float* own = x + t * w.cols;
    if (padded) {
      float* const to = padded + t * whole;
      std::copy_n(own, w.cols, to);
      std::fill(to + w.cols, to + whole, 0.0f);
      own = to;
    }
    HighInputs* const its_high = high + t * w.blocks;
    RestInputs* const its_rests = rests + t * w.blocks;
    kernels_.bricks->prepare(own, w.blocks, its_high);
    inputs[t] = {own, its_high, its_rests,
                 choose(*kernels_.bricks, w, own, {0, w.cols}, thresholds[t], its_rests)};
  });
  return inputs;
}

EachVector<std::int64_t> CpuBackend::multiply_bricks(CpuState& state, std::int64_t tokens,
                                                     const Matrix& matrix, const float* x,
                                                     const EachVector<float>& thresholds,
                                                     const EachVector<float*>& y, bool add) const {
  const Bricks w = matrix.bricks();
  const auto inputs = brick_inputs(state, tokens, w, x, thresholds);
  // The fewer tasks, the longer the runs of rests.
  const std::int64_t most = at_once(tokens);
  const std::int64_t tasks = std::min(w.strips, threads() * ceil_div(w.strips, threads() * most));
  pool_.run(tasks, [&](std::int64_t task, int) {
    for_strips({task * w.strips / tasks, (task + 1) * w.strips / tasks}, most, [&](Span strips) {
      const std::int64_t size = strips.count() * kStripRows;
      float all[kMostSums * kStripRows];
      const EachVector<float*> results = each_vector(all, tokens, size);
      multiply_strips(*kernels_.bricks, w, strips, std::span(inputs).first(tokens), results.data());
      const std::int64_t first = strips.first * kStripRows;
      const std::int64_t rows = std::min(strips.end * kStripRows, w.rows) - first;
      for (std::int64_t t = 0; t < tokens; ++t)
        for (std::int64_t r = 0; r < rows; ++r)
          y[t][first + r] = results[t][r] + (add ? y[t][first + r] : 0.0f);
    });
  });
  EachVector<std::int64_t> bytes = {};
  for (std::int64_t t = 0; t < tokens; ++t)
    bytes[t] = w.high_bytes() + inputs[t].chosen * w.rest_bytes();
  return bytes;
}

/// x += W_down h, where h = act(gate) * up: a block of 32 neurons is a strip of gate_up and a block
/// of down's inputs.
void CpuBackend::ffn_bricks(CpuState& state, std::int64_t layer, const float* in) const {
  const LayerWeights& weights = model_->layers[layer];
  const Bricks gate_up = weights.gate_up.bricks(), down = weights.down.bricks();
  const std::int64_t tokens = state.layout.tokens;
  const auto inputs =
      brick_inputs(state, tokens, gate_up, in, input_thresholds(state, layer, Product::gate_up));
  const auto thresholds = input_thresholds(state, layer, Product::down);
  const std::int64_t strips = gate_up.strips;
  const std::int64_t part_strips = std::max(kLeastPartBlocks, ceil_div(strips, kMostParts));
  const std::int64_t parts = ceil_div(strips, part_strips);
  const std::int64_t stride = down.strips * kStripRows;
  float* const partials = state.partials.reserve(Size(tokens) * parts * stride, "partial sums");
  const std::int64_t h_stride = strips * kBlockInputs;
  EachVector<const float*> hidden = {};
  for (std::int64_t t = 0; t < tokens; ++t) hidden[t] = state.hidden.data() + t * h_stride;
  std::array<std::atomic<std::int64_t>, Vectors::kMost> exact = {};
  const std::int64_t tasks = std::min<std::int64_t>(parts, threads());
  pool_.run(tasks, [&](std::int64_t task, int) {
    const std::int64_t first = task * parts / tasks, end = (task + 1) * parts / tasks;
    const Span own = {first * part_strips, std::min(strips, end * part_strips)};
    for_strips(own, at_once(tokens), [&](Span some) {
      const std::int64_t size = some.count() * kStripRows;
      float all[kMostSums * kStripRows];
      const EachVector<float*> results = each_vector(all, tokens, size);
      multiply_strips(*kernels_.bricks, gate_up, some, std::span(inputs).first(tokens),
                      results.data());
      for (std::int64_t t = 0; t < tokens; ++t)
        for (std::int64_t s = some.first; s < some.end; ++s) {
          const float* const gate = results[t] + (s - some.first) * kStripRows;
          kernels_.gated(model_->config.activation, gate, gate + kBlockInputs,
                         state.hidden.data() + t * h_stride + s * kBlockInputs, kBlockInputs);
        }
    });
    for (std::int64_t part = first; part < end; ++part)
      project_down(*kernels_.bricks, down,
                   {part * part_strips, std::min(strips, (part + 1) * part_strips)}, tokens, hidden,
                   thresholds, each_vector(partials + part * stride, tokens, parts * stride),
                   exact.data());
  });

  for (std::int64_t t = 0; t < tokens; ++t) {
    float* const out = state.sum + t * down.rows;
    for (std::int64_t first = 0; first < down.rows; first += kSumColumns) {
      const std::int64_t columns = std::min(kSumColumns, down.rows - first);
      float sums[kSumColumns] = {};
      for (std::int64_t part = 0; part < parts; ++part) {
        const float* const own = partials + (t * parts + part) * stride + first;
        for (std::int64_t i = 0; i < columns; ++i) sums[i] += own[i];
      }
      for (std::int64_t i = 0; i < columns; ++i) out[first + i] += sums[i];
    }
    add_strip_outliers(down, {0, down.strips}, hidden[t], out);
    CpuState& own = state.sequence(t);
    if (own.step.ffn == FfnMode::gather) continue;
    FfnReads& reads = own.layers[layer].reads;
    reads.bytes += gate_up.high_bytes() + inputs[t].chosen * gate_up.rest_bytes() +
                   down.high_bytes() + exact[t] * down.rest_bytes();
    const std::int64_t whole = down.has_rests() ? exact[t].load() : down.cols;  // all there is
    reads.exact += whole;
    reads.coarse += down.cols - whole;
  }
}

/// Prefill: all rests count.
void CpuBackend::ffn_bricks_panels(CpuState& state, std::int64_t layer, const float* in) const {
  const LayerWeights& weights = model_->layers[layer];
  const Bricks gate_up = weights.gate_up.bricks(), down = weights.down.bricks();
  const std::int64_t width = state.layout.width, panels = state.layout.panels;
  const std::int64_t h_stride = down.cols * width;
  const PreparedPanels b = prepare(state, state.layout, weights.gate_up, in);
  for_blocks(
      gate_up.rows, panels,
      [&](const Block& block, int thread) {
        const Panels out = {scratch(state, thread), kStripRows * width};
        const std::int64_t strip = block.row / kStripRows, neuron = strip * kBlockInputs;
        kernels_.multiply_bricks(gate_up, strip, b.from(block.panel), out, block.panels, false);
        const std::int64_t neurons = std::min(kBlockInputs, down.cols - neuron);
        for (std::int64_t p = 0; p < block.panels; ++p) {
          const float* const gate = out.data + p * out.stride;
          kernels_.gated(model_->config.activation, gate, gate + kBlockInputs * width,
                         state.hidden.data() + (block.panel + p) * h_stride + neuron * width,
                         neurons * width);
        }
      },
      kStripRows);
  multiply_bricks_panels(state, state.layout, weights.down, state.hidden.data(), state.sum, true);
}

void CpuBackend::multiply_bricks_panels(CpuState& state, const Layout& layout, const Matrix& matrix,
                                        const float* in, float* out, bool add) const {
  const Bricks w = matrix.bricks();
  const PreparedPanels b = prepare(state, layout, matrix, in);
  const std::int64_t out_stride = w.rows * layout.width;
  for_blocks(
      w.rows, layout.panels,
      [&](const Block& block, int) {
        kernels_.multiply_bricks(
            w, block.row / kStripRows, b.from(block.panel),
            {out + block.panel * out_stride + block.row * layout.width, out_stride}, block.panels,
            add);
      },
      kStripRows);
}

// ---- thresholds ---------------------------------------------------------------------------------

void CpuBackend::sample_inputs(CpuState& state, const float* x, std::int64_t n,
                               std::vector<float>& to) const {
  const Layout& layout = state.layout;
  for (const std::int64_t t : state.step.samples) {
    to.resize(to.size() + n);
    float* const row = to.data() + to.size() - n;
    for (std::int64_t i = 0; i < n; ++i) row[i] = x[layout.at(t, n) + i * layout.width];
  }
}

/// Of a step that computes no logits, too.
void CpuBackend::sample_head(CpuState& state) const {
  const std::int64_t n = model_->config.hidden_size;
  const std::size_t first = state.head_samples.size();
  sample_inputs(state, state.x.data(), n, state.head_samples);
  for (std::size_t at = first; at < state.head_samples.size(); at += n) {
    float* const x = state.head_samples.data() + at;
    kernels_.rms_norm(x, model_->final_norm.data(), static_cast<float>(model_->config.rms_norm_eps),
                      n, x);
  }
}

namespace {

std::vector<float> contributions(const Matrix& matrix, std::vector<float> x) {
  const Bricks w = matrix.bricks();
  if (!w.has_rests()) return {};
  for (std::size_t i = 0; i < x.size(); ++i)
    x[i] = std::abs(x[i]) * w.rest_lengths[i % static_cast<std::size_t>(w.cols)];
  return x;
}

}  // namespace

std::vector<float> CpuBackend::input_contributions(const State& state, std::int64_t layer,
                                                   Product product) const {
  const LayerWeights& weights = model_->layers[layer];
  const Matrix* const matrices[kProducts] = {&weights.qkv, &weights.output, &weights.gate_up,
                                             &weights.down};
  const int i = static_cast<int>(product);
  const CpuState::Layer& own = CpuState::of(state).layers[layer];
  return contributions(*matrices[i], product == Product::down ? own.samples : own.input_samples[i]);
}

std::vector<float> CpuBackend::head_contributions(const State& state) const {
  return contributions(model_->head, CpuState::of(state).head_samples);
}

void CpuBackend::set_input_thresholds(State& state, std::int64_t layer,
                                      const InputThresholds& thresholds) const {
  CpuState::of(state).layers[layer].inputs = thresholds;
}

std::int64_t CpuBackend::attention_bytes(const State& state) const {
  return CpuState::of(state).attention_bytes;
}

}  // namespace tda
