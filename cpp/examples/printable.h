// What a program may print to a terminal of a text that is not its own.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <string>
#include <string_view>

/// `text`, UTF-8, as it may go to this stream (1: standard output, 2: standard error). A terminal
/// would obey control characters, and reorder text at bidirectional marks: there they become
/// escapes, as \x1b. Newline and tab stay, and so does everything in a pipe or a file.
inline std::string printable(std::string_view text, int stream = 1) {
  if (::isatty(stream) == 0) return std::string(text);
  std::string shown;
  while (!text.empty()) {
    const auto byte = [&](std::size_t i) -> unsigned {
      return i < text.size() ? static_cast<unsigned char>(text[i]) : 0;
    };
    unsigned code = byte(0);
    std::size_t size = 1;
    if (code == 0xc2) {  // U+0080 to U+00BF
      code = byte(1);
      size = 2;
    } else if (code == 0xe2) {  // U+2000 to U+2FFF
      code = 0x2000 + ((byte(1) & 0x3f) << 6) + (byte(2) & 0x3f);
      size = 3;
    }
    const bool is_control = (code < 0x20 && code != '\n' && code != '\t') ||
                            (code >= 0x7f && code < 0xa0 && (size > 1 || code == 0x7f));
    const bool is_mark =
        size == 3 && ((code >= 0x202a && code <= 0x202e) || (code >= 0x2066 && code <= 0x2069));
    char escape[8];
    std::snprintf(escape, sizeof escape, is_mark ? "\\u%04x" : "\\x%02x", code & 0xffff);
    shown += is_control || is_mark ? std::string_view(escape) : text.substr(0, size);
    text.remove_prefix(std::min(size, text.size()));
  }
  return shown;
}
