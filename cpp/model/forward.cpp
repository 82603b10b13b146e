// The model, on one page: a pre-norm decoder of attention and gated feed-forward layers. Prefill
// (T tokens) and decode (1 token) share this code; the backend chooses what is fast for which T.
#include "model/forward.h"

namespace tda {

std::span<const float> forward(const Backend& backend, State& state, const Step& step,
                               std::int64_t rows) {
  backend.begin(state, step);
  backend.embed(state);
  for (std::int64_t layer = 0; layer < backend.model().config.num_layers; ++layer) {
    backend.qkv(state, layer);            // norm, projections, RoPE, append to the KV cache
    backend.attention(state, layer);      // softmax(q kᵀ) v over the cache
    backend.attention_out(state, layer);  // output projection, residual
    backend.ffn(state, layer);            // norm, gate and up, act, down, residual: dense or TDA
  }
  return rows > 0 ? backend.logits(state, rows) : std::span<const float>{};
}

}  // namespace tda
