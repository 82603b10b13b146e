// tokenizer.json: added tokens are split off first; the rest of the text is normalized, split into
// words and encoded by BPE.
#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "text/added_tokens.h"
#include "text/bpe.h"
#include "text/impl.h"
#include "text/stages.h"

namespace tda {
namespace {

class JsonTokenizer final : public Tokenizer::Impl {
 public:
  JsonTokenizer(const Field& file, const TokenizerSettings& settings)
      : model_(file["model"]),
        normalizers_(read_normalizers(file["normalizer"])),
        pre_tokenizers_(read_pre_tokenizers(file["pre_tokenizer"])),
        decoders_(read_decoders(file["decoder"])) {
    const Field version = file["version"];
    if (!version.is_absent() && version.text() != "1.0") version.fail("\"1.0\"");
    add_tokens(file["added_tokens"], settings);
    added_.splits_special = settings["split_special_tokens"].flag_or(false);
    added_.index(normalizers_, settings.name() + "tokenizer.json");
    special = added_.special();
    for (const auto& [id, token] : model_.tokens()) note(id, token);
    for (const auto& [token, id] : added_.ids()) note(id, token);
    // What tokenizer.json puts around a text has the first word.
    post_processors_ = read_post_processors(file["post_processor"], vocab_size);
    std::vector<Token> around_nothing;
    for (const PostProcessor& process : post_processors_) process(around_nothing, true);
    if (!around_nothing.empty()) return;
    before_ = around(settings, "bos");
    after_ = around(settings, "eos");
  }

  std::vector<Token> encode(std::string_view text, bool add_special_tokens,
                            bool parse_special) const override {
    Pieces pieces;
    if (!text.empty()) pieces.push_back({std::string(text), {}, true});
    if (parse_special) added_.extract(pieces, false);
    for (Piece& piece : pieces)
      for (const Normalizer& normalize : normalizers_)
        if (!piece.token) normalize(piece.text);
    if (parse_special) added_.extract(pieces, true);
    for (const PreTokenizer& cut : pre_tokenizers_) cut(pieces);
    std::vector<Token> ids;
    for (const Piece& piece : pieces) {
      if (piece.token)
        ids.push_back(*piece.token);
      else
        model_.encode(piece.text, ids);
    }
    for (const PostProcessor& process : post_processors_) process(ids, add_special_tokens);
    if (add_special_tokens && before_) ids.insert(ids.begin(), *before_);
    if (add_special_tokens && after_) ids.push_back(*after_);
    return ids;
  }

  std::string decode(Tokens ids) const override {
    std::vector<std::string> tokens;
    for (Token id : ids) {
      if (const std::string* added = added_.decoded(id))
        tokens.push_back(*added);
      else if (const auto own = model_.tokens().find(id); own != model_.tokens().end())
        tokens.push_back(own->second);
    }
    for (const Decoder& decode : decoders_) decode(tokens);
    return std::move(tokens[0]);
  }

 private:
  /// Those of the file, which has flags for all of them, and those of its companions.
  void add_tokens(const Field& entries, const TokenizerSettings& settings) {
    std::map<Token, AddedToken> of_file;
    std::vector<AddedToken> tokens;
    std::set<std::string> present;
    for (const Field& entry : entries.is_absent() ? std::vector<Field>() : entries.elements()) {
      for (const char* flag : {"single_word", "lstrip", "rstrip", "normalized", "special"})
        entry[flag].flag();
      const AddedToken token = AddedToken::read(entry, false);
      of_file[entry["id"].id()] = token;
      if (!token.text.empty() && !present.insert(token.text).second)
        entry["content"].fail("a token that no other entry has");
      tokens.push_back(token);
    }
    next_ = first_new_ = model_.size();
    for (const auto& [id, token] : of_file) first_new_ = std::max<std::int64_t>(first_new_, id + 1);
    const bool begins_anew = !settings.tokenizer_class().empty();  // with the model's tokens
    if (!begins_anew)
      for (const AddedToken& token : tokens) add(token);
    for (const AddedToken& token :
         settings.tokens_to_add(of_file, begins_anew ? std::set<std::string>() : present))
      add(token);
    for (const auto& [id, token] : settings.declared()) {
      if (token.text.empty() || present.contains(token.text) || model_.find(token.text)) continue;
      if (const Token own = *added_.find(token.text); own != id)
        throw CheckpointError(settings.name() + "tokenizer.json: added token " +
                              describe(token.text) + " has id " + std::to_string(id) +
                              ", expected " + std::to_string(own) + ", the next one behind it");
    }
  }

  /// Under the id that the model knows it by, or else the next free one.
  void add(const AddedToken& token) {
    std::optional<Token> id = added_.find(token.text);
    if (!id) id = model_.find(token.text);
    if (!id && !token.text.empty()) {
      if (next_ >= Field::max_tokens)
        throw CheckpointError("tokenizer.json: found " + std::to_string(next_) +
                              " tokens, expected fewer");
      id = static_cast<Token>(next_);
    }
    if (!id) return;
    next_ = std::max<std::int64_t>(next_, *id + 1);
    added_.add(token, *id);
  }

  void note(Token id, const std::string& token) {
    vocab_size = std::max<std::int64_t>(vocab_size, id + 1);
    if (byte_of(token)) bytes.insert(id);
  }

  std::optional<Token> around(const TokenizerSettings& settings, const std::string& kind) const {
    const std::optional<std::string> text = settings.around(kind, false);
    if (!text) return std::nullopt;
    std::optional<Token> id = added_.find(*text);
    if (!id) id = model_.find(*text);
    // A token that is new is none that the model has learned.
    if (!id || (*id >= first_new_ && !settings.declares(*text))) settings.fail_unknown(kind, *text);
    return id;
  }

  Bpe model_;
  std::vector<Normalizer> normalizers_;
  std::vector<PreTokenizer> pre_tokenizers_;
  std::vector<Decoder> decoders_;
  AddedTokens added_;
  std::int64_t next_ = 0;       // id of a token that the model has none for
  std::int64_t first_new_ = 0;  // ids from here on are not of tokenizer.json
  std::vector<PostProcessor> post_processors_;
  std::optional<Token> before_, after_;
};

/// Llama 2's own tokenizer has no tokenizer.json: conversions of it differ in what they do with the
/// text behind a special token, where the class goes by `legacy`.
void set_llama_stages(nlohmann::json& file, const TokenizerSettings& settings) {
  using nlohmann::json;
  json& model = file["model"];
  if (!model.is_object() || model.value("type", "BPE") != "BPE") return;
  model["fuse_unk"] = model["byte_fallback"] = true;
  model["unk_token"] = nullptr;
  model["ignore_merges"] = false;
  const bool adds_space = settings["add_prefix_space"].flag_or(true);
  const char* const behind = settings["legacy"].flag_or(false) ? "always" : "first";
  file["normalizer"] = nullptr;
  file["pre_tokenizer"] = {{"type", "Metaspace"},
                           {"replacement", "▁"},
                           {"prepend_scheme", adds_space ? behind : "never"},
                           {"split", false}};
  json steps = {
      {{"type", "Replace"}, {"pattern", {{"String", "▁"}}}, {"content", " "}},
      {{"type", "ByteFallback"}},
      {{"type", "Fuse"}},
  };
  if (adds_space) steps.push_back({{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}});
  file["decoder"] = {{"type", "Sequence"}, {"decoders", steps}};
}

}  // namespace

std::shared_ptr<Tokenizer::Impl> make_json_tokenizer(const std::string& content,
                                                     const std::string& file,
                                                     const TokenizerSettings& settings) {
  nlohmann::json json = parse_json_object(content, file);
  if (settings.tokenizer_class() == "LlamaTokenizer") set_llama_stages(json, settings);
  return std::make_shared<JsonTokenizer>(Field(&json, file), settings);
}

}  // namespace tda
