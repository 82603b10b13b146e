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

inline constexpr int kAttendThreads = 256, kAttendWarps = kAttendThreads / 32;

/// A token's head of q, k or v, in that order, as the projection made it. -> [n]
__device__ inline float* head_of(const Attention& a, int t, int head) {
  return a.qkv + (static_cast<std::int64_t>(t) * (a.heads + 2 * a.kv_heads) + head) * a.n;
}

/// A warp's work: put(i, v) of every number of a head, normed if `norm`: [n] is there, and rotated.
/// v: [n]
template <class Put>
__device__ void rotate(const Attention& a, const float* v, const float* norm, int t, Put put) {
  const int lane = threadIdx.x % 32, half = a.n / 2;
  float scale = 1;
  if (norm) {
    float squares = 0;
    for (int i = lane; i < a.n; i += 32) squares += v[i] * v[i];
    scale = 1 / sqrtf(warp_sum(squares) / a.n + a.eps);
  }
  for (int i = lane; i < half; i += 32) {
    const float c = a.cos[t * half + i], s = a.sin[t * half + i];
    const float x = norm ? v[i] * scale * norm[i] : v[i];
    const float y = norm ? v[i + half] * scale * norm[i + half] : v[i + half];
    put(i, x * c - y * s);
    put(i + half, y * c + x * s);
  }
}

/// A warp's work: a token's key or value into the cache, zeros behind.
template <class C>
__device__ void append(const Attention& a, int t, int kv_head, bool is_value) {
  const int head = a.heads + kv_head + (is_value ? a.kv_heads : 0), lane = threadIdx.x % 32;
  const float* v = head_of(a, t, head);
  const int pitch = static_cast<int>(padded(a.n));
  C* row = static_cast<C*>(is_value ? a.values : a.keys) +
           (static_cast<std::int64_t>(kv_head) * a.capacity + *a.position + t) * pitch;
  if (is_value)
    for (int i = lane; i < pitch; i += 32) store(TDA_WITHIN(i, a.n) ? read(v + i) : 0, row + i);
  else
    rotate(a, v, a.k_norm, t, [&](int i, float k) { store(k, row + i); });
  for (int i = a.n + lane; !is_value && i < pitch; i += 32) store(0, row + i);
}

/// Before attention over several tokens: rotates queries in place, stores keys and values; a warp
/// per head. grid: ((heads + 2 kv_heads) / kAttendWarps rounded up, T)
template <class C>
__global__ void append_kernel(Attention a) {
  const int head = blockIdx.x * kAttendWarps + threadIdx.x / 32, t = blockIdx.y;
  if (head >= a.heads + 2 * a.kv_heads) return;
  if (head >= a.heads) {
    const int of_kv = head - a.heads;
    return append<C>(a, t, of_kv % a.kv_heads, of_kv >= a.kv_heads);
  }
  float* v = head_of(a, t, head);
  rotate(a, v, a.q_norm, t, [&](int i, float q) { v[i] = q; });
}

inline constexpr int kKeyLanes = 8;  // lanes that share a key
inline constexpr int kStreams = kAttendThreads / kKeyLanes;
inline constexpr int kAlone = 4 * kStreams;  // keys up to which a second block isn't worth its sum
inline constexpr int kMostSplits = 64;

/// Floats of shared memory, `heads` of a group at a time.
constexpr std::int64_t attend_shared(int heads, std::int64_t n) {
  return heads * (padded(n) + kAttendWarps * (2 + padded(n)) + kMostSplits) + 1;
}

/// A block takes a group of `Heads` query heads of one kv head and a split of the keys, of which
/// there are no more than is worth while: 32 streams of online softmax, whose sums are put together
/// in fixed order, by warp and block, then by the last block of the head group. Lanes hold `Chunks`
/// chunks of a key each. A single token's query, key and value come as the projection made them
/// (`Fresh`): the key is rotated and stored here.
/// grid: (kv_heads * groups, splits, T)
template <class C, int Heads, int Chunks, bool Fresh>
__global__ void __launch_bounds__(kAttendThreads, 1) attend_kernel(Attention a) {
  let_next_begin();
  const int n = a.n, pitch = static_cast<int>(padded(n)), part_size = 2 + pitch;
  float* q = shared_as<float>();     // [Heads, pitch]
  float* parts = q + Heads * pitch;  // [kAttendWarps, Heads, 2 + pitch]: maximum, sum, values
  float* factors = parts + kAttendWarps * Heads * part_size;  // [Heads, kMostSplits]
  unsigned* flag = reinterpret_cast<unsigned*>(factors + Heads * kMostSplits);
  const int per_kv = a.heads / a.kv_heads, groups = (per_kv + Heads - 1) / Heads;
  const int kv_head = blockIdx.x / groups, split = blockIdx.y, t = blockIdx.z;
  const int in_kv = blockIdx.x % groups * Heads;  // the first head, within its kv head
  const int heads = per_kv - in_kv < Heads ? per_kv - in_kv : Heads;
  const int head = kv_head * per_kv + in_kv;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % kKeyLanes;
  const int stream = threadIdx.x / kKeyLanes;

  const int end = *a.position + t + 1;
  const int begin = a.window > 0 && end > a.window ? end - a.window : 0;
  const int worth = end - begin <= kAlone ? 1 : (end - begin + kStreams - 1) / kStreams;
  const int splits = worth < static_cast<int>(gridDim.y) ? worth : gridDim.y;
  if (split >= splits) return;
  const Share share = share_of(end - begin, split, splits);
  const int from = begin + share.first, to = begin + share.end;
  const std::int64_t base = static_cast<std::int64_t>(kv_head) * a.capacity;
  const C *keys = static_cast<const C*>(a.keys), *values = static_cast<const C*>(a.values);
  struct Key {
    Chunk<C> k[Chunks], v[Chunks];
  } next;  // on its way from memory
  const auto ask = [&](int key) {
    const std::int64_t row = (base + key) * pitch;
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
      const int d = (c * kKeyLanes + lane) * kChunk, at = d < pitch ? d : 0;
      next.k[c] = Chunk<C>::cached(keys + row + at);
      next.v[c] = Chunk<C>::cached(values + row + at);
    }
  };
  const int fresh = Fresh ? end - 1 : -1;  // the key that no kernel before this one has stored
  const auto ask_early = [&](int key) {
    if (TDA_WITHIN(key, to) && key != fresh) ask(key);
  };
  if (Fresh) ask_early(from + stream);
  wait_for_previous();
  if (!Fresh) ask_early(from + stream);
  for (int h = warp; h < Heads; h += kAttendWarps) {
    const float* from_h = head_of(a, t, head + h);
    float* to_h = q + h * pitch;
    if (Fresh && h < heads)
      rotate(a, from_h, a.q_norm, t, [&](int i, float v) { to_h[i] = v * a.scale; });
    for (int i = threadIdx.x % 32; i < pitch; i += 32)
      if (!Fresh || h >= heads || i >= n) to_h[i] = h < heads && i < n ? from_h[i] * a.scale : 0;
  }
  if (Fresh && to == end && warp >= kAttendWarps - 2)
    append<C>(a, t, kv_head, warp == kAttendWarps - 1);
  __syncthreads();

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
    const bool valid = key < to;
    if (key == fresh) ask(key);
    const Key now = next;
    ask_early(key + kStreams);
    float scores[Heads] = {};
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
      const int d = (c * kKeyLanes + lane) * kChunk;
      if (d >= pitch || !valid) continue;
      float w[kChunk];
      now.k[c].unpack(w);
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
        now.v[c].unpack(w);
#pragma unroll
        for (int k = 0; k < kChunk; ++k) acc[h][c][k] = acc[h][c][k] * keep + weight * w[k];
      }
    }
  }

  const auto over_streams = [&](auto combine, float v) {  // of a warp
#pragma unroll
    for (int mask = kKeyLanes; mask < 32; mask *= 2) v = combine(v, __shfl_xor_sync(kAll, v, mask));
    return v;
  };
  const auto larger = [](float x, float y) { return fmaxf(x, y); };
  const auto plus = [](float x, float y) { return x + y; };
#pragma unroll
  for (int h = 0; h < Heads; ++h) {
    float* part = parts + (warp * Heads + h) * part_size;
    const float maximum = over_streams(larger, maxima[h]);
    const float keep = expf(maxima[h] - maximum);
    const float sum = over_streams(plus, sums[h] * keep);
    if (threadIdx.x % 32 == 0) part[0] = maximum, part[1] = sum;
#pragma unroll
    for (int c = 0; c < Chunks; ++c)
#pragma unroll
      for (int k = 0; k < kChunk; ++k) {
        const int d = (c * kKeyLanes + lane) * kChunk + k;
        const float v = over_streams(plus, acc[h][c][k] * keep);
        if (threadIdx.x % 32 < kKeyLanes && TDA_WITHIN(d, pitch)) part[2 + d] = v;
      }
  }
  __syncthreads();

  // The warps' parts of a head become one: its element i (0: maximum, 1: sum, then values).
  const auto combined = [&](int h, int i) {
    const float* first = parts + h * part_size;
    float largest = -FLT_MAX, total = 0;
#pragma unroll
    for (int w = 0; w < kAttendWarps; ++w) largest = fmaxf(largest, first[w * Heads * part_size]);
#pragma unroll
    for (int w = 0; w < kAttendWarps; ++w) {
      const float* part = first + w * Heads * part_size;
      total += expf(part[0] - largest) * part[i];
    }
    return i == 0 ? largest : total;
  };
  float* out = a.out + (static_cast<std::int64_t>(t) * a.heads + head) * n;
  if (splits == 1) {
    for (int i = threadIdx.x; i < heads * n; i += kAttendThreads)
      out[i] = combined(i / n, 2 + i % n) / combined(i / n, 1);
    return;
  }
  const std::int64_t of_head = static_cast<std::int64_t>(gridDim.y) * part_size;
  float* all = a.partials + (static_cast<std::int64_t>(t) * a.heads + head) * of_head;
  for (int i = threadIdx.x; i < heads * part_size; i += kAttendThreads) {
    const int h = i / part_size, e = i % part_size;
    all[h * of_head + static_cast<std::int64_t>(split) * part_size + e] = combined(h, e);
  }
  if (!last_to_arrive(a.counters + static_cast<std::int64_t>(t) * gridDim.x + blockIdx.x, splits,
                      flag))
    return;
  for (int h = warp; h < heads; h += kAttendWarps) {  // what each split's values count for
    const float* first = all + h * of_head;
    const auto at = [&](int p, int i) { return read(first + p * part_size + i); };
    float largest = -FLT_MAX, total = 0;
    for (int p = threadIdx.x % 32; p < splits; p += 32) largest = fmaxf(largest, at(p, 0));
    largest = warp_max(largest);
    for (int p = threadIdx.x % 32; p < splits; p += 32) {
      const float factor = expf(at(p, 0) - largest);
      factors[h * kMostSplits + p] = factor;
      total += factor * at(p, 1);
    }
    total = warp_sum(total);
    for (int p = threadIdx.x % 32; p < splits; p += 32) factors[h * kMostSplits + p] /= total;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < heads * n; i += kAttendThreads) {
    const float* values_of_head = all + i / n * of_head + 2 + i % n;
    float total = 0;
#pragma unroll 8
    for (int p = 0; p < splits; ++p)
      total += factors[i / n * kMostSplits + p] * read(values_of_head + p * part_size);
    out[i] = total;
  }
}

}  // namespace tda::cuda
