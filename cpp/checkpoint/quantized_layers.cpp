// The quantised layers of a folder: their parts are found, checked, and become a tensor each.
#include <tda/error.h>

#include <algorithm>
#include <utility>

#include "base/json.h"
#include "checkpoint/config_object.h"
#include "checkpoint/quantization.h"

namespace tda {
namespace {

using Shape = std::vector<std::int64_t>;

std::int64_t rounded_up(std::int64_t count, std::int64_t each) { return (count + each - 1) / each; }

/// One layer and its parts.
class QuantizedLayer {
 public:
  QuantizedLayer(TensorMap& tensors, std::string name, const Quantization& quantization)
      : tensors_(tensors), name_(std::move(name)), quantization_(quantization) {}

  void join() {
    if (quantization_.method == Quantization::Method::compressed_tensors)
      take_compressed();
    else
      take_linear();
    TensorView view;
    view.name = name_ + ".weight";
    view.shape = {parts_.rows, parts_.cols};
    view.dtype_name = parts_.bits == 4 ? "int4" : "int8";
    view.file = parts_.codes.file;
    view = made_from(std::make_shared<const QuantizedMatrix>(std::move(parts_)), view);
    if (view.dtype == DType::f32)
      if (auto sorted = view.quantized->sorted())
        view.sorted = std::make_shared<const TensorView>(made_from(std::move(sorted), view));
    const auto [there, added] = tensors_.emplace(view.name, view);
    if (!added) fail(there->second, "is there beside its parts", "one of the two");
  }

 private:
  static TensorView made_from(std::shared_ptr<const QuantizedMatrix> matrix, TensorView view) {
    view.dtype = matrix->dtype();
    view.bytes = view.shape[0] * matrix->row_bytes();
    view.quantized = std::move(matrix);
    return view;
  }

  [[noreturn]] static void fail(const TensorView& view, const std::string& found,
                                const std::string& expected) {
    throw CheckpointError(view.file->name() + ": tensor " + describe(view.name) + " " + found +
                          ", expected " + expected);
  }

  std::optional<TensorView> take_if_there(const char* part) {
    const auto found = tensors_.find(name_ + part);
    if (found == tensors_.end()) return std::nullopt;
    TensorView view = std::move(found->second);
    tensors_.erase(found);
    return view;
  }
  TensorView take(const char* part) {
    std::optional<TensorView> view = take_if_there(part);
    if (!view) fail_missing(part);
    return *std::move(view);
  }
  [[noreturn]] void fail_missing(const char* part) const {
    throw CheckpointError(parts_.codes.file->name() + ": tensor " + describe(name_ + part) +
                          " is missing, expected beside " + describe(parts_.codes.name));
  }

  static void expect_dtype(const TensorView& view, const std::string& expected) {
    if (view.dtype_name != expected) fail(view, "has dtype " + view.dtype_name, expected);
  }
  static void expect_shape(const TensorView& view, const Shape& expected) {
    if (view.shape != expected)
      fail(view, "has shape " + shape_text(view.shape), shape_text(expected));
  }
  /// Matrices of sizes whose products are no concern.
  static void expect_matrix(const TensorView& view) {
    const auto fits = [](std::int64_t size) { return size > 0 && size <= max_size; };
    if (view.shape.size() != 2 || !std::ranges::all_of(view.shape, fits))
      fail(view, "has shape " + shape_text(view.shape), "two sizes from 1 to 2^22");
  }
  void expect_scales(const Shape& shape) const {
    const DType dtype = parts_.scales.dtype;
    if (dtype != DType::f32 && dtype != DType::f16 && dtype != DType::bf16)
      fail(parts_.scales, "has dtype " + parts_.scales.dtype_name, "F32, F16 or BF16");
    expect_shape(parts_.scales, shape);
  }

  /// gptq and awq
  void take_linear() {
    const bool gptq = quantization_.method == Quantization::Method::gptq;
    const Quantization::Scheme& scheme = quantization_.schemes.front();
    const std::int64_t per_word = 32 / scheme.bits;
    parts_.form = gptq ? QuantizedMatrix::Form::gptq : QuantizedMatrix::Form::awq;
    parts_.bits = scheme.bits;
    parts_.zeros_less_one = quantization_.zeros_less_one;
    parts_.codes = take(".qweight");
    expect_dtype(parts_.codes, "I32");
    expect_matrix(parts_.codes);
    parts_.cols = parts_.codes.shape[0] * (gptq ? per_word : 1);
    parts_.rows = parts_.codes.shape[1] * (gptq ? 1 : per_word);
    if (parts_.rows % per_word != 0)
      fail(parts_.codes, "has shape " + shape_text(parts_.codes.shape),
           "a multiple of " + std::to_string(per_word) + " columns, which share words of qzeros");
    set_groups(scheme.group);
    parts_.scales = take(".scales");
    expect_scales({parts_.groups, parts_.rows});
    parts_.zeros = take(".qzeros");
    expect_dtype(*parts_.zeros, "I32");
    expect_shape(*parts_.zeros, {parts_.groups, parts_.rows / per_word});
    if (gptq) take_order(".g_idx");
  }

  void take_compressed() {
    if (std::optional<TensorView> packed = take_if_there(".weight_packed")) {
      parts_.form = QuantizedMatrix::Form::packed;
      parts_.codes = *std::move(packed);
      expect_dtype(parts_.codes, "I32");
      expect_matrix(parts_.codes);
      take_shape();
    } else {
      parts_.form = QuantizedMatrix::Form::bytes;
      parts_.codes = take(".weight");
      expect_matrix(parts_.codes);
      parts_.rows = parts_.codes.shape[0];
      parts_.cols = parts_.codes.shape[1];
      parts_.bits = 8;
    }
    parts_.scales = take(".weight_scale");
    const Quantization::Scheme scheme = scheme_of_scales();
    set_groups(scheme.group);
    const bool one = parts_.scales.shape.size() == 1;
    expect_scales(one ? Shape{1} : Shape{parts_.rows, parts_.groups});
    parts_.zeros = take_if_there(".weight_zero_point");
    if (scheme.has_zeros && !parts_.zeros) fail_missing(".weight_zero_point");
    if (parts_.zeros) {
      const bool packed = parts_.form == QuantizedMatrix::Form::packed && !one;
      const std::int64_t rows = packed ? rounded_up(parts_.rows * parts_.bits, 32) : parts_.rows;
      expect_dtype(*parts_.zeros, packed ? "I32" : "I8");
      expect_shape(*parts_.zeros, one ? Shape{1} : Shape{rows, parts_.groups});
    }
    take_order(".weight_g_idx");
  }

  /// Rows, inputs, and with them the bits of packed codes.
  void take_shape() {
    const TensorView view = take(".weight_shape");
    expect_dtype(view, "I64");
    expect_shape(view, {2});
    std::int64_t sizes[2];
    view.read(0, sizeof sizes, sizes);
    const Shape shape(sizes, sizes + 2), &stored = parts_.codes.shape;
    for (const std::int64_t bits : {4, 8})
      if (sizes[0] == stored[0] && sizes[1] > 0 && sizes[1] <= max_size &&
          rounded_up(sizes[1] * bits, 32) == stored[1])
        parts_.bits = bits;
    if (parts_.bits == 0)
      fail(view, "is " + shape_text(shape),
           "rows and inputs whose codes of 4 or 8 bits fill " + describe(parts_.codes.name) +
               " of shape " + shape_text(stored));
    parts_.rows = sizes[0];
    parts_.cols = sizes[1];
  }

  /// The one of config.json that gives as many scales as there are.
  Quantization::Scheme scheme_of_scales() const {
    std::optional<Quantization::Scheme> result;
    const std::int64_t found = parts_.scales.shape.empty() ? 0 : parts_.scales.shape.back();
    for (const Quantization::Scheme& scheme : quantization_.schemes) {
      const std::int64_t groups = scheme.group ? rounded_up(parts_.cols, scheme.group) : 1;
      if (scheme.bits != parts_.bits || groups != found) continue;
      if (result && (result->group != scheme.group || result->has_zeros != scheme.has_zeros))
        fail(parts_.scales, "has shape " + shape_text(parts_.scales.shape),
             "one that fits a single group of quantization_config.config_groups");
      result = scheme;
    }
    if (!result)
      fail(parts_.scales, "has shape " + shape_text(parts_.scales.shape),
           "as many scales as quantization_config.config_groups gives " +
               std::to_string(parts_.cols) + " inputs of " + std::to_string(parts_.bits) + " bits");
    return *result;
  }

  void set_groups(std::int64_t group) {
    const std::int64_t size = group ? group : parts_.cols;
    parts_.groups = rounded_up(parts_.cols, size);
    parts_.group_of.resize(parts_.cols);
    for (std::int64_t i = 0; i < parts_.cols; ++i)
      parts_.group_of[i] = static_cast<std::int32_t>(i / size);
  }

  /// The group of each input, where the file says it: rounding went in another order than theirs.
  void take_order(const char* part) {
    const std::optional<TensorView> view = take_if_there(part);
    if (!view) return;
    expect_dtype(*view, "I32");
    expect_shape(*view, {parts_.cols});
    view->read(0, view->bytes, parts_.group_of.data());
    for (const std::int32_t group : parts_.group_of)
      if (group < 0 || group >= parts_.groups)
        fail(*view, "holds " + std::to_string(group),
             "groups from 0 to " + std::to_string(parts_.groups - 1));
  }

  TensorMap& tensors_;
  const std::string name_;
  const Quantization& quantization_;
  QuantizedMatrix::Parts parts_{};
};

}  // namespace

void join_quantized(TensorMap& tensors, const Quantization& quantization) {
  const bool compressed = quantization.method == Quantization::Method::compressed_tensors;
  std::vector<std::string> layers;
  for (const auto& [name, view] : tensors) {
    const std::string_view end = !compressed               ? ".qweight"
                                 : view.dtype_name == "I8" ? ".weight"
                                                           : ".weight_packed";
    if (name.ends_with(end)) layers.push_back(name.substr(0, name.size() - end.size()));
  }
  for (std::string& layer : layers) QuantizedLayer(tensors, std::move(layer), quantization).join();
}

}  // namespace tda
