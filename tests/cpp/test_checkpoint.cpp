// Safetensors files, and the checkpoint folder around them.
#include <tda/error.h>

#include <cstring>
#include <memory>

#include "check.h"
#include "checkpoint/checkpoint.h"
#include "fixtures.h"

namespace {

using namespace fixtures;
using tda::CheckpointError;

TEST(safetensors_reads_every_kind_of_tensor) {
  Folder folder;
  const tda::SafetensorsFile file(folder.write("a", with_length(R"({"__metadata__": {"k": "v"},
      "b": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [3, 7]},
      "a": {"dtype": "I8", "shape": [3], "data_offsets": [0, 3]},
      "none": {"dtype": "F32", "shape": [0, 5], "data_offsets": [7, 7]},
      "one": {"dtype": "F8_E4M3", "shape": [], "data_offsets": [7, 8]}}    )",
                                                                "abcdefgh")));
  CHECK(file.tensors().size() == 4);
  const tda::TensorView& b = file.tensors().at("b");
  CHECK(b.dtype == tda::DType::bf16 && b.dtype_name == "BF16" && b.bytes == 4);
  CHECK((b.shape == std::vector<std::int64_t>{1, 2}));
  CHECK(std::memcmp(b.data, "defg", 4) == 0);
  CHECK(file.tensors().at("a").dtype == tda::DType::other);
  CHECK(file.tensors().at("none").bytes == 0);
  CHECK(file.tensors().at("one").bytes == 1);
}

TEST(safetensors_refuses_files_that_are_none) {
  Folder folder;
  const auto opened = [](const fs::path& path) { return tda::SafetensorsFile(path); };
  CHECK_THROWS(opened(folder.path / "absent"), CheckpointError, "absent: No such file");
  CHECK_THROWS(opened(folder.path), CheckpointError, "found a folder");
  CHECK_THROWS(opened(folder.write("a", "")), CheckpointError, "found 0 bytes");
  CHECK_THROWS(opened(folder.write("a", "1234567")), CheckpointError, "found 7 bytes");
  CHECK_THROWS(opened(folder.write("a", std::string(7, '\0') + "\x80")), CheckpointError,
               "header length is 9223372036854775808, expected at most 0");
  CHECK_THROWS(opened(folder.write("a", std::string("\x03\0\0\0\0\0\0\0{}", 10))), CheckpointError,
               "header length is 3, expected at most 2");
  const fs::path large = folder.write("large", std::string("\x01\xe1\xf5\x05\0\0\0\0", 8));
  fs::resize_file(large, 100'000'100);
  CHECK_THROWS(opened(large), CheckpointError, "100000001, expected at most 100000000");
}

TEST(safetensors_refuses_damaged_headers) {
  struct Case {
    const char* header;
    const char* message;
  };
  // 8 bytes of data each.
  const Case cases[] = {
      {"", "expected JSON"},
      {"{", "expected JSON"},
      {"\xff", "expected JSON"},
      {"[]", "found an array, expected a JSON object"},
      {R"({"__metadata__": {"k": 1}})", "__metadata__"},
      {R"({"a": {}, "a": {}})", "key \"a\" appears twice"},
      {R"({"a": {"dtype": "F32", "dtype": "F32"}})", "key \"dtype\" appears twice"},
      {R"({"a": 5})", "tensor \"a\": entry is 5"},
      {R"({"a": {"shape": [2], "data_offsets": [0, 8]}})", "dtype is missing"},
      {R"({"a": {"dtype": 7, "shape": [2], "data_offsets": [0, 8]}})", "dtype is 7"},
      {R"({"a": {"dtype": "F31", "shape": [2], "data_offsets": [0, 8]}})", "dtype is \"F31\""},
      {R"({"a": {"dtype": "F32", "data_offsets": [0, 8]}})", "shape is missing"},
      {R"({"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}})", "shape is 2"},
      {R"({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}})", "shape holds -2"},
      {R"({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}})", "shape holds 2.0"},
      {R"({"a": {"dtype": "F32", "shape": [9223372036854775808], "data_offsets": [0, 8]}})",
       "shape holds 9223372036854775808"},
      {R"({"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 8]}})",
       "shape has more than 2^63 bits"},
      {R"({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 8]}})", "part of a byte"},
      {R"({"a": {"dtype": "F32", "shape": [2]}})", "data_offsets is missing"},
      {R"({"a": {"dtype": "F32", "shape": [2], "data_offsets": "0"}})", "data_offsets is \"0\""},
      {R"({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}})", "has 1 values, expected 2"},
      {R"({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}})", "are 8 to 0"},
      {R"({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}})", "are 4 to 12"},
      {R"({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}})", "8 bytes, expected 4"},
      {R"({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
           "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}})",
       "(overlap)"},
      {R"({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}})", "(hole)"},
      {R"({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})", "end at byte 4"},
      {"{}", "end at byte 0"},
  };
  Folder folder;
  for (const Case& c : cases)
    CHECK_THROWS(tda::SafetensorsFile(folder.write("a", with_length(c.header, "12345678"))),
                 CheckpointError, c.message);
  const std::string deep(1'000'000, '[');
  CHECK_THROWS(tda::SafetensorsFile(folder.write("a", with_length("{\"a\": " + deep, ""))),
               CheckpointError, "expected JSON");
}

/// Every other tensor goes to another shard.
void write_shards(const Folder& folder, const json& config, const Tensors& tensors) {
  Tensors shards[2];
  json weight_map;
  int i = 0;
  for (const auto& [name, tensor] : tensors) {
    shards[i].emplace(name, tensor);
    weight_map[name] = i == 0 ? "one.safetensors" : "two.safetensors";
    i = 1 - i;
  }
  folder.write("config.json", config.dump());
  folder.write("one.safetensors", safetensors(shards[0], "F32"));
  folder.write("two.safetensors", safetensors(shards[1], "F32"));
  folder.write("model.safetensors.index.json", json{{"weight_map", weight_map}}.dump());
}

TEST(checkpoint_names_what_is_missing) {
  Folder folder;
  const auto opened = [](const fs::path& path) { return tda::Checkpoint(path); };
  CHECK_THROWS(opened(folder.path / "no"), CheckpointError, "no such folder");
  CHECK_THROWS(opened(folder.write("file", "")), CheckpointError, "found a file");
  folder.write("config.json", tiny.dump());
  CHECK_THROWS(opened(folder.path), CheckpointError, "no weights found, expected model.safeten");
}

TEST(checkpoint_joins_shards) {
  const Tensors tensors = tensors_of(tiny);
  Folder single, sharded;
  write_model(single, tiny, tensors, "F32");
  write_shards(sharded, tiny, tensors);
  // Copies and moves share the mapping: the views outlive the object they come from.
  auto original = std::make_unique<tda::Checkpoint>(sharded.path);
  const tda::Checkpoint copy = *original;
  original.reset();
  CHECK(copy.name() == sharded.path.filename().string());
  CHECK(copy.contains("lm_head.weight") && !copy.contains("lm_head.bias"));
  CHECK(copy.fingerprint() == tda::Checkpoint(single.path).fingerprint());
  const Values& values = tensors.at("lm_head.weight").values;
  CHECK(std::memcmp(copy.tensor("lm_head.weight", {7, 72}).data, values.data(), 7 * 72 * 4) == 0);

  const auto opened = [&] { return tda::Checkpoint(sharded.path); };
  const auto index = [&](const json& weight_map) {
    sharded.write("model.safetensors.index.json", json{{"weight_map", weight_map}}.dump());
  };
  index({{"lm_head.weight", "../one.safetensors"}});
  CHECK_THROWS(opened(), CheckpointError, "expected a file name without folders");
  index({{"lm_head.weight", "three.safetensors"}});
  CHECK_THROWS(opened(), CheckpointError, "three.safetensors: No such file");
  index({{"lm_head.bias", "one.safetensors"}});
  CHECK_THROWS(opened(), CheckpointError, "one.safetensors: tensor \"lm_head.bias\" is missing");
  index({{"lm_head.weight", "one.safetensors"}, {"model.norm.weight", "copy.safetensors"}});
  fs::copy_file(sharded.path / "one.safetensors", sharded.path / "copy.safetensors");
  CHECK_THROWS(opened(), CheckpointError, "is also in");
  index(json::object());
  CHECK_THROWS(opened(), CheckpointError, "weight_map is missing or empty");
  sharded.write("model.safetensors", safetensors(tensors, "F32"));
  CHECK(opened().contains("lm_head.weight"));  // the single file goes first
}

TEST(fingerprint_tells_models_apart) {
  const Tensors tensors = tensors_of(tiny);
  const auto fingerprint = [](const Tensors& t, const std::string& dtype) {
    Folder folder;
    write_model(folder, tiny, t, dtype);
    return tda::Checkpoint(folder.path).fingerprint();
  };
  const std::string original = fingerprint(tensors, "F32");
  CHECK(original.size() == 16 && original.find_first_not_of("0123456789abcdef") == original.npos);
  CHECK(original == fingerprint(tensors, "F32"));
  Folder relabel;  // the same bytes and shapes, another dtype
  relabel.write("config.json", tiny.dump());
  relabel.write("model.safetensors", relabelled(safetensors(tensors, "F32"), "\"F32\"", "\"I32\""));
  CHECK(original != tda::Checkpoint(relabel.path).fingerprint());
  Tensors changed = tensors;
  changed.at("model.norm.weight").values[5] += 1;
  CHECK(original != fingerprint(changed, "F32"));
  changed = tensors;
  changed.at("model.embed_tokens.weight").shape = {72, 7};
  CHECK(original != fingerprint(changed, "F32"));
  changed = tensors;
  changed.emplace("extra", pattern({2}));
  CHECK(original != fingerprint(changed, "F32"));
}

}  // namespace

int main() { return run_tests(); }
