#include "cpu/input_products.h"

#include <algorithm>
#include <vector>

#include "cpu/isa.h"
#include "weights/bricks.h"

namespace tda {

InputProducts::InputProducts(const Kernels& kernels, std::int64_t inputs)
    : kernels_(kernels), inputs_(inputs), panels_((inputs + kernels.panel - 1) / kernels.panel) {
  const Size size = Size(panels_) * inputs_ * kernels_.panel;
  std::fill_n(sums_.reserve(size, "the products of a matrix's inputs"), size.value(), 0.0f);
}

void InputProducts::add(ThreadPool& pool, std::span<const float> x) {
  constexpr std::int64_t kPanels = 8;  // of a task
  const std::int64_t width = kernels_.panel, tokens = std::ssize(x) / inputs_;
  float* const panels = x_.reserve(Size(panels_) * tokens * width, "calibration text");
  pool.run(panels_, [&](std::int64_t panel, int) {
    float* to = panels + panel * tokens * width;
    const std::int64_t first = panel * width, count = std::min(width, inputs_ - first);
    for (std::int64_t t = 0; t < tokens; ++t, to += width) {
      std::copy_n(x.data() + t * inputs_ + first, count, to);
      std::fill(to + count, to + width, 0.0f);
    }
  });
  const PanelKernels& kernels = panel_kernels(kernels_, WeightFormat::f32);
  const Rows rows = {reinterpret_cast<const std::byte*>(x.data()), inputs_, 4 * inputs_};
  const std::int64_t block = kernels.block_columns, blocks = (inputs_ + block - 1) / block;
  const std::int64_t groups = (panels_ + kPanels - 1) / kPanels;
  pool.run(blocks * groups, [&](std::int64_t task, int) {
    const std::int64_t first = task / groups * block, panel = task % groups * kPanels;
    const std::int64_t count = std::min(kPanels, panels_ - panel);
    if (first >= (panel + count) * width) return;  // below the diagonal
    kernels.multiply_transposed(rows, tokens, first, std::min(block, inputs_ - first),
                                {panels + panel * tokens * width, tokens * width},
                                {sums_.data() + (panel * inputs_ + first) * width, inputs_ * width},
                                count);
  });
}

InputFactor InputProducts::factor(ThreadPool& pool) const {
  const std::int64_t n = (inputs_ + kBlockInputs - 1) / kBlockInputs * kBlockInputs;
  const std::int64_t width = kernels_.panel;
  std::vector<double> sums(n * n);
  pool.run(inputs_, [&](std::int64_t i, int) {
    for (std::int64_t j = i; j < inputs_; ++j)
      sums[i * n + j] = sums_.data()[(j / width * inputs_ + i) * width + j % width];
  });
  return factor_of_sums(sums, inputs_, pool);
}

}  // namespace tda
