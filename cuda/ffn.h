// Feed-forward kernels: dense, masked or thresholded, and TDA's statistic.
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
      return x < 0 ? x - x : x;  // infinity and NaN stay to be seen
  }
}

/// What a neuron is selected by for one token, see Backend::set_threshold.
enum class Select { all, contribution, gate };

/// One token's FFN over some neurons: those of an ascending list, or all.
struct Neurons {
  const void *gate, *up, *down;  // [neurons, padded(hidden)]
  const float* lengths;          // [neurons] ||down[j]||
  const int* list;               // [count] ascending ids, or null: all
  const int* count;              // [1] of the list, or null: all
  const float* threshold;        // [1]
  const float* norm;             // [hidden]
  const float* x;                // [hidden] the residual stream
  float* out;                    // [hidden] where the result goes
  bool add;                      // to what is there
  float* h;                      // [neurons] by list entry
  std::uint8_t* selected;  // [neurons / 8], to whole words; bit b of byte i: list entry 8 i + b
  float* partials;         // [groups, padded(hidden)]
  unsigned* counters;      // [slices] zeros
  std::int64_t* exact;     // [1] counts the neurons computed, or null
  int hidden, neurons;
  float eps;
  Activation activation;
};

inline constexpr int kSlice = 32 * kChunk;  // columns per block of down_kernel

/// h = act(gate) * up, and one bit per neuron that passes the threshold. A warp per neuron. Reads
/// two rows per neuron (with Select::gate, one row of those that fail). shared: padded(hidden) +
/// kWarps floats, kWarps ints
template <class W, Select S>
__global__ void __launch_bounds__(kThreads, kBlocksEach) gate_up_kernel(Neurons a) {
  let_next_begin();
  float* x = shared_as<float>();
  const int pitch = static_cast<int>(padded(a.hidden));
  float* parts = x + pitch;
  unsigned* passed = reinterpret_cast<unsigned*>(parts + kWarps);  // [kWarps]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int count = a.count ? *a.count : a.neurons;
  constexpr int kRows = S == Select::gate ? 1 : 2;  // gate, and up unless the gate decides on it
  Dots<kRows, W> dots;
  int id = 0;
  const auto row_of = [&](const void* matrix) {
    return static_cast<const W*>(matrix) + static_cast<std::int64_t>(id) * pitch;
  };
  const auto begin = [&](int entry) {
    entry = entry < count ? entry : count - 1;  // past the end, load the last one again
    id = a.list ? a.list[entry] : entry;
    const W* rows[kRows];
    rows[0] = row_of(a.gate);
    if (S != Select::gate) rows[kRows - 1] = row_of(a.up);
    dots.begin(rows, pitch);
  };
  int first = blockIdx.x * kWarps;
  if (first < count) begin(first + warp);
  load_weight(a.norm, a.hidden, x);
  wait_for_previous();
  load_vector(a.x, a.norm != nullptr, a.hidden, x, parts);
  __syncthreads();
  const float scale = rms_scale(a.norm != nullptr, a.eps, a.hidden, parts);
  while (first < count) {
    const int entry = first + warp;
    float sums[kRows];
    dots.finish(x, sums);
    float h = activate(a.activation, sums[0] * scale);
    // NaN compares false, so the neuron is kept and NaN reaches the logits.
    bool passes = S != Select::gate || !(fabsf(h) < *a.threshold);
    if (S == Select::gate && passes) {
      const W* rows[kRows] = {row_of(a.up)};
      dots.begin(rows, pitch);
      dots.finish(x, sums);
      h *= sums[0] * scale;
    } else {
      h = passes ? h * sums[kRows - 1] * scale : 0;
    }
    if (S == Select::contribution) passes = !(fabsf(h) * a.lengths[id] < *a.threshold);
    const bool exists = TDA_WITHIN(entry, count);
    if (lane == 0 && exists) a.h[entry] = h;
    if (S != Select::all) {
      if (lane == 0) passed[warp] = exists && passes;
      __syncthreads();
      if (threadIdx.x == 0) {
        unsigned bits = 0;
        for (int w = 0; w < kWarps; ++w) bits |= passed[w] << w;
        a.selected[first / kWarps] = static_cast<std::uint8_t>(bits);
      }
      __syncthreads();
    }
    first += gridDim.x * kWarps;
    if (first < count) begin(first + warp);
  }
}

/// This block's equal share of the ascending list of set bits, without atomics: every block counts
/// all bits. bytes: [count / 8], padded to whole words, whose bits from `count` on are ignored;
/// entries: [total / parts + 1] shared, complete after the caller's barrier; sums: [kWarps] shared
__device__ inline Share active_share(const std::uint8_t* bytes, int count, int part, int parts,
                                     int* entries, int* sums) {
  const unsigned* words = reinterpret_cast<const unsigned*>(bytes);
  const auto word = [&](int w) {
    const int left = count - 32 * w;
    return left < 32 ? words[w] & ((1u << left) - 1) : words[w];
  };
  const Share mine =
      share_of((count + 31) / 32, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
  int bits = 0;
  for (int w = mine.first; w < mine.end; ++w) bits += __popc(word(w));
  const Scan scan = block_scan(bits, sums);
  const Share share = share_of(scan.total, part, parts);
  int at = scan.before;
  for (int w = mine.first; w < mine.end; ++w)
    for (unsigned rest = word(w); rest != 0; rest &= rest - 1, ++at)
      if (at >= share.first && at < share.end) entries[at - share.first] = 32 * w + __ffs(rest) - 1;
  return share;
}

/// A warp's sum of h[i] down[i] over every kWarps-th neuron of a share, eight columns per lane.
/// Prefetches into registers: begin() issues the loads of the first rows, and kAhead rows are in
/// flight at any time.
template <class W>
class DownRows {
 public:
  /// row_of(i): [pitch], down row of the share's neuron i; column: this lane's first one
  template <class RowOf>
  __device__ void begin(int count, int column, int pitch, RowOf row_of) {
    count_ = column < pitch ? count : 0;
#pragma unroll
    for (int a = 0; a < kAhead; ++a) prefetch(a, at(a), column, row_of);
  }
  /// h: [count] shared
  template <class RowOf>
  __device__ void finish(const float* h, int column, RowOf row_of, float (&y)[kChunk]) {
    for (int first = 0; first < count_; first += kAhead * kWarps) {
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int i = first + at(a);
        if (i >= count_) break;
        float w[kChunk];
        ahead_[a].unpack(w);
#pragma unroll
        for (int k = 0; k < kChunk; ++k) y[k] += h[i] * w[k];
        prefetch(a, i + kAhead * kWarps, column, row_of);
      }
    }
  }

 private:
  static constexpr int kAhead = 32 / sizeof(W);
  __device__ static int at(int a) { return a * kWarps + threadIdx.x / 32; }
  template <class RowOf>
  __device__ void prefetch(int a, int i, int column, RowOf row_of) {
    if (i < count_) ahead_[a] = Chunk<W>::once(row_of(i) + column);
  }
  Chunk<W> ahead_[kAhead];
  int count_;
};

/// x += sum of h[j] down[j] over the selected neurons. A block computes a slice of columns for a
/// group of neurons; the last block of a slice to arrive adds the groups' sums in a fixed order.
/// grid: (slices, groups); shared: kWarps kSlice floats, kWarps + 1 ints, neurons / groups + 1
/// floats and, unless Select::all, as many ints
template <class W, Select S>
__global__ void __launch_bounds__(kThreads, kBlocksEach) down_kernel(Neurons a) {
  let_next_begin();
  const int group = blockIdx.y, groups = gridDim.y, most = a.neurons / groups + 1;
  float* parts = shared_as<float>();                            // [kWarps, kSlice]
  int* sums = reinterpret_cast<int*>(parts + kWarps * kSlice);  // [kWarps]
  unsigned* flag = reinterpret_cast<unsigned*>(sums + kWarps);  // [1]
  float* h = reinterpret_cast<float*>(flag + 1);                // [most]
  int* entries = reinterpret_cast<int*>(h + most);              // [most]
  const int pitch = static_cast<int>(padded(a.hidden));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int column = blockIdx.x * kSlice + lane * kChunk;
  const int count = a.count ? *a.count : a.neurons;
  Share share = share_of(count, group, groups);
  const auto entry_of = [&](int i) { return S == Select::all ? share.first + i : entries[i]; };
  const auto row_of = [&](int i) {
    const int entry = entry_of(i), j = a.list ? a.list[entry] : entry;
    return static_cast<const W*>(a.down) + static_cast<std::int64_t>(j) * pitch;
  };
  DownRows<W> rows;
  if (S == Select::all) rows.begin(share.end - share.first, column, pitch, row_of);
  wait_for_previous();
  if (S != Select::all) {
    share = active_share(a.selected, count, group, groups, entries, sums);
    __syncthreads();
    rows.begin(share.end - share.first, column, pitch, row_of);
  }
  for (int i = threadIdx.x; TDA_WITHIN(i, share.end - share.first); i += blockDim.x)
    h[i] = read(a.h + entry_of(i));
  __syncthreads();
  float y[kChunk] = {};
  rows.finish(h, column, row_of, y);
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
    const float before = a.add ? read(a.out + mine) : 0;
#pragma unroll 16
    for (int g = 0; g < groups; ++g)
      total += read(a.partials + static_cast<std::int64_t>(g) * pitch + mine);
    a.out[mine] = before + total;
  }
  if (a.exact && blockIdx.x == 0 && threadIdx.x == 0) *a.exact += share.total;
}

// ---- several tokens, the statistic, samples -----------------------------------------------------

/// In place: gate becomes h = act(gate) * up, and up becomes act(gate) for samples. Both [n].
static __global__ void gated_kernel(Activation activation, float* gate, float* up, std::int64_t n) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (!TDA_WITHIN(i, n)) return;
  const float active = activate(activation, read(gate + i));
  gate[i] = active * up[i];
  up[i] = active;
}

/// weights[t] = 1 / sum over j of (h[t, j] lengths[j])^2, or 0 if that sum is 0. A block per token.
/// h: [T, neurons]; lengths: [neurons], null means ones; shared: kWarps doubles
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

/// sums[j] += sum over t of (h[t, j] lengths[j])^2 weights[t]. A thread per neuron.
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

/// samples[j, i] = h[tokens[i], j]. A block per sample. h: [T, neurons]; samples: [neurons, pitch]
static __global__ void sample_kernel(const float* h, const int* tokens, int neurons, int pitch,
                                     float* samples) {
  const float* from = h + static_cast<std::int64_t>(tokens[blockIdx.x]) * neurons;
  for (int j = threadIdx.x; TDA_WITHIN(j, neurons); j += blockDim.x)
    samples[static_cast<std::int64_t>(j) * pitch + blockIdx.x] = read(from + j);
}

}  // namespace tda::cuda
