// The stages of a tokenizer.json around its model: normalizer, pre-tokenizer, post-processor,
// decoder. Each is read from the file's object of that name into functions that run in order.
#pragma once

#include <tda/types.h>

#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "text/field.h"

namespace tda {

/// A part of the text while it is being tokenized.
struct Piece {
  std::string text;
  std::optional<Token> token = {};  // set: already this token, and unchanged by later stages
  bool is_start = false;            // whether the whole text starts here
};
using Pieces = std::vector<Piece>;

using Normalizer = std::function<void(std::string& text)>;
using PreTokenizer = std::function<void(Pieces&)>;
using PostProcessor = std::function<void(std::vector<Token>& ids, bool add_special_tokens)>;
using Decoder = std::function<void(std::vector<std::string>& tokens)>;

// An absent stage gives no functions; without a decoder, tokens are joined by spaces. These throw
// CheckpointError for what is not supported and for ids that are not in the vocabulary.
std::vector<Normalizer> read_normalizers(const Field&);
std::vector<PreTokenizer> read_pre_tokenizers(const Field&);
std::vector<PostProcessor> read_post_processors(const Field&, std::int64_t vocab_size);
std::vector<Decoder> read_decoders(const Field&);

/// Splits every piece that is not a token yet. cut(text, at): the size of the part that starts
/// there.
template <class Cut>
void split_pieces(Pieces& pieces, Cut cut) {
  Pieces result;
  for (Piece& piece : pieces) {
    if (piece.token) {
      result.push_back(std::move(piece));
      continue;
    }
    for (std::size_t at = 0, size; at < piece.text.size(); at += size) {
      size = cut(std::string_view(piece.text), at);
      result.push_back({piece.text.substr(at, size), {}, piece.is_start && at == 0});
    }
  }
  pieces = std::move(result);
}

/// The byte-level alphabet: a printable character for every byte.
std::string to_byte_level(std::string_view bytes);
/// The inverse; nullopt if a character is not in the alphabet.
std::optional<std::string> from_byte_level(std::string_view text);

/// The byte of a token of the form <0x0A>; nullopt for others.
std::optional<char> byte_of(std::string_view token);

std::string replace_all(std::string_view text, std::string_view from, std::string_view to);

}  // namespace tda
