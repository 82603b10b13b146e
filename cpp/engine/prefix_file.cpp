// The file of a PrefixCache: the length of a JSON object in 8 bytes, little-endian; the object, which
// names the model, counts what follows and has its checksum; and of each prompt, one after the other,
// tokens i32 [T], rows [T] and statistics f64 [K, 1 + L * F].
#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string>

#include "base/atomic_file.h"
#include "base/file.h"
#include "base/hash.h"
#include "base/json.h"
#include "base/size.h"
#include "engine/prefixes.h"

namespace tda {
namespace {

using nlohmann::json;

constexpr const char* kFormat = "tdaengine-prefix-cache";
constexpr std::int64_t kVersion = 1;
constexpr std::int64_t kMaxHeader = 1 << 24;

template <class T>
void append(std::string& data, const T* values, std::size_t count) {
  data.append(reinterpret_cast<const char*>(values), count * sizeof(T));
}

std::string data_of(const std::vector<std::shared_ptr<const Prefix>>& prefixes) {
  std::string data;
  for (const auto& each : prefixes) {
    append(data, each->tokens.data(), each->tokens.size());
    append(data, each->rows.data(), each->rows.size());
    for (const Statistic& statistic : each->statistics) {
      append(data, &statistic.tokens, 1);
      append(data, statistic.sums.data(), statistic.sums.size());
    }
  }
  return data;
}

/// Reads a file that may hold anything.
class Reader {
 public:
  explicit Reader(const std::filesystem::path& path) : file_(path, "a prefix cache's file") {
    std::uint64_t length = 0;
    if (file_.bytes() < std::int64_t{sizeof length}) fail("no header", "a prefix cache's file");
    file_.read(0, sizeof length, &length);
    at_ = sizeof length;
    if (length > std::min<std::uint64_t>(kMaxHeader, file_.bytes() - at_))
      fail("a header of " + std::to_string(length) + " bytes",
           "at most the file's " + std::to_string(file_.bytes()));
    std::string text(length, '\0');
    file_.read(at_, static_cast<std::int64_t>(length), text.data());
    at_ += static_cast<std::int64_t>(length);
    header_ = parse_json_object(text, file_.name());
    if (string("format") != kFormat)
      fail("format " + describe(header_["format"]), std::string("\"") + kFormat + '"');
    if (integer("version") != kVersion)
      fail("version " + std::to_string(integer("version")), std::to_string(kVersion));
  }

  PrefixOwner owner() const {
    return {string("fingerprint"), string("weights"),      string("kv"),
            string("device"),      integer("token_bytes"), integer("statistic_size")};
  }

  std::vector<std::shared_ptr<const Prefix>> prefixes(std::int64_t limit) {
    const json& prompts = at(header_, "prompts");
    if (!prompts.is_array()) fail("prompts: " + describe(prompts), "an array");
    const PrefixOwner model = owner();
    const Size of_statistic = (Size(1) + model.statistic_size) * sizeof(double);
    Size bytes = 0;
    for (const json& prompt : prompts)
      bytes = bytes +
              Size(integer(prompt, "tokens", 1)) * (Size(sizeof(Token)) + model.token_bytes) +
              Size(integer(prompt, "statistics", 0)) * of_statistic;
    if (bytes.value() != file_.bytes() - at_)
      fail(std::to_string(file_.bytes() - at_) + " bytes of prompts",
           std::to_string(bytes.value()));
    if (bytes.value() > limit)
      throw OptionError(file_.name() + ": found prompts of " + std::to_string(bytes.value()) +
                        " bytes, expected at most the prefix cache's limit of " +
                        std::to_string(limit));
    std::vector<std::shared_ptr<const Prefix>> result;
    for (const json& prompt : prompts) result.push_back(prefix(prompt, model));
    if (hash_.hex() != string("checksum"))
      fail("data of checksum " + hash_.hex(), describe(header_["checksum"]));
    return result;
  }

 private:
  std::shared_ptr<const Prefix> prefix(const json& prompt, const PrefixOwner& model) {
    auto result = std::make_shared<Prefix>();
    result->tokens.resize(integer(prompt, "tokens", 1));
    result->rows.resize(result->tokens.size() * model.token_bytes);
    result->statistics.resize(integer(prompt, "statistics", 0));
    result->estimate = estimate(prompt);
    read(result->tokens.data(), std::ssize(result->tokens) * std::int64_t{sizeof(Token)});
    read(result->rows.data(), std::ssize(result->rows));
    for (Statistic& statistic : result->statistics) {
      statistic.sums.resize(model.statistic_size);
      read(&statistic.tokens, sizeof(double));
      read(statistic.sums.data(), model.statistic_size * std::int64_t{sizeof(double)});
    }
    return result;
  }

  Estimate estimate(const json& prompt) const {
    for (const Estimate each : {Estimate::contribution, Estimate::hidden, Estimate::gate})
      if (string("estimate", prompt) == name_of(each)) return each;
    fail("estimate: " + describe(prompt["estimate"]), "\"contribution\", \"hidden\" or \"gate\"");
  }

  void read(void* to, std::int64_t bytes) {
    file_.read(at_, bytes, to);
    hash_.add(to, bytes);
    at_ += bytes;
  }

  [[noreturn]] void fail(const std::string& found, const std::string& expected) const {
    throw CheckpointError(file_.name() + ": found " + found + ", expected " + expected);
  }
  const json& at(const json& object, const char* key) const {
    if (!object.is_object() || !object.contains(key)) fail("no " + std::string(key), "one");
    return object[key];
  }
  std::string string(const char* key) const { return string(key, header_); }
  std::string string(const char* key, const json& object) const {
    const json& value = at(object, key);
    // Messages quote some of them.
    const auto is_plain = [](const std::string& text) {
      return text.size() <= 64 &&
             std::ranges::all_of(text, [](char c) { return c >= ' ' && c <= '~'; });
    };
    if (!value.is_string() || !is_plain(value.get_ref<const std::string&>()))
      fail(std::string(key) + ": " + describe(value), "a string of at most 64 ASCII characters");
    return value.get<std::string>();
  }
  std::int64_t integer(const char* key) const { return integer(header_, key, 0); }
  std::int64_t integer(const json& object, const char* key, std::int64_t least) const {
    constexpr std::int64_t kMost = std::int64_t{1} << 40;  // more than any memory holds
    const json& value = at(object, key);
    if (!value.is_number_integer() || value < least || value > kMost)
      fail(std::string(key) + ": " + describe(value),
           std::to_string(least) + " to " + std::to_string(kMost));
    return value.get<std::int64_t>();
  }

  File file_;
  std::int64_t at_ = 0;  // read so far
  Hash hash_;
  json header_;
};

}  // namespace

void PrefixCache::save(const std::filesystem::path& path) const {
  const auto prefixes = impl_->prefixes();
  if (prefixes.empty())
    throw OptionError("prefix_cache: found no prompts to save, expected one or more");
  const PrefixOwner model = impl_->owner();
  const std::string data = data_of(prefixes);
  Hash hash;
  hash.add(data.data(), std::ssize(data));
  json header = {{"format", kFormat},
                 {"version", kVersion},
                 {"fingerprint", model.fingerprint},
                 {"weights", model.weights},
                 {"kv", model.kv},
                 {"device", model.device},
                 {"token_bytes", model.token_bytes},
                 {"statistic_size", model.statistic_size},
                 {"prompts", json::array()},
                 {"checksum", hash.hex()}};
  for (const auto& each : prefixes)
    header["prompts"].push_back({{"tokens", each->tokens.size()},
                                 {"estimate", name_of(each->estimate)},
                                 {"statistics", each->statistics.size()}});
  const std::string text = header.dump();
  const std::uint64_t length = text.size();
  write_file_atomically(path,
                        {{reinterpret_cast<const char*>(&length), sizeof length}, text, data});
}

void PrefixCache::load(const std::filesystem::path& path) {
  Reader reader(path);
  const auto prefixes = reader.prefixes(limit());
  const PrefixOwner owner = reader.owner(), own = impl_->owner();
  if (!own.fingerprint.empty() && own != owner)
    throw CheckpointError(path.string() + ": found prompts of another model (" + owner.text() +
                          "), expected " + own.text());
  impl_->serve(owner);
  for (auto each = prefixes.rbegin(); each != prefixes.rend(); ++each) impl_->keep(*each);
}

}  // namespace tda
