// model.safetensors.index.json
#include "base/json.h"
#include "checkpoint/checkpoint.h"
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  return fuzz::outcome_of("index.json", [&] {
    const auto index = tda::parse_json_object(fuzz::text(data, size), "index.json");
    for (const auto& [tensor, shard] : tda::parse_weight_map(index, "index.json"))
      fuzz::require(!std::filesystem::path(shard).has_parent_path() && shard != "..",
                    "a shard outside the folder", shard);
  });
}
