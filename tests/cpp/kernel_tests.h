// What tests of kernels share: random inputs, and loops over instruction sets and formats.
#pragma once

#include <tda/types.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <random>
#include <string>
#include <vector>

#include "aligned.h"
#include "base/half.h"
#include "check.h"
#include "cpu/isa.h"

/// Normally distributed, from one sequence per program.
inline std::vector<float> random_floats(std::int64_t count, float deviation = 1) {
  static std::mt19937 random(1);
  std::normal_distribution<float> normal(0, deviation);
  std::vector<float> values(count);
  for (float& v : values) v = normal(random);
  return values;
}

/// x as RowKernels::prepare makes it.
inline AlignedBytes prepared(const tda::RowKernels& kernels, const std::vector<float>& x) {
  const auto n = static_cast<std::int64_t>(x.size());
  AlignedBytes out(kernels.prepared_bytes(n));
  kernels.prepare(x.data(), n, out.data());
  return out;
}

/// Panels of vectors of n values as PanelKernels::prepare makes them: in `memory`, or b itself.
inline tda::PreparedPanels prepared_panels(const tda::PanelKernels& kernels,
                                           const std::vector<float>& b, std::int64_t n,
                                           std::int64_t width, AlignedBytes& memory) {
  const std::int64_t stride = n * width, count = std::ssize(b) / stride;
  if (!kernels.prepare) return tda::ConstPanels{b.data(), stride};
  const std::int64_t bytes = kernels.prepared_bytes(n);
  memory.resize(count * bytes + 1, std::byte{7});
  for (std::int64_t p = 0; p < count; ++p)
    kernels.prepare(b.data() + p * stride, n, memory.data() + p * bytes);
  CHECK(memory.back() == std::byte{7});
  return {memory.data(), bytes};
}

inline double as_bf16(double v) {
  return tda::bf16_to_f32(tda::f32_to_bf16(static_cast<float>(v)));
}

/// Sets TDA_CPU_ISA during its lifetime.
struct ForcedIsa {
  explicit ForcedIsa(const std::string& name) { setenv("TDA_CPU_ISA", name.c_str(), 1); }
  ~ForcedIsa() { unsetenv("TDA_CPU_ISA"); }
};

/// body(kernels) for each instruction set of this machine; a failure is printed with its name.
template <class Body>
void for_all_kernels(const Body& body) {
  for (const tda::Kernels* kernels : tda::available_kernels()) {
    const int before = check::failures;
    body(*kernels);
    if (check::failures > before) std::printf("  in: %s\n", kernels->name);
  }
}

/// body(kernels, format) for each instruction set and each of the formats.
template <class Format, class Body>
void for_all_kernels(std::initializer_list<Format> formats, const Body& body) {
  for_all_kernels([&](const tda::Kernels& kernels) {
    for (const Format format : formats) {
      const int before = check::failures;
      body(kernels, format);
      if (check::failures > before)
        std::printf("  format: %s\n", std::string(tda::name_of(format)).c_str());
    }
  });
}
