#include "text/unicode.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <span>
#include <unordered_map>
#include <vector>

#include "text/unicode_tables.inc"

namespace tda::unicode {
namespace {

unsigned byte_at(std::string_view bytes, std::size_t at) {
  return static_cast<unsigned char>(bytes[at]);
}

/// The value of the last run that starts at or before `code`.
std::uint8_t look_up(std::span<const std::uint32_t> runs, char32_t code) {
  const auto after =
      std::upper_bound(runs.begin(), runs.end(), static_cast<std::uint32_t>(code) << 8 | 0xff);
  return after == runs.begin() ? 0 : static_cast<std::uint8_t>(*std::prev(after));
}

struct Pair {
  char32_t first;
  char32_t second;  // 0: none
};

std::uint64_t key_of(Pair pair) {
  return static_cast<std::uint64_t>(pair.first) << 32 | static_cast<std::uint64_t>(pair.second);
}

/// The canonical mappings, in both directions.
struct Mappings {
  std::unordered_map<char32_t, Pair> decompositions;
  std::unordered_map<std::uint64_t, char32_t> compositions;

  Mappings() {
    const auto add_pairs = [&](std::span<const std::uint32_t> table, bool composes) {
      for (std::size_t i = 0; i < table.size(); i += 3) {
        const Pair pair = {table[i + 1], table[i + 2]};
        decompositions.emplace(table[i], pair);
        if (composes) compositions.emplace(key_of(pair), table[i]);
      }
    };
    add_pairs(pair_decompositions, true);
    add_pairs(broken_pairs, false);
    for (std::size_t i = 0; i < std::size(single_decompositions); i += 2)
      decompositions.emplace(single_decompositions[i], Pair{single_decompositions[i + 1], 0});
  }
};

const Mappings& mappings() {
  static const Mappings result;
  return result;
}

// Hangul syllables are composed of jamo by arithmetic (Unicode, section 3.12).
constexpr char32_t syllables = 0xAC00, leading = 0x1100, vowels = 0x1161, trailing = 0x11A7;
constexpr char32_t leading_count = 19, vowel_count = 21, trailing_count = 28;
constexpr char32_t block = vowel_count * trailing_count;

void decompose(char32_t code, std::vector<char32_t>& out) {
  if (code - syllables < leading_count * block) {
    const char32_t index = code - syllables;
    out.push_back(leading + index / block);
    out.push_back(vowels + index % block / trailing_count);
    if (index % trailing_count) out.push_back(trailing + index % trailing_count);
    return;
  }
  const auto found = mappings().decompositions.find(code);
  if (found == mappings().decompositions.end()) return out.push_back(code);
  decompose(found->second.first, out);
  if (found->second.second) decompose(found->second.second, out);
}

/// 0 if the two do not compose.
char32_t compose(char32_t first, char32_t second) {
  if (first - leading < leading_count && second - vowels < vowel_count)
    return syllables + (first - leading) * block + (second - vowels) * trailing_count;
  if (first - syllables < leading_count * block && (first - syllables) % trailing_count == 0 &&
      second - trailing - 1 < trailing_count - 1)
    return first + (second - trailing);
  const auto found = mappings().compositions.find(key_of({first, second}));
  return found == mappings().compositions.end() ? 0 : found->second;
}

struct Decomposed {
  char32_t code;
  std::uint8_t combining_class;
};

/// Canonical ordering: sorts runs of characters between those of class 0 by class.
std::vector<Decomposed> decompose(std::string_view text) {
  std::vector<char32_t> codes;
  for (std::size_t at = 0; at < text.size();) {
    const Character character = read(text, at);
    decompose(character.code, codes);
    at += character.size;
  }
  std::vector<Decomposed> result;
  result.reserve(codes.size());
  for (char32_t code : codes) result.push_back({code, look_up(class_runs, code)});
  for (auto begin = result.begin(); begin != result.end();) {
    const auto end = std::find_if(begin, result.end(), [](auto& c) { return !c.combining_class; });
    std::stable_sort(begin, end,
                     [](auto& a, auto& b) { return a.combining_class < b.combining_class; });
    begin = end == result.end() ? end : end + 1;
  }
  return result;
}

}  // namespace

Sequence next_sequence(std::string_view bytes, std::size_t at) {
  const unsigned lead = byte_at(bytes, at);
  if (lead < 0x80) return {1, true};
  const std::size_t size = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
  if (lead < 0xC2 || lead > 0xF4) return {1, false};
  // The second byte excludes overlong forms, surrogates, and codes above U+10FFFF.
  unsigned least = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  unsigned most = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  for (std::size_t i = 1; i < size; ++i) {
    if (at + i == bytes.size()) return {i, false};
    const unsigned next = byte_at(bytes, at + i);
    if (next < least || next > most) return {i, false};
    least = 0x80;
    most = 0xBF;
  }
  return {size, true};
}

std::size_t find_invalid(std::string_view bytes) {
  for (std::size_t at = 0; at < bytes.size();) {
    const Sequence sequence = next_sequence(bytes, at);
    if (!sequence.valid) return at;
    at += sequence.size;
  }
  return std::string_view::npos;
}

std::string replace_invalid(std::string_view bytes) {
  std::string result;
  for (std::size_t at = 0; at < bytes.size();) {
    const Sequence sequence = next_sequence(bytes, at);
    result += sequence.valid ? bytes.substr(at, sequence.size) : replacement;
    at += sequence.size;
  }
  return result;
}

Character read(std::string_view text, std::size_t at) {
  const auto tail = [&](std::size_t i) { return byte_at(text, at + i) & 0x3Fu; };
  const unsigned lead = byte_at(text, at);
  if (lead < 0x80) return {lead, 1};
  if (lead < 0xE0) return {(lead & 0x1F) << 6 | tail(1), 2};
  if (lead < 0xF0) return {(lead & 0x0F) << 12 | tail(1) << 6 | tail(2), 3};
  return {(lead & 0x07) << 18 | tail(1) << 12 | tail(2) << 6 | tail(3), 4};
}

Character read_before(std::string_view text, std::size_t at) {
  do --at;
  while ((byte_at(text, at) & 0xC0) == 0x80);
  return read(text, at);
}

void append(std::string& text, char32_t code) {
  const auto put = [&](char32_t byte) { text += static_cast<char>(byte); };
  if (code < 0x80) return put(code);
  if (code < 0x800) {
    put(0xC0 | code >> 6);
  } else if (code < 0x10000) {
    put(0xE0 | code >> 12);
    put(0x80 | (code >> 6 & 0x3F));
  } else {
    put(0xF0 | code >> 18);
    put(0x80 | (code >> 12 & 0x3F));
    put(0x80 | (code >> 6 & 0x3F));
  }
  put(0x80 | (code & 0x3F));
}

Category category(char32_t code) {
  static const auto ascii = [] {
    std::array<Category, 128> result;
    for (char32_t c = 0; c < result.size(); ++c)
      result[c] = static_cast<Category>(look_up(category_runs, c));
    return result;
  }();
  return code < ascii.size() ? ascii[code] : static_cast<Category>(look_up(category_runs, code));
}

bool is_space(char32_t code) {
  return (code >= 0x09 && code <= 0x0D) || code == 0x20 || code == 0x85 || code == 0xA0 ||
         code == 0x1680 || (code >= 0x2000 && code <= 0x200A) || code == 0x2028 || code == 0x2029 ||
         code == 0x202F || code == 0x205F || code == 0x3000;
}

bool is_word(char32_t code) {
  const Category c = category(code);
  if (c != Category::other) return c != Category::number;
  return code == 0x200C || code == 0x200D ||    // joiners
         (code >= 0x24B6 && code <= 0x24E9) ||  // letters in circles
         (code >= 0x1F130 && code <= 0x1F149) || (code >= 0x1F150 && code <= 0x1F169) ||
         (code >= 0x1F170 && code <= 0x1F189);  // letters in squares
}

std::string nfc(std::string_view text) {
  std::string result;
  const auto is_ascii = [](char c) { return static_cast<unsigned char>(c) < 0x80; };
  if (std::all_of(text.begin(), text.end(), is_ascii)) return std::string(text);
  std::vector<Decomposed> characters = decompose(text);
  // A character composes with the last starter (class 0) if nothing between the two blocks it: the
  // character before it was absorbed, or has a lower class.
  std::vector<Decomposed> composed;
  std::size_t starter = 0;
  bool has_starter = false;
  for (const Decomposed& next : characters) {
    if (has_starter) {
      const bool adjacent = starter + 1 == composed.size();
      if (adjacent || composed.back().combining_class < next.combining_class)
        if (const char32_t joined = compose(composed[starter].code, next.code)) {
          composed[starter].code = joined;
          continue;
        }
    }
    if (next.combining_class == 0) {
      starter = composed.size();
      has_starter = true;
    }
    composed.push_back(next);
  }
  for (const Decomposed& character : composed) append(result, character.code);
  return result;
}

}  // namespace tda::unicode
