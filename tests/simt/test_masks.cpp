// Scope "sequence": the device's kernels, run on the CPU, must give the same masks and thresholds
// as cpp/sparsity.
#include <algorithm>
#include <limits>
#include <random>

#include "check.h"
#include "model/forward.h"
#include "simt_backend.h"

using namespace tda;
using naive::RandomModel, naive::random_tokens, naive::small_config, naive::step_of;

#ifdef __SANITIZE_ADDRESS__
constexpr int kShapes = 10, kSchedules = 3;
#else
constexpr int kShapes = 60, kSchedules = 300;
#endif

namespace {

std::mt19937 random_numbers(11);
int between(int low, int high) {
  return low + static_cast<int>(random_numbers() % static_cast<unsigned>(high - low + 1));
}

ModelConfig shape(std::int64_t hidden, std::int64_t neurons) {
  ModelConfig config = small_config();
  config.hidden_size = hidden;
  config.intermediate_size = neurons;
  return config;
}

/// A backend and a state with a given statistic.
struct Masked {
  Masked(const ModelConfig& config, WeightFormat format)
      : model(config, format, 1),
        backend(model.get(), 1),
        owned(backend.new_state(96, KvFormat::f32)),
        state(CudaState::of(*owned)) {}

  void set_statistic(std::int64_t layer, const std::vector<double>& sums, double tokens) {
    std::copy(sums.begin(), sums.end(), state.sums.data() + layer * std::ssize(sums));
    state.layers[layer].tokens = tokens;
  }
  std::vector<float> scores(std::int64_t layer) const {
    return relative_magnitudes(backend.statistic(state, layer), backend.gathered(state, layer));
  }
  const Matrix& down(std::int64_t layer) const { return model.get()->layers[layer].down; }
  /// Prefills in two steps, samples all tokens except the third, gathers the statistic.
  void prefill(std::int64_t tokens) {
    const std::vector<Token> prompt = random_tokens(tokens, model.get()->config.vocab_size);
    backend.reserve_samples(state, std::max<std::int64_t>(tokens - 1, 1));
    const std::int64_t half = (tokens + 1) / 2;
    for (const auto& [first, end] : {std::pair{std::int64_t{0}, half}, std::pair{half, tokens}}) {
      if (first == end) continue;
      std::vector<std::int64_t> sampled;
      for (std::int64_t t = first; t < end; ++t)
        if (t != 2) sampled.push_back(t - first);
      Step step = step_of(Tokens(prompt).subspan(first, end - first), first, FfnMode::gather);
      step.samples = sampled;
      forward(backend, state, step, 0);
    }
  }

  RandomModel model;
  CudaBackend backend;
  std::unique_ptr<State> owned;
  CudaState& state;
};

enum class Kind { any, ties, equal, zeros, some_zeros, count };

std::vector<double> random_sums(Kind kind, std::int64_t neurons) {
  std::vector<double> sums(neurons);
  for (double& sum : sums) {
    const double any = between(1, 1 << 30) / 1e9;
    sum = kind == Kind::any          ? any
          : kind == Kind::ties       ? between(0, 5) / 7.0
          : kind == Kind::equal      ? 0.3
          : kind == Kind::some_zeros ? between(0, 1) * any
                                     : 0;
  }
  return sums;
}

/// The device must find the host's thresholds. It adds contributions in another order, which
/// matters only if a CETT is within rounding of the target; in these cases none is.
void check_search(Masked& d, double target) {
  const std::vector<ThresholdSearch> found = d.backend.search_thresholds(d.state, target);
  for (std::int64_t l = 0; l < std::ssize(found); ++l) {
    const FfnSample sample = {d.scores(l), d.backend.samples(d.state, l)};
    const ThresholdSearch expected = search_threshold({&sample, 1}, d.down(l), target);
    CHECK(found[l].threshold == expected.threshold);
    CHECK_NEAR(found[l].error, expected.error, 1e-5);
    CHECK_NEAR(found[l].error, cett({&sample, 1}, d.down(l), found[l].threshold), 1e-5);
    CHECK(found[l].error <= target);
  }
}

}  // namespace

TEST(masks_are_those_of_the_host) {
  for (int i = 0; i < kShapes; ++i) {
    // Mostly not multiples of 32 (words) or 256 (blocks).
    const std::int64_t neurons = i < 4 ? std::int64_t{1} << 3 * i : between(1, 700);
    Masked d(shape(3, neurons), WeightFormat::f32);
    for (int kind = 0; kind < static_cast<int>(Kind::count); ++kind) {
      for (std::int64_t l = 0; l < 2; ++l)
        d.set_statistic(l, random_sums(static_cast<Kind>(kind), neurons), between(1, 2000) / 7.0);
      const auto at_least = [&](float first, float second) {
        const std::vector<float> thresholds = {first, second};
        d.backend.mask_at_least(d.state, thresholds);
        for (std::int64_t l = 0; l < 2; ++l)
          CHECK(d.backend.mask(d.state, l) == mask_at_least(d.scores(l), thresholds[l]));
      };
      const auto score = [&](std::int64_t l) {
        return d.scores(l)[between(0, static_cast<int>(neurons) - 1)];
      };
      at_least(0, -0.0f);
      at_least(score(0), std::nextafter(score(1), 2.0f));
      at_least(score(0) / 2, std::numeric_limits<float>::max());
      for (const double active : {1e-9, 0.5, between(1, 999) / 1000.0, 1.0}) {
        d.backend.mask_top_share(d.state, active);
        for (std::int64_t l = 0; l < 2; ++l)
          CHECK(d.backend.mask(d.state, l) == mask_top_share(d.scores(l), active));
      }
    }
  }
}

TEST(a_statistic_that_overflows_is_refused_and_changes_no_mask) {
  Masked d(shape(3, 40), WeightFormat::f32);
  for (const double bad :
       {std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()}) {
    for (std::int64_t l = 0; l < 2; ++l) d.set_statistic(l, random_sums(Kind::any, 40), 3);
    d.backend.mask_top_share(d.state, 0.5);
    const auto before = d.backend.mask(d.state, 1);
    d.state.sums.data()[40 + 33] = bad;
    CHECK_THROWS(d.backend.mask_top_share(d.state, 0.25), Error, "neuron 33");
    CHECK_THROWS(d.backend.mask_at_least(d.state, std::vector<float>{1, 1}), Error, "neuron 33");
    CHECK(d.backend.mask(d.state, 1) == before);
    d.backend.reserve_samples(d.state, 0);
    CHECK_THROWS(d.backend.search_thresholds(d.state, 0.5), Error, "neuron 33");
  }
}

TEST(a_mask_made_here_is_as_good_as_one_that_was_set) {
  Masked d(shape(66, 150), WeightFormat::f32);
  const auto decode = [&] {
    const Token token = 3;
    const auto logits = forward(d.backend, d.state, step_of({&token, 1}, 5, FfnMode::sparse), 1);
    return std::vector<float>(logits.begin(), logits.end());
  };
  d.prefill(5);
  d.backend.mask_top_share(d.state, 0.3);
  const std::vector<float> expected = decode();
  CHECK(d.backend.ffn_reads(d.state, 1).exact == 45);
  const std::int64_t bytes = d.backend.ffn_reads(d.state, 1).bytes;
  decode();
  // Reads are counted with the mask that was active.
  const auto mask = d.backend.mask(d.state, 1);
  d.backend.mask_top_share(d.state, 1);
  CHECK(d.backend.ffn_reads(d.state, 1).bytes == 2 * bytes);
  CHECK(decode() != expected);
  const auto first = mask_top_share(d.scores(0), 0.3);
  d.backend.set_mask(d.state, 0, first);
  d.backend.set_mask(d.state, 1, mask);
  CHECK(decode() == expected);
}

TEST(samples_are_those_of_the_cpu_backend) {
  for (const Estimate estimate : {Estimate::contribution, Estimate::gate}) {
    const RandomModel model(small_config(), WeightFormat::f32, 2);
    const CudaBackend cuda(model.get(), 1);
    const auto cpu = make_cpu_backend(model.get(), 1);
    const std::vector<Token> tokens = random_tokens(9, 101);
    std::vector<std::vector<float>> seen[2];
    for (const Backend* backend : std::initializer_list<const Backend*>{&cuda, cpu.get()}) {
      const auto state = backend->new_state(9, KvFormat::f32);
      state->estimate = estimate;
      backend->reserve_samples(*state, 20);
      backend->reserve_samples(*state, 5);
      std::int64_t position = 0;
      for (const std::vector<std::int64_t>& sampled :
           {std::vector<std::int64_t>{0, 3, 4}, std::vector<std::int64_t>{},
            std::vector<std::int64_t>{0}, std::vector<std::int64_t>{1}}) {
        const std::int64_t size = position == 0 ? 5 : position == 7 ? 2 : 1;
        Step step = step_of(Tokens(tokens).subspan(position, size), position,
                            position == 6 ? FfnMode::dense : FfnMode::gather);
        step.samples = sampled;
        forward(*backend, *state, step, 0);
        position += size;
      }
      for (std::int64_t l = 0; l < 2; ++l)
        seen[backend == &cuda].push_back(backend->samples(*state, l));
    }
    for (std::int64_t l = 0; l < 2; ++l) {
      CHECK(seen[0][l].size() == 5 * 37);
      CHECK(seen[1][l].size() == 5 * 37);
      for (std::size_t i = 0; i < seen[0][l].size(); ++i)
        CHECK_NEAR(seen[1][l][i], seen[0][l][i], 1e-4);
    }
  }
  Masked d(small_config(), WeightFormat::f32);
  const std::int64_t sampled = 0;
  const Token token = 1;
  Step step = step_of({&token, 1}, 0);
  step.samples = {&sampled, 1};
  CHECK_THROWS(d.backend.begin(d.state, step), OptionError, "room for 0");
}

TEST(thresholds_are_those_of_the_host) {
  for (int i = 0; i < kShapes / 2; ++i) {
    // The first case has several tiles in both directions.
    const std::int64_t hidden = i == 0 ? 130 : between(1, 100),
                       tokens = i == 0 ? 80 : between(1, 9);
    Masked d(shape(hidden, i == 1 ? 1 : between(1, 350)),
             i % 2 ? WeightFormat::bf16 : WeightFormat::f32);
    d.prefill(tokens);
    for (const double target : {0.0, 1e-9, 0.1, between(1, 99) / 100.0, 1 - 1e-9})
      check_search(d, target);
    const std::int64_t neurons = d.model.get()->config.intermediate_size;
    for (int kind = 1; kind < static_cast<int>(Kind::count); ++kind) {
      for (std::int64_t l = 0; l < 2; ++l)
        d.set_statistic(l, random_sums(static_cast<Kind>(kind), neurons), 3);
      check_search(d, between(1, 99) / 100.0);
    }
  }
}

TEST(tokens_whose_ffn_is_zero_have_no_error) {
  Masked d(shape(20, 40), WeightFormat::f32);
  d.prefill(4);
  for (std::int64_t j = 0; j < 40; ++j) d.state.samples.data()[(40 + j) * 3] = 0;  // layer 1
  check_search(d, 0.3);
  std::fill_n(d.state.samples.data(), 2 * 40 * 3, 0.0f);
  check_search(d, 0.3);  // dropping any neuron loses nothing
  CHECK(d.backend.search_thresholds(d.state, 0.3)[1].threshold == std::ranges::max(d.scores(1)));
}

TEST(hundreds_of_schedules_make_the_same_masks_and_thresholds) {
  Masked d(shape(18, 290), WeightFormat::f32);
  d.prefill(4);
  const auto outcome = [&] {
    std::vector<float> seen;
    std::vector<float> thresholds;
    for (const ThresholdSearch& found : d.backend.search_thresholds(d.state, 0.3)) {
      thresholds.push_back(found.threshold);
      seen.push_back(found.threshold);
      seen.push_back(static_cast<float>(found.error));
    }
    const auto see = [&] {
      for (std::int64_t l = 0; l < 2; ++l)
        for (const std::int32_t j : d.backend.mask(d.state, l))
          seen.push_back(static_cast<float>(j));
    };
    d.backend.mask_at_least(d.state, thresholds);
    see();
    d.backend.mask_top_share(d.state, 0.4);
    see();
    return seen;
  };
  const std::vector<float> expected = outcome();
  for (int seed = 0; seed < kSchedules; ++seed) {
    simt::seed(static_cast<unsigned>(seed));
    CHECK(outcome() == expected);
  }
}

int main() { return run_tests(); }
