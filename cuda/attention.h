// Attention kernels: append to the KV cache, and online softmax over it.
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
  const int* position;     // [1] position of the first token
  float* partials;         // [T, heads, splits, 2 + padded(n)]
  unsigned* counters;      // [T, head groups] zeros
  float* out;              // [T, heads n]
  int heads, kv_heads, n, capacity, window;
  float eps, scale, cap;  // cap: of scores, 0: none
};

inline constexpr int kAttendThreads = 256, kAttendWarps = kAttendThreads / 32;

/// Head `head` of token t's projection, counted over q, k and v in that order. -> [n]
__device__ inline float* head_of(const Attention& a, int t, int head) {
  return a.qkv + (static_cast<std::int64_t>(t) * (a.heads + 2 * a.kv_heads) + head) * a.n;
}

/// Calls put(i, value) for each element of a head after qk-norm (if `norm` is not null) and RoPE.
/// By one warp. v, norm: [n]
template <class Put>
__device__ void rotate(const Attention& a, const float* v, const float* norm, int t, Put put) {
  const int lane = threadIdx.x % 32, half = a.n / 2;
  float scale = 1;
  if (norm) {
    float squares = 0;
    for (int i = lane; i < a.n; i += 32) squares += v[i] * v[i];
    const float mean = warp_sum(squares) / a.n;
    scale = 1 / sqrtf(mean + a.eps) + 0 * mean;  // see rms_scale()
  }
  for (int i = lane; i < half; i += 32) {
    const float c = a.cos[t * half + i], s = a.sin[t * half + i];
    const float x = norm ? v[i] * scale * norm[i] : v[i];
    const float y = norm ? v[i + half] * scale * norm[i + half] : v[i + half];
    put(i, x * c - y * s);
    put(i + half, y * c + x * s);
  }
}

/// Stores a token's key or value in the cache, zeros in the padding. By one warp.
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
    rotate(a, v, a.k_norm, t, [&](int i, float k) {
      store(k, row + i);
      // A score of -infinity would only hide the key.
      if (!(value_of(row[i]) - value_of(row[i]) == 0)) store(NAN, row + i);
    });
  for (int i = a.n + lane; !is_value && i < pitch; i += 32) store(0, row + i);
}

/// Before attention over several tokens: applies qk-norm and RoPE to queries in place, stores keys
/// and values in the cache. A warp per head. grid: ((heads + 2 kv_heads) / kAttendWarps rounded up,
/// T)
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

inline constexpr int kKeyLanes = 8;                          // lanes that share a key
inline constexpr int kStreams = kAttendThreads / kKeyLanes;  // keys a block handles at a time
inline constexpr int kOneSplitKeys =
    4 * kStreams;  // up to here a second split costs more than it saves
inline constexpr int kMostSplits = 64;

/// Floats of shared memory for a block of `heads` query heads.
constexpr std::int64_t attend_shared(int heads, std::int64_t n) {
  return heads * (padded(n) + kAttendWarps * (2 + padded(n)) + kMostSplits) + 1;
}

/// A block's shared memory. A "part" is a partial result of online softmax for one head: maximum,
/// sum of weights, weighted sum of values.
template <int Heads>
struct AttendShared {
  int pitch, part_size;
  float* q;        // [Heads, pitch] scaled queries
  float* parts;    // [kAttendWarps, Heads, part_size] one per warp
  float* factors;  // [Heads, kMostSplits] weight of each split in the final sum
  unsigned* flag;  // [1] for last_to_arrive()

  __device__ __forceinline__ explicit AttendShared(int n)
      : pitch(static_cast<int>(padded(n))),
        part_size(2 + pitch),
        q(shared_as<float>()),
        parts(q + Heads * pitch),
        factors(parts + kAttendWarps * Heads * part_size),
        flag(reinterpret_cast<unsigned*>(factors + Heads * kMostSplits)) {}
};

/// What a block of attend_kernel computes: some query heads of one KV head over a range of keys.
struct AttendWork {
  int t, kv_head;
  int head, heads;    // first query head, and how many follow
  int split, splits;  // which range of the keys this is, of how many
  int from, to;       // keys [from, to)
  int end;            // one past the last key that token t sees
  std::int64_t base;  // the KV head's first row in the cache
};

template <int Heads>
__device__ __forceinline__ AttendWork attend_work(const Attention& a) {
  AttendWork work;
  const int per_kv = a.heads / a.kv_heads, groups = (per_kv + Heads - 1) / Heads;
  const int first = blockIdx.x % groups * Heads;  // within the KV head
  work.t = blockIdx.z;
  work.kv_head = blockIdx.x / groups;
  work.head = work.kv_head * per_kv + first;
  work.heads = per_kv - first < Heads ? per_kv - first : Heads;
  work.end = *a.position + work.t + 1;
  const int begin = a.window > 0 && work.end > a.window ? work.end - a.window : 0;
  const int keys = work.end - begin;
  const int useful = keys <= kOneSplitKeys ? 1 : (keys + kStreams - 1) / kStreams;
  work.split = blockIdx.y;
  work.splits = useful < static_cast<int>(gridDim.y) ? useful : gridDim.y;
  const Share share = share_of(keys, work.split, work.splits);
  work.from = begin + share.first;
  work.to = begin + share.end;
  work.base = static_cast<std::int64_t>(work.kv_head) * a.capacity;
  return work;
}

/// q = queries times the softmax scale, zeros in the padding and in heads that do not exist. A warp
/// per head; with `Fresh` it also applies qk-norm and RoPE. q: [Heads, pitch] shared
template <int Heads, bool Fresh>
__device__ __forceinline__ void load_queries(const Attention& a, const AttendWork& work, float* q,
                                             int pitch) {
  for (int h = threadIdx.x / 32; h < Heads; h += kAttendWarps) {
    const float* from = head_of(a, work.t, work.head + h);
    float* to = q + h * pitch;
    if (Fresh && h < work.heads)
      rotate(a, from, a.q_norm, work.t, [&](int i, float v) { to[i] = v * a.scale; });
    for (int i = threadIdx.x % 32; i < pitch; i += 32)
      if (!Fresh || h >= work.heads || i >= a.n)
        to[i] = h < work.heads && i < a.n ? from[i] * a.scale : 0;
  }
}

/// A lane's chunks of a key and of its value: every kKeyLanes-th.
template <class C, int Chunks>
struct KeyValue {
  Chunk<C> k[Chunks], v[Chunks];

  __device__ static int column(int c) { return (c * kKeyLanes + threadIdx.x % kKeyLanes) * kChunk; }
  __device__ __forceinline__ void load(const Attention& a, std::int64_t key, int pitch) {
    const C *keys = static_cast<const C*>(a.keys), *values = static_cast<const C*>(a.values);
    const std::int64_t row = key * pitch;
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
      const int d = column(c), at = d < pitch ? d : 0;
      k[c] = Chunk<C>::cached(keys + row + at);
      v[c] = Chunk<C>::cached(values + row + at);
    }
  }
};

/// Online softmax over one stream of keys, for several query heads: the running maximum, the sum of
/// weights relative to it and the weighted sum of values, of which a lane holds its chunks.
template <class C, int Heads, int Chunks>
struct OnlineSoftmax {
  float maxima[Heads], sums[Heads], acc[Heads][Chunks][kChunk];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int h = 0; h < Heads; ++h) {
      maxima[h] = -FLT_MAX;
      sums[h] = 0;
#pragma unroll
      for (int c = 0; c < Chunks; ++c)
#pragma unroll
        for (int k = 0; k < kChunk; ++k) acc[h][c][k] = 0;
    }
  }

  /// Adds a key unless it is not `valid`; all lanes of a warp must call this together, because they
  /// meet in shuffles. q: [Heads, pitch] shared; cap: of scores, 0: none
  __device__ __forceinline__ void add(const KeyValue<C, Chunks>& key, bool valid, const float* q,
                                      int pitch, float cap) {
    float scores[Heads] = {};
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
      const int d = KeyValue<C, Chunks>::column(c);
      if (d >= pitch || !valid) continue;
      float w[kChunk];
      key.k[c].unpack(w);
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
      if (cap > 0) scores[h] = soft_cap(scores[h], cap);
      const float larger = fmaxf(maxima[h], scores[h]);
      const float keep = expf(maxima[h] - larger), weight = expf(scores[h] - larger);
      maxima[h] = larger;
      sums[h] = sums[h] * keep + weight;
#pragma unroll
      for (int c = 0; c < Chunks; ++c) {
        float w[kChunk];
        key.v[c].unpack(w);
#pragma unroll
        for (int k = 0; k < kChunk; ++k) acc[h][c][k] = acc[h][c][k] * keep + weight * w[k];
      }
    }
  }

  /// Merges a warp's streams into one part per head. parts: [Heads, 2 + pitch] of this warp, shared
  __device__ __forceinline__ void store_merged(float* parts, int pitch) const {
    const auto over_streams = [](auto combine, float v) {
#pragma unroll
      for (int mask = kKeyLanes; mask < 32; mask *= 2)
        v = combine(v, __shfl_xor_sync(kAll, v, mask));
      return v;
    };
    const auto larger = [](float x, float y) { return fmaxf(x, y); };
    const auto plus = [](float x, float y) { return x + y; };
#pragma unroll
    for (int h = 0; h < Heads; ++h) {
      float* part = parts + h * (2 + pitch);
      const float maximum = over_streams(larger, maxima[h]);
      const float keep = expf(maxima[h] - maximum);
      const float sum = over_streams(plus, sums[h] * keep);
      if (threadIdx.x % 32 == 0) part[0] = maximum, part[1] = sum;
#pragma unroll
      for (int c = 0; c < Chunks; ++c)
#pragma unroll
        for (int k = 0; k < kChunk; ++k) {
          const int d = KeyValue<C, Chunks>::column(c) + k;
          const float v = over_streams(plus, acc[h][c][k] * keep);
          if (threadIdx.x % 32 < kKeyLanes && TDA_WITHIN(d, pitch)) part[2 + d] = v;
        }
    }
  }
};

/// Element i of head h's part after merging the warps' parts.
template <int Heads>
__device__ __forceinline__ float merge_warps(const AttendShared<Heads>& shared, int h, int i) {
  const float* first = shared.parts + h * shared.part_size;
  const int stride = Heads * shared.part_size;
  float largest = -FLT_MAX, total = 0;
#pragma unroll
  for (int w = 0; w < kAttendWarps; ++w) largest = fmaxf(largest, first[w * stride]);
#pragma unroll
  for (int w = 0; w < kAttendWarps; ++w) {
    const float* part = first + w * stride;
    total += expf(part[0] - largest) * part[i];
  }
  return i == 0 ? largest : total;
}

/// out = the sum of all splits' parts, divided by the sum of weights; by the last block to arrive.
/// parts: [heads, gridDim.y, part_size] in global memory; out: [heads, n]
template <int Heads>
__device__ __forceinline__ void merge_splits(const AttendShared<Heads>& shared,
                                             const AttendWork& work, const float* parts, int n,
                                             float* out) {
  const std::int64_t of_head = static_cast<std::int64_t>(gridDim.y) * shared.part_size;
  const int splits = work.splits, lane = threadIdx.x % 32;
  for (int h = threadIdx.x / 32; h < work.heads; h += kAttendWarps) {
    const float* first = parts + h * of_head;
    const auto at = [&](int p, int i) { return read(first + p * shared.part_size + i); };
    float* factors = shared.factors + h * kMostSplits;
    float largest = -FLT_MAX, total = 0;
    for (int p = lane; p < splits; p += 32) largest = fmaxf(largest, at(p, 0));
    largest = warp_max(largest);
    for (int p = lane; p < splits; p += 32) {
      const float factor = expf(at(p, 0) - largest);
      factors[p] = factor;
      total += factor * at(p, 1);
    }
    total = warp_sum(total);
    for (int p = lane; p < splits; p += 32) factors[p] /= total;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < work.heads * n; i += kAttendThreads) {
    const float* values = parts + i / n * of_head + 2 + i % n;
    float total = 0;
#pragma unroll 8
    for (int p = 0; p < splits; ++p)
      total += shared.factors[i / n * kMostSplits + p] * read(values + p * shared.part_size);
    out[i] = total;
  }
}

/// Attention of one token: softmax(q k) v over the cache. A block takes up to `Heads` query heads
/// that share a KV head, and a split of the keys; it runs kStreams online softmaxes side by side
/// and merges them by warp, then by block, and the last block of the heads merges the splits, all
/// in a fixed order. A lane holds `Chunks` chunks of a key. With `Fresh` (one token) q, k and v
/// come straight from the projection: qk-norm, RoPE and the write to the cache happen here.
/// grid: (kv_heads * groups of heads, splits, T)
template <class C, int Heads, int Chunks, bool Fresh>
__global__ void __launch_bounds__(kAttendThreads, 1) attend_kernel(Attention a) {
  let_next_begin();
  const AttendShared<Heads> shared(a.n);
  const AttendWork work = attend_work<Heads>(a);
  if (work.split >= work.splits) return;
  const int n = a.n, pitch = shared.pitch, warp = threadIdx.x / 32;
  const int stream = threadIdx.x / kKeyLanes;

  KeyValue<C, Chunks> next;                     // in flight from memory
  const int fresh = Fresh ? work.end - 1 : -1;  // the key that no earlier kernel has stored
  const auto prefetch = [&](int key) {
    if (TDA_WITHIN(key, work.to) && key != fresh) next.load(a, work.base + key, pitch);
  };
  if (Fresh) prefetch(work.from + stream);
  wait_for_previous();
  if (!Fresh) prefetch(work.from + stream);
  load_queries<Heads, Fresh>(a, work, shared.q, pitch);
  if (Fresh && work.to == work.end && warp >= kAttendWarps - 2)
    append<C>(a, work.t, work.kv_head, warp == kAttendWarps - 1);
  __syncthreads();

  OnlineSoftmax<C, Heads, Chunks> softmax;
  softmax.clear();
  for (int round = work.from; round < work.to; round += kStreams) {
    const int key = round + stream;
    if (key == fresh) next.load(a, work.base + key, pitch);
    const KeyValue<C, Chunks> now = next;
    prefetch(key + kStreams);
    softmax.add(now, key < work.to, shared.q, pitch, a.cap);
  }
  softmax.store_merged(shared.parts + warp * Heads * shared.part_size, pitch);
  __syncthreads();

  const std::int64_t first_head = static_cast<std::int64_t>(work.t) * a.heads + work.head;
  float* out = a.out + first_head * n;
  if (work.splits == 1) {
    for (int i = threadIdx.x; i < work.heads * n; i += kAttendThreads)
      out[i] = merge_warps(shared, i / n, 2 + i % n) / merge_warps(shared, i / n, 1);
    return;
  }
  const std::int64_t of_head = static_cast<std::int64_t>(gridDim.y) * shared.part_size;
  float* all = a.partials + first_head * of_head;
  for (int i = threadIdx.x; i < work.heads * shared.part_size; i += kAttendThreads) {
    const int h = i / shared.part_size, e = i % shared.part_size;
    all[h * of_head + static_cast<std::int64_t>(work.split) * shared.part_size + e] =
        merge_warps(shared, h, e);
  }
  if (!last_to_arrive(a.counters + static_cast<std::int64_t>(work.t) * gridDim.x + blockIdx.x,
                      work.splits, shared.flag))
    return;
  merge_splits(shared, work, all, n, out);
}

}  // namespace tda::cuda
