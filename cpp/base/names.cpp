#include <tda/error.h>
#include <tda/sparsity.h>
#include <tda/types.h>

#include <cstddef>
#include <string>

namespace tda {
namespace {

// In the order of the enumerators.
constexpr std::string_view device_names[] = {"auto", "cpu", "cuda"};
constexpr std::string_view weight_format_names[] = {"auto",  "f32",  "bf16",  "int8",
                                                    "bf16c", "int4", "graded"};
constexpr std::string_view kv_format_names[] = {"auto", "f32", "bf16", "int8"};
constexpr std::string_view scope_names[] = {"sequence", "token"};
constexpr std::string_view estimate_names[] = {"contribution", "hidden", "gate"};

template <typename Enum>
Enum parse(std::string_view option, std::string_view text,
           std::span<const std::string_view> names) {
  std::string valid;
  for (std::size_t i = 0; i < names.size(); ++i) {
    if (names[i] == text) return static_cast<Enum>(i);
    valid += (i == 0 ? "" : i + 1 < names.size() ? ", " : " or ") + std::string(names[i]);
  }
  throw OptionError(std::string(option) + " is \"" + std::string(text) + "\", expected " + valid);
}

}  // namespace

std::string_view name_of(Device device) { return device_names[static_cast<std::size_t>(device)]; }
std::string_view name_of(WeightFormat format) {
  return weight_format_names[static_cast<std::size_t>(format)];
}
std::string_view name_of(KvFormat format) {
  return kv_format_names[static_cast<std::size_t>(format)];
}

std::string_view name_of(Scope scope) { return scope_names[static_cast<std::size_t>(scope)]; }
std::string_view name_of(Estimate estimate) {
  return estimate_names[static_cast<std::size_t>(estimate)];
}

Device parse_device(std::string_view text) { return parse<Device>("device", text, device_names); }
WeightFormat parse_weight_format(std::string_view text) {
  return parse<WeightFormat>("weights", text, weight_format_names);
}
KvFormat parse_kv_format(std::string_view text) {
  return parse<KvFormat>("kv", text, kv_format_names);
}
Scope parse_scope(std::string_view text) { return parse<Scope>("scope", text, scope_names); }
Estimate parse_estimate(std::string_view text) {
  return parse<Estimate>("estimate", text, estimate_names);
}

}  // namespace tda
