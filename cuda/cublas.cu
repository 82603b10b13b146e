// Prefill GEMMs by cuBLASLt.
#include <cublasLt.h>

#include "cublas.h"
#include "gemm.h"
#include "memory.h"

namespace tda::cuda {

static void check(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS)
    throw DeviceError(std::string("cuda: cuBLASLt, ") + what + ": " +
                      cublasLtGetStatusString(status));
}

/// cuBLASLt is column-major, so our row-major matrices are transposes. pitch: elements from column
/// to column
static cublasLtMatrixLayoutOpaque_t layout(cudaDataType type, std::int64_t rows,
                                           std::int64_t columns, std::int64_t pitch) {
  cublasLtMatrixLayoutOpaque_t made;
  check(cublasLtMatrixLayoutInit(&made, type, static_cast<std::uint64_t>(rows),
                                 static_cast<std::uint64_t>(columns), pitch),
        "a matrix's layout");
  return made;
}

template <class T>
static void set(cublasLtMatmulDesc_t to, cublasLtMatmulDescAttributes_t attribute, T value) {
  check(cublasLtMatmulDescSetAttribute(to, attribute, &value, sizeof value), "a product's kind");
}

Cublas::Cublas() { check(cublasLtCreate(&handle_), "a new handle"); }
Cublas::~Cublas() { cublasLtDestroy(handle_); }

/// cᵀ [n, tokens] = w [n, depth] aᵀ [depth, tokens], with the bias added to every column, in f32.
/// cuBLASLt assumes 256-byte alignment; every matrix starts at an allocation, which has it.
bool Cublas::multiply(cudaStream_t stream, const Gemm<bf16>& g, bool neuron_major) const {
  cublasLtMatmulDescOpaque_t kind;
  check(cublasLtMatmulDescInit(&kind, CUBLAS_COMPUTE_32F, CUDA_R_32F), "a product's kind");
  set(&kind, CUBLASLT_MATMUL_DESC_TRANSA, neuron_major ? CUBLAS_OP_N : CUBLAS_OP_T);
  if (g.bias) {
    set(&kind, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    set(&kind, CUBLASLT_MATMUL_DESC_BIAS_POINTER, g.bias);
  }
  auto w = neuron_major ? layout(CUDA_R_16BF, g.n, g.depth, padded(g.n))
                        : layout(CUDA_R_16BF, g.depth, g.n, padded(g.depth));
  auto a = layout(CUDA_R_16BF, g.depth, g.tokens, padded(g.depth));
  auto c = layout(CUDA_R_32F, g.n, g.tokens, g.n);

  // The first algorithm of its heuristic that does not split sums over blocks, so that every run
  // gives the same bits. These need no workspace, and by default none is allowed.
  cublasLtMatmulPreferenceOpaque_t wanted;
  check(cublasLtMatmulPreferenceInit(&wanted), "a preference");
  const std::uint32_t whole = CUBLASLT_REDUCTION_SCHEME_NONE;
  check(cublasLtMatmulPreferenceSetAttribute(&wanted, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                                             &whole, sizeof whole),
        "a preference");
  cublasLtMatmulHeuristicResult_t best;
  int found = 0;
  const cublasStatus_t status =
      cublasLtMatmulAlgoGetHeuristic(handle_, &kind, &w, &a, &c, &c, &wanted, 1, &best, &found);
  if (status == CUBLAS_STATUS_NOT_SUPPORTED) return false;
  check(status, "choosing an algorithm");
  if (found == 0 || best.state != CUBLAS_STATUS_SUCCESS) return false;

  const float alpha = 1, beta = g.add ? 1 : 0;
  check(cublasLtMatmul(handle_, &kind, &alpha, g.w, &w, g.a, &a, &beta, g.c, &c, g.c, &c,
                       &best.algo, nullptr, 0, stream),
        "a product");
  return true;
}

}  // namespace tda::cuda
