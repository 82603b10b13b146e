// The kernel tables of this build that this machine can run.
#pragma once

#include <vector>

#include "cpu/kernels.h"

namespace tda {

/// In ascending order of speed.
std::vector<const Kernels*> available_kernels();

/// The fastest table, or the one named by the environment variable TDA_CPU_ISA. Throws OptionError.
const Kernels& choose_kernels();

}  // namespace tda
