#include "text/added_tokens.h"

#include <algorithm>
#include <utility>

#include "text/unicode.h"

namespace tda {
namespace {

bool is_word_before(std::string_view text, std::size_t at) {
  return at > 0 && unicode::is_word(unicode::read_before(text, at).code);
}
bool is_word_at(std::string_view text, std::size_t at) {
  return at < text.size() && unicode::is_word(unicode::read(text, at).code);
}

}  // namespace

AddedToken AddedToken::read(const Field& value, bool special) {
  AddedToken token;
  token.special = special;
  token.normalized = !special;
  if (!value.is_object()) {
    token.text = value.text();
    return token;
  }
  token.text = value["content"].text();
  token.special = value["special"].is_absent() ? special : value["special"].flag();
  token.normalized = value["normalized"].flag_or(!token.special);
  token.single_word = value["single_word"].flag_or(false);
  token.strips_left = value["lstrip"].flag_or(false);
  token.strips_right = value["rstrip"].flag_or(false);
  return token;
}

void AddedTokens::add(const AddedToken& token, Token id) {
  if (token.text.empty()) return;
  ids_.insert_or_assign(token.text, id);
  tokens_.insert_or_assign(id, Found{token, token.text});
  if (token.special) special_.insert(id);
}

void AddedTokens::index(const std::vector<Normalizer>& normalizers, const std::string& file) {
  for (const auto& [text, id] : ids_) {
    Found& found = tokens_.at(id);
    const auto fail = [&](const std::string& expected) {
      throw CheckpointError(file + ": added token " + describe(text) + ": expected " + expected);
    };
    if (found.token.text != text) fail("an id that no other token has");
    if (splits_special && special_.contains(id)) continue;
    if (found.token.normalized)
      for (const Normalizer& normalize : normalizers) normalize(found.pattern);
    if (found.pattern.empty()) fail("something that the normalizer leaves there");
    Trie& trie = found.token.normalized ? normalized_ : plain_;
    if (trie.contains(found.pattern)) fail("a text that no other token has once normalized");
    trie.add(found.pattern, id);
  }
}

std::optional<Token> AddedTokens::find(const std::string& text) const {
  const auto found = ids_.find(text);
  return found == ids_.end() ? std::nullopt : std::optional(found->second);
}

const std::string* AddedTokens::decoded(Token id) const {
  const auto found = tokens_.find(id);
  return found == tokens_.end() ? nullptr : &found->second.pattern;
}

void AddedTokens::extract(Pieces& pieces, bool normalized) const {
  Pieces result;
  for (Piece& piece : pieces) {
    if (piece.token)
      result.push_back(std::move(piece));
    else
      extract(piece, normalized ? normalized_ : plain_, result);
  }
  pieces = std::move(result);
}

void AddedTokens::extract(const Piece& piece, const Trie& trie, Pieces& result) const {
  const std::string_view text = piece.text;
  std::size_t done = 0;  // what stands before it is in the result
  const auto append = [&](std::size_t begin, std::size_t end, std::optional<Token> token) {
    result.push_back(
        {std::string(text.substr(begin, end - begin)), token, piece.is_start && begin == 0});
  };
  for (std::size_t from = 0; const auto match = trie.find(text, from);) {
    std::size_t begin = match->begin, end = from = match->begin + match->size;
    const AddedToken& token = tokens_.at(match->value).token;
    if (token.single_word && (is_word_before(text, begin) || is_word_at(text, end))) continue;
    if (token.strips_left) {
      while (begin > 0 && unicode::is_space(unicode::read_before(text, begin).code))
        begin -= unicode::read_before(text, begin).size;
      begin = std::max(begin, done);  // the token before may have taken them
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

}  // namespace tda
