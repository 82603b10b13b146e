// tokenizer.json, or tokenizer.model if the data does not start like JSON. What loads must encode
// and decode. Streaming is not compared with decoding here: decoders from damaged files may depend
// on neighbouring tokens in ways that no real one does.
#include <tda/tokenizer.h>

#include "fuzz.h"

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string content(fuzz::text(data, size));
  const char* const file = content.starts_with('{') ? "tokenizer.json" : "tokenizer.model";
  return fuzz::outcome_of("tokenizer", [&] {
    const auto tokenizer = tda::Tokenizer::from_bytes({{file, content}});
    for (const char* text :
         {"", "the cat's 12 hats", " \n\t A\u00e9\u0301 \u4f60\u597d <s>x</s>"}) {
      std::vector<tda::Token> ids;
      try {
        ids = tokenizer.encode(text);
      } catch (const tda::OptionError&) {  // a character that has no token
        continue;
      }
      tda::TextStream stream = tokenizer.stream();
      for (const tda::Token id : ids) {
        fuzz::require(id >= 0 && id < tokenizer.vocab_size(), "an id", std::to_string(id));
        stream.push(id);
      }
      stream.flush();
      tokenizer.decode(ids);
    }
  });
}
