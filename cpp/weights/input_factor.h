// What calibration text says of a matrix's inputs x: the mean of x xT. Rounding by it spreads each
// weight's error over the inputs that vary with its own, as GPTQ and LDLQ do.
#pragma once

#include <cstdint>
#include <vector>

#include "base/thread_pool.h"

namespace tda {

/// The mean of x xT, a little of its diagonal's mean added to the diagonal, as L D LT with a unit
/// lower triangular L. `n`: inputs, rounded up to whole blocks; those that pad are uncorrelated. The
/// largest inputs are last: rounded first, they leave all others to make good what they miss.
struct InputFactor {
  std::int64_t n;
  std::vector<std::int64_t> order;  // [n] the input of each row; 16 that share scales stay together
  std::vector<float> feedback;      // [n, n] LT: row k has its entries i > k, and zeros before them
  std::vector<float> importance;    // [n] D, relative to the mean of x[i]^2
};

/// sums: [n, n], the sums of x[i] x[j] over tokens for i <= j. Throws Error if they are
/// not finite.
InputFactor factor_of_sums(const std::vector<double>& sums, std::int64_t inputs, ThreadPool& pool);

}  // namespace tda
