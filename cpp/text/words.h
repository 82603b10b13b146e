// Where a text is cut into words: the regular expressions that occur in the LLaMA family, each
// matched by hand. Every function gives the length of the first word of a text that is not empty.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace tda {

/// Size in bytes of the word that begins at `at`, > 0.
using WordSize = std::size_t (*)(std::string_view text, std::size_t at);

/// The cut that a regular expression stands for, or null.
WordSize find_words(std::string_view pattern);
/// For messages: what find_words knows.
std::string known_patterns();

/// GPT-2's, which the byte-level pre-tokenizer has built in.
std::size_t gpt2_word(std::string_view text, std::size_t at);

}  // namespace tda
