// The model of a tokenizer.model: SentencePiece's BPE and unigram, as its own library encodes and
// decodes (https://github.com/google/sentencepiece).
#pragma once

#include <tda/types.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "text/trie.h"

namespace tda {

class SentencePiece {
 public:
  enum class Kind { normal = 1, unknown, control, user_defined, unused, byte };
  struct Piece {
    std::string text;
    float score = 0;
    Kind kind = Kind::normal;
  };

  /// content: of the file, a protocol buffer. Throws CheckpointError.
  SentencePiece(std::string_view content, const std::string& file);

  const std::vector<Piece>& pieces() const { return pieces_; }
  std::optional<Token> bos() const;

  void encode(std::string_view text, std::vector<Token>& ids) const;
  std::string decode(Tokens ids) const;

 private:
  /// A stretch of the normalized text, and its piece: nothing if it is unknown.
  struct Part {
    std::string_view text;
    std::optional<Token> id;
  };

  void read(std::string_view content);
  void read_piece(std::string_view message);
  void read_trainer(std::string_view message);
  void read_normalizer(std::string_view message, bool denormalizer);
  void index();
  [[noreturn]] void fail(const std::string& what) const;

  const Piece& piece(Token id) const { return pieces_[static_cast<std::size_t>(id)]; }
  std::string normalize(std::string_view text) const;
  /// The longest user-defined piece that the text has at `at`, or else its next character.
  std::size_t symbol_size(std::string_view text, std::size_t at, bool& is_user_defined) const;
  std::vector<Part> encode_bpe(std::string_view text) const;
  std::vector<Part> encode_unigram(std::string_view text) const;

  std::string file_;  // for messages
  std::vector<Piece> pieces_;
  bool is_bpe_ = false;
  bool byte_fallback_ = false;
  bool add_prefix_ = true;                 // a space before the text,
  bool prefix_at_end_ = false;             // or behind it
  bool remove_spaces_ = true;              // but one between words
  bool escape_spaces_ = true;              // a space is ▁ in pieces
  std::string unknown_text_ = " \u2047 ";  // what unknown pieces are decoded as
  std::string bos_text_ = "<s>";

  std::unordered_map<std::string_view, Token> ids_;  // of pieces a text may contain
  Trie trie_;                                        // the same, for unigram
  Trie user_defined_;
  std::array<Token, 256> byte_ids_ = {};
  Token unknown_ = -1;  // none: byte_fallback_ is set
  float unknown_score_ = 0;
};

}  // namespace tda
