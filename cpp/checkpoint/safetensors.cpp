// The safetensors format: a little-endian u64 header length N, N bytes of JSON, then raw data.
#include <tda/error.h>

#include <algorithm>
#include <bit>
#include <limits>

#include "base/json.h"
#include "base/size.h"
#include "checkpoint/checkpoint.h"

namespace tda {
namespace {

using nlohmann::json;

static_assert(std::endian::native == std::endian::little, "safetensors data is used in place");

constexpr std::int64_t max_dimensions = 16;

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

/// Reads one tensor's entry in the header. data_bytes: the size of the data after the header.
class EntryReader {
 public:
  EntryReader(const std::shared_ptr<const File>& file, const std::string& name, const json& entry)
      : file_(file), name_(name), entry_(entry) {
    if (!entry.is_object()) fail("entry is " + describe(entry) + ", expected an object");
  }

  /// All tensors' data is in [data, data + data_bytes) of the file.
  TensorView read(std::int64_t data, std::int64_t data_bytes) const {
    const DTypeInfo& info = dtype();
    TensorView view;
    view.name = name_;
    view.dtype = info.dtype;
    view.dtype_name = info.name;
    view.file = file_;
    view.shape = sizes("shape");
    if (std::ssize(view.shape) > max_dimensions)
      fail("shape has " + std::to_string(view.shape.size()) + " dimensions, expected at most " +
           std::to_string(max_dimensions));
    const std::vector<std::int64_t> offsets = sizes("data_offsets");
    if (offsets.size() != 2)
      fail("data_offsets has " + std::to_string(offsets.size()) + " values, expected 2");
    const auto [begin, end] = std::pair(offsets[0], offsets[1]);
    if (begin > end || end > data_bytes)
      fail("data_offsets are " + std::to_string(begin) + " to " + std::to_string(end) +
           ", expected an ascending pair within the " + std::to_string(data_bytes) +
           " bytes of data");
    view.begin = data + begin;
    view.bytes = end - begin;
    const std::int64_t expected = expected_bytes(view.shape, info.bits);
    if (view.bytes != expected)
      fail("data has " + std::to_string(view.bytes) + " bytes, expected " +
           std::to_string(expected) + " for its shape and dtype " + info.name);
    return view;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw CheckpointError(file_->name() + ": tensor " + describe(name_) + ": " + what);
  }

  const json& field(const char* key) const {
    const auto found = entry_.find(key);
    if (found == entry_.end()) fail(std::string(key) + " is missing, expected in every entry");
    return *found;
  }

  const DTypeInfo& dtype() const {
    const json& value = field("dtype");
    for (const DTypeInfo& info : dtypes)
      if (value == info.name) return info;
    fail("dtype is " + describe(value) + ", expected one of the safetensors format, like \"BF16\"");
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
    Size total = bits;
    for (std::int64_t size : shape) total = total * size;
    if (total.too_large())
      fail("shape has more than 2^63 bits, expected one that fits into the file");
    if (total.value() % 8 != 0) fail("shape gives a part of a byte, expected whole bytes");
    return total.value() / 8;
  }

  const std::shared_ptr<const File>& file_;
  const std::string& name_;
  const json& entry_;
};

void check_metadata(const std::string& file, const json& metadata) {
  const bool valid =
      metadata.is_object() &&
      std::all_of(metadata.begin(), metadata.end(), [](const json& v) { return v.is_string(); });
  if (!valid)
    throw CheckpointError(file + ": __metadata__ is " + describe(metadata) +
                          ", expected an object of strings");
}

/// Checks that each byte of the data belongs to exactly one tensor.
void check_tiling(const std::string& file, std::int64_t data, std::int64_t data_bytes,
                  const TensorMap& tensors) {
  std::vector<const TensorView*> ordered;
  for (const auto& [name, view] : tensors) ordered.push_back(&view);
  std::sort(ordered.begin(), ordered.end(), [](const TensorView* a, const TensorView* b) {
    return std::pair(a->begin, a->bytes) < std::pair(b->begin, b->bytes);
  });
  std::int64_t end = 0;
  for (const TensorView* view : ordered) {
    const std::int64_t begin = view->begin - data;
    if (begin != end)
      throw CheckpointError(file + ": tensor " + describe(view->name) + " begins at byte " +
                            std::to_string(begin) + " of the data, expected " +
                            std::to_string(end) + (begin < end ? " (overlap)" : " (hole)"));
    end = begin + view->bytes;
  }
  if (end != data_bytes)
    throw CheckpointError(file + ": the tensors end at byte " + std::to_string(end) +
                          " of the data, expected its last, " + std::to_string(data_bytes));
}

}  // namespace

TensorMap read_safetensors(const std::filesystem::path& path,
                           std::map<std::string, std::string>* metadata) {
  const auto file = std::make_shared<const File>(path, "a safetensors file");
  const auto expect = [&](bool good, const std::string& found, const std::string& expected) {
    if (!good) throw CheckpointError(file->name() + ": " + found + ", expected " + expected);
  };
  expect(file->bytes() >= 8, "found " + std::to_string(file->bytes()) + " bytes",
         "a safetensors file, whose first 8 are a header's length");
  std::uint64_t header_bytes = 0;
  file->read(0, 8, &header_bytes);
  const std::int64_t limit = std::min(kMaxJsonBytes, file->bytes() - 8);
  expect(header_bytes <= static_cast<std::uint64_t>(limit),
         "header length is " + std::to_string(header_bytes), "at most " + std::to_string(limit));
  std::string header(header_bytes, '\0');
  file->read(8, std::ssize(header), header.data());
  const json entries = parse_json_object(header, file->name());
  const std::int64_t data = 8 + std::ssize(header), data_bytes = file->bytes() - data;
  TensorMap tensors;
  for (const auto& [name, entry] : entries.items()) {
    if (name == "__metadata__") {
      check_metadata(file->name(), entry);
      if (metadata) entry.get_to(*metadata);
    } else {
      tensors.emplace(name, EntryReader(file, name, entry).read(data, data_bytes));
    }
  }
  check_tiling(file->name(), data, data_bytes, tensors);
  return tensors;
}

}  // namespace tda
