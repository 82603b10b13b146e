// A thresholds file.
#include "sparsity/thresholds.h"

#include "base/json.h"
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  return fuzz::outcome_of("tda.json", [&] {
    const auto content = tda::parse_json_object(fuzz::text(data, size), "tda.json");
    const tda::Thresholds thresholds = tda::parse_thresholds(content, "tda.json");
    fuzz::require(thresholds.values.size() == thresholds.reached.size(), "sizes", "");
  });
}
