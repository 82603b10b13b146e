// Measures how fast rows of weights are read, and, on one core, the decode kernels of feed-forward
// layers: build/bench_neurons MODEL ..., built by `make build`. The models' layers must exceed the
// caches. Prints Markdown tables; each figure is the best of several passes.
#include <tda/error.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "base/buffer.h"
#include "checkpoint/checkpoint.h"
#include "cpu/cpu_backend.h"
#include "cpu/isa.h"
#include "sparsity/sparsity.h"
#include "weights/model.h"

using namespace tda;

namespace {

constexpr std::int64_t kMemory = 256 << 20;  // bytes, more than the caches hold
constexpr std::int64_t kCall = 192;          // neurons of one kernel call
constexpr std::int64_t kCached = 96;         // neurons that L2 holds

/// Seconds of the fastest of `passes` calls of pass().
double fastest(int passes, const std::function<void()>& pass) {
  double best = 1e9;
  for (int i = 0; i < passes; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    pass();
    best = std::min(
        best, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  return best;
}

/// Ascending ids below `count`, each included with probability `share`.
std::vector<std::int32_t> some_of(std::int64_t count, double share) {
  std::mt19937 random(1);
  std::bernoulli_distribution taken(share);
  std::vector<std::int32_t> ids;
  for (std::int32_t i = 0; i < count; ++i)
    if (share == 1 || taken(random)) ids.push_back(i);
  return ids;
}

// ---- reading alone ------------------------------------------------------------------------------

enum class Prefetch { none, in_order, fourth_first };

/// Reads rows, four cache lines at a time, and prefetches those of the row `ahead` further on.
template <Prefetch kPrefetch>
std::uint64_t read_rows(const std::byte* data, std::int64_t row_bytes,
                        std::span<const std::int32_t> ids, std::size_t ahead) {
  std::uint64_t sums[8] = {};
  for (std::size_t i = 0; i + ahead < ids.size(); ++i) {
    const std::byte* const row = data + ids[i] * row_bytes;
    const std::byte* const later = data + ids[i + ahead] * row_bytes;
    for (std::int64_t four = 0; four < row_bytes; four += 256)
      for (std::int64_t k = 0; k < 4; ++k) {
        const std::int64_t at = four + 64 * (kPrefetch == Prefetch::fourth_first ? (k + 3) % 4 : k);
        if (kPrefetch != Prefetch::none) __builtin_prefetch(later + at, 0, 2);
        std::uint64_t line[8];
        std::memcpy(line, row + at, 64);
        for (int j = 0; j < 8; ++j) sums[j] ^= line[j];
      }
  }
  std::uint64_t all = 0;
  for (const std::uint64_t sum : sums) all ^= sum;
  return all;
}

/// GB/s of threads that split the rows between them, with the best way to prefetch.
double reading_speed(const std::byte* data, std::int64_t row_bytes,
                     const std::vector<std::int32_t>& ids, std::size_t threads) {
  std::atomic<std::uint64_t> sum = 0;
  const auto seconds = [&](auto read, std::size_t ahead) {
    return fastest(4, [&] {
      std::vector<std::jthread> running;
      for (std::size_t t = 0; t < threads; ++t)
        running.emplace_back([&, t] {
          const std::size_t first = t * ids.size() / threads, end = (t + 1) * ids.size() / threads;
          sum ^= read(data, row_bytes, std::span(ids).subspan(first, end - first), ahead);
        });
    });
  };
  double best = seconds(read_rows<Prefetch::none>, 0);
  for (const std::size_t ahead : {1, 2, 4, 8, 16})
    best = std::min({best, seconds(read_rows<Prefetch::in_order>, ahead),
                     seconds(read_rows<Prefetch::fourth_first>, ahead)});
  return static_cast<double>(std::ssize(ids) * row_bytes) / best / 1e9;
}

void print_reading() {
  Buffer<std::byte> memory;
  std::byte* const data = memory.reserve(kMemory, "rows to read");
  advise_huge_pages(data, kMemory);
  std::memset(data, 1, kMemory);
  std::printf("| bytes of a row | GB/s: all rows, one core | half | all, two cores | half |\n");
  std::printf("|---|---|---|---|---|\n");
  for (const std::int64_t bytes : {1280, 2304, 4096}) {
    std::printf("| %d |", static_cast<int>(bytes));
    for (const std::size_t threads : {1, 2})
      for (const double share : {1.0, 0.5})
        std::printf(" %.1f |",
                    reading_speed(data, bytes, some_of(kMemory / bytes, share), threads));
    std::printf("\n");
  }
}

// ---- kernels ------------------------------------------------------------------------------------

/// The neurons of each layer: a share (a mask) of the first `most`, and, if `exact` is less than 1,
/// the share of these that reach a token's threshold.
struct Setting {
  std::int64_t most;
  double share = 1, active = 1;
};

/// Nanoseconds per neuron of the setting, over the feed-forward of all layers.
double kernel_time(const Model& model, const Setting& setting) {
  const std::int64_t hidden = model.config.hidden_size;
  const RowKernels& kernels = row_kernels(choose_kernels(), model.format);
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<float> x(hidden), y(hidden + 64);
  for (float& value : x) value = normal(random);
  Buffer<std::byte> memory;
  const void* prepared = x.data();
  if (kernels.prepare) {
    std::byte* const to = memory.reserve(kernels.prepared_bytes(hidden), "x");
    kernels.prepare(x.data(), hidden, to);
    prepared = to;
  }
  const std::vector<std::int32_t> ids =
      some_of(std::min(setting.most, model.config.intermediate_size), setting.share);
  std::vector<float> h(ids.size());
  const auto run = [&](const LayerWeights& layer, const Selection* selection) {
    const NeuronRows rows = rows_of(layer);
    for (std::int64_t first = 0; first < std::ssize(ids); first += kCall) {
      const std::int64_t end = std::min(first + kCall, std::ssize(ids));
      const NeuronIds some = {ids.data() + first, end - first, std::ssize(ids) - end};
      float* const out = h.data() + first;
      if (selection)
        kernels.ffn_selected(rows, Activation::silu, *selection, some, prepared, out, y.data());
      else
        kernels.ffn_fused(rows, Activation::silu, some, prepared, out, y.data());
    }
  };
  std::vector<Selection> selections;
  for (const LayerWeights& layer : model.layers) {
    run(layer, nullptr);
    std::vector<float> sizes;
    for (std::size_t i = 0; i < ids.size(); ++i)
      sizes.push_back(std::abs(h[i]) * layer.down_lengths[ids[i]]);
    selections.push_back(
        {threshold_of_share(sizes, setting.active), false, layer.down_lengths.data()});
  }
  const bool in_cache = setting.most == kCached;
  const std::size_t layers = in_cache ? 1 : model.layers.size(), repeats = in_cache ? 300 : 1;
  const double seconds = fastest(12, [&] {
    for (std::size_t i = 0; i < repeats; ++i)
      for (std::size_t l = 0; l < layers; ++l)
        run(model.layers[l], setting.active < 1 ? &selections[l] : nullptr);
  });
  return seconds / static_cast<double>(repeats * layers * ids.size()) * 1e9;
}

void print_kernels(const char* folder) {
  std::printf("\n| ns per neuron | bytes | dense, in cache | dense | mask of 0.50 ");
  std::printf("| threshold for 0.30, in cache | 0.30 |\n|---|---|---|---|---|---|---|\n");
  const Checkpoint checkpoint(folder);
  for (const WeightFormat format : {WeightFormat::bf16, WeightFormat::int8}) {
    const std::shared_ptr<const Model> model = load_model(checkpoint, format, 0);
    const std::int64_t all = model->config.intermediate_size;
    std::printf("| %s | %d | %.1f | %.1f | %.1f | %.1f | %.1f |\n",
                std::string(name_of(format)).c_str(), static_cast<int>(model->neuron_bytes()),
                kernel_time(*model, {kCached}), kernel_time(*model, {all}),
                kernel_time(*model, {all, 0.5}), kernel_time(*model, {kCached, 1, 0.3}),
                kernel_time(*model, {all, 1, 0.3}));
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::printf("kernels: %s\n\n", choose_kernels().name);
  print_reading();
  try {
    for (int i = 1; i < argc; ++i) print_kernels(argv[i]);
  } catch (const Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  }
}
