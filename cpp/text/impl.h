// What the two kinds of tokenizer have in common.
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

  std::int64_t vocab_size = 0;   // ids without a token of their own have no text
  std::set<Token> special = {};  // without text where special tokens are skipped
  std::set<Token> bytes = {};    // tokens that stand for one byte each, written <0x0A>

  /// Ids to decode others behind, where they are not the first, and the bytes of their own text.
  std::vector<Token> anchor = {};
  std::size_t anchor_size = 0;
};

/// tokenizer_config.json, completed by special_tokens_map.json.
class TokenizerSettings {
 public:
  /// Contents of the files, null where there is none.
  TokenizerSettings(const std::string* special_tokens_map, const std::string* tokenizer_config,
                    const std::string& name);

  Field operator[](const std::string& key) const;
  /// Whether a setting says if token `kind`, "bos" or "eos", stands around every text.
  bool decides(const std::string& kind) const;
  /// If so, the token's text; `or_else` where no setting names it.
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
