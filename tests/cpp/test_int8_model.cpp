// Models of int8 weights on the CPU backend: against doubles, outliers of down rows, and the bytes
// read.
#include <tda/error.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/isa.h"
#include "kernel_tests.h"
#include "naive.h"

using namespace tda;
using naive::run;

namespace {

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
    const ForcedIsa isa(kernels.name);
    const auto backend = make_cpu_backend(model.get(), 2);
    const auto state = backend->new_state(12, KvFormat::f32);
    naive::Session session(model.get(), KvFormat::f32);
    // Decode always quantises activations; prefill without `prepare` does not.
    const double bound = panel_kernels(kernels, WeightFormat::int8).prepare ? 0.03 : 1e-5;
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
  // Neurons 0 and 75 have an outlier in their down row; only 75 is in the mask.
  const std::vector<std::int32_t> mask = {3, 8, 70, 75, 76, 149};
  const auto backend = make_cpu_backend(model.get(), 2);
  const auto state = backend->new_state(5, KvFormat::f32);
  naive::Session session(model.get(), KvFormat::f32);
  for (std::int64_t l = 0; l < 2; ++l) {
    backend->set_mask(*state, l, mask);
    session.masks[l] = mask;
  }
  for (const auto& [first, count] : {std::pair{0, 4}, std::pair{4, 1}}) {
    const Step step = naive::step_of(Tokens(tokens).subspan(first, count), first, FfnMode::sparse);
    CHECK(error(run(*backend, *state, step, 1), run(session, step)) < 0.03);
  }
}

TEST(int8_prefill_agrees_with_decode) {
  const naive::RandomModel model(wide_config(), WeightFormat::int8, 8);
  const auto tokens = naive::random_tokens(70, 101);
  for_all_kernels([&](const Kernels& kernels) {
    const ForcedIsa isa(kernels.name);
    std::vector<std::vector<float>> runs;
    for (const int threads : {1, 2, 3}) {
      const auto backend = make_cpu_backend(model.get(), threads);
      const auto state = backend->new_state(70, KvFormat::f32);
      runs.push_back(run(*backend, *state, naive::step_of(tokens, 0), 70));
      CHECK(runs.back() == runs[0]);  // to the bit for any number of threads
    }
    const auto backend = make_cpu_backend(model.get(), 2);
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
  const std::int64_t row = model.get()->layers[0].gate.row_bytes();
  std::vector<std::vector<float>> runs;
  for (const int threads : {1, 2, 3, 4}) {
    const auto backend = make_cpu_backend(model.get(), threads);
    const auto state = backend->new_state(12, KvFormat::f32);
    backend->set_threshold(*state, 1, 0.3f);
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
    CHECK(sparse.exact > 50 && sparse.exact < 12 * 150 - 50 && sparse.coarse == 0);
    CHECK(sparse.bytes == (12 * 150 * 2 + sparse.exact) * row);
  }
  for (const auto& r : runs) CHECK(r == runs[0]);
}

TEST(thresholds_are_checked) {
  const naive::RandomModel model(wide_config(), WeightFormat::int8, 7);
  const auto backend = make_cpu_backend(model.get(), 1);
  const auto state = backend->new_state(4, KvFormat::f32);
  for (const float threshold : {-1.0f, float{NAN}})
    CHECK_THROWS(backend->set_threshold(*state, 1, threshold), OptionError, "threshold of layer 1");
}

int main() { return run_tests(); }
