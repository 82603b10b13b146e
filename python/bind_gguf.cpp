// Checkpoints of quantised weights: what the C++ readers find in them, for converting and for the
// tokenizer.
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "arrays.h"
#include "bind.h"
#include "checkpoint/gguf.h"
#include "gil.h"
#include "text/gguf_tokenizer.h"

using namespace nb::literals;

namespace {

/// Text as bytes, because only its user knows whether it has to be UTF-8.
nb::object to_python(const nlohmann::json& value) {
  if (value.is_null()) return nb::none();
  if (value.is_boolean()) return nb::bool_(value.get<bool>());
  if (value.is_number_unsigned()) return nb::int_(value.get<std::uint64_t>());
  if (value.is_number_integer()) return nb::int_(value.get<std::int64_t>());
  if (value.is_number_float()) return nb::float_(value.get<double>());
  if (value.is_string()) {
    const auto& text = value.get_ref<const std::string&>();
    return nb::bytes(text.data(), text.size());
  }
  nb::list items;
  for (const nlohmann::json& each : value) items.append(to_python(each));
  return items;
}

nb::ndarray<nb::numpy, float> read_tensor(const tda::TensorView& tensor) {
  std::vector<float> values;
  {
    const GilReleased released;
    const std::int64_t rows = tensor.shape.size() == 1 ? 1 : tensor.shape[0];
    std::int64_t count = 1;
    for (const std::int64_t size : tensor.shape) count *= size;
    std::vector<std::byte> data(static_cast<std::size_t>(tensor.bytes));
    values.resize(static_cast<std::size_t>(count));
    tensor.read_rows(0, rows, data.data());
    tda::dequantize(tensor.dtype, data.data(), count, values.data());
    for (float& value : values) value -= tensor.added;
  }
  return to_array(std::move(values), {tensor.shape.begin(), tensor.shape.end()});
}

using Described = std::tuple<std::string, std::string, std::vector<std::int64_t>, std::string>;

template <class Source>
std::vector<Described> tensors_of(const Source& model) {
  std::vector<Described> tensors;
  for (const auto& [name, view] : model.tensors())
    tensors.emplace_back(name, view.dtype_name, view.shape, view.file->name());
  return tensors;
}

template <class Source>
nb::ndarray<nb::numpy, float> read_of(const Source& model, const std::string& name) {
  const auto found = model.tensors().find(name);
  if (found == model.tensors().end())
    throw tda::OptionError("name \"" + name + "\": expected that of a tensor");
  return read_tensor(found->second);
}

}  // namespace

void bind_gguf(nb::module_& m) {
  using tda::GgufModel;
  nb::class_<GgufModel>(m, "GgufModel", "A model in a GGUF file, or in several.")
      .def(
          "__init__",
          [](GgufModel* self, const std::string& path) {
            const GilReleased released;
            new (self) GgufModel(path);
          },
          "path"_a, "path: the file, or the first of several. Raises CheckpointError.")
      .def_prop_ro(
          "config", [](const GgufModel& model) { return model.config()->dump(); },
          "What config.json would say, as JSON.")
      .def_prop_ro(
          "generation", [](const GgufModel& model) { return model.generation().dump(); },
          "What generation_config.json would say, as JSON.")
      .def_prop_ro(
          "files",
          [](const GgufModel& model) {
            std::vector<std::string> names;
            for (const tda::GgufFile& file : model.files()) names.push_back(file.name());
            return names;
          },
          "The paths of all files of the model.")
      .def(
          "value",
          [](const GgufModel& model, const std::string& key) {
            return to_python(model.first().value(key));
          },
          "key"_a,
          "What the file has under a `key`, text as bytes, or None. Raises CheckpointError.")
      .def(
          "tokenizer_files",
          [](const GgufModel& model) {
            nb::dict files;
            for (const auto& [name, content] : tda::gguf_tokenizer_files(model))
              files[name.c_str()] = nb::bytes(content.data(), content.size());
            return files;
          },
          nb::sig("def tokenizer_files(self) -> dict[str, bytes]"),
          "The files that a Hugging Face folder has for the tokenizer, by name. Raises "
          "CheckpointError.")
      .def_prop_ro("tensors", &tensors_of<GgufModel>,
                   "Name as in Hugging Face checkpoints, GGML type, shape and file of each tensor.")
      .def("read", &read_of<GgufModel>, "name"_a,
           "The values of the tensor of this `name`, f32. Raises CheckpointError.");
  using tda::Checkpoint;
  nb::class_<Checkpoint>(m, "Checkpoint", "The tensors of a Hugging Face folder.")
      .def(
          "__init__",
          [](Checkpoint* self, const std::string& path) {
            const GilReleased released;
            new (self) Checkpoint(path);
          },
          "path"_a, "Raises CheckpointError.")
      .def_prop_ro(
          "tensors", &tensors_of<Checkpoint>,
          "Name, dtype (int4 or int8 for quantised layers), shape and file of each tensor.")
      .def("read", &read_of<Checkpoint>, "name"_a,
           "The values of the tensor of this `name`, f32. Raises CheckpointError.");
}
