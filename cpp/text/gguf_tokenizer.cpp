#include "text/gguf_tokenizer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <set>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "checkpoint/gguf_keys.h"
#include "text/unicode.h"

namespace tda {
namespace {

using nlohmann::json;

/// tokenizer.ggml.token_type; SentencePiece's own numbers.
enum TokenType { normal = 1, unknown, control, user_defined, unused, byte };

/// A token with a part of its own: its name in tokenizer_config.json and in GGUF, the id that
/// SentencePiece files without one mean, and the fields of its id and text in such a file.
struct Role {
  const char *name, *key;
  std::int64_t usual;
  int id_field, piece_field;
};
constexpr Role roles[] = {{"bos", "bos", 1, 41, 46},
                          {"eos", "eos", 2, 42, 47},
                          {"unk", "unknown", 0, 40, 45},
                          {"pad", "padding", -1, 43, 48}};

std::string as_text(const GgufKeys& keys, const std::string& key, const json& value) {
  if (!value.is_string() ||
      unicode::find_invalid(value.get_ref<const std::string&>()) != std::string::npos)
    keys.fail(key, value, "text in UTF-8");
  return value.get<std::string>();
}

std::vector<std::string> texts(GgufKeys& keys, const std::string& key,
                               bool may_be_missing = false) {
  std::vector<std::string> result;
  for (const json& value : keys.list(key, may_be_missing))
    result.push_back(as_text(keys, key + "[" + std::to_string(result.size()) + "]", value));
  return result;
}

bool is_inside_marker(std::string_view text) {
  for (std::size_t at = 0; at < text.size();) {
    const unicode::Character c = unicode::read(text, at);
    if (unicode::is_space(c.code) || c.code == '<' || c.code == '>') return false;
    at += c.size;
  }
  return !text.empty();
}

/// Whether a token looks like none of text, as <|im_end|> does.
bool is_marker(std::string_view token) {
  for (const std::string_view bar : {"|", "\uff5c"}) {
    const std::string begin = "<" + std::string(bar), end = std::string(bar) + ">";
    if (token.size() > begin.size() + end.size() && token.starts_with(begin) &&
        token.ends_with(end) &&
        is_inside_marker(token.substr(begin.size(), token.size() - begin.size() - end.size())))
      return true;
  }
  return false;
}

/// What a chat template spells out that may be tokens: <...> without spaces, [INST] and the like.
std::set<std::string_view> spelled_out(std::string_view text) {
  std::set<std::string_view> found;
  for (std::size_t at = 0; at < text.size(); ++at) {
    std::size_t end = std::string_view::npos;
    if (text[at] == '<') {
      end = text.find_first_of("<>", at + 1);
      if (end == text.npos || text[end] == '<' ||
          !is_inside_marker(text.substr(at + 1, end - at - 1)))
        continue;
    } else if (text[at] == '[') {
      const std::size_t first = at + 1 + (text.substr(at + 1).starts_with('/') ? 1 : 0);
      end = text.find_first_not_of("ABCDEFGHIJKLMNOPQRSTUVWXYZ_", first);
      if (end == text.npos || end == first || text[end] != ']') continue;
    } else {
      continue;
    }
    found.insert(text.substr(at, end + 1 - at));
    at = end;
  }
  return found;
}

struct Vocabulary {
  Vocabulary(GgufKeys& keys, const json& generation) : keys_(keys) {
    std::unordered_set<std::string_view> seen;
    tokens = texts(keys, "tokenizer.ggml.tokens");
    for (std::size_t i = 0; i < tokens.size(); ++i)
      if (tokens[i].empty()) tokens[i] = "[EMPTY_" + std::to_string(i) + "]";
    for (const std::string& token : tokens)
      if (!seen.insert(token).second) keys.fail("tokenizer.ggml.tokens", token, "once in the list");
    const std::string types_key = "tokenizer.ggml.token_type";
    const json listed = keys.list(types_key);
    if (listed.size() != tokens.size())
      keys.fail(types_key, "a list of " + std::to_string(listed.size()),
                "as many as tokens, " + std::to_string(tokens.size()));
    for (const json& type : listed) {
      if (!type.is_number_integer() || type < normal || type > byte)
        keys.fail(types_key, type, "1 to 6");
      types.push_back(type.get<int>());
    }
    const std::string template_key = "tokenizer.chat_template";
    if (const json text = keys.find(template_key); !text.is_null())
      chat_template = as_text(keys, template_key, text);
    sentencepiece = keys.text("tokenizer.ggml.model") == "llama";
    const bool llama3 = keys.text("tokenizer.ggml.pre", "") == "llama-bpe";
    add_bos = keys.flag("tokenizer.ggml.add_bos_token", sentencepiece || llama3);
    add_eos = keys.flag("tokenizer.ggml.add_eos_token", false);
    for (const Role& role : roles)
      if (const std::int64_t id = id_of(role); id >= 0) ids[role.name] = id;
    correct_types(generation);
  }

  bool has(int type) const { return std::ranges::find(types, type) != types.end(); }

  std::vector<std::string> tokens;
  std::vector<int> types;
  std::optional<std::string> chat_template;
  bool sentencepiece, add_bos, add_eos;
  std::map<std::string, std::int64_t> ids;  // by roles' names

 private:
  /// -1 if there is none.
  std::int64_t id_of(const Role& role) {
    const bool has_usual = sentencepiece && role.usual < std::ssize(tokens);
    return keys_.special_token(role.key, std::ssize(tokens), has_usual ? role.usual : -1);
  }

  /// Of tokens that the file has as text though they are none: they would be cut into pieces in a
  /// chat's prompt, and some of them shown. What merges make is text, however it looks.
  void correct_types(const json& generation) {
    std::set<std::int64_t> ends;
    const json none = json::array(), listed = generation.value("eos_token_id", none);
    for (const json& end : listed.is_array() ? listed : json::array({listed}))
      ends.insert(end.get<std::int64_t>());
    if (add_bos && ids.contains("bos")) ends.insert(ids["bos"]);
    const std::set<std::string_view> spelled =
        spelled_out(chat_template ? std::string_view(*chat_template) : "");
    std::unordered_set<std::string> merged;
    for (std::string merge : texts(keys_, "tokenizer.ggml.merges", true)) {
      if (const std::size_t space = merge.find(' '); space != merge.npos) merge.erase(space, 1);
      merged.insert(std::move(merge));
    }
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      int& type = types[i];
      const bool is_spelled = spelled.contains(tokens[i]);
      if (ends.contains(static_cast<std::int64_t>(i))) {
        type = control;
      } else if ((type == normal || type == unused) && !merged.contains(tokens[i])) {
        if (is_marker(tokens[i]) && (type == normal || is_spelled))
          type = control;
        else if (is_spelled)
          type = user_defined;  // may be meant to be seen, as <think>
      }
    }
    // The padding token has no use here; where it is text, as in files that state 0 without meaning
    // it, it must not become a special token, which is not shown.
    if (ids.contains("pad") && types[ids["pad"]] == normal) ids.erase("pad");
    if (sentencepiece && !has(unknown) && ids.contains("unk")) types[ids["unk"]] = unknown;
  }

  GgufKeys& keys_;
};

// ---- tokenizer.json -----------------------------------------------------------------------------

json byte_level(bool splits) {
  return {{"type", "ByteLevel"},
          {"add_prefix_space", false},
          {"trim_offsets", true},
          {"use_regex", splits}};  // GPT-2's rule
}

/// How text is cut into the words within which merges happen.
json pre_tokenizer(GgufKeys& keys, const std::string& pre) {
  // How Llama 3 and Qwen 2 cut; they differ in how long a run of digits may be.
  constexpr const char* kBeforeDigits =
      R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N})";
  constexpr const char* kBehindDigits = R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
  json steps = json::array();
  if (pre == "gpt-2") return byte_level(true);
  if (pre == "smollm") {
    steps = {{{"type", "Digits"}, {"individual_digits", true}}, byte_level(true)};
  } else if (pre == "llama-bpe" || pre == "qwen2") {
    const std::string digits = pre == "llama-bpe" ? "{1,3}" : "";
    steps = {{{"type", "Split"},
              {"pattern", {{"Regex", kBeforeDigits + digits + kBehindDigits}}},
              {"behavior", "Isolated"},
              {"invert", false}},
             byte_level(false)};
  } else {
    keys.fail("tokenizer.ggml.pre", pre, "gpt-2, smollm, llama-bpe or qwen2");
  }
  return {{"type", "Sequence"}, {"pretokenizers", steps}};
}

json post_processor(GgufKeys& keys, const Vocabulary& vocabulary) {
  const auto sequence = [](const char* id, int type) -> json {
    return {{"Sequence", {{"id", id}, {"type_id", type}}}};
  };
  json single = json::array(), special = json::object();
  const auto add = [&](const std::string& role) {
    const auto id = vocabulary.ids.find(role);
    if (id == vocabulary.ids.end())
      keys.fail("tokenizer.ggml." + role + "_token_id", nullptr, "a token id");
    const std::string& token = vocabulary.tokens[id->second];
    single.push_back({{"SpecialToken", {{"id", token}, {"type_id", 0}}}});
    special[token] = {{"id", token}, {"ids", {id->second}}, {"tokens", {token}}};
  };
  if (vocabulary.add_bos) add("bos");
  single.push_back(sequence("A", 0));
  if (vocabulary.add_eos) add("eos");
  if (special.empty()) return nullptr;
  return {{"type", "TemplateProcessing"},
          {"single", single},
          {"pair", {sequence("A", 0), sequence("B", 1)}},
          {"special_tokens", special}};
}

std::string byte_level_bpe(GgufKeys& keys, const Vocabulary& vocabulary) {
  json ids = json::object(), merges = json::array(), added = json::array();
  for (std::size_t i = 0; i < vocabulary.tokens.size(); ++i) {
    const int type = vocabulary.types[i];
    if (type != unused) ids[vocabulary.tokens[i]] = i;
    if (type != control && type != user_defined) continue;
    added.push_back({{"id", i}, {"content", vocabulary.tokens[i]}, {"special", type == control}});
    for (const char* flag : {"single_word", "lstrip", "rstrip", "normalized"})
      added.back()[flag] = false;
  }
  const std::vector<std::string> listed = texts(keys, "tokenizer.ggml.merges");
  for (std::size_t i = 0; i < listed.size(); ++i) {
    const std::string& merge = listed[i];
    const std::size_t space = merge.find(' ');
    const std::string first = merge.substr(0, space);
    const std::string second = space == merge.npos ? "" : merge.substr(space + 1);
    if (!ids.contains(first) || !ids.contains(second) || !ids.contains(first + second))
      keys.fail("tokenizer.ggml.merges[" + std::to_string(i) + "]", merge,
                "two tokens, a space between them, that together are a third");
    merges.push_back({first, second});
  }
  const std::string pre = keys.text("tokenizer.ggml.pre");
  json decoder = byte_level(true);
  decoder["add_prefix_space"] = true;
  const json file = {
      {"version", "1.0"},
      {"truncation", nullptr},
      {"padding", nullptr},
      {"added_tokens", added},
      {"normalizer", pre == "qwen2" ? json{{"type", "NFC"}} : json()},
      {"pre_tokenizer", pre_tokenizer(keys, pre)},
      {"post_processor", post_processor(keys, vocabulary)},
      {"decoder", decoder},
      {"model",
       {{"type", "BPE"},
        {"dropout", nullptr},
        {"unk_token", nullptr},
        {"continuing_subword_prefix", nullptr},
        {"end_of_word_suffix", nullptr},
        {"fuse_unk", false},
        {"byte_fallback", false},
        // Llama 3 takes a word that is in the vocabulary whole, whatever its merges.
        {"ignore_merges", pre == "llama-bpe"},
        {"vocab", ids},
        {"merges", merges}}},
  };
  return file.dump();
}

// ---- tokenizer.model ----------------------------------------------------------------------------

/// A message of protocol buffers, field by field.
class MessageWriter {
 public:
  void add(int field, std::int64_t value) {
    varint(static_cast<std::uint64_t>(field) << 3);
    varint(static_cast<std::uint64_t>(value));
  }
  void add(int field, float value) {
    varint(static_cast<std::uint64_t>(field) << 3 | 5);
    bytes_.append(reinterpret_cast<const char*>(&value), 4);
  }
  void add(int field, std::string_view bytes) {
    varint(static_cast<std::uint64_t>(field) << 3 | 2);
    varint(bytes.size());
    bytes_ += bytes;
  }
  const std::string& bytes() const { return bytes_; }

 private:
  void varint(std::uint64_t value) {
    for (; value > 127; value >>= 7) bytes_ += static_cast<char>(value | 128);
    bytes_ += static_cast<char>(value);
  }

  std::string bytes_;
};

std::string with_visible_spaces(std::string text) {
  for (std::size_t at = 0; (at = text.find(' ', at)) != text.npos;) text.replace(at, 1, "▁");
  return text;
}

/// SentencePiece's rules of normalisation, which may be stored as signed bytes.
std::string charsmap(GgufKeys& keys) {
  const std::string key = "tokenizer.ggml.precompiled_charsmap";
  std::string result;
  for (const json& value : keys.list(key, true)) {
    if (!value.is_number_integer() || value < -128 || value > 255) keys.fail(key, value, "bytes");
    result += static_cast<char>(value.get<int>());
  }
  return result;
}

bool adds_space_prefix(GgufKeys& keys) {
  return keys.flag("tokenizer.ggml.add_space_prefix", true);
}

/// Fields are numbered as in sentencepiece_model.proto.
std::string sentencepiece_model(GgufKeys& keys, const Vocabulary& vocabulary) {
  const std::string key = "tokenizer.ggml.scores";
  const json scores = keys.list(key);
  if (scores.size() != vocabulary.tokens.size())
    keys.fail(key, "a list of " + std::to_string(scores.size()),
              std::to_string(vocabulary.tokens.size()) + " values");
  MessageWriter model, trainer, normalizer;
  for (std::size_t i = 0; i < scores.size(); ++i) {
    if (!scores[i].is_number_float() || !std::isfinite(scores[i].get<float>()))
      keys.fail(key, scores[i], "finite numbers, no NaN or infinity");
    // GGUF spells spaces of added tokens as they are, SentencePiece as in all others.
    const std::string& token = vocabulary.tokens[i];
    const int type = vocabulary.types[i];
    MessageWriter piece;
    piece.add(1, type == user_defined ? with_visible_spaces(token) : token);
    piece.add(2, scores[i].get<float>());
    piece.add(3, std::int64_t{type});
    model.add(1, piece.bytes());
  }
  trainer.add(3, std::int64_t{2});  // BPE
  trainer.add(4, std::ssize(vocabulary.tokens));
  trainer.add(35, std::int64_t{vocabulary.has(byte)});
  for (const Role& role : roles)
    if (const auto id = vocabulary.ids.find(role.name); id != vocabulary.ids.end()) {
      trainer.add(role.id_field, id->second);
      trainer.add(role.piece_field, vocabulary.tokens[id->second]);
    }
  normalizer.add(1, "identity");
  normalizer.add(2, charsmap(keys));
  normalizer.add(3, std::int64_t{adds_space_prefix(keys)});
  normalizer.add(4, std::int64_t{keys.flag("tokenizer.ggml.remove_extra_whitespaces", false)});
  model.add(2, trainer.bytes());
  model.add(3, normalizer.bytes());
  return model.bytes();
}

}  // namespace

std::map<std::string, std::string> gguf_tokenizer_files(const GgufModel& model) {
  GgufKeys keys(model.first());
  keys.expect("tokenizer.ggml.suppress_tokens", json::array({json::array()}));
  for (const char* name : {"lowercase", "strip_accents"})
    keys.expect("tokenizer.ggml.normalizer." + std::string(name), json::array({false}));
  const Vocabulary vocabulary(keys, model.generation());
  std::map<std::string, std::string> files;
  const std::string kind = keys.text("tokenizer.ggml.model");
  if (kind == "gpt2")
    files["tokenizer.json"] = byte_level_bpe(keys, vocabulary);
  else if (kind == "llama")
    files["tokenizer.model"] = sentencepiece_model(keys, vocabulary);
  else
    keys.fail("tokenizer.ggml.model", kind, "gpt2 or llama");
  json config = {{"tokenizer_class", kind == "gpt2" ? "PreTrainedTokenizerFast" : "LlamaTokenizer"},
                 {"add_bos_token", vocabulary.add_bos},
                 {"add_eos_token", vocabulary.add_eos},
                 {"model_max_length", model.config()->at("max_position_embeddings")},
                 {"clean_up_tokenization_spaces", false},
                 {"legacy", true}};  // a space goes before every stretch of text, as in llama.cpp
  // transformers asks here, not in tokenizer.model.
  if (kind == "llama" && !adds_space_prefix(keys)) config["add_prefix_space"] = false;
  for (const auto& [role, id] : vocabulary.ids) config[role + "_token"] = vocabulary.tokens[id];
  if (vocabulary.chat_template) config["chat_template"] = *vocabulary.chat_template;
  files["tokenizer_config.json"] = config.dump(2) + "\n";
  files["generation_config.json"] = model.generation().dump(2) + "\n";
  return files;
}

}  // namespace tda
