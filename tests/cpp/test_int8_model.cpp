// Models of int8 weights on the CPU backend: against doubles, outliers of down rows, the bytes
// read, and logits estimated from the head's high plane.
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
  config.vocab_size = 2500;  // more than one task
  const naive::RandomModel model(config, WeightFormat::int8, 9);
  const Matrix& head = model.get()->head;
  for_all_kernels([&](const Kernels& kernels) {
    const ForcedIsa isa(kernels.name);
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
      // With 1, all logits but the largest are estimates.
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
      // Likely tokens are chosen by the estimates, whose largest is known up to `error`.
      const double least = *std::max_element(dense.begin(), dense.end()) + std::log(0.1);
      for (std::size_t i = 0; i < dense.size(); ++i) {
        if (estimates[i] == dense[i]) continue;
        if (sparse[i] == dense[i]) CHECK(estimates[i] > least - 2 * error);
        if (sparse[i] != dense[i]) CHECK(estimates[i] < least + 2 * error);
      }
    }
  });
}

TEST(int8_thresholds_are_checked) {
  const naive::RandomModel int8(wide_config(), WeightFormat::int8, 7);
  const naive::RandomModel bf16(wide_config(), WeightFormat::bf16, 7);
  const auto backend = make_cpu_backend(int8.get(), 1);
  const auto state = backend->new_state(4, KvFormat::f32);
  CHECK_THROWS(backend->set_thresholds(*state, 0, {1, 2}), OptionError, "coarse <= exact");
  CHECK_THROWS(backend->set_thresholds(*state, 0, {NAN, 0}), OptionError, "exact nan");
  const auto backend16 = make_cpu_backend(bf16.get(), 1);
  const auto state16 = backend16->new_state(4, KvFormat::f32);
  CHECK_THROWS(backend16->set_thresholds(*state16, 0, {2, 1}), OptionError, "one plane");
}

int main() { return run_tests(); }
