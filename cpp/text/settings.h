// What a checkpoint's files say about its tokenizer beside the vocabulary itself. Where files
// disagree, and where they are silent, the answer is that of `AutoTokenizer` of transformers 5, as
// python/tdaengine/tokenizer_files.py has it for Python.
#pragma once

#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "text/added_tokens.h"
#include "text/field.h"

namespace tda {

class TokenizerSettings {
 public:
  /// files: contents by name, of which those that tokenizer.json and tokenizer.model have beside
  /// them are read. name: stands before file names in messages.
  TokenizerSettings(const std::map<std::string, std::string>& files, const std::string& name);

  /// A value of tokenizer_config.json, or of special_tokens_map.json where that overrules it.
  Field operator[](const std::string& key) const;
  /// "LlamaTokenizer" and others with special tokens of their own, "" for those without.
  const std::string& tokenizer_class() const { return class_; }
  /// Added tokens that files beside the vocabulary list.
  const std::map<Token, AddedToken>& declared() const { return declared_; }
  bool declares(const std::string& token) const;
  const std::string& name() const { return name_; }

  /// For a role that no file names.
  void set_default_role(const std::string& role, const std::string& token);
  /// The token, if any, that stands before ("bos") or behind ("eos") every text.
  std::optional<std::string> around(const std::string& kind, bool by_default) const;
  [[noreturn]] void fail_unknown(const std::string& kind, const std::string& token) const;

  /// What is to be added to the tokens that are `present`, in order. of_file: the added tokens of
  /// tokenizer.json.
  std::vector<AddedToken> tokens_to_add(const std::map<Token, AddedToken>& of_file,
                                        const std::set<std::string>& present) const;

 private:
  struct File {
    std::string name;
    nlohmann::json content = nlohmann::json::object();
    bool is_there = false;
    // In the order of the file, as ids are given to new tokens.
    std::vector<std::string> keys = {}, extra_keys = {};  // of extra_special_tokens
  };
  struct Role {
    std::string name;
    std::optional<AddedToken> token;
    bool is_stated = false;  // by a file
  };
  static File read(const std::map<std::string, std::string>& files, const std::string& prefix,
                   const char* name);
  void find_class(const File& model, bool is_byte_level);
  void read_roles(const File&);
  void read_role(const std::string& name, const Field& token);
  void read_extra(const File&);
  void read_declared();
  void read_added_tokens(const File&);
  Role& role(const std::string& name);

  std::string name_, class_;
  File config_, map_;
  std::vector<Role> roles_;
  std::vector<AddedToken> extra_;
  std::map<Token, AddedToken> declared_;
  bool only_declared_ = false;  // no tokens but these are added to those of tokenizer.json
};

}  // namespace tda
