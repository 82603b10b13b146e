// server MODEL [THREADS]: continues every line of standard input, several at a time.
//
// The threads share one engine and one tokenizer, both const; each generation has a session, and
// so its own KV cache, masks and random numbers. An answer is what it would be alone: only their
// order depends on the threads, so that each says which line it belongs to: "#3 TEXT".
#include <tda/engine.h>
#include <tda/tokenizer.h>

#include <charconv>
#include <cstring>
#include <iostream>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "printable.h"

namespace {

class Server {
 public:
  explicit Server(const std::string& model)
      : engine_(model, {.weights = tda::WeightFormat::int8}),
        tokenizer_(model, engine_.config().vocab_size) {}

  /// What every thread does until there are no more lines.
  void work() {
    std::string line;
    for (int number; (number = next(line)) > 0;) {
      const std::string text = answer(line);
      const std::lock_guard lock(output_);
      std::cout << '#' << number << ' ' << printable(text) << std::endl;
    }
  }

 private:
  /// The line's number, from 1 on, or 0 after the last one.
  int next(std::string& line) {
    const std::lock_guard lock(input_);
    return std::getline(std::cin, line) ? ++lines_ : 0;
  }

  /// A bad request must not end the others.
  std::string answer(const std::string& prompt) const try {
    const auto result = engine_.generate(tokenizer_.encode(prompt), {.max_new_tokens = 32},
                                         tda::TdaOptions{});  // the recommended setting
    return tokenizer_.decode(result.tokens);
  } catch (const tda::Error& error) {
    return std::string("error: ") + error.what();
  }

  const tda::Engine engine_;
  const tda::Tokenizer tokenizer_;
  std::mutex input_, output_;
  int lines_ = 0;
};

int parse_threads(const char* text) {
  int threads = 0;
  const char* end = text + std::strlen(text);
  const auto [stop, error] = std::from_chars(text, end, threads);
  if (error != std::errc() || stop != end || threads < 1 || threads > 256)
    throw tda::OptionError("THREADS: found \"" + std::string(text) + "\", expected 1 to 256");
  return threads;
}

}  // namespace

int main(int count, char** arguments) try {
  if (count < 2 || count > 3) throw tda::OptionError("usage: server MODEL [THREADS]");
  const int threads = count == 3 ? parse_threads(arguments[2]) : 4;
  Server server(arguments[1]);
  std::vector<std::jthread> workers;
  for (int i = 0; i < threads; ++i) workers.emplace_back([&] { server.work(); });
} catch (const tda::Error& error) {
  std::cerr << printable(error.what(), 2) << '\n';
  return 1;
}
