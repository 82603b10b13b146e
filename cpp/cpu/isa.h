// The kernel tables of this build that this machine can run.
#pragma once

#include <tda/types.h>

#include <vector>

#include "cpu/kernels.h"

namespace tda {

/// The kernels of one format.
inline const RowKernels& row_kernels(const Kernels& kernels, WeightFormat format) {
  return kernels.rows[static_cast<int>(format) - 1];
}
inline const PanelKernels& panel_kernels(const Kernels& kernels, WeightFormat format) {
  return kernels.panels[static_cast<int>(format) - 1];
}
inline const CacheKernels& cache_kernels(const Kernels& kernels, KvFormat format) {
  return kernels.caches[static_cast<int>(format) - 1];
}
inline const PanelKernels& cache_panel_kernels(const Kernels& kernels, KvFormat format) {
  return kernels.cache_panels[static_cast<int>(format) - 1];
}

/// In ascending order of speed.
std::vector<const Kernels*> available_kernels();

/// The fastest table, or the one named by the environment variable TDA_CPU_ISA. Throws OptionError.
const Kernels& choose_kernels();

}  // namespace tda
