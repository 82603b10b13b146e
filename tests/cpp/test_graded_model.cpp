// Models of weights in bricks on the CPU backend: against doubles, with thresholds of inputs, and with
// any number of threads.
#include <tda/error.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "cpu/isa.h"
#include "kernel_tests.h"
#include "naive.h"

using namespace tda;
using naive::run;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// Several parts of the down projection, none a whole number of strips.
ModelConfig config_of(std::int64_t hidden, std::int64_t neurons) {
  ModelConfig config = naive::small_config();
  config.hidden_size = hidden;
  config.intermediate_size = neurons;
  return config;
}

/// Relative error in the L2 norm.
template <class Found, class Expected>
double error(const Found& found, const Expected& expected) {
  double difference = 0, size = 0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    difference += std::pow(double{found[i]} - expected[i], 2);
    size += std::pow(double{expected[i]}, 2);
  }
  return std::sqrt(difference / size);
}

/// A bound on the error of a prompt's logits: of f32 products, or where operands are bf16.
double prefill_error(const Kernels& kernels) {
  return panel_kernels(kernels, WeightFormat::bf16).prepare ? 0.01 : 1e-5;
}

/// A prompt of 9 tokens, its last logits, then three sparse steps and theirs.
struct Decoded {
  std::vector<float> prompt, steps;
};
Decoded decode(const Backend& backend, State& state, std::span<const Token> tokens, FfnMode mode,
               float head = 0) {
  Decoded result;
  const auto two = run(backend, state, naive::step_of(tokens.first(9), 0), 2);  // not one: panels
  result.prompt.assign(two.begin() + std::ssize(two) / 2, two.end());
  for (std::size_t t = 9; t < tokens.size(); ++t) {
    Step step = naive::step_of(tokens.subspan(t, 1), std::int64_t(t), mode);
    step.head_inputs = head;
    const auto logits = run(backend, state, step, 1);
    result.steps.insert(result.steps.end(), logits.begin(), logits.end());
  }
  return result;
}

}  // namespace

TEST(graded_model_stays_near_doubles) {
  const naive::RandomModel model(config_of(130, 300), WeightFormat::graded, 5);
  const auto tokens = naive::random_tokens(12, 101);
  struct Case {
    InputThresholds inputs;
    float head;
  };
  const float none = kInfinity;  // of the inputs
  for (const Case& c : {Case{{{0, 0, 0, 0}}, 0}, Case{{{0.3f, 0.2f, 0.3f, 0.03f}}, 0.3f},
                        Case{{{none, none, none, none}}, none}, Case{{{none, 0, 0, 0}}, 0},
                        Case{{{0, none, 0, 0}}, 0}, Case{{{0, 0, none, 0}}, 0},
                        Case{{{0, 0, 0, none}}, 0}, Case{{{0, 0, 0, 0}}, none}}) {
    const auto reference = [&](bool by_input) {
      naive::Session session(model.get(), KvFormat::f32);
      if (by_input) std::ranges::fill(session.inputs, c.inputs);
      naive::Vector all = run(session, naive::step_of(Tokens(tokens).first(9), 0));
      for (std::int64_t t = 9; t < 12; ++t) {
        Step step = naive::step_of(Tokens(tokens).subspan(t, 1), t, FfnMode::sparse);
        step.head_inputs = by_input ? c.head : 0;
        const naive::Vector logits = run(session, step);
        all.insert(all.end(), logits.begin(), logits.end());
      }
      return all;
    };
    const naive::Vector expected = reference(true), dense = reference(false);
    for_all_kernels([&](const Kernels& kernels) {
      const ForcedIsa isa(kernels.name);
      const auto backend = make_cpu_backend(model.get(), 2);
      const auto state = backend->new_state(12, KvFormat::f32);
      for (std::int64_t l = 0; l < 2; ++l) backend->set_input_thresholds(*state, l, c.inputs);
      const Decoded found = decode(*backend, *state, tokens, FfnMode::sparse, c.head);
      const double of_prompt = prefill_error(kernels);
      CHECK(error(found.prompt, std::span(expected).first(101)) < of_prompt);
      // In decode, x has 8 bits.
      CHECK(error(found.steps, std::span(expected).subspan(101)) < 0.02 + of_prompt);
      if (expected != dense)  // the rests that were not read are missed
        CHECK(error(found.steps, std::span(dense).subspan(101)) > 0.03);
    });
  }
}

TEST(graded_results_do_not_depend_on_threads) {
  // More than 32 parts of down, more than 32 strips of down, and neither.
  for (const ModelConfig& config :
       {config_of(66, 4300), config_of(2150, 150), config_of(130, 300)}) {
    const naive::RandomModel model(config, WeightFormat::graded, 6);
    const auto tokens = naive::random_tokens(12, 101);
    for_all_kernels([&](const Kernels& kernels) {
      const ForcedIsa isa(kernels.name);
      for (const float threshold : {0.0f, 0.2f}) {
        std::vector<Decoded> runs;
        for (const int threads : {1, 2, 3, 1}) {
          const auto backend = make_cpu_backend(model.get(), threads);
          const auto state = backend->new_state(12, KvFormat::f32);
          const InputThresholds all = {{threshold, threshold, threshold, threshold / 10}};
          for (std::int64_t l = 0; l < 2; ++l) backend->set_input_thresholds(*state, l, all);
          const bool dense = runs.size() == 3;
          runs.push_back(decode(*backend, *state, tokens, dense ? FfnMode::dense : FfnMode::sparse,
                                threshold));
          CHECK(runs.back().prompt == runs[0].prompt);
          CHECK((runs.back().steps == runs[0].steps) == (!dense || threshold == 0));
          // Of what was read.
          const FfnReads reads = backend->ffn_reads(*state, 1);
          const std::int64_t neurons = 3 * config.intermediate_size;
          CHECK(reads.exact + reads.coarse == neurons);
          CHECK((reads.exact == neurons) == (dense || threshold == 0));
          const LayerWeights& w = model.get()->layers[1];
          const Bricks gate_up = w.gate_up.bricks(), down = w.down.bricks();
          const std::int64_t high = gate_up.high_bytes() + down.high_bytes();
          const std::int64_t rests = reads.bytes - 3 * high - reads.exact * down.rest_bytes();
          const std::int64_t column = gate_up.rest_bytes();
          CHECK(rests % column == 0);
          CHECK((rests == 3 * config.hidden_size * column) == (dense || threshold == 0));
        }
      }
    });
  }
}

TEST(graded_prefill_agrees_with_decode) {
  const naive::RandomModel model(config_of(130, 300), WeightFormat::graded, 8);
  const auto tokens = naive::random_tokens(70, 101);
  for_all_kernels([&](const Kernels& kernels) {
    const ForcedIsa isa(kernels.name);
    std::vector<std::vector<float>> runs;
    for (const int threads : {1, 2, 3}) {
      const auto backend = make_cpu_backend(model.get(), threads);
      const auto state = backend->new_state(70, KvFormat::f32);
      runs.push_back(run(*backend, *state, naive::step_of(tokens, 0), 70));
      CHECK(runs.back() == runs[0]);
    }
    const auto backend = make_cpu_backend(model.get(), 2);
    const auto state = backend->new_state(70, KvFormat::f32);
    std::vector<float> decoded;
    for (std::int64_t t = 0; t < 70; ++t) {
      const auto logits = run(*backend, *state, naive::step_of(Tokens(tokens).subspan(t, 1), t), 1);
      decoded.insert(decoded.end(), logits.begin(), logits.end());
    }
    CHECK(error(decoded, runs[0]) < 0.02);  // decode rounds activations to 8 bits
  });
}

TEST(int4_models_stay_near_doubles_whatever_the_thresholds) {
  for (const ModelConfig& config : {config_of(130, 300), config_of(66, 4300)}) {
    const naive::RandomModel model(config, WeightFormat::int4, 7);
    const auto tokens = naive::random_tokens(12, 101);
    naive::Session session(model.get(), KvFormat::f32);
    naive::Vector expected = run(session, naive::step_of(Tokens(tokens).first(9), 0));
    for (std::int64_t t = 9; t < 12; ++t) {
      const naive::Vector logits = run(session, naive::step_of(Tokens(tokens).subspan(t, 1), t));
      expected.insert(expected.end(), logits.begin(), logits.end());
    }
    for_all_kernels([&](const Kernels& kernels) {
      const ForcedIsa isa(kernels.name);
      std::vector<Decoded> runs;
      for (const int threads : {1, 2, 3}) {
        const auto backend = make_cpu_backend(model.get(), threads);
        const auto state = backend->new_state(12, KvFormat::f32);
        const InputThresholds all = {{0.3f, 0.3f, 0.3f, 0.3f}};
        for (std::int64_t l = 0; l < 2; ++l) backend->set_input_thresholds(*state, l, all);
        runs.push_back(decode(*backend, *state, tokens,
                              threads == 1 ? FfnMode::dense : FfnMode::sparse, 0.3f));
        CHECK(runs.back().prompt == runs[0].prompt && runs.back().steps == runs[0].steps);
        const FfnReads reads = backend->ffn_reads(*state, 1);
        CHECK(reads.exact == 3 * config.intermediate_size && reads.coarse == 0);
        CHECK(reads.bytes == 3 * model.get()->ffn_bytes());
      }
      const double of_prompt = prefill_error(kernels);
      CHECK(error(runs[0].prompt, std::span(expected).first(101)) < of_prompt);
      CHECK(error(runs[0].steps, std::span(expected).subspan(101)) < 0.02 + of_prompt);
    });
  }
}

TEST(graded_steps_refuse_several_sparse_tokens) {
  const naive::RandomModel model(config_of(66, 37), WeightFormat::graded, 8);
  const auto backend = make_cpu_backend(model.get(), 1);
  const auto state = backend->new_state(2, KvFormat::f32);
  const std::vector<Token> two = {1, 2};
  CHECK_THROWS(run(*backend, *state, naive::step_of(two, 0, FfnMode::sparse), 1), OptionError,
               "sparse step of 2 tokens with graded weights, expected one token");
}

int main() { return run_tests(); }
