// tokenize FOLDER: answers requests, one JSON object per line, with the C++ tokenizer of FOLDER.
//   {"encode": TEXT, "special": BOOL} -> [ID, ...]    "parse": false for added tokens as text
//   {"decode": [ID, ...], "special": BOOL} -> TEXT
//   {"stream": [ID, ...]} -> [PIECE, ...]    from each push() and from flush()
// For tests/python/test_cpp_tokenizer.py. An error ends the program, with its message as last line.
#include <tda/tokenizer.h>

#include <iostream>
#include <nlohmann/json.hpp>

namespace {

using nlohmann::json;

json answer(const tda::Tokenizer& tokenizer, const json& request) {
  if (request.contains("encode"))
    return tokenizer.encode(request["encode"].get<std::string>(), request["special"].get<bool>(),
                            request.value("parse", true));
  if (request.contains("decode"))
    return tokenizer.decode(request["decode"].get<std::vector<tda::Token>>(),
                            !request["special"].get<bool>());
  tda::TextStream stream = tokenizer.stream();
  json pieces = json::array();
  for (tda::Token token : request["stream"].get<std::vector<tda::Token>>())
    pieces.push_back(stream.push(token));
  pieces.push_back(stream.flush());
  return pieces;
}

}  // namespace

int main(int count, char** arguments) try {
  if (count != 2) throw tda::OptionError("usage: tokenize FOLDER");
  const tda::Tokenizer tokenizer(arguments[1]);
  for (std::string line; std::getline(std::cin, line);)
    std::cout << answer(tokenizer, json::parse(line)).dump() << '\n';
} catch (const std::exception& error) {
  std::cout << error.what() << '\n';
  return 1;
}
