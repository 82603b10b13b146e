// int8 weights and the selection of neurons by their high planes.
#include <tda/error.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "aligned.h"
#include "check.h"
#include "cpu/isa.h"
#include "base/half.h"
#include "naive.h"

using namespace tda;

namespace {

constexpr std::size_t kPart = kGroup / kInt8Scales;  // values with a scale in common
constexpr std::int64_t kLengths[] = {1, 31, 64, 65, 130, 576, 1100};

std::vector<float> random_floats(std::int64_t count, float deviation = 1) {
  static std::mt19937 random(1);
  std::normal_distribution<float> normal(0, deviation);
  std::vector<float> values(count);
  for (float& v : values) v = normal(random);
  return values;
}

/// An int8 matrix, and its values with both planes and with the high plane alone.
struct Stored {
  Matrix matrix;
  std::vector<std::byte> high, low;
  std::vector<float> values, coarse;

  Stored(std::int64_t rows, std::int64_t n, const std::vector<float>& source) {
    matrix = {WeightFormat::int8, rows, n};
    high.resize(rows * matrix.row_bytes());
    low.resize(rows * matrix.low_row_bytes());
    matrix.data = high.data();
    matrix.low = low.data();
    values.resize(rows * n);
    coarse.resize(rows * n);
    const std::vector<std::byte> middle(matrix.low_row_bytes(), std::byte{0x88});
    for (std::int64_t r = 0; r < rows; ++r) {
      std::byte* const row = high.data() + r * matrix.row_bytes();
      quantize_int8(source.data() + r * n, n, row, low.data() + r * matrix.low_row_bytes());
      read_row(matrix, r, 0, n, values.data() + r * n);
      dequantize_int8(row, middle.data(), n, 0, n, coarse.data() + r * n);  // low - 8 = 0
    }
  }
  Stored(std::int64_t rows, std::int64_t n) : Stored(rows, n, random_floats(rows * n)) {}
  Rows rows(std::int64_t first = 0) const {
    return {matrix.row(first), matrix.low_row(first), matrix.cols, matrix.stride(),
            matrix.low_stride()};
  }
};

/// The largest absolute value of the part of x that element i belongs to.
double largest_beside(const std::vector<float>& x, std::size_t i) {
  const std::size_t first = i / kPart * kPart, end = std::min(x.size(), first + kPart);
  double largest = 0;
  for (std::size_t j = first; j < end; ++j) largest = std::max(largest, std::abs(double{x[j]}));
  return largest;
}

/// The step of a weight's part: its codes reach from -128 to 119 and may be turned round.
double weight_step(const std::vector<float>& w, std::size_t i) {
  const std::size_t first = i / kPart * kPart, end = std::min(w.size(), first + kPart);
  double least = 0, largest = 0;
  for (std::size_t j = first; j < end; ++j) {
    least = std::min(least, double{w[j]});
    largest = std::max(largest, double{w[j]});
  }
  return std::min(std::max(-least / 128, largest / 119), std::max(largest / 128, -least / 119));
}

/// What the kernels of decode make of x: parts rounded to multiples of their largest value / 127.
std::vector<double> rounded(const std::vector<float>& x) {
  std::vector<double> out(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double step = largest_beside(x, i) / 127;
    if (step > 0) out[i] = std::nearbyint(x[i] / step) * step;
  }
  return out;
}

float step_of(const Stored& w, std::int64_t row) {
  float step;
  std::memcpy(
      &step,
      w.matrix.row(row) + low_row_bytes(w.matrix.cols) + groups_of(w.matrix.cols) * kInt8Scales, 4);
  return step;
}

float scale_of(const Stored& w, std::int64_t row, std::int64_t part) {
  const std::byte* scales = w.matrix.row(row) + low_row_bytes(w.matrix.cols);
  return step_of(w, row) * static_cast<float>(static_cast<std::int8_t>(scales[part]));
}

/// sum of h row in doubles, and how far from it kernels may be that round h times the row's scales:
/// each by half a step of 1/127 of their batch's largest h times row's step, of 1/127/256 for exact
/// rows, and a little for that being rounded itself.
struct Sum {
  const Stored& w;
  bool rounds, coarse = false;
  naive::Vector value, bound;

  Sum(const Stored& stored, const Kernels& kernels)
      : w(stored),
        rounds(kernels.panels[2].prepare != nullptr),  // as those for prefill do
        value(w.matrix.cols),
        bound(w.matrix.cols, 1e-4 * std::sqrt(static_cast<double>(w.matrix.cols))) {}

  /// Rows in the order the kernel takes them; coarse ones come in batches of their own.
  void add(const std::vector<std::pair<std::int64_t, double>>& rows, bool exact) {
    const std::int64_t n = w.matrix.cols;
    const auto& as = exact ? w.values : w.coarse;
    coarse = coarse || (!exact && !rows.empty());
    for (std::size_t first = 0; first < rows.size(); first += 16) {
      const std::size_t end = std::min(rows.size(), first + 16);
      double most = 0;
      for (std::size_t i = first; i < end; ++i)
        most = std::max(most, std::abs(rows[i].second * step_of(w, rows[i].first)));
      for (std::size_t i = first; i < end; ++i)
        for (std::int64_t e = 0; e < n; ++e) {
          const double stored = as[rows[i].first * n + e];
          value[e] += rows[i].second * stored;
          const double scale = scale_of(w, rows[i].first, e / static_cast<std::int64_t>(kPart));
          if (rounds && stored != 0)
            bound[e] += std::abs(stored / scale) * most * 0.51 / (exact ? 128 : 1);
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
    CHECK(error <= (rounds && coarse ? 1e-4 : 1e-8) * size + 1e-12);
  }
};

AlignedBytes prepared(const RowKernels& kernels, const std::vector<float>& x) {
  const auto n = static_cast<std::int64_t>(x.size());
  AlignedBytes out(kernels.prepared_bytes(n));
  kernels.prepare(x.data(), n, out.data());
  return out;
}

double dot(const float* w, const std::vector<double>& x) {
  return std::inner_product(x.begin(), x.end(), w, 0.0);
}

template <class Body>
void for_all_kernels(const Body& body) {
  for (const Kernels* table : available_kernels()) {
    const int before = check::failures;
    body(*table);
    if (check::failures > before) std::printf("  in: %s\n", table->name);
  }
}

/// A layer of random neurons and one input.
struct Layer {
  static constexpr std::int64_t kNeurons = 70;
  std::int64_t n;
  Stored gate, up, down;
  std::vector<float> x, lengths;
  std::vector<double> rounded_x;
  std::vector<std::int32_t> ids;

  explicit Layer(std::int64_t length)
      : n(length), gate(kNeurons, n), up(kNeurons, n), down(kNeurons, n), x(random_floats(n)) {
    rounded_x = rounded(x);
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
  double h(std::int64_t j, bool exact) const {
    if (exact) return activated(gate.values, j) * dot(up.values.data() + j * n, rounded_x);
    return naive::activate(Activation::silu, dot(gate.coarse.data() + j * n, rounded_x)) *
           dot(up.coarse.data() + j * n, rounded_x);
  }
};

}  // namespace

TEST(int8_rounds_to_half_a_step) {
  for (const std::int64_t n : kLengths)
    for (const float scale : {1e-38f, 1e-6f, 1.0f, 1e30f}) {
      const auto values = random_floats(n, scale);
      const Stored stored(1, n, values);
      double row_step = 0;
      for (std::int64_t i = 0; i < n; ++i)
        row_step = std::max(row_step, weight_step(values, i) / 127);
      for (std::int64_t i = 0; i < n; ++i) {
        // A scale is a whole number of the row's steps; subnormal ones are coarser.
        const double step = weight_step(values, i) + row_step + 1e-40;
        CHECK(std::abs(stored.values[i] - double{values[i]}) <= step / 2 * (1 + 1e-5));
        CHECK(std::abs(stored.coarse[i] - double{stored.values[i]}) <= 8 * step * (1 + 1e-5));
      }
    }
  const Stored zero(1, 70, std::vector<float>(70));
  CHECK(zero.values == std::vector<float>(70));
}

TEST(int8_values_of_a_scale_share_bytes) {  // the engine folder's layout, written out
  struct Row {
    std::vector<std::byte> high = std::vector<std::byte>(high_row_bytes(kGroup));
    std::vector<std::byte> low = std::vector<std::byte>(low_row_bytes(kGroup));
  } zeros, row;
  std::vector<float> values(kGroup, 0.0f);
  quantize_int8(values.data(), kGroup, zeros.high.data(), zeros.low.data());
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = 1;
    quantize_int8(values.data(), kGroup, row.high.data(), row.low.data());
    values[i] = 0;
    const std::size_t byte = i / 32 * 16 + i % 16;
    const std::byte mask{static_cast<unsigned char>(i % 32 < 16 ? 0x0f : 0xf0)};
    for (std::size_t b = 0; b < kGroup / 2; ++b) {
      const std::byte allowed = b == byte ? mask : std::byte{0};
      CHECK(((row.high[b] ^ zeros.high[b]) & ~allowed) == std::byte{0});
      CHECK(((row.low[b] ^ zeros.low[b]) & ~allowed) == std::byte{0});
    }
    CHECK(row.high[byte] != zeros.high[byte]);
  }
}

TEST(int8_rows_are_loaded) {
  for_all_kernels([](const Kernels& kernels) {
    for (const std::int64_t n : kLengths) {
      const Stored stored(2, n);
      std::vector<float> out(2 * n + 1, 7);
      kernels.rows[2].load(stored.rows(1), out.data(), 2);
      for (std::int64_t i = 0; i < n; ++i) {
        CHECK(out[2 * i] == stored.values[n + i]);
        CHECK(out[2 * i + 1] == 7);
      }
    }
  });
}

TEST(int8_dot_matches_doubles) {
  for_all_kernels([](const Kernels& kernels) {
    for (const std::int64_t n : kLengths) {
      const std::int64_t rows = 1 + n % 6;
      const Stored w(rows, n);
      auto x = random_floats(n);
      if (n > 64) std::fill_n(x.begin(), 64, 0.0f);  // a group without a largest value
      const auto expected_x = rounded(x);
      const auto p = prepared(kernels.rows[2], x);
      std::vector<float> y(rows + 1, 3);
      kernels.rows[2].dot(w.rows(), rows, p.data(), y.data(), false, {});
      const std::vector<float> once = y;
      kernels.rows[2].dot(w.rows(), rows, p.data(), y.data(), true, {});
      for (std::int64_t r = 0; r < rows; ++r) {
        CHECK_NEAR(once[r], dot(w.values.data() + r * n, expected_x), 2e-4);
        CHECK_NEAR(y[r], 2 * once[r], 1e-4);
        // The bound that is promised: rounding x moves each factor by at most max / 254.
        const std::vector<double> unrounded(x.begin(), x.end());
        double bound = 1e-4;
        for (std::int64_t i = 0; i < n; ++i)
          bound += std::abs(w.values[r * n + i]) * largest_beside(x, i) / 254;
        CHECK_NEAR(once[r], dot(w.values.data() + r * n, unrounded), bound);
      }
      CHECK(y[rows] == 3);
    }
  });
}

/// Three outliers, each among the random values of a part; zeros elsewhere.
std::vector<float> with_outliers(std::int64_t n) {
  std::vector<float> x(n);
  for (const std::int64_t i : {std::int64_t{0}, n / 2, n - 1}) {
    const std::int64_t part = static_cast<std::int64_t>(kPart), first = i / part * part;
    const auto values = random_floats(part);
    std::copy_n(values.begin(), std::min(part, n - first), x.begin() + first);
    x[i] = i % 2 == 0 ? 80.0f : -90.0f;
  }
  return x;
}

/// sum |w[i]| times half a step of what rounding to a byte leaves beside outliers.
double finer_bound(const std::vector<double>& w, const std::vector<float>& x) {
  double bound = 0;
  for (std::size_t i = 0; i < x.size(); ++i)
    bound += std::abs(w[i]) * largest_beside(x, i) / 254 / 255;
  return bound;
}

TEST(int8_takes_finer_x_beside_outliers) {
  for_all_kernels([](const Kernels& kernels) {
    for (const std::int64_t n : {300, 576, 2000}) {
      const Stored w(37, n);
      const auto x = with_outliers(n);
      const auto p = prepared(kernels.rows[2], x);
      std::vector<float> y(37);
      kernels.rows[2].dot(w.rows(), 37, p.data(), y.data(), false, {});
      for (std::int64_t r = 0; r < 37; ++r) {
        const float* row = w.values.data() + r * n;
        CHECK_NEAR(y[r], dot(row, {x.begin(), x.end()}), finer_bound({row, row + n}, x) + 2e-4);
      }
    }
  });
}

TEST(int8_dot_high_plane_matches_doubles) {
  for_all_kernels([](const Kernels& kernels) {
    for (const std::int64_t n : kLengths)
      for (const std::int64_t rows : {1, 16, 37}) {
        const Stored w(rows, n);
        const auto x = random_floats(n);
        const auto expected_x = rounded(x);
        const auto p = prepared(kernels.rows[2], x);
        std::vector<float> y(rows + 1, 3);
        const float largest = kernels.rows[2].dot_high_plane(w.rows(), rows, p.data(), y.data());
        for (std::int64_t r = 0; r < rows; ++r)
          CHECK_NEAR(y[r], dot(w.coarse.data() + r * n, expected_x), 2e-4);
        CHECK(largest == *std::max_element(y.begin(), y.end() - 1));
        CHECK(y[rows] == 3);
      }
  });
}

TEST(int8_dot_rows_has_the_bits_of_dot) {
  for_all_kernels([](const Kernels& kernels) {
    for (const std::int64_t n : kLengths)
      for (const std::int64_t gap : {1, 3}) {
        const std::int64_t rows = 100;
        const Stored w(rows, n);
        const auto p = prepared(kernels.rows[2], random_floats(n));
        std::vector<float> all(rows), some(rows, 3);
        kernels.rows[2].dot(w.rows(), rows, p.data(), all.data(), false, {});
        std::vector<std::int32_t> ids;
        for (std::int32_t r = 1; r < rows; r += gap) ids.push_back(r);
        kernels.rows[2].dot_rows(w.rows(), ids.data(), std::ssize(ids), p.data(), some.data());
        kernels.rows[2].dot_rows(w.rows(), nullptr, 0, p.data(), some.data());
        for (std::int64_t r = 0; r < rows; ++r)
          CHECK(some[r] == (r >= 1 && (r - 1) % gap == 0 ? all[r] : 3));
      }
  });
}

TEST(int8_neurons_match_doubles) {
  for_all_kernels([](const Kernels& kernels) {
    for (const std::int64_t n : {45, 130, 576}) {
      const Layer layer(n);
      const auto p = prepared(kernels.rows[2], layer.x);
      for (const std::int64_t count : {std::int64_t{1}, std::int64_t{17}, std::ssize(layer.ids)}) {
        std::vector<float> h(count + 1, 3), y(layer.groups() + 1, 3);
        kernels.rows[2].ffn_fused(layer.rows(), Activation::silu, {layer.ids.data(), count}, p.data(),
                                h.data(), y.data());
        std::vector<std::pair<std::int64_t, double>> all;
        for (std::int64_t i = 0; i < count; ++i) {
          const std::int64_t j = layer.ids[i];
          CHECK_NEAR(h[i], layer.h(j, true), 1e-5 * n);
          all.emplace_back(j, layer.h(j, true));
        }
        Sum expected(layer.down, kernels);
        expected.add(all, true);
        expected.check(y);
        CHECK(h[count] == 3 && y[layer.groups()] == 3);
      }
    }
  });
}

TEST(selection_drops_and_coarsens_like_doubles) {
  for_all_kernels([](const Kernels& kernels) {
    for (const std::int64_t n : {45, 576}) {
      const Layer layer(n);
      const auto count = std::ssize(layer.ids);
      const auto p = prepared(kernels.rows[2], layer.x);
      std::vector<double> sorted;
      for (const std::int32_t j : layer.ids)
        sorted.push_back(std::abs(layer.h(j, false)) * layer.lengths[j]);
      const std::vector<double> estimates = sorted;
      std::sort(sorted.begin(), sorted.end());
      const auto between = [&](std::int64_t i) {  // a threshold that i neurons do not reach
        return i == 0       ? 0.0f
               : i == count ? std::numeric_limits<float>::infinity()
                            : static_cast<float>((sorted[i - 1] + sorted[i]) / 2);
      };
      for (const auto& [dropped, not_exact] : {std::pair<std::int64_t, std::int64_t>{0, 0},
                                               {0, count},
                                               {count, count},
                                               {9, 9},
                                               {11, 30},
                                               {0, 20},
                                               {count - 1, count - 1}}) {
        const Selection selection = {between(not_exact), between(dropped), false,
                                     layer.lengths.data()};
        std::vector<float> h(count + 1, 3), y(layer.groups() + 1, 3);
        const SelectedCounts counts =
            kernels.rows[2].ffn_selected(layer.rows(), Activation::silu, selection,
                                     {layer.ids.data(), count}, p.data(), h.data(), y.data());
        CHECK(counts.exact == count - not_exact);
        CHECK(counts.coarse == not_exact - dropped);
        std::vector<std::pair<std::int64_t, double>> exact_rows, coarse_rows;
        for (std::int64_t i = 0; i < count; ++i) {
          const std::int64_t j = layer.ids[i];
          if (estimates[i] < selection.coarse) {
            CHECK(h[i] == 0);
            continue;
          }
          const bool exact = estimates[i] >= selection.exact;
          CHECK_NEAR(h[i], layer.h(j, exact), 1e-5 * n);
          (exact ? exact_rows : coarse_rows).emplace_back(j, layer.h(j, exact));
        }
        Sum expected(layer.down, kernels);
        expected.add(exact_rows, true);
        expected.add(coarse_rows, false);
        expected.check(y);
        CHECK(h[count] == 3 && y[layer.groups()] == 3);
      }
    }
  });
}

TEST(selection_with_thresholds_of_zero_is_dense_to_the_bit) {
  for_all_kernels([](const Kernels& kernels) {
    for (const std::int64_t n : {45, 576}) {
      const Layer layer(n);
      const auto count = std::ssize(layer.ids);
      const auto p = prepared(kernels.rows[2], layer.x);
      std::vector<float> h(count), y(layer.groups()), dense_h(count), dense_y(layer.groups());
      kernels.rows[2].ffn_fused(layer.rows(), Activation::silu, {layer.ids.data(), count}, p.data(),
                              dense_h.data(), dense_y.data());
      for (const bool by_gate : {false, true}) {
        kernels.rows[2].ffn_selected(layer.rows(), Activation::silu,
                                 {0, 0, by_gate, layer.lengths.data()}, {layer.ids.data(), count},
                                 p.data(), h.data(), y.data());
        CHECK(h == dense_h);
        CHECK(y == dense_y);
      }
    }
  });
}

TEST(selection_by_gate_matches_doubles) {
  for_all_kernels([](const Kernels& kernels) {
    const std::int64_t n = 130;
    const Layer layer(n);
    const auto count = std::ssize(layer.ids);
    const auto p = prepared(kernels.rows[2], layer.x);
    const float threshold = 0.2f;
    std::vector<float> h(count), y(layer.groups());
    const SelectedCounts counts = kernels.rows[2].ffn_selected(
        layer.rows(), Activation::silu, {threshold, threshold, true, nullptr},
        {layer.ids.data(), count}, p.data(), h.data(), y.data());
    std::vector<std::pair<std::int64_t, double>> open;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t j = layer.ids[i];
      if (std::abs(layer.activated(layer.gate.values, j)) < threshold) {
        CHECK(h[i] == 0);
        continue;
      }
      open.emplace_back(j, layer.h(j, true));
    }
    CHECK(open.size() > 3 && std::ssize(open) < count - 3);
    CHECK(counts.exact == std::ssize(open) && counts.coarse == 0);
    Sum expected(layer.down, kernels);
    expected.add(open, true);
    expected.check(y);
  });
}

TEST(selection_keeps_what_is_not_a_number) {
  for_all_kernels([](const Kernels& kernels) {
    const Layer layer(64);
    auto lengths = layer.lengths;
    lengths[layer.ids[5]] = NAN;
    const auto count = std::ssize(layer.ids);
    const auto p = prepared(kernels.rows[2], layer.x);
    std::vector<float> h(count), y(layer.groups());
    const float all = std::numeric_limits<float>::infinity();
    const SelectedCounts counts =
        kernels.rows[2].ffn_selected(layer.rows(), Activation::silu, {all, all, false, lengths.data()},
                                 {layer.ids.data(), count}, p.data(), h.data(), y.data());
    CHECK(counts.exact == 1);
    CHECK(h[5] != 0);
  });
}

namespace {

/// Panels of one kernels table, and vectors in and out of them.
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
    if (!kernels.prepare) return ConstPanels{values.data(), stride()};
    const std::int64_t bytes = kernels.prepared_bytes(n);
    memory.resize(count * bytes + 1, std::byte{7});
    for (std::int64_t p = 0; p < count; ++p)
      kernels.prepare(values.data() + p * stride(), n, memory.data() + p * bytes);
    CHECK(memory.back() == std::byte{7});
    return {memory.data(), bytes};
  }
};

/// How kernels of prefill take their factors.
enum class Factors { floats, two_bytes, bf16 };

Factors factors_of(const Kernels& kernels, int format) {
  const auto prepare = kernels.panels[format].prepare;
  if (!prepare) return Factors::floats;
  return prepare == kernels.panels[1].prepare ? Factors::bf16 : Factors::two_bytes;
}

/// x as 256 q + rest: rounded in floats, so that what lies half-way falls the same way.
std::vector<double> as_two_bytes(const std::vector<float>& x) {
  std::vector<double> out;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const auto largest = static_cast<float>(largest_beside(x, i));
    const float scaled = x[i] * (largest > 0 ? 127.0f / largest : 0.0f);
    const float q = std::nearbyint(scaled);
    const float rest = std::min(std::nearbyint(256.0f * (scaled - q)), 127.0f);
    out.push_back((double{q} + double{rest} / 256) * largest / 127);
  }
  return out;
}

/// sum w[i] x[i] as the kernels take it, and how far from it unrounded factors would lead at most.
struct Expected {
  double value = 0, exact = 0, bound = 0;

  Expected(const std::vector<double>& w, const std::vector<float>& x, Factors factors) {
    const auto taken =
        factors == Factors::two_bytes ? as_two_bytes(x) : std::vector<double>(x.begin(), x.end());
    const auto as_bf16 = [](double v) {
      return double{bf16_to_f32(f32_to_bf16(static_cast<float>(v)))};
    };
    for (std::size_t i = 0; i < x.size(); ++i) {
      exact += w[i] * x[i];
      value += factors == Factors::bf16 ? as_bf16(w[i]) * as_bf16(taken[i]) : w[i] * taken[i];
      bound += std::abs(w[i]) * (factors == Factors::bf16        ? std::abs(x[i]) / 127
                                 : factors == Factors::two_bytes ? largest_beside(x, i) / 254 / 255
                                                                 : 0);
    }
  }
};

}  // namespace

TEST(int8_multiplies_panels) {
  for_all_kernels([](const Kernels& kernels) {
    const PanelKernels& panels = kernels.panels[2];
    for (const std::int64_t rows : {1, 7, 49, 61})
      for (const std::int64_t n : {1, 33, 64, 300, 576, 1100}) {
        const Stored w(rows, n);
        TestPanels b(n, kernels.panel, 2), c(rows, kernels.panel, 2);
        for (std::int64_t i = 0; i < n; ++i) b.at(5, i) = 0;  // no largest value
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
            const Expected expected({row, row + n}, x, factors_of(kernels, 2));
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
    const PanelKernels& panels = kernels.panels[2];
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
            // Bytes take the rows' scales into x before it is rounded.
            const Factors factors = factors_of(kernels, 2);
            std::vector<float> x = b.token(t);
            std::vector<double> column;
            for (std::int64_t j = 0; j < rows; ++j) {
              const float scale =
                  factors == Factors::two_bytes
                      ? scale_of(w, j, (first + i) / static_cast<std::int64_t>(kPart))
                      : 1;
              x[j] *= scale;
              column.push_back(scale == 0 ? 0 : double{w.values[j * n + first + i]} / scale);
            }
            const Expected expected(column, x, factors);
            CHECK_NEAR(c.at(t, i), before.at(t, i) + expected.value, 4e-4);
            CHECK_NEAR(c.at(t, i), before.at(t, i) + expected.exact, expected.bound + 4e-4);
          }
        CHECK(c.values.back() == 3);
      }
  });
}

TEST(int8_panels_keep_tokens_apart) {
  for_all_kernels([](const Kernels& kernels) {
    const PanelKernels& panels = kernels.panels[2];
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

namespace {

std::vector<float> run(const Backend& backend, State& state, const Step& step, std::int64_t rows) {
  backend.begin(state, step);
  backend.embed(state);
  for (std::int64_t l = 0; l < backend.model().config.num_layers; ++l) {
    backend.qkv(state, l);
    backend.attention(state, l);
    backend.attention_out(state, l);
    backend.ffn(state, l);
  }
  const auto logits = backend.logits(state, rows);
  return {logits.begin(), logits.end()};
}

/// The last token's logits.
naive::Vector run(naive::Session& session, const Step& step) {
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

ModelConfig wide_config() {
  ModelConfig config = naive::small_config();
  config.hidden_size = 130;
  config.intermediate_size = 150;
  return config;
}

/// Relative error in the L2 norm.
double error(const std::vector<float>& found, const std::vector<double>& expected) {
  double difference = 0, size = 0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    difference += (found[i] - expected[i]) * (found[i] - expected[i]);
    size += expected[i] * expected[i];
  }
  return std::sqrt(difference / size);
}

}  // namespace

TEST(int8_model_stays_near_doubles) {
  const naive::RandomModel model(wide_config(), WeightFormat::int8, 5);
  const auto tokens = naive::random_tokens(12, 101);
  for_all_kernels([&](const Kernels& kernels) {
    setenv("TDA_CPU_ISA", kernels.name, 1);
    const auto backend = make_cpu_backend(model.get(), 2);
    unsetenv("TDA_CPU_ISA");
    const auto state = backend->new_state(12, KvFormat::f32);
    naive::Session session(model.get(), KvFormat::f32);
    // Decode rounds activations everywhere; where prefill does not, it computes with the stored
    // weights.
    const double bound = kernels.panels[2].prepare ? 0.03 : 1e-5;
    const Step prompt = naive::step_of(Tokens(tokens).first(9), 0);
    const auto two = run(*backend, *state, prompt, 2);  // more than one row: panels to the head
    CHECK(error({two.begin() + 101, two.end()}, run(session, prompt)) < bound);
    for (std::int64_t t = 9; t < 12; ++t) {
      const Step step = naive::step_of(Tokens(tokens).subspan(t, 1), t);
      CHECK(error(run(*backend, *state, step, 1), run(session, step)) < 0.03);
    }
  });
}

TEST(int8_masks_keep_outliers) {
  const naive::RandomModel model(wide_config(), WeightFormat::int8, 5);
  const auto tokens = naive::random_tokens(5, 101);
  // Without neuron 0, whose down row has an outlier, but with 75, whose row has one, too.
  const std::vector<std::int32_t> mask = {3, 8, 70, 75, 76, 149};
  const auto backend = make_cpu_backend(model.get(), 2);
  const auto state = backend->new_state(5, KvFormat::f32);
  naive::Session session(model.get(), KvFormat::f32);
  for (std::int64_t l = 0; l < 2; ++l) {
    backend->set_mask(*state, l, mask);
    session.masks[l] = mask;
  }
  for (const auto [first, count] : {std::pair{0, 4}, std::pair{4, 1}}) {
    const Step step = naive::step_of(Tokens(tokens).subspan(first, count), first, FfnMode::sparse);
    CHECK(error(run(*backend, *state, step, 1), run(session, step)) < 0.03);
  }
}

TEST(int8_prefill_agrees_with_decode) {
  const naive::RandomModel model(wide_config(), WeightFormat::int8, 8);
  const auto tokens = naive::random_tokens(70, 101);
  for_all_kernels([&](const Kernels& kernels) {
    setenv("TDA_CPU_ISA", kernels.name, 1);
    std::vector<std::vector<float>> runs;
    for (const int threads : {1, 2, 3}) {
      const auto backend = make_cpu_backend(model.get(), threads);
      const auto state = backend->new_state(70, KvFormat::f32);
      runs.push_back(run(*backend, *state, naive::step_of(tokens, 0), 70));
      CHECK(runs.back() == runs[0]);  // any number of threads gives the same bits
    }
    const auto backend = make_cpu_backend(model.get(), 2);
    unsetenv("TDA_CPU_ISA");
    const auto state = backend->new_state(70, KvFormat::f32);
    std::vector<double> decoded;
    for (std::int64_t t = 0; t < 70; ++t) {
      const Step step = naive::step_of(Tokens(tokens).subspan(t, 1), t);
      for (const float v : run(*backend, *state, step, 1)) decoded.push_back(v);
    }
    CHECK(error(runs[0], decoded) < 0.02);
  });
}

TEST(int8_reads_what_it_counts) {
  const naive::RandomModel model(wide_config(), WeightFormat::int8, 6);
  const auto tokens = naive::random_tokens(12, 101);
  const Matrix& gate = model.get()->layers[0].gate;
  const std::int64_t high = gate.row_bytes(), low = gate.low_row_bytes();
  std::vector<std::vector<float>> runs;
  for (const int threads : {1, 2, 3, 4}) {
    const auto backend = make_cpu_backend(model.get(), threads);
    const auto state = backend->new_state(12, KvFormat::f32);
    backend->set_thresholds(*state, 1, {0.3f, 0.1f});
    std::vector<float> all;
    for (std::int64_t t = 0; t < 12; ++t) {
      const Step step = naive::step_of(Tokens(tokens).subspan(t, 1), t, FfnMode::sparse);
      const auto logits = run(*backend, *state, step, 1);
      all.insert(all.end(), logits.begin(), logits.end());
    }
    runs.push_back(all);
    const FfnReads dense = backend->ffn_reads(*state, 0), sparse = backend->ffn_reads(*state, 1);
    CHECK(dense.exact == 12 * 150 && dense.coarse == 0);
    CHECK(dense.bytes == 12 * 150 * model.get()->neuron_bytes());
    CHECK(sparse.exact > 50 && sparse.coarse > 50 && sparse.exact + sparse.coarse < 12 * 150 - 50);
    CHECK(sparse.bytes ==
          12 * 150 * 2 * high + sparse.exact * (high + 3 * low) + sparse.coarse * high);
  }
  for (const auto& r : runs) CHECK(r == runs[0]);
}

TEST(unlikely_logits_are_estimates) {
  ModelConfig config = wide_config();
  config.vocab_size = 2500;  // several tasks
  const naive::RandomModel model(config, WeightFormat::int8, 9);
  const Matrix& head = model.get()->head;
  for_all_kernels([&](const Kernels& kernels) {
    setenv("TDA_CPU_ISA", kernels.name, 1);
    for (const Token token : naive::random_tokens(8, 2500)) {
      const auto logits = [&](float likely, int threads, std::int64_t* bytes = nullptr) {
        const auto backend = make_cpu_backend(model.get(), threads);
        const auto state = backend->new_state(1, KvFormat::f32);
        Step step = naive::step_of({&token, 1}, 0);
        step.head = likely;
        const auto found = run(*backend, *state, step, 1);
        if (bytes) *bytes = backend->head_bytes(*state);
        return found;
      };
      std::int64_t read = 0;
      const auto dense = logits(0, 2, &read);
      CHECK(read == head.bytes());
      CHECK(logits(1e-30f, 2, &read) == dense);
      CHECK(read == head.bytes());
      const auto sparse = logits(0.1f, 2, &read);
      CHECK(logits(0.1f, 1) == sparse && logits(0.1f, 3) == sparse);
      // With 1 all but the first are estimates.
      const auto estimates = logits(1, 2);
      double error = 0;
      std::int64_t exact = 0, unknown = 0;
      for (std::size_t i = 0; i < dense.size(); ++i) {
        exact += sparse[i] == dense[i];
        unknown += estimates[i] == dense[i];
        CHECK(sparse[i] == dense[i] || sparse[i] == estimates[i]);
        error = std::max(error, std::abs(double{estimates[i]} - dense[i]));
      }
      CHECK(unknown < 5 && exact > 5 && exact < 2000 && error > 0.001 && error < 1);
      CHECK(read == head.rows * head.row_bytes() + exact * head.low_row_bytes());
      // Which are likely is seen from the estimates, of which the first's is known up to the error.
      const double least = *std::max_element(dense.begin(), dense.end()) + std::log(0.1);
      for (std::size_t i = 0; i < dense.size(); ++i) {
        if (estimates[i] == dense[i]) continue;
        if (sparse[i] == dense[i]) CHECK(estimates[i] > least - 2 * error);
        if (sparse[i] != dense[i]) CHECK(estimates[i] < least + 2 * error);
      }
    }
    unsetenv("TDA_CPU_ISA");
  });
}

TEST(int8_thresholds_are_checked) {
  const naive::RandomModel int8(wide_config(), WeightFormat::int8, 7);
  const naive::RandomModel bf16(wide_config(), WeightFormat::bf16, 7);
  const auto backend = make_cpu_backend(int8.get(), 1);
  const auto state = backend->new_state(4, KvFormat::f32);
  CHECK_THROWS(backend->set_thresholds(*state, 0, {1, 2}), OptionError, "coarse <= exact");
  CHECK_THROWS(backend->set_thresholds(*state, 0, {NAN, 0}), OptionError, "exact nan");
  CHECK_THROWS(backend->set_thresholds(*state, 0, {2, 1, true}), OptionError, "gate estimate");
  const auto backend16 = make_cpu_backend(bf16.get(), 1);
  const auto state16 = backend16->new_state(4, KvFormat::f32);
  CHECK_THROWS(backend16->set_thresholds(*state16, 0, {2, 1}), OptionError, "one plane");
}

int main() { return run_tests(); }
