#include "base/atomic_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <tda/error.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <system_error>

#include "base/file.h"

namespace tda {
namespace {

namespace fs = std::filesystem;

[[noreturn]] void fail(const fs::path& path, const std::string& reason) {
  throw CheckpointError(path.string() + ": cannot be written: " + reason);
}

/// The file that `path` means, symbolic links followed: a rename would replace the link itself.
fs::path follow_links(const fs::path& path) {
  fs::path target = path;
  std::error_code error;
  for (int links = 0; fs::is_symlink(fs::symlink_status(target, error)); ++links) {
    if (links == 40) fail(path, std::generic_category().message(ELOOP));
    const fs::path next = fs::read_symlink(target, error);
    if (error) fail(path, error.message());
    target = target.parent_path() / next;  // `next` alone where it is absolute
  }
  return target;
}

/// Refuses to replace what is no regular file, or is meant to stay. Returns the permissions of the
/// file that is there, if there is one; the new one keeps them.
std::optional<mode_t> check_replaceable(const fs::path& path) {
  struct stat status{};
  if (::stat(path.c_str(), &status) != 0) return std::nullopt;
  if (S_ISDIR(status.st_mode)) fail(path, std::generic_category().message(EISDIR));
  if (!S_ISREG(status.st_mode)) fail(path, "found no regular file, expected one or none");
  // The bits count for root as well, to whom access() grants everything.
  if ((status.st_mode & 0222) == 0 || ::access(path.c_str(), W_OK) != 0)
    fail(path, "found a read-only file");
  return status.st_mode & 0777;
}

/// A new file next to `path`, deleted with this object unless it has been renamed.
class Temporary {
 public:
  explicit Temporary(const std::filesystem::path& path) : file(create(path.string())) {}
  ~Temporary() {
    if (file.value >= 0 && !renamed) ::unlink(name.c_str());
  }

  std::string name;  // set while `file` is made
  const Descriptor file;
  bool renamed = false;

 private:
  int create(const std::string& path) {
    for (int i = 0;; ++i) {
      name = path + ".tmp" + std::to_string(i);
      const int created = ::open(name.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
      if (created >= 0 || errno != EEXIST) return created;
    }
  }
};

}  // namespace

void expect_contents(const fs::path& path, std::initializer_list<std::string_view> parts) {
  constexpr std::size_t chunk = 1 << 20;
  const auto fail = [&](const std::string& found) {
    throw CheckpointError(path.string() + ": found " + found +
                          " when read back, expected what was written");
  };
  const File file(path, "the file just written");
  std::size_t bytes = 0;
  for (const std::string_view part : parts) bytes += part.size();
  if (static_cast<std::size_t>(file.bytes()) != bytes)
    fail(std::to_string(file.bytes()) + " bytes instead of " + std::to_string(bytes));
  std::string read(std::min(bytes, chunk), '\0');
  std::int64_t at = 0;
  for (std::string_view part : parts)
    while (!part.empty()) {
      const std::size_t count = std::min(part.size(), chunk);
      file.read(at, static_cast<std::int64_t>(count), read.data());
      if (std::memcmp(read.data(), part.data(), count) != 0)
        fail("other bytes from byte " + std::to_string(at) + " on");
      at += static_cast<std::int64_t>(count);
      part.remove_prefix(count);
    }
}

void write_file_atomically(const fs::path& path, std::initializer_list<std::string_view> parts) {
  const auto check = [&](bool good) {
    if (!good) fail(path, std::system_category().message(errno));
  };
  const std::optional<mode_t> permissions = check_replaceable(path);
  const fs::path target = follow_links(path), parent = target.parent_path();
  const Descriptor folder(
      ::open(parent.empty() ? "." : parent.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  check(folder.value >= 0);
  Temporary temporary(target);
  check(temporary.file.value >= 0);
  if (permissions) check(::fchmod(temporary.file.value, *permissions) == 0);
  for (std::string_view content : parts)
    while (!content.empty()) {
      const ssize_t written = ::write(temporary.file.value, content.data(), content.size());
      check(written >= 0 || errno == EINTR);
      if (written > 0) content.remove_prefix(static_cast<std::size_t>(written));
    }
  check(::fsync(temporary.file.value) == 0);
  // So that what is read back comes from the disk. A hint: elsewhere it comes from memory.
  ::posix_fadvise(temporary.file.value, 0, 0, POSIX_FADV_DONTNEED);
  expect_contents(temporary.name, parts);
  check(::rename(temporary.name.c_str(), target.c_str()) == 0);
  temporary.renamed = true;
  // EINVAL: the file system cannot flush folders.
  check(::fsync(folder.value) == 0 || errno == EINVAL);
}

}  // namespace tda
