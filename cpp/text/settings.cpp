#include "text/settings.h"

#include <algorithm>
#include <charconv>
#include <tuple>

#include "text/impl.h"

namespace tda {
namespace {

/// Special tokens of the tokenizer classes that build their own stages.
const std::map<std::string, std::vector<std::pair<const char*, const char*>>> class_tokens = {
    {"LlamaTokenizer", {{"bos", "<s>"}, {"eos", "</s>"}, {"unk", "<unk>"}}},
    {"Qwen2Tokenizer",
     {{"eos", "<|endoftext|>"}, {"unk", "<|endoftext|>"}, {"pad", "<|endoftext|>"}}},
    {"GPT2Tokenizer",
     {{"bos", "<|endoftext|>"}, {"eos", "<|endoftext|>"}, {"unk", "<|endoftext|>"}}},
    {"GemmaTokenizer",
     {{"bos", "<bos>"}, {"eos", "<eos>"}, {"unk", "<unk>"}, {"pad", "<pad>"}, {"mask", "<mask>"}}},
};

}  // namespace

TokenizerSettings::File TokenizerSettings::read(const std::map<std::string, std::string>& files,
                                                const std::string& prefix, const char* name) {
  File result{prefix + name};
  const auto found = files.find(name);
  if (found == files.end()) return result;
  result.content = parse_json_object(found->second, result.name, NonFinite::as_text);
  result.is_there = true;
  // nlohmann::json sorts its keys.
  const auto note = [&](int depth, nlohmann::json::parse_event_t event, nlohmann::json& key) {
    if (event != nlohmann::json::parse_event_t::key) return true;
    if (depth == 1) result.keys.push_back(key.get<std::string>());
    if (depth == 2 && result.keys.back() == "extra_special_tokens")
      result.extra_keys.push_back(key.get<std::string>());
    return true;
  };
  std::ignore = nlohmann::json::parse(quote_non_finite(found->second), note);
  return result;
}

TokenizerSettings::TokenizerSettings(const std::map<std::string, std::string>& files,
                                     const std::string& name)
    : name_(name), config_(read(files, name, "tokenizer_config.json")) {
  for (const char* each : {"bos", "eos", "unk", "sep", "pad", "cls", "mask"})
    roles_.push_back({std::string(each) + "_token", std::nullopt});
  only_declared_ = config_.content.contains("added_tokens_decoder");
  // Without that list the folder is of an older version, which kept special tokens in a file of
  // their own.
  map_.name = name + "special_tokens_map.json";
  if (!only_declared_) map_ = read(files, name, "special_tokens_map.json");
  const auto json = files.find("tokenizer.json");
  // Llama 3's files name Llama 2's class, too.
  find_class(read(files, name, "config.json"),
             json != files.end() && json->second.find("\"ByteLevel\"") != std::string::npos);
  if (const auto own = class_tokens.find(class_); own != class_tokens.end())
    for (const auto& [kind, token] : own->second)
      role(std::string(kind) + "_token").token = AddedToken{.text = token, .special = true};
  for (const File* file : {&config_, &map_}) {
    read_roles(*file);
    read_extra(*file);
  }
  if (only_declared_)
    read_declared();
  else
    read_added_tokens(read(files, name, "added_tokens.json"));
}

void TokenizerSettings::find_class(const File& model, bool is_byte_level) {
  const auto text = [](const File& file, const char* key) {
    const Field value = Field(&file.content, file.name)[key];
    return value.is_absent() ? "" : value.text();
  };
  class_ = text(config_, "tokenizer_class");
  if (class_.empty()) class_ = text(model, "tokenizer_class");
  if (class_.ends_with("Fast")) class_.resize(class_.size() - 4);
  const std::string type = text(model, "model_type");
  if (type == "qwen2" || (type == "qwen3" && class_.empty())) class_ = "Qwen2Tokenizer";
  if (type == "mistral" || !class_tokens.contains(class_) ||
      (class_ == "LlamaTokenizer" && is_byte_level))
    class_.clear();
}

TokenizerSettings::Role& TokenizerSettings::role(const std::string& name) {
  const auto found = std::find_if(roles_.begin(), roles_.end(),
                                  [&](const Role& each) { return each.name == name; });
  return found != roles_.end() ? *found : roles_.emplace_back(Role{name, std::nullopt});
}

void TokenizerSettings::read_role(const std::string& name, const Field& token) {
  Role& own = role(name);
  own.is_stated = true;
  own.token.reset();
  if (!token.is_absent()) own.token = AddedToken::read(token, true);
}

void TokenizerSettings::read_roles(const File& file) {
  const Field all(&file.content, file.name);
  for (const std::string& key : file.keys)
    if (key.ends_with("_token") && key != "add_bos_token" && key != "add_eos_token" &&
        !all.object()[key].is_boolean())
      read_role(key, all[key]);
  if (const Field extra = all["extra_special_tokens"]; extra.is_object())
    for (const std::string& key : file.extra_keys) read_role(key, extra[key]);
}

void TokenizerSettings::read_extra(const File& file) {
  const Field all(&file.content, file.name);
  for (const char* key : {"extra_special_tokens", "additional_special_tokens"}) {
    const Field tokens = all[key];
    if (tokens.is_absent() || (tokens.is_array() && tokens.elements().empty())) continue;
    if (tokens.is_object()) {
      if (tokens.object().empty()) continue;
      return;  // they have roles
    }
    for (const Field& token : tokens.elements()) extra_.push_back(AddedToken::read(token, true));
    return;
  }
}

/// added_tokens_decoder: id to token.
void TokenizerSettings::read_declared() {
  const Field entries = Field(&config_.content, config_.name)["added_tokens_decoder"];
  for (const auto& [key, value] : entries.object().items()) {
    const Field entry = entries[key];
    Token id = -1;
    const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), id);
    if (error != std::errc() || end != key.data() + key.size() || id < 0 || id >= Field::max_tokens)
      entry.fail("a token id as its key");
    declared_[id] = AddedToken::read(entry, false);
  }
}

/// added_tokens.json: text to id.
void TokenizerSettings::read_added_tokens(const File& file) {
  std::set<std::string> special;
  for (const Role& role : roles_)
    if (role.token) special.insert(role.token->text);
  for (const AddedToken& token : extra_) special.insert(token.text);
  const Field entries(&file.content, file.name);
  for (const auto& [text, id] : entries.object().items()) {
    const bool is_special = special.contains(text);
    declared_[entries[text].id()] = {
        .text = text, .normalized = !is_special, .special = is_special};
  }
}

Field TokenizerSettings::operator[](const std::string& key) const {
  if (map_.content.contains(key)) return Field(&map_.content, map_.name)[key];
  return Field(&config_.content, config_.name)[key];
}

bool TokenizerSettings::declares(const std::string& token) const {
  return std::any_of(declared_.begin(), declared_.end(),
                     [&](const auto& each) { return each.second.text == token; });
}

void TokenizerSettings::set_default_role(const std::string& name, const std::string& token) {
  Role& own = role(name);
  if (!own.is_stated && !own.token) own.token = AddedToken{.text = token, .special = true};
}

std::optional<std::string> TokenizerSettings::around(const std::string& kind,
                                                     bool by_default) const {
  if (!(*this)["add_" + kind + "_token"].flag_or(by_default)) return std::nullopt;
  for (const Role& role : roles_)
    if (role.name == kind + "_token" && role.token) return role.token->text;
  return std::nullopt;
}

void TokenizerSettings::fail_unknown(const std::string& kind, const std::string& token) const {
  throw CheckpointError(config_.name + ": " + kind + "_token is " + describe(token) +
                        ", expected a token of the vocabulary");
}

std::vector<AddedToken> TokenizerSettings::tokens_to_add(
    const std::map<Token, AddedToken>& of_file, const std::set<std::string>& present) const {
  std::map<Token, AddedToken> declared = declared_;
  if (!only_declared_)
    for (const auto& [id, token] : of_file) declared.insert_or_assign(id, token);
  std::set<std::string> with_role, seen = present;
  for (const Role& role : roles_)
    if (role.token) with_role.insert(role.token->text);
  std::vector<AddedToken> result;
  for (const auto& [id, token] : declared) {
    seen.insert(token.text);
    result.push_back(token);
    if (with_role.contains(token.text)) result.back().special = true;
  }
  const auto is_new = [&](const AddedToken& token) { return !seen.contains(token.text); };
  for (const Role& role : roles_) {
    if (!role.token || !is_new(*role.token)) continue;
    result.push_back(*role.token);
    result.back().special = true;
  }
  std::copy_if(extra_.begin(), extra_.end(), std::back_inserter(result), is_new);
  if (class_ != "Qwen2Tokenizer") return result;
  for (const Role& role : roles_)
    if (role.token) result.push_back({.text = role.token->text, .special = true});
  for (const AddedToken& token : extra_) result.push_back({.text = token.text, .special = true});
  return result;
}

}  // namespace tda
