// Engine folders: config.json describes the weights in model.safetensors.
#include <tda/error.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "base/json.h"
#include "checkpoint/checkpoint.h"

namespace tda {
namespace {

using nlohmann::json;

/// The object that config.json has under PackedWeights::kKey.
class Description {
 public:
  Description(const std::string& file, const json& object) : file_(file), object_(object) {}

  std::int64_t layout() const {
    const std::int64_t layout = positive("layout");
    if (layout != PackedWeights::kLayout)
      fail("layout", std::to_string(PackedWeights::kLayout) +
                         ": convert the checkpoint again with this version");
    return layout;
  }

  WeightFormat format() const {
    WeightFormat format = WeightFormat::automatic;
    try {
      format = parse_weight_format(text("weights"));
    } catch (const OptionError&) {  // stays automatic, which is rejected below
    }
    if (format == WeightFormat::automatic) fail("weights", "a format that this version knows");
    return format;
  }

  std::string fingerprint() const {
    const std::string digits = text("fingerprint");
    if (digits.size() != 16 || digits.find_first_not_of("0123456789abcdef") != digits.npos)
      fail("fingerprint", "16 hex digits");
    return digits;
  }

  std::int64_t parameters() const { return positive("parameters"); }

  std::vector<std::string> matrices() const {
    constexpr const char* expected = "a list of names";
    const json& list = field("matrices", expected);
    const auto is_text = [](const json& v) { return v.is_string(); };
    if (!list.is_array() || !std::ranges::all_of(list, is_text)) fail("matrices", expected);
    return list.get<std::vector<std::string>>();
  }

 private:
  [[noreturn]] void fail(const char* key, const std::string& expected) const {
    const bool there = object_.is_object() && object_.contains(key);
    throw CheckpointError(file_ + ": " + PackedWeights::kKey + "." + key + " is " +
                          (there ? describe(object_[key]) : "missing") + ", expected " + expected);
  }

  const json& field(const char* key, const char* expected) const {
    if (!object_.is_object() || !object_.contains(key)) fail(key, expected);
    return object_[key];
  }

  std::int64_t positive(const char* key) const {
    constexpr std::uint64_t largest = std::numeric_limits<std::int64_t>::max();
    const json& value = field(key, "an integer above 0");
    if (!value.is_number_unsigned() || value == 0 || value.get<std::uint64_t>() > largest)
      fail(key, "an integer above 0");
    return value.get<std::int64_t>();
  }

  std::string text(const char* key) const {
    const json& value = field(key, "a string");
    if (!value.is_string()) fail(key, "a string");
    return value.get<std::string>();
  }

  const std::string& file_;
  const json& object_;
};

/// Checks everything except the number of bytes, which load_model computes.
TensorView find_arena(const TensorMap& tensors, const std::string& file) {
  const auto expect = [&](bool good, const std::string& found, const std::string& expected) {
    if (!good) throw CheckpointError(file + ": " + found + ", expected " + expected);
  };
  expect(tensors.size() == 1 && tensors.begin()->first == PackedWeights::kTensor,
         "found " + std::to_string(tensors.size()) + " tensors" +
             (tensors.empty() ? "" : ", the first of them " + describe(tensors.begin()->first)),
         "\"" + std::string(PackedWeights::kTensor) + "\" alone in an engine folder");
  const TensorView& arena = tensors.begin()->second;
  expect(arena.dtype_name == "U8", "the arena has dtype " + arena.dtype_name, "U8");
  expect(arena.shape.size() == 1,
         "the arena has " + std::to_string(arena.shape.size()) + " dimensions", "1");
  const std::int64_t into_page = arena.begin % PackedWeights::kAlignment;
  expect(into_page == 0, "the arena begins " + std::to_string(into_page) + " bytes into a page",
         "data at a multiple of " + std::to_string(PackedWeights::kAlignment) + " bytes");
  return arena;
}

}  // namespace

std::optional<PackedWeights> read_packed(const std::filesystem::path& folder, const json& config) {
  const std::string file = (folder / "config.json").string();
  const auto found = config.find(PackedWeights::kKey);
  if (found == config.end()) return std::nullopt;
  const Description description(file, *found);
  description.layout();  // first: other layouts may have other rules for the rest
  PackedWeights packed;
  packed.format = description.format();
  packed.fingerprint = description.fingerprint();
  packed.parameters = description.parameters();
  if (packed.format == WeightFormat::int4) packed.matrices = description.matrices();
  const std::filesystem::path path = folder / "model.safetensors";
  packed.arena = find_arena(read_safetensors(path), path.string());
  const std::shared_ptr<const std::byte> mapping = packed.arena.file->map();
  packed.data = {mapping, mapping.get() + packed.arena.begin};
  return packed;
}

}  // namespace tda
