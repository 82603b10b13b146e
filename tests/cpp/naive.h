// The model once more, in doubles and plain loops, as what a backend is measured against; and small
// random models to measure it on.
#pragma once

#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "backend/backend.h"
#include "base/half.h"
#include "backend/rope.h"

namespace naive {

using tda::Activation;
using tda::FfnMode;
using tda::KvFormat;
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

/// Awkward on purpose: no size is a multiple of a vector.
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

/// A model of the config's shape with random weights, such that activations stay about 1.
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
      w.attention_norm = vector(config.hidden_size, 1, 0.2);
      w.qkv = matrix(format, qkv, config.hidden_size, 0);
      if (config.qkv_bias) w.qkv_bias = vector(qkv, 0, 0.5);
      if (config.qk_norm) w.q_norm = vector(config.head_dim, 1, 0.3);
      if (config.qk_norm) w.k_norm = vector(config.head_dim, 1, 0.3);
      w.output = matrix(format, config.hidden_size, config.q_size(), 0);
      if (config.output_bias) w.output_bias = vector(config.hidden_size, 0, 0.5);
      w.ffn_norm = vector(config.hidden_size, 1, 0.2);
      w.gate = matrix(format, config.intermediate_size, config.hidden_size, 0);
      w.up = matrix(format, config.intermediate_size, config.hidden_size, 0);
      w.down = matrix(format, config.intermediate_size, config.hidden_size,
                      2 / std::sqrt(static_cast<double>(config.intermediate_size)));
      if (format == WeightFormat::int8) set_apart(w, {0, config.intermediate_size / 2});
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
  /// `deviation` 0: 1 / sqrt(cols).
  Matrix matrix(WeightFormat format, std::int64_t rows, std::int64_t cols, double deviation) {
    if (deviation == 0) deviation = 1 / std::sqrt(static_cast<double>(cols));
    const std::span<const float> data = vector(rows * cols, 0, deviation);
    Matrix m{format, rows, cols, reinterpret_cast<const std::byte*>(data.data())};
    if (format == WeightFormat::int8) {
      m.data =
          reinterpret_cast<std::byte*>(keep(std::vector<float>(rows * m.row_bytes() / 4)).data());
      m.low = reinterpret_cast<std::byte*>(
          keep(std::vector<float>(rows * m.low_row_bytes() / 4)).data());
      for (std::int64_t r = 0; r < rows; ++r)
        tda::quantize_int8(data.data() + r * cols, cols, const_cast<std::byte*>(m.row(r)),
                           const_cast<std::byte*>(m.low_row(r)));
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

  /// Gives the down rows of some neurons an outlier.
  void set_apart(LayerWeights& w, const std::vector<std::int64_t>& neurons) {
    Matrix& m = w.down;
    const std::vector<float> none(2 * m.rows);
    auto* const outliers = reinterpret_cast<tda::Outlier*>(keep(none).data());
    for (const std::int64_t j : neurons) {
      std::vector<float> row(m.cols);
      tda::read_row(m, j, 0, m.cols, row.data());
      const std::int64_t column = (j + 37) % m.cols;
      row[column] = 0;
      tda::quantize_int8(row.data(), m.cols, const_cast<std::byte*>(m.row(j)),
                         const_cast<std::byte*>(m.low_row(j)));
      outliers[j] = {static_cast<std::int32_t>(column), j % 2 == 0 ? 9.0f : -9.0f};
      w.outlier_neurons.push_back(static_cast<std::int32_t>(j));
    }
    m.outliers = outliers;
  }

  std::mt19937 random_;
  std::vector<std::shared_ptr<void>> memory_;
  std::shared_ptr<const Model> model_;
};

inline double activate(Activation activation, double x) {
  switch (activation) {
    case Activation::silu:
      return x / (1 + std::exp(-x));
    case Activation::gelu:
      return x / 2 * std::erfc(-x / std::sqrt(2.0));
    case Activation::gelu_tanh:
      return x / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::relu:
      return x > 0 ? x : 0;
  }
  return NAN;
}

/// A session: the backend's verbs under the same names, all vectors [T][n].
struct Session {
  std::shared_ptr<const Model> model;
  KvFormat kv = KvFormat::f32;
  std::vector<std::vector<Vector>> keys, values_;  // [L][position]
  std::vector<std::vector<std::int32_t>> masks;    // [L]
  bool rounds = false;  // several tokens times a bf16 matrix: they are rounded to bf16
  Step step;
  std::vector<Vector> x, queries, attended, hidden;

  Session(std::shared_ptr<const Model> m, KvFormat kv_format) : model(std::move(m)), kv(kv_format) {
    const std::int64_t layers = model->config.num_layers;
    keys.resize(layers);
    values_.resize(layers);
    masks.resize(layers);
    for (auto& mask : masks) {
      mask.resize(model->config.intermediate_size);
      std::iota(mask.begin(), mask.end(), 0);
    }
  }

  bool rounds_step() const {
    return rounds && model->format == WeightFormat::bf16 && step.tokens.size() > 1;
  }
  double taken(double v) const {
    return rounds_step() ? tda::bf16_to_f32(tda::f32_to_bf16(static_cast<float>(v))) : v;
  }
  Vector taken(Vector in) const {
    for (double& v : in) v = taken(v);
    return in;
  }

  static Vector product(const Matrix& w, const Vector& in) {
    Vector out(w.rows);
    for (std::int64_t r = 0; r < w.rows; ++r) {
      const Vector row = values(w, r);
      out[r] = std::inner_product(row.begin(), row.end(), in.begin(), 0.0);
    }
    return out;
  }

  Vector norm(const double* in, std::span<const float> weight) const {
    double squares = 0;
    for (std::size_t i = 0; i < weight.size(); ++i) squares += in[i] * in[i];
    const double scale = 1 / std::sqrt(squares / weight.size() + model->config.rms_norm_eps);
    Vector out(weight.size());
    for (std::size_t i = 0; i < weight.size(); ++i) out[i] = in[i] * scale * weight[i];
    return out;
  }

  void rotate(double* head, std::int64_t position) const {
    const ModelConfig& c = model->config;
    const auto frequencies = tda::rope_frequencies(c.rope, c.head_dim, step.sequence_length);
    const std::int64_t half = c.head_dim / 2;
    for (std::int64_t i = 0; i < half; ++i) {
      const double angle = static_cast<float>(position) * frequencies[i];
      const double cos = std::cos(angle) * c.rope.attention_factor;
      const double sin = std::sin(angle) * c.rope.attention_factor;
      const double a = head[i], b = head[i + half];
      head[i] = a * cos - b * sin;
      head[i + half] = b * cos + a * sin;
    }
  }

  /// Heads of n keys or values as the cache keeps them.
  void store(Vector& heads, std::int64_t n) const {
    for (std::size_t first = 0; first < heads.size(); first += n) {
      double most = 0;
      for (std::int64_t i = 0; i < n; ++i) most = std::max(most, std::abs(heads[first + i]));
      for (std::int64_t i = 0; i < n; ++i) {
        double& v = heads[first + i];
        const auto f = static_cast<float>(v);
        v = kv == KvFormat::f32    ? f
            : kv == KvFormat::bf16 ? tda::bf16_to_f32(tda::f32_to_bf16(f))
            : most > 0             ? std::nearbyint(v / most * 127) * most / 127
                                   : 0;
      }
    }
  }

  void begin(const Step& s) { step = s; }

  void embed() {
    x.clear();
    for (const Token token : step.tokens) x.push_back(values(model->embedding, token));
  }

  void qkv(std::int64_t layer) {
    const ModelConfig& c = model->config;
    const LayerWeights& w = model->layers[layer];
    queries.clear();
    keys[layer].resize(step.position);
    values_[layer].resize(step.position);
    for (std::size_t t = 0; t < x.size(); ++t) {
      Vector out = product(w.qkv, taken(norm(x[t].data(), w.attention_norm)));
      for (std::size_t i = 0; i < w.qkv_bias.size(); ++i) out[i] += w.qkv_bias[i];
      for (std::int64_t head = 0; head < c.num_heads + c.num_kv_heads; ++head) {
        double* vector = out.data() + head * c.head_dim;
        const auto weight = head < c.num_heads ? w.q_norm : w.k_norm;
        if (!weight.empty()) {
          const Vector normed = norm(vector, weight);
          std::copy(normed.begin(), normed.end(), vector);
        }
        rotate(vector, step.position + static_cast<std::int64_t>(t));
      }
      const auto k = out.begin() + c.q_size(), v = k + c.kv_size();
      queries.emplace_back(out.begin(), k);
      keys[layer].emplace_back(k, v);
      values_[layer].emplace_back(v, out.end());
      store(keys[layer].back(), c.head_dim);
      store(values_[layer].back(), c.head_dim);
    }
  }

  void attention(std::int64_t layer) {
    const ModelConfig& c = model->config;
    attended.assign(x.size(), Vector(c.q_size()));
    for (std::size_t t = 0; t < x.size(); ++t)
      for (std::int64_t head = 0; head < c.num_heads; ++head) {
        const std::int64_t last = step.position + static_cast<std::int64_t>(t);
        const std::int64_t window = c.sliding_window[layer];
        const std::int64_t first = window > 0 ? std::max<std::int64_t>(0, last - window + 1) : 0;
        const std::int64_t q = head * c.head_dim;
        const std::int64_t kv_at = head / (c.num_heads / c.num_kv_heads) * c.head_dim;
        Vector weights;
        double total = 0;
        for (std::int64_t p = first; p <= last; ++p) {
          double score = 0;
          for (std::int64_t i = 0; i < c.head_dim; ++i)
            score += queries[t][q + i] * keys[layer][p][kv_at + i];
          weights.push_back(std::exp(score / std::sqrt(static_cast<double>(c.head_dim))));
          total += weights.back();
        }
        for (std::int64_t p = first; p <= last; ++p)
          for (std::int64_t i = 0; i < c.head_dim; ++i)
            attended[t][q + i] += weights[p - first] / total * values_[layer][p][kv_at + i];
      }
  }

  void attention_out(std::int64_t layer) {
    const LayerWeights& w = model->layers[layer];
    for (std::size_t t = 0; t < x.size(); ++t) {
      const Vector out = product(w.output, taken(attended[t]));
      for (std::size_t i = 0; i < out.size(); ++i)
        x[t][i] += out[i] + (w.output_bias.empty() ? 0 : w.output_bias[i]);
    }
  }

  void ffn(std::int64_t layer) {
    const LayerWeights& w = model->layers[layer];
    hidden.assign(x.size(), Vector(w.gate.rows));
    for (std::size_t t = 0; t < x.size(); ++t) {
      const bool masked = step.ffn == FfnMode::sparse;  // by rows, as decode
      const Vector normed = norm(x[t].data(), w.ffn_norm), in = masked ? normed : taken(normed);
      const Vector gate = product(w.gate, in), up = product(w.up, in);
      for (std::int64_t j = 0; j < w.gate.rows; ++j)
        hidden[t][j] = activate(model->config.activation, gate[j]) * up[j];
      for (std::int64_t j = 0; j < w.gate.rows; ++j) {
        if (masked && !std::binary_search(masks[layer].begin(), masks[layer].end(), j)) continue;
        const Vector down = values(w.down, j);
        const double h = masked ? hidden[t][j] : taken(hidden[t][j]);
        for (std::size_t i = 0; i < down.size(); ++i) x[t][i] += h * down[i];
      }
    }
  }

  /// A token's logits, asked for alone or with others'.
  Vector logits(std::int64_t t, bool alone = true) const {
    const Vector in = norm(x[t].data(), model->final_norm);
    return product(model->head, alone ? in : taken(in));
  }
};

}  // namespace naive
