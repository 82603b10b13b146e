#include <tda/engine.h>
#include <tda/tokenizer.h>

#include <iostream>

int main() {
  const tda::Engine engine("models/SmolLM2-135M-Instruct", {.weights = tda::WeightFormat::graded});
  const tda::Tokenizer tokenizer("models/SmolLM2-135M-Instruct");
  tda::TextStream text = tokenizer.stream();
  const auto print = [&](tda::Token token) {
    std::cout << text.push(token) << std::flush;
    return true;  // go on
  };
  engine.generate(tokenizer.encode("One, two, three, four,"), {.max_new_tokens = 7},
                  tda::TdaOptions{}, print);
  std::cout << text.flush() << '\n';
}
