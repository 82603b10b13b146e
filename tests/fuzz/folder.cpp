// A folder, packed or not: config.json, a zero byte, model.safetensors. What loads must generate.
#include <tda/engine.h>

#include <fstream>
#include <optional>

#include "fuzz.h"

namespace {

struct Folder {
  std::filesystem::path path =
      std::filesystem::temp_directory_path() / ("tda-fuzz-" + std::to_string(::getpid()));
  Folder() { std::filesystem::create_directory(path); }
  ~Folder() { std::filesystem::remove_all(path); }
  void write(const char* name, std::string_view content) const {
    std::ofstream(path / name, std::ios::binary) << content;
  }
};

}  // namespace

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const Folder folder;
  const std::string_view text = fuzz::text(data, size);
  const std::size_t zero = text.find('\0');
  folder.write("config.json", text.substr(0, zero));
  folder.write("model.safetensors", zero == text.npos ? "" : text.substr(zero + 1));
  std::optional<tda::Engine> engine;
  fuzz::outcome_of(folder.path.filename().string(), [&] {
    engine.emplace(folder.path, tda::EngineOptions{.threads = 1, .max_context = 16});
  });
  if (!engine) return 0;
  return fuzz::outcome_of("logits", [&] {  // they may be NaN or infinite
    const tda::Token prompt[] = {0, 0};
    engine->generate(prompt, {.max_new_tokens = 2, .ignore_eos = true});
  });
}
