// Measures decoding on a GPU without a checkpoint, Python or PyTorch: models of known shapes with
// random weights, the same in every layer but with a device copy per layer. Dense and with masks in
// turn, and the read bandwidth in the same run. Only the times mean anything.
//   build/bench_decode SHAPE [new tokens 96] [context 32] [rounds 5]     bf16, greedy
#include <cuda_runtime.h>
#include <tda/error.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "model/forward.h"

using namespace tda;

namespace {

struct Shape {
  std::int64_t vocab, hidden, neurons, layers, heads, kv_heads, head_dim;
};
const std::map<std::string, Shape> kShapes = {
    {"llama2-7b", {32000, 4096, 11008, 32, 32, 32, 128}},
    {"llama3-8b", {128256, 4096, 14336, 32, 32, 8, 128}},
    {"llama3.2-1b", {128256, 2048, 8192, 16, 32, 8, 64}},
    {"smollm2-135m", {49152, 576, 1536, 30, 9, 3, 64}},
};
constexpr double kShares[] = {1, 0.75, 0.5, 0.25};  // of neurons; the first: dense

double now() {
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(since).count();
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

__global__ void read_kernel(const uint4* data, std::size_t count, unsigned* out) {
  unsigned sum = 0;
  const std::size_t stride = std::size_t{gridDim.x} * blockDim.x;
  for (std::size_t i = std::size_t{blockIdx.x} * blockDim.x + threadIdx.x; i + 7 * stride < count;
       i += 8 * stride) {
    uint4 words[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) words[k] = __ldcs(data + i + k * stride);
#pragma unroll
    for (int k = 0; k < 8; ++k) sum ^= words[k].x ^ words[k].y ^ words[k].z ^ words[k].w;
  }
  if (sum == 1) *out = sum;  // keeps the compiler from removing the reads
}

/// Bytes per second of reading 8 GB, best of several runs.
double read_roof() {
  constexpr std::size_t kBytes = std::size_t{8} << 30;
  uint4* data = nullptr;
  unsigned* out = nullptr;
  if (cudaMalloc(&data, kBytes) != cudaSuccess || cudaMalloc(&out, 4) != cudaSuccess) {
    std::fprintf(stderr, "no 8 GB of device memory for the read roof\n");
    std::exit(1);
  }
  cudaMemset(data, 1, kBytes);
  double best = 1e9;
  for (int pass = 0; pass < 5; ++pass) {
    cudaDeviceSynchronize();
    const double begin = now();
    read_kernel<<<1024, 512>>>(data, kBytes / sizeof(uint4), out);
    cudaDeviceSynchronize();
    best = std::min(best, now() - begin);
  }
  cudaFree(data);
  cudaFree(out);
  return kBytes / best;
}

std::shared_ptr<const Model> make_model(const Shape& s) {
  auto model = std::make_shared<Model>();
  ModelConfig& c = model->config;
  c.vocab_size = s.vocab;
  c.hidden_size = s.hidden;
  c.intermediate_size = s.neurons;
  c.num_layers = s.layers;
  c.num_heads = s.heads;
  c.num_kv_heads = s.kv_heads;
  c.head_dim = s.head_dim;
  c.sliding_window.resize(s.layers);
  const std::int64_t qkv = c.q_size() + 2 * c.kv_size();
  struct Numbers {
    std::vector<std::uint16_t> bf16;
    std::vector<float> ones;
  };
  const auto numbers = std::make_shared<Numbers>();
  numbers->bf16.resize(std::max({s.vocab, s.neurons, qkv}) * s.hidden);
  std::uint32_t random = 1;
  for (std::uint16_t& v : numbers->bf16) {  // 0.008 to 0.016, of either sign
    random = random * 1664525 + 1013904223;
    v = static_cast<std::uint16_t>(random >> 31 << 15 | (0x3c00 + (random >> 16 & 0x7f)));
  }
  numbers->ones.resize(std::max(s.hidden, s.neurons), 1.0f);
  model->storage = numbers;
  model->format = WeightFormat::bf16;
  const auto matrix = [&](std::int64_t rows, std::int64_t columns) {
    return Matrix{WeightFormat::bf16, rows, columns,
                  reinterpret_cast<const std::byte*>(numbers->bf16.data())};
  };
  const std::span<const float> ones = numbers->ones;
  model->embedding = model->head = matrix(s.vocab, s.hidden);
  model->final_norm = ones.first(s.hidden);
  LayerWeights w;
  w.attention_norm = w.ffn_norm = ones.first(s.hidden);
  w.qkv = matrix(qkv, s.hidden);
  w.output = matrix(s.hidden, c.q_size());
  w.gate = w.up = w.down = matrix(s.neurons, s.hidden);
  w.down_lengths = ones.first(s.neurons);
  model->layers.assign(s.layers, w);
  return model;
}

/// This share of the neurons, evenly spread.
std::vector<std::int32_t> spread(std::int64_t neurons, double share) {
  std::vector<std::int32_t> kept;
  for (std::int64_t j = 0; j < neurons; ++j)
    if (static_cast<double>(j * 2654435761u % 1024) < share * 1024)
      kept.push_back(static_cast<std::int32_t>(j));
  return kept;
}

void run(const std::string& name, const Shape& s, int fresh, int context, int rounds) {
  const auto model = make_model(s);
  const auto backend = make_cuda_backend(model, 1);
  const double kv_bytes = 4.0 * s.layers * model->config.kv_size() * (context + fresh / 2.0);
  double others = static_cast<double>(model->head.bytes());
  for (const LayerWeights& w : model->layers)
    others += static_cast<double>(w.qkv.bytes() + w.output.bytes());

  std::vector<double> roofs, speeds[std::size(kShares)];
  std::vector<double> bytes(std::size(kShares));
  const std::vector<Token> prompt(context, 1);
  for (int round = 0; round <= rounds; ++round) {  // the first warms up
    for (std::size_t i = 0; i < std::size(kShares); ++i) {
      const auto state = backend->new_state(context + fresh, KvFormat::automatic);
      const auto mask = spread(s.neurons, kShares[i]);
      for (std::int64_t layer = 0; layer < s.layers; ++layer)
        backend->set_mask(*state, layer, mask);
      bytes[i] = others + kv_bytes + 6.0 * s.layers * s.hidden * static_cast<double>(mask.size());
      const auto step = [&](Tokens tokens, std::int64_t position, FfnMode mode) {
        const std::int64_t end = position + std::ssize(tokens);
        forward(*backend, *state, {tokens, position, end, mode}, 0);
      };
      for (std::int64_t at = 0; at < context; at += backend->max_step()) {
        const auto count = std::min<std::int64_t>(backend->max_step(), context - at);
        step(Tokens(prompt).subspan(at, count), at, FfnMode::dense);
      }
      Token token = backend->draw(*state, 0, 0);
      const double begin = now();
      for (int k = 0; k < fresh; ++k) {
        step({&token, 1}, context + k, i == 0 ? FfnMode::dense : FfnMode::sparse);
        token = backend->draw(*state, 0, 0);
      }
      if (round > 0) speeds[i].push_back(fresh / (now() - begin));
    }
    if (round > 0) roofs.push_back(read_roof());
  }

  const double roof = median(roofs);
  std::printf("%s, bf16, context %d, %d new tokens, %d rounds, read roof %.0f GB/s\n\n",
              name.c_str(), context, fresh, rounds, roof / 1e9);
  std::printf("| neurons | tokens/s (least, most) | MB per token | of roof | of own dense |\n");
  std::printf("|---|---|---|---|---|\n");
  for (std::size_t i = 0; i < std::size(kShares); ++i) {
    std::vector<double> ratios;
    for (std::size_t r = 0; r < speeds[i].size(); ++r)
      ratios.push_back(speeds[i][r] / speeds[0][r]);
    const auto [least, most] = std::minmax_element(speeds[i].begin(), speeds[i].end());
    std::printf("| %.0f%% | %.1f (%.1f, %.1f) | %.1f | %.0f%% | %.2f |\n", 100 * kShares[i],
                median(speeds[i]), *least, *most, bytes[i] / 1e6,
                100 * median(speeds[i]) * bytes[i] / roof, median(ratios));
  }
}

}  // namespace

int main(int argc, char** argv) try {
  const auto shape = argc > 1 ? kShapes.find(argv[1]) : kShapes.end();
  const auto number = [&](int i, int otherwise) {
    return argc > i ? std::atoi(argv[i]) : otherwise;
  };
  const int fresh = number(2, 96), context = number(3, 32), rounds = number(4, 5);
  if (shape == kShapes.end() || argc > 5 || fresh < 1 || context < 1 || rounds < 1) {
    std::fprintf(stderr, "bench_decode SHAPE [new tokens] [context] [rounds]; shapes:");
    for (const auto& [name, of_name] : kShapes) std::fprintf(stderr, " %s", name.c_str());
    std::fprintf(stderr, "\n");
    return 2;
  }
  run(shape->first, shape->second, fresh, context, rounds);
} catch (const Error& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
