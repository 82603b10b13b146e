// Which instruction sets' kernels this build has and this machine runs.
#pragma once

#include <vector>

#include "cpu/kernels.h"

namespace tda {

/// The tables that can run here, the best one last.
std::vector<const Kernels*> available_kernels();

/// The best table, or the one named by the environment's TDA_CPU_ISA. Throws OptionError.
const Kernels& choose_kernels();

}  // namespace tda
