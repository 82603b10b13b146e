// The container: what is said about a file's layout and how it is checked. What the keys of a model
// mean is in gguf_model.cpp.
#include "checkpoint/gguf.h"

#include <tda/error.h>

#include <algorithm>
#include <cstring>
#include <string_view>

#include "base/json.h"
#include "base/size.h"

namespace tda {
namespace {

using nlohmann::json;

// Far more than any model has. They bound the time and memory that a header can cost.
constexpr std::int64_t kMostHeader = std::int64_t{1} << 28;  // bytes before the tensors' data
constexpr std::uint64_t kMostEntries = 1 << 16;              // keys; tensors
constexpr std::uint64_t kMostName = (1 << 16) - 1;           // bytes, as the format states
constexpr std::uint32_t kMostDimensions = 4;
constexpr std::int64_t kMostItems = std::int64_t{1} << 22;  // of an array that is asked for

namespace kinds {
enum : std::uint32_t { u8, i8, u16, i16, u32, i32, f32, boolean, string, array, u64, i64, f64 };
}
constexpr std::int64_t number_bytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

bool is_number(std::uint32_t kind) { return kind < std::size(number_bytes) && number_bytes[kind]; }

/// Reads a file from front to back through a small buffer.
class Reader {
 public:
  Reader(const File& file, std::int64_t end) : file_(file), end_(end) {}

  std::int64_t at() const { return at_; }

  [[noreturn]] void fail(const std::string& found, const std::string& expected) const {
    throw CheckpointError(file_.name() + ": found " + found + ", expected " + expected);
  }

  /// Checks that `count` bytes are left.
  std::int64_t left(Size count, const std::string& what) const {
    if (count.value() > end_ - at_)
      fail((count.too_large() ? "2^63 or more" : std::to_string(count.value())) + " bytes of " +
               what + " at byte " + std::to_string(at_),
           "at most the " + std::to_string(end_ - at_) + " up to the end of the " +
               (end_ < file_.bytes() ? "longest header allowed" : "file"));
    return count.value();
  }

  void skip(Size count, const std::string& what) { at_ += left(count, what); }

  void read(std::int64_t count, void* out, const std::string& what) {
    left(count, what);
    if (at_ < first_ || at_ + count > first_ + std::ssize(buffer_)) {
      first_ = at_;
      buffer_.resize(std::min(std::max(count, kBuffer), end_ - at_));
      file_.read(first_, std::ssize(buffer_), buffer_.data());
    }
    std::memcpy(out, buffer_.data() + (at_ - first_), static_cast<std::size_t>(count));
    at_ += count;
  }

  template <class T>
  T number(const std::string& what) {
    T value;
    read(sizeof value, &value, what);
    return value;
  }

  /// A length or count, of which `each` bytes and more must follow.
  std::int64_t size(std::int64_t each, const std::string& what) {
    const std::uint64_t value = number<std::uint64_t>("the length of " + what);
    const std::int64_t most = std::numeric_limits<std::int64_t>::max();
    const Size count = static_cast<std::int64_t>(std::min(value, static_cast<std::uint64_t>(most)));
    left(count * each, what);
    return count.value();
  }

  std::string name(const std::string& what) {
    const std::int64_t length = size(1, what);
    if (length > static_cast<std::int64_t>(kMostName))
      fail(what + " with a name of " + std::to_string(length) + " bytes",
           "at most " + std::to_string(kMostName));
    std::string name(static_cast<std::size_t>(length), '\0');
    read(length, name.data(), what);
    if (!std::ranges::all_of(name, [](char c) { return c >= ' ' && c <= '~'; }))
      fail(what + " named " + describe(name), "printable ASCII");
    return name;
  }

 private:
  static constexpr std::int64_t kBuffer = 1 << 16;

  const File& file_;
  const std::int64_t end_;
  std::int64_t at_ = 0;
  std::vector<std::byte> buffer_;
  std::int64_t first_ = 0;  // of the file, in the buffer
};

void check_magic(Reader& reader, const File& file) {
  char magic[4] = {};
  if (file.bytes() >= 8) reader.read(4, magic, "magic");
  if (std::string_view(magic, 4) != "GGUF")
    throw CheckpointError(
        file.name() + ": begins with " +
        (file.bytes() < 8 ? "fewer than 8 bytes" : describe(std::string(magic, 4))) +
        ", expected a GGUF file, with \"GGUF\", or the folder of a checkpoint");
  const auto version = reader.number<std::uint32_t>("version");
  if (version != 0 && version % (1u << 24) == 0)
    reader.fail("a big-endian GGUF file", "a little-endian one");
  if (version != 2 && version != 3)
    reader.fail("version " + std::to_string(version) + " of GGUF", "2 or 3");
}

std::uint64_t read_count(Reader& reader, const char* what) {
  const auto count = reader.number<std::uint64_t>(std::string("the number of ") + what);
  if (count > kMostEntries)
    reader.fail(std::to_string(count) + " " + what, "at most " + std::to_string(kMostEntries));
  return count;
}

GgufValue read_place(Reader& reader, const std::string& key) {
  GgufValue value;
  const auto kind_of = [&](const char* what) { return reader.number<std::uint32_t>(what + key); };
  value.kind = kind_of("the type of ");
  value.is_array = value.kind == kinds::array;
  if (value.is_array) {
    value.kind = kind_of("the type of ");
    if (value.kind != kinds::string && !is_number(value.kind))
      reader.fail("an array of type " + std::to_string(value.kind) + " for " + key,
                  "one of numbers or strings");
    value.count = reader.size(is_number(value.kind) ? number_bytes[value.kind] : 8, key);
  }
  value.begin = reader.at();
  if (is_number(value.kind)) {
    reader.skip(Size(value.count) * number_bytes[value.kind], key);
  } else if (value.kind == kinds::string) {
    for (std::int64_t i = 0; i < value.count; ++i) reader.skip(reader.size(1, key), key);
  } else {
    reader.fail("type " + std::to_string(value.kind) + " for " + key, "a type of values, 0 to 12");
  }
  value.bytes = reader.at() - value.begin;
  return value;
}

/// A tensor's entry. `begin` is still relative to the data.
TensorView read_entry(Reader& reader, std::uint64_t number) {
  TensorView view;
  view.name = reader.name("tensor " + std::to_string(number));
  const std::string what = "tensor " + describe(view.name);
  const auto dimensions = reader.number<std::uint32_t>(what);
  if (dimensions < 1 || dimensions > kMostDimensions)
    reader.fail(what + " with " + std::to_string(dimensions) + " dimensions",
                "1 to " + std::to_string(kMostDimensions));
  Size count = 1;
  for (std::uint32_t i = 0; i < dimensions; ++i) {
    const auto size = reader.number<std::int64_t>(what);
    if (size < 1)
      reader.fail(what + " with a dimension of " + std::to_string(static_cast<std::uint64_t>(size)),
                  "1 to 2^63 - 1");
    view.shape.insert(view.shape.begin(), size);  // GGUF states the fastest dimension first
    count = count * size;
  }
  const auto id = reader.number<std::uint32_t>(what);
  const GgmlType* const type = find_ggml_type(id);
  if (!type) reader.fail(what + " of type " + std::to_string(id), "a type that GGML defines");
  view.dtype = type->dtype;
  view.dtype_name = type->name;
  if (view.dtype == DType::other)
    reader.fail(what + " of type " + view.dtype_name,
                "F32, F16, BF16, Q4_0 to Q8_0, Q2_K to Q6_K, IQ4_NL or IQ4_XS; llama-quantize of "
                "llama.cpp makes such a file (Q4_K_M, Q8_0) from the original one");
  const BlockSize block = block_of(view.dtype);
  if (view.shape.back() % block.values != 0)
    reader.fail(
        what + " of type " + view.dtype_name + " with rows of " + std::to_string(view.shape.back()),
        "a multiple of " + std::to_string(block.values));
  const Size bytes = Size(count.value() / block.values) * block.bytes;
  if (count.too_large() || bytes.too_large())
    reader.fail(what + " of 2^63 or more bytes", "one within the file");
  view.bytes = bytes.value();
  view.begin = reader.number<std::int64_t>(what);
  return view;
}

std::int64_t alignment_of(const GgufFile& file) {
  const json value = file.value("general.alignment");
  if (value.is_null()) return 32;
  const std::int64_t alignment = value.is_number_integer() ? value.get<std::int64_t>() : 0;
  if (alignment < 1 || (alignment & (alignment - 1)) != 0)
    throw CheckpointError(file.name() + ": general.alignment is " + describe(value) +
                          ", expected a power of two");
  return alignment;
}

json decode(std::uint32_t kind, const std::byte* data) {
  const auto as = [data]<class T>(T value) {
    std::memcpy(&value, data, sizeof value);
    return json(value);
  };
  switch (kind) {
    case kinds::u8:
      return as(std::uint8_t{});
    case kinds::i8:
      return as(std::int8_t{});
    case kinds::u16:
      return as(std::uint16_t{});
    case kinds::i16:
      return as(std::int16_t{});
    case kinds::u32:
      return as(std::uint32_t{});
    case kinds::i32:
      return as(std::int32_t{});
    case kinds::f32:
      return as(float{});
    case kinds::u64:
      return as(std::uint64_t{});
    case kinds::i64:
      return as(std::int64_t{});
    case kinds::f64:
      return as(double{});
    default:  // boolean
      return *data != std::byte{};
  }
}

}  // namespace

GgufFile::GgufFile(const std::filesystem::path& path)
    : file_(std::make_shared<const File>(path, "a GGUF file")) {
  Reader reader(*file_, std::min(file_->bytes(), kMostHeader));
  check_magic(reader, *file_);
  const std::uint64_t tensor_count = read_count(reader, "tensors");
  const std::uint64_t key_count = read_count(reader, "keys");
  for (std::uint64_t i = 0; i < key_count; ++i) {
    const std::string key = reader.name("key " + std::to_string(i));
    const std::string shown = key.size() <= 80 ? key : key.substr(0, 80) + "...";
    if (values_.contains(key)) reader.fail("the key " + shown + " twice", "it once");
    values_.emplace(key, read_place(reader, shown));
  }
  std::vector<TensorView> entries;
  for (std::uint64_t i = 0; i < tensor_count; ++i) entries.push_back(read_entry(reader, i));

  const std::int64_t alignment = alignment_of(*this);
  const Size data = Size(reader.at()).rounded_up(alignment);
  Size end = 0;
  for (TensorView& view : entries) {
    const std::string what = "tensor " + describe(view.name);
    if (tensors_.contains(view.name)) reader.fail(what + " twice", "it once");
    if (view.begin != end.value())
      reader.fail(what + " at byte " + std::to_string(static_cast<std::uint64_t>(view.begin)) +
                      " of the data",
                  "byte " + std::to_string(end.value()));
    const Size place = data + end, behind = place + view.bytes;
    if (behind.value() > file_->bytes())
      reader.fail(what + " up to byte " + std::to_string(behind.value()),
                  "no more than the " + std::to_string(file_->bytes()) + " of the file");
    end = (end + view.bytes).rounded_up(alignment);
    view.begin = place.value();
    view.file = file_;
    tensors_.emplace(view.name, std::move(view));
  }
}

json GgufFile::value(const std::string& key) const {
  const auto found = values_.find(key);
  if (found == values_.end()) return nullptr;
  const GgufValue& place = found->second;
  if (place.count > kMostItems)
    throw CheckpointError(name() + ": " + key + " is an array of " + std::to_string(place.count) +
                          ", expected at most " + std::to_string(kMostItems));
  std::vector<std::byte> data(static_cast<std::size_t>(place.bytes));
  file_->read(place.begin, place.bytes, data.data());
  json items = json::array();
  const std::byte* next = data.data();
  for (std::int64_t i = 0; i < place.count; ++i) {
    if (place.kind != kinds::string) {
      items.push_back(decode(place.kind, next));
      next += number_bytes[place.kind];
      continue;
    }
    // The file may have been written to since it was checked.
    const auto left = static_cast<std::uint64_t>(data.data() + data.size() - next);
    std::uint64_t length = 0;
    if (left >= 8) std::memcpy(&length, next, 8);
    if (left < 8 || length > left - 8)
      throw CheckpointError(name() + ": " + key +
                            " has changed meanwhile, expected a file at rest");
    const std::byte* const text = next + 8;
    items.push_back(std::string(reinterpret_cast<const char*>(text), length));
    next = text + length;
  }
  return place.is_array ? items : items[0];
}

}  // namespace tda
