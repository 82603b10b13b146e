// Decode kernels for bf16c rows. In a source of their own, since beside others GCC 12 inlines less of
// them, and a few sequences decode at a third of the speed.
#include "cpu/decode_rows.h"
#include "cpu/kernels_isa.h"

namespace tda::TDA_ISA {
const RowKernels bf16c_rows = row_kernels<Bf16cRow>();
}  // namespace tda::TDA_ISA
