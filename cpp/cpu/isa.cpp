#include "cpu/isa.h"

#include <tda/error.h>

#include <cstdlib>
#include <string>

namespace tda {

namespace portable {
const Kernels& kernels();
}
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}
namespace avx512bf16 {
const Kernels& kernels();
}

// The build defines TDA_HAS_... for the instruction sets it has kernels for.
std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> tables = {&portable::kernels()};
#ifdef TDA_HAS_avx2
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2) tables.push_back(&avx2::kernels());
#endif
#ifdef TDA_HAS_avx512
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
  if (avx512) tables.push_back(&avx512::kernels());
#endif
#ifdef TDA_HAS_avx512bf16
  if (avx512 && __builtin_cpu_supports("avx512bf16")) tables.push_back(&avx512bf16::kernels());
#endif
  return tables;
}

const Kernels& choose_kernels() {
  const std::vector<const Kernels*> tables = available_kernels();
  const char* forced = std::getenv("TDA_CPU_ISA");
  if (!forced) return *tables.back();
  std::string names;
  for (const Kernels* table : tables) {
    if (std::string(table->name) == forced) return *table;
    names += (names.empty() ? "" : ", ") + std::string(table->name);
  }
  throw OptionError("environment variable TDA_CPU_ISA=" + std::string(forced) +
                    ": expected one that this build and machine have: " + names);
}

}  // namespace tda
