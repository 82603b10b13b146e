// tokenizer.model with the conventions of Llama 2: adds <s> before every text, and a space before
// every run of text between special tokens; with "legacy": false in tokenizer_config.json, the
// default of LlamaTokenizer, a space only at the start of the whole text, and only if it has none.
#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "text/added_tokens.h"
#include "text/impl.h"
#include "text/sentencepiece.h"

namespace tda {
namespace {

// A private use character. No vocabulary has it, so nothing merges with it.
constexpr std::string_view separator = "\uE000";

class SentencePieceTokenizer final : public Tokenizer::Impl {
 public:
  SentencePieceTokenizer(const std::string& content, const std::string& file,
                         TokenizerSettings& settings)
      : model_(content, file) {
    const bool is_llama = settings.tokenizer_class() == "LlamaTokenizer";
    legacy_ = settings["legacy"].flag_or(!is_llama);
    adds_space_ = !is_llama || settings["add_prefix_space"].flag_or(true);
    std::vector<Token> separators;
    model_.encode(separator, separators);
    separator_ids_ = separators.size();
    vocab_size = static_cast<std::int64_t>(model_.pieces().size());
    for (Token id = 0; id < vocab_size; ++id)
      if (model_.pieces()[static_cast<std::size_t>(id)].kind == SentencePiece::Kind::byte)
        bytes.insert(id);
    add_tokens(settings, is_llama);
    special = added_.special();
    before_ = around(settings, "bos", true);
    after_ = around(settings, "eos", false);
  }

  std::vector<Token> encode(std::string_view text, bool add_special_tokens,
                            bool parse_special) const override {
    std::vector<Token> ids;
    if (add_special_tokens && before_) ids.push_back(*before_);
    Pieces pieces;
    if (!text.empty()) pieces.push_back({std::string(text), {}, true});
    for (bool normalized : {false, true})
      if (parse_special) added_.extract(pieces, normalized);
    for (const Piece& piece : pieces) {
      if (piece.token)
        ids.push_back(*piece.token);
      else if (parse_special)
        encode_part(piece.text, piece.is_start, ids);
      else
        model_.encode(piece.text, ids);
    }
    if (add_special_tokens && after_) ids.push_back(*after_);
    return ids;
  }

  std::string decode(Tokens ids) const override {
    std::string text;
    for (std::size_t at = 0; at < ids.size();) {
      if (const std::string* spelled = added_.decoded(ids[at])) {
        text += *spelled;
        ++at;
        continue;
      }
      // Decoding strips a leading space, so every run except the first is decoded after the anchor,
      // once that is known.
      std::vector<Token> run;
      const auto append = [&](Token id) {
        if (static_cast<std::size_t>(id) < model_.pieces().size()) run.push_back(id);
      };
      const bool is_behind = anchor_size > 0 && (!text.empty() || !adds_space_);
      if (is_behind) std::for_each(anchor.begin(), anchor.end(), append);
      const std::size_t behind = is_behind ? anchor_size : 0;
      for (; at < ids.size() && !added_.decoded(ids[at]); ++at) append(ids[at]);
      const std::string decoded = model_.decode(run);
      text.append(decoded, std::min(behind, decoded.size()));
    }
    return text;
  }

 private:
  void encode_part(std::string_view part, bool is_first, std::vector<Token>& ids) const {
    const bool has_space = !legacy_ && (part.starts_with(' ') || part.starts_with("▁"));
    if (adds_space_ && (legacy_ || (is_first && !has_space))) return model_.encode(part, ids);
    std::vector<Token> found;
    model_.encode(std::string(separator) + std::string(part), found);
    ids.insert(ids.end(), found.begin() + static_cast<std::ptrdiff_t>(separator_ids_), found.end());
  }

  /// Tokens that may occur literally in a text, which SentencePiece itself does not match.
  void add_tokens(TokenizerSettings& settings, bool is_llama) {
    if (const std::optional<Token> id = model_.bos())
      settings.set_default_role("bos_token", text_of(*id));
    if (const std::optional<Token> id = model_.eos())
      settings.set_default_role("eos_token", text_of(*id));
    std::map<std::string, Token> ids;
    std::vector<AddedToken> tokens;
    std::set<std::string> present;
    for (Token id = 0; id < vocab_size; ++id) {
      const auto& [text, score, kind] = model_.pieces()[static_cast<std::size_t>(id)];
      ids.emplace(text, id);
      if (kind != SentencePiece::Kind::control && kind != SentencePiece::Kind::unknown) continue;
      tokens.push_back({.text = text, .special = true});
      present.insert(text);
    }
    for (const auto& [id, token] : settings.declared()) {
      ids.insert_or_assign(token.text, id);
      vocab_size = std::max<std::int64_t>(vocab_size, id + 1);
    }
    for (const AddedToken& token : settings.tokens_to_add({}, present)) tokens.push_back(token);
    for (AddedToken& token : tokens) {
      if (token.text.empty()) continue;
      if (!is_llama) token.normalized = false;  // all are found in the text as it is
      const auto [own, is_new] = ids.emplace(token.text, static_cast<Token>(vocab_size));
      vocab_size += is_new;
      added_.add(token, own->second);
    }
    added_.splits_special = settings["split_special_tokens"].flag_or(false);
    added_.index({}, settings.name() + "tokenizer.model");
  }

  const std::string& text_of(Token id) const {
    return model_.pieces()[static_cast<std::size_t>(id)].text;
  }

  std::optional<Token> around(const TokenizerSettings& settings, const std::string& kind,
                              bool by_default) const {
    const std::optional<std::string> text = settings.around(kind, by_default);
    if (!text) return std::nullopt;
    // A token that is new is none that the model has learned.
    const std::optional<Token> found = added_.find(*text);
    if (!found ||
        (std::cmp_greater_equal(*found, model_.pieces().size()) && !settings.declares(*text)))
      settings.fail_unknown(kind, *text);
    return found;
  }

  SentencePiece model_;
  bool legacy_ = true;
  bool adds_space_ = true;
  std::size_t separator_ids_ = 0;
  AddedTokens added_;
  std::optional<Token> before_, after_;
};

}  // namespace

std::shared_ptr<Tokenizer::Impl> make_sentencepiece_tokenizer(const std::string& content,
                                                              const std::string& file,
                                                              TokenizerSettings settings) {
  return std::make_shared<SentencePieceTokenizer>(content, file, settings);
}

}  // namespace tda
