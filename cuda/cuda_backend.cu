#include <algorithm>
#include <cmath>
#include <numeric>
#include <thread>

#include "attention.h"
#include "cuda_backend.h"
#include "ffn.h"

namespace tda {

using namespace cuda;

std::string cuda_missing() {
  int driver = 0, count = 0, major = 0;
  cudaDriverGetVersion(&driver);
  if (driver == 0) return "this machine has no NVIDIA driver";
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return std::string("no CUDA device can be used: ") + cudaGetErrorString(error);
  }
  if (count == 0) return "this machine has no CUDA device";
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "the device");
  if (major >= 8) return "";
  return "the device has compute capability " + std::to_string(major) + ".x, expected 8.0 or more";
}

std::unique_ptr<Backend> make_cuda_backend(std::shared_ptr<const Model> model, int threads) {
  if (const std::string missing = cuda_missing(); !missing.empty())
    throw DeviceError("device cuda: " + missing + "; use cpu or auto");
  return std::make_unique<CudaBackend>(std::move(model), threads);
}

CudaBackend::CudaBackend(std::shared_ptr<const Model> model, int threads, bool graphs)
    : model_(std::move(model)), threads_(threads), use_graphs_(graphs), ropes_(model_->config) {
  const ModelConfig& config = model_->config;
  if (threads < 0)
    throw OptionError("threads " + std::to_string(threads) + ", expected 0 (all) or more");
  if (threads == 0) threads_ = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  if (model_->format != WeightFormat::f32 && model_->format != WeightFormat::bf16)
    throw OptionError("weights " + std::string(name_of(model_->format)) +
                      ": not yet on device cuda, expected f32 or bf16");
  if (config.head_dim > 256)
    throw OptionError("head_dim " + std::to_string(config.head_dim) +
                      ": device cuda expects at most 256");
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0), "the device's properties");
  device_ = device.name;
  processors_ = static_cast<unsigned>(device.multiProcessorCount);
  int driver = 0;
  check(cudaDriverGetVersion(&driver), "the driver's version");
  // Older drivers cannot capture programmatic dependent launches in a graph.
  stream_.overlaps = device.major >= 9 && driver >= 12030;
  check_memory();
  upload(model_->embedding, embedding_);
  if (model_->head.data != model_->embedding.data) upload(model_->head, head_);
  upload(model_->final_norm, final_norm_);
  layers_.resize(config.num_layers);
  for (std::int64_t l = 0; l < config.num_layers; ++l) {
    const LayerWeights& from = model_->layers[l];
    DeviceLayer& to = layers_[l];
    upload(from.attention_norm, to.attention_norm);
    upload(from.qkv, to.qkv);
    upload(from.qkv_bias, to.qkv_bias);
    upload(from.q_norm, to.q_norm);
    upload(from.k_norm, to.k_norm);
    upload(from.output, to.output);
    upload(from.output_bias, to.output_bias);
    upload(from.attention_post_norm, to.attention_post_norm);
    upload(from.ffn_norm, to.ffn_norm);
    upload(from.ffn_post_norm, to.ffn_post_norm);
    upload(from.gate, to.gate);
    upload(from.up, to.up);
    upload(from.down, to.down);
    upload(from.down_lengths, to.down_lengths);
  }
  stream_.wait();
}

// ---- memory -------------------------------------------------------------------------------------

static std::int64_t device_bytes(const Matrix& m) {
  return m.rows * padded(m.cols) * (m.format == WeightFormat::f32 ? 4 : 2);
}

/// Throws DeviceError before the upload if the matrices do not fit.
void CudaBackend::check_memory() const {
  std::int64_t needed = device_bytes(model_->embedding);
  if (model_->head.data != model_->embedding.data) needed += device_bytes(model_->head);
  for (const LayerWeights& w : model_->layers)
    for (const Matrix* m : {&w.qkv, &w.output, &w.gate, &w.up, &w.down}) needed += device_bytes(*m);
  std::size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "the device's memory");
  if (needed > static_cast<std::int64_t>(free))
    throw DeviceError("cuda: the weights of \"" + model_->name + "\" need " +
                      std::to_string(needed) + " bytes of device memory, of which " +
                      std::to_string(free) + " are free");
}

void CudaBackend::upload(const Matrix& from, Bytes& to) const {
  const std::size_t size = from.format == WeightFormat::f32 ? 4 : 2;
  const std::size_t pitch = padded(from.cols) * size, width = from.cols * size;
  to.reserve(device_bytes(from), "weights");
  if (pitch != width)
    check(cudaMemsetAsync(to.data(), 0, device_bytes(from), stream_), "clearing weights");
  check(cudaMemcpy2DAsync(to.data(), pitch, from.data, width, width, from.rows,
                          cudaMemcpyHostToDevice, stream_),
        "copying weights");
}

void CudaBackend::upload(std::span<const float> from, Floats& to) const {
  if (from.empty()) return;
  to.reserve(std::ssize(from), "weights");
  copy(stream_, to.data(), from.data(), std::ssize(from));
}

std::int64_t CudaBackend::kv_bytes_per_token(KvFormat kv) const {
  const ModelConfig& config = model_->config;
  return 2 * config.num_layers * config.num_kv_heads * kv_row_bytes(kv, padded(config.head_dim));
}

std::unique_ptr<State> CudaBackend::new_state(std::int64_t capacity, KvFormat kv) const {
  const ModelConfig& config = model_->config;
  if (capacity < 1)
    throw OptionError("capacity of the KV cache: " + std::to_string(capacity) +
                      " tokens, expected at least 1");
  if (kv == KvFormat::int8)
    throw OptionError("kv is \"int8\", expected f32, bf16 or auto on a CUDA device");
  auto state = std::make_unique<CudaState>();
  state->capacity = capacity;
  state->kv = kv != KvFormat::automatic             ? kv
              : model_->format == WeightFormat::f32 ? KvFormat::f32
                                                    : KvFormat::bf16;
  const std::int64_t token_bytes = kv_bytes_per_token(state->kv);
  std::size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "the device's memory");
  if (capacity > static_cast<std::int64_t>(free) / token_bytes)
    throw DeviceError("out of memory: a KV cache of " + std::to_string(capacity) +
                      " tokens needs " + std::to_string(token_bytes) + " bytes for each, and " +
                      std::to_string(free) + " bytes of device memory are free");
  state->keys.reserve(capacity * token_bytes / 2, "keys");
  state->values.reserve(capacity * token_bytes / 2, "values");
  const std::int64_t layers = config.num_layers, neurons = config.intermediate_size;
  state->sums.reserve(layers * neurons, "the statistic");
  state->lists.reserve(layers * neurons, "masks");
  state->counts.reserve(layers, "masks");
  state->thresholds.reserve(layers, "thresholds");
  state->exact.reserve(layers, "counts");
  const std::int64_t slices = (config.hidden_size + kSlice - 1) / kSlice;
  state->counters.reserve(std::max(max_step() * config.num_heads, slices), "counters");
  state->selected.reserve((neurons + 31) / 32 * 4, "the selection");
  clear(state->sums);
  clear(state->counters);
  clear(state->exact);
  clear(state->thresholds);
  clear(state->selected);  // bits past the last neuron are read, then masked off
  state->layers.resize(layers);
  std::vector<std::int32_t> all(neurons);
  std::iota(all.begin(), all.end(), 0);
  for (std::int64_t layer = 0; layer < layers; ++layer) set_mask(*state, layer, all);
  return state;
}

// ---- a step begins ------------------------------------------------------------------------------

void CudaBackend::begin(State& s, const Step& step) const {
  CudaState& state = CudaState::of(s);
  const ModelConfig& config = model_->config;
  const auto tokens = static_cast<std::int64_t>(step.tokens.size());
  if (tokens < 1 || tokens > max_step())
    throw OptionError("step of " + std::to_string(tokens) + " tokens, expected 1 to " +
                      std::to_string(max_step()));
  if (step.position < 0 || step.position > state.capacity - tokens)
    throw ContextOverflow(std::to_string(tokens) + " tokens at position " +
                          std::to_string(step.position) + " do not fit into a KV cache of " +
                          std::to_string(state.capacity));
  const auto sampled = std::ssize(step.samples);
  if (sampled > state.sample_room - state.layers.front().sampled)
    throw OptionError("samples: " + std::to_string(sampled) +
                      " more tokens do not fit into room for " + std::to_string(state.sample_room));
  if (step.sequence_length < step.position + tokens)
    throw OptionError("sequence_length " + std::to_string(step.sequence_length) + " of a step to " +
                      std::to_string(step.position + tokens) + " tokens, expected at least that");
  for (const Token token : step.tokens)
    if (token < 0 || token >= config.vocab_size)
      throw OptionError("token id " + std::to_string(token) + ", expected 0 to " +
                        std::to_string(config.vocab_size - 1));
  stream_.wait();  // the previous step may still be reading its inputs
  if (step.ffn != state.step.ffn) count_reads(state);
  state.step = step;

  const std::int64_t half = config.head_dim / 2, angles = ropes_.count() * half;
  const std::int64_t heads_partials =
      tokens * config.num_heads * splits(tokens) * (2 + padded(config.head_dim));
  const char* needed_for = "a step's activations";
  const std::int64_t inputs_size = Inputs::size(tokens, angles, sampled);
  bool grown = state.inputs.reserve(inputs_size, needed_for);
  state.host_inputs.reserve(inputs_size, needed_for);
  grown |= state.x.reserve(tokens * config.hidden_size, needed_for);
  grown |= state.normed.reserve(tokens * config.hidden_size, needed_for);
  if (joins()) grown |= state.branch.reserve(tokens * config.hidden_size, needed_for);
  grown |= state.qkv.reserve(tokens * (config.q_size() + 2 * config.kv_size()), needed_for);
  grown |= state.attended.reserve(tokens * config.q_size(), needed_for);
  grown |= state.hidden.reserve(tokens * config.intermediate_size, needed_for);
  grown |= state.ups.reserve(tokens * config.intermediate_size, needed_for);
  const std::int64_t widest =
      std::max({config.hidden_size, config.q_size(), config.intermediate_size});
  if (tokens > 1) state.rounded.reserve(tokens * padded(widest), needed_for);
  grown |= state.token_weights.reserve(tokens, needed_for);
  grown |= state.partials.reserve(
      std::max(heads_partials, down_groups() * padded(config.hidden_size)), "partial sums");
  if (grown)  // recorded graphs hold the old addresses
    for (Graph& graph : state.graphs) graph.reset();

  const Inputs host(state.host_inputs.data(), tokens, angles);
  *host.position = static_cast<int>(step.position);
  std::copy(step.tokens.begin(), step.tokens.end(), host.tokens);
  std::copy(step.samples.begin(), step.samples.end(), host.samples);
  for (std::int64_t rope = 0; rope < ropes_.count(); ++rope) {
    const std::vector<float> frequencies = ropes_.frequencies(rope, step.sequence_length);
    const float factor = static_cast<float>(ropes_.config(rope).attention_factor);
    for (std::int64_t t = 0; t < tokens; ++t)
      for (std::int64_t i = 0; i < half; ++i) {
        const float angle = static_cast<float>(step.position + t) * frequencies[i];
        const std::int64_t at = (rope * tokens + t) * half + i;
        host.cos[at] = std::cos(angle) * factor;
        host.sin[at] = std::sin(angle) * factor;
      }
  }
  copy(stream_, state.inputs.data(), state.host_inputs.data(), inputs_size);

  state.recording = CudaState::Recording::none;
  if (!use_graphs_ || tokens > 1 || step.ffn == FfnMode::gather || sampled > 0) return;
  Graph& graph = state.graphs[step.ffn == FfnMode::sparse];
  state.recording = graph ? CudaState::Recording::replaying : CudaState::Recording::recording;
  if (!graph) graph.begin(stream_);
}

// ---- TDA ----------------------------------------------------------------------------------------

void CudaBackend::set_threshold(State& s, std::int64_t layer, float threshold) const {
  CudaState& state = CudaState::of(s);
  check_threshold(layer, threshold);
  copy(stream_, state.thresholds.data() + layer, &threshold, 1);
  stream_.wait();
  count_reads(state);
  state.layers[layer].threshold = threshold;
  state.graphs[1].reset();  // the choice of kernels depends on the thresholds
}

/// Adds what single-token steps computed since the last call to the layers' reads.
void CudaBackend::count_reads(const CudaState& s) const {
  if (s.uncounted == 0) return;
  CudaState& state = const_cast<CudaState&>(s);
  const std::int64_t steps = std::exchange(state.uncounted, 0);
  std::vector<std::int64_t> exact(state.layers.size());
  copy(stream_, exact.data(), state.exact.data(), std::ssize(exact));
  clear(state.exact);
  stream_.wait();
  const bool sparse = state.step.ffn == FfnMode::sparse;
  for (std::size_t l = 0; l < exact.size(); ++l) {
    CudaState::Layer& layer = state.layers[l];
    const std::int64_t considered =
        steps * (sparse ? layer.active : model_->config.intermediate_size);
    state.add_reads(layer.reads, model_->layers[l].gate, considered, exact[l]);
  }
}

FfnReads CudaBackend::ffn_reads(const State& s, std::int64_t layer) const {
  const CudaState& state = CudaState::of(s);
  count_reads(state);
  return state.layers[layer].reads;
}

std::int64_t CudaBackend::head_bytes(const State& s) const { return CudaState::of(s).head_bytes; }

}  // namespace tda
