// Kernels for norms, projections, the output head and sampling.
#pragma once

#include "device.h"

namespace tda::cuda {

/// Index of element i of a vector in shared memory: the first halves of all chunks, then the second
/// halves. Lanes that read one chunk each then hit distinct banks.
__device__ inline int place(int i, int pitch) {
  return i / 4 % 2 * (pitch / 2) + i / kChunk * 4 + i % 4;
}

/// Calls store(place(i), from[i]) for i < padded(n), with 0 from n on. A thread gets the same i in
/// every call. Keeps kAtOnce loads in flight.
template <class Store>
__device__ void for_each_element(const float* from, int n, Store store) {
  constexpr int kAtOnce = 16;
  const int pitch = static_cast<int>(padded(n));
  for (int first = threadIdx.x; first < pitch; first += kAtOnce * kThreads) {
    float v[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int i = first + k * kThreads;
      v[k] = TDA_WITHIN(i, n) ? read(from + i) : 0;
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
      if (first + k * kThreads < pitch) store(place(first + k * kThreads, pitch), v[k]);
  }
}

/// Stores a norm's weight where load_vector() expects it. Separate because it needs no
/// wait_for_previous(). weight: [n] or null; out: [padded(n)] shared
__device__ inline void load_weight(const float* weight, int n, float* out) {
  if (weight) for_each_element(weight, n, [&](int at, float w) { out[at] = w; });
}

/// Stores x in shared memory, in place() order and zero-padded. If `weighted`, multiplies it by the
/// weight that load_weight() put there and leaves each warp's sum of squares in `parts` for
/// rms_scale(). The caller needs a barrier before use. x: [n]; out: [padded(n)] shared; parts:
/// [kWarps] shared
__device__ inline void load_vector(const float* x, bool weighted, int n, float* out, float* parts) {
  float squares = 0;
  for_each_element(x, n, [&](int at, float v) {
    squares += v * v;
    out[at] = weighted ? v * out[at] : v;
  });
  if (!weighted) return;
  squares = warp_sum(squares);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = squares;
}

/// RMSNorm's factor, to multiply dot products with load_vector()'s result by. After the barrier.
__device__ inline float rms_scale(bool weighted, float eps, int n, const float* parts) {
  if (!weighted) return 1;
  float squares = 0;
  for (int w = 0; w < kWarps; ++w) squares += parts[w];
  const float mean = squares / n;
  return 1 / sqrtf(mean + eps) + 0 * mean;  // a mean that overflows would turn numbers into zeros
}

/// A warp's dot products of R rows with x. Prefetches into registers: begin() issues the loads of
/// the rows' first chunks, and kAhead chunks of each row are in flight at any time.
template <int R, class W>
class Dots {
 public:
  /// rows[r]: [pitch]
  __device__ void begin(const W* const (&rows)[R], int pitch) {
    pitch_ = pitch;
#pragma unroll
    for (int r = 0; r < R; ++r) rows_[r] = rows[r];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) prefetch(a, at(a));
  }

  /// sums[r] = rows[r] . x, in every lane. x: [pitch] shared, by place()
  __device__ void finish(const float* x, float (&sums)[R]) {
#pragma unroll
    for (int r = 0; r < R; ++r) sums[r] = 0;
    for (int first = 0; first < pitch_; first += kAhead * kStride) {
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int i = first + at(a);
        if (i >= pitch_) break;
        const float4* halves = reinterpret_cast<const float4*>(x) + i / kChunk;
        const float4 low = halves[0], high = halves[pitch_ / kChunk];
        const float v[kChunk] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int r = 0; r < R; ++r) {
          float w[kChunk];
          ahead_[a][r].unpack(w);
#pragma unroll
          for (int k = 0; k < kChunk; ++k) sums[r] += w[k] * v[k];
        }
        prefetch(a, i + kAhead * kStride);
      }
    }
#pragma unroll
    for (int r = 0; r < R; ++r) sums[r] = warp_sum(sums[r]);
  }

 private:
  static constexpr int kStride = 32 * kChunk;
  static constexpr int kAhead = 32 / sizeof(W) / R;

  __device__ static int at(int a) { return a * kStride + threadIdx.x % 32 * kChunk; }
  __device__ void prefetch(int a, int i) {
    if (i >= pitch_) return;
#pragma unroll
    for (int r = 0; r < R; ++r) ahead_[a][r] = Chunk<W>::once(rows_[r] + i);
  }

  const W* rows_[R];
  Chunk<W> ahead_[kAhead][R];
  int pitch_;
};

/// y (+)= W norm(x) + bias. Reads every weight once.
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

/// A warp takes R rows at a time. shared: padded(cols) + kWarps floats
template <int R, class W>
__global__ void __launch_bounds__(kThreads, kBlocksEach) linear_kernel(Linear a) {
  let_next_begin();
  float* x = shared_as<float>();
  const int pitch = static_cast<int>(padded(a.cols)), lane = threadIdx.x % 32;
  float* parts = x + pitch;
  Dots<R, W> dots;
  const auto begin = [&](int first) {
    const W* rows[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {  // past the end, load the last row again
      const int existing = first + r < a.rows ? first + r : a.rows - 1;
      rows[r] = static_cast<const W*>(a.w) + static_cast<std::int64_t>(existing) * pitch;
    }
    dots.begin(rows, pitch);
  };
  int row = (blockIdx.x * kWarps + threadIdx.x / 32) * R;
  begin(row);
  load_weight(a.norm, a.cols, x);
  wait_for_previous();
  load_vector(a.x, a.norm != nullptr, a.cols, x, parts);
  __syncthreads();
  const float scale = rms_scale(a.norm != nullptr, a.eps, a.cols, parts);
  while (row < a.rows) {
    float sums[R];
    dots.finish(x, sums);
#pragma unroll
    for (int r = 0; r < R; ++r)
      if (lane == r && TDA_WITHIN(row + r, a.rows)) {
        const float v = sums[r] * scale + (a.bias ? a.bias[row + r] : 0);
        a.y[row + r] = a.add ? a.y[row + r] + v : v;
      }
    row += gridDim.x * kWarps * R;
    if (row < a.rows) begin(row);
  }
}

/// Soft-capping; a thread per logit. logits: [n]
static __global__ void cap_kernel(float* logits, std::int64_t n, float cap) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) logits[i] = soft_cap(logits[i], cap);
}

inline constexpr int kHeadBlock = 4 * kThreads;  // logits per block of argmax_kernel

/// The largest of some logits.
struct Best {
  float value;
  int id;
};
static_assert(sizeof(Best) == sizeof(std::uint64_t));

/// Equal ones: the lower id. What is not finite is better than any number, so that it shows.
__device__ inline Best better(Best a, Best b) {
  if (!(a.value - a.value == 0)) return a;
  const bool wins = b.value > a.value || (b.value == a.value && b.id < a.id);
  return wins || !(b.value - b.value == 0) ? b : a;
}

/// best[gridDim.x] = the best logit of all, as argmax() on the host finds it. logits: [n], at least
/// one per block; best: [gridDim.x + 1]; counter: [1] zero; shared: kWarps Best and a flag
static __global__ void argmax_kernel(const float* logits, int n, Best* best, unsigned* counter) {
  wait_for_previous();
  Best* parts = shared_as<Best>();  // [kWarps]
  unsigned* flag = reinterpret_cast<unsigned*>(parts + kWarps);
  const auto best_of_block = [&](Best mine) {  // in the first thread
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2)
      mine = better(
          mine, {__shfl_xor_sync(kAll, mine.value, mask), __shfl_xor_sync(kAll, mine.id, mask)});
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = mine;
    __syncthreads();
    for (int w = 1; threadIdx.x == 0 && w < kWarps; ++w) mine = better(mine, parts[w]);
    return mine;
  };
  Best mine = {read(logits), 0};
#pragma unroll 4
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; TDA_WITHIN(i, n); i += gridDim.x * blockDim.x)
    mine = better(mine, {read(logits + i), i});
  mine = best_of_block(mine);
  if (threadIdx.x == 0) best[blockIdx.x] = mine;
  if (!last_to_arrive(counter, gridDim.x, flag)) return;
  mine = best[0];
  for (unsigned b = threadIdx.x; b < gridDim.x; b += blockDim.x) mine = better(mine, best[b]);
  mine = best_of_block(mine);
  if (threadIdx.x == 0) best[gridDim.x] = mine;
}

/// Sampling by inverse CDF: softmax weights as consecutive lengths on a line, and a point on it.
struct Draw {
  const float* logits;  // [n]
  int n, run;           // tokens; consecutive tokens per thread
  Best* best;           // [1] the largest logit; its id becomes the drawn one
  double* sums;         // [gridDim.x] one per block
  unsigned* counter;    // [1] zero
  double temperature, u;
};

/// A token's unnormalised softmax weight; 0 past the last token.
__device__ inline double weight(const Draw& d, int id) {
  return TDA_WITHIN(id, d.n) ? exp((load(d.logits + id) - d.best->value) / d.temperature) : 0;
}

/// The index of the interval, of `count` consecutive ones, that contains the point at `left`.
/// Changes `left` to the distance from that interval's start. The same as pick() on the host.
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

/// Draws the token that draw() on the host would, up to the rounding of sums. Sums are f64 and in a
/// fixed order: per thread, warp, block, then over blocks. The last block to arrive descends the
/// same levels to the token. shared: kThreads + kWarps doubles and a flag
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
  sum_block(block);  // includes the barrier needed here
  if (threadIdx.x > 0) return;
  const int warp = locate(kWarps, left, [&](int w) { return warps[w]; });
  const int lane = locate(32, left, [&](int l) { return lanes[warp * 32 + l]; });
  const int from = first(block, warp * 32 + lane);
  d.best->id = from + locate(d.run, left, [&](int i) { return weight(d, from + i); });
}

/// x[t] = scale * embedding[tokens[t]]; a block per token. x: [T, cols]
template <class W>
__global__ void embed_kernel(const void* embedding, const int* tokens, int cols, float scale,
                             float* x) {
  const std::int64_t t = blockIdx.x;
  const W* row = static_cast<const W*>(embedding) + tokens[t] * padded(cols);
  for (int i = threadIdx.x; i < cols; i += blockDim.x) x[t * cols + i] = value_of(row[i]) * scale;
}

// ---- several tokens -----------------------------------------------------------------------------

/// out[t] = rmsnorm(x[t]), may be in place; a block per token. x, out: n values each `stride`;
/// shared: padded(n) + kWarps floats
static __global__ void norm_kernel(const float* x, const float* weight, float eps, int n,
                                   std::int64_t stride, float* out) {
  float* row = shared_as<float>();
  const std::int64_t t = blockIdx.x;
  const int pitch = static_cast<int>(padded(n));
  load_weight(weight, n, row);
  load_vector(x + t * stride, true, n, row, row + pitch);
  __syncthreads();
  const float scale = rms_scale(true, eps, n, row + pitch);
  for (int i = threadIdx.x; i < n; i += blockDim.x)
    out[t * stride + i] = row[place(i, pitch)] * scale;
}

/// x[t] += scale * rmsnorm(branch[t]), without the norm if `weight` is null; a block per token.
/// branch, x: [T, n]; shared: padded(n) + kWarps floats
static __global__ void join_kernel(const float* branch, const float* weight, float eps, float scale,
                                   int n, float* x) {
  float* row = shared_as<float>();
  const std::int64_t t = blockIdx.x;
  const int pitch = static_cast<int>(padded(n));
  load_weight(weight, n, row);
  load_vector(branch + t * n, weight != nullptr, n, row, row + pitch);
  __syncthreads();
  scale *= rms_scale(weight != nullptr, eps, n, row + pitch);
  for (int i = threadIdx.x; i < n; i += blockDim.x) x[t * n + i] += row[place(i, pitch)] * scale;
}

}  // namespace tda::cuda
