// Appending keys and values to the cache, and attention over it.
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "cpu/cpu_backend.h"

namespace tda {
namespace {

/// Keys per block of online softmax in prefill.
constexpr std::int64_t kBlockKeys = 2 * kBlockRows;

/// Multiplies the lanes of a head's vector. vector: [n, width]; factors: [n]
void scale_channels(float* vector, const float* factors, std::int64_t n, std::int64_t width) {
  for (std::int64_t i = 0; i < n; ++i)
    for (std::int64_t lane = 0; lane < width; ++lane) vector[i * width + lane] *= factors[i];
}

}  // namespace

/// Scores [group, kBlockKeys, P], maxima and sums [group, P] of one task.
std::int64_t CpuBackend::attention_scratch() const {
  const ModelConfig& config = model_->config;
  return config.num_heads / config.num_kv_heads * (kBlockKeys + 2) * kernels_.panel;
}

/// The last part of `qkv`: applies q and k norms, if the model has them, and RoPE, and stores k and
/// v.
void CpuBackend::append(CpuState& state, std::int64_t layer) const {
  const ModelConfig& config = model_->config;
  const LayerWeights& weights = model_->layers[layer];
  const Layout& layout = state.layout;
  const std::int64_t head_size = config.head_dim * layout.width;
  const std::int64_t panel_heads = config.num_heads + 2 * config.num_kv_heads;
  const auto norm = layout.width == 1 ? kernels_.rms_norm : kernels_.rms_norm_panel;
  const float eps = static_cast<float>(config.rms_norm_eps);
  const KeyScales* scales = state.kv == KvFormat::int8 ? &key_scales_[layer] : nullptr;
  if (scales && scales->keys.empty()) scales = nullptr;

  pool_.run(layout.panels, [&](std::int64_t panel, int) {
    float* heads = state.qkv.data() + panel * panel_heads * head_size;
    const std::int64_t angles = ropes_.of_layer(layer) * angles_size(state) + panel * head_size / 2;
    const float *cos = state.cos.data() + angles, *sin = state.sin.data() + angles;
    if (config.qk_norm_of_all_heads) {
      float* const keys = heads + config.num_heads * head_size;
      norm(heads, weights.q_norm.data(), eps, config.q_size(), heads);
      norm(keys, weights.k_norm.data(), eps, config.kv_size(), keys);
    }
    for (std::int64_t head = 0; head < config.num_heads + config.num_kv_heads; ++head) {
      float* vector = heads + head * head_size;
      const auto& weight = head < config.num_heads ? weights.q_norm : weights.k_norm;
      if (config.qk_norm) norm(vector, weight.data(), eps, config.head_dim, vector);
      kernels_.rotate(vector, cos, sin, head_size / 2);
      if (!scales) continue;
      const bool query = head < config.num_heads;
      const std::int64_t kv_head =
          query ? head / (config.num_heads / config.num_kv_heads) : head - config.num_heads;
      const float* factors = (query ? scales->queries : scales->keys).data();
      scale_channels(vector, factors + kv_head * config.head_dim, config.head_dim, layout.width);
    }
    const std::int64_t first = panel * layout.width;
    const std::int64_t tokens = std::min(layout.width, layout.tokens - first);
    for (std::int64_t head = 0; head < config.num_kv_heads; ++head) {
      const float* k = heads + (config.num_heads + head) * head_size;
      const float* v = k + config.num_kv_heads * head_size;
      const std::int64_t offset = (state.step.position + first) * cache_row_bytes(state);
      std::byte* keys = cache(state, state.keys, layer, head) + offset;
      std::byte* values = cache(state, state.values, layer, head) + offset;
      for (std::int64_t lane = 0; lane < tokens; ++lane) {
        const std::int64_t row = lane * cache_row_bytes(state);
        caches(state.kv).store(k + lane, layout.width, config.head_dim, keys + row);
        caches(state.kv).store(v + lane, layout.width, config.head_dim, values + row);
      }
    }
  });
}

void CpuBackend::attention(State& s, std::int64_t layer) const {
  CpuState& state = CpuState::of(s);
  if (state.layout.width == 1)
    attend_one(state, layer);
  else
    attend_panels(state, layer);
}

/// Decode. A task is a chunk of one KV head's keys for all query heads that share it; then the
/// partial softmax sums of the chunks are combined.
void CpuBackend::attend_one(CpuState& state, std::int64_t layer) const {
  const ModelConfig& config = model_->config;
  const std::int64_t group = config.num_heads / config.num_kv_heads, n = config.head_dim;
  const std::int64_t window = config.sliding_window[layer], end = state.step.position + 1;
  const std::int64_t begin = window > 0 ? std::max<std::int64_t>(0, end - window) : 0;
  const std::int64_t chunks = (end - begin + kAttendKeys - 1) / kAttendKeys;
  const std::int64_t chunk_size = group * (2 + n);  // floats in partials: [kv heads, chunks, group]
  const float scale = config.attention_scale();
  float* partials = state.partials.reserve(Size(config.num_kv_heads) * chunks * chunk_size,
                                           "attention's partial sums");

  pool_.run(config.num_kv_heads * chunks, [&](std::int64_t task, int) {
    const std::int64_t head = task / chunks, chunk = task % chunks;
    const std::int64_t first = begin + chunk * (end - begin) / chunks;
    const std::int64_t keys = begin + (chunk + 1) * (end - begin) / chunks - first;
    const std::int64_t offset = first * cache_row_bytes(state);
    caches(state.kv).attend(cache(state, state.keys, layer, head) + offset,
                            cache(state, state.values, layer, head) + offset, keys, n,
                            state.qkv.data() + head * group * n, group, scale,
                            partials + task * chunk_size);
  });

  for (std::int64_t head = 0; head < config.num_heads; ++head) {
    const float* parts = partials + head / group * chunks * chunk_size + head % group * (2 + n);
    float largest = -FLT_MAX;
    for (std::int64_t c = 0; c < chunks; ++c) largest = std::max(largest, parts[c * chunk_size]);
    float* out = state.attended.data() + head * n;
    std::fill_n(out, n, 0.0f);
    float total = 0;
    for (std::int64_t c = 0; c < chunks; ++c) {
      const float* part = parts + c * chunk_size;
      const float weight = std::exp(part[0] - largest);
      total += weight * part[1];
      for (std::int64_t i = 0; i < n; ++i) out[i] += weight * part[2 + i];
    }
    for (std::int64_t i = 0; i < n; ++i) out[i] /= total;
  }
}

/// Prefill. A task is a panel of queries of all heads that share one KV head.
void CpuBackend::attend_panels(CpuState& state, std::int64_t layer) const {
  const std::int64_t kv_heads = model_->config.num_kv_heads;
  pool_.run(state.layout.panels * kv_heads, [&](std::int64_t task, int thread) {
    // The last panels have the most keys and go first, to balance the threads.
    const std::int64_t panel = state.layout.panels - 1 - task / kv_heads;
    attend_panel(state, layer, task % kv_heads, panel, scratch(state, thread));
  });
}

void CpuBackend::attend_panel(CpuState& state, std::int64_t layer, std::int64_t kv_head,
                              std::int64_t panel, float* scratch) const {
  const ModelConfig& config = model_->config;
  const std::int64_t group = config.num_heads / config.num_kv_heads, n = config.head_dim;
  const std::int64_t width = state.layout.width, head_size = n * width;
  const std::int64_t first_head = kv_head * group;
  const float scale = config.attention_scale();

  const std::int64_t query = state.step.position + panel * width;  // position of the first one
  const std::int64_t end =
      std::min(query + width, state.step.position + state.layout.tokens);  // of the keys seen
  const std::int64_t window =
      config.sliding_window[layer] > 0 ? config.sliding_window[layer] : end + width;
  const std::int64_t begin = std::max<std::int64_t>(0, query - window + 1);

  const std::int64_t panel_heads = config.num_heads + 2 * config.num_kv_heads;
  const ConstPanels q = {state.qkv.data() + (panel * panel_heads + first_head) * head_size,
                         head_size};
  const Panels out = {state.attended.data() + (panel * config.num_heads + first_head) * head_size,
                      head_size};
  const Panels scores = {scratch, kBlockKeys * width};
  float* maxima = scratch + group * scores.stride;  // [group, P]
  float* sums = maxima + group * width;             // [group, P]
  std::fill_n(maxima, group * width, -FLT_MAX);
  std::fill_n(sums, group * width, 0.0f);
  std::fill_n(out.data, group * head_size, 0.0f);

  for (std::int64_t key = begin; key < end; key += kBlockKeys) {
    const std::int64_t keys = std::min(kBlockKeys, end - key);
    const std::int64_t offset = key * cache_row_bytes(state);
    panels(state.kv).multiply({cache(state, state.keys, layer, kv_head) + offset, nullptr, n}, keys,
                              q, scores, group, false);
    for (std::int64_t g = 0; g < group; ++g)
      kernels_.softmax({keys, key - query, window, n}, scale, scores.data + g * scores.stride,
                       maxima + g * width, sums + g * width, out.data + g * out.stride);
    panels(state.kv).multiply_transposed(
        {cache(state, state.values, layer, kv_head) + offset, nullptr, n}, keys, 0, n,
        {scores.data, scores.stride}, out, group);
  }
  for (std::int64_t g = 0; g < group; ++g)
    for (std::int64_t i = 0; i < n; ++i)
      for (std::int64_t lane = 0; lane < width; ++lane)
        out.data[g * head_size + i * width + lane] /= sums[g * width + lane];
}

}  // namespace tda
