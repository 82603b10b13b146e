// The parts of one instruction set's kernel table, each defined in a source of its own.
#pragma once

#include "cpu/bricks.h"
#include "cpu/kernels.h"

// Of the instruction set TDA_DECODE_ISA, which is another than TDA_ISA where that adds nothing to
// decoding. TDA_ISA's table takes them from there.
namespace tda::TDA_DECODE_ISA {

// kernels_decode.cpp
extern const RowKernels f32_rows, bf16_rows;
extern const CacheKernels f32_cache, bf16_cache, int8_cache;

// kernels_bf16c.cpp
extern const RowKernels bf16c_rows;

// kernels_int8.cpp
extern const RowKernels int8_rows;

// kernels_bricks.cpp
extern const BrickKernels bricks;

}  // namespace tda::TDA_DECODE_ISA

namespace tda::TDA_ISA {

// kernels_prefill.cpp
extern const std::int64_t panel;
extern const PanelKernels f32_panels, f32_cache_panels, bf16_cache_panels, int8_cache_panels;
extern const PanelKernels bf16_panels, bf16c_panels;  // or kernels_prefill_bf16.cpp
extern const PanelKernels int8_panels;                // or kernels_prefill_integer.cpp
void multiply_bricks(const Bricks& w, std::int64_t strip, PreparedPanels b, Panels c,
                     std::int64_t count, bool add);  // or kernels_prefill_bf16.cpp
void softmax(const SoftmaxBlock&, ScoreScale, float* s, float* m, float* l, float* o);
void rms_norm_panel(const float* x, const float* weight, float eps, std::int64_t n, float* out);

}  // namespace tda::TDA_ISA
