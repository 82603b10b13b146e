// The model once more, in doubles and plain loops: the reference for the backends.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <vector>

#include "backend/backend.h"
#include "backend/rope.h"
#include "base/half.h"
#include "cpu/key_scales.h"
#include "model/forward.h"
#include "random_model.h"

namespace naive {

using tda::Activation;
using tda::KvFormat;

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

/// A session: the backend's verbs under the same names; all vectors are [T][n].
struct Session {
  std::shared_ptr<const Model> model;
  KvFormat kv = KvFormat::f32;
  std::vector<std::vector<Vector>> keys, values_;  // [L][position]
  std::vector<std::vector<std::int32_t>> masks;    // [L]
  std::vector<tda::InputThresholds> inputs;        // [L] of sparse steps with graded weights
  bool rounds = false;  // a step of several tokens and bf16 weights rounds activations to bf16
  Step step;
  std::vector<Vector> x, queries, attended, hidden;

  Session(std::shared_ptr<const Model> m, KvFormat kv_format) : model(std::move(m)), kv(kv_format) {
    const std::int64_t layers = model->config.num_layers;
    keys.resize(layers);
    values_.resize(layers);
    masks.resize(layers);
    inputs.resize(layers);
    for (auto& mask : masks) {
      mask.resize(model->config.intermediate_size);
      std::iota(mask.begin(), mask.end(), 0);
    }
  }

  bool rounds_step() const {
    return rounds && model->format == WeightFormat::bf16 && step.tokens.size() > 1;
  }
  double rounded(double v) const {
    return rounds_step() ? tda::bf16_to_f32(tda::f32_to_bf16(static_cast<float>(v))) : v;
  }
  Vector rounded(Vector in) const {
    for (double& v : in) v = rounded(v);
    return in;
  }

  static double capped(double v, double cap) { return cap > 0 ? cap * std::tanh(v / cap) : v; }

  double threshold(std::int64_t layer, tda::Product of) const {
    return step.ffn == FfnMode::sparse ? inputs[layer].of[static_cast<int>(of)] : 0;
  }

  /// Inputs of graded weights whose contribution is below the threshold use the high parts alone.
  static Vector product(const Matrix& w, const Vector& in, double threshold = 0) {
    Vector out(w.rows);
    for (std::int64_t r = 0; r < w.rows; ++r) {
      Vector row = values(w, r);
      if (threshold > 0 && w.bricks().has_rests()) {
        std::vector<float> high(w.cols);
        tda::dequantize_bricks(w.bricks(), r, 0, w.cols, high.data(), true);
        for (std::int64_t i = 0; i < w.cols; ++i)
          if (std::abs(in[i]) * w.bricks().rest_lengths[i] < threshold) row[i] = high[i];
      }
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

  void rotate(double* head, std::int64_t position, std::int64_t layer) const {
    const ModelConfig& c = model->config;
    const bool other = c.other_rope && c.uses_other_rope[layer];
    const tda::RopeConfig& rope = other ? *c.other_rope : c.rope;
    const auto frequencies = tda::rope_frequencies(rope, c.head_dim, step.sequence_length);
    const std::int64_t half = c.head_dim / 2;
    for (std::int64_t i = 0; i < half; ++i) {
      const double angle = static_cast<float>(position) * frequencies[i];
      const double cos = std::cos(angle) * rope.attention_factor;
      const double sin = std::sin(angle) * rope.attention_factor;
      const double a = head[i], b = head[i + half];
      head[i] = a * cos - b * sin;
      head[i + half] = b * cos + a * sin;
    }
  }

  /// Rounds heads of n keys or values as the cache stores them; int8 relative to the sizes of their
  /// channels, if there are any.
  void store(Vector& heads, std::int64_t n, const std::vector<float>& sizes = {}) const {
    for (std::size_t first = 0; first < heads.size(); first += n)
      for (std::int64_t group = 0; group < n; group += 32) {
        const std::int64_t end = std::min(n, group + 32);
        const auto size = [&](std::int64_t i) { return sizes.empty() ? 1 : sizes[first + i]; };
        double most = 0;
        for (std::int64_t i = group; i < end; ++i)
          most = std::max(most, std::abs(heads[first + i] / size(i)));
        const double step = tda::bf16_to_f32(tda::f32_to_bf16(static_cast<float>(most) / 127));
        for (std::int64_t i = group; i < end; ++i) {
          double& v = heads[first + i];
          const auto f = static_cast<float>(v);
          v = kv == KvFormat::f32    ? f
              : kv == KvFormat::bf16 ? tda::bf16_to_f32(tda::f32_to_bf16(f))
              : step > 0             ? std::nearbyint(v / size(i) / step) * step * size(i)
                                     : 0;
        }
      }
  }

  void begin(const Step& s) { step = s; }

  void embed() {
    x.clear();
    for (const Token token : step.tokens) {
      x.push_back(values(model->embedding, token));
      for (double& v : x.back()) v *= model->embedding_scale();
    }
  }

  void qkv(std::int64_t layer) {
    const ModelConfig& c = model->config;
    const LayerWeights& w = model->layers[layer];
    queries.clear();
    keys[layer].resize(step.position);
    values_[layer].resize(step.position);
    for (std::size_t t = 0; t < x.size(); ++t) {
      Vector out = product(w.qkv, rounded(normed(x[t], w.attention_norm)),
                           threshold(layer, tda::Product::qkv));
      for (std::size_t i = 0; i < w.qkv_bias.size(); ++i) out[i] += w.qkv_bias[i];
      const auto norm_in_place = [&](double* vector, std::span<const float> weight) {
        const Vector result = norm(vector, weight);
        std::copy(result.begin(), result.end(), vector);
      };
      if (c.qk_norm_of_all_heads) {
        norm_in_place(out.data(), w.q_norm);
        norm_in_place(out.data() + c.q_size(), w.k_norm);
      }
      for (std::int64_t head = 0; head < c.num_heads + c.num_kv_heads; ++head) {
        double* vector = out.data() + head * c.head_dim;
        if (c.qk_norm) norm_in_place(vector, head < c.num_heads ? w.q_norm : w.k_norm);
        rotate(vector, step.position + static_cast<std::int64_t>(t), layer);
      }
      const auto k = out.begin() + c.q_size(), v = k + c.kv_size();
      queries.emplace_back(out.begin(), k);
      keys[layer].emplace_back(k, v);
      values_[layer].emplace_back(v, out.end());
      store(keys[layer].back(), c.head_dim, tda::key_scales(c, w).queries);
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
          weights.push_back(std::exp(capped(score * c.attention_scale(), c.score_cap)));
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
      Vector out = product(w.output, rounded(attended[t]), threshold(layer, tda::Product::output));
      for (std::size_t i = 0; i < w.output_bias.size(); ++i) out[i] += w.output_bias[i];
      join(x[t], out, w.attention_post_norm);
    }
  }

  /// The input of attention or feed-forward, and what is done with the output.
  Vector normed(const Vector& v, std::span<const float> weight) const {
    return weight.empty() ? v : norm(v.data(), weight);
  }
  void join(Vector& residual, const Vector& out, std::span<const float> weight) const {
    const Vector added = normed(out, weight);
    for (std::size_t i = 0; i < added.size(); ++i)
      residual[i] += added[i] * model->config.residual_scale;
  }

  /// Gate and up of neuron j are rows j % 32 and 32 + j % 32 of strip j / 32.
  void ffn_bricks(std::int64_t layer) {
    const LayerWeights& w = model->layers[layer];
    hidden.assign(x.size(), Vector(w.down.cols));
    for (std::size_t t = 0; t < x.size(); ++t) {
      const Vector both =
          product(w.gate_up, normed(x[t], w.ffn_norm), threshold(layer, tda::Product::gate_up));
      for (std::int64_t j = 0; j < w.down.cols; ++j) {
        const std::int64_t row = j / 32 * 64 + j % 32;
        hidden[t][j] = activate(model->config.activation, both[row]) * both[row + 32];
      }
      const Vector out = product(w.down, hidden[t], threshold(layer, tda::Product::down));
      join(x[t], out, w.ffn_post_norm);
    }
  }

  void ffn(std::int64_t layer) {
    if (tda::in_bricks(model->format)) return ffn_bricks(layer);
    const LayerWeights& w = model->layers[layer];
    hidden.assign(x.size(), Vector(w.gate.rows));
    for (std::size_t t = 0; t < x.size(); ++t) {
      const bool masked = step.ffn == FfnMode::sparse;  // token by token, as in decode: not rounded
      const Vector exact = normed(x[t], w.ffn_norm), in = masked ? exact : rounded(exact);
      Vector out(x[t].size());
      const Vector gate = product(w.gate, in), up = product(w.up, in);
      for (std::int64_t j = 0; j < w.gate.rows; ++j)
        hidden[t][j] = activate(model->config.activation, gate[j]) * up[j];
      for (std::int64_t j = 0; j < w.gate.rows; ++j) {
        if (masked && !std::binary_search(masks[layer].begin(), masks[layer].end(), j)) continue;
        const Vector down = values(w.down, j);
        const double h = masked ? hidden[t][j] : rounded(hidden[t][j]);
        for (std::size_t i = 0; i < down.size(); ++i) out[i] += h * down[i];
      }
      join(x[t], out, w.ffn_post_norm);
    }
  }

  /// A token's logits; `alone`: in a call for its row only.
  Vector logits(std::int64_t t, bool alone = true) const {
    const Vector in = norm(x[t].data(), model->final_norm);
    const double least = step.ffn == FfnMode::sparse ? step.head_inputs : 0;
    Vector out = product(model->head, alone ? in : rounded(in), least);
    for (double& v : out) v = capped(v, model->config.logit_cap);
    return out;
  }
};

/// Runs a step; logits of its last `rows` tokens, [rows, V].
inline std::vector<float> run(const tda::Backend& backend, tda::State& state, const Step& step,
                              std::int64_t rows) {
  const auto logits = tda::forward(backend, state, step, rows);
  return {logits.begin(), logits.end()};
}

/// The same here, for the last token.
inline Vector run(Session& session, const Step& step) {
  session.begin(step);
  session.embed();
  for (std::int64_t l = 0; l < session.model->config.num_layers; ++l) {
    session.qkv(l);
    session.attention(l);
    session.attention_out(l);
    session.ffn(l);
  }
  return session.logits(std::ssize(step.tokens) - 1);
}

}  // namespace naive
