// A GGUF file. Of a valid one every key and every tensor is read; if it holds a model, the tensors
// are read as that model's.
#include "checkpoint/gguf.h"

#include <tda/tokenizer.h>

#include <nlohmann/json.hpp>
#include <vector>

#include "fuzz.h"
#include "text/gguf_tokenizer.h"

namespace {

void read(const tda::TensorView& tensor) {
  std::int64_t count = 1;
  for (const std::int64_t size : tensor.shape) count *= size;
  std::vector<std::byte> data(tensor.bytes);
  std::vector<float> values(count);
  tensor.read_rows(0, tensor.shape.size() == 1 ? 1 : tensor.shape[0], data.data());
  tda::dequantize(tensor.dtype, data.data(), count, values.data());
  std::uint8_t codes[32];
  float scale = 0, minimum = 0;
  for (std::int64_t i = 0; i < count / 32; ++i) {
    if (!tda::four_bit_groups(tensor.dtype, data.data(), i, codes, scale, minimum)) break;
    for (int j = 0; j < 32; ++j) {
      const float expected = values[32 * i + j], found = scale * codes[j] + minimum;
      // NaN and infinity are the file's own.
      fuzz::require(found == expected || !(found - found == 0), "four bits differ", tensor.name);
    }
  }
}

}  // namespace

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const fuzz::MemoryFile memory(fuzz::text(data, size));
  return fuzz::outcome_of(memory.path(), [&] {
    const tda::GgufFile file(memory.path());
    std::int64_t bytes = 0;
    for (const auto& [key, value] : file.values()) (void)file.value(key);
    for (const auto& [name, tensor] : file.tensors()) {
      read(tensor);
      bytes += tensor.bytes;
    }
    fuzz::require(bytes <= static_cast<std::int64_t>(size), "more data than file", file.name());
    const tda::GgufModel model(memory.path());
    for (const auto& [name, tensor] : model.tensors()) read(tensor);
    (void)tda::Tokenizer::from_bytes(tda::gguf_tokenizer_files(model));
  });
}
