// Kernels of the feed-forward network: dense, masked, thresholded; and TDA's statistic.
#pragma once

#include <tda/model_config.h>

#include "linear.h"

namespace tda::cuda {

__device__ inline float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::silu:
      return x / (1 + expf(-x));
    case Activation::gelu:
      return 0.5f * x * erfcf(-x * 0.70710678f);
    case Activation::gelu_tanh:
      return 0.5f * x * (1 + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    default:
      return x > 0 ? x : 0;
  }
}

/// What single-token selection goes by, see TokenThresholds.
enum class Select { all, contribution, gate };

/// One token through some neurons: those of an ascending list, or all.
struct Neurons {
  const void *gate, *up, *down;  // [neurons, padded(hidden)]
  const float* lengths;          // [neurons] ||down[j]||
  const int* list;               // [count] ascending ids, or null: all
  const int* count;              // [1] of the list, or null: all
  const float* threshold;        // [1]
  const float* norm;             // [hidden]
  float* x;                      // [hidden] the residual stream
  float* h;                      // [neurons] by list entry
  unsigned* selected;            // [neurons / 32] bit b of word w is list entry 32 w + b
  float* partials;               // [groups, padded(hidden)]
  unsigned* counters;            // [slices] zeros
  int* exact;                    // [1] neurons computed: the step's reads
  int hidden, neurons;
  float eps;
  Activation activation;
};

inline constexpr int kBlockNeurons = 32;                     // of gate_up: a word of `selected`
inline constexpr int kWarpNeurons = kBlockNeurons / kWarps;  // at once
inline constexpr int kSlice = 32 * kChunk;                   // columns of a block of down

/// h = act(gate) * up, and which of them pass. Moves two rows per neuron (with Select::gate, of
/// those that fail one). shared: padded(hidden) + kWarps floats
template <class W, Select S>
__global__ void __launch_bounds__(kThreads, sizeof(W) == 4 ? 1 : 2) gate_up_kernel(Neurons a) {
  float* x = shared_as<float>();
  const int pitch = static_cast<int>(padded(a.hidden));
  unsigned* bits = reinterpret_cast<unsigned*>(x + pitch);  // [kWarps]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  load_vector(a.x, a.norm, a.eps, a.hidden, x, x + pitch);
  __syncthreads();
  const int count = a.count ? *a.count : a.neurons;
  const auto row = [&](const void* matrix, int j) {
    return static_cast<const W*>(matrix) + static_cast<std::int64_t>(j) * pitch;
  };
  for (int first = blockIdx.x * kBlockNeurons; first < count; first += gridDim.x * kBlockNeurons) {
    int ids[kWarpNeurons];
    float gates[kWarpNeurons], ups[kWarpNeurons];
    const int mine = first + warp * kWarpNeurons;
#pragma unroll
    for (int k = 0; k < kWarpNeurons; ++k) {  // entries past the end are the last one once more
      const int entry = mine + k < count ? mine + k : count - 1;
      ids[k] = a.list ? a.list[entry] : entry;
    }
    if (S == Select::gate) {
      const W* rows[kWarpNeurons];
#pragma unroll
      for (int k = 0; k < kWarpNeurons; ++k) rows[k] = row(a.gate, ids[k]);
      dots(rows, x, pitch, gates);
    } else {
      const W* rows[2 * kWarpNeurons];
      float sums[2 * kWarpNeurons];
#pragma unroll
      for (int k = 0; k < kWarpNeurons; ++k) {
        rows[k] = row(a.gate, ids[k]);
        rows[kWarpNeurons + k] = row(a.up, ids[k]);
      }
      dots(rows, x, pitch, sums);
#pragma unroll
      for (int k = 0; k < kWarpNeurons; ++k) {
        gates[k] = sums[k];
        ups[k] = sums[kWarpNeurons + k];
      }
    }
    unsigned passed = 0;
#pragma unroll
    for (int k = 0; k < kWarpNeurons; ++k) {
      if (!TDA_WITHIN(mine + k, count)) break;
      float h = activate(a.activation, gates[k]);
      bool passes = S != Select::gate || fabsf(h) >= *a.threshold;
      if (S == Select::gate && passes) {
        const W* rows[1] = {row(a.up, ids[k])};
        float sums[1];
        dots(rows, x, pitch, sums);
        ups[k] = sums[0];
      }
      h = passes ? h * ups[k] : 0;
      if (S == Select::contribution) passes = fabsf(h) * a.lengths[ids[k]] >= *a.threshold;
      if (lane == 0) a.h[mine + k] = h;
      passed |= static_cast<unsigned>(passes) << k;
    }
    if (S == Select::all) continue;
    if (lane == 0) bits[warp] = passed << (warp * kWarpNeurons);
    __syncthreads();
    if (threadIdx.x == 0) {
      unsigned word = 0;
      for (int w = 0; w < kWarps; ++w) word |= bits[w];
      a.selected[first / 32] = word;
    }
    __syncthreads();
  }
}

/// This block's equal share of the ascending list of set bits. Moves 4 bytes per 32 bits.
/// entries: [total / parts + 1] shared, complete after the caller's barrier; sums: [kWarps] shared.
__device__ inline Share active_share(const unsigned* words, int count, int part, int parts,
                                     int* entries, int* sums) {
  const Share mine = share_of(count, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
  int bits = 0;
  for (int w = mine.first; w < mine.end; ++w) bits += __popc(words[w]);
  const Scan scan = block_scan(bits, sums);
  const Share share = share_of(scan.total, part, parts);
  int at = scan.before;
  for (int w = mine.first; w < mine.end; ++w)
    for (unsigned rest = words[w]; rest != 0; rest &= rest - 1, ++at)
      if (at >= share.first && at < share.end) entries[at - share.first] = 32 * w + __ffs(rest) - 1;
  return share;
}

/// x += sum of h[j] down[j] over the selected. A block takes a slice of columns and a group of
/// neurons; the last block of a slice adds the groups' sums in their order.
/// grid: (slices, groups); shared: kWarps kSlice floats, kWarps + 1 + (Select::all ? 0 :
/// neurons / groups + 1) ints
template <class W, Select S>
__global__ void __launch_bounds__(kThreads, 2) down_kernel(Neurons a) {
  float* parts = shared_as<float>();                            // [kWarps, kSlice]
  int* sums = reinterpret_cast<int*>(parts + kWarps * kSlice);  // [kWarps]
  unsigned* flag = reinterpret_cast<unsigned*>(sums + kWarps);  // [1]
  int* entries = sums + kWarps + 1;
  const int pitch = static_cast<int>(padded(a.hidden));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int column = blockIdx.x * kSlice + lane * kChunk;
  const int count = a.count ? *a.count : a.neurons;
  const int group = blockIdx.y, groups = gridDim.y;
  Share share = share_of(count, group, groups);
  if (S != Select::all) {
    share = active_share(a.selected, (count + 31) / 32, group, groups, entries, sums);
    __syncthreads();
  }
  float y[kChunk] = {};
  if (column < pitch) {
#pragma unroll 8
    for (int i = share.first + warp; i < share.end; i += kWarps) {
      const int entry = S == Select::all ? i : entries[i - share.first];
      const int j = a.list ? a.list[entry] : entry;
      const float h = a.h[entry];
      const W* row = static_cast<const W*>(a.down) + static_cast<std::int64_t>(j) * pitch;
      float w[kChunk];
      Chunk<W>::once(row + column).unpack(w);
#pragma unroll
      for (int k = 0; k < kChunk; ++k) y[k] += h * w[k];
    }
  }
#pragma unroll
  for (int k = 0; k < kChunk; ++k) parts[warp * kSlice + lane * kChunk + k] = y[k];
  __syncthreads();
  const int mine = blockIdx.x * kSlice + threadIdx.x;  // kSlice == kThreads
  float sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += parts[w * kSlice + threadIdx.x];
  if (mine < pitch) a.partials[static_cast<std::int64_t>(group) * pitch + mine] = sum;
  if (!last_to_arrive(a.counters + blockIdx.x, groups, flag)) return;
  if (TDA_WITHIN(mine, a.hidden)) {
    float total = 0;
    for (int g = 0; g < groups; ++g)
      total += a.partials[static_cast<std::int64_t>(g) * pitch + mine];
    a.x[mine] = read(a.x + mine) + total;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *a.exact = share.total;
}

// ---- several tokens, the statistic and samples --------------------------------------------------

/// h = act(gate) * up, in gate's place; up becomes act(gate), for samples. Both [n].
static __global__ void gated_kernel(Activation activation, float* gate, float* up, std::int64_t n) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (!TDA_WITHIN(i, n)) return;
  const float active = activate(activation, read(gate + i));
  gate[i] = active * up[i];
  up[i] = active;
}

/// weights[t] = 1 / sum over j of (h[t, j] lengths[j])^2, 0 for a token without any; a block per
/// token. h: [T, neurons]; lengths: [neurons] or null: ones; shared: kWarps doubles
static __global__ void token_weights_kernel(const float* h, const float* lengths, int neurons,
                                            double* weights) {
  double* parts = shared_as<double>();
  const std::int64_t t = blockIdx.x;
  double squares = 0;
  for (int j = threadIdx.x; j < neurons; j += blockDim.x) {
    const double length = static_cast<double>(h[t * neurons + j]) * (lengths ? lengths[j] : 1.0f);
    squares += length * length;
  }
  squares = block_sum(squares, parts);
  if (threadIdx.x == 0) weights[t] = squares > 0 ? 1 / squares : 0;
}

/// sums[j] += sum over t of (h[t, j] lengths[j])^2 weights[t]; a thread per neuron.
static __global__ void gather_kernel(const float* h, const float* lengths, const double* weights,
                                     int tokens, int neurons, double* sums) {
  const int j = blockIdx.x * blockDim.x + threadIdx.x;
  if (!TDA_WITHIN(j, neurons)) return;
  double sum = read(sums + j);
  for (int t = 0; t < tokens; ++t) {
    const double length = static_cast<double>(h[static_cast<std::int64_t>(t) * neurons + j]) *
                          (lengths ? lengths[j] : 1.0f);
    sum += length * length * weights[t];
  }
  sums[j] = sum;
}

/// samples[j, i] = h[tokens[i], j]; a block per sample. h: [T, neurons]; samples: [neurons, pitch]
static __global__ void sample_kernel(const float* h, const int* tokens, int neurons, int pitch,
                                     float* samples) {
  const float* from = h + static_cast<std::int64_t>(tokens[blockIdx.x]) * neurons;
  for (int j = threadIdx.x; TDA_WITHIN(j, neurons); j += blockDim.x)
    samples[static_cast<std::int64_t>(j) * pitch + blockIdx.x] = read(from + j);
}

}  // namespace tda::cuda
