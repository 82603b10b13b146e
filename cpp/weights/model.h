// The weights of one model in engine layout. Const after load.
#pragma once

#include <tda/model_config.h>
#include <tda/types.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "weights/bricks.h"
#include "weights/input_factor.h"
#include "weights/quantize.h"

namespace tda {

class Checkpoint;

/// A row's largest value, stored exactly beside it, with 0 in the row itself. A value of 0 means
/// that the row has no outlier.
struct Outlier {
  std::int32_t column;
  float value;
};

/// A row-major matrix [rows, cols] in one of the weight formats; does not own its data. Rows are
/// contiguous and begin 64-byte aligned. graded and int4 have no rows in memory: their layout is that of weights/bricks.h.
struct Matrix {
  WeightFormat format = WeightFormat::automatic;  // anything but automatic
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  const std::byte* data = nullptr;
  std::int64_t gap = 0;               // bytes of another matrix between two rows; int8 only
  const Outlier* outliers = nullptr;  // [rows]; null: no row has one
  // graded and int4 only: what their bricks are, and in which order
  BrickKind kind = BrickKind::graded;
  bool by_block = false;
  // [cols] the input of each column; empty: its own number. So that inputs that share a scale are
  // neighbours; in bricks only.
  std::span<const std::int32_t> input_order = {};

  std::int64_t input_of(std::int64_t column) const {
    return input_order.empty() ? column : input_order[column];
  }
  std::int64_t row_bytes() const {
    switch (format) {
      case WeightFormat::f32:
        return cols * 4;
      case WeightFormat::int8:
        return int8_row_bytes(cols);
      case WeightFormat::bf16c:
        return bf16c_row_bytes(cols);
      default:
        return cols * 2;
    }
  }
  bool in_bricks() const { return tda::in_bricks(format); }
  Bricks bricks() const { return {data, rows, cols, kind, by_block}; }
  std::int64_t bytes() const { return in_bricks() ? bricks().bytes() : rows * row_bytes(); }
  /// Bytes that a product reads: the rests of graded lie further apart than they need.
  std::int64_t read_bytes() const {
    return in_bricks() ? bricks().high_bytes() + cols * bricks().rest_bytes() : bytes();
  }
  /// Bytes from one row to the next.
  std::int64_t stride() const { return row_bytes() + gap; }
  const std::byte* row(std::int64_t r) const { return data + r * stride(); }
};

/// Columns [first, first + count) of a row as f32.
void read_row(const Matrix& matrix, std::int64_t row, std::int64_t first, std::int64_t count,
              float* out);

/// Vectors are f32 whatever the weight format; an empty span means the model has none.
struct LayerWeights {
  // Norms before and behind attention and feed-forward; Gemma's offset of 1 is added already.
  std::span<const float> attention_norm, attention_post_norm;  // [H]
  Matrix qkv;                             // [q_size + 2 kv_size, H], rows q then k then v
  std::span<const float> qkv_bias;        // [q_size + 2 kv_size]
  std::span<const float> q_norm, k_norm;  // [head_dim], or of all heads [q_size], [kv_size]
  Matrix output;                          // [H, q_size]
  std::span<const float> output_bias;     // [H]
  std::span<const float> ffn_norm, ffn_post_norm;  // [H]
  // Neuron-major: row j of each of the three is all that neuron j needs. In int8 the rows of gate and
  // up, which are read together, take turns.
  Matrix gate, up, down;  // [F, H]; down is W_down transposed
  // In bricks: gate and up are one matrix of 32 rows of each in turn, and down is W_down. Neurons are
  // in the order that down has best, so it has no input_order.
  Matrix gate_up;                             // [2 F, H], F rounded up to 32
  std::span<const float> down_lengths;        // [F] ||W_down[:,j]||_2
  std::vector<std::int32_t> outlier_neurons;  // those whose down row has an outlier, ascending

  /// The matrices of a layer in bricks, in the order of reading.
  std::array<const Matrix*, 4> in_bricks() const { return {&qkv, &output, &gate_up, &down}; }
};

struct Model {
  ModelConfig config;
  std::string name;         // the checkpoint's folder name
  std::string fingerprint;  // of the checkpoint's tensors, whatever the weight format here
  WeightFormat format = WeightFormat::bf16;
  std::int64_t parameters = 0;          // how many, in the checkpoint
  Matrix embedding;                     // [V, H]
  Matrix head;                          // [V, H]; the embedding itself when tied
  std::span<const float> final_norm;    // [H], times the logits' scale
  std::vector<LayerWeights> layers;     // [L]
  std::shared_ptr<const void> storage;  // keeps every pointer above alive
  std::int64_t weight_bytes = 0;
  std::vector<std::string> notices;  // of what loading chose, for the user

  float embedding_scale() const {
    return format == WeightFormat::f32 ? config.embedding_scale : config.embedding_scale_bf16;
  }
  /// FFN weight bytes of one neuron: its rows of gate, up and down. Bricks have none such.
  std::int64_t neuron_bytes() const { return 3 * layers.front().gate.row_bytes(); }
  /// In bricks: whether any matrix of the layers has 8 bits for some inputs. Not so of int4, but for
  /// files of mixed types.
  bool layers_have_rests() const {
    return in_bricks(format) && std::ranges::any_of(layers, [](const LayerWeights& layer) {
             return std::ranges::any_of(
                 layer.in_bricks(), [](const Matrix* m) { return m->kind == BrickKind::graded; });
           });
  }
  /// FFN weight bytes of a layer that a dense decode step reads.
  std::int64_t ffn_bytes() const {
    const LayerWeights& layer = layers.front();
    return in_bricks(format) ? layer.gate_up.read_bytes() + layer.down.read_bytes()
                             : config.intermediate_size * neuron_bytes();
  }
};

/// What the int4 matrices of a layer, LayerWeights::in_bricks(), are rounded by.
using LayerFactors = std::vector<InputFactor>;

/// Converts a checkpoint to engine layout, or maps it if it is packed. Throws CheckpointError for
/// missing tensors, wrong shapes and values that are not finite, OptionError if packed weights have
/// another format than requested. `progress` counts bytes written.
/// factors_of(layer), if given, is called for one layer after the other; OptionError if no matrix
/// is rounded to int4.
std::shared_ptr<const Model> load_model(
    const Checkpoint& checkpoint, WeightFormat format, int threads, const Progress& progress = {},
    const std::function<LayerFactors(std::int64_t layer)>& factors_of = {});

}  // namespace tda
