// The interface of both kinds of tokenizer.
#pragma once

#include <tda/tokenizer.h>

#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "text/settings.h"

namespace tda {

struct Tokenizer::Impl {
  virtual ~Impl() = default;
  /// text: valid UTF-8. parse_special: see Tokenizer::encode.
  virtual std::vector<Token> encode(std::string_view text, bool add_special_tokens,
                                    bool parse_special) const = 0;
  /// ids: 0 <= id < vocab_size. Nothing is skipped.
  virtual std::string decode(Tokens ids) const = 0;

  std::int64_t vocab_size = 0;   // ids without a token decode to nothing
  std::set<Token> special = {};  // not shown if special tokens are skipped
  std::set<Token> bytes = {};    // tokens for one byte each, written <0x0A>

  /// Ids to put before others when decoding from the middle of a text, and the size of their text.
  std::vector<Token> anchor = {};
  std::size_t anchor_size = 0;
};

std::shared_ptr<Tokenizer::Impl> make_json_tokenizer(const std::string& content,
                                                     const std::string& file,
                                                     const TokenizerSettings&);

std::shared_ptr<Tokenizer::Impl> make_sentencepiece_tokenizer(const std::string& content,
                                                              const std::string& file,
                                                              TokenizerSettings);

}  // namespace tda
