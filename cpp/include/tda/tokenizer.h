// Text to token ids and back, by the checkpoint's own tokenizer.json or tokenizer.model, or by the
// vocabulary of a GGUF file.
//
//   tda::Tokenizer tokenizer("path/to/checkpoint");
//   std::vector<tda::Token> ids = tokenizer.encode("The sky is");
#pragma once

#include <tda/error.h>
#include <tda/types.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace [[gnu::visibility("default")]] tda {

class TextStream;

/// Gives the same ids and texts as the Python package's tokenizer of the same folder. Const: any
/// number of threads may use one; copies share their tables.
class Tokenizer {
 public:
  /// Reads tokenizer.json (byte-level or byte-fallback BPE), or else tokenizer.model (SentencePiece
  /// BPE or unigram), and their companions, or the vocabulary of a GGUF file. vocab_size: of the
  /// model, which may know more ids than its tokenizer has tokens. Throws CheckpointError for files
  /// that are missing, damaged, or ask for what is not supported.
  explicit Tokenizer(const std::filesystem::path& checkpoint, std::int64_t vocab_size = 0);

  /// The same from contents by file name: tokenizer.json, tokenizer.model, tokenizer_config.json,
  /// special_tokens_map.json, added_tokens.json, config.json. `name` stands before file names in
  /// messages.
  static Tokenizer from_bytes(const std::map<std::string, std::string>& files,
                              const std::string& name = "", std::int64_t vocab_size = 0);

  /// decode accepts ids from 0 to vocab_size - 1.
  std::int64_t vocab_size() const;

  /// add_special_tokens adds those the checkpoint wants around every text, as <s>. parse_special:
  /// special and other added tokens that are spelled out in the text become themselves; if false,
  /// they are encoded as any other text. Throws OptionError if text is no UTF-8.
  std::vector<Token> encode(std::string_view text, bool add_special_tokens = true,
                            bool parse_special = true) const;

  /// UTF-8; bytes that are none become U+FFFD. Throws OptionError for an unknown id.
  std::string decode(Tokens ids, bool skip_special_tokens = true) const;

  /// Text for ids that come one by one.
  TextStream stream() const;

  struct Impl;

 private:
  explicit Tokenizer(std::shared_ptr<const Impl>);
  std::shared_ptr<const Impl> impl_;
};

/// The text of a growing sequence of ids, special tokens skipped, in whole characters. All that
/// `push` and a last `flush` return adds up to `decode` of all ids, for decoders as checkpoints
/// have them; one made up to look across tokens in other ways can differ. Text is held back while
/// later ids may change it: inside a UTF-8 sequence and after byte tokens.
class TextStream {
 public:
  std::string push(Token);
  /// The rest of the text, once there are no more ids.
  std::string flush();

 private:
  friend class Tokenizer;
  explicit TextStream(std::shared_ptr<const Tokenizer::Impl>);
  std::string decode() const;
  void restart();

  std::shared_ptr<const Tokenizer::Impl> tokenizer_;
  std::vector<Token> pending_;  // ids whose text has not been returned
  std::size_t try_at_ = 1;      // decode `pending` when it is so long
  bool is_first_ = true;        // nothing returned yet
};

}  // namespace tda
