// The BPE model of a tokenizer.json: splits a word into tokens.
#pragma once

#include <tda/types.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "text/field.h"
#include "text/merge.h"

namespace tda {

class Bpe {
 public:
  /// model: the object of that name in tokenizer.json. Throws CheckpointError.
  explicit Bpe(const Field& model);

  std::int64_t size() const { return static_cast<std::int64_t>(vocabulary_.size()); }
  std::optional<Token> find(std::string_view token) const;
  /// Ids to tokens, unordered.
  const std::unordered_map<Token, std::string>& tokens() const { return tokens_; }

  void encode(std::string_view word, std::vector<Token>& ids) const;

 private:
  struct Hash {
    using is_transparent = void;
    std::size_t operator()(std::string_view text) const {
      return std::hash<std::string_view>()(text);
    }
  };
  void read_vocabulary(const Field& vocab);
  void read_merges(const Field& merges);
  /// Encodes a character that is not a token as the tokens of its bytes; false if one is missing.
  bool append_bytes(std::string_view character, std::uint32_t begin,
                    std::vector<Symbol>& symbols) const;

  std::unordered_map<std::string, Token, Hash, std::equal_to<>> vocabulary_;
  std::unordered_map<Token, std::string> tokens_;
  std::unordered_map<std::uint64_t, Merge> merges_;  // by left id << 32 | right id
  std::optional<Token> unknown_;
  bool fuse_unknown_, byte_fallback_, ignore_merges_;
};

}  // namespace tda
