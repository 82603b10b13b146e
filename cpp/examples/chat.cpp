// chat MODEL [OPTION VALUE]...: a conversation on the command line, from text to text.
//   chat MODEL --weights int8 --temperature 0.7
//
// A chat template is a program in Jinja, which this one can't run. It writes ChatML, as
// SmolLM2 and Qwen use it, or what --before and --after put around a user's words:
//   chat MODEL --before "[INST] " --after " [/INST]"
#include <tda/engine.h>
#include <tda/tokenizer.h>

#include <functional>
#include <iostream>
#include <map>
#include <optional>
#include <string>

#include "printable.h"

namespace {

struct Options {
  std::string system, before, after, between;  // texts around what is said
  tda::EngineOptions engine;
  tda::GenerateOptions generate = {.max_new_tokens = 512};
  std::optional<tda::TdaOptions> tda = tda::TdaOptions{};  // the recommended setting
};

/// All of `text` as a number.
template <class Number>
Number parse(const std::string& text, Number (*convert)(const std::string&, std::size_t*)) {
  std::size_t end = 0;
  try {
    const Number number = convert(text, &end);
    if (end == text.size()) return number;
  } catch (const std::exception&) {  // no number at all, or too large
  }
  throw tda::OptionError("found \"" + text + "\", expected a number");
}
double real(const std::string& text) {
  return parse<double>(text,
                       [](const std::string& t, std::size_t* end) { return std::stod(t, end); });
}
int integer(const std::string& text) {
  return parse<int>(text, [](const std::string& t, std::size_t* end) { return std::stoi(t, end); });
}

/// The recommended setting, or none.
std::optional<tda::TdaOptions> parse_tda(const std::string& text) {
  if (text == "on") return tda::TdaOptions{};
  if (text == "off") return {};
  throw tda::OptionError("found \"" + text + "\", expected on or off");
}

Options parse_options(int count, char** arguments) {
  Options options;
  std::optional<std::string> before, after;
  const std::map<std::string, std::function<void(const std::string&)>> known = {
      {"--system", [&](auto& value) { options.system = value; }},
      {"--before", [&](auto& value) { before = value; }},
      {"--after", [&](auto& value) { after = value; }},
      {"--weights", [&](auto& value) { options.engine.weights = tda::parse_weight_format(value); }},
      {"--threads", [&](auto& value) { options.engine.threads = integer(value); }},
      {"--max-new-tokens", [&](auto& value) { options.generate.max_new_tokens = integer(value); }},
      {"--temperature", [&](auto& value) { options.generate.temperature = real(value); }},
      {"--tda", [&](auto& value) { options.tda = parse_tda(value); }},
  };
  for (int i = 2; i < count; i += 2) {
    const auto option = known.find(arguments[i]);
    std::string names;
    for (const auto& [name, set] : known) names += " " + name;
    if (option == known.end() || i + 1 == count)
      throw tda::OptionError(std::string(arguments[i]) + ": expected an option and its value, of" +
                             names);
    try {
      option->second(arguments[i + 1]);
    } catch (const tda::OptionError& error) {
      throw tda::OptionError(option->first + ": " + error.what());
    }
  }
  if (before.has_value() != after.has_value() || (before && !options.system.empty()))
    throw tda::OptionError("--before: expected together with --after, and without --system");
  options.before = before.value_or("<|im_start|>user\n");
  options.after = after.value_or("<|im_end|>\n<|im_start|>assistant\n");
  options.between = before ? "" : "<|im_end|>\n";
  if (!options.system.empty())
    options.system = "<|im_start|>system\n" + options.system + "<|im_end|>\n";
  return options;
}

void chat(const std::string& model, const Options& options) {
  const tda::Engine engine(model, options.engine);
  const tda::Tokenizer tokenizer(model, engine.config().vocab_size);
  if (!options.between.empty() && tokenizer.encode("<|im_start|>", false).size() != 1)
    throw tda::OptionError(model +
                           ": <|im_start|> is no token of it, expected --before and --after");
  std::string conversation = options.system;
  for (std::string line; std::cout << "> " << std::flush && std::getline(std::cin, line);) {
    // Only what stands around a user's words may begin and end turns.
    if (tokenizer.encode(line, false) != tokenizer.encode(line, false, false)) {
      std::cerr << "the line spells out a special token, expected plain words\n";
      continue;
    }
    conversation += options.before + line + options.after;
    std::string answer;
    tda::TextStream text = tokenizer.stream();
    const auto show = [&](const std::string& piece) {
      answer += piece;
      std::cout << printable(piece) << std::flush;
    };
    engine.generate(tokenizer.encode(conversation, options.between.empty()), options.generate,
                    options.tda, [&](tda::Token token) {
                      show(text.push(token));
                      return true;
                    });
    show(text.flush());
    std::cout << '\n';
    conversation += answer + options.between;
  }
}

}  // namespace

int main(int count, char** arguments) try {
  if (count < 2) throw tda::OptionError("usage: chat MODEL [OPTION VALUE]...");
  chat(arguments[1], parse_options(count, arguments));
} catch (const tda::Error& error) {
  std::cerr << printable(error.what(), 2) << '\n';
  return 1;
}
