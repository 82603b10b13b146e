// Norms, projections and the output head.
#include <algorithm>

#include "cuda_backend.h"
#include "gemm.h"
#include "linear.h"

namespace tda {

using namespace cuda;

namespace {

/// Rows per warp at a time: the most that still fills every multiprocessor with blocks.
int warp_rows(std::int64_t rows, unsigned processors) {
  for (const int at_once : {4, 2})
    if (blocks_of(rows, kWarps * at_once) >= kBlocksEach * processors) return at_once;
  return 1;
}

template <class W>
auto linear_for(int at_once) {
  return at_once == 4   ? linear_kernel<4, W>
         : at_once == 2 ? linear_kernel<2, W>
                        : linear_kernel<1, W>;
}

}  // namespace

void CudaBackend::multiply(CudaState& state, const Matrix& w, const Bytes& data, const float* x,
                           std::int64_t tokens, const Floats* norm_weight, const Floats& bias,
                           float* y, bool add) const {
  if (tokens > 1) {
    if (norm_weight) norm(state, x, tokens, *norm_weight);
    return gemm(state, data, false, norm_weight ? state.normed.data() : x, bias.data(), y, tokens,
                w.rows, w.cols, add);
  }
  const Linear a = {data.data(),
                    x,
                    norm_weight ? norm_weight->data() : nullptr,
                    bias.data(),
                    y,
                    static_cast<int>(w.rows),
                    static_cast<int>(w.cols),
                    static_cast<float>(model_->config.rms_norm_eps),
                    add};
  const int at_once = warp_rows(w.rows, processors_);
  const auto blocks = std::min(blocks_of(w.rows, kWarps * at_once), kBlocksEach * processors_);
  launch_early(
      stream_, {blocks, 1, 1}, kThreads, (padded(w.cols) + kWarps) * 4,
      w.format == WeightFormat::f32 ? linear_for<float>(at_once) : linear_for<bf16>(at_once), a);
}

void CudaBackend::gemm(CudaState& state, const Bytes& w, bool neuron_major, const float* a,
                       const float* bias, float* c, std::int64_t tokens, std::int64_t n,
                       std::int64_t depth, bool add) const {
  const int t = static_cast<int>(tokens), outputs = static_cast<int>(n),
            k = static_cast<int>(depth);
  if (model_->format == WeightFormat::f32)
    return launch(stream_, {blocks_of(n, kTile), blocks_of(tokens, kTile), 1}, kThreads,
                  kTilesShared, neuron_major ? gemm_kernel<true> : gemm_kernel<false>,
                  Gemm<float>{a, w.data(), bias, c, t, outputs, k, add});
  launch(stream_, {static_cast<unsigned>(tokens), 1, 1}, kThreads, 0, round_kernel, a, k,
         state.rounded.data());
  const Gemm<bf16> product = {state.rounded.data(), w.data(), bias, c, t, outputs, k, add};
  if (cublas_.multiply(stream_, product, neuron_major)) return;
  launch(stream_, {blocks_of(n, kGemmOutputs), blocks_of(tokens, kGemmTokens), 1}, kThreads,
         kGemmShared, neuron_major ? mma_kernel<true> : mma_kernel<false>, product);
}

void CudaBackend::norm(CudaState& state, const float* x, std::int64_t tokens,
                       const Floats& weight) const {
  const std::int64_t n = model_->config.hidden_size;
  launch(stream_, {static_cast<unsigned>(tokens), 1, 1}, kThreads, (padded(n) + kWarps) * 4,
         norm_kernel, x, weight.data(), static_cast<float>(model_->config.rms_norm_eps),
         static_cast<int>(n), n, state.normed.data());
}

void CudaBackend::norm_heads(CudaState& state, float* heads, const Floats& weight) const {
  const std::int64_t n = weight.size();
  launch(stream_, {static_cast<unsigned>(state.tokens()), 1, 1}, kThreads, (padded(n) + kWarps) * 4,
         norm_kernel, heads, weight.data(), static_cast<float>(model_->config.rms_norm_eps),
         static_cast<int>(n), model_->layers.front().qkv.rows, heads);
}

float* CudaBackend::sum_of(CudaState& state) const {
  return joins() ? state.branch.data() : state.x.data();
}

void CudaBackend::join(CudaState& state, const Floats& weight) const {
  if (!joins()) return;
  const ModelConfig& config = model_->config;
  launch(stream_, {static_cast<unsigned>(state.tokens()), 1, 1}, kThreads,
         (padded(config.hidden_size) + kWarps) * 4, join_kernel, state.branch.data(), weight.data(),
         static_cast<float>(config.rms_norm_eps), config.residual_scale,
         static_cast<int>(config.hidden_size), state.x.data());
}

void CudaBackend::embed(State& s) const {
  CudaState& state = CudaState::of(s);
  if (skips(state)) return;
  launch(stream_, {static_cast<unsigned>(state.tokens()), 1, 1}, kThreads, 0,
         model_->format == WeightFormat::f32 ? embed_kernel<float> : embed_kernel<bf16>,
         embedding_.data(), inputs(state).tokens, static_cast<int>(model_->config.hidden_size),
         model_->embedding_scale(), state.x.data());
}

void CudaBackend::attention_out(State& s, std::int64_t layer) const {
  CudaState& state = CudaState::of(s);
  if (skips(state)) return;
  multiply(state, model_->layers[layer].output, layers_[layer].output, state.attended.data(),
           state.tokens(), nullptr, layers_[layer].output_bias, sum_of(state), !joins());
  join(state, layers_[layer].attention_post_norm);
}

void CudaBackend::make_logits(CudaState& state, std::int64_t rows) const {
  if (rows < 1 || rows > state.tokens())
    throw OptionError("logits of " + std::to_string(rows) + " rows, expected 1 to the step's " +
                      std::to_string(state.tokens()));
  const std::int64_t size = rows * model_->head.rows;
  state.logits.reserve(size, "the logits");
  const float* x = state.x.data() + (state.tokens() - rows) * model_->config.hidden_size;
  multiply(state, model_->head, head_.data() ? head_ : embedding_, x, rows, &final_norm_, {},
           state.logits.data(), false);
  if (const float cap = model_->config.logit_cap; cap > 0)
    launch(stream_, {blocks_of(size, kThreads), 1, 1}, kThreads, 0, cap_kernel, state.logits.data(),
           size, cap);
  if (rows == 1) state.head_bytes += model_->head.bytes();
}

std::span<const float> CudaBackend::logits(State& s, std::int64_t rows) const {
  CudaState& state = CudaState::of(s);
  make_logits(state, rows);
  const std::int64_t size = rows * model_->head.rows;
  state.host_logits.reserve(size, "the logits, on the host");
  copy(stream_, state.host_logits.data(), state.logits.data(), size);
  stream_.wait();
  return {state.host_logits.data(), static_cast<std::size_t>(size)};
}

/// Eight bytes come back instead of all logits: the token, beside the largest.
Token CudaBackend::draw(State& s, double temperature, double u) const {
  CudaState& state = CudaState::of(s);
  make_logits(state, 1);
  const auto n = static_cast<int>(model_->head.rows);
  const auto blocks = static_cast<unsigned>(std::min((n + kHeadBlock - 1) / kHeadBlock, 128));
  state.best.reserve(blocks + 1, "the best logits");
  state.host_best.reserve(1, "the best logits");
  Best* parts = reinterpret_cast<Best*>(state.best.data());
  Best* best = parts + blocks;
  launch_early(stream_, {blocks, 1, 1}, kThreads, kWarps * sizeof(Best) + 4, argmax_kernel,
               state.logits.data(), n, parts, state.counters.data());
  if (temperature > 0) {
    const int threads = static_cast<int>(blocks) * kThreads;
    state.draw_sums.reserve(blocks, "sampling");
    launch(stream_, {blocks, 1, 1}, kThreads, (kThreads + kWarps) * 8 + 4, draw_kernel,
           Draw{state.logits.data(), n, (n + threads - 1) / threads, best, state.draw_sums.data(),
                state.counters.data(), temperature, u});
  }
  const Best* found = reinterpret_cast<const Best*>(state.host_best.data());
  copy(stream_, state.host_best.data(), state.best.data() + blocks, 1);
  stream_.wait();
  check_finite({&found->value, 1});
  return found->id;
}

}  // namespace tda
