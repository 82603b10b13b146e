// Decode kernels for bf16c rows.
#include "cpu/decode_rows.h"
#include "cpu/kernels_isa.h"

namespace tda::TDA_ISA {
const RowKernels bf16c_rows = row_kernels<Bf16cRow>();
}  // namespace tda::TDA_ISA
