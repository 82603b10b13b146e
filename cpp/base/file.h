// Files that are read at given offsets, or memory-mapped.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>

namespace tda {

/// A file descriptor, closed by the destructor.
struct Descriptor {
  explicit Descriptor(int descriptor) : value(descriptor) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor();
  const int value;  // negative: none
};

/// A regular file, open for reading. Every failure throws CheckpointError naming the file, the
/// system's reason and what was expected.
class File {
 public:
  /// expected: for messages, such as "a JSON file"
  File(const std::filesystem::path& path, const char* expected);

  const std::string& name() const { return name_; }
  std::int64_t bytes() const { return bytes_; }  // at the time of opening
  /// Reads bytes [first, first + count) of the file. Throws if it has been truncated since.
  void read(std::int64_t first, std::int64_t count, void* out) const;
  /// The whole file, mapped until its last owner is gone. Changes to the file show in the mapping,
  /// and access to a page that was truncated raises SIGBUS: only for files that nobody truncates.
  std::shared_ptr<const std::byte> map() const;
  /// Prefetches the whole file into the page cache.
  void prefetch() const;

 private:
  [[noreturn]] void fail(const std::string& found) const;

  std::string name_;
  const char* expected_;
  Descriptor descriptor_;
  std::int64_t bytes_ = 0;
};

/// All of a regular file. Throws CheckpointError if it has more than `most` bytes, too.
std::string read_file(const std::filesystem::path& path, const char* expected, std::int64_t most);

}  // namespace tda
