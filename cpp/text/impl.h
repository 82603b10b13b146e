// The interface of both kinds of tokenizer.
#pragma once

#include <tda/tokenizer.h>

#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "text/field.h"

namespace tda {

struct Tokenizer::Impl {
  virtual ~Impl() = default;
  /// text: valid UTF-8.
  virtual std::vector<Token> encode(std::string_view text, bool add_special_tokens) const = 0;
  /// ids: 0 <= id < vocab_size. Nothing is skipped.
  virtual std::string decode(Tokens ids) const = 0;

  std::int64_t vocab_size = 0;   // ids without a token decode to nothing
  std::set<Token> special = {};  // not shown if special tokens are skipped
  std::set<Token> bytes = {};    // tokens for one byte each, written <0x0A>

  /// Ids to put before others when decoding from the middle of a text, and the size of their text.
  std::vector<Token> anchor = {};
  std::size_t anchor_size = 0;
};

/// tokenizer_config.json, with special_tokens_map.json for what it lacks.
class TokenizerSettings {
 public:
  /// The files' contents; null if a file is absent.
  TokenizerSettings(const std::string* special_tokens_map, const std::string* tokenizer_config,
                    const std::string& name);

  Field operator[](const std::string& key) const;
  /// Whether a setting decides if token `kind`, "bos" or "eos", is added to every text.
  bool decides(const std::string& kind) const;
  /// If so, the token's text; `or_else` if no setting names it.
  std::optional<std::string> around(const std::string& kind, bool by_default,
                                    const std::optional<std::string>& or_else) const;
  [[noreturn]] void fail_unknown(const std::string& kind, const std::string& token) const;

 private:
  Field whose(const std::string& key) const;
  std::string map_name_, config_name_;
  nlohmann::json map_, config_;
};

std::shared_ptr<Tokenizer::Impl> make_json_tokenizer(const std::string& content,
                                                     const std::string& file,
                                                     const TokenizerSettings&);

/// added_tokens: content of added_tokens.json, or null.
std::shared_ptr<Tokenizer::Impl> make_sentencepiece_tokenizer(const std::string& content,
                                                              const std::string& file,
                                                              const std::string* added_tokens,
                                                              const std::string& added_file,
                                                              const TokenizerSettings&);

}  // namespace tda
