// Prefill GEMMs: bf16 on tensor cores, or f32.
#pragma once

#include "device.h"

namespace tda::cuda {

/// c[t, n] (+)= sum over k of a[t, k] w[n, k] (or w[k, n], neuron-major) + bias[n].
template <class A>
struct Gemm {
  const A* a;         // [tokens, depth], bf16: [tokens, padded(depth)] zero-padded
  const void* w;      // [n, padded(depth)], neuron-major [depth, padded(n)]
  const float* bias;  // [n] or null
  float* c;           // [tokens, n]
  int tokens, n, depth;
  bool add;
};

template <class A>
__device__ void put(const Gemm<A>& g, int t, int n, float v) {
  if (!TDA_WITHIN(t, g.tokens) || !TDA_WITHIN(n, g.n)) return;
  float& c = g.c[static_cast<std::int64_t>(t) * g.n + n];
  v += g.bias ? g.bias[n] : 0;
  c = g.add ? c + v : v;
}

// ---- tensor cores -------------------------------------------------------------------------------

/// A warp's fragments of c [16, 8] += a [16, 16] b [16, 8]. Lane 4 g + i holds
/// a: rows g, g + 8 of columns 2 i, 2 i + 1 (words 0, 1), the same 8 columns on (words 2, 3);
/// b: rows 2 i, 2 i + 1 (word 0), the same 8 rows on (word 1), of column g;
/// c: row g (numbers 0, 1) and g + 8 (2, 3) of columns 2 i, 2 i + 1.
/// A word holds two bf16, the first in its low half.
struct FragmentA {
  unsigned words[4];
};
struct FragmentB {
  unsigned words[2];
};
struct FragmentC {
  float numbers[4];
};

__device__ inline void multiply_add(FragmentC& c, const FragmentA& a, const FragmentB& b) {
#ifdef __CUDA_ARCH__
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c.numbers[0]), "+f"(c.numbers[1]), "+f"(c.numbers[2]), "+f"(c.numbers[3])
      : "r"(a.words[0]), "r"(a.words[1]), "r"(a.words[2]), "r"(a.words[3]), "r"(b.words[0]),
        "r"(b.words[1]));
#elif defined(TDA_ON_HOST)
  simt::multiply_add(c.numbers, a.words, b.words);
#else
  (void)a, (void)b, (void)c;  // nvcc also compiles this for the host
#endif
}

inline constexpr int kGemmTokens = 64, kGemmOutputs = 128, kGemmDepth = 64;  // a block's tile
/// Row pitch of a tile in words (two bf16), padded so that a fragment's lanes hit distinct banks.
inline constexpr int kGemmPitch = kGemmDepth / 2 + 4;
inline constexpr int kGemmShared = 2 * (kGemmTokens + kGemmOutputs) * kGemmPitch * 4;  // bytes
inline constexpr int kRowChunks = kGemmDepth / kChunk;

/// A thread's part of the next tiles, loaded while tensor cores work on the current ones.
template <bool NeuronMajor>
struct Staged {
  static constexpr int kA = kGemmTokens * kRowChunks / kThreads;
  static constexpr int kB = kGemmOutputs * kRowChunks / kThreads;
  Chunk<bf16> a[kA], b[kB];

  /// Neuron-major: which pair of rows and which chunk an item loads. Pairs vary with the lane, so
  /// that stores have few bank conflicts; two neighbouring chunks share a sector.
  static __device__ int pair_of(int item) { return item / 2 % 16 + item / kThreads * 16; }
  static __device__ int chunk_of(int item) { return item % 2 + item / 32 % 8 * 2; }

  static __device__ Chunk<bf16> load(const bf16* p, bool exists) {
    return exists ? Chunk<bf16>::cached(p) : Chunk<bf16>{};
  }
  __device__ void load(const Gemm<bf16>& g, int first_t, int first_n, int first) {
    const auto pitch = static_cast<int>(padded(g.depth)), n_pitch = static_cast<int>(padded(g.n));
#pragma unroll
    for (int i = 0; i < kA; ++i) {
      const int item = threadIdx.x + i * kThreads;
      const int t = first_t + item / kRowChunks, k = first + item % kRowChunks * kChunk;
      a[i] = load(g.a + static_cast<std::int64_t>(t) * pitch + k,
                  TDA_WITHIN(t, g.tokens) && TDA_WITHIN(k, pitch));
    }
    const bf16* w = static_cast<const bf16*>(g.w);
#pragma unroll
    for (int i = 0; i < kB; ++i) {
      const int item = threadIdx.x + i / (NeuronMajor ? 2 : 1) * kThreads;
      if (NeuronMajor) {  // i % 2: which row of the pair
        const int k = first + 2 * pair_of(item) + i % 2, n = first_n + chunk_of(item) * kChunk;
        b[i] = load(w + static_cast<std::int64_t>(k) * n_pitch + n,
                    TDA_WITHIN(k, g.depth) && TDA_WITHIN(n, n_pitch));
      } else {
        const int n = first_n + item / kRowChunks, k = first + item % kRowChunks * kChunk;
        b[i] = load(w + static_cast<std::int64_t>(n) * pitch + k,
                    TDA_WITHIN(n, g.n) && TDA_WITHIN(k, pitch));
      }
    }
  }
  static __device__ void put(unsigned* tile, int item, const Chunk<bf16>& chunk) {
    const int at = item / kRowChunks * kGemmPitch + item % kRowChunks * (kChunk / 2);
    *reinterpret_cast<uint4*>(tile + at) = chunk.words;
  }
  /// a_tile: [kGemmTokens, kGemmPitch], b_tile: [kGemmOutputs, kGemmPitch] words
  __device__ void store(unsigned* a_tile, unsigned* b_tile) const {
#pragma unroll
    for (int i = 0; i < kA; ++i) put(a_tile, threadIdx.x + i * kThreads, a[i]);
#pragma unroll
    for (int i = 0; !NeuronMajor && i < kB; ++i) put(b_tile, threadIdx.x + i * kThreads, b[i]);
#pragma unroll
    for (int i = 0; NeuronMajor && i < kB; i += 2) {
      const int item = threadIdx.x + i / 2 * kThreads;
      unsigned* to = b_tile + chunk_of(item) * kChunk * kGemmPitch + pair_of(item);
      const uint4 x = b[i].words, y = b[i + 1].words;
      const unsigned even[4] = {x.x, x.y, x.z, x.w}, odd[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        to[2 * j * kGemmPitch] = (even[j] & 0xffffu) | odd[j] << 16;
        to[(2 * j + 1) * kGemmPitch] = even[j] >> 16 | (odd[j] & 0xffff0000u);
      }
    }
  }
};

/// A block computes a tile of kGemmTokens by kGemmOutputs, each warp 32 by 32 of it.
/// grid: (n / kGemmOutputs, tokens / kGemmTokens), rounded up; shared: kGemmShared bytes
template <bool NeuronMajor>
__global__ void __launch_bounds__(kThreads, 2) mma_kernel(Gemm<bf16> g) {
  constexpr int kTile = (kGemmTokens + kGemmOutputs) * kGemmPitch;
  unsigned* tiles = shared_as<unsigned>();  // [2, kTile]: a, then b
  const int first_t = blockIdx.y * kGemmTokens, first_n = blockIdx.x * kGemmOutputs;
  const int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
  const int warp_t = warp / 4 * 32, warp_n = warp % 4 * 32;
  FragmentC sums[2][4] = {};
  Staged<NeuronMajor> staged;
  staged.load(g, first_t, first_n, 0);
  for (int first = 0, turn = 0; first < g.depth; first += kGemmDepth, turn ^= 1) {
    unsigned* a_tile = tiles + turn * kTile;
    unsigned* b_tile = a_tile + kGemmTokens * kGemmPitch;
    staged.store(a_tile, b_tile);
    __syncthreads();  // also: all warps are done with the tiles of two iterations ago
    if (first + kGemmDepth < g.depth) staged.load(g, first_t, first_n, first + kGemmDepth);
#pragma unroll
    for (int k = 0; k < kGemmDepth / 2; k += 8) {
      FragmentA a[2];
      FragmentB b[4];
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int w = 0; w < 4; ++w)
          a[i].words[w] =
              a_tile[(warp_t + 16 * i + row + w % 2 * 8) * kGemmPitch + k + pair + w / 2 * 4];
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int w = 0; w < 2; ++w)
          b[j].words[w] = b_tile[(warp_n + 8 * j + row) * kGemmPitch + k + pair + w * 4];
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply_add(sums[i][j], a[i], b[j]);
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        put(g, first_t + warp_t + 16 * i + row + e / 2 * 8,
            first_n + warp_n + 8 * j + 2 * pair + e % 2, sums[i][j].numbers[e]);
}

/// out[t] = x[t] in bf16, zero-padded. A block per token. x: [T, n], out: [T, padded(n)]
static __global__ void round_kernel(const float* x, int n, bf16* out) {
  const std::int64_t t = blockIdx.x;
  const auto pitch = static_cast<int>(padded(n));
  for (int i = threadIdx.x; i < pitch; i += blockDim.x)
    store(TDA_WITHIN(i, n) ? x[t * n + i] : 0, out + t * pitch + i);
}

// ---- f32 ----------------------------------------------------------------------------------------

inline constexpr int kTile = 64, kTileDepth = 16, kTilePitch = kTile + 1;
inline constexpr int kTilesShared = 2 * kTileDepth * kTilePitch * 4;  // bytes

/// sums[i][j] += the dot product of the thread's row + 16 i of a and column + 16 j of b.
/// a, b: [kTileDepth, kTilePitch] shared
__device__ inline void add_tile(const float* a, const float* b, float (&sums)[4][4]) {
  const int column = threadIdx.x % 16, row = threadIdx.x / 16;
#pragma unroll
  for (int k = 0; k < kTileDepth; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        sums[i][j] += a[k * kTilePitch + row + 16 * i] * b[k * kTilePitch + column + 16 * j];
}

/// grid: (n / kTile, tokens / kTile), rounded up; shared: kTilesShared bytes
template <bool NeuronMajor>
__global__ void __launch_bounds__(kThreads, 2) gemm_kernel(Gemm<float> g) {
  float* a = shared_as<float>();           // [kTileDepth, kTilePitch]
  float* b = a + kTileDepth * kTilePitch;  // [kTileDepth, kTilePitch]
  const int first_n = blockIdx.x * kTile, first_t = blockIdx.y * kTile;
  const int column = threadIdx.x % 16, row = threadIdx.x / 16;
  const std::int64_t pitch = padded(NeuronMajor ? g.n : g.depth);
  float sums[4][4] = {};
  for (int first = 0; first < g.depth; first += kTileDepth) {
    for (int i = threadIdx.x; i < kTile * kTileDepth; i += kThreads) {
      const int k = i % kTileDepth, t = i / kTileDepth;
      const bool inside = TDA_WITHIN(first_t + t, g.tokens) && TDA_WITHIN(first + k, g.depth);
      const std::int64_t at = static_cast<std::int64_t>(first_t + t) * g.depth + first + k;
      a[k * kTilePitch + t] = inside ? load(g.a + at) : 0;
    }
    for (int i = threadIdx.x; i < kTile * kTileDepth; i += kThreads) {
      const int k = NeuronMajor ? i / kTile : i % kTileDepth;
      const int n = NeuronMajor ? i % kTile : i / kTileDepth;
      const bool inside = TDA_WITHIN(first_n + n, g.n) && TDA_WITHIN(first + k, g.depth);
      const std::int64_t at =
          NeuronMajor ? (first + k) * pitch + first_n + n : (first_n + n) * pitch + first + k;
      b[k * kTilePitch + n] = inside ? load(static_cast<const float*>(g.w) + at) : 0;
    }
    __syncthreads();
    add_tile(a, b, sums);
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      put(g, first_t + row + 16 * i, first_n + column + 16 * j, sums[i][j]);
}

}  // namespace tda::cuda
