// Rounding by the inputs' products: the factor, each code, and what the product gains.
#include <tda/error.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "brick_tests.h"
#include "check.h"
#include "cpu/input_products.h"
#include "cpu/isa.h"
#include "cpu/layer_inputs.h"
#include "naive.h"

using namespace tda;

namespace {

constexpr std::int64_t kInputs = 70, kRows = 75;  // neither fills its last block

/// Inputs that are sums of fewer sources, of sizes from 1 to 20. [tokens, inputs]
std::vector<float> correlated(std::int64_t tokens, std::uint64_t seed) {
  constexpr std::int64_t kSources = 25;
  std::mt19937_64 random(seed), of_mixture(7);
  std::normal_distribution<double> normal;
  std::vector<double> mixture(kSources * kInputs);
  for (double& v : mixture) v = normal(of_mixture);
  std::vector<float> x(tokens * kInputs);
  for (std::int64_t t = 0; t < tokens; ++t) {
    double sources[kSources];
    for (double& v : sources) v = normal(random);
    for (std::int64_t i = 0; i < kInputs; ++i) {
      double sum = 0.3 * normal(random);
      for (std::int64_t s = 0; s < kSources; ++s) sum += sources[s] * mixture[s * kInputs + i];
      x[t * kInputs + i] = static_cast<float>(sum * (1 + i % 20));
    }
  }
  return x;
}

InputFactor factor_of(const std::vector<float>& x, int threads = 2,
                      const Kernels* kernels = nullptr) {
  ThreadPool pool(threads);
  InputProducts products(kernels ? *kernels : choose_kernels(), kInputs);
  const std::size_t half = x.size() / kInputs / 2 * kInputs;
  products.add(pool, std::span(x).first(half));
  products.add(pool, std::span(x).subspan(half));
  return products.factor(pool);
}

std::vector<float> random_weights() {
  std::mt19937_64 random(3);
  std::normal_distribution<float> normal;
  std::vector<float> values(kRows * kInputs);
  for (float& v : values) v = normal(random);
  values[5 * kInputs + 40] = 200;  // an outlier
  for (std::int64_t i = 0; i < kInputs; i += 3) values[9 * kInputs + i] = 0;
  std::fill_n(values.begin() + 11 * kInputs, kInputs, 0.0f);
  return values;
}

/// What rounding by `inputs`, or without, stores.
std::vector<float> rounded(const StoredBricks& bricks) {
  std::vector<float> found(kRows * kInputs);
  for (std::int64_t r = 0; r < kRows; ++r)
    dequantize_bricks(bricks.w, r, 0, kInputs, found.data() + r * kInputs);
  return found;
}

/// The squared error of the product with x, relative to the product.
double error_of_product(const std::vector<float>& values, const std::vector<float>& found,
                        const std::vector<float>& x) {
  double error = 0, size = 0;
  for (std::size_t first = 0; first < x.size(); first += kInputs)
    for (std::int64_t r = 0; r < kRows; ++r) {
      if (r == 5) continue;  // its outlier would be most of the product
      double y = 0, missed = 0;
      for (std::int64_t i = 0; i < kInputs; ++i) {
        const double value = values[r * kInputs + i];
        y += value * x[first + i];
        missed += (value - found[r * kInputs + i]) * x[first + i];
      }
      error += missed * missed;
      size += y * y;
    }
  return error / size;
}

}  // namespace

TEST(factor_gives_the_products_back) {
  const std::vector<float> x = correlated(301, 1);
  const InputFactor found = factor_of(x);
  CHECK(found.n == 96 && std::ssize(found.importance) == 96);
  std::vector<double> sums(96 * 96);
  double mean = 0;
  for (std::size_t first = 0; first < x.size(); first += kInputs)
    for (std::int64_t i = 0; i < kInputs; ++i)
      for (std::int64_t j = 0; j < kInputs; ++j)
        sums[i * 96 + j] += double{x[first + i]} * x[first + j];
  for (std::int64_t k = 1; k < 96; ++k) {  // groups of 16 by their largest, inputs in them by size
    const auto group = [&](std::int64_t at) { return found.order[at] / 16; };
    const auto size = [&](std::int64_t at) { return sums[found.order[at] * 97]; };
    CHECK(k % 16 == 0 || group(k) == group(k - 1));
    CHECK(size(k) >= size(k - 1) || k % 16 == 0);
    CHECK(k % 16 != 15 || k == 15 || size(k) >= size(k - 16));
  }
  for (std::int64_t i = 0; i < kInputs; ++i) mean += sums[i * 96 + i] / kInputs;
  for (std::int64_t i = 0; i < 96; ++i) sums[i * 96 + i] += 0.01 * mean;
  for (std::int64_t i = 0; i < 96; ++i)
    for (std::int64_t j = i; j < 96; ++j) {
      double product = 0;
      for (std::int64_t k = 0; k <= i; ++k) {
        const auto entry = [&](std::int64_t c) {
          return k == c ? 1.0 : double{found.feedback[k * 96 + c]};
        };
        product += entry(i) * found.importance[k] * entry(j);
      }
      const double size = std::sqrt(sums[found.order[i] * 97] * sums[found.order[j] * 97]);
      CHECK_NEAR(product * mean, sums[found.order[i] * 96 + found.order[j]], 1e-5 * size);
      CHECK(i == j || found.feedback[j * 96 + i] == 0);
    }
}

TEST(factor_does_not_depend_on_threads) {
  const std::vector<float> x = correlated(301, 1);
  const InputFactor one = factor_of(x, 1), three = factor_of(x, 3);
  CHECK(one.feedback == three.feedback && one.importance == three.importance);
}

TEST(unused_inputs_are_all_alike) {
  const InputFactor found = factor_of(std::vector<float>(10 * kInputs));
  for (const float v : found.importance) CHECK_NEAR(v, 0.01, 1e-9);
  for (const float v : found.feedback) CHECK(v == 0);
}

TEST(inputs_that_are_not_finite_are_refused) {
  for (const float value : {std::numeric_limits<float>::infinity(), std::nanf("")}) {
    std::vector<float> x = correlated(20, 1);
    x[3 * kInputs + 33] = value;
    CHECK_THROWS(factor_of(x), Error, "not finite");
  }
}

/// Against the rule in doubles: from the last input on, each code is the one nearest to the weight
/// and what the weights behind miss, by the feedback.
TEST(codes_are_nearest_with_feedback) {
  const std::vector<float> values = random_weights();
  const InputFactor inputs = factor_of(correlated(400, 1));
  for (const bool by_block : {false, true}) {
    const StoredBricks bricks(kRows, values, BrickKind::int4, by_block, &inputs);
    const std::vector<float> found = rounded(bricks);
    std::int64_t clipped = 0;
    for (std::int64_t r = 0; r < kRows; ++r) {
      std::vector<double> missed(inputs.n);
      for (std::int64_t at = inputs.n - 1; at >= 0; --at) {
        const std::int64_t k = inputs.order[at];
        if (k >= kInputs) continue;
        const double value = values[r * kInputs + k], stored = found[r * kInputs + k];
        missed[at] = value - stored;
        if (value == 0 || value == 200) {
          CHECK_NEAR(stored, value, 1e-5);
          continue;
        }
        double wanted = value;
        for (std::int64_t i = at + 1; i < inputs.n; ++i)
          wanted += missed[i] * inputs.feedback[at * inputs.n + i];
        const auto& brick = bricks.w.brick<CentredBrick>(r / 64, k / 32);
        const double step = double{bricks.w.steps[r]} * brick.scales[k / 16 % 2][r % 64];
        const double ends = std::max(step * 7, step * -8), other = std::min(step * 7, step * -8);
        clipped += wanted > ends || wanted < other;
        CHECK_NEAR(stored, std::clamp(wanted, other, ends), 0.5001 * std::abs(step) + 1e-6);
      }
    }
    CHECK(clipped < kRows * kInputs / 8);
  }
}

TEST(products_lose_less) {
  const std::vector<float> values = random_weights();
  const InputFactor inputs = factor_of(correlated(400, 1));
  const std::vector<float> plain = rounded(StoredBricks(kRows, values, BrickKind::int4));
  const std::vector<float> by_inputs =
      rounded(StoredBricks(kRows, values, BrickKind::int4, false, &inputs));
  for (const std::uint64_t seed : {1, 2}) {  // the tokens of the factor, and others
    const std::vector<float> x = correlated(100, seed);
    const double before = error_of_product(values, plain, x);
    const double after = error_of_product(values, by_inputs, x);
    CHECK(before > 1e-3 && after < 0.4 * before);
  }
}

/// The inputs that each layer gets are those of a whole prefill, whatever ran between.
TEST(layer_inputs_are_those_of_prefill) {
  const naive::RandomModel random(naive::small_config(), WeightFormat::graded, 5);
  const std::shared_ptr<const Model> model = random.get();
  const std::vector<std::vector<Token>> texts = {{5, 9, 77, 3, 3, 20, 41}, {8}, {100, 0, 1, 2}};
  LayerInputs inputs(model, 2, texts);
  const CpuBackend backend(model, 1);
  for (std::int64_t layer = 0; layer < model->config.num_layers; ++layer) {
    std::vector<std::vector<float>> found[kProducts];
    inputs.run_layer(layer, [&](Product product, std::span<const float> x) {
      found[static_cast<int>(product)].emplace_back(x.begin(), x.end());
    });
    for (std::size_t i = 0; i < texts.size(); ++i) {
      const auto state = backend.new_state(20, KvFormat::automatic);
      std::vector<std::int64_t> all(texts[i].size());
      for (std::size_t t = 0; t < all.size(); ++t) all[t] = static_cast<std::int64_t>(t);
      Step step = naive::step_of(texts[i], 0);
      step.samples = all;
      naive::run(backend, *state, step, 1);
      const CpuState::Layer& expected = CpuState::of(*state).layers[layer];
      for (int p = 0; p < kProducts - 1; ++p)
        CHECK(!found[p][i].empty() && found[p][i] == expected.input_samples[p]);
      CHECK(!expected.samples.empty() && found[kProducts - 1][i] == expected.samples);
    }
  }
}

int main() { return run_tests(); }
