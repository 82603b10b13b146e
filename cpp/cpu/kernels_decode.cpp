// Decode kernels for f32 and bf16 rows (weights times one vector or several), and for the KV cache.
#include "cpu/attend.h"
#include "cpu/decode_rows.h"
#include "cpu/kernels_isa.h"

namespace tda::TDA_ISA {
const RowKernels f32_rows = row_kernels<ArrayRow<F32>>();
const RowKernels bf16_rows = row_kernels<ArrayRow<Bf16>>();
const CacheKernels f32_cache = {store_row<F32>, attend<F32>};
const CacheKernels bf16_cache = {store_row<Bf16>, attend<Bf16>};
const CacheKernels int8_cache = {store_int8_row, attend<Int8Cache>};
}  // namespace tda::TDA_ISA
