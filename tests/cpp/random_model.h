// Small models of random weights, and tokens to run them on.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "backend/backend.h"
#include "base/half.h"

namespace naive {

using tda::FfnMode;
using tda::LayerWeights;
using tda::Matrix;
using tda::Model;
using tda::ModelConfig;
using tda::Step;
using tda::Token;
using tda::WeightFormat;
using Vector = std::vector<double>;

inline std::vector<double> values(const Matrix& m, std::int64_t row) {
  std::vector<float> out(m.cols);
  tda::read_row(m, row, 0, m.cols, out.data());
  return {out.begin(), out.end()};
}

/// No size is a multiple of a vector's, on purpose.
inline ModelConfig small_config() {
  ModelConfig c;
  c.vocab_size = 101;
  c.hidden_size = 66;
  c.intermediate_size = 37;
  c.num_layers = 2;
  c.num_heads = 4;
  c.num_kv_heads = 2;
  c.head_dim = 10;
  c.rms_norm_eps = 0.05;  // large, so that it matters
  return c;
}

/// What Gemma 3 adds, the first layer with a sliding window.
inline void like_gemma3(ModelConfig& c) {
  c.qk_norm = c.post_norms = true;
  c.embedding_scale = c.embedding_scale_bf16 = 1.5f;
  c.score_scale = 0.25f;
  c.sliding_window = {4, 0};
  c.other_rope = tda::RopeConfig();
  c.other_rope->theta = 50;
  c.uses_other_rope = {true, false};
  c.activation = tda::Activation::gelu_tanh;
}

/// What Gemma 2 has instead: caps, small enough to matter.
inline void like_gemma2(ModelConfig& c) {
  c.post_norms = true;
  c.embedding_scale = c.embedding_scale_bf16 = 1.5f;
  c.sliding_window = {4, 0};
  c.score_cap = 0.7f;
  c.logit_cap = 1.3f;
  c.activation = tda::Activation::gelu_tanh;
}

/// What OLMo 2 has in place of Llama's norms.
inline void like_olmo2(ModelConfig& c) {
  c.pre_norms = false;
  c.post_norms = c.qk_norm_of_all_heads = true;
}

/// Granite's factors, and layers without RoPE, as in SmolLM3.
inline void like_granite(ModelConfig& c) {
  c.residual_scale = 0.5f;
  c.other_rope = tda::RopeConfig();
  c.other_rope->off = true;
  c.uses_other_rope = {false, true};
}

inline std::vector<Token> random_tokens(std::int64_t count, std::int64_t vocab_size) {
  std::vector<Token> tokens(count);
  std::uint32_t state = 12345;
  for (Token& token : tokens) {
    state = state * 1664525 + 1013904223;
    token = static_cast<Token>(state / 65536 % vocab_size);
  }
  return tokens;
}

inline Step step_of(tda::Tokens tokens, std::int64_t position, FfnMode ffn = FfnMode::dense) {
  return {tokens, position, position + static_cast<std::int64_t>(tokens.size()), ffn};
}

/// A model of the config's shape, with random weights scaled so that activations stay about 1.
class RandomModel {
 public:
  RandomModel(ModelConfig config, WeightFormat format, unsigned seed) : random_(seed) {
    config.sliding_window.resize(config.num_layers);
    auto model = std::make_shared<Model>();
    model->format = format;
    model->embedding = matrix(format, config.vocab_size, config.hidden_size, 1.0);
    model->head = config.tied_embeddings ? model->embedding
                                         : matrix(format, config.vocab_size, config.hidden_size, 0);
    model->final_norm = vector(config.hidden_size, 1, 0.2);
    for (std::int64_t l = 0; l < config.num_layers; ++l) {
      LayerWeights w;
      const std::int64_t qkv = config.q_size() + 2 * config.kv_size();
      if (config.pre_norms) w.attention_norm = vector(config.hidden_size, 1, 0.2);
      if (config.post_norms) w.attention_post_norm = vector(config.hidden_size, 1, 0.2);
      w.qkv = matrix(format, qkv, config.hidden_size, 0);
      if (config.qkv_bias) w.qkv_bias = vector(qkv, 0, 0.5);
      if (config.qk_norm) w.q_norm = vector(config.head_dim, 1, 0.3);
      if (config.qk_norm) w.k_norm = vector(config.head_dim, 1, 0.3);
      if (config.qk_norm_of_all_heads) w.q_norm = vector(config.q_size(), 1, 0.3);
      if (config.qk_norm_of_all_heads) w.k_norm = vector(config.kv_size(), 1, 0.3);
      w.output = matrix(format, config.hidden_size, config.q_size(), 0);
      if (config.output_bias) w.output_bias = vector(config.hidden_size, 0, 0.5);
      if (config.pre_norms) w.ffn_norm = vector(config.hidden_size, 1, 0.2);
      if (config.post_norms) w.ffn_post_norm = vector(config.hidden_size, 1, 0.2);
      const double down = 2 / std::sqrt(static_cast<double>(config.intermediate_size));
      if (tda::in_bricks(format)) {
        const std::int64_t neurons = config.intermediate_size, padded = (neurons + 31) / 32 * 32;
        w.gate_up = matrix(format, 2 * padded, config.hidden_size, 0, neurons);
        w.down = matrix(format, config.hidden_size, neurons, down, 0, true);
        w.down_lengths = keep(column_lengths(w.down));
        model->layers.push_back(w);
        continue;
      }
      w.gate = matrix(format, config.intermediate_size, config.hidden_size, 0);
      w.up = matrix(format, config.intermediate_size, config.hidden_size, 0);
      w.down = matrix(format, config.intermediate_size, config.hidden_size, down);
      if (format == WeightFormat::int8) add_outliers(w, {0, config.intermediate_size / 2});
      std::vector<float> lengths;
      for (std::int64_t j = 0; j < config.intermediate_size; ++j) {
        const Vector row = values(w.down, j);
        lengths.push_back(std::sqrt(std::inner_product(row.begin(), row.end(), row.begin(), 0.0)));
      }
      w.down_lengths = keep(lengths);
      model->layers.push_back(w);
    }
    model->config = std::move(config);
    model_ = std::move(model);
  }

  std::shared_ptr<const Model> get() const { return model_; }

  /// Fills a row with NaN.
  static void poison(const Matrix& m, std::int64_t row) {
    std::memset(const_cast<std::byte*>(m.row(row)), 0xff, m.row_bytes());
  }

 private:
  std::span<float> keep(const std::vector<float>& data) {
    const std::size_t size = (data.size() * 4 + 63) / 64 * 64;
    const std::shared_ptr<void> memory(std::aligned_alloc(64, size), std::free);
    std::memcpy(memory.get(), data.data(), data.size() * 4);
    memory_.push_back(memory);
    return {static_cast<float*>(memory.get()), data.size()};
  }
  std::span<const float> vector(std::int64_t n, double mean, double deviation) {
    std::vector<float> data(n);
    std::normal_distribution<double> normal(mean, deviation);
    for (float& v : data) v = static_cast<float>(normal(random_));
    return keep(data);
  }
  /// deviation: 0 means 1 / sqrt(cols). In bricks: rows of gate and up in turn have so many `neurons`,
  /// and zeros past them.
  Matrix matrix(WeightFormat format, std::int64_t rows, std::int64_t cols, double deviation,
                std::int64_t neurons = 0, bool by_block = false) {
    if (deviation == 0) deviation = 1 / std::sqrt(static_cast<double>(cols));
    const std::span<const float> data = vector(rows * cols, 0, deviation);
    Matrix m{format, rows, cols, reinterpret_cast<const std::byte*>(data.data())};
    m.by_block = by_block;
    if (format == WeightFormat::int4)  // both kinds
      m.kind = rows % 4 < 2 ? tda::BrickKind::int4 : tda::BrickKind::lines;
    if (tda::in_bricks(format)) quantize(m, data, static_cast<float>(30 * deviation), neurons);
    if (format == WeightFormat::int8) {
      m.data =
          reinterpret_cast<std::byte*>(keep(std::vector<float>(rows * m.row_bytes() / 4)).data());
      for (std::int64_t r = 0; r < rows; ++r)
        tda::quantize_int8(data.data() + r * cols, cols, const_cast<std::byte*>(m.row(r)));
    }
    if (format == WeightFormat::bf16) {  // in place, front to back
      auto* halves = reinterpret_cast<std::byte*>(const_cast<float*>(data.data()));
      for (std::size_t i = 0; i < data.size(); ++i) {
        const std::uint16_t half = tda::f32_to_bf16(data[i]);
        std::memcpy(halves + 2 * i, &half, 2);
      }
    }
    return m;
  }

  static std::vector<float> column_lengths(const Matrix& m) {
    Vector squares(m.cols);
    for (std::int64_t r = 0; r < m.rows; ++r) {
      const Vector row = values(m, r);
      for (std::int64_t i = 0; i < m.cols; ++i) squares[i] += row[i] * row[i];
    }
    for (double& v : squares) v = std::sqrt(v);
    return {squares.begin(), squares.end()};
  }

  /// Stores the values in bricks, with an outlier in every strip.
  void quantize(Matrix& m, std::span<const float> data, float outlier, std::int64_t neurons) {
    m.data = reinterpret_cast<std::byte*>(keep(std::vector<float>(m.bytes() / 4)).data());
    const tda::Bricks to = m.bricks();
    const std::int64_t stride = 32 * to.blocks;
    for (std::int64_t s = 0; s < to.strips; ++s) {
      std::vector<float> strip(64 * stride);
      const std::int64_t rows = std::min<std::int64_t>(64, m.rows - 64 * s);
      for (std::int64_t r = 0; r < rows; ++r)
        if (neurons == 0 || 32 * s + r % 32 < neurons)
          std::copy_n(data.data() + (64 * s + r) * m.cols, m.cols, strip.data() + r * stride);
      strip[s % std::min<std::int64_t>(rows, 5) * stride + (s * 31 + m.cols / 2) % m.cols] =
          outlier;
      tda::quantize_bricks(to, s, strip.data());
    }
    if (to.has_rests()) tda::measure_rests(to, 0, to.blocks);
  }

  /// Gives each of these neurons' down rows an outlier, which is stored apart.
  void add_outliers(LayerWeights& w, const std::vector<std::int64_t>& neurons) {
    Matrix& m = w.down;
    const std::vector<float> none(2 * m.rows);
    auto* const outliers = reinterpret_cast<tda::Outlier*>(keep(none).data());
    for (const std::int64_t j : neurons) {
      std::vector<float> row(m.cols);
      tda::read_row(m, j, 0, m.cols, row.data());
      const std::int64_t column = (j + 37) % m.cols;
      row[column] = 0;
      tda::quantize_int8(row.data(), m.cols, const_cast<std::byte*>(m.row(j)));
      outliers[j] = {static_cast<std::int32_t>(column), j % 2 == 0 ? 9.0f : -9.0f};
      w.outlier_neurons.push_back(static_cast<std::int32_t>(j));
    }
    m.outliers = outliers;
  }

  std::mt19937 random_;
  std::vector<std::shared_ptr<void>> memory_;
  std::shared_ptr<const Model> model_;
};

}  // namespace naive
