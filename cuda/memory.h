// RAII for device memory, streams and graphs, and kernel launches. Errors become DeviceError.
#pragma once

#include <cuda_runtime.h>
#include <tda/error.h>

#include <cstdint>
#include <string>
#include <utility>

namespace tda::cuda {

inline void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears it, or later calls would report it again
  std::string message = "cuda: " + what + ": " + cudaGetErrorString(error);
  if (error == cudaErrorInitializationError)
    message += " (a process forked from one that uses CUDA can't use it, a spawned one can)";
  throw DeviceError(message);
}

class Stream {
 public:
  Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a new stream"); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  operator cudaStream_t() const { return stream_; }
  bool overlaps = false;  // whether a kernel may start before the previous one has ended
  void wait() const { check(cudaStreamSynchronize(stream_), "waiting for the device"); }

 private:
  cudaStream_t stream_ = nullptr;
};

/// Uninitialised elements in device memory, or in pinned host memory.
template <class T, bool Pinned = false>
class Memory {
 public:
  Memory() = default;
  ~Memory() { release(); }
  Memory(Memory&& o) noexcept
      : data_(std::exchange(o.data_, nullptr)), count_(std::exchange(o.count_, 0)) {}
  Memory& operator=(Memory&& o) noexcept {
    std::swap(data_, o.data_);
    std::swap(count_, o.count_);
    return *this;
  }

  /// Makes room for `count` elements. If it has to grow, the contents are lost and it returns true.
  bool reserve(std::int64_t count, const std::string& needed_for) {
    if (count <= count_) return false;
    release();
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
    void* p = nullptr;
    const cudaError_t error = Pinned ? cudaMallocHost(&p, bytes) : cudaMalloc(&p, bytes);
    check(error, std::to_string(bytes) + " bytes needed for " + needed_for);
    data_ = static_cast<T*>(p);
    count_ = count;
    return true;
  }
  T* data() const { return data_; }
  std::int64_t size() const { return count_; }

 private:
  void release() {
    Pinned ? cudaFreeHost(data_) : cudaFree(data_);
    data_ = nullptr;
    count_ = 0;
  }
  T* data_ = nullptr;
  std::int64_t count_ = 0;
};
template <class T>
using PinnedMemory = Memory<T, true>;

/// A recorded sequence of launches.
class Graph {
 public:
  Graph() = default;
  ~Graph() { reset(); }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  void begin(cudaStream_t stream) {
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "recording a graph");
  }
  void end(cudaStream_t stream) {
    cudaGraph_t graph = nullptr;
    check(cudaStreamEndCapture(stream, &graph), "recording a graph");
    const cudaError_t error = cudaGraphInstantiate(&exec_, graph, 0);
    cudaGraphDestroy(graph);
    check(error, "making a graph");
  }
  void launch(cudaStream_t stream) const { check(cudaGraphLaunch(exec_, stream), "a graph"); }
  explicit operator bool() const { return exec_ != nullptr; }
  void reset() {
    if (exec_) cudaGraphExecDestroy(std::exchange(exec_, nullptr));
  }

 private:
  cudaGraphExec_t exec_ = nullptr;
};

template <class T>
void copy(cudaStream_t stream, T* to, const T* from, std::int64_t count) {
  check(cudaMemcpyAsync(to, from, static_cast<std::size_t>(count) * sizeof(T), cudaMemcpyDefault,
                        stream),
        "a copy");
}

/// n / per_block, rounded up.
inline unsigned blocks_of(std::int64_t n, std::int64_t per_block) {
  return static_cast<unsigned>((n + per_block - 1) / per_block);
}

template <class... P, class... A>
void launch_with(cudaLaunchAttribute* attribute, cudaStream_t stream, dim3 grid, unsigned threads,
                 std::int64_t shared_bytes, void (*kernel)(P...), const A&... arguments) {
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          std::to_string(shared_bytes) + " bytes of shared memory");
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = {threads, 1, 1};
  config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = attribute;
  config.numAttrs = attribute ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...), "a launch");
}

template <class... P, class... A>
void launch(cudaStream_t stream, dim3 grid, unsigned threads, std::int64_t shared_bytes,
            void (*kernel)(P...), const A&... arguments) {
  launch_with(nullptr, stream, grid, threads, shared_bytes, kernel, arguments...);
}

/// The kernel may start before the previous one has ended; it must call wait_for_previous().
template <class... P, class... A>
void launch_early(const Stream& stream, dim3 grid, unsigned threads, std::int64_t shared_bytes,
                  void (*kernel)(P...), const A&... arguments) {
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  launch_with(stream.overlaps ? &early : nullptr, stream, grid, threads, shared_bytes, kernel,
              arguments...);
}

}  // namespace tda::cuda
