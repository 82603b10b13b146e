// Products of several tokens by cuBLASLt, where CMake has found it; cublas_absent.cu stands in
// elsewhere.
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

  /// Does what mma_kernel does, or returns false: there is no cuBLASLt, or it cannot do this shape.
  bool multiply(cudaStream_t stream, const Gemm<std::uint16_t>& g, bool neuron_major) const;

 private:
  cublasLtContext* handle_ = nullptr;
};

}  // namespace tda::cuda
