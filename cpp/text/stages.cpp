#include "text/stages.h"

#include <array>
#include <utility>

#include "text/unicode.h"
#include "text/words.h"

namespace tda {
namespace {

/// Reads a stage, or each stage of a Sequence. parts: the key of the sequence's list.
template <class Stage, class Read>
void read_sequence(const Field& stage, const char* parts, Read read, std::vector<Stage>& result,
                   int depth = 0) {
  if (stage.is_absent()) return;
  if (stage["type"].text() != "Sequence") return result.push_back(read(stage));
  if (depth == 8) stage.fail("sequences nested less deeply");
  for (const Field& part : stage[parts].elements())
    read_sequence(part, parts, read, result, depth + 1);
}

/// A pattern or text for Replace: {"String": "..."}.
std::string read_literal(const Field& pattern) {
  if (!pattern["Regex"].is_absent()) pattern["Regex"].fail("none, but a String");
  const Field literal = pattern["String"];
  if (literal.text().empty()) literal.fail("a string that is not empty");
  return literal.text();
}

std::string read_character(const Field& field) {
  const std::string& text = field.text();
  if (text.empty() || unicode::read(text, 0).size != text.size()) field.fail("one character");
  return text;
}

Normalizer read_normalizer(const Field& stage) {
  const std::string& type = stage["type"].text();
  if (type == "NFC") return [](std::string& text) { text = unicode::nfc(text); };
  if (type == "Prepend")
    return [prefix = stage["prepend"].text()](std::string& text) {
      if (!text.empty()) text.insert(0, prefix);
    };
  if (type == "Replace")
    return [from = read_literal(stage["pattern"]), to = stage["content"].text()](
               std::string& text) { text = replace_all(text, from, to); };
  stage["type"].fail("Sequence, NFC, Prepend or Replace");
}

PreTokenizer read_digits(const Field& stage) {
  const bool each = stage["individual_digits"].flag();
  return [each](Pieces& pieces) {
    split_pieces(pieces, [each](std::string_view text, std::size_t begin) {
      const auto is_number = [&](std::size_t at) {
        return unicode::is_number(unicode::category(unicode::read(text, at).code));
      };
      const bool number = is_number(begin);
      std::size_t at = begin;
      do at += unicode::read(text, at).size;
      while (at < text.size() && is_number(at) == number && !(number && each));
      return at - begin;
    });
  };
}

/// Cuts behind every occurrence of a text.
PreTokenizer split_behind(const std::string& end) {
  return [end](Pieces& pieces) {
    split_pieces(pieces, [&](std::string_view text, std::size_t at) {
      const std::size_t found = text.find(end, at);
      return (found == text.npos ? text.size() : found + end.size()) - at;
    });
  };
}

PreTokenizer read_split(const Field& stage) {
  if (!stage["pattern"]["String"].is_absent()) {
    if (stage["behavior"].text() != "MergedWithPrevious")
      stage["behavior"].fail("\"MergedWithPrevious\" with a String");
    if (stage["invert"].flag()) stage["invert"].fail("false");
    return split_behind(read_literal(stage["pattern"]));
  }
  const Field pattern = stage["pattern"]["Regex"];
  const WordSize words = find_words(pattern.text());
  if (!words) pattern.fail("the pattern of one of " + known_patterns());
  if (stage["behavior"].text() != "Isolated") stage["behavior"].fail("\"Isolated\"");
  if (stage["invert"].flag()) stage["invert"].fail("false");
  return [words](Pieces& pieces) { split_pieces(pieces, words); };
}

PreTokenizer read_byte_level(const Field& stage) {
  const bool add_space = stage["add_prefix_space"].flag();
  const bool cut = stage["use_regex"].flag_or(true);
  return [add_space, cut](Pieces& pieces) {
    for (Piece& piece : pieces)
      if (add_space && !piece.token && !piece.text.starts_with(' ')) piece.text.insert(0, " ");
    if (cut) split_pieces(pieces, gpt2_word);
    for (Piece& piece : pieces)
      if (!piece.token) piece.text = to_byte_level(piece.text);
  };
}

/// Metaspace's prepend_scheme: its mark goes before every piece ("always"), the "first", or
/// "never".
std::string read_scheme(const Field& stage) {
  const Field scheme = stage["prepend_scheme"];
  std::string result = scheme.is_absent() ? "always" : scheme.text();
  if (result != "always" && result != "first" && result != "never")
    scheme.fail("\"always\", \"first\" or \"never\"");
  if (!stage["add_prefix_space"].flag_or(true) && result != "never")
    scheme.fail("\"never\", as add_prefix_space is false");
  return result;
}

PreTokenizer read_metaspace(const Field& stage) {
  const std::string mark = read_character(stage["replacement"]);
  const std::string scheme = read_scheme(stage);
  const bool cut = stage["split"].flag_or(true);
  return [=](Pieces& pieces) {
    for (Piece& piece : pieces) {
      if (piece.token) continue;
      piece.text = replace_all(piece.text, " ", mark);
      if ((scheme == "always" || (scheme == "first" && piece.is_start)) &&
          !piece.text.starts_with(mark))
        piece.text.insert(0, mark);
    }
    if (!cut) return;
    split_pieces(pieces, [&](std::string_view text, std::size_t at) {
      const std::size_t next = text.find(mark, at + 1);
      return (next == text.npos ? text.size() : next) - at;
    });
  };
}

PreTokenizer read_pre_tokenizer(const Field& stage) {
  const std::string& type = stage["type"].text();
  if (type == "Digits") return read_digits(stage);
  if (type == "Split") return read_split(stage);
  if (type == "ByteLevel") return read_byte_level(stage);
  if (type == "Metaspace") return read_metaspace(stage);
  stage["type"].fail("Sequence, ByteLevel, Digits, Metaspace or Split");
}

/// TemplateProcessing: the tokens around a text.
PostProcessor read_template(const Field& stage, std::int64_t vocab_size) {
  std::vector<std::optional<std::vector<Token>>> parts;  // nullopt: the text itself
  for (const Field& part : stage["single"].elements()) {
    if (const Field sequence = part["Sequence"]; !sequence.is_absent()) {
      if (sequence["id"].text() != "A") sequence["id"].fail("\"A\"");
      parts.emplace_back();
      continue;
    }
    std::vector<Token> ids;
    const Field token = stage["special_tokens"][part["SpecialToken"]["id"].text()];
    for (const Field& id : token["ids"].elements())
      ids.push_back(static_cast<Token>(id.count(vocab_size - 1)));
    parts.emplace_back(std::move(ids));
  }
  return [parts](std::vector<Token>& ids, bool add_special_tokens) {
    std::vector<Token> result;
    for (const auto& part : parts) {
      if (part && !add_special_tokens) continue;
      const std::vector<Token>& added = part ? *part : ids;
      result.insert(result.end(), added.begin(), added.end());
    }
    ids = std::move(result);
  };
}

PostProcessor read_post_processor(const Field& stage, std::int64_t vocab_size) {
  const std::string& type = stage["type"].text();
  if (type == "ByteLevel") return [](std::vector<Token>&, bool) {};  // only changes offsets
  if (type == "TemplateProcessing") return read_template(stage, vocab_size);
  stage["type"].fail("Sequence, ByteLevel or TemplateProcessing");
}

/// A run of byte tokens becomes text if it is valid UTF-8 as a whole, else one U+FFFD per byte.
void decode_bytes(std::vector<std::string>& tokens) {
  std::vector<std::string> result;
  std::string bytes;
  const auto finish = [&] {
    if (unicode::find_invalid(bytes) == bytes.npos) {
      if (!bytes.empty()) result.push_back(bytes);
    } else {
      result.insert(result.end(), bytes.size(), std::string(unicode::replacement));
    }
    bytes.clear();
  };
  for (std::string& token : tokens) {
    if (const std::optional<char> byte = byte_of(token)) {
      bytes += *byte;
      continue;
    }
    finish();
    result.push_back(std::move(token));
  }
  finish();
  tokens = std::move(result);
}

void join(std::vector<std::string>& tokens) {
  std::string text;
  for (const std::string& token : tokens) text += token;
  tokens = {std::move(text)};
}

Decoder read_metaspace_decoder(const Field& stage) {
  const std::string mark = read_character(stage["replacement"]);
  const bool strips = read_scheme(stage) != "never";
  return [=](std::vector<std::string>& tokens) {
    for (std::size_t i = 0; i < tokens.size(); ++i)
      tokens[i] = replace_all(tokens[i], mark, i == 0 && strips ? "" : " ");
  };
}

Decoder read_strip(const Field& stage) {
  const std::string content = read_character(stage["content"]);
  const std::int64_t start = stage["start"].count(1 << 20);
  // While streaming, the end of a piece cannot be told from the end of the text.
  if (stage["stop"].count(1 << 20) != 0) stage["stop"].fail("0");
  return [=](std::vector<std::string>& tokens) {
    for (std::string& token : tokens) {
      std::string_view text = token;
      for (auto i = start; i > 0 && text.starts_with(content); --i)
        text.remove_prefix(content.size());
      token = std::string(text);
    }
  };
}

Decoder read_decoder(const Field& stage) {
  const std::string& type = stage["type"].text();
  if (type == "ByteLevel")
    return [](std::vector<std::string>& tokens) {
      std::string bytes;
      for (const std::string& token : tokens) bytes += from_byte_level(token).value_or(token);
      tokens = {unicode::replace_invalid(bytes)};
    };
  if (type == "ByteFallback") return decode_bytes;
  if (type == "Fuse") return join;
  if (type == "Metaspace") return read_metaspace_decoder(stage);
  if (type == "Strip") return read_strip(stage);
  if (type == "Replace")
    return [from = read_literal(stage["pattern"]),
            to = stage["content"].text()](std::vector<std::string>& tokens) {
      for (std::string& token : tokens) token = replace_all(token, from, to);
    };
  stage["type"].fail("Sequence, ByteLevel, ByteFallback, Fuse, Metaspace, Replace or Strip");
}

/// Printable bytes map to themselves, the others in order to U+0100 and up.
struct ByteAlphabet {
  std::array<std::string, 256> characters;
  std::array<int, 0x144> bytes;  // -1: none

  ByteAlphabet() {
    bytes.fill(-1);
    char32_t next = 0x100;
    for (int byte = 0; byte < 256; ++byte) {
      const bool prints = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte != 0xAD);
      const char32_t code = prints ? static_cast<char32_t>(byte) : next++;
      unicode::append(characters[static_cast<std::size_t>(byte)], code);
      bytes[code] = byte;
    }
  }
};

const ByteAlphabet& byte_alphabet() {
  static const ByteAlphabet result;
  return result;
}

}  // namespace

std::vector<Normalizer> read_normalizers(const Field& stage) {
  std::vector<Normalizer> result;
  read_sequence(stage, "normalizers", read_normalizer, result);
  return result;
}

std::vector<PreTokenizer> read_pre_tokenizers(const Field& stage) {
  std::vector<PreTokenizer> result;
  read_sequence(stage, "pretokenizers", read_pre_tokenizer, result);
  return result;
}

std::vector<PostProcessor> read_post_processors(const Field& stage, std::int64_t vocab_size) {
  std::vector<PostProcessor> result;
  const auto read = [&](const Field& part) { return read_post_processor(part, vocab_size); };
  read_sequence(stage, "processors", read, result);
  return result;
}

std::vector<Decoder> read_decoders(const Field& stage) {
  std::vector<Decoder> result;
  read_sequence(stage, "decoders", read_decoder, result);
  if (stage.is_absent())
    result.push_back([](std::vector<std::string>& tokens) {
      for (std::size_t i = 1; i < tokens.size(); ++i) tokens[i].insert(0, " ");
    });
  result.push_back(join);
  return result;
}

std::string to_byte_level(std::string_view bytes) {
  std::string result;
  for (char c : bytes) result += byte_alphabet().characters[static_cast<unsigned char>(c)];
  return result;
}

std::optional<std::string> from_byte_level(std::string_view text) {
  std::string result;
  for (std::size_t at = 0; at < text.size();) {
    const unicode::Character character = unicode::read(text, at);
    const auto& bytes = byte_alphabet().bytes;
    if (character.code >= bytes.size() || bytes[character.code] < 0) return std::nullopt;
    result += static_cast<char>(bytes[character.code]);
    at += character.size;
  }
  return result;
}

std::optional<char> byte_of(std::string_view token) {
  if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return std::nullopt;
  int value = 0;
  for (char c : token.substr(3, 2)) {
    const int digit = c >= '0' && c <= '9'   ? c - '0'
                      : c >= 'a' && c <= 'f' ? c - 'a' + 10
                      : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                             : -1;
    if (digit < 0) return std::nullopt;
    value = 16 * value + digit;
  }
  return static_cast<char>(value);
}

std::string replace_all(std::string_view text, std::string_view from, std::string_view to) {
  std::string result;
  for (std::size_t found; (found = text.find(from)) != text.npos;
       text.remove_prefix(found + from.size()))
    result.append(text.substr(0, found)).append(to);
  return result.append(text);
}

}  // namespace tda
