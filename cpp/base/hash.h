#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

namespace tda {

/// FNV-1a (http://www.isthe.com/chongo/tech/comp/fnv), 64 bits.
class Hash {
 public:
  void add(const void* data, std::int64_t bytes) {
    const auto* p = static_cast<const unsigned char*>(data);
    for (std::int64_t i = 0; i < bytes; ++i) state_ = (state_ ^ p[i]) * 0x100000001b3;
  }
  void add(std::int64_t value) { add(&value, sizeof value); }
  void add(const std::string& text) {
    add(static_cast<std::int64_t>(text.size()));
    add(text.data(), static_cast<std::int64_t>(text.size()));
  }
  std::string hex() const {
    char text[17];
    std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(state_));
    return text;
  }

 private:
  std::uint64_t state_ = 0xcbf29ce484222325;
};

}  // namespace tda
