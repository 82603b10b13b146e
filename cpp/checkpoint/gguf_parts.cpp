// A model in several GGUF files: NAME-00001-of-00003.gguf and so on.
#include <tda/error.h>

#include <cstdio>

#include "base/json.h"
#include "checkpoint/gguf.h"

namespace tda {
namespace {

using nlohmann::json;

constexpr std::int64_t kMostParts = 99'999;  // of five digits

/// The end of a part's name.
std::string part_suffix(std::int64_t number, std::int64_t count) {
  char text[32];
  std::snprintf(text, sizeof text, "-%05d-of-%05d.gguf", static_cast<int>(number),
                static_cast<int>(count));
  return text;
}

[[noreturn]] void fail(const GgufFile& file, const char* key, const std::string& expected) {
  const json found = file.value(key);
  throw CheckpointError(file.name() + ": " + key + " is " +
                        (found.is_null() ? "missing" : describe(found)) + ", expected " + expected);
}

}  // namespace

std::vector<GgufFile> read_gguf_parts(const std::filesystem::path& path) {
  std::vector<GgufFile> files;
  files.emplace_back(path);
  const json stated = files[0].value("split.count");
  if (stated.is_null()) return files;
  if (!stated.is_number_integer() || stated < 0 || stated > kMostParts)
    fail(files[0], "split.count", "1 to " + std::to_string(kMostParts));
  const std::int64_t count = stated.get<std::int64_t>();
  if (count <= 1) return files;
  const std::string name = path.filename().string(), suffix = part_suffix(1, count);
  if (!name.ends_with(suffix))
    throw CheckpointError(path.string() + ": one of the " + std::to_string(count) +
                          " files of a model, expected the first, its name ending in " + suffix);
  const std::string stem = name.substr(0, name.size() - suffix.size());
  for (std::int64_t i = 0; i < count; ++i) {
    if (i > 0) files.emplace_back(path.parent_path() / (stem + part_suffix(i + 1, count)));
    if (files[i].value("split.no") != i) fail(files[i], "split.no", std::to_string(i));
    if (files[i].value("split.count") != count)
      fail(files[i], "split.count", std::to_string(count));
  }
  return files;
}

}  // namespace tda
