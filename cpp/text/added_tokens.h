// Added tokens: found in a text, with their flags, before the model sees it.
#pragma once

#include <map>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "text/field.h"
#include "text/stages.h"
#include "text/trie.h"

namespace tda {

struct AddedToken {
  std::string text;
  bool single_word = false, strips_left = false, strips_right = false, normalized = false;
  bool special = false;

  /// Of a text, which gets the flags that the library `tokenizers` gives it, or of an object with
  /// a text and flags. special: where nothing else is said.
  static AddedToken read(const Field&, bool special);
};

class AddedTokens {
 public:
  /// The flags of a token that is there already are replaced; once special it remains so. Tokens
  /// without a text are left out, for they would be found everywhere.
  void add(const AddedToken&, Token id);
  /// To be called behind the last `add`. file: for messages.
  void index(const std::vector<Normalizer>&, const std::string& file);

  /// The token's id, if it is there.
  std::optional<Token> find(const std::string& text) const;
  const std::map<std::string, Token>& ids() const { return ids_; }
  const std::set<Token>& special() const { return special_; }
  /// What the token is decoded as, null if it is none.
  const std::string* decoded(Token) const;

  /// Cuts the tokens out, `normalized` those that are to be found in normalized text.
  void extract(Pieces&, bool normalized) const;

  bool splits_special = false;  // special tokens are text like any other

 private:
  struct Found {  // a token, by the text it is found as
    AddedToken token;
    std::string pattern;
  };
  void extract(const Piece&, const Trie&, Pieces& result) const;

  std::map<std::string, Token> ids_;
  std::unordered_map<Token, Found> tokens_;
  std::set<Token> special_;
  Trie plain_, normalized_;
};

}  // namespace tda
