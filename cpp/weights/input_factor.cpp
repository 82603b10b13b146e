#include "weights/input_factor.h"

#include <tda/error.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <tuple>
#include <utility>

#include "weights/bricks.h"

namespace tda {
namespace {

constexpr std::int64_t kTile = kBlockInputs;
/// Rows at a time: their parts of two tiles fit into an L2 cache.
constexpr std::int64_t kDepth = 256;

/// c[i, j] -= the sum over k < depth of c[k, i] c[k, j], for a tile of i and one of j.
void subtract_products(double* c, std::int64_t n, std::int64_t depth, std::int64_t i_tile,
                       std::int64_t j_tile) {
  typedef double Pair __attribute__((vector_size(16)));
  constexpr std::int64_t kRows = 2, kPairs = 4;
  for (std::int64_t first = 0; first < depth; first += kDepth) {
    const std::int64_t end = std::min(depth, first + kDepth);
    for (std::int64_t i = i_tile; i < i_tile + kTile; i += kRows)
      for (std::int64_t j = j_tile; j < j_tile + kTile; j += 2 * kPairs) {
        Pair sums[kRows][kPairs] = {};
        for (std::int64_t k = first; k < end; ++k) {
          const double* const row = c + k * n;
          for (std::int64_t p = 0; p < kPairs; ++p) {
            Pair of_j;
            std::memcpy(&of_j, row + j + 2 * p, sizeof of_j);
            for (std::int64_t r = 0; r < kRows; ++r) sums[r][p] += row[i + r] * of_j;
          }
        }
        for (std::int64_t r = 0; r < kRows; ++r)
          for (std::int64_t s = 0; s < 2 * kPairs; ++s)
            c[(i + r) * n + j + s] -= sums[r][s / 2][s % 2];
      }
  }
}

/// The rows of U of a tile, c = UT U, from what the rows above leave of c: of the columns of one
/// tile, the one on the diagonal first.
void solve_tile(double* c, std::int64_t n, std::int64_t i_tile, std::int64_t j_tile) {
  for (std::int64_t i = i_tile; i < i_tile + kTile; ++i) {
    double* const row = c + i * n;
    for (std::int64_t k = i_tile; k < i; ++k)
      for (std::int64_t j = j_tile; j < j_tile + kTile; ++j) row[j] -= c[k * n + i] * c[k * n + j];
    if (i_tile == j_tile) {
      if (!(row[i] > 0) || !std::isfinite(row[i]))
        throw Error("calibration text: found inputs that are not finite");
      row[i] = std::sqrt(row[i]);
    }
    for (std::int64_t j = std::max(j_tile, i + 1); j < j_tile + kTile; ++j) row[j] /= row[i];
  }
}

/// Groups of inputs that share scales, and the inputs in them, by ascending size.
std::vector<std::int64_t> order_of(const std::vector<double>& sums, std::int64_t n) {
  std::vector<std::int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  const auto size = [&](std::int64_t i) { return sums[i * n + i]; };
  const auto largest = [&](std::int64_t i) {
    const std::int64_t first = i / kScaleInputs * kScaleInputs;
    double most = 0;
    for (std::int64_t k = first; k < first + kScaleInputs; ++k) most = std::max(most, size(k));
    return std::pair(most, first);
  };
  std::ranges::sort(order, {}, [&](std::int64_t i) { return std::tuple(largest(i), size(i), i); });
  return order;
}

}  // namespace

InputFactor factor_of_sums(const std::vector<double>& sums, std::int64_t inputs, ThreadPool& pool) {
  constexpr double kDamping =
      0.01;  // of the mean, so that no input that hardly varies rules others
  const std::int64_t n = (inputs + kTile - 1) / kTile * kTile;
  InputFactor result{n, order_of(sums, n), std::vector<float>(n * n), std::vector<float>(n)};
  std::vector<double> ordered(n * n);
  double* const c = ordered.data();
  pool.run(n, [&](std::int64_t k, int) {
    for (std::int64_t i = k; i < n; ++i) {
      const auto [a, b] = std::minmax(result.order[k], result.order[i]);
      c[k * n + i] = sums[a * n + b];
    }
  });
  double mean = 0;
  for (std::int64_t i = 0; i < n; ++i) mean += c[i * n + i] / static_cast<double>(inputs);
  if (mean == 0) mean = 1;  // all zeros: every input is as important as another
  for (std::int64_t i = 0; i < n; ++i) c[i * n + i] += kDamping * mean;

  for (std::int64_t i = 0; i < n; i += kTile) {
    const std::int64_t tiles = (n - i) / kTile;
    pool.run(tiles,
             [&](std::int64_t tile, int) { subtract_products(c, n, i, i, i + tile * kTile); });
    solve_tile(c, n, i, i);
    pool.run(tiles - 1,
             [&](std::int64_t tile, int) { solve_tile(c, n, i, i + (tile + 1) * kTile); });
  }

  pool.run(n, [&](std::int64_t k, int) {
    const double pivot = c[k * n + k];
    result.importance[k] = static_cast<float>(pivot * pivot / mean);
    for (std::int64_t i = k + 1; i < n; ++i)
      result.feedback[k * n + i] = static_cast<float>(c[k * n + i] / pivot);
  });
  return result;
}

}  // namespace tda
