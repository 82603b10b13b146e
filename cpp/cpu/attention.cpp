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
    const CpuState& own = state.sequence(panel);
    const std::int64_t position = own.step.position + (state.is_batch() ? 0 : first);
    for (std::int64_t head = 0; head < config.num_kv_heads; ++head) {
      const float* k = heads + (config.num_heads + head) * head_size;
      const float* v = k + config.num_kv_heads * head_size;
      const std::int64_t offset = position * cache_row_bytes(own);
      std::byte* keys = cache(own, own.keys, layer, head) + offset;
      std::byte* values = cache(own, own.values, layer, head) + offset;
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
    attend_decode(state, layer);
  else
    attend_panels(state, layer);
}

namespace {

/// The keys that a sequence's next token sees, in chunks.
struct Chunks {
  std::int64_t begin, end, count;
  std::int64_t first_task;  // of all sequences' tasks

  std::int64_t first(std::int64_t chunk) const { return begin + chunk * (end - begin) / count; }
};

/// Combines the partial softmax sums of one head's chunks. parts: [chunks], `stride` apart
void combine(const float* parts, std::int64_t chunks, std::int64_t stride, std::int64_t n,
             float* out) {
  float largest = -FLT_MAX;
  for (std::int64_t c = 0; c < chunks; ++c) largest = std::max(largest, parts[c * stride]);
  std::fill_n(out, n, 0.0f);
  float total = 0;
  for (std::int64_t c = 0; c < chunks; ++c) {
    const float* part = parts + c * stride;
    const float weight = std::exp(part[0] - largest);
    total += weight * part[1];
    for (std::int64_t i = 0; i < n; ++i) out[i] += weight * part[2 + i];
  }
  for (std::int64_t i = 0; i < n; ++i) out[i] /= total;
}

}  // namespace

/// Decode. A task is a chunk of one KV head's keys for all query heads that share it; then the
/// partial softmax sums of the chunks are combined.
void CpuBackend::attend_decode(CpuState& state, std::int64_t layer) const {
  const ModelConfig& config = model_->config;
  const std::int64_t group = config.num_heads / config.num_kv_heads, n = config.head_dim;
  const std::int64_t window = config.sliding_window[layer];
  const std::int64_t chunk_size = group * (2 + n);  // floats in partials
  const std::int64_t qkv_size = config.q_size() + 2 * config.kv_size();
  const ScoreScale scale = score_scale();
  const std::int64_t tokens = state.layout.tokens;

  std::array<Chunks, Vectors::kMost> all;
  std::int64_t tasks = 0;
  for (std::int64_t t = 0; t < tokens; ++t) {
    const std::int64_t end = state.sequence(t).step.position + 1;
    const std::int64_t begin = window > 0 ? std::max<std::int64_t>(0, end - window) : 0;
    all[t] = {begin, end, (end - begin + kAttendKeys - 1) / kAttendKeys, tasks};
    tasks += config.num_kv_heads * all[t].count;
  }
  float* const partials =
      state.partials.reserve(Size(tasks) * chunk_size, "attention's partial sums");

  pool_.run(tasks, [&](std::int64_t task, int) {
    std::int64_t t = tokens - 1;
    while (all[t].first_task > task) --t;
    const Chunks& chunks = all[t];
    const CpuState& own = state.sequence(t);
    const std::int64_t head = (task - chunks.first_task) / chunks.count;
    const std::int64_t chunk = (task - chunks.first_task) % chunks.count;
    const std::int64_t first = chunks.first(chunk), keys = chunks.first(chunk + 1) - first;
    const std::int64_t offset = first * cache_row_bytes(own);
    caches(own.kv).attend(cache(own, own.keys, layer, head) + offset,
                          cache(own, own.values, layer, head) + offset, keys, n,
                          state.qkv.data() + t * qkv_size + head * group * n, group, scale,
                          partials + task * chunk_size);
  });

  for (std::int64_t t = 0; t < tokens; ++t)
    for (std::int64_t head = 0; head < config.num_heads; ++head) {
      const std::int64_t task = all[t].first_task + head / group * all[t].count;
      combine(partials + task * chunk_size + head % group * (2 + n), all[t].count, chunk_size, n,
              state.attended.data() + (t * config.num_heads + head) * n);
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
  const ScoreScale scale = score_scale();

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
    panels(state.kv).multiply({cache(state, state.keys, layer, kv_head) + offset, n}, keys, q,
                              scores, group, false);
    for (std::int64_t g = 0; g < group; ++g)
      kernels_.softmax({keys, key - query, window, n}, scale, scores.data + g * scores.stride,
                       maxima + g * width, sums + g * width, out.data + g * out.stride);
    panels(state.kv).multiply_transposed({cache(state, state.values, layer, kv_head) + offset, n},
                                         keys, 0, n, {scores.data, scores.stride}, out, group);
  }
  for (std::int64_t g = 0; g < group; ++g)
    for (std::int64_t i = 0; i < n; ++i)
      for (std::int64_t lane = 0; lane < width; ++lane)
        out.data[g * head_size + i * width + lane] /= sums[g * width + lane];
}

}  // namespace tda
