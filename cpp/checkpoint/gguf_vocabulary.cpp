// Which tokens of a GGUF file's vocabulary begin and end a text.
#include <algorithm>
#include <array>
#include <iterator>
#include <string_view>

#include "checkpoint/gguf_keys.h"

namespace tda {
namespace {

using nlohmann::json;

// Tokens that end a text, a turn or a message, whether the file says so or not: where a file is
// wrong about it, a model goes on and speaks for the user. The names are those llama.cpp knows.
constexpr std::string_view end_names[] = {
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|eom_id|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "[EOS]",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<end_of_utterance>",
    "<turn|>",
    "<|tool_response>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
};
// "<|end|>" ends only a part of a message where there are both tokens of one of these pairs.
constexpr std::string_view part_ends[][2] = {{"<|return|>", "<|call|>"},
                                             {"<|calls|>", "<|flush|>"}};

/// Those of end_names that are tokens, by their place in that list.
std::vector<std::int64_t> ends_by_name(const json& tokens, const std::string& architecture) {
  std::array<std::int64_t, std::size(end_names)> ids;
  ids.fill(-1);
  std::int64_t id = 0;
  for (const json& token : tokens) {
    if (token.is_string()) {
      const auto found = std::ranges::find(end_names, token.get_ref<const std::string&>());
      if (found != std::end(end_names)) ids[found - end_names] = id;
    }
    ++id;
  }
  const auto id_of = [&](std::string_view name) -> std::int64_t& {
    return ids[std::ranges::find(end_names, name) - end_names];
  };
  if (architecture.starts_with("gemma")) id_of("</s>") = -1;  // there a tag of HTML
  for (const auto& [one, other] : part_ends)
    if (id_of(one) >= 0 && id_of(other) >= 0) id_of("<|end|>") = -1;
  std::vector<std::int64_t> result;
  std::ranges::copy_if(ids, std::back_inserter(result), [](std::int64_t i) { return i >= 0; });
  return result;
}

}  // namespace

json generation_ids(GgufKeys& keys, std::int64_t vocabulary) {
  const json tokens = keys.find("tokenizer.ggml.tokens");
  // What SentencePiece files without these ids mean, as far as the vocabulary has them.
  const bool sentencepiece = keys.text("tokenizer.ggml.model", "") == "llama";
  const auto id_of = [&](const std::string& name, std::int64_t usual) {
    const bool has_usual = sentencepiece && usual < std::ssize(tokens);
    return keys.special_token(name, vocabulary, has_usual ? usual : -1);
  };
  json result = json::object(), ends = json::array();
  if (const std::int64_t bos = id_of("bos", 1); bos >= 0) result["bos_token_id"] = bos;
  const auto add = [&](std::int64_t id) {
    if (id >= 0 && std::ranges::find(ends, json(id)) == ends.end()) ends.push_back(id);
  };
  add(id_of("eos", 2));
  add(id_of("eot", -1));
  add(id_of("eom", -1));
  const std::string several = "tokenizer.ggml.eos_token_ids";
  const json listed = keys.find(several);
  if (!listed.is_null() && !listed.is_array()) keys.fail(several, listed, "an array of token ids");
  for (const json& id : listed) add(keys.token(several, id, vocabulary));
  for (const std::int64_t id : ends_by_name(tokens, keys.architecture())) add(id);
  if (!ends.empty()) result["eos_token_id"] = ends.size() == 1 ? ends[0] : ends;
  return result;
}

}  // namespace tda
