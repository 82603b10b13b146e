// Shared by the kernels: 16-byte loads, reductions over a warp and a block. nvcc compiles the
// kernels for the device; g++ compiles the same source against tests/simt/cuda_runtime.h.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace tda::cuda {

#ifndef TDA_WITHIN
#define TDA_WITHIN(i, n) ((i) < (n))
#endif

/// The block's shared memory; each kernel defines its own layout.
template <class T>
__device__ T* shared_as() {
#ifdef __CUDACC__
  extern __shared__ uint4 shared_memory[];
  return reinterpret_cast<T*>(shared_memory);
#else
  return reinterpret_cast<T*>(simt::shared_memory());
#endif
}

inline constexpr int kThreads = 256, kWarps = kThreads / 32;
inline constexpr unsigned kAll = 0xffffffffu;
inline constexpr unsigned kBlocksEach = 2;  // per multiprocessor, of a kernel for one token

/// Elements per chunk; rows on the device are zero-padded to whole chunks.
inline constexpr int kChunk = 8;
__host__ __device__ constexpr std::int64_t padded(std::int64_t n) {
  return (n + kChunk - 1) / kChunk * kChunk;
}

using bf16 = std::uint16_t;  // as a bit pattern

/// A load that tests check for being in bounds.
template <class T>
__device__ T read(const T* p) {
#ifdef TDA_ON_HOST
  simt::check_read(p, sizeof(T));
#endif
  return *p;
}

/// The same for memory that neither this kernel nor the one before it writes.
template <class T>
__device__ T load(const T* p) {
#ifdef __CUDA_ARCH__
  return __ldg(p);
#else
  return read(p);
#endif
}

/// The kernels of a decoded token overlap (programmatic dependent launch, compute capability 9.0
/// and up): once all blocks have called this, blocks of the next kernel may start where there is
/// room.
__device__ inline void let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/// Returns when all previous kernels have finished. Before this call a kernel started by
/// launch_early() must not write, and may read only weights, masks and the step's inputs from the
/// host, which a step's first kernel waits for.
__device__ inline void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// A load that bypasses the L1 cache, for data used once.
__device__ inline uint4 load_once(const uint4* p) {
#ifdef __CUDA_ARCH__
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(p));
  return v;
#else
  return load(p);
#endif
}

/// Eight consecutive elements in their stored format. Loading and unpacking are separate, so that
/// several loads can be in flight.
template <class W>
struct Chunk;

template <>
struct Chunk<float> {
  uint4 words[2];
  __device__ static Chunk once(const float* p) {
    const uint4* q = reinterpret_cast<const uint4*>(p);
    return {{load_once(q), load_once(q + 1)}};
  }
  __device__ static Chunk cached(const float* p) {
    const uint4* q = reinterpret_cast<const uint4*>(p);
    return {{read(q), read(q + 1)}};
  }
  __device__ void unpack(float (&out)[kChunk]) const {
    for (int i = 0; i < 2; ++i) {
      out[4 * i] = __uint_as_float(words[i].x);
      out[4 * i + 1] = __uint_as_float(words[i].y);
      out[4 * i + 2] = __uint_as_float(words[i].z);
      out[4 * i + 3] = __uint_as_float(words[i].w);
    }
  }
};

template <>
struct Chunk<bf16> {
  uint4 words;
  __device__ static Chunk once(const bf16* p) {
    return {load_once(reinterpret_cast<const uint4*>(p))};
  }
  __device__ static Chunk cached(const bf16* p) {
    return {read(reinterpret_cast<const uint4*>(p))};
  }
  __device__ void unpack(float (&out)[kChunk]) const {
    const unsigned w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[2 * i] = __uint_as_float(w[i] << 16);
      out[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
    }
  }
};

__device__ inline float value_of(float v) { return v; }
__device__ inline float value_of(bf16 v) { return __uint_as_float(unsigned{v} << 16); }

/// cap tanh(x / cap); NaN of what is not finite, or the cap would hide it.
__device__ inline float soft_cap(float x, float cap) { return cap * tanhf(x / cap) + (x - x); }

__device__ inline void store(float v, float* p) { *p = v; }
/// Rounds to nearest, ties to even, as base/half.h does.
__device__ inline void store(float v, bf16* p) {
  const unsigned bits = __float_as_uint(v);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  *p = static_cast<bf16>(nan ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/// The sum in every lane, with the same bits in each because addition commutes.
template <class T>
__device__ T warp_sum(T v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v += __shfl_xor_sync(kAll, v, mask);
  return v;
}

__device__ inline float warp_max(float v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v = fmaxf(v, __shfl_xor_sync(kAll, v, mask));
  return v;
}

/// The sum in every thread, added in a fixed order. parts: [warps] shared; reusable after the next
/// barrier.
template <class T>
__device__ T block_sum(T v, T* parts) {
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
  __syncthreads();
  T sum = 0;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) sum += parts[w];
  return sum;
}

struct Scan {
  int before, total;  // sum over the threads before this one, and over the whole block
};

/// Exclusive scan, for blocks of kThreads. sums: [kWarps] shared; reusable after the next barrier
__device__ inline Scan block_scan(int v, int* sums) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int upto = v;  // inclusive scan over the warp
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const int other = __shfl_up_sync(kAll, upto, by);
    if (lane >= by) upto += other;
  }
  if (lane == 31) sums[warp] = upto;
  __syncthreads();
  Scan scan = {upto - v, 0};
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) scan.before += sums[w];
    scan.total += sums[w];
  }
  return scan;
}

/// Part [first, end) of `total` items split evenly.
struct Share {
  int first, end, total;
};

__device__ inline Share share_of(int total, int part, int parts) {
  const auto at = [&](int p) {
    return static_cast<int>(static_cast<std::int64_t>(total) * p / parts);
  };
  return {at(part), at(part + 1), total};
}

/// True in the last of `blocks` blocks to call this; that block then sees what the others wrote
/// before their call. Resets `counter` to 0. flag: [1] shared.
__device__ inline bool last_to_arrive(unsigned* counter, unsigned blocks, unsigned* flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const bool last = atomicAdd(counter, 1u) == blocks - 1;
    if (last) *counter = 0;
    *flag = last;
  }
  __syncthreads();
  __threadfence();
  return *flag != 0;
}

}  // namespace tda::cuda
