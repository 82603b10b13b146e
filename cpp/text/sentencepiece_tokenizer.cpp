// tokenizer.model with the conventions of Llama 2: adds <s> before every text, and a space before
// every run of text between special tokens; with "legacy": false in tokenizer_config.json, a space
// only at the start of the whole text.
#include <algorithm>
#include <charconv>
#include <utility>

#include "text/impl.h"
#include "text/sentencepiece.h"
#include "text/trie.h"

namespace tda {
namespace {

// A private use character. No vocabulary has it, so nothing merges with it.
constexpr std::string_view separator = "\uE000";

class SentencePieceTokenizer final : public Tokenizer::Impl {
 public:
  SentencePieceTokenizer(const std::string& content, const std::string& file,
                         const nlohmann::json* added, const std::string& added_file,
                         const TokenizerSettings& settings)
      : model_(content, file), legacy_(is_legacy(settings)) {
    std::vector<Token> separators;
    model_.encode(separator, separators);
    separator_ids_ = separators.size();
    vocab_size = static_cast<std::int64_t>(model_.pieces().size());
    for (Token id = 0; id < vocab_size; ++id) {
      const auto& [text, score, kind] = model_.pieces()[static_cast<std::size_t>(id)];
      if (kind == SentencePiece::Kind::byte) bytes.insert(id);
      if (kind != SentencePiece::Kind::control && kind != SentencePiece::Kind::unknown) continue;
      spelled_[id] = text;
      special.insert(id);
    }
    if (added) read_added(Field(added, added_file));
    if (const Field entries = settings["added_tokens_decoder"]; !entries.is_absent())
      read_decoder(entries);
    for (const auto& [id, text] : spelled_) {
      vocab_size = std::max<std::int64_t>(vocab_size, id + 1);
      spelled_ids_.insert_or_assign(text, id);
      splitter_.add(text, id);
    }
    std::optional<std::string> bos;
    if (const std::optional<Token> id = model_.bos()) bos = spelled_.at(*id);
    before_ = around(settings, "bos", true, bos);
    after_ = around(settings, "eos", false, std::nullopt);
  }

  std::vector<Token> encode(std::string_view text, bool add_special_tokens) const override {
    std::vector<Token> ids;
    if (add_special_tokens && before_) ids.push_back(*before_);
    std::size_t done = 0;
    while (const auto match = splitter_.find(text, done)) {
      encode_part(text.substr(done, match->begin - done), done == 0, ids);
      ids.push_back(match->value);
      done = match->begin + match->size;
    }
    encode_part(text.substr(done), done == 0, ids);
    if (add_special_tokens && after_) ids.push_back(*after_);
    return ids;
  }

  std::string decode(Tokens ids) const override {
    std::string text;
    for (std::size_t at = 0; at < ids.size();) {
      if (const auto spelled = spelled_.find(ids[at]); spelled != spelled_.end()) {
        text += spelled->second;
        ++at;
        continue;
      }
      // Decoding strips a leading space, so every run except the first is decoded after the anchor.
      std::vector<Token> run;
      const auto append = [&](Token id) {
        if (static_cast<std::size_t>(id) < model_.pieces().size()) run.push_back(id);
      };
      if (!text.empty()) std::for_each(anchor.begin(), anchor.end(), append);
      const std::size_t behind = text.empty() ? 0 : anchor_size;
      for (; at < ids.size() && !spelled_.contains(ids[at]); ++at) append(ids[at]);
      const std::string decoded = model_.decode(run);
      text.append(decoded, std::min(behind, decoded.size()));
    }
    return text;
  }

 private:
  static bool is_legacy(const TokenizerSettings& settings) {
    return settings["legacy"].flag_or(true);
  }

  void encode_part(std::string_view part, bool is_first, std::vector<Token>& ids) const {
    if (part.empty()) return;
    if (is_first || legacy_) return model_.encode(part, ids);
    std::vector<Token> found;
    model_.encode(std::string(separator) + std::string(part), found);
    ids.insert(ids.end(), found.begin() + static_cast<std::ptrdiff_t>(separator_ids_), found.end());
  }

  /// added_tokens.json: text to id.
  void read_added(const Field& entries) {
    for (const auto& [text, id] : entries.object().items()) {
      if (text.empty()) entries[text].fail("a token with a text");
      spelled_[entries[text].id()] = text;
    }
  }

  /// added_tokens_decoder: id to entry.
  void read_decoder(const Field& entries) {
    for (const auto& [key, value] : entries.object().items()) {
      const Field entry = entries[key];
      Token id = -1;
      const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), id);
      if (error != std::errc() || end != key.data() + key.size() || id < 0 ||
          id >= Field::max_tokens)
        entry.fail("a token id as its key");
      if (entry["content"].text().empty()) entry["content"].fail("a text");
      spelled_[id] = entry["content"].text();
      if (entry["special"].flag_or(false)) special.insert(id);
    }
  }

  std::optional<Token> around(const TokenizerSettings& settings, const std::string& kind,
                              bool by_default, const std::optional<std::string>& or_else) const {
    const std::optional<std::string> text = settings.around(kind, by_default, or_else);
    if (!text) return std::nullopt;
    const auto found = spelled_ids_.find(*text);
    if (found == spelled_ids_.end()) settings.fail_unknown(kind, *text);
    return found->second;
  }

  SentencePiece model_;
  bool legacy_;
  std::size_t separator_ids_ = 0;
  // Tokens that may occur literally in a text, which SentencePiece itself does not match.
  std::map<Token, std::string> spelled_;
  std::map<std::string, Token> spelled_ids_;
  Trie splitter_;
  std::optional<Token> before_, after_;
};

}  // namespace

std::shared_ptr<Tokenizer::Impl> make_sentencepiece_tokenizer(const std::string& content,
                                                              const std::string& file,
                                                              const std::string* added_tokens,
                                                              const std::string& added_file,
                                                              const TokenizerSettings& settings) {
  nlohmann::json added;
  if (added_tokens) added = parse_json_object(*added_tokens, added_file);
  return std::make_shared<SentencePieceTokenizer>(content, file, added_tokens ? &added : nullptr,
                                                  added_file, settings);
}

}  // namespace tda
