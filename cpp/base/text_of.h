#pragma once

#include <charconv>
#include <string>

namespace tda {

/// A number for messages, in any locale: 0.1, not 0.100000.
inline std::string text_of(double number) {
  char text[32];
  const std::to_chars_result end =
      std::to_chars(text, text + sizeof text, number, std::chars_format::general, 6);
  return {text, end.ptr};
}

}  // namespace tda
