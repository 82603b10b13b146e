#include "text/words.h"

#include <algorithm>

#include "text/unicode.h"

namespace tda {
namespace {

using unicode::Category;
using unicode::category;
using unicode::is_letter;
using unicode::is_number;
using unicode::is_space;

// The patterns as files have them. Alternatives are tried in order at each position; the last ones
// match every character, so that one always matches.
constexpr std::string_view gpt2 =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
constexpr std::string_view llama3 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3})"
    R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view qwen2 = R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N})"
                                   R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view tekken =  // Mistral's since Nemo
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+)"
    R"(|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*)"
    R"(|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

bool is_newline(char32_t c) { return c == '\r' || c == '\n'; }
/// [^\s\p{L}\p{N}]
bool is_symbol(char32_t c) {
  return !is_space(c) && !is_letter(category(c)) && !is_number(category(c));
}
/// [^\r\n\p{L}\p{N}]
bool is_prefix(char32_t c) {
  return !is_newline(c) && !is_letter(category(c)) && !is_number(category(c));
}

/// A position in the text that advances over matches.
class Scanner {
 public:
  Scanner(std::string_view text, std::size_t at) : text_(text), at_(at) {}

  std::size_t at() const { return at_; }
  bool is_at_end() const { return at_ == text_.size(); }
  char32_t peek() const { return unicode::read(text_, at_).code; }

  template <class Matches>
  bool skip_one(Matches matches) {
    if (is_at_end()) return false;
    const unicode::Character character = unicode::read(text_, at_);
    if (!matches(character.code)) return false;
    at_ += character.size;
    return true;
  }
  /// Advances over at most `most` of them; returns how many.
  template <class Matches>
  int skip(Matches matches, int most = -1) {
    int count = 0;
    while (count != most && skip_one(matches)) ++count;
    return count;
  }

 private:
  std::string_view text_;
  std::size_t at_;
};

bool is_letter_code(char32_t c) { return is_letter(category(c)); }
bool is_number_code(char32_t c) { return is_number(category(c)); }
bool is_blank(char32_t c) { return c == ' '; }

/// 's 't 're 've 'm 'll 'd; 0 if the text has none there. ſ is an s in another case.
std::size_t contraction(std::string_view text, std::size_t at, bool any_case) {
  if (text[at] != '\'') return 0;
  for (std::string_view suffix : {"s", "t", "re", "ve", "m", "ll", "d"}) {
    const std::string_view found = text.substr(at + 1, suffix.size());
    const bool equal =
        std::equal(found.begin(), found.end(), suffix.begin(), suffix.end(), [&](char a, char b) {
          if (any_case && a >= 'A' && a <= 'Z') a += 'a' - 'A';
          return a == b;
        });
    if (equal) return 1 + suffix.size();
  }
  return any_case && text.substr(at + 1).starts_with("ſ") ? 3 : 0;
}

/// \s+(?!\S)|\s+ : a run of spaces, without its last one if a word follows.
std::size_t spaces(std::string_view text, std::size_t at) {
  Scanner scanner(text, at);
  const int count = scanner.skip(is_space);
  if (scanner.is_at_end() || count == 1) return scanner.at() - at;
  return scanner.at() - unicode::read_before(text, scanner.at()).size - at;
}

/// \s*[\r\n]+ : up to the last newline of the run of spaces; 0 if it has none.
std::size_t lines(std::string_view text, std::size_t at) {
  Scanner scanner(text, at);
  std::size_t end = at;
  while (scanner.skip(is_space, 1))
    if (text[scanner.at() - 1] == '\n' || text[scanner.at() - 1] == '\r') end = scanner.at();
  return end - at;
}

/// ` ?`, then one or more that match, then any number of `ends`; 0 if none match.
template <class Matches, class Ends>
std::size_t spaced(std::string_view text, std::size_t at, Matches matches, Ends ends) {
  Scanner scanner(text, at);
  scanner.skip(is_blank, 1);
  if (!scanner.skip(matches)) return 0;
  scanner.skip(ends);
  return scanner.at() - at;
}

bool nothing(char32_t) { return false; }

/// The common end of the patterns of Llama 3, Qwen 2 and Mistral, after their letters.
template <class Ends>
std::size_t rest(std::string_view text, std::size_t at, int digits, Ends ends) {
  Scanner scanner(text, at);
  if (scanner.skip(is_number_code, digits)) return scanner.at() - at;
  if (const std::size_t size = spaced(text, at, is_symbol, ends)) return size;
  if (const std::size_t size = lines(text, at)) return size;
  return spaces(text, at);
}

template <int digits>
std::size_t llama3_word(std::string_view text, std::size_t at) {
  if (const std::size_t size = contraction(text, at, true)) return size;
  Scanner scanner(text, at);
  scanner.skip(is_prefix, 1);
  if (scanner.skip(is_letter_code)) return scanner.at() - at;
  return rest(text, at, digits, is_newline);
}

bool is_head(char32_t code) {
  const Category c = category(code);
  return c == Category::upper || c == Category::title || c == Category::letter ||
         c == Category::mark;
}
bool is_tail(char32_t code) {
  const Category c = category(code);
  return c == Category::lower || c == Category::letter || c == Category::mark;
}

/// [heads]*[tails]+, where many characters are both: heads are greedy and give back only if no tail
/// is left; 0 if there is no tail.
std::size_t camel(std::string_view text, std::size_t at) {
  Scanner scanner(text, at);
  scanner.skip(is_head);
  const std::size_t heads = scanner.at();
  if (scanner.skip(is_tail)) return scanner.at() - at;
  for (std::size_t end = heads; end > at;) {
    const unicode::Character last = unicode::read_before(text, end);
    if (is_tail(last.code)) return end - at;
    end -= last.size;
  }
  return 0;
}

/// [heads]+[tails]* ; 0 if there is no head.
std::size_t capitals(std::string_view text, std::size_t at) {
  Scanner scanner(text, at);
  if (!scanner.skip(is_head)) return 0;
  scanner.skip(is_tail);
  return scanner.at() - at;
}

std::size_t tekken_word(std::string_view text, std::size_t at) {
  Scanner scanner(text, at);
  const bool has_prefix = scanner.skip(is_prefix, 1);
  const std::size_t prefix = scanner.at() - at;
  for (const auto letters : {camel, capitals}) {
    if (const std::size_t size = letters(text, at + prefix)) return prefix + size;
    // A mark can be a prefix and a head.
    if (has_prefix)
      if (const std::size_t size = letters(text, at)) return size;
  }
  return rest(text, at, 1, [](char32_t c) { return is_newline(c) || c == '/'; });
}

struct Known {
  std::string_view name, pattern;
  WordSize words;
};
constexpr Known known[] = {{"GPT-2", gpt2, gpt2_word},
                           {"Llama 3", llama3, llama3_word<3>},
                           {"Qwen 2", qwen2, llama3_word<1>},
                           {"Mistral Nemo", tekken, tekken_word}};

}  // namespace

std::size_t gpt2_word(std::string_view text, std::size_t at) {
  if (const std::size_t size = contraction(text, at, false)) return size;
  if (const std::size_t size = spaced(text, at, is_letter_code, nothing)) return size;
  if (const std::size_t size = spaced(text, at, is_number_code, nothing)) return size;
  if (const std::size_t size = spaced(text, at, is_symbol, nothing)) return size;
  return spaces(text, at);
}

WordSize find_words(std::string_view pattern) {
  for (const Known& each : known)
    if (each.pattern == pattern) return each.words;
  return nullptr;
}

std::string known_patterns() {
  std::string names;
  for (const Known& each : known) names += (names.empty() ? "" : ", ") + std::string(each.name);
  return names;
}

}  // namespace tda
