// Files that are read at given places, or mapped.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>

namespace tda {

/// Closed with its owner.
struct Descriptor {
  explicit Descriptor(int descriptor) : value(descriptor) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor();
  const int value;  // negative: none
};

/// A regular file, open for reading. All that fails is a CheckpointError naming the file, the
/// system's reason and what was expected.
class File {
 public:
  /// `expected`: for messages, as "a JSON file".
  File(const std::filesystem::path& path, const char* expected);

  const std::string& name() const { return name_; }
  std::int64_t bytes() const { return bytes_; }  // when it was opened
  /// Bytes [first, first + count), which lie within. Throws if the file has been cut short since.
  void read(std::int64_t first, std::int64_t count, void* out) const;
  /// The whole file, unmapped with its last owner. A mapping shows what is done to the file, and
  /// touching a page that was cut off is a SIGBUS: only for files that nobody shortens.
  std::shared_ptr<const std::byte> map() const;
  /// Asks the system to read all of it soon.
  void prefetch() const;

 private:
  [[noreturn]] void fail(const std::string& found) const;

  std::string name_;
  const char* expected_;
  Descriptor descriptor_;
  std::int64_t bytes_ = 0;
};

}  // namespace tda
