// The public Tokenizer: choice of files, checks of arguments, streaming.
#include <tda/tokenizer.h>

#include <algorithm>
#include <cstdio>
#include <limits>
#include <utility>

#include "base/file.h"
#include "text/gguf_tokenizer.h"
#include "text/impl.h"
#include "text/unicode.h"

namespace tda {
namespace {

namespace fs = std::filesystem;

constexpr const char* json_file = "tokenizer.json";
constexpr const char* model_file = "tokenizer.model";
/// What may stand beside them.
constexpr const char* companions[] = {"tokenizer_config.json", "special_tokens_map.json",
                                      "added_tokens.json", "config.json"};

}  // namespace

Tokenizer::Tokenizer(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}

Tokenizer::Tokenizer(const fs::path& checkpoint, std::int64_t vocab_size) {
  std::error_code no_error;
  if (fs::is_regular_file(checkpoint, no_error)) {
    const GgufModel model(checkpoint);
    std::map<std::string, std::string> made = gguf_tokenizer_files(model);
    made["config.json"] = model.config()->dump();
    *this = from_bytes(made, checkpoint.string(), vocab_size);
    return;
  }
  std::map<std::string, std::string> files;
  const auto read = [&](const char* name) {
    std::error_code ignored;
    if (fs::exists(fs::symlink_status(checkpoint / name, ignored)))
      files[name] = read_file(checkpoint / name, "a tokenizer file", kMaxJsonBytes);
  };
  for (const char* name : {json_file, model_file}) read(name);
  for (const char* name : companions) read(name);
  *this = from_bytes(files, checkpoint.string(), vocab_size);
}

Tokenizer Tokenizer::from_bytes(const std::map<std::string, std::string>& files,
                                const std::string& name, std::int64_t vocab_size) {
  if (vocab_size < 0 || vocab_size > Field::max_tokens)
    throw OptionError("vocab_size: found " + std::to_string(vocab_size) + ", expected 0 to " +
                      std::to_string(Field::max_tokens));
  const std::string prefix = name.empty() ? "" : name + "/";
  const auto content = [&](const char* file) {
    const auto found = files.find(file);
    return found == files.end() ? nullptr : &found->second;
  };
  const TokenizerSettings settings(files, prefix);
  std::shared_ptr<Impl> impl;
  if (content(json_file))
    impl = make_json_tokenizer(*content(json_file), prefix + json_file, settings);
  else if (content(model_file))
    impl = make_sentencepiece_tokenizer(*content(model_file), prefix + model_file, settings);
  else
    throw CheckpointError((name.empty() ? "files" : name) + ": no tokenizer, looked for " +
                          json_file + " and " + model_file);
  impl->vocab_size = std::max(impl->vocab_size, vocab_size);
  impl->anchor = impl->encode("a", false, true);
  impl->anchor_size = impl->decode(impl->anchor).size();
  return Tokenizer(std::move(impl));
}

std::int64_t Tokenizer::vocab_size() const { return impl_->vocab_size; }

std::vector<Token> Tokenizer::encode(std::string_view text, bool add_special_tokens,
                                     bool parse_special) const {
  constexpr std::size_t most = std::numeric_limits<std::int32_t>::max() / 4;
  if (text.size() > most)
    throw OptionError("text: found " + std::to_string(text.size()) + " bytes, expected at most " +
                      std::to_string(most));
  if (const std::size_t at = unicode::find_invalid(text); at != text.npos) {
    char byte[8];
    std::snprintf(byte, sizeof byte, "0x%02X",
                  static_cast<unsigned>(static_cast<unsigned char>(text[at])));
    throw OptionError("text: found byte " + std::string(byte) + " at position " +
                      std::to_string(at) + ", expected UTF-8");
  }
  return impl_->encode(text, add_special_tokens, parse_special);
}

std::string Tokenizer::decode(Tokens ids, bool skip_special_tokens) const {
  std::vector<Token> kept;
  for (Token id : ids) {
    if (id < 0 || id >= impl_->vocab_size)
      throw OptionError("ids: found " + std::to_string(id) + ", expected 0 to " +
                        std::to_string(impl_->vocab_size - 1));
    if (!skip_special_tokens || !impl_->special.contains(id)) kept.push_back(id);
  }
  return impl_->decode(kept);
}

TextStream Tokenizer::stream() const { return TextStream(impl_); }

TextStream::TextStream(std::shared_ptr<const Tokenizer::Impl> tokenizer)
    : tokenizer_(std::move(tokenizer)) {}

std::string TextStream::push(Token token) {
  if (token < 0 || token >= tokenizer_->vocab_size)
    throw OptionError("token: found " + std::to_string(token) + ", expected 0 to " +
                      std::to_string(tokenizer_->vocab_size - 1));
  if (tokenizer_->special.contains(token)) return {};
  pending_.push_back(token);
  // A run of byte tokens is decoded as a whole.
  if (pending_.size() < try_at_ || tokenizer_->bytes.contains(token)) return {};
  std::string text = decode();
  if (text.empty() || text.ends_with(unicode::replacement)) {
    // A UTF-8 sequence has at most 4 bytes, so a longer run is not text. Trying it again only at
    // doubled lengths keeps the cost linear.
    const std::size_t length = pending_.size();
    try_at_ = length < 4 ? length + 1 : 2 * length;
    return {};
  }
  restart();
  return text;
}

std::string TextStream::flush() {
  std::string text = decode();
  restart();
  return text;
}

std::string TextStream::decode() const {
  // Tokenizers strip a leading space from a text, so pieces after the first are decoded behind an
  // anchor. A token's text depends on nothing else before it.
  if (is_first_) return tokenizer_->decode(pending_);
  std::vector<Token> ids = tokenizer_->anchor;
  ids.insert(ids.end(), pending_.begin(), pending_.end());
  const std::string text = tokenizer_->decode(ids);
  return text.substr(std::min(tokenizer_->anchor_size, text.size()));
}

void TextStream::restart() {
  pending_.clear();
  try_at_ = 1;
  is_first_ = false;
}

}  // namespace tda
