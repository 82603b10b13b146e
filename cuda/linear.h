// Kernels of norms, projections and the output head.
#pragma once

#include "device.h"

namespace tda::cuda {

/// x: [n] -> out: [padded(n)] shared, zeros at the end; by RMSNorm if `weight`: [n] is there.
/// parts: [kWarps] shared. The caller's barrier ends it.
__device__ inline void load_vector(const float* x, const float* weight, float eps, int n,
                                   float* out, float* parts) {
  float squares = 0;
  for (int i = threadIdx.x; i < padded(n); i += blockDim.x) {
    const float v = TDA_WITHIN(i, n) ? x[i] : 0;
    out[i] = v;
    squares += v * v;
  }
  if (!weight) return;
  const float scale = 1 / sqrtf(block_sum(squares, parts) / n + eps);
  for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] *= scale * weight[i];
}

/// sums[r] = rows[r] . x, in every lane of the warp. rows[r]: [pitch], x: [pitch] shared.
template <int R, class W>
__device__ void dots(const W* const (&rows)[R], const float* x, int pitch, float (&sums)[R]) {
#pragma unroll
  for (int r = 0; r < R; ++r) sums[r] = 0;
#pragma unroll 2
  for (int i = threadIdx.x % 32 * kChunk; i < pitch; i += 32 * kChunk) {
    Chunk<W> chunks[R];
#pragma unroll
    for (int r = 0; r < R; ++r) chunks[r] = Chunk<W>::once(rows[r] + i);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float w[kChunk];
      chunks[r].unpack(w);
#pragma unroll
      for (int k = 0; k < kChunk; ++k) sums[r] += w[k] * x[i + k];
    }
  }
#pragma unroll
  for (int r = 0; r < R; ++r) sums[r] = warp_sum(sums[r]);
}

/// y (+)= W norm(x) + bias. Reads each weight once.
struct Linear {
  const void* w;      // [rows, pitch]
  const float* x;     // [cols]
  const float* norm;  // [cols] or null: x as it is
  const float* bias;  // [rows] or null
  float* y;           // [rows]
  int rows, cols;
  float eps;
  bool add;
};

inline constexpr int kWarpRows = 4;  // at once, so that x is read from shared memory once for all

/// shared: padded(cols) + kWarps floats
template <class W>
__global__ void __launch_bounds__(kThreads, 2) linear_kernel(Linear a) {
  float* x = shared_floats();
  const int pitch = static_cast<int>(padded(a.cols)), lane = threadIdx.x % 32;
  load_vector(a.x, a.norm, a.eps, a.cols, x, x + pitch);
  __syncthreads();
  const int warps = gridDim.x * kWarps;
  for (int row = (blockIdx.x * kWarps + threadIdx.x / 32) * kWarpRows; row < a.rows;
       row += warps * kWarpRows) {
    const W* rows[kWarpRows];
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {  // rows past the end are the last one once more
      const int existing = row + r < a.rows ? row + r : a.rows - 1;
      rows[r] = static_cast<const W*>(a.w) + static_cast<std::int64_t>(existing) * pitch;
    }
    float sums[kWarpRows];
    dots(rows, x, pitch, sums);
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r)
      if (lane == r && TDA_WITHIN(row + r, a.rows)) {
        const float v = sums[r] + (a.bias ? a.bias[row + r] : 0);
        a.y[row + r] = a.add ? a.y[row + r] + v : v;
      }
  }
}

/// x[t] = embedding[tokens[t]]; a block per token. x: [T, cols]
template <class W>
__global__ void embed_kernel(const void* embedding, const int* tokens, int cols, float* x) {
  const std::int64_t t = blockIdx.x;
  const W* row = static_cast<const W*>(embedding) + tokens[t] * padded(cols);
  for (int i = threadIdx.x; i < cols; i += blockDim.x) x[t * cols + i] = value_of(row[i]);
}

// ---- several tokens -----------------------------------------------------------------------------

/// out[t] = rmsnorm(x[t]); a block per token. x, out: [T, n]; shared: padded(n) + kWarps floats
static __global__ void norm_kernel(const float* x, const float* weight, float eps, int n,
                                   float* out) {
  float* row = shared_floats();
  const std::int64_t t = blockIdx.x;
  load_vector(x + t * n, weight, eps, n, row, row + padded(n));
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) out[t * n + i] = row[i];
}

/// c[t, n] (+)= sum over k of a[t, k] w[n, k] (or w[k, n], neuron-major) + bias[n], in f32.
struct Gemm {
  const float* a;     // [tokens, depth]
  const void* w;      // [n, padded depth], neuron-major [depth, padded n]
  const float* bias;  // [n] or null
  float* c;           // [tokens, n]
  int tokens, n, depth;
  bool add;
};

inline constexpr int kTile = 64, kTileDepth = 16, kTilePitch = kTile + 1;

/// grid: (n / kTile, tokens / kTile), rounded up; shared: 2 kTileDepth kTilePitch floats
template <class W, bool NeuronMajor>
__global__ void __launch_bounds__(kThreads, 2) gemm_kernel(Gemm g) {
  float* a = shared_floats();              // [kTileDepth, kTilePitch]
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
      a[k * kTilePitch + t] = inside ? g.a[at] : 0;
    }
    for (int i = threadIdx.x; i < kTile * kTileDepth; i += kThreads) {
      const int k = NeuronMajor ? i / kTile : i % kTileDepth;
      const int n = NeuronMajor ? i % kTile : i / kTileDepth;
      const bool inside = TDA_WITHIN(first_n + n, g.n) && TDA_WITHIN(first + k, g.depth);
      const std::int64_t at =
          NeuronMajor ? (first + k) * pitch + first_n + n : (first_n + n) * pitch + first + k;
      b[k * kTilePitch + n] = inside ? value_of(static_cast<const W*>(g.w)[at]) : 0;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kTileDepth; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          sums[i][j] += a[k * kTilePitch + row + 16 * i] * b[k * kTilePitch + column + 16 * j];
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int t = first_t + row + 16 * i, n = first_n + column + 16 * j;
      if (!TDA_WITHIN(t, g.tokens) || !TDA_WITHIN(n, g.n)) continue;
      const float v = sums[i][j] + (g.bias ? g.bias[n] : 0);
      float& c = g.c[static_cast<std::int64_t>(t) * g.n + n];
      c = g.add ? c + v : v;
    }
}

}  // namespace tda::cuda
