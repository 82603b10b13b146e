#include <sys/resource.h>
#include <sys/stat.h>
#include <tda/error.h>
#include <tda/sparsity.h>
#include <unistd.h>

#include <csignal>
#include <fstream>
#include <iterator>
#include <limits>
#include <nlohmann/json.hpp>

#include "check.h"
#include "fixtures.h"

using namespace tda;
using fixtures::Folder;

namespace {

std::int64_t files_in(const Folder& folder) {
  return std::distance(std::filesystem::directory_iterator(folder.path), {});
}

Thresholds example() {
  return {.model = "smol \"quoted\" ü",
          .fingerprint = "0123456789abcdef",
          .weights = "int8",
          .error = 0.1,
          .values = {0.0f, 0.1f, 1.0f / 3.0f},
          .reached = {0.0f, 0.099f, 0.0999f},
          .source = "self-generated",
          .texts = 16,
          .tokens = 2048};
}

void check_example(const Thresholds& found) {
  const Thresholds expected = example();
  CHECK(found.model == expected.model);
  CHECK(found.fingerprint == expected.fingerprint);
  CHECK(found.weights == expected.weights);
  CHECK(found.scope == expected.scope);
  CHECK(found.bytes == expected.bytes);
  CHECK(found.error == expected.error);
  CHECK(found.values == expected.values);
  CHECK(found.reached == expected.reached);
  CHECK(found.source == expected.source);
  CHECK(found.texts == expected.texts);
  CHECK(found.tokens == expected.tokens);
}

Thresholds graded_example() {
  return {.model = "smol",
          .fingerprint = "0123456789abcdef",
          .weights = "graded",
          .inputs = {0.5f, 0.1f, 0.0f},
          .losses = {-0.001f, 0.02f, 0.2f},
          .loss_errors = {0.001f, 0.002f, 0.003f},
          .source = "texts",
          .texts = 2,
          .tokens = 2048};
}

}  // namespace

TEST(losses_round_trip) {
  const Folder folder;
  const auto path = folder.path / "thresholds.json";
  graded_example().save(path);
  const Thresholds found = Thresholds::load(path);
  CHECK(found.weights == "graded");
  CHECK(found.inputs == graded_example().inputs);
  CHECK(found.losses == graded_example().losses);
  CHECK(found.loss_errors == graded_example().loss_errors);
  CHECK(found.values.empty());
}

TEST(losses_that_contradict_each_other) {
  const Folder folder;
  const auto saved = [&](auto change) {
    Thresholds thresholds = graded_example();
    change(thresholds);
    thresholds.save(folder.path / "thresholds.json");
  };
  CHECK_THROWS(saved([](Thresholds& t) { t.inputs = {}; }), CheckpointError,
               "inputs: found none, expected one or more shares");
  CHECK_THROWS(saved([](Thresholds& t) { t.inputs[1] = 0.5f; }), CheckpointError,
               "inputs[1]: found 0.5, expected 0 or more, less than 0.5");
  CHECK_THROWS(saved([](Thresholds& t) { t.inputs[0] = 1; }), CheckpointError,
               "inputs[0]: found 1, expected 0 or more, less than 1");
  CHECK_THROWS(saved([](Thresholds& t) { t.losses.pop_back(); }), CheckpointError,
               "losses: found 2 numbers, expected 3, as many as inputs");
  CHECK_THROWS(saved([](Thresholds& t) { t.loss_errors[2] = NAN; }), CheckpointError,
               "loss_errors[2]: found nan, expected a finite number");
  CHECK_THROWS(saved([](Thresholds& t) { t.values = {1}; }), CheckpointError,
               "values: found 1 numbers, expected none for graded weights");
  CHECK_THROWS(saved([](Thresholds& t) { t.weights = "int8", t.values = t.reached = {1}; }),
               CheckpointError,
               "inputs: found 3 numbers, expected none but for graded and int4 weights");
}

TEST(thresholds_round_trip) {
  const Folder folder;
  const auto path = folder.path / "thresholds.json";
  std::ofstream(path) << "what was there before";
  example().save(path);
  check_example(Thresholds::load(path));
  CHECK(files_in(folder) == 1);
  const auto json = nlohmann::json::parse(std::ifstream(path));
  CHECK(json["format"] == "tdaengine-thresholds");
  CHECK(json["version"] == 3);
}

TEST(a_prior_round_trips) {
  const Folder folder;
  Thresholds thresholds = example();
  thresholds.prior = {0, kPriorUnit, 1, 0.25f, 12345 * kPriorUnit, 1 - kPriorUnit};
  thresholds.save(folder.path / "t");
  CHECK(Thresholds::load(folder.path / "t").prior == thresholds.prior);
  const auto json = nlohmann::json::parse(std::ifstream(folder.path / "t"));
  CHECK((json["prior"] == nlohmann::json{0, 1, 16777216, 4194304, 12345, 16777215}));
}

TEST(priors_that_are_none) {
  const Folder folder;
  const auto saved = [&](std::vector<float> prior, Scope scope = Scope::sequence) {
    Thresholds thresholds = example();
    thresholds.prior = std::move(prior);
    thresholds.scope = scope;
    thresholds.save(folder.path / "t");
  };
  const char* shape =
      "numbers, expected none, or with scope \"sequence\" as many for each of values";
  CHECK_THROWS(saved({0, 0, 0, 0}), CheckpointError, std::string("prior: found 4 ") + shape);
  CHECK_THROWS(saved({0, 0, 0}, Scope::token), CheckpointError,
               std::string("prior: found 3 ") + shape);
  CHECK_THROWS(saved({0, NAN, 0}), CheckpointError, "prior[1]: found nan, expected 0 to 16777216");
  CHECK_THROWS(saved({0, 0, -kPriorUnit}), CheckpointError, "prior[2]: found -1, expected 0 to");
  CHECK_THROWS(saved({1.5f, 0, 0}), CheckpointError, "prior[0]: found 2.51658e+07, expected");
  example().save(folder.path / "t");
  auto json = nlohmann::json::parse(std::ifstream(folder.path / "t"));
  for (const auto& [prior, found] : {std::pair{R"({"a": 1})", "an array of numbers"},
                                     {R"([1, "2", 3])", "prior[1]: found \"2\""},
                                     {"[1, 2]", "prior: found 2 numbers"},
                                     {"[1, 2, 16777220]", "prior[2]: found 1.67772e+07"}}) {
    json["prior"] = nlohmann::json::parse(prior);
    std::ofstream(folder.path / "t") << json;
    CHECK_THROWS(Thresholds::load(folder.path / "t"), CheckpointError, found);
  }
}

TEST(thresholds_of_token_scope_round_trip) {
  const Folder folder;
  Thresholds thresholds = example();
  thresholds.scope = Scope::token;
  thresholds.error = 0;
  thresholds.bytes = 0.6;
  thresholds.save(folder.path / "t");
  const Thresholds found = Thresholds::load(folder.path / "t");
  CHECK(found.scope == Scope::token && found.bytes == 0.6 && found.values == thresholds.values);
}

TEST(thresholds_of_a_model_whose_name_is_not_utf8) {
  const Folder folder;
  Thresholds thresholds = example();
  thresholds.model = "caf\xe9";
  thresholds.save(folder.path / "t");
  CHECK(Thresholds::load(folder.path / "t").model == "caf\uFFFD");
}

TEST(thresholds_load_errors) {
  const Folder folder;
  const auto path = folder.path / "thresholds.json";
  example().save(path);
  const auto good = nlohmann::json::parse(std::ifstream(path));
  const auto rejected = [&](const std::string& key, const nlohmann::json& value,
                            const std::string& found, const std::string& expected) {
    auto json = good;
    json[key] = value;
    std::ofstream(path) << json;
    for (const std::string& part : {path.string(), key, found, expected}) {
      CHECK_THROWS(Thresholds::load(path), CheckpointError, part);
    }
  };
  rejected("format", "safetensors", "\"safetensors\"", "\"tdaengine-thresholds\"");
  rejected("format", 1, "1", "a string");
  rejected("version", 2, "2", "expected 3");
  rejected("version", 2.0, "2.0", "integer");
  rejected("model", nullptr, "null", "a string");
  rejected("fingerprint", 7, "7", "a string");
  rejected("scope", "page", "\"page\"", "\"sequence\" or \"token\"");
  rejected("weights", 1, "1", "a string");
  rejected("bytes", -1, "-1", "0 or more");
  rejected("scope", true, "true", "a string");
  rejected("error", 1, "1", "less than 1");
  rejected("error", -0.5, "-0.5", "0 or more");
  rejected("error", "0.1", "\"0.1\"", "a number");
  rejected("values", 0.1, "0.1", "an array");
  rejected("values", nlohmann::json::array(), "none", "one for each layer");
  rejected("values", {0.1, "x", 0.1}, "\"x\"", "a number");
  rejected("values", {0.1, -0.1, 0.1}, "values[1]", "0 or more");
  rejected("values", {0.1, 1e39, 0.1}, "1e+39", "f32");
  rejected("reached", {0.1, 0.1}, "2 numbers", "expected 3");
  rejected("reached", {0.1, 0.1, -1}, "reached[2]", "0 or more");
  rejected("source", "books", "\"books\"", "\"texts\" or \"self-generated\"");
  rejected("texts", -1, "-1", "0 or more");
  rejected("texts", 1.5, "1.5", "integer");
  rejected("tokens", -1, "-1", "0 or more");
  rejected("tokens", 9223372036854775808u, "9223372036854775808", "64-bit integer");
  rejected("tokens", "many", "\"many\"", "integer");
  for (const auto& [key, value] : good.items()) {
    auto json = good;
    json.erase(key);
    std::ofstream(path) << json;
    CHECK_THROWS(Thresholds::load(path), CheckpointError, "\"" + key + "\"");
  }
  for (const char* text : {"", "{", "[1, 2]", "{\"values\": [1e999]}", "{} {}"}) {
    std::ofstream(path) << text;
    CHECK_THROWS(Thresholds::load(path), CheckpointError, path.string());
  }
  CHECK_THROWS(Thresholds::load(folder.path / "absent"), CheckpointError, "absent");
  CHECK_THROWS(Thresholds::load(folder.path), CheckpointError, folder.path.string());
}

TEST(thresholds_that_could_not_be_loaded_are_not_saved) {
  const Folder folder;
  Thresholds thresholds = example();
  thresholds.values[1] = std::numeric_limits<float>::quiet_NaN();
  CHECK_THROWS(thresholds.save(folder.path / "t"), CheckpointError, "values[1]: found nan");
  CHECK(files_in(folder) == 0);
}

TEST(thresholds_save_to_a_bad_place) {
  const Folder folder;
  CHECK_THROWS(example().save(folder.path / "absent" / "t"), CheckpointError, "No such file");
  std::ofstream(folder.path / "file") << "x";
  CHECK_THROWS(example().save(folder.path / "file" / "t"), CheckpointError, "Not a directory");
  std::filesystem::create_directory(folder.path / "folder");
  CHECK_THROWS(example().save(folder.path / "folder"), CheckpointError, "s a directory");
  CHECK(files_in(folder) == 2);
}

TEST(thresholds_save_to_an_unwritable_folder) {
  const Folder folder;
  ::chmod(folder.path.c_str(), 0555);
  const bool root = ::geteuid() == 0;  // root can write anywhere, so become nobody meanwhile
  if (root && ::seteuid(65534) != 0) return;
  CHECK_THROWS(example().save(folder.path / "t"), CheckpointError,
               (folder.path / "t").string() + ": cannot be written: Permission denied");
  if (root) CHECK(::seteuid(0) == 0);
  ::chmod(folder.path.c_str(), 0755);
  CHECK(files_in(folder) == 0);
}

TEST(thresholds_save_replaces_regular_files_only) {
  const Folder folder;
  const auto pipe = folder.path / "pipe", device = folder.path / "device";
  ::mkfifo(pipe.c_str(), 0666);
  std::filesystem::create_symlink("/dev/null", device);
  for (const auto& path : {pipe, device}) {
    CHECK_THROWS(example().save(path), CheckpointError,
                 path.string() + ": cannot be written: found no regular file");
  }
  CHECK(std::filesystem::is_fifo(pipe) && std::filesystem::is_character_file(device));
  const auto file = folder.path / "file";
  std::ofstream(file) << "x";
  ::chmod(file.c_str(), 0444);
  CHECK_THROWS(example().save(file), CheckpointError,
               file.string() + ": cannot be written: found a read-only file");
  CHECK(std::filesystem::file_size(file) == 1);
  CHECK(files_in(folder) == 3);
}

TEST(thresholds_save_through_symbolic_links) {
  const Folder folder;
  const auto target = folder.path / "target", link = folder.path / "link";
  std::filesystem::create_symlink("target", folder.path / "next");
  std::filesystem::create_symlink(folder.path / "next", link);
  example().save(link);  // the target is made
  check_example(Thresholds::load(target));
  std::ofstream(target) << "what was there before";
  ::chmod(target.c_str(), 0600);
  example().save(link);  // and replaced, with its permissions
  check_example(Thresholds::load(target));
  CHECK(std::filesystem::is_symlink(link) && std::filesystem::is_regular_file(target));
  CHECK(std::filesystem::status(target).permissions() == std::filesystem::perms{0600});
  std::filesystem::create_symlink("loop", folder.path / "loop");
  CHECK_THROWS(example().save(folder.path / "loop"), CheckpointError, "Too many levels");
  CHECK(files_in(folder) == 4);
}

TEST(thresholds_save_to_a_full_disk) {
  const Folder folder;
  const auto path = folder.path / "t";
  example().save(path);
  Thresholds large = example();
  large.values.assign(2000, 0.125f);
  large.reached = large.values;
  // A limit on file sizes makes a write fail halfway, like a full disk.
  rlimit before;
  ::getrlimit(RLIMIT_FSIZE, &before);
  const rlimit small = {.rlim_cur = 1000, .rlim_max = before.rlim_max};
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  ::setrlimit(RLIMIT_FSIZE, &small);
  CHECK_THROWS(large.save(path), CheckpointError, path.string() + ": cannot be written: File too");
  ::setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  CHECK(files_in(folder) == 1);
  check_example(Thresholds::load(path));
}

int main() { return run_tests(); }
