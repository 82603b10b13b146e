// embed MODEL ID...: prints 16 greedy token ids that continue the prompt.
#include <tda/engine.h>

#include <cstdlib>
#include <iostream>

int main(int count, char** arguments) try {
  if (count < 3) throw tda::OptionError("found too few arguments, expected MODEL ID...");
  std::vector<tda::Token> prompt;
  for (int i = 2; i < count; ++i) prompt.push_back(std::atoi(arguments[i]));
  const tda::Engine engine(arguments[1]);
  for (tda::Token token : engine.generate(prompt, {.max_new_tokens = 16}).tokens)
    std::cout << token << ' ';
  std::cout << '\n';
} catch (const tda::Error& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
