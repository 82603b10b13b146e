#include "base/atomic_file.h"

#include <fcntl.h>
#include <tda/error.h>
#include <unistd.h>

#include <cerrno>
#include <string>
#include <system_error>

#include "base/file.h"

namespace tda {
namespace {

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

void write_file_atomically(const std::filesystem::path& path,
                           std::initializer_list<std::string_view> parts) {
  const auto check = [&](bool good) {
    if (good) return;
    throw CheckpointError(path.string() +
                          ": cannot be written: " + std::system_category().message(errno));
  };
  const std::filesystem::path parent = path.parent_path();
  const Descriptor folder(
      ::open(parent.empty() ? "." : parent.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  check(folder.value >= 0);
  Temporary temporary(path);
  check(temporary.file.value >= 0);
  for (std::string_view content : parts)
    while (!content.empty()) {
      const ssize_t written = ::write(temporary.file.value, content.data(), content.size());
      check(written >= 0 || errno == EINTR);
      if (written > 0) content.remove_prefix(static_cast<std::size_t>(written));
    }
  check(::fsync(temporary.file.value) == 0);
  check(::rename(temporary.name.c_str(), path.c_str()) == 0);
  temporary.renamed = true;
  // EINVAL: the file system cannot flush folders.
  check(::fsync(folder.value) == 0 || errno == EINVAL);
}

}  // namespace tda
