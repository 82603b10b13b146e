// The weights of a quantised layer, row by row out of its parts.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "checkpoint/quantization.h"

namespace tda {

/// Codes as they are stored, of a matrix of any of the forms.
struct StoredCodes {
  std::vector<std::uint8_t> bytes;
  std::int64_t bits = 0;
  std::int64_t stride = 0;   // bytes of a row, or of as many rows as share words
  bool down = false;         // a word holds codes of one column, else of one row
  bool interleaved = false;  // words hold columns 0, 2, 4, 6, 1, 3, 5, 7 of eight
  std::uint8_t flipped = 0;  // bits; 128 makes signed bytes codes

  /// Without divisions: this is called for every weight of a model.
  int at(std::int64_t row, std::int64_t col) const {
    constexpr std::int64_t places[] = {0, 4, 1, 5, 2, 6, 3, 7};
    const int in_word = bits == 4 ? 3 : 2;  // log2 of the codes in 32 bits
    const std::int64_t along = down ? row : col, place = along & ((1 << in_word) - 1);
    const std::int64_t word =
        down ? (along >> in_word) * stride + 4 * col : row * stride + 4 * (along >> in_word);
    const std::int64_t bit = (interleaved ? places[place] : place) * bits;
    return (bytes[word + (bit >> 3)] ^ flipped) >> (bit & 7) & ((1 << bits) - 1);
  }
};

struct QuantizedMatrix::Contents {
  StoredCodes codes;
  std::vector<float> scales, zeros;  // [rows][groups]
};

namespace {

using Form = QuantizedMatrix::Form;

std::vector<std::uint8_t> bytes_of(const TensorView& tensor) {
  std::vector<std::uint8_t> bytes(tensor.bytes);
  tensor.read(0, tensor.bytes, bytes.data());
  return bytes;
}

StoredCodes stored_codes(const TensorView& tensor, std::int64_t bits, bool down, bool interleaved) {
  const bool words = tensor.dtype_name == "I32";
  return {.bytes = bytes_of(tensor),
          .bits = bits,
          .stride = tensor.shape.back() * (words ? 4 : 1),
          .down = down,
          .interleaved = interleaved,
          .flipped = static_cast<std::uint8_t>(words ? 0 : 128)};
}

/// Adds 1 to each code. What was subtracted borrowed from the next one in its word, so the sum
/// carries.
void add_one(StoredCodes& codes) {
  const std::uint32_t ones = codes.bits == 4 ? 0x11111111 : 0x01010101;
  for (std::size_t i = 0; i < codes.bytes.size(); i += 4) {
    std::uint32_t word;
    std::memcpy(&word, &codes.bytes[i], 4);
    word += ones;
    std::memcpy(&codes.bytes[i], &word, 4);
  }
}

std::vector<float> floats_of(const TensorView& tensor) {
  const std::vector<std::uint8_t> bytes = bytes_of(tensor);
  std::vector<float> values(bytes.size() / block_of(tensor.dtype).bytes);
  dequantize(tensor.dtype, reinterpret_cast<const std::byte*>(bytes.data()), std::ssize(values),
             values.data());
  return values;
}

}  // namespace

QuantizedMatrix::QuantizedMatrix(Parts parts) : parts_(std::move(parts)), dtype_(DType::lines) {
  const std::int64_t block = block_of(DType::lines).values;
  if (parts_.bits != 4 || parts_.cols % block != 0) dtype_ = DType::f32;
  for (std::int64_t i = 0; i < parts_.cols; ++i)
    if (parts_.group_of[i] != parts_.group_of[i / block * block]) dtype_ = DType::f32;
}

std::shared_ptr<const QuantizedMatrix> QuantizedMatrix::sorted() const {
  Parts parts = parts_;
  parts.order.resize(parts.cols);
  std::iota(parts.order.begin(), parts.order.end(), 0);
  std::ranges::stable_sort(parts.order, {}, [&](std::int32_t i) { return parts_.group_of[i]; });
  std::ranges::sort(parts.group_of);
  auto result = std::make_shared<const QuantizedMatrix>(std::move(parts));
  return result->dtype() == DType::lines ? result : nullptr;
}

std::shared_ptr<const QuantizedMatrix::Contents> QuantizedMatrix::contents() const {
  const std::lock_guard lock(mutex_);
  if (auto kept = contents_.lock()) return kept;
  const bool inputs_first = parts_.form == Form::gptq || parts_.form == Form::awq;
  const bool interleaved = parts_.form == Form::awq;
  auto made = std::make_shared<Contents>();
  made->codes = stored_codes(parts_.codes, parts_.bits, parts_.form == Form::gptq, interleaved);
  const std::int64_t rows = parts_.rows, groups = parts_.groups;
  const std::vector<float> scales = floats_of(parts_.scales);
  const auto middle = static_cast<float>(1 << (parts_.bits - 1));
  made->scales.resize(rows * groups, scales.front());
  made->zeros.resize(rows * groups, middle);
  StoredCodes zeros;
  if (parts_.zeros)
    zeros = stored_codes(*parts_.zeros, parts_.bits, parts_.form == Form::packed, interleaved);
  if (parts_.zeros_less_one) add_one(zeros);
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t g = 0; g < groups; ++g) {
      const auto [row, col] = inputs_first ? std::pair(g, r) : std::pair(r, g);
      const std::int64_t width = inputs_first ? rows : groups;
      if (std::ssize(scales) > 1) made->scales[r * groups + g] = scales[row * width + col];
      if (parts_.zeros && parts_.zeros->shape.size() > 1)
        made->zeros[r * groups + g] = static_cast<float>(zeros.at(row, col));
      else if (parts_.zeros)
        made->zeros[r * groups + g] = static_cast<float>(zeros.at(0, 0));
    }
  contents_ = made;
  return made;
}

void QuantizedMatrix::read(std::int64_t first, std::int64_t count, std::byte* out) const {
  constexpr std::int64_t kPanel = 32;  // rows, so that codes of neighbours are read together
  const std::shared_ptr<const Contents> kept = contents();
  const bool inputs_first = parts_.form == Form::gptq || parts_.form == Form::awq;
  const std::int64_t size = row_bytes(), cols = parts_.cols, end = first + count;
  const std::int64_t last = (end + size - 1) / size;
  std::vector<std::uint8_t> codes(std::min(kPanel, last - first / size) * cols);
  std::vector<std::byte> made(size);
  const auto input_of = [&](std::int64_t col) {
    return parts_.order.empty() ? col : parts_.order[col];
  };
  for (std::int64_t begin = first / size; begin < last; begin += kPanel) {
    const std::int64_t rows = std::min(kPanel, last - begin);
    if (inputs_first) {
      for (std::int64_t i = 0; i < cols; ++i)
        for (std::int64_t r = 0; r < rows; ++r)
          codes[r * cols + i] = static_cast<std::uint8_t>(kept->codes.at(input_of(i), begin + r));
    } else {
      for (std::int64_t r = 0; r < rows; ++r)
        for (std::int64_t i = 0; i < cols; ++i)
          codes[r * cols + i] = static_cast<std::uint8_t>(kept->codes.at(begin + r, input_of(i)));
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      make_row(*kept, begin + r, codes.data() + r * cols, made.data());
      const std::int64_t at = (begin + r) * size;
      const std::int64_t from = std::max(first, at), to = std::min(end, at + size);
      std::copy(made.begin() + (from - at), made.begin() + (to - at), out + (from - first));
    }
  }
}

void QuantizedMatrix::make_row(const Contents& contents, std::int64_t row,
                               const std::uint8_t* codes, std::byte* out) const {
  const float* const scales = contents.scales.data() + row * parts_.groups;
  const float* const zeros = contents.zeros.data() + row * parts_.groups;
  if (dtype_ == DType::f32) {
    for (std::int64_t i = 0; i < parts_.cols; ++i, out += sizeof(float)) {
      const std::int32_t group = parts_.group_of[i];
      const float value = scales[group] * (static_cast<float>(codes[i]) - zeros[group]);
      std::memcpy(out, &value, sizeof value);
    }
    return;
  }
  const auto [values, bytes] = block_of(DType::lines);
  for (std::int64_t i = 0; i < parts_.cols; i += values, out += bytes) {
    const std::int32_t group = parts_.group_of[i];
    store_line(codes + i, scales[group], -scales[group] * zeros[group], out);
  }
}

}  // namespace tda
