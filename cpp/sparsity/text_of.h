#pragma once

#include <sstream>
#include <string>

namespace tda {

/// A number for messages: 0.1, not 0.100000.
template <typename Number>
std::string text_of(Number number) {
  std::ostringstream text;
  text << number;
  return text.str();
}

}  // namespace tda
