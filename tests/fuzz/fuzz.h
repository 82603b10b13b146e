// Shared by the fuzz targets. A target uses `data` as the file it is named after and goes on as
// long as that is valid. For any file the outcome must be a result or a tda::Error with a short,
// plain message that says what was expected.
#pragma once

#include <sys/mman.h>
#include <tda/error.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <string_view>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace fuzz {

inline std::string_view text(const std::uint8_t* data, std::size_t size) {
  return {reinterpret_cast<const char*>(data), size};
}

/// Reports a violated property and stops the fuzzer.
inline void require(bool good, const char* what, const std::string& found) {
  if (good) return;
  std::fprintf(stderr, "%s: %s\n", what, found.c_str());
  std::abort();
}

/// file: the name that messages must contain.
template <class Body>
int outcome_of(const std::string& file, const Body& body) {
  try {
    body();
  } catch (const tda::Error& error) {
    const std::string message = error.what();
    require(message.find(file) != message.npos, "the file is not named", message);
    require(message.find("expected") != message.npos, "nothing is expected", message);
    require(message.size() < 600, "a long message", message);
    for (const char c : message) require(c >= ' ' && c <= '~', "not plain text", message);
  }
  return 0;
}

/// A file in memory with these bytes.
class MemoryFile {
 public:
  explicit MemoryFile(std::string_view content) : descriptor_(::memfd_create("fuzz", 0)) {
    const ssize_t written = ::write(descriptor_, content.data(), content.size());
    require(written == static_cast<ssize_t>(content.size()), "memfd_create", path());
  }
  ~MemoryFile() { ::close(descriptor_); }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;
  std::string path() const { return "/proc/self/fd/" + std::to_string(descriptor_); }

 private:
  int descriptor_;
};

}  // namespace fuzz
