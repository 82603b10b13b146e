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
    for (const float frequency : tda::rope_frequencies(model.rope, model.head_dim, 1))
      fuzz::require(std::isfinite(frequency), "RoPE", std::to_string(frequency));
  });
}
