// Norms, projections and the output head.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "cpu/cpu_backend.h"

namespace tda {
namespace {

/// Logits per task of soft-capping.
constexpr std::int64_t kCapped = 1024;

/// Decode: the split of a matrix into tasks, the same number for each thread: large enough to hide
/// the overhead of a task, small enough for idle threads to help.
Tasks tasks_of(const Matrix& w, int threads) {
  constexpr std::int64_t kLeastBytes = 65536, kMostBytes = 262144;
  const std::int64_t bytes = w.rows * w.row_bytes() / threads;
  const std::int64_t most = std::max<std::int64_t>(4, bytes / kMostBytes);
  return {w.rows, threads * std::clamp<std::int64_t>(bytes / kLeastBytes, 2, most)};
}

/// For `multiply`: what a thread reads next is unknown, or too long in coming.
constexpr auto kUnknown = [](int) { return NextRead(); };

/// Copies vectors of n floats: tokens first ... of `in` to tokens 0 ... of `out`.
void copy_tokens(const float* in, const Layout& from, std::int64_t first, std::int64_t n,
                 float* out, const Layout& to) {
  std::fill_n(out, to.lanes() * n, 0.0f);
  for (std::int64_t t = 0; t < to.tokens; ++t) {
    const float* source = in + from.at(first + t, n);
    float* target = out + to.at(t, n);
    for (std::int64_t i = 0; i < n; ++i) target[i * to.width] = source[i * from.width];
  }
}

}  // namespace

void CpuBackend::norm(const Layout& layout, const float* in, std::span<const float> weight,
                      float* out) const {
  const std::int64_t n = static_cast<std::int64_t>(weight.size());
  const float eps = static_cast<float>(model_->config.rms_norm_eps);
  const auto kernel = layout.width == 1 ? kernels_.rms_norm : kernels_.rms_norm_panel;
  pool_.run(layout.panels, [&](std::int64_t panel, int) {
    const std::int64_t offset = panel * n * layout.width;
    kernel(in + offset, weight.data(), eps, n, out + offset);
  });
}

const float* CpuBackend::normed(CpuState& state, std::span<const float> weight) const {
  if (weight.empty()) return state.x.data();
  norm(state.layout, state.x.data(), weight, state.normed.data());
  return state.normed.data();
}

const float* CpuBackend::in_order(CpuState& state, const Matrix& w, const float* x) const {
  if (w.input_order.empty()) return x;
  const std::int64_t width = state.layout.width, size = w.cols * width;
  float* const ordered = state.ordered.reserve(Size(state.layout.panels) * size, "ordered inputs");
  pool_.run(state.layout.panels, [&](std::int64_t panel, int) {
    const float* const from = x + panel * size;
    float* const to = ordered + panel * size;
    for (std::int64_t i = 0; i < w.cols; ++i) {
      const float* const of_input = from + w.input_order[i] * width;
      if (width == 1)
        to[i] = *of_input;
      else
        std::copy_n(of_input, width, to + i * width);
    }
  });
  return ordered;
}

void CpuBackend::begin_branch(CpuState& state, std::span<const float> weight) const {
  state.sum = state.x.data();
  if (weight.empty() && model_->config.residual_scale == 1) return;
  const Size size = Size(state.layout.lanes()) * model_->config.hidden_size;
  state.sum = state.branch.reserve(size, "a step's activations");
  std::fill_n(state.sum, size.value(), 0.0f);
}

void CpuBackend::end_branch(CpuState& state, std::span<const float> weight) const {
  if (state.sum == state.x.data()) return;
  if (!weight.empty()) norm(state.layout, state.sum, weight, state.sum);
  const float scale = model_->config.residual_scale;
  const std::int64_t size = state.layout.width * model_->config.hidden_size;
  pool_.run(state.layout.panels, [&](std::int64_t panel, int) {
    for (std::int64_t i = panel * size; i < (panel + 1) * size; ++i)
      state.x.data()[i] += state.sum[i] * scale;
  });
}

NextRead CpuBackend::first_read(const Matrix& w, int thread) const {
  const Tasks tasks = tasks_of(w, pool_.threads());
  return rows_of(w, tasks.first_of(pool_.first_task(thread, tasks.count)));
}

template <class Next>
void CpuBackend::multiply(CpuState& state, const Layout& layout, const Matrix& w, const float* in,
                          float* out, bool add, const Next& next) const {
  if (w.in_bricks()) return multiply_bricks_panels(state, layout, w, in, out, add);
  if (layout.width == 1)
    return multiply_each(state, layout.tokens, w, in, each_vector(out, layout.tokens, w.rows), add,
                         next);
  const PreparedPanels b = prepare(state, layout, w, in);
  const std::int64_t out_stride = w.rows * layout.width;
  for_blocks(w.rows, layout.panels, [&](const Block& block, int) {
    panels(w.format).multiply(
        rows_of(w, block.row), block.rows, b.from(block.panel),
        {out + block.panel * out_stride + block.row * layout.width, out_stride}, block.panels, add);
  });
}

template <class Next>
void CpuBackend::multiply_each(CpuState& state, std::int64_t tokens, const Matrix& w,
                               const float* in, const EachVector<float*>& out, bool add,
                               const Next& next) const {
  const Tasks tasks = tasks_of(w, pool_.threads());
  const RowKernels& kernels = rows(w.format);
  const EachVector<const void*> x = prepare_each(state, tokens, w.format, in, w.cols);
  pool_.run(tasks.count, [&](std::int64_t task, int thread) {
    const std::int64_t row = tasks.first_of(task), end = tasks.first_of(task + 1);
    if (tokens == 1) {
      const bool last = pool_.is_last_task(task, thread, tasks.count);
      kernels.dot(rows_of(w, row), end - row, x[0], out[0] + row, add,
                  last ? next(thread) : NextRead(rows_of(w, end)));
      return;
    }
    EachVector<float*> y = out;
    for (std::int64_t t = 0; t < tokens; ++t) y[t] += row;
    kernels.dot_each(rows_of(w, row), end - row, {tokens, x.data(), y.data()}, add);
  });
}

void CpuBackend::add_bias(const Layout& layout, std::span<const float> bias, float* out) const {
  for (std::int64_t panel = 0; panel < layout.panels; ++panel)
    for (const float b : bias)
      for (std::int64_t lane = 0; lane < layout.width; ++lane) *out++ += b;
}

/// multiply() for a layer's projection; bricks decide by input.
template <class Next>
void CpuBackend::project(CpuState& state, std::int64_t layer, Product product, const Matrix& w,
                         const float* in, float* out, bool add, const Next& next) const {
  if (!in_bricks()) return multiply(state, state.layout, w, in, out, add, next);
  CpuState::Layer& own = state.layers[layer];
  const int i = static_cast<int>(product);
  sample_inputs(state, in, w.cols, own.input_samples[i]);
  in = in_order(state, w, in);
  if (state.layout.width > 1) return multiply(state, state.layout, w, in, out, add, next);
  const std::int64_t tokens = state.layout.tokens;
  const auto bytes = multiply_bricks(state, tokens, w, in, input_thresholds(state, layer, product),
                                     each_vector(out, tokens, w.rows), add);
  for (std::int64_t t = 0; t < tokens; ++t) state.sequence(t).attention_bytes += bytes[t];
}

void CpuBackend::qkv(State& s, std::int64_t layer) const {
  CpuState& state = CpuState::of(s);
  const LayerWeights& weights = model_->layers[layer];
  const float* const in = normed(state, weights.attention_norm);
  project(state, layer, Product::qkv, weights.qkv, in, state.qkv.data(), false, kUnknown);
  if (!weights.qkv_bias.empty()) add_bias(state.layout, weights.qkv_bias, state.qkv.data());
  append(state, layer);
}

void CpuBackend::attention_out(State& s, std::int64_t layer) const {
  CpuState& state = CpuState::of(s);
  const LayerWeights& weights = model_->layers[layer];
  begin_branch(state, weights.attention_post_norm);
  project(state, layer, Product::output, weights.output, state.attended.data(), state.sum, true,
          [&](int thread) {
            const bool dense = state.step.ffn != FfnMode::sparse;
            return dense ? first_ffn_read(layer, thread) : NextRead();
          });
  if (!weights.output_bias.empty()) add_bias(state.layout, weights.output_bias, state.sum);
  end_branch(state, weights.attention_post_norm);
}

std::span<const float> CpuBackend::logits(State& s, std::int64_t count) const {
  CpuState& state = CpuState::of(s);
  const Layout& all = state.layout;
  if (count < 1 || count > all.tokens)
    throw OptionError("logits of " + std::to_string(count) + " rows, expected 1 to the step's " +
                      std::to_string(all.tokens));
  const Matrix& head = model_->head;
  const Layout wanted = layout_of(count);
  float* in = state.normed.data();
  if (count == all.tokens && all.width == 1) {
    norm(all, state.x.data(), model_->final_norm, in);
    logits_each(state, in);
    return state.sequence(0).logits;
  }
  copy_tokens(state.x.data(), all, all.tokens - count, head.cols, in, wanted);
  norm(wanted, in, model_->final_norm, in);

  const Size size = Size(count) * head.rows;
  float* out = state.all_logits.reserve(size, "the logits");
  if (count > 1) {
    multiply_to_rows(state, wanted, head, in, out);
  } else if (head.in_bricks()) {
    state.head_bytes += multiply_bricks(state, 1, head, in, {}, {out}, false)[0];
  } else {
    multiply(state, wanted, head, in, out, false, kUnknown);
    state.head_bytes += head.bytes();
  }
  cap(out, size.value());
  return {out, static_cast<std::size_t>(size.value())};
}

void CpuBackend::logits_each(CpuState& state, const float* in) const {
  const Matrix& head = model_->head;
  const std::int64_t tokens = state.layout.tokens;
  EachVector<float*> out = {};
  EachVector<float> thresholds = {};
  for (std::int64_t t = 0; t < tokens; ++t) {
    CpuState& own = state.sequence(t);
    out[t] = own.all_logits.reserve(head.rows, "the logits");
    own.logits = {out[t], static_cast<std::size_t>(head.rows)};
    thresholds[t] = own.step.ffn == FfnMode::sparse ? own.step.head_inputs : 0.0f;
  }
  if (head.in_bricks()) {
    const auto bytes = multiply_bricks(state, tokens, head, in, thresholds, out, false);
    for (std::int64_t t = 0; t < tokens; ++t) state.sequence(t).head_bytes += bytes[t];
  } else {
    multiply_each(state, tokens, head, in, out, false, kUnknown);
    for (std::int64_t t = 0; t < tokens; ++t) state.sequence(t).head_bytes += head.bytes();
  }
  for (std::int64_t t = 0; t < tokens; ++t) cap(out[t], head.rows);
}

void CpuBackend::cap(float* logits, std::int64_t n) const {
  const float most = model_->config.logit_cap;
  if (most == 0) return;
  pool_.run((n + kCapped - 1) / kCapped, [&](std::int64_t task, int) {
    const std::int64_t first = task * kCapped;
    kernels_.soft_cap(most, logits + first, std::min(kCapped, n - first));
  });
}

void CpuBackend::multiply_to_rows(CpuState& state, const Layout& layout, const Matrix& w,
                                  const float* in, float* out) const {
  const bool by_strip = w.in_bricks();
  const std::int64_t block_rows = by_strip ? kStripRows : kBlockRows;
  const PreparedPanels b = prepare(state, layout, w, in);
  const Layout of_block = layout_of(kTaskTokens);
  const auto body = [&](const Block& block, int thread) {
    float* c = scratch(state, thread);
    const Panels to = {c, block_rows * layout.width};
    if (by_strip)
      kernels_.multiply_bricks(w.bricks(), block.row / kStripRows, b.from(block.panel), to,
                               block.panels, false);
    else
      panels(w.format).multiply(rows_of(w, block.row), block.rows, b.from(block.panel), to,
                                block.panels, false);
    const std::int64_t first = block.panel * layout.width;
    const std::int64_t tokens = std::min(layout.tokens - first, block.panels * layout.width);
    for (std::int64_t t = 0; t < tokens; ++t) {
      const float* lane = c + of_block.at(t, block_rows);
      float* row = out + (first + t) * w.rows + block.row;
      for (std::int64_t r = 0; r < block.rows; ++r) row[r] = lane[r * layout.width];
    }
  };
  for_blocks(w.rows, layout.panels, body, block_rows);
}

}  // namespace tda
