// Token ids and arrays between Python and C++.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <tda/error.h>
#include <tda/types.h>

#include <cstddef>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "records.h"

/// Converts any sequence of integers. Throws OptionError naming the element that is not one.
inline std::vector<tda::Token> to_tokens(nb::handle sequence) {
  if (nb::isinstance<nb::str>(sequence) || nb::isinstance<nb::bytes>(sequence) ||
      !nb::hasattr(sequence, "__iter__")) {
    throw tda::OptionError("tokens: found " + name_of_type(sequence) +
                           ", expected a sequence of ids");
  }
  std::vector<tda::Token> tokens;
  for (nb::handle item : nb::iter(sequence)) {
    const bool is_bool = PyBool_Check(item.ptr());
    const nb::object integer = is_bool ? nb::object() : nb::steal(PyNumber_Index(item.ptr()));
    long long id = -1;
    if (integer.is_valid()) id = PyLong_AsLongLong(integer.ptr());
    const bool failed = PyErr_Occurred() != nullptr;
    PyErr_Clear();
    if (failed || id < 0 || id > std::numeric_limits<tda::Token>::max()) {
      throw tda::OptionError("tokens[" + std::to_string(tokens.size()) + "]: found " +
                             nb::cast<std::string>(nb::repr(item)) + ", expected a token id");
    }
    tokens.push_back(static_cast<tda::Token>(id));
  }
  return tokens;
}

/// A NumPy array that takes ownership of the vector's memory.
template <typename T>
nb::ndarray<nb::numpy, T> to_array(std::vector<T> values, std::vector<std::size_t> shape) {
  auto* owned = new std::vector<T>(std::move(values));
  const nb::capsule owner(owned, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return {owned->data(), shape.size(), shape.data(), owner};
}

template <typename T>
nb::ndarray<nb::numpy, T> to_array(std::vector<T> values) {
  const std::size_t size = values.size();
  return to_array(std::move(values), {size});
}
