// Sums of the products of a matrix's inputs over tokens, with the kernels of prefill.
#pragma once

#include <cstdint>
#include <span>

#include "base/buffer.h"
#include "base/thread_pool.h"
#include "cpu/kernels.h"
#include "weights/input_factor.h"

namespace tda {

class InputProducts {
 public:
  InputProducts(const Kernels& kernels, std::int64_t inputs);
  /// x: [tokens, inputs]
  void add(ThreadPool& pool, std::span<const float> x);
  /// Of all that was added. Throws Error if it was not finite.
  InputFactor factor(ThreadPool& pool) const;

 private:
  const Kernels& kernels_;
  std::int64_t inputs_, panels_;
  Buffer<float>
      sums_;         // [panels, inputs, P]: x[i] x[j] for i of the inputs and j of a panel, i <= j
  Buffer<float> x_;  // [panels, tokens, P]
};

}  // namespace tda
