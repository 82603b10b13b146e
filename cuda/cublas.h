// Prefill GEMMs by cuBLASLt if CMake found it, else cublas_absent.cu is compiled.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

struct cublasLtContext;

namespace tda::cuda {

template <class A>
struct Gemm;  // gemm.h

class Cublas {
 public:
  Cublas();
  ~Cublas();
  Cublas(const Cublas&) = delete;
  Cublas& operator=(const Cublas&) = delete;

  /// Computes what mma_kernel computes. False if there is no cuBLASLt or it does not support the
  /// shape.
  bool multiply(cudaStream_t stream, const Gemm<std::uint16_t>& g, bool neuron_major) const;

 private:
  cublasLtContext* handle_ = nullptr;
};

}  // namespace tda::cuda
