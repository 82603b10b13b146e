// Kernels for scope "sequence": scores, ranks, masks, and the search for thresholds.
#pragma once

#include "gemm.h"

namespace tda::cuda {

/// Lists the i in [0, n) with pass(i) in ascending order and returns how many. Called by a whole
/// block; the list is complete after the caller's barrier. list: [n]; sums: [kWarps] shared
template <class Pass>
__device__ int list_if(int n, const Pass& pass, int* list, int* sums) {
  const Share mine = share_of(n, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
  int count = 0;
  for (int i = mine.first; i < mine.end; ++i) count += pass(i);
  const Scan scan = block_scan(count, sums);
  int at = scan.before;
  for (int i = mine.first; i < mine.end; ++i)
    if (pass(i)) list[at++] = i;
  return scan.total;
}

static __global__ void scale_kernel(double* values, double factor, std::int64_t n) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (TDA_WITHIN(i, n)) values[i] = read(values + i) * factor;
}

/// scores[l, j] = sqrt(sums[l, j] / tokens[l]), the same as on the host; overflows[l] = 1 if a sum
/// of the layer is not finite. grid: (neurons / kThreads, L), rounded up; sums, scores: [L,
/// neurons]
static __global__ void score_kernel(const double* sums, const double* tokens, int neurons,
                                    float* scores, int* overflows) {
  const int j = blockIdx.x * blockDim.x + threadIdx.x;
  if (!TDA_WITHIN(j, neurons)) return;
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.y) * neurons + j;
  const double sum = read(sums + at);
  scores[at] = static_cast<float>(sqrt(sum / tokens[blockIdx.y]));
  if (!(sum - sum == 0)) overflows[blockIdx.y] = 1;  // infinity or NaN
}

/// ranks[l, j] = rank among the layer's ascending scores, from 0; of equal scores the lower id
/// ranks higher. Compares all pairs, which is simpler than sorting and fast enough.
/// grid: (neurons / kThreads, L), rounded up; scores, ranks: [L, neurons]; shared: kThreads floats
static __global__ void rank_kernel(const float* scores, int neurons, int* ranks) {
  float* tile = shared_as<float>();
  const std::int64_t layer = static_cast<std::int64_t>(blockIdx.y) * neurons;
  const int j = blockIdx.x * kThreads + threadIdx.x;
  const float mine = j < neurons ? scores[layer + j] : 0;
  int rank = 0;
  for (int first = 0; first < neurons; first += kThreads) {
    const int i = first + threadIdx.x;
    // NaN compares false with everything.
    tile[threadIdx.x] = TDA_WITHIN(i, neurons) ? load(scores + layer + i) : NAN;
    __syncthreads();
#pragma unroll 8
    for (int k = 0; k < kThreads; ++k) rank += tile[k] < mine || (tile[k] == mine && first + k > j);
    __syncthreads();
  }
  if (TDA_WITHIN(j, neurons)) ranks[layer + j] = rank;
}

/// Lists the neurons to keep: those with scores[l, j] >= thresholds[l], or, if `thresholds` is
/// null, those ranked first_rank or higher. grid: L; scores, ranks, lists: [L, neurons]; shared:
/// kWarps ints
static __global__ void mask_kernel(const float* scores, const float* thresholds, const int* ranks,
                                   int first_rank, int neurons, int* lists, int* counts) {
  const std::int64_t layer = static_cast<std::int64_t>(blockIdx.x) * neurons;
  const auto keep = [&](int j) {
    return thresholds ? scores[layer + j] >= thresholds[blockIdx.x]
                      : ranks[layer + j] >= first_rank;
  };
  const int count = list_if(neurons, keep, lists + layer, shared_as<int>());
  if (threadIdx.x == 0) counts[blockIdx.x] = count;
}

// ---- the search, all layers at once -------------------------------------------------------------

/// The state of a layer's search, which follows search_threshold() on the host. Over the distinct
/// scores in ascending order: the low-th meets the target, the high-th does not or is past the end.
struct Bisection {
  int low, high;
  int accepted;     // which half of Search::sums is low's; the other is the trial's
  float threshold;  // the low-th score
  double error;     // its CETT
};

struct Search {
  const float* samples;     // [L, neurons, pitch] h, contiguous per neuron
  const float* scores;      // [L, neurons]
  int *order, *starts;      // [L, neurons] ids by rank; first rank of each distinct score
  const void* const* down;  // [L] [neurons, padded(hidden)]
  float* sums;              // [2, L, tokens, hidden] sums of the dropped contributions
  double* lengths;          // [L, tokens] ||FFN(x)||
  Bisection* bisections;    // [L]
  int layers, neurons, hidden, tokens, pitch;
  double target;
};

/// Inverts the ranks, and starts the search at the threshold that drops nothing. grid: L; shared:
/// kWarps ints
static __global__ void order_kernel(Search a, const int* ranks) {
  const std::int64_t layer = static_cast<std::int64_t>(blockIdx.x) * a.neurons;
  int* order = a.order + layer;
  for (int j = threadIdx.x; TDA_WITHIN(j, a.neurons); j += blockDim.x)
    order[read(ranks + layer + j)] = j;
  __syncthreads();
  const float* scores = a.scores + layer;
  const auto begins = [&](int rank) {
    return rank == 0 || scores[order[rank]] != scores[order[rank - 1]];
  };
  const int distinct = list_if(a.neurons, begins, a.starts + layer, shared_as<int>());
  if (threadIdx.x == 0) a.bisections[blockIdx.x] = {0, distinct, 0, scores[order[0]], 0};
}

/// The trial's sums: the accepted ones plus the contributions between the accepted score and the
/// middle one, so that all trials together cost one down projection of the samples. With `whole`:
/// all contributions. A block computes a tile of kTile by kTile.
/// grid: (hidden / kTile, tokens / kTile, L), rounded up; shared: kTilesShared bytes
template <class W>
__global__ void __launch_bounds__(kThreads, 2) dropped_kernel(Search a, bool whole) {
  const std::int64_t layer = blockIdx.z;
  const Bisection b = a.bisections[layer];
  if (!whole && b.high - b.low <= 1) return;
  const int* starts = a.starts + layer * a.neurons;
  const int* order = a.order + layer * a.neurons;
  const int end = whole ? a.neurons : starts[b.low + (b.high - b.low) / 2];
  const W* down = static_cast<const W*>(a.down[layer]);
  const std::int64_t pitch = padded(a.hidden);
  const int first_n = blockIdx.x * kTile, first_t = blockIdx.y * kTile;
  float* h = shared_as<float>();           // [kTileDepth, kTilePitch]
  float* w = h + kTileDepth * kTilePitch;  // [kTileDepth, kTilePitch]
  float sums[4][4] = {};
  for (int first = starts[b.low]; first < end; first += kTileDepth) {
    for (int i = threadIdx.x; i < kTile * kTileDepth; i += kThreads) {
      const int k = i / kTile, t = first_t + i % kTile, n = first_n + i % kTile;
      const bool in_h = TDA_WITHIN(first + k, end) && TDA_WITHIN(t, a.tokens);
      const bool in_w = TDA_WITHIN(first + k, end) && TDA_WITHIN(n, a.hidden);
      const std::int64_t j = in_h || in_w ? load(order + first + k) : 0;
      const float* of_j = a.samples + (layer * a.neurons + j) * a.pitch;
      h[k * kTilePitch + i % kTile] = in_h ? load(of_j + t) : 0;
      w[k * kTilePitch + i % kTile] = in_w ? value_of(load(down + j * pitch + n)) : 0;
    }
    __syncthreads();
    add_tile(h, w, sums);
    __syncthreads();
  }
  const std::int64_t part = static_cast<std::int64_t>(a.tokens) * a.hidden;
  const float* accepted = a.sums + (b.accepted * a.layers + layer) * part;
  float* trial = a.sums + ((1 - b.accepted) * a.layers + layer) * part;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int t = first_t + threadIdx.x / 16 + 16 * i, n = first_n + threadIdx.x % 16 + 16 * j;
      if (!TDA_WITHIN(t, a.tokens) || !TDA_WITHIN(n, a.hidden)) continue;
      const std::int64_t at = static_cast<std::int64_t>(t) * a.hidden + n;
      trial[at] = accepted[at] + sums[i][j];
    }
}

/// Computes the trial's CETT and continues with the half it decides on. With `whole` the sums are
/// FFN(x), and their lengths are stored. grid: L; shared: kWarps doubles
static __global__ void judge_kernel(Search a, bool whole) {
  const std::int64_t layer = blockIdx.x;
  const Bisection b = a.bisections[layer];
  if (!whole && b.high - b.low <= 1) return;
  const float* trial = a.sums + ((1 - b.accepted) * a.layers + layer) * a.tokens * a.hidden;
  double* lengths = a.lengths + layer * a.tokens;
  const int lane = threadIdx.x % 32;
  double ratios = 0;  // sum over the warp's tokens
  for (int t = threadIdx.x / 32; TDA_WITHIN(t, a.tokens); t += kWarps) {
    double squares = 0;
    for (int n = lane; TDA_WITHIN(n, a.hidden); n += 32) {
      const double sum = read(trial + static_cast<std::int64_t>(t) * a.hidden + n);
      squares += sum * sum;
    }
    const double length = sqrt(warp_sum(squares));
    if (whole && lane == 0) lengths[t] = length;
    if (!whole && lengths[t] > 0) ratios += length / lengths[t];
  }
  if (whole) return;
  const double error = block_sum(lane == 0 ? ratios : 0, shared_as<double>()) / a.tokens;
  if (threadIdx.x > 0) return;
  Bisection& next = a.bisections[layer];
  const int middle = b.low + (b.high - b.low) / 2;
  const std::int64_t of_layer = layer * a.neurons;
  if (error <= a.target)
    next = {middle, b.high, 1 - b.accepted,
            a.scores[of_layer + a.order[of_layer + a.starts[of_layer + middle]]], error};
  else
    next.high = middle;
}

}  // namespace tda::cuda
