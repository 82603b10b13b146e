// The prefill kernels of int8 rows: products with panels of tokens.
#include <algorithm>
#include <cmath>
#include <vector>

#include "check.h"
#include "cpu/isa.h"
#include "int8_rows.h"
#include "kernel_tests.h"

using namespace tda;
using namespace int8_rows;

namespace {

/// Panels of random vectors.
struct TestPanels {
  std::int64_t n, width, count;
  std::vector<float> values;

  TestPanels(std::int64_t length, std::int64_t lanes, std::int64_t panels)
      : n(length), width(lanes), count(panels), values(random_floats(n * lanes * panels)) {}
  std::int64_t stride() const { return n * width; }
  float& at(std::int64_t t, std::int64_t i) {
    return values[t / width * stride() + i * width + t % width];
  }
  std::vector<float> token(std::int64_t t) {
    std::vector<float> out;
    for (std::int64_t i = 0; i < n; ++i) out.push_back(at(t, i));
    return out;
  }
  PreparedPanels prepared(const PanelKernels& kernels, AlignedBytes& memory) const {
    return prepared_panels(kernels, values, n, width, memory);
  }
};

/// How prefill kernels represent their operands.
enum class Operands { f32, two_bytes, bf16 };

Operands operands_of(const Kernels& kernels) {
  const auto prepare = panel_kernels(kernels, WeightFormat::int8).prepare;
  if (!prepare) return Operands::f32;
  return prepare == panel_kernels(kernels, WeightFormat::bf16).prepare ? Operands::bf16
                                                                       : Operands::two_bytes;
}

/// x as 256 q + residual, rounded in floats, so that ties are rounded as in the kernels.
std::vector<double> as_two_bytes(const std::vector<float>& x) {
  std::vector<double> out;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const auto largest = static_cast<float>(largest_in_part(x, i));
    const float scaled = x[i] * (largest > 0 ? 127.0f / largest : 0.0f);
    const float q = std::nearbyint(scaled);
    const float residual = std::min(std::nearbyint(256.0f * (scaled - q)), 127.0f);
    out.push_back((double{q} + double{residual} / 256) * largest / 127);
  }
  return out;
}

/// sum w[i] x[i] with operands as the kernels represent them, the exact sum, and a bound on the
/// difference.
struct Expected {
  double value = 0, exact = 0, bound = 0;

  Expected(const std::vector<double>& w, const std::vector<float>& x, Operands operands) {
    const auto represented =
        operands == Operands::two_bytes ? as_two_bytes(x) : std::vector<double>(x.begin(), x.end());
    for (std::size_t i = 0; i < x.size(); ++i) {
      exact += w[i] * x[i];
      value += operands == Operands::bf16 ? as_bf16(w[i]) * as_bf16(represented[i])
                                          : w[i] * represented[i];
      bound +=
          std::abs(w[i]) * (operands == Operands::bf16        ? std::abs(x[i]) / 127
                            : operands == Operands::two_bytes ? largest_in_part(x, i) / 254 / 255
                                                              : 0);
    }
  }
};

}  // namespace

TEST(int8_multiplies_panels) {
  for_all_kernels([](const Kernels& kernels) {
    const PanelKernels& panels = panel_kernels(kernels, WeightFormat::int8);
    for (const std::int64_t rows : {1, 7, 49, 61})
      for (const std::int64_t n : {1, 33, 64, 300, 576, 1100}) {
        const Stored w(rows, n);
        TestPanels b(n, kernels.panel, 2), c(rows, kernels.panel, 2);
        for (std::int64_t i = 0; i < n; ++i) b.at(5, i) = 0;  // a token of zeros
        for (std::int64_t t = kernels.panel + 3; t < 2 * kernels.panel; ++t)
          for (std::int64_t i = 0; i < n; ++i) b.at(t, i) = 0;  // lanes behind the last token
        c.values.push_back(3);
        AlignedBytes memory;
        const PreparedPanels in = b.prepared(panels, memory);
        panels.multiply(w.rows(), rows, in, {c.values.data(), c.stride()}, 2, false);
        panels.multiply(w.rows(), rows, in, {c.values.data(), c.stride()}, 2, true);
        for (std::int64_t t = 0; t < 2 * kernels.panel; ++t) {
          const auto x = b.token(t);
          for (std::int64_t r = 0; r < rows; ++r) {
            const float* row = w.values.data() + r * n;
            const Expected expected({row, row + n}, x, operands_of(kernels));
            CHECK_NEAR(c.at(t, r), 2 * expected.value, 4e-4);
            CHECK_NEAR(c.at(t, r), 2 * expected.exact, 2 * expected.bound + 4e-4);
          }
        }
        CHECK(c.values.back() == 3);
      }
  });
}

TEST(int8_multiplies_panels_transposed) {
  for_all_kernels([](const Kernels& kernels) {
    const PanelKernels& panels = panel_kernels(kernels, WeightFormat::int8);
    for (const std::int64_t rows : {1, 7, 61, 64, 150})
      for (const std::int64_t n : {1, 33, 64, 300}) {
        const Stored w(rows, n);
        const std::int64_t first = n / 2 / panels.block_columns * panels.block_columns;
        const std::int64_t columns = n - first;
        TestPanels b(rows, kernels.panel, 2), c(columns, kernels.panel, 2);
        for (std::int64_t j = 0; j < rows; ++j) b.at(5, j) = 0;
        c.values.push_back(3);
        TestPanels before = c;
        panels.multiply_transposed(w.rows(), rows, first, columns, {b.values.data(), b.stride()},
                                   {c.values.data(), c.stride()}, 2);
        for (std::int64_t t = 0; t < 2 * kernels.panel; ++t)
          for (std::int64_t i = 0; i < columns; ++i) {
            // For byte products x is multiplied by the rows' scales before it is quantised.
            const Operands operands = operands_of(kernels);
            std::vector<float> x = b.token(t);
            std::vector<double> column;
            for (std::int64_t j = 0; j < rows; ++j) {
              const float scale =
                  operands == Operands::two_bytes
                      ? scale_of(w, j, (first + i) / static_cast<std::int64_t>(kPart))
                      : 1;
              x[j] *= scale;
              column.push_back(scale == 0 ? 0 : double{w.values[j * n + first + i]} / scale);
            }
            const Expected expected(column, x, operands);
            CHECK_NEAR(c.at(t, i), before.at(t, i) + expected.value, 4e-4);
            CHECK_NEAR(c.at(t, i), before.at(t, i) + expected.exact, expected.bound + 4e-4);
          }
        CHECK(c.values.back() == 3);
      }
  });
}

TEST(int8_panels_keep_tokens_apart) {
  for_all_kernels([](const Kernels& kernels) {
    const PanelKernels& panels = panel_kernels(kernels, WeightFormat::int8);
    const std::int64_t n = 150, size = 70;
    const Stored w(size, n);
    TestPanels b(n, kernels.panel, 1), h(size, kernels.panel, 1), c(size, kernels.panel, 1),
        d(n, kernels.panel, 1);
    d.values.assign(d.values.size(), 1);
    std::vector<float> first, first_d;
    for (const float others : {1.0f, 0.0f, 1e6f}) {
      for (std::int64_t t = 0; t < kernels.panel; ++t) {
        if (t == 3) continue;
        for (std::int64_t i = 0; i < n; ++i) b.at(t, i) *= others;
        for (std::int64_t i = 0; i < size; ++i) h.at(t, i) *= others;
      }
      AlignedBytes memory;
      panels.multiply(w.rows(), size, b.prepared(panels, memory), {c.values.data(), c.stride()}, 1,
                      false);
      TestPanels sum = d;
      panels.multiply_transposed(w.rows(), size, 0, n, {h.values.data(), h.stride()},
                                 {sum.values.data(), sum.stride()}, 1);
      if (first.empty()) first = c.token(3), first_d = sum.token(3);
      CHECK(c.token(3) == first);
      CHECK(sum.token(3) == first_d);
    }
  });
}

int main() { return run_tests(); }
