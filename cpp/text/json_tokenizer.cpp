// tokenizer.json: added tokens are split off first; the rest of the text is normalized, split into
// words and encoded by BPE.
#include <algorithm>
#include <limits>
#include <unordered_map>
#include <utility>

#include "text/bpe.h"
#include "text/impl.h"
#include "text/stages.h"
#include "text/trie.h"
#include "text/unicode.h"

namespace tda {
namespace {

struct AddedToken {
  std::string text;  // decoded form
  bool single_word, strips_left, strips_right;
};

/// Tokens that are matched in the text before BPE runs.
class AddedTokens {
 public:
  /// Each gets the id that the model's vocabulary has for it, or else the next free one.
  AddedTokens(const Field& entries, const Bpe& model, const std::vector<Normalizer>& normalizers) {
    if (entries.is_absent()) return;
    std::int64_t next = model.size();
    for (const Field& entry : entries.elements()) {
      const std::string& content = entry["content"].text();
      if (content.empty()) continue;
      entry["id"].id();  // must be present, but is not used
      std::optional<Token> id = find(content);
      if (!id) id = model.find(content);
      if (!id) {
        if (next >= Field::max_tokens) entries.fail("fewer tokens");
        id = static_cast<Token>(next++);
      }
      add(entry, *id, normalizers);
    }
  }

  std::optional<Token> find(const std::string& content) const {
    const auto found = ids_.find(content);
    return found == ids_.end() ? std::nullopt : std::optional(found->second);
  }
  const std::unordered_map<Token, AddedToken>& tokens() const { return tokens_; }
  const std::unordered_map<std::string, Token>& ids() const { return ids_; }
  const std::set<Token>& special() const { return special_; }

  /// Splits the tokens off. normalized: those to be matched in normalized text.
  void extract(Pieces& pieces, bool normalized) const {
    Pieces result;
    for (Piece& piece : pieces) {
      if (piece.token)
        result.push_back(std::move(piece));
      else
        extract(piece, normalized ? normalized_ : plain_, result);
    }
    pieces = std::move(result);
  }

 private:
  void add(const Field& entry, Token id, const std::vector<Normalizer>& normalizers) {
    AddedToken token = {entry["content"].text(), entry["single_word"].flag(),
                        entry["lstrip"].flag(), entry["rstrip"].flag()};
    std::string pattern = token.text;
    const bool normalized = entry["normalized"].flag();
    if (normalized) {
      for (const Normalizer& normalize : normalizers) normalize(pattern);
      if (pattern.empty()) entry["content"].fail("text that the normalizer does not remove");
    }
    Trie& trie = normalized ? normalized_ : plain_;
    if (tokens_.contains(id) || trie.contains(pattern))
      entry["content"].fail("a token that no other entry has");
    trie.add(pattern, id);
    ids_.emplace(token.text, id);
    token.text = std::move(pattern);
    tokens_.emplace(id, std::move(token));
    if (entry["special"].flag()) special_.insert(id);
  }

  void extract(const Piece& piece, const Trie& trie, Pieces& result) const {
    const std::string_view text = piece.text;
    std::size_t done = 0;  // text before this is in the result
    const auto append = [&](std::size_t begin, std::size_t end, std::optional<Token> token) {
      result.push_back(
          {std::string(text.substr(begin, end - begin)), token, piece.is_start && begin == 0});
    };
    for (std::size_t from = 0; const auto match = trie.find(text, from);) {
      std::size_t begin = match->begin, end = from = match->begin + match->size;
      const AddedToken& token = tokens_.at(match->value);
      if (token.single_word && (is_word_before(text, begin) || is_word_at(text, end))) continue;
      if (token.strips_left) {
        while (begin > 0 && unicode::is_space(unicode::read_before(text, begin).code))
          begin -= unicode::read_before(text, begin).size;
        begin = std::max(begin, done);  // the previous token may have stripped the same spaces
      }
      while (token.strips_right && end < text.size() &&
             unicode::is_space(unicode::read(text, end).code))
        end += unicode::read(text, end).size;
      if (done < begin) append(done, begin, std::nullopt);
      append(begin, end, match->value);
      done = end;
    }
    if (done < text.size()) append(done, text.size(), std::nullopt);
  }

  static bool is_word_before(std::string_view text, std::size_t at) {
    return at > 0 && unicode::is_word(unicode::read_before(text, at).code);
  }
  static bool is_word_at(std::string_view text, std::size_t at) {
    return at < text.size() && unicode::is_word(unicode::read(text, at).code);
  }

  std::unordered_map<std::string, Token> ids_;
  std::unordered_map<Token, AddedToken> tokens_;
  std::set<Token> special_;
  Trie plain_, normalized_;
};

class JsonTokenizer final : public Tokenizer::Impl {
 public:
  JsonTokenizer(const Field& file, const TokenizerSettings& settings)
      : model_(file["model"]),
        normalizers_(read_normalizers(file["normalizer"])),
        pre_tokenizers_(read_pre_tokenizers(file["pre_tokenizer"])),
        decoders_(read_decoders(file["decoder"])),
        added_(file["added_tokens"], model_, normalizers_) {
    const Field version = file["version"];
    if (!version.is_absent() && version.text() != "1.0") version.fail("\"1.0\"");
    special = added_.special();
    for (const auto& [id, token] : model_.tokens()) note(id, token);
    for (const auto& [token, id] : added_.ids()) note(id, token);
    // tokenizer_config.json overrides the special tokens that tokenizer.json adds around a text.
    if (settings.decides("bos") || settings.decides("eos")) {
      before_ = around(settings, "bos");
      after_ = around(settings, "eos");
    } else {
      post_processors_ = read_post_processors(file["post_processor"], vocab_size);
    }
  }

  std::vector<Token> encode(std::string_view text, bool add_special_tokens) const override {
    Pieces pieces;
    if (!text.empty()) pieces.push_back({std::string(text), {}, true});
    added_.extract(pieces, false);
    for (Piece& piece : pieces)
      for (const Normalizer& normalize : normalizers_)
        if (!piece.token) normalize(piece.text);
    added_.extract(pieces, true);
    for (const PreTokenizer& cut : pre_tokenizers_) cut(pieces);
    std::vector<Token> ids;
    for (const Piece& piece : pieces) {
      if (piece.token)
        ids.push_back(*piece.token);
      else
        model_.encode(piece.text, ids);
    }
    for (const PostProcessor& process : post_processors_) process(ids, add_special_tokens);
    if (add_special_tokens && before_) ids.insert(ids.begin(), *before_);
    if (add_special_tokens && after_) ids.push_back(*after_);
    return ids;
  }

  std::string decode(Tokens ids) const override {
    std::vector<std::string> tokens;
    for (Token id : ids) {
      if (const auto added = added_.tokens().find(id); added != added_.tokens().end())
        tokens.push_back(added->second.text);
      else if (const auto own = model_.tokens().find(id); own != model_.tokens().end())
        tokens.push_back(own->second);
    }
    for (const Decoder& decode : decoders_) decode(tokens);
    return std::move(tokens[0]);
  }

 private:
  void note(Token id, const std::string& token) {
    vocab_size = std::max<std::int64_t>(vocab_size, id + 1);
    if (byte_of(token)) bytes.insert(id);
  }

  std::optional<Token> around(const TokenizerSettings& settings, const std::string& kind) const {
    const std::optional<std::string> text = settings.around(kind, false, std::nullopt);
    if (!text) return std::nullopt;
    std::optional<Token> id = added_.find(*text);
    if (!id) id = model_.find(*text);
    if (!id) settings.fail_unknown(kind, *text);
    return id;
  }

  Bpe model_;
  std::vector<Normalizer> normalizers_;
  std::vector<PreTokenizer> pre_tokenizers_;
  std::vector<Decoder> decoders_;
  AddedTokens added_;
  std::vector<PostProcessor> post_processors_;
  std::optional<Token> before_, after_;
};

}  // namespace

std::shared_ptr<Tokenizer::Impl> make_json_tokenizer(const std::string& content,
                                                     const std::string& file,
                                                     const TokenizerSettings& settings) {
  const nlohmann::json json = parse_json_object(content, file);
  return std::make_shared<JsonTokenizer>(Field(&json, file), settings);
}

}  // namespace tda
