// Splits a text into words: hand-written matchers for the regular expressions of the LLaMA family.
// Every function returns the length of the first word of a text that is not empty.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace tda {

/// Size in bytes of the word that starts at `at`, > 0.
using WordSize = std::size_t (*)(std::string_view text, std::size_t at);

/// The matcher of a regular expression, or null if there is none.
WordSize find_words(std::string_view pattern);
/// The names that find_words knows, for messages.
std::string known_patterns();

/// GPT-2's pattern, which the byte-level pre-tokenizer has built in.
std::size_t gpt2_word(std::string_view text, std::size_t at);

}  // namespace tda
