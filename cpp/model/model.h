// The weights of one model in engine layout. Const after load.
#pragma once

#include <tda/model_config.h>
#include <tda/types.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace tda {

class Checkpoint;

/// A row-major matrix [rows, cols] in one of the weight formats; does not own its data.
/// Rows are contiguous and data is 64-byte aligned.
struct Matrix {
  WeightFormat format = WeightFormat::automatic;  // f32 or bf16
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  const std::byte* data = nullptr;

  std::int64_t row_bytes() const { return cols * (format == WeightFormat::f32 ? 4 : 2); }
  std::int64_t bytes() const { return rows * row_bytes(); }
  const std::byte* row(std::int64_t r) const { return data + r * row_bytes(); }
};

/// Vectors are f32 whatever the weight format; an empty span means the model has none.
struct LayerWeights {
  std::span<const float> attention_norm;  // [H]
  Matrix qkv;                             // [q_size + 2 kv_size, H], rows q then k then v
  std::span<const float> qkv_bias;        // [q_size + 2 kv_size]
  std::span<const float> q_norm, k_norm;  // [head_dim]
  Matrix output;                          // [H, q_size]
  std::span<const float> output_bias;     // [H]
  std::span<const float> ffn_norm;        // [H]
  // Neuron-major: row j of each of the three is all that neuron j needs.
  Matrix gate, up, down;                // [F, H]; down is W_down transposed
  std::span<const float> down_lengths;  // [F] ||W_down[:,j]||_2
};

struct Model {
  ModelConfig config;
  std::string name;         // the checkpoint's folder name
  std::string fingerprint;  // of the checkpoint's tensors, whatever the weight format here
  WeightFormat format = WeightFormat::bf16;
  Matrix embedding;                     // [V, H]
  Matrix head;                          // [V, H]; the embedding itself when tied
  std::span<const float> final_norm;    // [H]
  std::vector<LayerWeights> layers;     // [L]
  std::shared_ptr<const void> storage;  // keeps every pointer above alive
  std::int64_t weight_bytes = 0;

  /// FFN weight bytes of one neuron: its rows of gate, up and down.
  std::int64_t neuron_bytes() const { return 3 * layers.front().gate.row_bytes(); }
};

/// Packs a checkpoint into engine layout. Throws CheckpointError for missing tensors, wrong shapes
/// and values that are not finite.
std::shared_ptr<const Model> load_model(const Checkpoint& checkpoint, WeightFormat format,
                                        int threads);

}  // namespace tda
