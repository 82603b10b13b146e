// Safetensors files, and the checkpoint folder around them.
#include <sys/resource.h>
#include <sys/stat.h>
#include <tda/error.h>

#include <algorithm>
#include <iterator>
#include <limits>
#include <memory>

#include "base/json.h"
#include "base/size.h"
#include "check.h"
#include "checkpoint/checkpoint.h"
#include "fixtures.h"

namespace {

using namespace fixtures;
using tda::CheckpointError;

std::string data_of(const tda::TensorView& tensor) {
  std::string data(tensor.bytes, '\0');
  tensor.read(0, tensor.bytes, data.data());
  return data;
}

TEST(safetensors_reads_every_kind_of_tensor) {
  Folder folder;
  const tda::TensorMap tensors =
      tda::read_safetensors(folder.write("a", with_length(R"({"__metadata__": {"k": "v"},
      "b": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [3, 7]},
      "a": {"dtype": "I8", "shape": [3], "data_offsets": [0, 3]},
      "none": {"dtype": "F32", "shape": [0, 5], "data_offsets": [7, 7]},
      "one": {"dtype": "F8_E4M3", "shape": [], "data_offsets": [7, 8]}}    )",
                                                          "abcdefgh")));
  CHECK(tensors.size() == 4);
  const tda::TensorView& b = tensors.at("b");
  CHECK(b.dtype == tda::DType::bf16 && b.dtype_name == "BF16" && b.bytes == 4);
  CHECK((b.shape == std::vector<std::int64_t>{1, 2}));
  CHECK(data_of(b) == "defg");
  CHECK(tensors.at("a").dtype == tda::DType::other);
  CHECK(tensors.at("none").bytes == 0);
  CHECK(tensors.at("one").bytes == 1);
}

TEST(safetensors_refuses_files_that_are_none) {
  Folder folder;
  const auto opened = [](const fs::path& path) { return tda::read_safetensors(path); };
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
      {R"({"__metadata__": {"k": 1}})", "__metadata__ is an object, expected an object of strings"},
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
      {R"({"a": {"dtype": "U8", "shape": [1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,8], "data_offsets": [0, 8]}})",
       "shape has 17 dimensions, expected at most 16"},
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
    CHECK_THROWS(tda::read_safetensors(folder.write("a", with_length(c.header, "12345678"))),
                 CheckpointError, c.message);
  const std::string deep(1'000'000, '[');
  CHECK_THROWS(tda::read_safetensors(folder.write("a", with_length("{\"a\": " + deep, ""))),
               CheckpointError, "JSON has more than 64 levels");
}

TEST(sizes_do_not_wrap_around) {
  using tda::Size;
  constexpr std::int64_t most = std::numeric_limits<std::int64_t>::max();
  CHECK((Size(3) * 5 + 1).value() == 16 && !(Size(3) * 5).too_large());
  CHECK((Size(1) * most).value() == most);
  CHECK((Size(std::int64_t{1} << 32) * (std::int64_t{1} << 31)).too_large());
  CHECK((Size(most) + 1).too_large() && (Size(most) * 2 + 64).too_large());
  CHECK(Size(65).rounded_up(64).value() == 128 && Size(64).rounded_up(64).value() == 64);
  CHECK(Size(0).rounded_up(64).value() == 0 && Size(most - 1).rounded_up(64).too_large());
}

TEST(json_within_limits) {
  Folder folder;
  const auto parsed = [](const std::string& text) { return tda::parse_json_object(text, "file"); };
  const auto nested = [](int levels) {  // including the object itself
    return "{\"a\": " + std::string(levels - 1, '[') + std::string(levels - 1, ']') + "}";
  };
  CHECK(parsed(nested(tda::kMaxJsonDepth)).size() == 1);
  CHECK_THROWS(parsed(nested(tda::kMaxJsonDepth + 1)), CheckpointError,
               "file: JSON has more than 64 levels");
  std::string zeros = "{\"a\": [0";
  for (int i = 3; i < tda::kMaxJsonValues; ++i) zeros += ",0";
  CHECK(parsed(zeros + "]}").at("a").size() == tda::kMaxJsonValues - 2);
  CHECK_THROWS(parsed(zeros + ",0]}"), CheckpointError, "file: JSON has more than 4194304 values");
  const fs::path large = folder.write("large", "{}");
  fs::resize_file(large, tda::kMaxJsonBytes + 1);
  CHECK_THROWS(tda::read_json_object(large), CheckpointError,
               "large: found 100000001 bytes, expected a JSON file of at most 100000000");
}

TEST(messages_quote_files_in_short) {
  Folder folder;
  const std::string name = "\\u001b[2J" + std::string(100'000, 'n');
  const auto message = [&](const std::string& header) {
    try {
      tda::read_safetensors(folder.write("a", with_length(header, "12345678")));
      return std::string("nothing thrown");
    } catch (const CheckpointError& e) {
      return std::string(e.what());
    }
  };
  for (const char* entry :
       {"5", R"({"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "a": {})",
        R"({"dtype": "U8", "shape": [4], "data_offsets": [4, 8]})"}) {
    const std::string found = message("{\"" + name + "\": " + entry + "}");
    CHECK(found.find("tensor \"") != found.npos && found.size() < 400);
    CHECK(std::all_of(found.begin(), found.end(), [](char c) { return c >= ' ' && c <= '~'; }));
  }
}

TEST(files_cut_short_while_read) {
  Folder folder;
  write_model(folder, tiny, tensors_of(tiny), "F32");
  const fs::path path = folder.path / "model.safetensors";
  const auto tensors = tda::read_safetensors(path);
  const auto last = std::max_element(tensors.begin(), tensors.end(), [](auto& a, auto& b) {
    return a.second.begin < b.second.begin;
  });
  CHECK(data_of(last->second).size() == static_cast<std::size_t>(last->second.bytes));
  const std::uintmax_t size = fs::file_size(path);
  fs::resize_file(path, size - 1);
  CHECK_THROWS(data_of(last->second), CheckpointError,
               "model.safetensors: cut short from " + std::to_string(size) + " to " +
                   std::to_string(size - 1) + " bytes while it was being read");
}

TEST(special_files_and_descriptors) {
  Folder folder;
  const auto opened = [](const fs::path& path) { return tda::read_safetensors(path); };
  const fs::path pipe = folder.path / "pipe", closed = folder.write("closed", "{}");
  CHECK(::mkfifo(pipe.c_str(), 0600) == 0);
  CHECK_THROWS(opened(pipe), CheckpointError, "pipe: not a regular file");
  CHECK_THROWS(tda::read_json_object(pipe), CheckpointError, "not a regular file, expected a JSON");

  const auto descriptors = [] {
    return std::distance(fs::directory_iterator("/proc/self/fd"), {});
  };
  const auto before = descriptors();
  for (const std::string& content :
       {std::string(), with_length("{", "x"), with_length("{\"a\": 5}", "x")})
    CHECK_THROWS(opened(folder.write("a", content)), CheckpointError, "expected");
  write_model(folder, tiny, tensors_of(tiny), "F32");
  {
    const tda::Checkpoint checkpoint(folder.path);
    CHECK(descriptors() == before + 1);  // one file, however many tensors
  }
  CHECK(descriptors() == before);

  rlimit limit;
  ::getrlimit(RLIMIT_NOFILE, &limit);
  const rlimit none = {.rlim_cur = 0, .rlim_max = limit.rlim_max};
  ::setrlimit(RLIMIT_NOFILE, &none);
  CHECK_THROWS(opened(folder.path / "model.safetensors"), CheckpointError, "Too many open files");
  ::setrlimit(RLIMIT_NOFILE, &limit);
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
  CHECK_THROWS(opened(folder.write("file", "")), CheckpointError, "or the folder of a checkpoint");
  folder.write("config.json", tiny.dump());
  CHECK_THROWS(opened(folder.path), CheckpointError, "no weights found, expected model.safeten");
}

TEST(checkpoint_joins_shards) {
  const Tensors tensors = tensors_of(tiny);
  Folder single, sharded;
  write_model(single, tiny, tensors, "F32");
  write_shards(sharded, tiny, tensors);
  // Copies share the files, so views stay valid after the object they came from is gone.
  auto original = std::make_unique<tda::Checkpoint>(sharded.path);
  const tda::Checkpoint copy = *original;
  original.reset();
  CHECK(copy.name() == sharded.path.filename().string());
  CHECK(copy.contains("lm_head.weight") && !copy.contains("lm_head.bias"));
  CHECK(copy.fingerprint() == tda::Checkpoint(single.path).fingerprint());
  const Values& values = tensors.at("lm_head.weight").values;
  CHECK(data_of(copy.tensor("lm_head.weight", {7, 72})) == encode("F32", values));

  const auto opened = [&] { return tda::Checkpoint(sharded.path); };
  const auto index = [&](const json& weight_map) {
    sharded.write("model.safetensors.index.json", json{{"weight_map", weight_map}}.dump());
  };
  index({{"lm_head.weight", "../one.safetensors"}});
  CHECK_THROWS(opened(), CheckpointError, "expected a file name without folders");
  index({{"lm_head.weight", std::string("one\0", 4)}});
  CHECK_THROWS(opened(), CheckpointError,
               "is \"one\\u0000\", expected a file name without folders");
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
  CHECK(opened().contains("lm_head.weight"));  // the single file has priority
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
