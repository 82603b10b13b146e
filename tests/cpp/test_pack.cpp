// Engine folders: packed once, then mapped and used in place.
#include <sys/wait.h>
#include <tda/engine.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <iterator>
#include <limits>
#include <set>

#include "base/atomic_file.h"
#include "check.h"
#include "fixtures.h"
#include "weights/model.h"

namespace {

using namespace fixtures;
using tda::CheckpointError;
using tda::OptionError;
using tda::WeightFormat;

constexpr WeightFormat kFormats[] = {WeightFormat::f32, WeightFormat::bf16, WeightFormat::int8,
                                     WeightFormat::graded};
const std::vector<tda::Token> kTokens = {1, 5, 0, 3, 6, 2, 4, 4};

std::string read(const fs::path& path) {
  std::ifstream stream(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), {}};
}

struct Packed {
  Folder source, folder;
  explicit Packed(const json& config = tiny, WeightFormat format = WeightFormat::int8) {
    write_model(source, config, tensors_of(config), "F32");
    tda::pack_checkpoint(source.path, folder.path, format, 2);
  }
  tda::Engine open(WeightFormat format = WeightFormat::automatic) const {
    return tda::Engine(folder.path, {.weights = format, .threads = 2});
  }
  std::string arena() const {
    const std::string file = read(folder.path / "model.safetensors");
    std::uint64_t header = 0;
    file.copy(reinterpret_cast<char*>(&header), 8);
    return file.substr(8 + header);
  }
  void write_arena(const json& header, const std::string& data, std::size_t page = 4096) const {
    std::string text = header.dump();
    while ((8 + text.size()) % page != 0) text += ' ';
    folder.write("model.safetensors", with_length(text, data));
  }
};

json header_of(const std::string& data, const std::string& dtype = "U8") {
  return {
      {"arena", {{"dtype", dtype}, {"shape", {data.size()}}, {"data_offsets", {0, data.size()}}}}};
}

std::vector<json> variants() {
  return {tiny, updated(tiny, {{"attention_bias", true}, {"tie_word_embeddings", true}}),
          updated(tiny, {{"model_type", "qwen2"}, {"architectures", nullptr}}),
          updated(tiny, {{"model_type", "qwen3"}, {"architectures", nullptr}, {"head_dim", 12}})};
}

void check_same(const tda::Engine& expected, const tda::Engine& found) {
  CHECK(found.weights() == expected.weights() && found.kv() == expected.kv());
  CHECK(found.fingerprint() == expected.fingerprint());
  CHECK(found.parameters() == expected.parameters());
  CHECK(found.weight_bytes() == expected.weight_bytes());
  const std::vector<float> logits = expected.logits(kTokens);
  for (const float logit : logits) CHECK(std::isfinite(logit));
  CHECK(std::set<float>(logits.begin(), logits.end()).size() > kTokens.size());
  CHECK(found.logits(kTokens) == logits);
  tda::TdaOptions tda;
  if (expected.weights() == WeightFormat::graded) {
    tda.inputs = 0.5;
  } else {
    tda.scope = tda::Scope::token;
    tda.active = 0.5;
  }
  CHECK(found.score(kTokens, 4, tda).log_probabilities ==
        expected.score(kTokens, 4, tda).log_probabilities);
}

TEST(packed_weights_compute_the_same_bits) {
  for (const json& config : variants()) {
    for (const WeightFormat format : kFormats) {
      const Packed packed(config, format);
      const tda::Engine expected(packed.source.path, {.weights = format, .threads = 2});
      check_same(expected, packed.open());
      check_same(expected, packed.open(format));
    }
  }
}

TEST(a_folder_serves_several_engines_and_outlives_its_files) {
  const Packed packed;
  const tda::Engine expected(packed.source.path, {.weights = WeightFormat::int8});
  const tda::Engine first = packed.open(), second = packed.open();
  fs::remove(packed.folder.path / "model.safetensors");
  check_same(expected, first);
  check_same(expected, second);
}

/// Runs `body` in a child process. Returns the signal that ended it, or 0 if it returned.
template <class Body>
int signal_of(const Body& body) {
  const pid_t child = ::fork();
  if (child == 0) {
    std::signal(SIGBUS, SIG_DFL);  // sanitizers install handlers
    body();
    ::_exit(0);
  }
  int status = 0;
  CHECK(::waitpid(child, &status, 0) == child);
  return WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status);
}

TEST(an_engine_folder_may_be_replaced_but_not_cut_short_while_in_use) {
  const auto after = [](const auto& change) {
    const Packed packed;
    return signal_of([&] {
      const tda::Engine engine(packed.folder.path, {.threads = 1});
      change(packed.folder.path / "model.safetensors");
      engine.logits(kTokens);
    });
  };
  CHECK(after([](const fs::path&) {}) == 0);
  CHECK(after([](const fs::path& file) {
          std::ofstream(file.string() + ".new") << "another";
          fs::rename(file.string() + ".new", file);
        }) == 0);
  // The documented limit of File::map, which a reader of a mapping cannot avoid.
  CHECK(after([](const fs::path& file) { fs::resize_file(file, 4096); }) == SIGBUS);
}

TEST(what_is_packed_depends_on_the_checkpoint_alone) {
  for (const WeightFormat format : kFormats) {
    const Packed packed(tiny, format);
    const std::string file = read(packed.folder.path / "model.safetensors");
    CHECK((file.size() - packed.arena().size()) % 4096 == 0);
    for (const fs::path& source : {packed.source.path, packed.folder.path}) {
      const Folder again;
      tda::pack_checkpoint(source, again.path, format, 1);
      CHECK(read(again.path / "model.safetensors") == file);
      CHECK(read(again.path / "config.json") == read(packed.folder.path / "config.json"));
    }
  }
}

TEST(config_keeps_its_own_keys) {
  const Packed packed(updated(tiny, {{"of_others", {1, "ü", 1e-5}}}));
  json config = json::parse(read(packed.folder.path / "config.json"));
  const json ours = config.at("tdaengine");
  CHECK(ours.at("layout") == 8 && ours.at("weights") == "int8");
  CHECK(ours.at("fingerprint") == packed.open().fingerprint());
  config.erase("tdaengine");
  CHECK(config == json::parse(read(packed.source.path / "config.json")));
}

TEST(packed_weights_keep_their_format) {
  const Packed packed;
  for (const WeightFormat format : {WeightFormat::f32, WeightFormat::bf16}) {
    CHECK_THROWS(packed.open(format), OptionError,
                 "weights is \"" + std::string(tda::name_of(format)) + "\", but ");
    CHECK_THROWS(packed.open(format), OptionError, "is packed as int8, expected that or auto");
  }
  const Folder other;
  CHECK_THROWS(tda::pack_checkpoint(packed.folder.path, other.path, WeightFormat::f32), OptionError,
               "is packed as int8");
  CHECK(fs::is_empty(other.path));
}

TEST(damaged_weights_are_refused) {
  const Packed packed;
  const std::string data = packed.arena(), bytes = std::to_string(data.size());
  const auto refuses = [&](const std::string& message) {
    CHECK_THROWS(packed.open(), CheckpointError, message);
    CHECK_THROWS(packed.open(), CheckpointError, "model.safetensors: ");
  };
  const json header = header_of(data);
  packed.write_arena(header, data);
  packed.open();

  packed.write_arena(header, data.substr(1));
  refuses("data_offsets are 0 to " + bytes);
  packed.write_arena(header, data + "x");
  refuses("the tensors end at byte " + bytes);
  for (const std::string& other : {data.substr(64), data + std::string(64, 'x'), std::string()}) {
    packed.write_arena(header_of(other), other);
    refuses("the arena has " + std::to_string(other.size()) + " bytes, expected " + bytes);
  }
  packed.write_arena(header_of(data, "I8"), data);
  refuses("the arena has dtype I8, expected U8");
  json shaped = header;
  shaped["arena"]["shape"] = {1, data.size()};
  packed.write_arena(shaped, data);
  refuses("the arena has 2 dimensions, expected 1");
  packed.write_arena(header, data, 512 + 64);
  refuses("bytes into a page, expected data at a multiple of 4096 bytes");

  packed.write_arena(json::object(), "");
  refuses("found 0 tensors, expected \"arena\" alone");
  json named = {{"areno", header["arena"]}};
  packed.write_arena(named, data);
  refuses("found 1 tensors, the first of them \"areno\", expected \"arena\" alone");
  json crowded = header;
  crowded["b"] = {{"dtype", "U8"}, {"shape", {0}}, {"data_offsets", {data.size(), data.size()}}};
  packed.write_arena(crowded, data);
  refuses("found 2 tensors");
  fs::remove(packed.folder.path / "model.safetensors");
  refuses("No such file");
}

/// Otherwise fuzzing never gets past the first check. To renew: tests/fuzz/make_corpus.py.
TEST(the_fuzz_corpus_has_engine_folders_of_this_layout) {
  for (const char* name : {"f32", "bf16", "int8", "int4", "bf16c", "graded", "ordered"}) {
    const std::string seed =
        read(fs::path(TDA_CORPUS) / "folder" / ("packed_" + std::string(name)));
    const std::size_t zero = seed.find('\0');
    const Folder folder;
    folder.write("config.json", seed.substr(0, zero));
    folder.write("model.safetensors", seed.substr(zero + 1));
    const tda::Engine engine(folder.path, {.threads = 1});
    CHECK(tda::name_of(engine.weights()) == (name == std::string("ordered") ? "int4" : name));
    CHECK(std::isfinite(engine.logits(std::vector<tda::Token>{1})[0]));
  }
}

TEST(a_config_that_does_not_fit_is_refused) {
  const Packed packed;
  const json config = json::parse(read(packed.folder.path / "config.json"));
  const auto refuses = [&](const json& changed, const std::string& message) {
    packed.folder.write("config.json", changed.dump());
    CHECK_THROWS(packed.open(), CheckpointError, message);
  };
  struct Case {
    const char* key;
    json value;  // null: without the key
    const char* message;
  };
  const Case cases[] = {
      {"layout", 2, "config.json: tdaengine.layout is 2, expected 8: convert"},
      {"layout", "3", "tdaengine.layout is \"3\", expected an integer above 0"},
      {"layout", nullptr, "tdaengine.layout is missing, expected an integer above 0"},
      {"weights", "int3", "tdaengine.weights is \"int3\", expected a format that"},
      {"weights", "auto", "tdaengine.weights is \"auto\", expected a format that"},
      {"weights", 8, "tdaengine.weights is 8, expected a string"},
      {"weights", "bf16", "the arena has"},
      {"fingerprint", "0123", "tdaengine.fingerprint is \"0123\", expected 16 hex digits"},
      {"fingerprint", "0123456789ABCDEF", "expected 16 hex digits"},
      {"fingerprint", nullptr, "tdaengine.fingerprint is missing, expected a string"},
      {"parameters", 0, "tdaengine.parameters is 0, expected an integer above 0"},
      {"parameters", -3, "tdaengine.parameters is -3, expected an integer above 0"},
      {"parameters", 1ull << 63, "tdaengine.parameters is 9223372036854775808, expected"},
      {"parameters", 1.5, "tdaengine.parameters is 1.5, expected an integer above 0"},
  };
  for (const Case& c : cases) {
    json changed = config;
    if (c.value.is_null())
      changed["tdaengine"].erase(c.key);
    else
      changed["tdaengine"][c.key] = c.value;
    refuses(changed, c.message);
  }
  refuses(updated(config, {{"tdaengine", 1}}), "tdaengine.layout is missing");
  refuses(updated(config, {{"vocab_size", 800}}), "by config.json");
  json unmarked = config;
  unmarked.erase("tdaengine");
  refuses(unmarked, "tensor \"model.embed_tokens.weight\" is missing");
}

TEST(outliers_are_packed_and_their_columns_checked) {
  Folder source, folder;
  Tensors tensors = tensors_of(tiny);
  std::vector<float>& down = tensors.at("model.layers.1.mlp.down_proj.weight").values;
  std::fill(down.begin(), down.end(), 0.01f);
  down[0] = 0.75f;  // of neuron 0
  write_model(source, tiny, tensors, "F32");
  tda::pack_checkpoint(source.path, folder.path, WeightFormat::int8, 2);
  const std::vector<tda::Token> prompt = {1, 5, 3};
  const auto options = tda::EngineOptions{.weights = WeightFormat::int8, .threads = 1};
  CHECK(tda::Engine(folder.path, options).logits(prompt) ==
        tda::Engine(source.path, options).logits(prompt));

  std::string file = read(folder.path / "model.safetensors");
  const tda::Outlier outlier = {0, 0.75f}, wrong = {1000, 0.75f};
  const std::size_t at = file.find(std::string(reinterpret_cast<const char*>(&outlier), 8), 4096);
  CHECK(at != std::string::npos);
  file.replace(at, 8, reinterpret_cast<const char*>(&wrong), 8);
  folder.write("model.safetensors", file);
  CHECK_THROWS(tda::Engine(folder.path, options), CheckpointError,
               "layer 1, neuron 0 has an outlier in column 1000, expected 0 to ");
}

TEST(what_is_read_back_differs_from_what_was_written) {
  const Folder folder;
  const fs::path path = folder.path / "file";
  const std::string long_part(3 << 20, 'x');
  const auto expect = [&] { tda::expect_contents(path, {"head", "", long_part, "tail"}); };
  tda::write_file_atomically(path, {"head", "", long_part, "tail"});
  expect();
  const std::string written = read(path);
  CHECK(written == "head" + long_part + "tail");
  for (const std::size_t at : {std::size_t{0}, std::size_t{2 << 20}, written.size() - 1}) {
    std::string other = written;
    other[at] ^= 1;
    folder.write("file", other);
    CHECK_THROWS(expect(), CheckpointError, "when read back, expected what was written");
  }
  folder.write("file", written + "x");
  CHECK_THROWS(expect(), CheckpointError, "3145737 bytes instead of 3145736");
}

TEST(packing_writes_nothing_where_it_cannot_write_all) {
  const Packed packed;
  const Folder empty;
  CHECK_THROWS(tda::pack_checkpoint(packed.source.path, empty.path / "absent"), OptionError,
               "absent: no such folder");
  const std::string before = read(packed.source.path / "config.json");
  CHECK_THROWS(tda::pack_checkpoint(packed.source.path, packed.source.path), OptionError,
               "found config.json, expected a folder without");
  CHECK(read(packed.source.path / "config.json") == before);

  Tensors tensors = tensors_of(tiny);
  tensors.at("model.norm.weight").values[3] = std::numeric_limits<float>::quiet_NaN();
  write_model(packed.source, tiny, tensors, "F32");
  CHECK_THROWS(tda::pack_checkpoint(packed.source.path, empty.path), CheckpointError,
               "holds NaN or infinity");
  CHECK(fs::is_empty(empty.path));
}

}  // namespace

TEST(kinds_of_int4_matrices_are_checked) {
  const Packed packed(tiny, WeightFormat::int4);
  const json config = json::parse(read(packed.folder.path / "config.json"));
  // The embedding and four matrices of each of two layers.
  std::vector<std::string> kinds(9, "int4");
  kinds[0] = "graded";
  CHECK(config.at("tdaengine").at("matrices") == json(kinds));
  CHECK(packed.open().weights() == WeightFormat::int4);
  const auto refuses = [&](const json& matrices, const std::string& message) {
    json changed = config;
    changed["tdaengine"]["matrices"] = matrices;
    packed.folder.write("config.json", changed.dump());
    CHECK_THROWS(packed.open(), CheckpointError, message);
  };
  refuses(nullptr, "config.json: tdaengine.matrices is null, expected a list of names");
  refuses({"int4", 4}, "tdaengine.matrices is ");
  refuses(std::vector<std::string>(8, "int4"), "tdaengine.matrices has 8 names, expected 9");
  refuses(std::vector<std::string>(10, "int4"), "tdaengine.matrices has 10 names, expected 9");
  refuses(std::vector<std::string>(9, "int5"),
          "matrices[0] is \"int5\", expected \"graded\", \"int4\" or \"lines\"");
  for (const std::size_t i : {0, 4, 8}) {  // the embedding, and down
    std::vector<std::string> ordered = kinds;
    ordered[i] = "ordered lines";
    refuses(ordered, "] is \"ordered lines\", expected \"graded\", \"int4\" or \"lines\"");
  }
  for (const std::size_t i : {1, 2, 3}) {
    std::vector<std::string> unknown = kinds;
    unknown[i] = "ordered";
    refuses(unknown, "or \"lines\" or \"ordered lines\"");
  }
  refuses(std::vector<std::string>(9, "lines"), " bytes, expected ");
  kinds[0] = "lines";
  refuses(kinds, " bytes, expected ");
}

int main() { return run_tests(); }
