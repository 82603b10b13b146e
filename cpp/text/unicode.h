// The parts of Unicode that tokenizers need: UTF-8, categories, whitespace, NFC.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace tda::unicode {

inline constexpr std::string_view replacement = "\uFFFD";

/// The bytes at `at` that form a character, or, if invalid, that decoders replace by one U+FFFD:
/// the longest start of a character, at least 1 byte.
struct Sequence {
  std::size_t size;
  bool valid;
};
Sequence next_sequence(std::string_view bytes, std::size_t at);

/// The position of the first byte that is not valid UTF-8, or npos.
std::size_t find_invalid(std::string_view bytes);
/// Every invalid sequence replaced by U+FFFD.
std::string replace_invalid(std::string_view bytes);

struct Character {
  char32_t code;
  std::size_t size;  // in bytes
};
/// The character at `at`, which is before the end of a valid UTF-8 text.
Character read(std::string_view text, std::size_t at);
/// The character that ends before `at` > 0.
Character read_before(std::string_view text, std::size_t at);
void append(std::string& text, char32_t code);

// The order of tools/unicode_tables.py.
enum class Category : std::uint8_t {
  other,
  upper,      // Lu
  title,      // Lt
  lower,      // Ll
  letter,     // Lm, Lo
  mark,       // M
  digit,      // Nd
  numeral,    // Nl
  number,     // No
  connector,  // Pc
};
Category category(char32_t);

inline bool is_letter(Category c) { return c >= Category::upper && c <= Category::letter; }
inline bool is_number(Category c) { return c >= Category::digit && c <= Category::number; }
bool is_space(char32_t);  // White_Space
bool is_word(char32_t);   // \w of regular expressions: letters, marks, digits, connectors

/// Normalization form C of a text that is valid UTF-8.
std::string nfc(std::string_view text);

}  // namespace tda::unicode
