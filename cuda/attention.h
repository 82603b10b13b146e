// Kernels of attention: keys and values into the cache, and softmax over it.
#pragma once

#include <cfloat>

#include "device.h"

namespace tda::cuda {

struct Attention {
  float* qkv;              // [T, heads + 2 kv_heads, n]
  const float* q_norm;     // [n] or null
  const float* k_norm;     // [n] or null
  const float *cos, *sin;  // [T, n / 2]
  void *keys, *values;     // [kv_heads, capacity, padded(n)] of this layer
  const int* position;     // [1] of the first token
  float* partials;         // [T, heads, splits, 2 + padded(n)]
  unsigned* counters;      // [T, head groups] zeros
  float* out;              // [T, heads n]
  int heads, kv_heads, n, capacity, window;
  float eps, scale;
};

/// Norms and rotates a head of q or k in place, stores k and v; a block per head and token.
/// grid: (heads + 2 kv_heads, T); shared: kWarps floats
template <class C>
__global__ void append_kernel(Attention a) {
  const int head = blockIdx.x, t = blockIdx.y, n = a.n, half = n / 2;
  float* v = a.qkv + (static_cast<std::int64_t>(t) * gridDim.x + head) * n;
  const bool is_value = head >= a.heads + a.kv_heads;
  if (!is_value) {
    const float* norm = head < a.heads ? a.q_norm : a.k_norm;
    float scale = 1;
    if (norm) {
      float squares = 0;
      for (int i = threadIdx.x; i < n; i += blockDim.x) squares += v[i] * v[i];
      scale = 1 / sqrtf(block_sum(squares, shared_as<float>()) / n + a.eps);
    }
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
      const float c = a.cos[t * half + i], s = a.sin[t * half + i];
      const float x = norm ? v[i] * scale * norm[i] : v[i];
      const float y = norm ? v[i + half] * scale * norm[i + half] : v[i + half];
      v[i] = x * c - y * s;
      v[i + half] = y * c + x * s;
    }
    if (head < a.heads) return;
    __syncthreads();
  }
  const int kv_head = (head - a.heads) % a.kv_heads, pitch = static_cast<int>(padded(n));
  C* cache = static_cast<C*>(is_value ? a.values : a.keys) +
             (static_cast<std::int64_t>(kv_head) * a.capacity + *a.position + t) * pitch;
  for (int i = threadIdx.x; i < pitch; i += blockDim.x)
    store(TDA_WITHIN(i, n) ? read(v + i) : 0, cache + i);
}

inline constexpr int kAttendThreads = 128, kKeyLanes = 8;  // lanes that share a key
inline constexpr int kStreams = kAttendThreads / kKeyLanes;

/// Floats of shared memory, `heads` of a group at a time.
constexpr std::int64_t attend_shared(int heads, std::int64_t n) {
  return heads * padded(n) + kStreams * heads * (2 + padded(n)) + 1;
}

/// A block takes a group of `Heads` query heads of one kv head and a split of the keys: 16 streams
/// of online softmax, whose sums are put together in fixed order, first the block's, then by the
/// last block of the head group those of all splits. Lanes hold `Chunks` chunks of a key each.
/// grid: (kv_heads * groups, splits, T)
template <class C, int Heads, int Chunks>
__global__ void __launch_bounds__(kAttendThreads, 2) attend_kernel(Attention a) {
  const int n = a.n, pitch = static_cast<int>(padded(n)), part_size = 2 + pitch;
  float* q = shared_as<float>();     // [Heads, pitch]
  float* parts = q + Heads * pitch;  // [kStreams, Heads, 2 + pitch]: maximum, sum, values
  unsigned* flag = reinterpret_cast<unsigned*>(parts + kStreams * Heads * part_size);
  const int per_kv = a.heads / a.kv_heads, groups = (per_kv + Heads - 1) / Heads;
  const int kv_head = blockIdx.x / groups, split = blockIdx.y, splits = gridDim.y, t = blockIdx.z;
  const int in_kv = blockIdx.x % groups * Heads;  // the first head, within its kv head
  const int heads = per_kv - in_kv < Heads ? per_kv - in_kv : Heads;
  const int head = kv_head * per_kv + in_kv;
  for (int i = threadIdx.x; i < Heads * pitch; i += kAttendThreads) {
    const int h = i / pitch, d = i % pitch;
    const std::int64_t row = static_cast<std::int64_t>(t) * (a.heads + 2 * a.kv_heads) + head + h;
    q[i] = h < heads && d < n ? a.qkv[row * n + d] * a.scale : 0;
  }
  __syncthreads();

  const int end = *a.position + t + 1;
  const int begin = a.window > 0 && end > a.window ? end - a.window : 0;
  const int from =
      begin + static_cast<int>(static_cast<std::int64_t>(end - begin) * split / splits);
  const int to =
      begin + static_cast<int>(static_cast<std::int64_t>(end - begin) * (split + 1) / splits);
  const int lane = threadIdx.x % kKeyLanes, stream = threadIdx.x / kKeyLanes;
  const std::int64_t base = static_cast<std::int64_t>(kv_head) * a.capacity;
  const C *keys = static_cast<const C*>(a.keys), *values = static_cast<const C*>(a.values);
  float maxima[Heads], sums[Heads], acc[Heads][Chunks][kChunk];
#pragma unroll
  for (int h = 0; h < Heads; ++h) {
    maxima[h] = -FLT_MAX;
    sums[h] = 0;
#pragma unroll
    for (int c = 0; c < Chunks; ++c)
#pragma unroll
      for (int k = 0; k < kChunk; ++k) acc[h][c][k] = 0;
  }
  // All streams make the same number of rounds: lanes of a warp meet in shuffles.
  for (int round = from; round < to; round += kStreams) {
    const int key = round + stream;
    const bool valid = TDA_WITHIN(key, to);
    const std::int64_t row = (base + (valid ? key : from)) * pitch;
    Chunk<C> k_chunks[Chunks], v_chunks[Chunks];
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
      const int d = (c * kKeyLanes + lane) * kChunk, at = d < pitch ? d : 0;
      k_chunks[c] = Chunk<C>::cached(keys + row + at);
      v_chunks[c] = Chunk<C>::cached(values + row + at);
    }
    float scores[Heads] = {};
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
      const int d = (c * kKeyLanes + lane) * kChunk;
      if (d >= pitch) continue;
      float w[kChunk];
      k_chunks[c].unpack(w);
#pragma unroll
      for (int h = 0; h < Heads; ++h)
#pragma unroll
        for (int k = 0; k < kChunk; ++k) scores[h] += w[k] * q[h * pitch + d + k];
    }
#pragma unroll
    for (int h = 0; h < Heads; ++h) {
#pragma unroll
      for (int mask = kKeyLanes / 2; mask > 0; mask /= 2)
        scores[h] += __shfl_xor_sync(kAll, scores[h], mask);
      if (!valid) continue;
      const float larger = fmaxf(maxima[h], scores[h]);
      const float keep = expf(maxima[h] - larger), weight = expf(scores[h] - larger);
      maxima[h] = larger;
      sums[h] = sums[h] * keep + weight;
#pragma unroll
      for (int c = 0; c < Chunks; ++c) {
        float w[kChunk];
        v_chunks[c].unpack(w);
#pragma unroll
        for (int k = 0; k < kChunk; ++k) acc[h][c][k] = acc[h][c][k] * keep + weight * w[k];
      }
    }
  }
#pragma unroll
  for (int h = 0; h < Heads; ++h) {
    float* part = parts + (stream * Heads + h) * part_size;
    if (lane == 0) part[0] = maxima[h], part[1] = sums[h];
#pragma unroll
    for (int c = 0; c < Chunks; ++c)
#pragma unroll
      for (int k = 0; k < kChunk; ++k) {
        const int d = (c * kKeyLanes + lane) * kChunk + k;
        if (TDA_WITHIN(d, pitch)) part[2 + d] = acc[h][c][k];
      }
  }
  __syncthreads();

  // `count` parts, `stride` apart, become one: element i of it (0: maximum, 1: sum, then values).
  const auto combined = [&](const float* first, int count, std::int64_t stride, int i) {
    float largest = -FLT_MAX, total = 0;
    for (int p = 0; p < count; ++p) largest = fmaxf(largest, first[p * stride]);
    for (int p = 0; p < count; ++p)
      total += expf(first[p * stride] - largest) * first[p * stride + i];
    return i == 0 ? largest : total;
  };
  const std::int64_t of_head = static_cast<std::int64_t>(splits) * part_size;
  float* all = a.partials + (static_cast<std::int64_t>(t) * a.heads + head) * of_head;
  for (int i = threadIdx.x; i < heads * part_size; i += kAttendThreads) {
    const int h = i / part_size, e = i % part_size;
    all[h * of_head + static_cast<std::int64_t>(split) * part_size + e] =
        combined(parts + h * part_size, kStreams, Heads * part_size, e);
  }
  if (!last_to_arrive(a.counters + static_cast<std::int64_t>(t) * gridDim.x + blockIdx.x, splits,
                      flag))
    return;
  for (int i = threadIdx.x; i < heads * n; i += kAttendThreads) {
    const float* parts_of_head = all + i / n * of_head;
    a.out[(static_cast<std::int64_t>(t) * a.heads + head) * n + i] =
        combined(parts_of_head, splits, part_size, 2 + i % n) /
        combined(parts_of_head, splits, part_size, 1);
  }
}

}  // namespace tda::cuda
