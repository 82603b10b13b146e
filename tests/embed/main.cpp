#include <tda/engine.h>
#include <tda/tokenizer.h>

#include <iostream>

int main() {
  const tda::Engine engine("models/SmolLM2-135M-Instruct");
  const tda::Tokenizer tokenizer("models/SmolLM2-135M-Instruct");
  tda::TextStream text = tokenizer.stream();
  const auto print = [&](tda::Token token) {
    std::cout << text.push(token) << std::flush;
    return true;  // go on
  };
  engine.generate(tokenizer.encode("The capital of France"), {.max_new_tokens = 32},
                  tda::TdaOptions{.error = 0.1}, print);
  std::cout << text.flush() << '\n';
}
