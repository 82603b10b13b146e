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
  float* x = shared_as<float>();
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

inline constexpr int kHeadBlock = 4 * kThreads;  // logits that are worth a block

/// The best of some logits.
struct Best {
  float value;
  int id;
};
static_assert(sizeof(Best) == sizeof(std::uint64_t));

/// Equal ones: the lower id. A NaN is never better.
__device__ inline Best better(Best a, Best b) {
  return b.value > a.value || (b.value == a.value && b.id < a.id) ? b : a;
}

/// best[gridDim.x] = the best logit of all, as argmax() on the host finds it. logits: [n], at least
/// one per block; best: [gridDim.x + 1], the blocks' own before it; counter: [1] zero;
/// shared: kWarps Best and a flag
static __global__ void argmax_kernel(const float* logits, int n, Best* best, unsigned* counter) {
  Best* parts = shared_as<Best>();  // [kWarps]
  unsigned* flag = reinterpret_cast<unsigned*>(parts + kWarps);
  Best mine = {load(logits), 0};
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; TDA_WITHIN(i, n); i += gridDim.x * blockDim.x)
    mine = better(mine, {load(logits + i), i});
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2)
    mine = better(mine,
                  {__shfl_xor_sync(kAll, mine.value, mask), __shfl_xor_sync(kAll, mine.id, mask)});
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; ++w) mine = better(mine, parts[w]);
    best[blockIdx.x] = mine;
  }
  if (!last_to_arrive(counter, gridDim.x, flag) || threadIdx.x > 0) return;
  for (unsigned b = 0; b < gridDim.x; ++b) mine = better(mine, best[b]);
  best[gridDim.x] = mine;
}

/// Sampling: stretches of weights side by side, and a point on them.
struct Draw {
  const float* logits;  // [n]
  int n, run;           // tokens; how many neighbours a thread looks at
  Best* best;           // [1] the largest logit; its id becomes the drawn one
  double* sums;         // [gridDim.x] of the blocks
  unsigned* counter;    // [1] zero
  double temperature, u;
};

/// A token's softmax weight, not normalised; 0 behind the last.
__device__ inline double weight(const Draw& d, int id) {
  return TDA_WITHIN(id, d.n) ? exp((load(d.logits + id) - d.best->value) / d.temperature) : 0;
}

/// Of `count` lengths side by side the one that holds the point at `left`, which becomes its
/// distance from that one's beginning. As pick() on the host.
template <class Length>
__device__ int locate(int count, double& left, Length length) {
  int found = 0;
  double rest = left;
  for (int i = 0; i < count; ++i) {
    const double l = length(i);
    if (!(l > 0)) continue;
    found = i;
    left = rest;
    if (rest < l) break;
    rest -= l;
  }
  return found;
}

/// The token that draw() on the host finds, up to the rounding of sums, which are in f64 and in a
/// fixed order: of neighbours by a thread, then of threads, of warps, of blocks. The last block to
/// arrive goes the way back. shared: kThreads + kWarps doubles and a flag
static __global__ void draw_kernel(Draw d) {
  double* lanes = shared_as<double>();  // [kThreads]
  double* warps = lanes + kThreads;     // [kWarps]
  unsigned* flag = reinterpret_cast<unsigned*>(warps + kWarps);
  const auto first = [&](int block, int thread) { return (block * kThreads + thread) * d.run; };
  const auto sum_block = [&](int block) {
    double sum = 0;
    for (int i = 0; i < d.run; ++i) sum += weight(d, first(block, threadIdx.x) + i);
    lanes[threadIdx.x] = sum;
    return block_sum(sum, warps);
  };
  const double sum = sum_block(blockIdx.x);
  if (threadIdx.x == 0) d.sums[blockIdx.x] = sum;
  if (!last_to_arrive(d.counter, gridDim.x, flag)) return;
  double left = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) left += d.sums[b];
  left *= d.u;
  const int block = locate(gridDim.x, left, [&](int b) { return d.sums[b]; });
  sum_block(block);  // and its barrier
  if (threadIdx.x > 0) return;
  const int warp = locate(kWarps, left, [&](int w) { return warps[w]; });
  const int lane = locate(32, left, [&](int l) { return lanes[warp * 32 + l]; });
  const int from = first(block, warp * 32 + lane);
  d.best->id = from + locate(d.run, left, [&](int i) { return weight(d, from + i); });
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
  float* row = shared_as<float>();
  const std::int64_t t = blockIdx.x;
  load_vector(x + t * n, weight, eps, n, row, row + padded(n));  // and each thread reads its own
  for (int i = threadIdx.x; i < n; i += blockDim.x) out[t * n + i] = row[i];
}

}  // namespace tda::cuda
