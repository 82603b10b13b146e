// Errors, invalid UTF-8, streaming and cost of the C++ tokenizer.
// tests/python/test_cpp_tokenizer.py compares its ids with the Python libraries'.
#include <sys/stat.h>
#include <tda/tokenizer.h>

#include <string>
#include <vector>

#include "check.h"
#include "fixtures.h"
#include "text/unicode.h"

namespace {

using fixtures::json;
using tda::CheckpointError;
using tda::OptionError;
using Files = std::map<std::string, std::string>;

/// Byte-level: single bytes, "aa", "aaaa" and so on, and special tokens from id 1000 on.
json byte_level() {
  json vocab, merges = json::array();
  for (int byte = 0; byte < 256; ++byte) {
    std::string token;
    const bool prints = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte != 0xAD);
    static char32_t next = 0x100;
    tda::unicode::append(token, prints ? static_cast<char32_t>(byte) : next++);
    vocab[token] = byte;
  }
  std::string run = "a";
  for (int id = 256; id < 260; ++id, run += run) {
    vocab[run + run] = id;
    merges.push_back({run, run});
  }
  const json bytes = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}};
  const json added = {{"id", 260},       {"content", "<s>"}, {"single_word", false},
                      {"lstrip", false}, {"rstrip", false},  {"normalized", false},
                      {"special", true}};
  return {{"version", "1.0"},
          {"added_tokens", {added}},
          {"normalizer", nullptr},
          {"pre_tokenizer", bytes},
          {"post_processor", nullptr},
          {"decoder", bytes},
          {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", merges}}}};
}

tda::Tokenizer make(const json& tokenizer, const std::string& config = "") {
  Files files = {{"tokenizer.json", tokenizer.dump()}};
  if (!config.empty()) files["tokenizer_config.json"] = config;
  return tda::Tokenizer::from_bytes(files, "folder");
}

const tda::Tokenizer& bytes() {
  static const json content = byte_level();
  static const tda::Tokenizer result = make(content);
  return result;
}

/// byte_level with one value replaced.
json with(const std::string& pointer, const json& value) {
  static const json content = byte_level();
  json result = content;
  result[json::json_pointer(pointer)] = value;
  return result;
}

// ---- protocol buffers, to write a tokenizer.model ----

std::string varint(std::uint64_t value) {
  std::string result;
  for (; value >= 0x80; value >>= 7) result += static_cast<char>(value | 0x80);
  return result + static_cast<char>(value);
}
std::string number(int field, std::uint64_t value) { return varint(field << 3) + varint(value); }
std::string message(int field, const std::string& content) {
  return varint(field << 3 | 2) + varint(content.size()) + content;
}
std::string piece(const std::string& text, int type, std::uint32_t score_bits = 0) {
  return message(1, message(1, text) + varint(2 << 3 | 5) +
                        std::string(reinterpret_cast<const char*>(&score_bits), 4) +
                        number(3, type));
}
const std::string small_model = piece("<unk>", 2) + piece("<s>", 3) + piece("▁", 1) +
                                piece("a", 1) + piece("b", 1) + piece("ab", 1) +
                                message(2, number(3, 2));

tda::Tokenizer make_model(const std::string& content, const Files& others = {}) {
  Files files = others;
  files["tokenizer.model"] = content;
  return tda::Tokenizer::from_bytes(files, "folder");
}

}  // namespace

TEST(texts_become_ids_and_texts_again) {
  using Ids = std::vector<tda::Token>;
  CHECK((bytes().encode("<s>b aaa") == Ids{260, 'b', 32, 256, 'a'}));
  CHECK(bytes().encode("").empty());
  CHECK(bytes().decode(bytes().encode("<s>größer 世界\n")) == "größer 世界\n");
  CHECK(bytes().decode(bytes().encode("<s>x"), false) == "<s>x");
  const tda::Tokenizer model = make_model(small_model);
  CHECK((model.encode("ab c") == Ids{1, 2, 5, 2, 0}));
  CHECK(model.decode(Ids{1, 2, 5, 2, 4}) == "ab b");
}

TEST(text_that_is_no_utf8_is_refused) {
  struct Case {
    const char* text;
    const char* message;
  };
  for (const auto& [text, message] : {Case{"a\xff", "found byte 0xFF at position 1"},
                                      Case{"\xc3", "found byte 0xC3 at position 0"},
                                      Case{"ab\xc0\x80", "found byte 0xC0 at position 2"},
                                      Case{"\xed\xa0\x80", "found byte 0xED at position 0"},
                                      Case{"\xf4\x90\x80\x80", "found byte 0xF4 at position 0"},
                                      Case{"é\x80", "found byte 0x80 at position 2"}})
    CHECK_THROWS(bytes().encode(text), OptionError, message);
}

TEST(ids_that_are_none_are_refused) {
  const std::vector<tda::Token> negative = {-1}, large = {261};
  CHECK_THROWS(bytes().decode(negative), OptionError, "ids: found -1, expected 0 to 260");
  CHECK_THROWS(bytes().decode(large), OptionError, "ids: found 261, expected 0 to 260");
  CHECK_THROWS(bytes().stream().push(261), OptionError, "token: found 261");
  const Files files = {{"tokenizer.json", byte_level().dump()}};
  CHECK(tda::Tokenizer::from_bytes(files, "", 512)
            .decode(large)
            .empty());  // the model's vocabulary is larger
  CHECK_THROWS(tda::Tokenizer::from_bytes(files, "", -1), OptionError, "vocab_size: found -1");
}

TEST(streams_give_whole_characters) {
  tda::TextStream stream = bytes().stream();
  std::vector<std::string> pieces;
  for (tda::Token token : bytes().encode("a世<s>b\u00e9")) pieces.push_back(stream.push(token));
  const std::vector<std::string> expected = {"a", "", "", "世", "", "b", "", "é"};
  CHECK(pieces == expected);
  CHECK(stream.push(0xE4) == "");
  CHECK(stream.flush() == "\uFFFD");
  CHECK(stream.flush() == "");
}

TEST(long_words_cost_little_more_than_their_length) {
  // A quadratic merge would take minutes.
  const std::string word(400'000, 'a');
  CHECK(bytes().encode(word).size() == word.size() / 16);
  CHECK(make_model(small_model).encode(word, false).size() == word.size() + 1);
  std::string pairs;
  for (int i = 0; i < 200'000; ++i) pairs += "ab";
  CHECK(make_model(small_model).encode(pairs, false).size() == pairs.size() / 2 + 1);
  CHECK(bytes().encode(std::string(400'000, ' ')).size() == 400'000);
}

TEST(files_are_needed) {
  fixtures::Folder folder;
  CHECK_THROWS(tda::Tokenizer(folder.path), CheckpointError,
               "no tokenizer, looked for tokenizer.json and tokenizer.model");
  CHECK_THROWS(tda::Tokenizer("/nowhere"), CheckpointError, "/nowhere: no tokenizer");
  folder.write("tokenizer.json", byte_level().dump());
  CHECK(tda::Tokenizer(folder.path).vocab_size() == 261);
  std::filesystem::create_directory(folder.path / "added_tokens.json");
  CHECK_THROWS(tda::Tokenizer(folder.path), CheckpointError,
               "added_tokens.json: found a folder, expected a tokenizer file");
  std::filesystem::remove(folder.path / "added_tokens.json");
  ::mkfifo((folder.path / "added_tokens.json").c_str(), 0666);  // must not be waited for
  CHECK_THROWS(tda::Tokenizer(folder.path), CheckpointError,
               "added_tokens.json: not a regular file, expected a tokenizer file");
}

TEST(json_that_is_not_supported_is_refused) {
  struct Case {
    std::string pointer;
    json value;
    const char* message;
  };
  const json nested = json::parse(std::string(9, '[') + std::string(9, ']'));
  json sequence = {{"type", "NFC"}};
  for (int i = 0; i < 10; ++i) sequence = {{"type", "Sequence"}, {"normalizers", {sequence}}};
  const auto split = [](const std::string& pattern, const std::string& behavior) {
    return json{{"type", "Split"},
                {"pattern", {{"Regex", pattern}}},
                {"behavior", behavior},
                {"invert", false}};
  };
  const Case cases[] = {
      {"/version", "2.0", "folder/tokenizer.json: version is \"2.0\", expected \"1.0\""},
      {"/model", nullptr, "model is null, expected an object"},
      {"/model/type", "Unigram", "model.type is \"Unigram\", expected \"BPE\""},
      {"/model/dropout", 0.1, "model.dropout is 0.1, expected null or 0"},
      {"/model/end_of_word_suffix", "</w>", "model.end_of_word_suffix is \"</w>\""},
      {"/model/byte_fallback", 1, "model.byte_fallback is 1, expected true or false"},
      {"/model/unk_token", "?!", "model.unk_token is \"?!\", expected a token"},
      {"/model/vocab", json::array(), "model.vocab is an array, expected an object"},
      {"/model/vocab/x", -1, "model.vocab.x is -1, expected an integer from 0"},
      {"/model/vocab/x", 4194304, "model.vocab.x is 4194304"},
      {"/model/vocab/x", 1.5, "model.vocab.x is 1.5"},
      {"/model/vocab/xyz", 7, "expected an id of its own"},
      {"/model/vocab/\x01", -1, "model.vocab[\"\\u0001\"] is -1"},
      {"/model/vocab/" + std::string(999, 'x'), -1, "xxx...] is -1"},
      {"/model/merges", "a b", "model.merges is \"a b\", expected an array"},
      {"/model/merges/0", "a b c", "model.merges[0] is \"a b c\", expected two tokens"},
      {"/model/merges/0", {"a"}, "model.merges[0] is an array, expected two tokens"},
      {"/model/merges/0", "a b", "model.merges[0] is \"a b\", expected two tokens that are in"},
      {"/normalizer", {{"type", "Lowercase"}}, "normalizer.type is \"Lowercase\", expected Sequ"},
      {"/normalizer", sequence, "expected sequences nested less deeply"},
      {"/normalizer", {{"type", "Prepend"}}, "normalizer.prepend is missing, expected a string"},
      {"/normalizer",
       {{"type", "Replace"}, {"pattern", {{"Regex", " "}}}, {"content", ""}},
       "normalizer.pattern.Regex is \" \", expected none, but a String"},
      {"/pre_tokenizer", "ByteLevel", "pre_tokenizer is \"ByteLevel\", expected an object"},
      {"/pre_tokenizer/type", "Whitespace", "pre_tokenizer.type is \"Whitespace\""},
      {"/pre_tokenizer", split("\\w+", "Isolated"), "expected the pattern of one of GPT-2, Llama"},
      {"/pre_tokenizer",
       {{"type", "Metaspace"}, {"replacement", "__"}},
       "pre_tokenizer.replacement is \"__\", expected one character"},
      {"/post_processor",
       {{"type", "TemplateProcessing"}, {"single", {{{"SpecialToken", {{"id", "<s>"}}}}}}},
       "post_processor.special_tokens is missing, expected an object"},
      {"/post_processor",
       {{"type", "TemplateProcessing"},
        {"single", {{{"SpecialToken", {{"id", "<s>"}}}}}},
        {"special_tokens", {{"<s>", {{"ids", {261}}}}}}},
       "special_tokens[\"<s>\"].ids[0] is 261, expected an integer from 0 to 260"},
      {"/post_processor", {{"type", "BertProcessing"}}, "post_processor.type is \"BertProc"},
      {"/decoder/type", "WordPiece", "decoder.type is \"WordPiece\""},
      {"/added_tokens/0/special", nullptr, "added_tokens[0].special is null"},
      {"/added_tokens", {5}, "added_tokens[0] is 5, expected an object"},
      {"/added_tokens/1", byte_level()["added_tokens"][0], "added_tokens[1].content is \"<s>\""},
  };
  for (const Case& c : cases)
    CHECK_THROWS(make(with(c.pointer, c.value)), CheckpointError, c.message);
  CHECK_THROWS(tda::Tokenizer::from_bytes({{"tokenizer.json", "{\"a\": 1, \"a\": 2}"}}),
               CheckpointError, "tokenizer.json: key \"a\" appears twice");
  CHECK_THROWS(tda::Tokenizer::from_bytes({{"tokenizer.json", "{"}}), CheckpointError,
               "tokenizer.json: expected JSON");
}

TEST(numbers_that_are_not_finite_do_no_harm_where_nobody_reads_them) {
  const auto config = R"({"x": NaN, "y": [-Infinity, Infinity], "z": "NaN\" NaN"})";
  CHECK(make(byte_level(), config).encode("a").size() == 1);
  CHECK_THROWS(make(byte_level(), R"({"add_bos_token": NaN})"), CheckpointError,
               "add_bos_token is \"NaN\", expected true or false");
  CHECK_THROWS(make(byte_level(), R"({"x": nan})"), CheckpointError, "expected JSON");
}

TEST(settings_that_are_not_supported_are_refused) {
  const json content = byte_level();
  CHECK_THROWS(make(content, R"({"add_bos_token": true, "bos_token": "<x>"})"), CheckpointError,
               "folder/tokenizer_config.json: bos_token is \"<x>\", expected a token of the voc");
  CHECK_THROWS(make(content, R"({"add_bos_token": true, "bos_token": [1]})"), CheckpointError,
               "bos_token is an array");
  CHECK_THROWS(make(content, R"({"add_eos_token": "yes"})"), CheckpointError,
               "add_eos_token is \"yes\", expected true or false");
  CHECK_THROWS(make(content, "[1]"), CheckpointError, "expected a JSON object");
}

TEST(models_that_are_not_supported_are_refused) {
  struct Case {
    std::string content;
    const char* message;
  };
  const std::string unknown = piece("<unk>", 2), bpe = message(2, number(3, 2));
  const Case cases[] = {
      {"", "folder/tokenizer.model: found no pieces"},
      {"{", "found wire type 3, expected 0, 1, 2 or 5"},
      {"\x0a\x05", "ends inside a field: found 0 bytes, expected 5"},
      {std::string(12, '\xff'), "found a number of more than 64 bits"},
      {number(1, 5), "field 1 has wire type 0, expected 2"},
      {unknown + message(2, number(3, 3)), "trainer_spec.model_type is 3, expected 1 (unigram)"},
      {unknown + message(3, message(2, "xxxx")), "normalizer_spec.precompiled_charsmap has 4 byt"},
      {unknown + message(5, message(2, "x")), "denormalizer_spec.precompiled_charsmap"},
      {bpe + piece("a", 1), "there is no unknown piece"},
      {unknown + unknown, "piece 1 is the same as piece 0"},
      {unknown + piece("?", 2), "piece 1 is a second unknown piece"},
      {unknown + piece("", 1), "piece 1 has 0 bytes, expected 1 to 7999"},
      {unknown + piece(std::string(8000, 'a'), 1), "piece 1 has 8000 bytes"},
      {unknown + piece("\xff", 1), "piece 1 is not valid UTF-8"},
      {unknown + piece("a", 7), "piece 1 is of type 7, expected 1 to 6"},
      {unknown + piece("a", 1, 0x7fc00000), "piece 1 has no finite score"},
      {unknown + piece("<0x41>", 6), "piece 1 stands for a byte, expected no byte pieces"},
      {unknown + message(2, number(35, 1)), "byte_fallback without a piece for every byte"},
  };
  for (const Case& c : cases) CHECK_THROWS(make_model(c.content), CheckpointError, c.message);
  for (std::size_t size = 0; size < small_model.size(); ++size) try {
      make_model(small_model.substr(0, size));  // cut between pieces, it is still a valid model
    } catch (const CheckpointError&) {
    }
  CHECK_THROWS(make_model(small_model, {{"added_tokens.json", R"({"x": "y"})"}}), CheckpointError,
               "folder/added_tokens.json: x is \"y\", expected an integer");
  // A token without a text would be found everywhere.
  CHECK(make_model(small_model, {{"added_tokens.json", R"({"": 9})"}}).encode("ab c") ==
        make_model(small_model).encode("ab c"));
  const auto decoder = [](const char* text) { return Files{{"tokenizer_config.json", text}}; };
  CHECK_THROWS(make_model(small_model, decoder(R"({"added_tokens_decoder": {"x": {}}})")),
               CheckpointError, "added_tokens_decoder.x is an object, expected a token id");
  CHECK_THROWS(make_model(small_model, decoder(R"({"added_tokens_decoder": {"7": {}}})")),
               CheckpointError, "added_tokens_decoder.7.content is missing");
}

int main() { return run_tests(); }
