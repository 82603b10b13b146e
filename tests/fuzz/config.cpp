// config.json, optionally followed by a zero byte and generation_config.json.
#include <cmath>

#include "backend/rope.h"
#include "base/json.h"
#include "checkpoint/checkpoint.h"
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text = fuzz::text(data, size);
  const std::size_t zero = text.find('\0');
  return fuzz::outcome_of("config.json", [&] {
    const auto config = tda::parse_json_object(text.substr(0, zero), "config.json");
    nlohmann::json generation;
    if (zero != text.npos)
      generation = tda::parse_json_object(text.substr(zero + 1), "generation_config.json");
    const tda::ModelConfig model =
        tda::parse_config(config, zero == text.npos ? nullptr : &generation, "");
    fuzz::require(std::ssize(model.sliding_window) == model.num_layers, "windows", "");
    if (model.head_dim > 256) return;
    for (const float factor : {model.embedding_scale, model.embedding_scale_bf16, model.logit_scale,
                               model.residual_scale, model.attention_scale()})
      fuzz::require(std::isfinite(factor) && factor > 0, "a factor", std::to_string(factor));
    for (const float cap : {model.score_cap, model.logit_cap})
      fuzz::require(std::isfinite(cap) && cap >= 0, "a cap", std::to_string(cap));
    const tda::Ropes ropes(model);
    fuzz::require(model.uses_other_rope.empty() ||
                      (ropes.count() == 2 && std::ssize(model.uses_other_rope) == model.num_layers),
                  "RoPEs", "");
    for (std::int64_t rope = 0; rope < ropes.count(); ++rope)
      for (const float frequency : ropes.frequencies(rope, 1))
        fuzz::require(std::isfinite(frequency), "RoPE", std::to_string(frequency));
  });
}
