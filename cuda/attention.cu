// Attention, and the writes to the KV cache.
#include <algorithm>
#include <cmath>

#include "attention.h"
#include "cuda_backend.h"

namespace tda {

using namespace cuda;

namespace {

/// Query heads per block: enough to share each key's load, few enough to keep sums in registers.
int block_heads(const ModelConfig& config) {
  const std::int64_t group = config.num_heads / config.num_kv_heads;
  return group == 1 ? 1 : group == 2 || config.head_dim > 128 ? 2 : 4;
}

template <class C, int Heads, bool Fresh>
auto attend_for(std::int64_t n) {
  return n <= 64    ? attend_kernel<C, Heads, 1, Fresh>
         : n <= 128 ? attend_kernel<C, Heads, 2, Fresh>
                    : attend_kernel<C, Heads, 4, Fresh>;
}

template <class C, bool Fresh>
auto attend_for(int heads, std::int64_t n) {
  if (heads == 1) return attend_for<C, 1, Fresh>(n);
  if (heads == 2) return attend_for<C, 2, Fresh>(n);
  return n <= 64 ? attend_kernel<C, 4, 1, Fresh> : attend_kernel<C, 4, 2, Fresh>;
}

template <class C>
auto attend_for(bool fresh, int heads, std::int64_t n) {
  return fresh ? attend_for<C, true>(heads, n) : attend_for<C, false>(heads, n);
}

}  // namespace

/// Blocks among which a head's keys are split. Several tokens make enough blocks without a split.
std::int64_t CudaBackend::splits(std::int64_t tokens) const {
  if (tokens > 1) return 1;
  return std::clamp<std::int64_t>(4 * processors_ / model_->config.num_kv_heads, 1, kMostSplits);
}

static Attention arguments(CudaState& state, const Inputs& inputs, const ModelConfig& config,
                           std::int64_t layer) {
  const std::int64_t layer_bytes = config.num_kv_heads * state.capacity * padded(config.head_dim) *
                                   (state.kv == KvFormat::f32 ? 4 : 2);
  Attention a = {};
  a.qkv = state.qkv.data();
  a.cos = inputs.cos;
  a.sin = inputs.sin;
  a.keys = state.keys.data() + layer * layer_bytes;
  a.values = state.values.data() + layer * layer_bytes;
  a.position = inputs.position;
  a.partials = state.partials.data();
  a.counters = state.counters.data();
  a.out = state.attended.data();
  a.heads = static_cast<int>(config.num_heads);
  a.kv_heads = static_cast<int>(config.num_kv_heads);
  a.n = static_cast<int>(config.head_dim);
  a.capacity = static_cast<int>(state.capacity);
  a.window = static_cast<int>(config.sliding_window[layer]);
  a.eps = static_cast<float>(config.rms_norm_eps);
  a.scale = config.attention_scale();
  a.cap = config.score_cap;
  return a;
}

void CudaBackend::qkv(State& s, std::int64_t layer) const {
  CudaState& state = CudaState::of(s);
  if (skips(state)) return;
  const DeviceLayer& weights = layers_[layer];
  multiply(state, model_->layers[layer].qkv, weights.qkv, state.x.data(), state.tokens(),
           model_->config.pre_norms ? &weights.attention_norm : nullptr, weights.qkv_bias,
           state.qkv.data(), false);
  if (!model_->config.qk_norm_of_all_heads) return;
  norm_heads(state, state.qkv.data(), weights.q_norm);
  norm_heads(state, state.qkv.data() + model_->config.q_size(), weights.k_norm);
}

/// RoPE and the write to the KV cache happen here instead of in qkv(): for one token they are part
/// of the attention kernel.
void CudaBackend::attention(State& s, std::int64_t layer) const {
  CudaState& state = CudaState::of(s);
  if (skips(state)) return;
  const ModelConfig& config = model_->config;
  const std::int64_t group = config.num_heads / config.num_kv_heads;
  const auto tokens = static_cast<unsigned>(state.tokens());
  const int heads = block_heads(config);
  const bool f32 = state.kv == KvFormat::f32, fresh = tokens == 1;
  Attention a = arguments(state, inputs(state), config, layer);
  const std::int64_t angles = ropes_.of_layer(layer) * state.tokens() * (config.head_dim / 2);
  a.cos += angles;
  a.sin += angles;
  a.q_norm = config.qk_norm ? layers_[layer].q_norm.data() : nullptr;
  a.k_norm = config.qk_norm ? layers_[layer].k_norm.data() : nullptr;
  if (!fresh)
    launch(stream_,
           {blocks_of(config.num_heads + 2 * config.num_kv_heads, kAttendWarps), tokens, 1},
           kAttendThreads, 0, f32 ? append_kernel<float> : append_kernel<bf16>, a);
  launch_early(stream_,
               {static_cast<unsigned>(config.num_kv_heads * ((group + heads - 1) / heads)),
                static_cast<unsigned>(splits(tokens)), tokens},
               kAttendThreads, attend_shared(heads, config.head_dim) * 4,
               f32 ? attend_for<float>(fresh, heads, config.head_dim)
                   : attend_for<bf16>(fresh, heads, config.head_dim),
               a);
}

}  // namespace tda
