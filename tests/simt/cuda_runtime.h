// Replaces CUDA's header of this name, so that the sources in cuda/ compile as plain C++: the parts
// of the language and runtime that they use. Device memory is host memory filled with a poison
// value.
#pragma once

#include <cmath>
#include <cstdlib>

#include "simt.h"

#define TDA_ON_HOST 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
inline const dim3 &threadIdx = simt::thread, &blockIdx = simt::block;
inline const dim3 &blockDim = simt::block_size, &gridDim = simt::grid_size;
#define __syncthreads() simt::barrier(simt::breaks(__FILE__, __LINE__))
/// An index bound, which mutation tests can raise by one.
#define TDA_WITHIN(i, n) ((i) < (n) + (simt::breaks(__FILE__, __LINE__) ? 1 : 0))

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

// ---- in kernels ---------------------------------------------------------------------------------
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return simt::shuffle(simt::Op::exclusive_or, value, mask);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int by) {
  return simt::shuffle(simt::Op::up, value, by);
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return simt::shuffle(simt::Op::broadcast, value, lane);
}
inline unsigned atomicAdd(unsigned* p, unsigned value) {
  const unsigned old = *p;
  *p += value;
  return old;
}
inline void __threadfence() {}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline float __uint_as_float(unsigned x) {
  float f;
  std::memcpy(&f, &x, 4);
  return f;
}
inline unsigned __float_as_uint(float f) {
  unsigned x;
  std::memcpy(&x, &f, 4);
  return x;
}

// ---- the runtime --------------------------------------------------------------------------------
enum cudaError_t { cudaSuccess, cudaErrorMemoryAllocation = 2, cudaErrorInitializationError = 3 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDefault };
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline constexpr unsigned cudaStreamNonBlocking = 1;
using CudaWork = std::vector<std::function<void()>>;
using cudaStream_t = struct CudaStream*;
using cudaGraph_t = CudaWork*;
using cudaGraphExec_t = CudaWork*;
struct CudaStream {
  std::unique_ptr<CudaWork> captured;
  cudaError_t run(std::function<void()> work) {
    if (captured)
      captured->push_back(std::move(work));
    else
      work();
    return cudaSuccess;
  }
};
struct cudaDeviceProp {
  char name[256] = "simt";
  int multiProcessorCount = 0, major = 9, minor = 0;
};
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace simt {
inline std::size_t memory_total = std::size_t{1} << 30, memory_used = 0;  // tests may shrink it
inline int driver = 13000, devices = 1, capability = 9, processors = 3;

// A poisoned fence follows every allocation. Writes to it are found at the next synchronisation,
// reads by load() at once.
inline constexpr std::size_t kFence = 256;
inline std::map<const char*, std::size_t> allocations;

inline void check_fence(const char* p, std::size_t bytes) {
  for (std::size_t i = 0; i < kFence; ++i)
    if (p[bytes + i] != static_cast<char>(0xff))
      throw std::runtime_error("simt: a kernel wrote behind its memory");
}
inline void check_fences() {
  for (const auto& [p, bytes] : allocations) check_fence(p, bytes);
}
inline void check_read(const void* from, std::size_t size) {
  const char* p = static_cast<const char*>(from);
  auto after = allocations.upper_bound(p);
  if (after == allocations.begin() || p + size > std::prev(after)->first + std::prev(after)->second)
    throw std::runtime_error("simt: a kernel reads outside its memory");
}
}  // namespace simt

inline const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaSuccess ? "no error" : "out of memory";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = simt::devices, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* v) { return *v = simt::driver, cudaSuccess; }
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor };
inline cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr, int) {
  return *v = simt::capability, cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  *p = cudaDeviceProp{};
  p->multiProcessorCount = simt::processors;
  return cudaSuccess;
}
inline cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  *total = simt::memory_total;
  *free = *total - simt::memory_used;
  return cudaSuccess;
}
inline cudaError_t cudaMalloc(void** p, std::size_t bytes) {
  if (bytes > simt::memory_total - simt::memory_used) return cudaErrorMemoryAllocation;
  *p = std::aligned_alloc(256, (bytes + 255) / 256 * 256 + simt::kFence);
  std::memset(*p, 0xff, bytes + simt::kFence);
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(static_cast<char*>(*p) + bytes, simt::kFence);
#endif
  simt::allocations[static_cast<char*>(*p)] = bytes;
  simt::memory_used += bytes;
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* p) {
  if (p) simt::memory_used -= simt::allocations.extract(static_cast<char*>(p)).mapped();
  std::free(p);
  return cudaSuccess;
}
inline cudaError_t cudaMallocHost(void** p, std::size_t bytes) {
  *p = std::malloc(bytes);
  std::memset(*p, 0xff, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFreeHost(void* p) { return std::free(p), cudaSuccess; }
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) {
  return *s = new CudaStream, cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t s) { return delete s, cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
#ifndef __SANITIZE_ADDRESS__
  simt::check_fences();
#endif
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                                   cudaStream_t s) {
  return s->run([=] {
    if (bytes > 0) std::memcpy(to, from, bytes);  // for 0 bytes pointers may be null
  });
}
inline cudaError_t cudaMemsetAsync(void* p, int value, std::size_t bytes, cudaStream_t s) {
  return s->run([=] {
    if (bytes > 0) std::memset(p, value, bytes);
  });
}
inline cudaError_t cudaMemcpy2DAsync(void* to, std::size_t to_pitch, const void* from,
                                     std::size_t from_pitch, std::size_t width, std::size_t height,
                                     cudaMemcpyKind, cudaStream_t s) {
  return s->run([=] {
    for (std::size_t r = 0; r < height; ++r)
      std::memcpy(static_cast<char*>(to) + r * to_pitch,
                  static_cast<const char*>(from) + r * from_pitch, width);
  });
}
template <class F>
cudaError_t cudaFuncSetAttribute(F, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... a) {
  return config->stream->run([c = *config, kernel, ... args = static_cast<P>(a)] {
    simt::launch(c.gridDim, c.blockDim, c.dynamicSmemBytes, [&] { kernel(args...); });
  });
}
inline cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode) {
  return s->captured = std::make_unique<CudaWork>(), cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* graph) {
  return *graph = s->captured.release(), cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned) {
  return *exec = new CudaWork(*graph), cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
  for (const auto& work : *exec) work();
  return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return delete exec, cudaSuccess; }
