// A prefix cache's file; of valid ones all prompts are kept.
#include <tda/prefix_cache.h>

#include "fuzz.h"

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const fuzz::MemoryFile file(fuzz::text(data, size));
  return fuzz::outcome_of(file.path(), [&] {
    tda::PrefixCache cache(1 << 20);
    cache.load(file.path());
    fuzz::require(cache.bytes() <= static_cast<std::int64_t>(size), "more than file", file.path());
  });
}
