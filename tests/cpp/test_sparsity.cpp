#include <tda/error.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <random>
#include <set>

#include "base/half.h"
#include "check.h"
#include "sparsity/predictor.h"
#include "sparsity/setting.h"
#include "sparsity/sparsity.h"

using namespace tda;
using Ids = std::vector<std::int32_t>;

namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// ---- samples and their naive reference ---------------------------------------------------------

enum class Tail { gaussian, heavy };

/// A down matrix with samples of `tokens[s]` tokens each, and scores from the real statistic.
struct Case {
  Case(Tail tail, WeightFormat format, std::int64_t neurons, std::int64_t width,
       const std::vector<std::int64_t>& tokens, unsigned seed = 1)
      : weights(neurons * width), halves(neurons * width) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (std::size_t i = 0; i < weights.size(); ++i) {
      halves[i] = f32_to_bf16(normal(random));
      weights[i] = format == WeightFormat::bf16 ? bf16_to_f32(halves[i]) : normal(random);
    }
    down = {format, neurons, width,
            format == WeightFormat::bf16 ? reinterpret_cast<const std::byte*>(halves.data())
                                         : reinterpret_cast<const std::byte*>(weights.data())};
    for (const std::int64_t count : tokens) {
      FfnSample sample;
      std::vector<float> strength(neurons, 1.0f);
      if (tail == Tail::heavy) {
        for (float& s : strength) s = std::exp(2 * normal(random));
      }
      for (std::int64_t t = 0; t < count; ++t) {
        for (std::int64_t j = 0; j < neurons; ++j) sample.h.push_back(normal(random) * strength[j]);
      }
      sample.scores = scores_of(sample.h);
      samples.push_back(std::move(sample));
    }
  }
  Case(const Case&) = delete;

  std::vector<float> scores_of(const std::vector<float>& h) const {
    std::vector<double> lengths(down.rows), sums(down.rows);
    for (std::int64_t j = 0; j < down.rows; ++j) {
      for (std::int64_t c = 0; c < down.cols; ++c) lengths[j] += std::pow(weight(j, c), 2);
      lengths[j] = std::sqrt(lengths[j]);
    }
    const std::int64_t tokens = static_cast<std::int64_t>(h.size()) / down.rows;
    for (std::int64_t t = 0; t < tokens; ++t) {
      double total = 0;
      for (std::int64_t j = 0; j < down.rows; ++j) {
        total += std::pow(h[t * down.rows + j] * lengths[j], 2);
      }
      for (std::int64_t j = 0; j < down.rows; ++j) {
        sums[j] += std::pow(h[t * down.rows + j] * lengths[j], 2) / total;
      }
    }
    return relative_magnitudes(sums, static_cast<double>(tokens));
  }

  double weight(std::int64_t j, std::int64_t c) const { return weights[j * down.cols + c]; }

  double naive_cett(float threshold) const {
    double sum = 0;
    std::int64_t tokens = 0;
    for (const FfnSample& sample : samples) {
      for (std::size_t h = 0; h < sample.h.size(); h += down.rows, ++tokens) {
        double dropped_squares = 0, all_squares = 0;
        for (std::int64_t c = 0; c < down.cols; ++c) {
          double dropped = 0, all = 0;
          for (std::int64_t j = 0; j < down.rows; ++j) {
            const double contribution = sample.h[h + j] * weight(j, c);
            all += contribution;
            if (sample.scores[j] < threshold) dropped += contribution;
          }
          dropped_squares += dropped * dropped;
          all_squares += all * all;
        }
        if (all_squares > 0) sum += std::sqrt(dropped_squares / all_squares);
      }
    }
    return sum / static_cast<double>(tokens);
  }

  std::set<float> pooled() const {
    std::set<float> scores;
    for (const FfnSample& sample : samples)
      scores.insert(sample.scores.begin(), sample.scores.end());
    return scores;
  }

  std::vector<float> weights;         // [F, H], the values of `down`
  std::vector<std::uint16_t> halves;  // [F, H]
  Matrix down;
  std::vector<FfnSample> samples;
};

void for_each_kind(const std::function<void(const Case&)>& body) {
  for (const Tail tail : {Tail::gaussian, Tail::heavy}) {
    for (const WeightFormat format : {WeightFormat::f32, WeightFormat::bf16}) {
      body(Case(tail, format, 203, 250, {1, 33, 40}));
    }
  }
}

void check_contract(const Case& c, double target) {
  const ThresholdSearch found = search_threshold(c.samples, c.down, target);
  const std::set<float> scores = c.pooled();
  CHECK(found.error <= target);
  CHECK_NEAR(found.error, c.naive_cett(found.threshold), 1e-6);
  CHECK(scores.contains(found.threshold));
  const auto next = scores.upper_bound(found.threshold);
  if (next != scores.end()) CHECK(c.naive_cett(*next) > target - 1e-6);
}

}  // namespace

// ---- search ------------------------------------------------------------------------------------

TEST(cett_equals_naive_reference) {
  for_each_kind([](const Case& c) {
    const std::set<float> scores = c.pooled();
    for (const std::size_t rank : {1, 50, 300, 550, 608}) {
      const float threshold = *std::next(scores.begin(), rank);
      const double expected = c.naive_cett(threshold);
      CHECK_NEAR(cett(c.samples, c.down, threshold), expected, 1e-6 * expected);
    }
  });
}

TEST(cett_is_0_at_0_and_1_above_every_score) {
  for_each_kind([](const Case& c) {
    CHECK(cett(c.samples, c.down, 0) == 0);
    CHECK(cett(c.samples, c.down, *c.pooled().rbegin() * 2) == 1);
  });
}

TEST(cett_of_a_token_without_ffn_is_0) {
  Case c(Tail::gaussian, WeightFormat::f32, 20, 10, {2});
  std::fill_n(c.samples[0].h.begin(), 20, 0.0f);
  CHECK(cett(c.samples, c.down, 1e9f) == 0.5);
}

TEST(search_meets_target_and_next_score_exceeds_it) {
  for_each_kind([](const Case& c) {
    for (const double target : {1e-6, 0.01, 0.1, 0.3, 0.7, 0.95, 1 - 1e-9}) {
      check_contract(c, target);
    }
  });
}

TEST(search_comes_within_one_percent_of_target) {
  const auto check_close = [](Tail tail, double target) {
    const Case c(tail, WeightFormat::bf16, 1536, 48, {8});
    const double error = search_threshold(c.samples, c.down, target).error;
    CHECK(error <= target);
    CHECK(error >= 0.99 * target);
  };
  // Targets that drop so many neurons that one more changes the error little.
  check_close(Tail::gaussian, 0.3);
  check_close(Tail::gaussian, 0.6);
  check_close(Tail::heavy, 0.05);
  check_close(Tail::heavy, 0.1);
}

TEST(search_with_target_0_keeps_every_neuron) {
  const Case c(Tail::gaussian, WeightFormat::f32, 20, 10, {4});
  const ThresholdSearch found = search_threshold(c.samples, c.down, 0);
  CHECK(found.threshold == 0);
  CHECK(found.error == 0);
}

TEST(search_with_all_tokens_zero) {
  Case c(Tail::gaussian, WeightFormat::f32, 20, 10, {4});
  std::fill(c.samples[0].h.begin(), c.samples[0].h.end(), 0.0f);
  std::fill(c.samples[0].scores.begin(), c.samples[0].scores.end(), 0.0f);
  const ThresholdSearch found = search_threshold(c.samples, c.down, 0.1);
  CHECK(found.threshold == 0);
  CHECK(found.error == 0);
}

TEST(search_never_drops_all_neurons) {
  const Case single(Tail::gaussian, WeightFormat::f32, 1, 10, {4});
  Case equal(Tail::gaussian, WeightFormat::f32, 20, 10, {4});
  std::fill(equal.samples[0].scores.begin(), equal.samples[0].scores.end(), 0.25f);
  for (const Case* c : {&single, static_cast<const Case*>(&equal)}) {
    const ThresholdSearch found = search_threshold(c->samples, c->down, 1 - 1e-9);
    CHECK(found.threshold == c->samples[0].scores[0]);
    CHECK(found.error == 0);
  }
}

// ---- masks and options -------------------------------------------------------------------------

TEST(relative_magnitudes) {
  const std::vector<double> sums = {0, 1, 8, 2};
  CHECK((relative_magnitudes(sums, 2) == std::vector<float>{0, std::sqrt(0.5f), 2, 1}));
  const std::vector<double> broken = {1, kNaN};
  CHECK_THROWS(relative_magnitudes(broken, 2), Error, "neuron 1 is nan");
}

TEST(mask_at_least) {
  const std::vector<float> scores = {0.5f, 0.0f, 0.25f, 0.5f};
  CHECK((mask_at_least(scores, 0.25f) == Ids{0, 2, 3}));
  CHECK((mask_at_least(scores, 0.0f) == Ids{0, 1, 2, 3}));
  CHECK(mask_at_least(scores, 0.51f).empty());
  CHECK(mask_at_least({}, 0.0f).empty());
}

TEST(a_threshold_of_a_share) {
  std::vector<float> values = {5, 1, 4, 2, 3};
  CHECK(threshold_of_share(values, 0.4) == 4);
  CHECK(threshold_of_share(values, 1) == 0);
  CHECK(threshold_of_share(values, 0) > 1e30f);
  // What is 0 does not pass with the share, though the share reaches down to it.
  values = {0, 1, 0, 0, 0};
  const float threshold = threshold_of_share(values, 0.6);
  CHECK(threshold > 0);
  CHECK(threshold < 1);
}

TEST(the_fewest_inputs_within_a_loss) {
  Thresholds calibrated;
  calibrated.inputs = {0.5f, 0.3f, 0.2f, 0.1f};
  calibrated.losses = {-0.001f, 0.0625f, 0.25f, 0.125f};  // the last one by luck
  CHECK(inputs_within(calibrated, 0.0) == 0.5f);
  CHECK(inputs_within(calibrated, 0.0625) == 0.3f);
  CHECK(inputs_within(calibrated, 0.2) == 0.3f);
  CHECK(inputs_within(calibrated, 0.25) == 0.1f);
  calibrated.losses[0] = 0.001f;
  CHECK(inputs_within(calibrated, 0.0) == 1);
}

TEST(a_loss_that_no_share_meets_is_dense) {
  auto thresholds = std::make_shared<Thresholds>();
  thresholds->inputs = {0.5f, 0.25f};
  thresholds->losses = {0.125f, 0.5f};
  const auto found = [&](double loss) {
    return resolve(TdaOptions{.loss = loss, .thresholds = thresholds},
                   {.weights = WeightFormat::graded})
        .options.value();
  };
  CHECK(found(0.1).inputs == 1 && down_share(found(0.1)) == 1 && head_share(found(0.1)) == 1);
  CHECK(found(0.125).inputs == 0.5 && down_share(found(0.125)) == 0.25);
}

TEST(mask_top_share) {
  const std::vector<float> scores = {1, 3, 2, 3, 2, 0};
  CHECK((mask_top_share(scores, 0.5) == Ids{1, 2, 3}));
  CHECK((mask_top_share(scores, 1.0 / 6) == Ids{1}));
  CHECK((mask_top_share(scores, 0.24) == Ids{1}));     // 1.44 rounds to 1
  CHECK((mask_top_share(scores, 0.26) == Ids{1, 3}));  // 1.56 rounds to 2
  CHECK((mask_top_share(scores, 1e-9) == Ids{1}));
  CHECK((mask_top_share(scores, 1) == Ids{0, 1, 2, 3, 4, 5}));
  CHECK((mask_top_share(std::vector<float>(5, 1.0f), 0.6) == Ids{0, 1, 2}));
}

TEST(neurons_of_a_predictors_scores) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const PredictorWeights::Layer single;
  CHECK((single.neurons(std::vector<float>{-1, 3, 2, 3, -2}, 3) == Ids{1, 2, 3}));
  CHECK((single.neurons(std::vector<float>{5, 1, nan, 9}, 2) == Ids{2, 3}));
  CHECK((single.neurons(std::vector<float>(4, nan), 2) == Ids{0, 1}));
  PredictorWeights::Layer grouped;
  grouped.expert_of = {2, 0, 1, 2, 1, 0};
  CHECK((grouped.neurons(std::vector<float>{0.5f, -3, 4}, 1) == Ids{0, 3}));
  CHECK((grouped.neurons(std::vector<float>{0.5f, -3, 4}, 2) == Ids{0, 1, 3, 5}));
  CHECK((grouped.neurons(std::vector<float>{0.5f, nan, 4}, 1) == Ids{2, 4}));
}

TEST(predictors_are_for_the_cpu_and_rows_of_weights) {
  const TdaOptions options{.active = 0.5, .predictor = std::make_shared<Predictor>()};
  CHECK(resolve(options, {}).words == "token scope (DejaVu): 50% of neurons");
  CHECK_THROWS(resolve(options, {.cuda = true}), OptionError, "expected device cpu, found cuda");
  CHECK_THROWS(resolve(options, {.weights = WeightFormat::graded}), OptionError,
               "tda predictor: expected f32, bf16, bf16c or int8 weights, found graded");
}

TEST(a_prior_weighs_as_much_as_its_tokens) {
  const std::vector<float> prior = {0.5f, 0.25f, 0};
  const std::vector<float> found = relative_magnitudes({0, 64, 32}, 64, prior);
  const double tokens = 64 + kPriorTokens;
  const double expected[] = {kPriorTokens / 2, 64 + kPriorTokens / 4, 32};
  for (std::size_t j = 0; j < 3; ++j)
    CHECK(std::abs(found[j] - std::sqrt(expected[j] / tokens)) < 1e-7);
  CHECK_THROWS(relative_magnitudes({0, NAN, 0}, 64, prior), Error, "neuron 1 is nan");
}

TEST(a_share_may_come_with_a_prior) {
  const auto bare = std::make_shared<Thresholds>();
  const auto thresholds = std::make_shared<Thresholds>();
  thresholds->tokens = 2048;
  thresholds->prior = {0.5f, 0.5f};
  const TdaOptions good{.active = 0.9, .thresholds = thresholds};
  good.validate();
  CHECK(resolve(good, {.prompt_tokens = 64}).words ==
        "sequence scope: 90% of neurons, prior from 2048 tokens");
  const auto refused = [](TdaOptions options) {
    CHECK_THROWS(options.validate(), OptionError, "tda active with thresholds: expected scope");
  };
  refused({.active = 0.9, .thresholds = bare});
  refused({.scope = Scope::token, .active = 0.9, .thresholds = thresholds});
  refused({.estimate = Estimate::hidden, .active = 0.9, .thresholds = thresholds});
}

TEST(tda_options) {
  const auto thresholds = std::make_shared<Thresholds>();
  TdaOptions{.error = 0.0}.validate();
  TdaOptions{.active = 1.0, .refresh = 16}.validate();
  TdaOptions{.thresholds = thresholds}.validate();

  TdaOptions{}.validate();
  CHECK_THROWS(TdaOptions{.scope = Scope::sequence}.validate(), OptionError,
               "found none, expected exactly one of error, active and thresholds, or no option");
  CHECK_THROWS((TdaOptions{.error = 0.1, .active = 0.5}.validate()), OptionError,
               "found error and active");
  CHECK_THROWS((TdaOptions{.error = 0.1, .active = 0.5, .thresholds = thresholds}.validate()),
               OptionError, "found error and active and thresholds");
  TdaOptions{.scope = Scope::token, .active = 0.5}.validate();
  TdaOptions{.scope = Scope::token, .estimate = Estimate::gate, .active = 0.5}.validate();
  TdaOptions{.estimate = Estimate::hidden, .active = 0.5}.validate();
  CHECK_THROWS(
      (TdaOptions{.scope = Scope::token, .estimate = Estimate::hidden, .active = 0.5}.validate()),
      OptionError, "\"hidden\" with scope \"token\": expected \"contribution\" or \"gate\"");
  CHECK_THROWS((TdaOptions{.estimate = Estimate::hidden, .error = 0.1}.validate()), OptionError,
               "with active only");
  TdaOptions{.active = 0.5, .compact = true}.validate();
  CHECK_THROWS((TdaOptions{.scope = Scope::token, .active = 0.5, .compact = true}.validate()),
               OptionError, "tda compact");
  CHECK_THROWS((TdaOptions{.scope = Scope::token, .active = 0.6, .refresh = 5}.validate()),
               OptionError, "refresh");
  for (const double error : {-0.1, 1.0, kNaN, kInfinity}) {
    CHECK_THROWS(TdaOptions{.error = error}.validate(), OptionError, "tda error");
  }
  for (const double active : {0.0, -0.5, 1.001, kNaN}) {
    CHECK_THROWS(TdaOptions{.active = active}.validate(), OptionError, "tda active");
  }
  CHECK_THROWS((TdaOptions{.error = 0.1, .refresh = -1}.validate()), OptionError, "tda refresh -1");
}

/// The setting for so many prompt tokens on a small model with such weights.
static TdaSetting resolved(const std::optional<TdaOptions>& asked, WeightFormat weights,
                           std::int64_t prompt_tokens = 500) {
  return resolve(asked, {.weights = weights,
                         .layers_have_rests = weights != WeightFormat::int4,
                         .parameters = 135'000'000,
                         .prompt_tokens = prompt_tokens});
}

TEST(recommended_setting) {
  TdaSetting found = resolved(TdaOptions{}, WeightFormat::graded, 5);
  CHECK((found.options == TdaOptions{.inputs = 0.2}));
  CHECK(found.words == "by input: 20% of inputs and 10% of neurons at 8 bits, the others at 4");
  CHECK(found.warnings.empty());
  found = resolved(TdaOptions{}, WeightFormat::int4);
  CHECK((found.options == TdaOptions{.inputs = 0.2}));
  CHECK(found.words == "by input: 44.7% of the head's inputs at 8 bits, everything else at 4");
  for (const auto weights :
       {WeightFormat::f32, WeightFormat::bf16, WeightFormat::bf16c, WeightFormat::int8}) {
    found = resolved(TdaOptions{}, weights, 5);
    CHECK(!found.options && found.warnings.empty());
    CHECK(found.words == "dense: with " + std::string(name_of(weights)) +
                             " weights no setting is faster at little loss; "
                             "weights=\"graded\" has one");
  }
  found = resolve(TdaOptions{}, {.weights = WeightFormat::bf16, .cuda = true});
  CHECK(!found.options && found.words == "dense: on CUDA no setting is faster at little loss");
  found = resolved({}, WeightFormat::int8);
  CHECK(!found.options && found.words == "dense" && found.warnings.empty());
}

TEST(settings_by_hand_stay_what_they_are) {
  TdaSetting found = resolved(TdaOptions{.active = 0.95, .refresh = 16}, WeightFormat::f32);
  CHECK((found.options == TdaOptions{.scope = Scope::sequence, .active = 0.95, .refresh = 16}));
  CHECK(found.words == "sequence scope: 95% of neurons, renewed every 16 tokens");
  CHECK(found.warnings.empty());
  found = resolved(TdaOptions{.estimate = Estimate::hidden, .active = 1.0}, WeightFormat::f32);
  CHECK(found.words == "sequence scope (GRIFFIN): 100% of neurons");
  auto thresholds = std::make_shared<Thresholds>();
  thresholds->scope = Scope::token;
  thresholds->tokens = 2048;
  found = resolved(TdaOptions{.thresholds = thresholds}, WeightFormat::f32, 5);
  CHECK(found.options->scope == Scope::token);  // the file's own
  CHECK(found.words == "token scope: thresholds from 2048 tokens");
  CHECK(found.warnings.empty());
}

TEST(warnings_say_what_to_expect) {
  const auto warning = [](const TdaOptions& options, std::int64_t prompt_tokens) {
    const auto found = resolved(options, WeightFormat::bf16, prompt_tokens).warnings;
    CHECK(found.size() <= 1);
    return found.empty() ? "" : found[0];
  };
  const auto contains = [](const std::string& text, const std::string& part) {
    return text.find(part) != std::string::npos;
  };
  CHECK(contains(warning({.active = 0.9}, 63), "a prompt of under 64 tokens"));
  CHECK(warning({.active = 0.9}, 64).empty());
  CHECK(warning({.scope = Scope::token, .active = 0.3}, 5).empty());
  CHECK(contains(warning({.active = 0.89}, 64), "under 1B parameters"));
  CHECK(contains(warning({.error = 0.06}, 64), "error 0.1 costs 23% perplexity"));
  CHECK(warning({.error = 0.05}, 64).empty());
  CHECK(warning({.scope = Scope::token, .error = 0.5}, 64).empty());
  auto thresholds = std::make_shared<Thresholds>();
  thresholds->error = 0.05;
  thresholds->tokens = 999;
  CHECK(contains(warning({.thresholds = thresholds}, 64), "calibrated on 999 tokens"));
  thresholds->tokens = 1000;
  CHECK(warning({.thresholds = thresholds}, 64).empty());
  thresholds->error = 0.1;
  CHECK(contains(warning({.thresholds = thresholds}, 64), "under 1B parameters"));
  TdaFacts large{.parameters = 1'100'000'000, .prompt_tokens = 64};
  CHECK(resolve(TdaOptions{.error = 0.5}, large).warnings.empty());
}

int main() { return run_tests(); }
