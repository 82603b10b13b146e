#include "text/sentencepiece.h"

#include <tda/error.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "text/merge.h"
#include "text/stages.h"
#include "text/unicode.h"

namespace tda {
namespace {

constexpr std::string_view mark = "▁";

}  // namespace

std::optional<Token> SentencePiece::control(const std::string& text) const {
  for (std::size_t id = 0; id < pieces_.size(); ++id)
    if (pieces_[id].kind == Kind::control && pieces_[id].text == text)
      return static_cast<Token>(id);
  return std::nullopt;
}

void SentencePiece::index() {
  const auto is_in_texts = [](Kind kind) {
    return kind == Kind::normal || kind == Kind::user_defined || kind == Kind::unused;
  };
  std::unordered_map<std::string_view, Token> all;
  std::array<bool, 256> has_byte = {};
  float least = std::numeric_limits<float>::max();
  for (std::size_t i = 0; i < pieces_.size(); ++i) {
    Piece& piece = pieces_[i];
    const Token id = static_cast<Token>(i);
    const std::string name = "piece " + std::to_string(i);
    // Some conversions have a zero byte besides <0x00>; texts cannot contain it.
    if (byte_fallback_ && piece.text == std::string_view("\0", 1)) piece.kind = Kind::unused;
    if (piece.text.empty() || piece.text.size() >= 8000)
      fail(name + " has " + std::to_string(piece.text.size()) + " bytes, expected 1 to 7999");
    if (unicode::find_invalid(piece.text) != std::string::npos)
      fail(name + " is not valid UTF-8, expected text");
    if (!std::isfinite(piece.score)) fail(name + " has no finite score, expected one");
    if (piece.text == std::string_view("\0", 1) && piece.kind == Kind::unused) continue;
    if (piece.text.find('\0') != std::string::npos)
      fail(name + " has a zero byte, expected text without");
    if (!all.emplace(piece.text, id).second)
      fail(name + " is the same as piece " + std::to_string(all[piece.text]) +
           ", expected each once");
    if (is_in_texts(piece.kind)) {
      ids_.emplace(piece.text, id);
      if (!is_bpe_) trie_.add(piece.text, id);
    }
    if (piece.kind == Kind::normal) least = std::min(least, piece.score);
    if (piece.kind == Kind::user_defined) user_defined_.add(piece.text, id);
    if (piece.kind == Kind::unknown) {
      if (unknown_ >= 0) fail(name + " is a second unknown piece, expected one");
      unknown_ = id;
    }
    if (piece.kind == Kind::byte) {
      const std::optional<char> byte = byte_of(piece.text);
      if (!byte_fallback_ || !byte) fail(name + " stands for a byte, expected no byte pieces");
      byte_ids_[static_cast<unsigned char>(*byte)] = id;
      has_byte[static_cast<unsigned char>(*byte)] = true;
    }
  }
  unknown_score_ = least - 10;
  if (byte_fallback_ && std::find(has_byte.begin(), has_byte.end(), false) != has_byte.end())
    fail("byte_fallback without a piece for every byte, expected 256 of them");
  if (!byte_fallback_ && unknown_ < 0) fail("there is no unknown piece, expected one");
}

std::size_t SentencePiece::symbol_size(std::string_view text, std::size_t at,
                                       bool& is_user_defined) const {
  std::size_t size = 0;
  user_defined_.visit(text, at, [&](const Trie::Match& match) { size = match.size; });
  is_user_defined = size > 0;
  return is_user_defined ? size : unicode::read(text, at).size;
}

std::string SentencePiece::normalize(std::string_view text) const {
  bool is_user_defined;
  while (remove_spaces_ && !text.empty() &&
         text.substr(0, symbol_size(text, 0, is_user_defined)) == " ")
    text.remove_prefix(1);
  if (text.empty()) return {};
  const std::string_view space = escape_spaces_ ? mark : " ";
  std::string result;
  if (add_prefix_ && !prefix_at_end_) result += space;
  bool after_space = remove_spaces_;
  for (std::size_t at = 0, size; at < text.size(); at += size) {
    size = symbol_size(text, at, is_user_defined);
    std::string_view symbol = text.substr(at, size);
    while (after_space && symbol.starts_with(' ')) symbol.remove_prefix(1);
    for (char c : symbol) c == ' ' ? result += space : result += c;
    if (!symbol.empty()) after_space = remove_spaces_ && symbol.ends_with(' ');
  }
  while (remove_spaces_ && result.ends_with(space)) result.resize(result.size() - space.size());
  if (add_prefix_ && prefix_at_end_) result += space;
  return result;
}

std::vector<SentencePiece::Part> SentencePiece::encode_bpe(std::string_view text) const {
  std::vector<Symbol> symbols;
  bool is_user_defined;
  for (std::size_t at = 0, size; at < text.size(); at += size) {
    size = symbol_size(text, at, is_user_defined);
    symbols.push_back(
        {-1, static_cast<std::uint32_t>(at), static_cast<std::uint32_t>(size), is_user_defined});
  }
  // Unused pieces may occur as intermediate merges; they are split up again at the end.
  std::unordered_map<std::string_view, std::pair<std::string_view, std::string_view>> parts_of;
  merge_symbols(symbols, [&](const Symbol& left, const Symbol& right) -> std::optional<Merge> {
    const auto found = ids_.find(text.substr(left.begin, left.size + right.size));
    if (found == ids_.end()) return std::nullopt;
    if (piece(found->second).kind == Kind::unused)
      parts_of[found->first] = {text.substr(left.begin, left.size),
                                text.substr(right.begin, right.size)};
    return Merge{-piece(found->second).score, found->second};
  });
  std::vector<Part> result;
  const auto append = [&](auto& self, std::string_view part, int depth) -> void {
    const auto found = ids_.find(part);
    if (found == ids_.end()) return result.push_back({part, std::nullopt});
    if (piece(found->second).kind != Kind::unused || depth > 100)
      return result.push_back({part, found->second});
    const auto parts = parts_of.find(part);
    if (parts == parts_of.end()) return result.push_back({part, std::nullopt});
    self(self, parts->second.first, depth + 1);
    self(self, parts->second.second, depth + 1);
  };
  for (const Symbol& symbol : symbols) append(append, text.substr(symbol.begin, symbol.size), 0);
  return result;
}

/// The most likely segmentation (Viterbi), in single precision as in the library.
std::vector<SentencePiece::Part> SentencePiece::encode_unigram(std::string_view text) const {
  constexpr std::size_t none = std::string_view::npos;
  constexpr float limit = 100000;
  struct Best {  // the best segmentation that ends here
    float score = 0;
    std::size_t begin = none;  // of its last piece
    std::optional<Token> id = {};
  };
  std::vector<Best> best(text.size() + 1);
  std::size_t reached = 0;
  const auto offer = [&](std::size_t begin, std::size_t size, float score,
                         std::optional<Token> id) {
    Best& end = best[begin + size];
    reached = std::max(reached, begin + size);
    if (end.begin == none || score > end.score) end = {score, begin, id};
  };
  for (std::size_t at = 0, size; at < text.size(); at += size) {
    size = unicode::read(text, at).size;
    if (std::abs(best[at].score) > limit) {  // larger sums would lose precision
      const float offset = best[at].score;
      for (std::size_t i = at; i <= reached; ++i)
        if (i == at || best[i].begin != none) best[i].score -= offset;
    }
    const float score = best[at].score;
    bool has_single = false;
    trie_.visit(text, at, [&](const Trie::Match& match) {
      const Piece& found = piece(match.value);
      if (found.kind == Kind::unused) return;
      // A user-defined piece beats all others that cover it.
      const float own = found.kind == Kind::user_defined
                            ? static_cast<float>(0.1 * static_cast<double>(match.size - 1))
                            : found.score;
      offer(at, match.size, own + score, match.value);
      has_single |= match.size == size;
    });
    if (!has_single) offer(at, size, unknown_score_ + score, std::nullopt);
  }
  std::vector<Part> result;
  for (std::size_t end = text.size(); end > 0; end = best[end].begin)
    result.push_back({text.substr(best[end].begin, end - best[end].begin), best[end].id});
  std::reverse(result.begin(), result.end());
  return result;
}

void SentencePiece::encode(std::string_view text, std::vector<Token>& ids) const {
  const std::string normalized = normalize(text);
  bool after_unknown = false;
  for (const Part& part : is_bpe_ ? encode_bpe(normalized) : encode_unigram(normalized)) {
    if (part.id)
      ids.push_back(*part.id);
    else if (byte_fallback_)
      for (char c : part.text) ids.push_back(byte_ids_[static_cast<unsigned char>(c)]);
    else if (!after_unknown)  // a run of unknown characters is one token
      ids.push_back(unknown_);
    after_unknown = !part.id;
  }
}

std::string SentencePiece::decode(Tokens ids) const {
  std::string result, bytes;
  const auto finish_bytes = [&] {
    for (std::size_t at = 0; at < bytes.size();) {
      const unicode::Sequence sequence = unicode::next_sequence(bytes, at);
      // One U+FFFD for every invalid byte.
      result +=
          sequence.valid ? std::string_view(bytes).substr(at, sequence.size) : unicode::replacement;
      at += sequence.valid ? sequence.size : 1;
    }
    bytes.clear();
  };
  bool is_first = true;  // the space that encode() adds before a text has not been seen yet
  for (Token id : ids) {
    const Piece& own = piece(id);
    if (own.kind == Kind::byte) {
      bytes += *byte_of(own.text);
      continue;
    }
    finish_bytes();
    is_first = is_first && result.empty();
    if (own.kind == Kind::control) continue;
    std::string_view text = own.text;
    bool had_space = false;
    if (is_first && (add_prefix_ || remove_spaces_) && text.starts_with(mark)) {
      text.remove_prefix(mark.size());
      had_space = !remove_spaces_;  // with remove_spaces_, all leading spaces are dropped
    }
    result += own.kind == Kind::unknown ? unknown_text_ : replace_all(text, mark, " ");
    if (had_space || !result.empty()) is_first = false;
  }
  finish_bytes();
  return result;
}

}  // namespace tda
