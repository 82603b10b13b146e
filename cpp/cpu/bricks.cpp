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

/// Strips whose sums a task keeps at a time.
constexpr std::int64_t kStripsAtOnce = 32;
/// Blocks of neurons whose part of the down projection is summed apart: at most so many parts,
/// whatever the number of threads, so that the result does not depend on it.
constexpr std::int64_t kMostParts = 32;
constexpr std::int64_t kLeastPartBlocks = 4;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// Sums over the high parts and the rests of some strips.
struct Sums {
  alignas(64) float high[kStripsAtOnce * kStripRows];
  alignas(64) float rests[kStripsAtOnce * kStripRows];

  void clear(std::int64_t strips) {
    std::memset(high, 0, static_cast<std::size_t>(strips * kStripRows) * sizeof(float));
    std::memset(rests, 0, static_cast<std::size_t>(strips * kStripRows) * sizeof(float));
  }
};

/// y[r] = the products of the strips' rows, without outliers. y: [strips * 64]
void finish(const Bricks& w, Span strips, const Sums& sums, float* y) {
  const std::int64_t first = strips.first * kStripRows, count = strips.count() * kStripRows;
  if (!w.has_rests())
    for (std::int64_t r = 0; r < count; ++r) y[r] = w.steps[first + r] * sums.high[r];
  else
    for (std::int64_t r = 0; r < count; ++r)
      y[r] = w.steps[first + r] * sums.high[r] + w.rest_steps[first + r] * sums.rests[r];
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

/// results = the products of at most kStripsAtOnce strips with x. results: [strips * 64]
void multiply_strips(const BrickKernels& kernels, const Bricks& w, Span strips,
                     const BrickInputs& inputs, float* results) {
  Sums sums;
  sums.clear(strips.count());
  kernels.add_high(w, strips, {0, w.blocks}, inputs.high, sums.high);
  kernels.add_rests(w, strips, inputs.rests, inputs.chosen, sums.rests);
  finish(w, strips, sums, results);
  add_strip_outliers(w, strips, inputs.x, results);
}

/// Calls body(strips) for at most kStripsAtOnce at a time.
template <class Body>
void for_strips(Span strips, const Body& body) {
  for (std::int64_t first = strips.first; first < strips.end; first += kStripsAtOnce)
    body(Span{first, std::min(strips.end, first + kStripsAtOnce)});
}

/// out = down times h of the neurons in some blocks, without outliers. Returns how many of them were
/// read at 8 bits; without rests, 0. h: of all neurons; out: [down.strips * 64]
std::int64_t project_down(const BrickKernels& kernels, const Bricks& down, Span blocks,
                          const float* h, float threshold, float* out) {
  const Span neurons = {blocks.first * kBlockInputs,
                        std::min(down.cols, blocks.end * kBlockInputs)};
  std::vector<HighInputs> high(blocks.count());
  std::vector<RestInputs> rests(blocks.count());
  kernels.prepare(h + neurons.first, blocks.count(), high.data());
  const std::int64_t count = choose(kernels, down, h, neurons, threshold, rests.data());
  for_strips({0, down.strips}, [&](Span strips) {
    Sums sums;
    sums.clear(strips.count());
    kernels.add_high(down, strips, blocks, high.data(), sums.high);
    kernels.add_rests(down, strips, rests.data(), count, sums.rests);
    finish(down, strips, sums, out + strips.first * kStripRows);
  });
  return count;
}

}  // namespace

BrickInputs CpuBackend::brick_inputs(CpuState& state, const Bricks& w, const float* x,
                                     float threshold) const {
  const std::int64_t whole = w.blocks * kBlockInputs;
  if (whole > w.cols) {
    float* const padded = state.padded.reserve(whole, "a padded vector");
    std::copy_n(x, w.cols, padded);
    std::fill(padded + w.cols, padded + whole, 0.0f);
    x = padded;
  }
  HighInputs* const high = state.high.reserve(w.blocks, "a quantised vector");
  RestInputs* const rests = state.rests.reserve(w.blocks, "a vector's rests");
  kernels_.bricks->prepare(x, w.blocks, high);
  return {x, high, rests, choose(*kernels_.bricks, w, x, {0, w.cols}, threshold, rests)};
}

std::int64_t CpuBackend::multiply_bricks(CpuState& state, const Matrix& matrix, const float* x,
                                         float threshold, float* y, bool add) const {
  const Bricks w = matrix.bricks();
  const BrickInputs inputs = brick_inputs(state, w, x, threshold);
  // The fewer tasks, the longer the runs of rests.
  const std::int64_t tasks =
      std::min(w.strips, threads() * ceil_div(w.strips, threads() * kStripsAtOnce));
  pool_.run(tasks, [&](std::int64_t task, int) {
    for_strips({task * w.strips / tasks, (task + 1) * w.strips / tasks}, [&](Span strips) {
      float results[kStripsAtOnce * kStripRows];
      multiply_strips(*kernels_.bricks, w, strips, inputs, results);
      float* const out = y + strips.first * kStripRows;
      const std::int64_t rows =
          std::min(strips.end * kStripRows, w.rows) - strips.first * kStripRows;
      for (std::int64_t r = 0; r < rows; ++r) out[r] = results[r] + (add ? out[r] : 0.0f);
    });
  });
  return w.high_bytes() + inputs.chosen * w.rest_bytes();
}

/// x += W_down h, where h = act(gate) * up: a block of 32 neurons is a strip of gate_up and a block
/// of down's inputs.
void CpuBackend::ffn_bricks(CpuState& state, std::int64_t layer, const float* in) const {
  const LayerWeights& weights = model_->layers[layer];
  const Bricks gate_up = weights.gate_up.bricks(), down = weights.down.bricks();
  const bool by_input = state.step.ffn == FfnMode::sparse;
  const InputThresholds thresholds = by_input ? state.layers[layer].inputs : InputThresholds{};
  const BrickInputs inputs =
      brick_inputs(state, gate_up, in, thresholds.of[static_cast<int>(Product::gate_up)]);
  const std::int64_t strips = gate_up.strips;
  const std::int64_t part_strips = std::max(kLeastPartBlocks, ceil_div(strips, kMostParts));
  const std::int64_t parts = ceil_div(strips, part_strips);
  const std::int64_t stride = down.strips * kStripRows;
  float* const partials = state.partials.reserve(Size(parts) * stride, "partial sums");
  float* const hidden = state.hidden.data();
  std::atomic<std::int64_t> exact = 0;
  const std::int64_t tasks = std::min<std::int64_t>(parts, threads());
  pool_.run(tasks, [&](std::int64_t task, int) {
    const std::int64_t first = task * parts / tasks, end = (task + 1) * parts / tasks;
    for_strips({first * part_strips, std::min(strips, end * part_strips)}, [&](Span some) {
      float results[kStripsAtOnce * kStripRows];
      multiply_strips(*kernels_.bricks, gate_up, some, inputs, results);
      for (std::int64_t s = some.first; s < some.end; ++s) {
        const float* const gate = results + (s - some.first) * kStripRows;
        kernels_.gated(model_->config.activation, gate, gate + kBlockInputs,
                       hidden + s * kBlockInputs, kBlockInputs);
      }
    });
    for (std::int64_t part = first; part < end; ++part)
      exact += project_down(
          *kernels_.bricks, down, {part * part_strips, std::min(strips, (part + 1) * part_strips)},
          hidden, thresholds.of[static_cast<int>(Product::down)], partials + part * stride);
  });

  float* const out = state.sum;
  for (std::int64_t i = 0; i < down.rows; ++i) {
    float sum = 0;
    for (std::int64_t part = 0; part < parts; ++part) sum += partials[part * stride + i];
    out[i] += sum;
  }
  add_strip_outliers(down, {0, down.strips}, hidden, out);
  if (state.step.ffn == FfnMode::gather) return;
  FfnReads& reads = state.layers[layer].reads;
  reads.bytes += gate_up.high_bytes() + inputs.chosen * gate_up.rest_bytes() + down.high_bytes() +
                 exact * down.rest_bytes();
  if (!down.has_rests()) exact = down.cols;  // all that there is of them
  reads.exact += exact;
  reads.coarse += down.cols - exact;
}

/// Prefill: all rests count.
void CpuBackend::ffn_bricks_panels(CpuState& state, std::int64_t layer, const float* in) const {
  const LayerWeights& weights = model_->layers[layer];
  const Bricks gate_up = weights.gate_up.bricks(), down = weights.down.bricks();
  const std::int64_t width = state.layout.width, panels = state.layout.panels;
  const std::int64_t x_stride = gate_up.cols * width, h_stride = down.cols * width;
  for_blocks(
      gate_up.rows, panels,
      [&](const Block& block, int thread) {
        const Panels out = {scratch(state, thread), kStripRows * width};
        const std::int64_t strip = block.row / kStripRows, neuron = strip * kBlockInputs;
        kernels_.bricks->multiply(gate_up, strip, {in + block.panel * x_stride, x_stride}, out,
                                  block.panels, false);
        const std::int64_t neurons = std::min(kBlockInputs, down.cols - neuron);
        for (std::int64_t p = 0; p < block.panels; ++p) {
          const float* const gate = out.data + p * out.stride;
          kernels_.gated(model_->config.activation, gate, gate + kBlockInputs * width,
                         state.hidden.data() + (block.panel + p) * h_stride + neuron * width,
                         neurons * width);
        }
      },
      kStripRows);
  multiply_bricks_panels(state.layout, weights.down, state.hidden.data(), state.sum, true);
}

void CpuBackend::multiply_bricks_panels(const Layout& layout, const Matrix& matrix, const float* in,
                                        float* out, bool add) const {
  const Bricks w = matrix.bricks();
  const std::int64_t in_stride = w.cols * layout.width, out_stride = w.rows * layout.width;
  for_blocks(
      w.rows, layout.panels,
      [&](const Block& block, int) {
        kernels_.bricks->multiply(
            w, block.row / kStripRows, {in + block.panel * in_stride, in_stride},
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
