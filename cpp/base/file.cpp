#include "base/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <tda/error.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

namespace tda {
namespace {

std::string reason(int error) { return std::generic_category().message(error); }

}  // namespace

Descriptor::~Descriptor() {
  if (value >= 0) ::close(value);
}

// O_NONBLOCK: otherwise open() would wait for the other end of a pipe.
File::File(const std::filesystem::path& path, const char* expected)
    : name_(path.string()),
      expected_(expected),
      descriptor_(::open(name_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
  struct stat status{};
  if (descriptor_.value < 0 || ::fstat(descriptor_.value, &status) != 0) fail(reason(errno));
  if (S_ISDIR(status.st_mode)) fail("found a folder");
  if (!S_ISREG(status.st_mode)) fail("not a regular file");
  bytes_ = status.st_size;
}

void File::fail(const std::string& found) const {
  throw CheckpointError(name_ + ": " + found + ", expected " + expected_);
}

void File::read(std::int64_t first, std::int64_t count, void* out) const {
  auto* next = static_cast<std::byte*>(out);
  while (count > 0) {
    const ssize_t got = ::pread(descriptor_.value, next, static_cast<std::size_t>(count), first);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail(reason(errno));
    if (got == 0) {
      struct stat status{};
      ::fstat(descriptor_.value, &status);
      fail("cut short from " + std::to_string(bytes_) + " to " + std::to_string(status.st_size) +
           " bytes while it was being read");
    }
    next += got;
    first += got;
    count -= got;
  }
}

std::shared_ptr<const std::byte> File::map() const {
  const auto size = static_cast<std::size_t>(bytes_);
  void* const address = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, descriptor_.value, 0);
  if (address == MAP_FAILED) fail("cannot be mapped: " + reason(errno));
  return {static_cast<const std::byte*>(address),
          [size](const std::byte* data) { ::munmap(const_cast<std::byte*>(data), size); }};
}

void File::prefetch() const {
#ifdef POSIX_FADV_WILLNEED
  ::posix_fadvise(descriptor_.value, 0, 0, POSIX_FADV_WILLNEED);
#endif
}

std::string read_file(const std::filesystem::path& path, const char* expected, std::int64_t most) {
  const File file(path, expected);
  if (file.bytes() > most)
    throw CheckpointError(file.name() + ": found " + std::to_string(file.bytes()) +
                          " bytes, expected " + expected + " of at most " + std::to_string(most));
  std::string content(static_cast<std::size_t>(file.bytes()), '\0');
  file.read(0, file.bytes(), content.data());
  return content;
}

}  // namespace tda
