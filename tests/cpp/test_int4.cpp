// int4 weights: rounding, and the kernels of all instruction sets against doubles.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "check.h"
#include "cpu/isa.h"
#include "kernel_tests.h"
#include "naive.h"

using namespace tda;

namespace {

constexpr std::int64_t kSixteen = 16;
constexpr std::int64_t kLengths[] = {1, 15, 16, 17, 64, 65, 130, 576, 1100};

/// An int4 matrix, rows `gap` bytes apart, and its values.
struct Stored {
  std::vector<std::byte> memory;
  Matrix matrix;
  std::vector<float> values;

  Stored(std::int64_t rows, std::int64_t n, const std::vector<float>& source, std::int64_t gap = 0)
      : values(rows * n) {
    matrix = {WeightFormat::int4, rows, n};
    matrix.gap = gap;
    memory.assign(rows * (matrix.row_bytes() + gap), std::byte{0xff});
    matrix.data = memory.data();
    for (std::int64_t r = 0; r < rows; ++r) {
      quantize_int4(source.data() + r * n, n, const_cast<std::byte*>(matrix.row(r)));
      read_row(matrix, r, 0, n, values.data() + r * n);
    }
  }
  Stored(std::int64_t rows, std::int64_t n) : Stored(rows, n, random_floats(rows * n), 48) {}
  Rows rows(std::int64_t first = 0) const {
    return {matrix.row(first), nullptr, matrix.cols, matrix.stride()};
  }
  const std::byte* scales(std::int64_t row) const {
    return matrix.row(row) + low_row_bytes(matrix.cols);
  }
  float step(std::int64_t row) const {
    float step;
    std::memcpy(&step, scales(row) + groups_of(matrix.cols) * kInt4Scales, 4);
    return step;
  }
  double scale(std::int64_t row, std::int64_t part) const {
    return double{step(row)} * static_cast<std::int8_t>(scales(row)[part]);
  }
  double dot(std::int64_t row, const std::vector<double>& x) const {
    return std::inner_product(x.begin(), x.end(), values.begin() + row * matrix.cols, 0.0);
  }
};

/// x as kernels quantise it: groups of 16 rounded to multiples of their largest value / 127.
std::vector<double> rounded(const std::vector<float>& x) {
  std::vector<double> out;
  for (std::size_t g = 0; g < x.size(); g += kSixteen) {
    const std::size_t end = std::min<std::size_t>(x.size(), g + kSixteen);
    double largest = 0;
    for (std::size_t i = g; i < end; ++i) largest = std::max(largest, std::abs(double{x[i]}));
    for (std::size_t i = g; i < end; ++i)
      out.push_back(largest > 0 ? std::nearbyint(x[i] * (127 / largest)) * largest / 127 : 0);
  }
  return out;
}

/// body(kernels, those of int4 rows) for each instruction set.
template <class Body>
void for_all_int4_kernels(const Body& body) {
  for_all_kernels([&](const Kernels& all) { body(all, row_kernels(all, WeightFormat::int4)); });
}

/// Random neurons, an input, and their gates and h for it.
struct Layer {
  static constexpr std::int64_t kNeurons = 70;
  std::int64_t n;
  Stored gate, up, down;
  std::vector<float> x, lengths;
  std::vector<std::int32_t> ids;
  std::vector<double> gates, h;  // per id

  explicit Layer(std::int64_t length)
      : n(length),
        gate(kNeurons, n),
        up(kNeurons, n),
        down(kNeurons, n),
        x(random_floats(n, 1 / std::sqrt(static_cast<float>(n)))) {
    const std::vector<double> in = rounded(x);
    for (std::int32_t j = 0; j < kNeurons; ++j) {
      lengths.push_back(0.5f + 0.01f * j);
      if (j % 3 == 2) continue;  // not all
      ids.push_back(j);
      gates.push_back(naive::activate(Activation::silu, gate.dot(j, in)));
      h.push_back(gates.back() * up.dot(j, in));
    }
  }
  NeuronRows rows() const { return {gate.rows(), up.rows(), down.rows()}; }
  std::int64_t count() const { return std::ssize(ids); }
  std::int64_t room() const { return groups_of(n) * kGroup; }

  /// Checks h and y of the first `some` neurons, of which those with used[i] count. If the kernel
  /// quantises h * scale to bytes, in units of 1/127 of the batch's largest |h * row's step|, each
  /// product with a code, at most 8, is off by at most 8 * half a unit.
  void check(const std::vector<float>& got_h, const std::vector<float>& got_y, std::int64_t some,
             const std::vector<bool>& used, bool rounds) const {
    std::vector<double> y(n), batch;
    double bound = 1e-3, error = 0, size = 0;
    const auto finish = [&] {
      if (rounds && !batch.empty())
        bound += batch.size() * 8 * *std::max_element(batch.begin(), batch.end()) * 0.51;
      batch.clear();
    };
    for (std::int64_t i = 0; i < some; ++i) {
      CHECK_NEAR(got_h[i], used[i] ? h[i] : 0, 1e-5 * std::sqrt(n));
      if (!used[i]) CHECK(got_h[i] == 0);
      if (!used[i]) continue;
      batch.push_back(std::abs(h[i]) * down.step(ids[i]));
      if (batch.size() == 16) finish();
      for (std::int64_t e = 0; e < n; ++e) y[e] += h[i] * down.values[ids[i] * n + e];
    }
    finish();
    for (std::int64_t e = 0; e < n; ++e) {
      CHECK_NEAR(got_y[e], y[e], bound);
      error += (got_y[e] - y[e]) * (got_y[e] - y[e]);
      size += y[e] * y[e];
    }
    CHECK(error <= (rounds ? 4e-4 : 1e-8) * size + 1e-12);
    CHECK(got_h[some] == 3 && got_y[room()] == 3);
  }
};

double squared_error(const float* values, const float* stored, std::int64_t count) {
  double sum = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const double difference = double{stored[i]} - values[i];
    sum += difference * difference;
  }
  return sum;
}

}  // namespace

TEST(int4_groups_beat_their_largest_value_over_8) {
  for (const std::int64_t n : kLengths)
    for (const float deviation : {1e-30f, 1.0f, 1e30f}) {
      const auto values = random_floats(n, deviation);
      const Stored stored(1, n, values);
      for (std::int64_t g = 0; g < n; g += kSixteen) {
        const std::int64_t count = std::min(kSixteen, n - g);
        float largest = 0;
        for (std::int64_t i = g; i < g + count; ++i)
          if (std::abs(values[i]) > std::abs(largest)) largest = values[i];
        const float step = -largest / 8;
        std::vector<float> plain;
        for (std::int64_t i = g; i < g + count; ++i)
          plain.push_back(step * std::clamp(std::nearbyint(values[i] / step), -8.0f, 7.0f));
        // The search tries this step, too, but for the rounding of scales to 8 bits, which changes
        // a value by at most 8 * half a unit of the row's step.
        const double scale_error = 8 * 0.5 * 1.1 / 127 / 8 * 4.5 * deviation;
        const double bound = std::sqrt(squared_error(&values[g], plain.data(), count)) +
                             std::sqrt(count) * scale_error;
        CHECK(std::sqrt(squared_error(&values[g], &stored.values[g], count)) <= bound);
      }
    }
}

TEST(int4_keeps_values_on_its_grid) {
  std::vector<float> values;
  for (const float scale : {127.0f, -3.0f, 60.0f, 1.0f, 0.0f})
    for (int code = -8; code < 8; ++code) values.push_back(scale * static_cast<float>(code));
  // The row's step is chosen freely, so scales are only accurate to 8 bits.
  const Stored stored(1, std::ssize(values), values);
  const double step = 127 * 1.1 / 127;
  for (std::size_t i = 0; i < values.size(); ++i)
    CHECK_NEAR(stored.values[i], values[i], 8 * step / 2 + 1e-3);
  for (std::size_t i = values.size() - kSixteen; i < values.size(); ++i)
    CHECK(stored.values[i] == 0);
}

TEST(int4_values_of_a_scale_share_bytes) {  // the layout in engine folders, spelt out
  std::vector<std::byte> zeros(int4_row_bytes(kGroup)), row(zeros.size());
  std::vector<float> values(kGroup, 0.0f);
  quantize_int4(values.data(), kGroup, zeros.data());
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = 1;
    quantize_int4(values.data(), kGroup, row.data());
    values[i] = 0;
    const std::size_t byte = i / 16 * 8 + i % 8;
    const std::byte mask{static_cast<unsigned char>(i % 16 < 8 ? 0x0f : 0xf0)};
    for (std::size_t b = 0; b < kGroup / 2; ++b)
      CHECK(((row[b] ^ zeros[b]) & ~(b == byte ? mask : std::byte{0})) == std::byte{0});
    CHECK(row[byte] != zeros[byte]);
  }
}

TEST(int4_rows_are_loaded) {
  for_all_int4_kernels([](const Kernels&, const RowKernels& kernels) {
    for (const std::int64_t n : kLengths) {
      const Stored stored(2, n);
      std::vector<float> out(2 * n + 1, 7);
      kernels.load(stored.rows(1), out.data(), 2);
      for (std::int64_t i = 0; i < n; ++i) {
        CHECK(out[2 * i] == stored.values[n + i]);
        CHECK(out[2 * i + 1] == 7);
      }
    }
  });
}

TEST(int4_dot_matches_doubles) {
  for_all_int4_kernels([](const Kernels&, const RowKernels& kernels) {
    for (const std::int64_t n : kLengths) {
      const std::int64_t rows = 1 + n % 20;
      const Stored w(rows, n);
      auto x = random_floats(n);
      if (n > 64) std::fill_n(x.begin(), 20, 0.0f);  // a group without a largest value
      const auto p = prepared(kernels, x);
      std::vector<float> y(rows + 1, 3);
      kernels.dot(w.rows(), rows, p.data(), y.data(), false, {});
      const std::vector<float> once = y;
      kernels.dot(w.rows(), rows, p.data(), y.data(), true, {});
      for (std::int64_t r = 0; r < rows; ++r) {
        CHECK_NEAR(once[r], w.dot(r, rounded(x)), 2e-4);
        CHECK_NEAR(y[r], 2 * once[r], 1e-4);
      }
      CHECK(y[rows] == 3);
    }
  });
}

TEST(int4_ffn_fused_matches_doubles) {
  for_all_int4_kernels([](const Kernels& table, const RowKernels& kernels) {
    for (const std::int64_t n : {45, 130, 576}) {
      const Layer layer(n);
      const auto p = prepared(kernels, layer.x);
      for (const std::int64_t count : {std::int64_t{1}, std::int64_t{17}, layer.count()}) {
        std::vector<float> h(count + 1, 3), y(layer.room() + 1, 3);
        kernels.ffn_fused(layer.rows(), Activation::silu,
                          {layer.ids.data(), count, layer.count() - count}, p.data(), h.data(),
                          y.data());
        layer.check(h, y, count, std::vector<bool>(count, true),
                    panel_kernels(table, WeightFormat::int4).prepare);
      }
    }
  });
}

TEST(int4_ffn_selected_matches_doubles) {
  for_all_int4_kernels([](const Kernels& table, const RowKernels& kernels) {
    for (const std::int64_t n : {45, 576})
      for (const bool by_gate : {false, true}) {
        const Layer layer(n);
        const std::int64_t count = layer.count();
        const auto p = prepared(kernels, layer.x);
        std::vector<double> estimates;
        for (std::int64_t i = 0; i < count; ++i)
          estimates.push_back(
              std::abs(by_gate ? layer.gates[i] : layer.h[i] * layer.lengths[layer.ids[i]]));
        auto sorted = estimates;
        std::sort(sorted.begin(), sorted.end());
        for (const std::int64_t dropped : {std::int64_t{1}, std::int64_t{20}, count}) {
          const float threshold =
              dropped == count ? std::numeric_limits<float>::infinity()
                               : static_cast<float>((sorted[dropped - 1] + sorted[dropped]) / 2);
          std::vector<float> h(count + 1, 3), y(layer.room() + 1, 3);
          const SelectedCounts counts = kernels.ffn_selected(
              layer.rows(), Activation::silu, {threshold, threshold, by_gate, layer.lengths.data()},
              {layer.ids.data(), count}, p.data(), h.data(), y.data());
          CHECK(counts.exact == count - dropped && counts.coarse == 0);
          std::vector<bool> used;
          for (const double estimate : estimates) used.push_back(estimate >= threshold);
          layer.check(h, y, count, used, panel_kernels(table, WeightFormat::int4).prepare);
        }
      }
  });
}

TEST(int4_selection_with_thresholds_of_zero_is_dense_to_the_bit) {
  for_all_int4_kernels([](const Kernels&, const RowKernels& kernels) {
    const Layer layer(130);
    const std::int64_t count = layer.count();
    const auto p = prepared(kernels, layer.x);
    std::vector<float> h(count), y(layer.room()), dense_h(count), dense_y(layer.room());
    kernels.ffn_fused(layer.rows(), Activation::silu, {layer.ids.data(), count}, p.data(),
                      dense_h.data(), dense_y.data());
    for (const bool by_gate : {false, true}) {
      kernels.ffn_selected(layer.rows(), Activation::silu, {0, 0, by_gate, layer.lengths.data()},
                           {layer.ids.data(), count}, p.data(), h.data(), y.data());
      CHECK(h == dense_h);
      CHECK(y == dense_y);
    }
  });
}

TEST(int4_multiplies_panels) {
  for_all_int4_kernels([](const Kernels& kernels, const RowKernels&) {
    const PanelKernels& panels = panel_kernels(kernels, WeightFormat::int4);
    const std::int64_t width = kernels.panel;
    for (const std::int64_t rows : {1, 15, 49})
      for (const std::int64_t n : {17, 64, 300}) {
        const Stored w(rows, n);
        const auto b = random_floats(n * width), d = random_floats(rows * width);
        AlignedBytes memory(panels.prepare ? panels.prepared_bytes(n) + 1 : 1, std::byte{7});
        if (panels.prepare) panels.prepare(b.data(), n, memory.data());
        CHECK(memory.back() == std::byte{7});
        const PreparedPanels in = panels.prepare ? PreparedPanels(memory.data(), 0)
                                                 : PreparedPanels(ConstPanels{b.data(), n * width});
        std::vector<float> c(rows * width + 1, 3), e(n * width + 1, 0);
        panels.multiply(w.rows(), rows, in, {c.data(), rows * width}, 1, false);
        panels.multiply_transposed(w.rows(), rows, 0, n, {d.data(), rows * width},
                                   {e.data(), n * width}, 1);
        // Rounding to bf16 changes a product by at most 1/127. Quantising to bytes changes a value
        // by at most 1/254 of the largest of its 16; transposed, it includes the weights' scales.
        const bool as_bf16 =
            panels.prepare && panels.prepare == panel_kernels(kernels, WeightFormat::bf16).prepare;
        const auto half_step = [&](std::int64_t count, std::int64_t i, const auto& value) {
          double largest = 0;
          for (std::int64_t j = i / 16 * 16; j < std::min(count, i / 16 * 16 + 16); ++j)
            largest = std::max(largest, std::abs(double{value(j)}));
          return panels.prepare ? largest / 254 : 0.0;
        };
        for (std::int64_t t = 0; t < width; ++t) {
          for (std::int64_t r = 0; r < rows; ++r) {
            double sum = 0, bound = 1e-4;
            for (std::int64_t i = 0; i < n; ++i) {
              const double value = w.values[r * n + i];
              sum += value * b[i * width + t];
              bound += as_bf16
                           ? std::abs(value * b[i * width + t]) / 127
                           : std::abs(value) *
                                 half_step(n, i, [&](std::int64_t j) { return b[j * width + t]; });
            }
            CHECK_NEAR(c[r * width + t], sum, bound);
          }
          for (std::int64_t i = 0; i < n; ++i) {
            double sum = 0, bound = 1e-4;
            for (std::int64_t r = 0; r < rows; ++r) {
              const double product = double{w.values[r * n + i]} * d[r * width + t];
              sum += product;
              bound += as_bf16 ? std::abs(product) / 127
                               : 8 * half_step(rows, r, [&](std::int64_t j) {
                                   return w.scale(j, i / 16) * d[j * width + t];
                                 });
            }
            CHECK_NEAR(e[i * width + t], sum, bound);
          }
        }
        CHECK(c.back() == 3 && e.back() == 0);
      }
  });
}

int main() { return run_tests(); }
