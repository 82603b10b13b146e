// The model of a tokenizer.model: BPE and unigram with the results of the sentencepiece library
// (https://github.com/google/sentencepiece).
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

  /// content: the file's bytes, a protocol buffer. Throws CheckpointError.
  SentencePiece(std::string_view content, const std::string& file);

  const std::vector<Piece>& pieces() const { return pieces_; }
  std::optional<Token> bos() const { return control(bos_text_); }
  std::optional<Token> eos() const { return control(eos_text_); }

  void encode(std::string_view text, std::vector<Token>& ids) const;
  std::string decode(Tokens ids) const;

 private:
  /// A part of the normalized text and its piece; nullopt if it is unknown.
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

  std::optional<Token> control(const std::string& text) const;
  const Piece& piece(Token id) const { return pieces_[static_cast<std::size_t>(id)]; }
  std::string normalize(std::string_view text) const;
  /// The longest user-defined piece at `at`, or else the next character.
  std::size_t symbol_size(std::string_view text, std::size_t at, bool& is_user_defined) const;
  std::vector<Part> encode_bpe(std::string_view text) const;
  std::vector<Part> encode_unigram(std::string_view text) const;

  std::string file_;  // for messages
  std::vector<Piece> pieces_;
  bool is_bpe_ = false;
  bool byte_fallback_ = false;
  bool add_prefix_ = true;                 // adds a space before the text
  bool prefix_at_end_ = false;             // adds it after the text instead
  bool remove_spaces_ = true;              // except one between words
  bool escape_spaces_ = true;              // writes a space as ▁ in pieces
  std::string unknown_text_ = " \u2047 ";  // the decoded text of unknown pieces
  std::string bos_text_ = "<s>", eos_text_ = "</s>";

  std::unordered_map<std::string_view, Token> ids_;  // of the pieces that a text can contain
  Trie trie_;                                        // the same, for unigram
  Trie user_defined_;
  std::array<Token, 256> byte_ids_ = {};
  Token unknown_ = -1;  // -1: there is none, and byte_fallback_ is set
  float unknown_score_ = 0;
};

}  // namespace tda
