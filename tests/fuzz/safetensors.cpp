// A safetensors file; of valid ones every byte is read.
#include <vector>

#include "checkpoint/checkpoint.h"
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const fuzz::MemoryFile file(fuzz::text(data, size));
  return fuzz::outcome_of(file.path(), [&] {
    std::int64_t bytes = 0;
    for (const auto& [name, tensor] : tda::read_safetensors(file.path())) {
      std::vector<std::byte> content(tensor.bytes);
      tensor.read(0, tensor.bytes, content.data());
      bytes += tensor.bytes;
    }
    fuzz::require(bytes <= static_cast<std::int64_t>(size), "more data than file", file.path());
  });
}
