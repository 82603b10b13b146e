// The safetensors format: a little-endian u64 header length N, N bytes of JSON, then raw data.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <tda/error.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <limits>
#include <system_error>

#include "checkpoint/checkpoint.h"
#include "checkpoint/json.h"

namespace tda {
namespace {

using nlohmann::json;

static_assert(std::endian::native == std::endian::little, "safetensors data is used in place");

constexpr std::int64_t header_limit = 100'000'000;  // bytes, that of the reference implementation

struct DTypeInfo {
  const char* name;
  DType dtype;
  int bits;
};

constexpr DTypeInfo dtypes[] = {
    {"F32", DType::f32, 32},          {"F16", DType::f16, 16},
    {"BF16", DType::bf16, 16},        {"F64", DType::other, 64},
    {"I64", DType::other, 64},        {"U64", DType::other, 64},
    {"C64", DType::other, 64},        {"I32", DType::other, 32},
    {"U32", DType::other, 32},        {"I16", DType::other, 16},
    {"U16", DType::other, 16},        {"I8", DType::other, 8},
    {"U8", DType::other, 8},          {"BOOL", DType::other, 8},
    {"F8_E4M3", DType::other, 8},     {"F8_E5M2", DType::other, 8},
    {"F8_E8M0", DType::other, 8},     {"F8_E4M3FNUZ", DType::other, 8},
    {"F8_E5M2FNUZ", DType::other, 8}, {"F6_E2M3", DType::other, 6},
    {"F6_E3M2", DType::other, 6},     {"F4", DType::other, 4},
};

struct Mapping {
  std::shared_ptr<const std::byte> data;
  std::int64_t bytes = 0;
};

Mapping map_file(const std::filesystem::path& path) {
  const std::string file = path.string();
  const auto fail = [&](const std::string& found) {
    throw CheckpointError(file + ": " + found + ", expected a safetensors file");
  };
  struct stat status{};
  // Before opening: open() would wait for the other end of a pipe.
  if (::stat(file.c_str(), &status) != 0) fail(std::generic_category().message(errno));
  if (S_ISDIR(status.st_mode)) fail("found a folder");
  if (!S_ISREG(status.st_mode)) fail("not a regular file");
  const int descriptor = ::open(file.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) fail(std::generic_category().message(errno));
  const int stated = ::fstat(descriptor, &status);
  const auto size = static_cast<std::size_t>(stated == 0 ? status.st_size : 0);
  void* address =
      size >= 8 ? ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, descriptor, 0) : nullptr;
  const int error = errno;
  ::close(descriptor);
  if (size < 8) fail("found " + std::to_string(size) + " bytes, not even the 8 of a header length");
  if (address == MAP_FAILED) fail("cannot be mapped: " + std::generic_category().message(error));
  return {std::shared_ptr<const std::byte>(
              static_cast<const std::byte*>(address),
              [size](const std::byte* data) { ::munmap(const_cast<std::byte*>(data), size); }),
          static_cast<std::int64_t>(size)};
}

/// Reads one tensor's entry of the header. `data_bytes`: what follows the header.
class EntryReader {
 public:
  EntryReader(const std::string& file, const std::string& name, const json& entry)
      : file_(file), name_(name), entry_(entry) {
    if (!entry.is_object()) fail("entry is " + describe(entry) + ", expected an object");
  }

  TensorView read(const std::byte* data, std::int64_t data_bytes) const {
    const DTypeInfo& info = dtype();
    TensorView view;
    view.name = name_;
    view.dtype = info.dtype;
    view.dtype_name = info.name;
    view.file = file_;
    view.shape = sizes("shape");
    const std::vector<std::int64_t> offsets = sizes("data_offsets");
    if (offsets.size() != 2)
      fail("data_offsets has " + std::to_string(offsets.size()) + " values, expected 2");
    const auto [begin, end] = std::pair(offsets[0], offsets[1]);
    if (begin > end || end > data_bytes)
      fail("data_offsets are " + std::to_string(begin) + " to " + std::to_string(end) +
           ", expected an ascending pair within the " + std::to_string(data_bytes) +
           " bytes of data");
    view.data = data + begin;
    view.bytes = end - begin;
    const std::int64_t expected = expected_bytes(view.shape, info.bits);
    if (view.bytes != expected)
      fail("data has " + std::to_string(view.bytes) + " bytes, expected " +
           std::to_string(expected) + " for its shape and dtype " + info.name);
    return view;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw CheckpointError(file_ + ": tensor \"" + name_ + "\": " + what);
  }

  const json& field(const char* key) const {
    const auto found = entry_.find(key);
    if (found == entry_.end()) fail(std::string(key) + " is missing");
    return *found;
  }

  const DTypeInfo& dtype() const {
    const json& value = field("dtype");
    for (const DTypeInfo& info : dtypes)
      if (value == info.name) return info;
    fail("dtype is " + describe(value) + ", expected one of the safetensors format, as \"BF16\"");
  }

  /// A list of integers >= 0.
  std::vector<std::int64_t> sizes(const char* key) const {
    const json& list = field(key);
    if (!list.is_array())
      fail(std::string(key) + " is " + describe(list) + ", expected an array of integers");
    std::vector<std::int64_t> result;
    for (const json& value : list) {
      constexpr std::uint64_t largest = std::numeric_limits<std::int64_t>::max();
      if (!value.is_number_unsigned() || value.get<std::uint64_t>() > largest)
        fail(std::string(key) + " holds " + describe(value) +
             ", expected integers from 0 to 2^63 - 1");
      result.push_back(value.get<std::int64_t>());
    }
    return result;
  }

  std::int64_t expected_bytes(const std::vector<std::int64_t>& shape, int bits) const {
    std::int64_t product = bits;
    for (std::int64_t size : shape)
      if (__builtin_mul_overflow(product, size, &product))
        fail("shape has more than 2^63 bits, expected one that fits into the file");
    if (product % 8 != 0) fail("shape gives a part of a byte, expected whole bytes");
    return product / 8;
  }

  const std::string& file_;
  const std::string& name_;
  const json& entry_;
};

void check_metadata(const std::string& file, const json& metadata) {
  const bool valid =
      metadata.is_object() &&
      std::all_of(metadata.begin(), metadata.end(), [](const json& v) { return v.is_string(); });
  if (!valid) throw CheckpointError(file + ": __metadata__ is expected to map strings to strings");
}

/// The tensors must tile the data: each byte belongs to exactly one.
void check_tiling(const std::string& file, const std::byte* data, std::int64_t data_bytes,
                  const std::map<std::string, TensorView, std::less<>>& tensors) {
  std::vector<const TensorView*> ordered;
  for (const auto& [name, view] : tensors) ordered.push_back(&view);
  std::sort(ordered.begin(), ordered.end(), [](const TensorView* a, const TensorView* b) {
    return std::pair(a->data, a->bytes) < std::pair(b->data, b->bytes);
  });
  std::int64_t end = 0;
  for (const TensorView* view : ordered) {
    const std::int64_t begin = view->data - data;
    if (begin != end)
      throw CheckpointError(file + ": tensor \"" + view->name + "\" begins at byte " +
                            std::to_string(begin) + " of the data, expected " +
                            std::to_string(end) + (begin < end ? " (overlap)" : " (hole)"));
    end = begin + view->bytes;
  }
  if (end != data_bytes)
    throw CheckpointError(file + ": the tensors end at byte " + std::to_string(end) +
                          " of the data, expected its last, " + std::to_string(data_bytes));
}

}  // namespace

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path) {
  const std::string file = path.string();
  const Mapping mapping = map_file(path);
  std::uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, mapping.data.get(), 8);
  const std::int64_t limit = std::min(header_limit, mapping.bytes - 8);
  if (header_bytes > static_cast<std::uint64_t>(limit))
    throw CheckpointError(file + ": header length is " + std::to_string(header_bytes) +
                          ", expected at most " + std::to_string(limit));
  const std::byte* header = mapping.data.get() + 8;
  const json entries =
      parse_json_object({reinterpret_cast<const char*>(header), header_bytes}, file);
  const std::byte* data = header + header_bytes;
  const std::int64_t data_bytes = mapping.bytes - 8 - static_cast<std::int64_t>(header_bytes);
  for (const auto& [name, entry] : entries.items()) {
    if (name == "__metadata__")
      check_metadata(file, entry);
    else
      tensors_.emplace(name, EntryReader(file, name, entry).read(data, data_bytes));
  }
  check_tiling(file, data, data_bytes, tensors_);
  mapping_ = mapping.data;
  bytes_ = mapping.bytes;
}

void SafetensorsFile::prefetch() const {
  ::madvise(const_cast<std::byte*>(mapping_.get()), static_cast<std::size_t>(bytes_),
            MADV_WILLNEED);
}

}  // namespace tda
