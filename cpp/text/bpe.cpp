#include "text/bpe.h"

#include <cstdio>
#include <utility>

#include "text/unicode.h"

namespace tda {
namespace {

std::uint64_t pair_of(Token left, Token right) {
  return static_cast<std::uint64_t>(left) << 32 | static_cast<std::uint64_t>(right);
}

}  // namespace

Bpe::Bpe(const Field& model) {
  if (!model["type"].is_absent() && model["type"].text() != "BPE") model["type"].fail("\"BPE\"");
  if (const Field dropout = model["dropout"]; !dropout.is_absent() && !dropout.is_zero())
    dropout.fail("null or 0");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"})
    if (!model[key].is_absent() && !model[key].text().empty()) model[key].fail("null or \"\"");
  fuse_unknown_ = model["fuse_unk"].flag_or(false);
  byte_fallback_ = model["byte_fallback"].flag_or(false);
  ignore_merges_ = model["ignore_merges"].flag_or(false);
  read_vocabulary(model["vocab"]);
  read_merges(model["merges"]);
  if (const Field unknown = model["unk_token"]; !unknown.is_absent()) {
    unknown_ = find(unknown.text());
    if (!unknown_) unknown.fail("a token of the vocabulary");
  }
}

void Bpe::read_vocabulary(const Field& vocab) {
  for (const auto& [token, value] : vocab.object().items()) {
    const Token id = vocab[token].id();
    if (!tokens_.emplace(id, token).second)
      vocab[token].fail("an id of its own, not that of " + describe(tokens_.at(id)));
    vocabulary_.emplace(token, id);
  }
}

void Bpe::read_merges(const Field& merges) {
  double rank = 0;
  for (const Field& merge : merges.elements()) {
    std::string left, right;
    if (merge.is_array()) {
      const std::vector<Field> pair = merge.elements();
      if (pair.size() != 2) merge.fail("two tokens");
      left = pair[0].text();
      right = pair[1].text();
    } else {  // the older format: "left right"
      const std::string& text = merge.text();
      if (text.starts_with("#version")) continue;
      const std::size_t space = text.find(' ');
      if (space == text.npos || text.find(' ', space + 1) != text.npos)
        merge.fail("two tokens with a space between them");
      left = text.substr(0, space);
      right = text.substr(space + 1);
    }
    const auto a = find(left), b = find(right), both = find(left + right);
    if (!a || !b || !both)
      merge.fail("two tokens that are in the vocabulary, as their merge must be");
    merges_.insert_or_assign(pair_of(*a, *b), Merge{rank++, *both});
  }
}

std::optional<Token> Bpe::find(std::string_view token) const {
  const auto found = vocabulary_.find(token);
  return found == vocabulary_.end() ? std::nullopt : std::optional(found->second);
}

bool Bpe::append_bytes(std::string_view character, std::uint32_t begin,
                       std::vector<Symbol>& symbols) const {
  const std::size_t size = symbols.size();
  for (char c : character) {
    char name[8];
    std::snprintf(name, sizeof name, "<0x%02X>",
                  static_cast<unsigned>(static_cast<unsigned char>(c)));
    const std::optional<Token> id = find(name);
    if (!id) {
      symbols.resize(size);
      return false;
    }
    symbols.push_back({*id, begin++, 1});
  }
  return true;
}

void Bpe::encode(std::string_view word, std::vector<Token>& ids) const {
  if (ignore_merges_)
    if (const std::optional<Token> whole = find(word)) return ids.push_back(*whole);
  std::vector<Symbol> symbols;
  symbols.reserve(word.size());
  std::optional<Symbol> unknown;  // a run of unknown characters, not finished
  const auto finish_unknown = [&] {
    if (unknown) symbols.push_back(*std::exchange(unknown, std::nullopt));
  };
  std::uint32_t size;
  for (std::uint32_t at = 0; at < word.size(); at += size) {
    size = static_cast<std::uint32_t>(unicode::read(word, at).size);
    const std::string_view character = word.substr(at, size);
    if (const std::optional<Token> id = find(character)) {
      finish_unknown();
      symbols.push_back({*id, at, size});
    } else if (byte_fallback_ && append_bytes(character, at, symbols)) {
      // If the vocabulary lacks bytes, `tokenizers` puts a pending unknown token after these
      // tokens instead of before them. So do we.
    } else if (unknown_) {
      if (!fuse_unknown_) finish_unknown();
      if (unknown)
        unknown->size += size;
      else
        unknown = Symbol{*unknown_, at, size};
    }
  }
  finish_unknown();
  merge_symbols(symbols, [&](const Symbol& left, const Symbol& right) -> std::optional<Merge> {
    const auto found = merges_.find(pair_of(left.id, right.id));
    return found == merges_.end() ? std::nullopt : std::optional(found->second);
  });
  for (const Symbol& symbol : symbols) ids.push_back(symbol.id);
}

}  // namespace tda
