// The feed-forward network of int8 weights in decode: all neurons, and the selection of neurons by
// their contributions or their gates.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/isa.h"
#include "int8_rows.h"
#include "kernel_tests.h"
#include "naive.h"

using namespace tda;
using namespace int8_rows;

namespace {

/// sum of h * row in doubles, and the error bound of kernels that quantise h * scale: half a unit
/// of 1/127/256 of the batch's largest |h * row's step|, and a little for the rounding of that.
struct Sum {
  const Stored& w;
  bool rounds;
  naive::Vector value, bound;
  double variance = 0;  // of all elements' errors, where each rounding is uniform within its bound

  Sum(const Stored& stored, const Kernels& kernels)
      : w(stored),
        rounds(multiply_bytes(kernels)),
        value(w.matrix.cols),
        bound(w.matrix.cols, 1e-4 * std::sqrt(static_cast<double>(w.matrix.cols))) {}

  /// Rows in the order of the kernel.
  void add(const std::vector<std::pair<std::int64_t, double>>& rows) {
    const std::int64_t n = w.matrix.cols;
    for (std::size_t first = 0; first < rows.size(); first += 16) {
      const std::size_t end = std::min(rows.size(), first + 16);
      double most = 0;
      for (std::size_t i = first; i < end; ++i)
        most = std::max(most, std::abs(rows[i].second * step_of(w, rows[i].first)));
      for (std::size_t i = first; i < end; ++i)
        for (std::int64_t e = 0; e < n; ++e) {
          const double stored = w.values[rows[i].first * n + e];
          value[e] += rows[i].second * stored;
          const double scale = scale_of(w, rows[i].first, e / static_cast<std::int64_t>(kPart));
          if (!rounds || stored == 0) continue;
          const double unit = std::abs(stored / scale) * most / 128;
          bound[e] += 0.51 * unit;
          variance += unit * unit / 12;
        }
    }
  }
  void check(const std::vector<float>& y) const {
    double error = 0, size = 0;
    for (std::int64_t e = 0; e < w.matrix.cols; ++e) {
      CHECK_NEAR(y[e], value[e], bound[e]);
      error += (y[e] - value[e]) * (y[e] - value[e]);
      size += value[e] * value[e];
    }
    // Elements that share a scale share their roundings: of 45 there are two kinds.
    CHECK(error <= 8 * variance + 1e-8 * size + 1e-12);
  }
};

/// A layer of random neurons and one input.
struct Layer {
  static constexpr std::int64_t kNeurons = 70;
  std::int64_t n;
  Stored gate, up, down;
  std::vector<float> x, lengths;
  std::vector<double> rounded_x;
  std::vector<std::int32_t> ids;

  Layer(std::int64_t length, const Kernels& kernels)
      : n(length), gate(kNeurons, n), up(kNeurons, n), down(kNeurons, n), x(random_floats(n)) {
    rounded_x = rounded(x, kernels);
    for (float& v : x) v /= std::sqrt(static_cast<float>(n));
    for (double& v : rounded_x) v /= std::sqrt(static_cast<double>(n));
    for (std::int64_t j = 0; j < kNeurons; ++j) lengths.push_back(0.5f + 0.01f * j);
    for (std::int32_t j = 0; j < kNeurons; j += 1 + j % 2) ids.push_back(j);  // not all
  }
  NeuronRows rows() const { return {gate.rows(), up.rows(), down.rows()}; }
  std::int64_t groups() const { return groups_of(n) * kGroup; }

  double activated(const std::vector<float>& w, std::int64_t j) const {
    return naive::activate(Activation::silu, dot(w.data() + j * n, rounded_x));
  }
  double h(std::int64_t j) const {
    return activated(gate.values, j) * dot(up.values.data() + j * n, rounded_x);
  }
};

}  // namespace

TEST(int8_ffn_fused_matches_doubles) {
  for_all_kernels([](const Kernels& kernels) {
    for (const std::int64_t n : {45, 130, 576}) {
      const Layer layer(n, kernels);
      const auto p = prepared(row_kernels(kernels, WeightFormat::int8), layer.x);
      for (const std::int64_t count : {std::int64_t{1}, std::int64_t{17}, std::ssize(layer.ids)}) {
        std::vector<float> h(count + 1, 3), y(layer.groups() + 1, 3);
        row_kernels(kernels, WeightFormat::int8)
            .ffn_fused(layer.rows(), Activation::silu, {layer.ids.data(), count}, p.data(),
                       h.data(), y.data());
        std::vector<std::pair<std::int64_t, double>> all;
        for (std::int64_t i = 0; i < count; ++i) {
          const std::int64_t j = layer.ids[i];
          CHECK_NEAR(h[i], layer.h(j), 1e-5 * n);
          all.emplace_back(j, layer.h(j));
        }
        Sum expected(layer.down, kernels);
        expected.add(all);
        expected.check(y);
        CHECK(h[count] == 3 && y[layer.groups()] == 3);
      }
    }
  });
}

TEST(int8_ffn_of_several_equals_ffn_fused) {
  constexpr std::int64_t kMost = Vectors::kMost;
  for_all_kernels([](const Kernels& all) {
    const RowKernels& kernels = row_kernels(all, WeightFormat::int8);
    for (const std::int64_t n : {45, 576, 2112}) {
      const Layer layer(n, all);
      std::vector<std::int32_t> every(Layer::kNeurons);
      std::iota(every.begin(), every.end(), 0);
      for (const auto& ids : {every, layer.ids})
        for (const std::int64_t count : {1, 2, 3, 5, 8, 16}) {
          const NeuronIds some = {ids.data(), std::ssize(ids)};
          std::vector<AlignedBytes> x;
          std::vector<std::vector<float>> h(kMost, std::vector<float>(some.count + 1, 3));
          std::vector<std::vector<float>> y(kMost, std::vector<float>(layer.groups() + 1, 3));
          auto h_alone = h, y_alone = y;
          const void* inputs[kMost];
          float *hs[kMost], *ys[kMost];
          for (std::int64_t v = 0; v < count; ++v) {
            x.push_back(prepared(kernels, random_floats(n, 0.1f)));
            inputs[v] = x[v].data(), hs[v] = h[v].data(), ys[v] = y[v].data();
            kernels.ffn_fused(layer.rows(), Activation::silu, some, inputs[v], h_alone[v].data(),
                              y_alone[v].data());
          }
          kernels.ffn_each(layer.rows(), Activation::silu, some, {count, inputs, ys, hs});
          CHECK(h == h_alone);
          CHECK(y == y_alone);
        }
    }
  });
}

TEST(selection_drops_like_doubles) {
  for_all_kernels([](const Kernels& kernels) {
    for (const std::int64_t n : {45, 576}) {
      const Layer layer(n, kernels);
      const auto count = std::ssize(layer.ids);
      const auto p = prepared(row_kernels(kernels, WeightFormat::int8), layer.x);
      std::vector<double> sorted;
      for (const std::int32_t j : layer.ids)
        sorted.push_back(std::abs(layer.h(j)) * layer.lengths[j]);
      const std::vector<double> contributions = sorted;
      std::sort(sorted.begin(), sorted.end());
      const auto between = [&](std::int64_t i) {  // a threshold with i contributions below it
        return i == 0       ? 0.0f
               : i == count ? std::numeric_limits<float>::infinity()
                            : static_cast<float>((sorted[i - 1] + sorted[i]) / 2);
      };
      for (const std::int64_t dropped : {std::int64_t{0}, std::int64_t{9}, count - 1, count}) {
        const float threshold = between(dropped);
        std::vector<float> h(count + 1, 3), y(layer.groups() + 1, 3);
        const std::int64_t selected =
            row_kernels(kernels, WeightFormat::int8)
                .ffn_selected(layer.rows(), Activation::silu,
                              {threshold, false, layer.lengths.data()}, {layer.ids.data(), count},
                              p.data(), h.data(), y.data());
        CHECK(selected == count - dropped);
        std::vector<std::pair<std::int64_t, double>> kept;
        for (std::int64_t i = 0; i < count; ++i) {
          const std::int64_t j = layer.ids[i];
          if (contributions[i] < threshold) {
            CHECK(h[i] == 0);
            continue;
          }
          CHECK_NEAR(h[i], layer.h(j), 1e-5 * n);
          kept.emplace_back(j, layer.h(j));
        }
        Sum expected(layer.down, kernels);
        expected.add(kept);
        expected.check(y);
        CHECK(h[count] == 3 && y[layer.groups()] == 3);
      }
    }
  });
}

TEST(selection_with_a_threshold_of_zero_is_dense_to_the_bit) {
  for_all_kernels([](const Kernels& kernels) {
    for (const std::int64_t n : {45, 576}) {
      const Layer layer(n, kernels);
      const auto count = std::ssize(layer.ids);
      const auto p = prepared(row_kernels(kernels, WeightFormat::int8), layer.x);
      std::vector<float> h(count), y(layer.groups()), dense_h(count), dense_y(layer.groups());
      row_kernels(kernels, WeightFormat::int8)
          .ffn_fused(layer.rows(), Activation::silu, {layer.ids.data(), count}, p.data(),
                     dense_h.data(), dense_y.data());
      for (const bool by_gate : {false, true}) {
        row_kernels(kernels, WeightFormat::int8)
            .ffn_selected(layer.rows(), Activation::silu, {0, by_gate, layer.lengths.data()},
                          {layer.ids.data(), count}, p.data(), h.data(), y.data());
        CHECK(h == dense_h);
        CHECK(y == dense_y);
      }
    }
  });
}

TEST(selection_by_gate_matches_doubles) {
  for_all_kernels([](const Kernels& kernels) {
    const std::int64_t n = 130;
    const Layer layer(n, kernels);
    const auto count = std::ssize(layer.ids);
    const auto p = prepared(row_kernels(kernels, WeightFormat::int8), layer.x);
    const float threshold = 0.2f;
    std::vector<float> h(count), y(layer.groups());
    const std::int64_t selected =
        row_kernels(kernels, WeightFormat::int8)
            .ffn_selected(layer.rows(), Activation::silu, {threshold, true, nullptr},
                          {layer.ids.data(), count}, p.data(), h.data(), y.data());
    std::vector<std::pair<std::int64_t, double>> open;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t j = layer.ids[i];
      if (std::abs(layer.activated(layer.gate.values, j)) < threshold) {
        CHECK(h[i] == 0);
        continue;
      }
      open.emplace_back(j, layer.h(j));
    }
    CHECK(open.size() > 3 && std::ssize(open) < count - 3);
    CHECK(selected == std::ssize(open));
    Sum expected(layer.down, kernels);
    expected.add(open);
    expected.check(y);
  });
}

TEST(selection_keeps_what_is_not_a_number) {
  for_all_kernels([](const Kernels& kernels) {
    const Layer layer(64, kernels);
    auto lengths = layer.lengths;
    lengths[layer.ids[5]] = NAN;
    const auto count = std::ssize(layer.ids);
    const auto p = prepared(row_kernels(kernels, WeightFormat::int8), layer.x);
    std::vector<float> h(count), y(layer.groups());
    const float all = std::numeric_limits<float>::infinity();
    const std::int64_t selected =
        row_kernels(kernels, WeightFormat::int8)
            .ffn_selected(layer.rows(), Activation::silu, {all, false, lengths.data()},
                          {layer.ids.data(), count}, p.data(), h.data(), y.data());
    CHECK(selected == 1);
    CHECK(h[5] != 0);
  });
}

int main() { return run_tests(); }
