// How a plain struct of options or results becomes a Python class: read-only fields, a repr that
// shows what is not at its default, pickling, and for options a constructor of keyword arguments
// that carry the C++ field names.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <tda/error.h>
#include <tda/prefix_cache.h>
#include <tda/sparsity.h>
#include <tda/types.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

namespace nb = nanobind;

inline std::string name_of_type(nb::handle value) {
  return nb::cast<std::string>(nb::str(value.type().attr("__name__")));
}

inline std::string short_repr(nb::handle value) {
  if (nb::isinstance<nb::list>(value) && nb::len(value) > 4)
    return "[" + std::to_string(nb::len(value)) + " numbers]";
  if (nb::isinstance<nb::dict>(value) && nb::len(value) > 4)
    return "{" + std::to_string(nb::len(value)) + " items}";
  return nb::cast<std::string>(nb::repr(value));
}

/// What a field of this type takes, for messages.
template <typename Member>
constexpr const char* expected = "a list of numbers";
template <>
constexpr const char* expected<bool> = "True or False";
template <>
constexpr const char* expected<std::int64_t> = "an integer of 64 bits";
template <>
constexpr const char* expected<std::uint64_t> = "an integer from 0 to 2**64 - 1";
template <>
constexpr const char* expected<std::optional<std::uint64_t>> =
    "an integer from 0 to 2**64 - 1, or None";
template <>
constexpr const char* expected<double> = "a number";
template <>
constexpr const char* expected<std::optional<double>> = "a number, or None";
template <>
constexpr const char* expected<std::optional<std::int64_t>> = "an integer of 64 bits, or None";
template <>
constexpr const char* expected<std::map<tda::Token, double>> = "a dict of token ids to numbers";
template <>
constexpr const char* expected<std::string> = "a string";
template <>
constexpr const char* expected<std::vector<std::string>> = "a list of strings";
template <>
constexpr const char* expected<tda::Scope> = "\"sequence\" or \"token\"";
template <>
constexpr const char* expected<std::optional<tda::Scope>> = "\"sequence\", \"token\" or None";
template <>
constexpr const char* expected<tda::Estimate> = "\"contribution\", \"hidden\" or \"gate\"";
template <>
constexpr const char* expected<std::shared_ptr<const tda::Thresholds>> = "Thresholds, or None";
template <>
constexpr const char* expected<std::shared_ptr<tda::PrefixCache>> = "PrefixCache, or None";
template <>
constexpr const char* expected<std::shared_ptr<const tda::Predictor>> = "Predictor, or None";

/// An enumerator of C++ is a string in Python.
template <typename Member>
nb::object to_python(const Member& value) {
  if constexpr (std::is_enum_v<Member>)
    return nb::cast(std::string(tda::name_of(value)));
  else if constexpr (std::is_same_v<Member, std::optional<tda::Scope>>)
    return value ? to_python(*value) : nb::none();
  else
    return nb::cast(value);
}

/// The inverse; throws std::bad_cast, or OptionError for a string that names nothing.
template <typename Member>
Member from_python(nb::handle value) {
  // bool is a kind of int in Python, but a slip where a number is meant.
  if (PyBool_Check(value.ptr()) && !std::is_same_v<Member, bool>) throw std::bad_cast();
  if constexpr (std::is_same_v<Member, tda::Scope>)
    return tda::parse_scope(nb::cast<std::string>(value));
  else if constexpr (std::is_same_v<Member, tda::Estimate>)
    return tda::parse_estimate(nb::cast<std::string>(value));
  else if constexpr (std::is_same_v<Member, std::optional<tda::Scope>>)
    return value.is_none() ? Member() : Member(from_python<tda::Scope>(value));
  else
    return nb::cast<Member>(value);
}

/// The type that a field has in Python, for type checkers; empty where nanobind knows.
template <typename Member>
constexpr const char* annotation = nullptr;
template <>
constexpr const char* annotation<tda::Scope> = "def (self) -> str";
template <>
constexpr const char* annotation<tda::Estimate> = "def (self) -> str";
template <>
constexpr const char* annotation<std::optional<tda::Scope>> = "def (self) -> str | None";

template <typename Struct>
class RecordClass {
 public:
  RecordClass(nb::module_& module, const char* name, const char* doc) : class_(module, name, doc) {
    class_.def("__repr__", [](nb::handle self) { return represent(self); });
    class_.def("__getstate__", [](nb::handle self) {
      nb::typed<nb::dict, nb::str, nb::object> state;
      for (const Field& field : fields()) state[field.name] = self.attr(field.name);
      return state;
    });
    class_.def("__setstate__",
               [](Struct& self, const nb::typed<nb::dict, nb::str, nb::object>& state) {
                 Struct value;
                 for (const auto& [key, field] : state)
                   set(value, nb::cast<std::string>(key), field);
                 new (&self) Struct(std::move(value));
               });
  }

  template <typename Member>
  RecordClass& field(const char* name, Member Struct::* member, const char* doc) {
    if constexpr (annotation<Member> != nullptr)
      class_.def_prop_ro(
          name, [member](const Struct& record) { return to_python(record.*member); },
          nb::sig(annotation<Member>), doc);
    else
      class_.def_ro(name, member, doc);
    fields().push_back({name, expected<Member>, [member](Struct& record, nb::handle value) {
                          record.*member = from_python<Member>(value);
                        }});
    return *this;
  }

  /// Called after the fields. `signature` is for readers and type checkers. A name or type that
  /// does not fit is an OptionError.
  RecordClass& from_keywords(const char* signature) {
    class_.def(
        "__init__",
        [](Struct* self, const nb::kwargs& arguments) {
          Struct options;
          for (const auto& [key, value] : arguments)
            set(options, nb::cast<std::string>(key), value);
          options.validate();
          new (self) Struct(std::move(options));
        },
        nb::sig(signature));
    class_.def_prop_ro_static(
        "fields",
        [](nb::handle) {
          nb::typed<nb::list, std::string> names;
          for (const Field& field : fields()) names.append(field.name);
          return names;
        },
        "The names of the options.");
    return *this;
  }

  template <typename... Arguments>
  RecordClass& def(Arguments&&... arguments) {
    class_.def(std::forward<Arguments>(arguments)...);
    return *this;
  }

  template <typename... Arguments>
  RecordClass& def_static(Arguments&&... arguments) {
    class_.def_static(std::forward<Arguments>(arguments)...);
    return *this;
  }

 private:
  struct Field {
    const char* name;
    const char* expected;
    std::function<void(Struct&, nb::handle)> set;
  };
  static std::vector<Field>& fields() {
    static std::vector<Field> table;
    return table;
  }

  static std::string represent(nb::handle self) {
    const nb::object defaults = nb::cast(Struct{});
    std::string text;
    for (const Field& field : fields()) {
      const nb::object value = self.attr(field.name);
      if (value.equal(defaults.attr(field.name))) continue;
      text += (text.empty() ? "" : ", ") + std::string(field.name) + "=" + short_repr(value);
    }
    return name_of_type(self) + "(" + text + ")";
  }

  static void set(Struct& record, const std::string& name, nb::handle value) {
    std::string known;
    for (const Field& field : fields()) {
      known += (known.empty() ? "" : ", ") + std::string(field.name);
      if (field.name != name) continue;
      try {
        field.set(record, value);
      } catch (const std::bad_cast&) {
        throw tda::OptionError(name + ": found " + short_repr(value) + ", expected " +
                               field.expected);
      }
      return;
    }
    throw tda::OptionError("unknown option \"" + name + "\": expected one of " + known);
  }

  nb::class_<Struct> class_;
};
