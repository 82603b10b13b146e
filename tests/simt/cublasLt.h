// Replaces cuBLASLt's header of this name: the few functions that cuda/cublas.cu uses, as
// documented, in plain loops and with strict checks of their arguments.
#pragma once

#include "cuda_runtime.h"

enum cublasStatus_t {
  CUBLAS_STATUS_SUCCESS = 0,
  CUBLAS_STATUS_INVALID_VALUE = 7,
  CUBLAS_STATUS_NOT_SUPPORTED = 15,
};
enum cublasOperation_t { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 };
enum cublasComputeType_t { CUBLAS_COMPUTE_32F = 68 };
enum cudaDataType { CUDA_R_32F = 0, CUDA_R_16BF = 14 };
enum cublasLtEpilogue_t { CUBLASLT_EPILOGUE_DEFAULT = 1, CUBLASLT_EPILOGUE_BIAS = 4 };
enum cublasLtReductionScheme_t {
  CUBLASLT_REDUCTION_SCHEME_NONE = 0,
  CUBLASLT_REDUCTION_SCHEME_MASK = 7,
};
enum cublasLtMatmulDescAttributes_t {
  CUBLASLT_MATMUL_DESC_TRANSA = 3,
  CUBLASLT_MATMUL_DESC_EPILOGUE = 7,
  CUBLASLT_MATMUL_DESC_BIAS_POINTER = 8,
};
enum cublasLtMatmulPreferenceAttributes_t { CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3 };

struct cublasLtContext {};
using cublasLtHandle_t = cublasLtContext*;
struct cublasLtMatrixLayoutOpaque_t {
  cudaDataType type;
  std::uint64_t rows, cols;
  std::int64_t ld;
};
struct cublasLtMatmulDescOpaque_t {
  cublasOperation_t transpose_a;
  cublasLtEpilogue_t epilogue;
  const float* bias;
};
struct cublasLtMatmulPreferenceOpaque_t {
  std::uint32_t reductions;
};
struct cublasLtMatmulAlgo_t {
  bool chosen, splits;
};
struct cublasLtMatmulHeuristicResult_t {
  cublasLtMatmulAlgo_t algo;
  std::size_t workspaceSize;
  cublasStatus_t state;
};
using cublasLtMatrixLayout_t = cublasLtMatrixLayoutOpaque_t*;
using cublasLtMatmulDesc_t = cublasLtMatmulDescOpaque_t*;
using cublasLtMatmulPreference_t = cublasLtMatmulPreferenceOpaque_t*;

namespace simt {
inline bool cublas_can = true;    // whether it has algorithms; tests may change it
inline long cublas_products = 0;  // calls so far

/// Whether the layout and the alignment are valid.
inline bool fits(const void* p, const cublasLtMatrixLayoutOpaque_t& m, cudaDataType type) {
  return m.type == type && m.ld >= static_cast<std::int64_t>(m.rows) &&
         reinterpret_cast<std::uintptr_t>(p) % 256 == 0;
}
}  // namespace simt

inline const char* cublasLtGetStatusString(cublasStatus_t) { return "what the twin refuses"; }
inline cublasStatus_t cublasLtCreate(cublasLtHandle_t* h) {
  return *h = new cublasLtContext, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtDestroy(cublasLtHandle_t h) {
  return delete h, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutInit(cublasLtMatrixLayout_t m, cudaDataType type,
                                               std::uint64_t rows, std::uint64_t cols,
                                               std::int64_t ld) {
  return *m = {type, rows, cols, ld}, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescInit(cublasLtMatmulDesc_t d, cublasComputeType_t,
                                             cudaDataType) {
  return *d = {CUBLAS_OP_N, CUBLASLT_EPILOGUE_DEFAULT, nullptr}, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d,
                                                     cublasLtMatmulDescAttributes_t attribute,
                                                     const void* value, std::size_t size) {
  const auto set = [&](auto& to) {
    if (size != sizeof to) return CUBLAS_STATUS_INVALID_VALUE;
    return std::memcpy(&to, value, size), CUBLAS_STATUS_SUCCESS;
  };
  return attribute == CUBLASLT_MATMUL_DESC_TRANSA     ? set(d->transpose_a)
         : attribute == CUBLASLT_MATMUL_DESC_EPILOGUE ? set(d->epilogue)
                                                      : set(d->bias);
}
inline cublasStatus_t cublasLtMatmulPreferenceInit(cublasLtMatmulPreference_t p) {
  return *p = {CUBLASLT_REDUCTION_SCHEME_MASK}, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t p,
                                                           cublasLtMatmulPreferenceAttributes_t,
                                                           const void* value, std::size_t size) {
  return std::memcpy(&p->reductions, value, size), CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t,
                                                     cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                                     cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                                     cublasLtMatmulPreference_t p, int,
                                                     cublasLtMatmulHeuristicResult_t* best,
                                                     int* found) {
  *found = simt::cublas_can;
  if (!simt::cublas_can) return CUBLAS_STATUS_NOT_SUPPORTED;
  const bool splits = p->reductions != CUBLASLT_REDUCTION_SCHEME_NONE;
  return *best = {{true, splits}, 0, CUBLAS_STATUS_SUCCESS}, CUBLAS_STATUS_SUCCESS;
}

/// D = alpha op(A) B + beta C + bias, matrices column-major. An algorithm that is allowed to split
/// sums splits them anywhere.
inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t desc, const void* alpha,
                                     const void* a, cublasLtMatrixLayout_t a_of, const void* b,
                                     cublasLtMatrixLayout_t b_of, const void* beta, const void* c,
                                     cublasLtMatrixLayout_t c_of, void* d,
                                     cublasLtMatrixLayout_t d_of, const cublasLtMatmulAlgo_t* algo,
                                     void*, std::size_t, cudaStream_t stream) {
  const bool turned = desc->transpose_a == CUBLAS_OP_T;
  const std::uint64_t m = d_of->rows, n = d_of->cols, depth = b_of->rows;
  if (!algo->chosen || !simt::fits(a, *a_of, CUDA_R_16BF) || !simt::fits(b, *b_of, CUDA_R_16BF) ||
      !simt::fits(c, *c_of, CUDA_R_32F) || !simt::fits(d, *d_of, CUDA_R_32F) ||
      (turned ? a_of->cols : a_of->rows) != m || (turned ? a_of->rows : a_of->cols) != depth ||
      b_of->cols != n || c_of->rows != m || c_of->cols != n ||
      (desc->epilogue == CUBLASLT_EPILOGUE_BIAS) != (desc->bias != nullptr))
    return CUBLAS_STATUS_INVALID_VALUE;
  const auto number = [](const void* from, std::uint64_t at) {
    const auto* p = static_cast<const std::uint16_t*>(from) + at;
    simt::check_read(p, 2);
    return __uint_as_float(static_cast<unsigned>(*p) << 16);
  };
  ++simt::cublas_products;
  stream->run([=, desc = *desc, splits = algo->splits, alpha = *static_cast<const float*>(alpha),
               beta = *static_cast<const float*>(beta), a_ld = a_of->ld, b_ld = b_of->ld,
               c_ld = c_of->ld, d_ld = d_of->ld] {
    for (std::uint64_t j = 0; j < n; ++j)
      for (std::uint64_t i = 0; i < m; ++i) {
        float sums[2] = {0, 0};
        const std::uint64_t split = splits ? simt::random() % (depth + 1) : depth;
        for (std::uint64_t k = 0; k < depth; ++k)
          sums[k >= split] +=
              number(a, turned ? i * a_ld + k : k * a_ld + i) * number(b, j * b_ld + k);
        float v = alpha * (sums[0] + sums[1]);
        if (beta != 0) v += beta * static_cast<const float*>(c)[j * c_ld + i];
        if (desc.bias) v += desc.bias[i];
        static_cast<float*>(d)[j * d_ld + i] = v;
      }
  });
  return CUBLAS_STATUS_SUCCESS;
}
