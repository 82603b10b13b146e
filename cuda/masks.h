// Kernels of scope "sequence": the statistic becomes ranks, masks and, by search, thresholds.
#pragma once

#include "gemm.h"

namespace tda::cuda {

/// Lists in ascending order the i in [0, n) with pass(i); how many. For a whole block; the list is
/// complete after the caller's barrier. list: [n]; sums: [kWarps] shared
template <class Pass>
__device__ int list_those(int n, const Pass& pass, int* list, int* sums) {
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

/// scores[l, j] = sqrt(sums[l, j] / tokens[l]) as the host has it; overflows[l] = 1 if a layer's
/// sums are not finite. grid: (neurons / kThreads, L), rounded up; sums, scores: [L, neurons]
static __global__ void score_kernel(const double* sums, const double* tokens, int neurons,
                                    float* scores, int* overflows) {
  const int j = blockIdx.x * blockDim.x + threadIdx.x;
  if (!TDA_WITHIN(j, neurons)) return;
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.y) * neurons + j;
  const double sum = read(sums + at);
  scores[at] = static_cast<float>(sqrt(sum / tokens[blockIdx.y]));
  if (!(sum - sum == 0)) overflows[blockIdx.y] = 1;  // infinite or no number
}

/// ranks[l, j] = place among the layer's ascending scores, from 0; of equal scores the lower id
/// ranks higher. Compares all with all: no sorting network is as short.
/// grid: (neurons / kThreads, L), rounded up; scores, ranks: [L, neurons]; shared: kThreads floats
static __global__ void rank_kernel(const float* scores, int neurons, int* ranks) {
  float* tile = shared_as<float>();
  const std::int64_t layer = static_cast<std::int64_t>(blockIdx.y) * neurons;
  const int j = blockIdx.x * kThreads + threadIdx.x;
  const float mine = j < neurons ? scores[layer + j] : 0;
  int rank = 0;
  for (int first = 0; first < neurons; first += kThreads) {
    const int i = first + threadIdx.x;
    // What is no number compares with nothing.
    tile[threadIdx.x] = TDA_WITHIN(i, neurons) ? load(scores + layer + i) : NAN;
    __syncthreads();
#pragma unroll 8
    for (int k = 0; k < kThreads; ++k) rank += tile[k] < mine || (tile[k] == mine && first + k > j);
    __syncthreads();
  }
  if (TDA_WITHIN(j, neurons)) ranks[layer + j] = rank;
}

/// Masks by threshold: scores[l, j] >= thresholds[l] stays; or, where `thresholds` is null, by
/// rank: from first_rank on. grid: L; scores, ranks, lists: [L, neurons]; shared: kWarps ints
static __global__ void mask_kernel(const float* scores, const float* thresholds, const int* ranks,
                                   int first_rank, int neurons, int* lists, int* counts) {
  const std::int64_t layer = static_cast<std::int64_t>(blockIdx.x) * neurons;
  const auto stays = [&](int j) {
    return thresholds ? scores[layer + j] >= thresholds[blockIdx.x]
                      : ranks[layer + j] >= first_rank;
  };
  const int count = list_those(neurons, stays, lists + layer, shared_as<int>());
  if (threadIdx.x == 0) counts[blockIdx.x] = count;
}

// ---- the search, all layers at once -------------------------------------------------------------

/// Where the search of a layer stands: as search_threshold() on the host goes, over the distinct
/// scores in ascending order, the low-th meets the target, the high-th does not or is past the end.
struct Bisection {
  int low, high;
  int accepted;     // which of Search::sums belongs to low; the other is the trial's
  float threshold;  // the low-th score
  double error;     // its CETT
};

struct Search {
  const float* samples;     // [L, neurons, pitch] h: what one neuron needs is contiguous
  const float* scores;      // [L, neurons]
  int *order, *starts;      // [L, neurons] ids by rank; first rank of each distinct score
  const void* const* down;  // [L] [neurons, padded(hidden)]
  float* sums;              // [2, L, tokens, hidden] of the contributions that a threshold drops
  double* lengths;          // [L, tokens] ||FFN(x)||
  Bisection* bisections;    // [L]
  int layers, neurons, hidden, tokens, pitch;
  double target;
};

/// The order of the ranks, and a search that has accepted to drop nothing. grid: L; shared: kWarps
/// ints
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
  const int distinct = list_those(a.neurons, begins, a.starts + layer, shared_as<int>());
  if (threadIdx.x == 0) a.bisections[blockIdx.x] = {0, distinct, 0, scores[order[0]], 0};
}

/// The trial's sums: those accepted, and the contributions between the accepted score and the one
/// in the middle, so that all trials together cost as much as one down projection of the samples.
/// With `whole` all contributions. A block makes a tile of kTile by kTile.
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

/// Judges the trial: its CETT decides which half goes on. With `whole` the sums are FFN(x), whose
/// lengths are kept. grid: L; shared: kWarps doubles
static __global__ void judge_kernel(Search a, bool whole) {
  const std::int64_t layer = blockIdx.x;
  const Bisection b = a.bisections[layer];
  if (!whole && b.high - b.low <= 1) return;
  const float* trial = a.sums + ((1 - b.accepted) * a.layers + layer) * a.tokens * a.hidden;
  double* lengths = a.lengths + layer * a.tokens;
  const int lane = threadIdx.x % 32;
  double ratios = 0;  // of the warp's tokens
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
