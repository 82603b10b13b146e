// The CPU backend against the model in doubles (naive.h).
#include <tda/error.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <deque>
#include <numeric>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/cpu_backend.h"
#include "cpu/isa.h"
#include "kernel_tests.h"
#include "model/forward.h"
#include "naive.h"

using namespace tda;
using naive::like_gemma2, naive::like_gemma3, naive::like_granite, naive::like_olmo2;
using naive::RandomModel, naive::random_tokens, naive::small_config, naive::step_of;
using naive::run;

// By default sanitizers abort on allocations that the system would refuse.
extern "C" const char* __asan_default_options() { return "allocator_may_return_null=1"; }
extern "C" const char* __tsan_default_options() { return "allocator_may_return_null=1"; }

namespace {

/// Logits of every position, [T, V], from steps of the given sizes.
std::vector<float> all_logits(const Backend& backend, Tokens tokens,
                              const std::vector<std::int64_t>& steps, KvFormat kv) {
  const auto state = backend.new_state(static_cast<std::int64_t>(tokens.size()), kv);
  std::vector<float> all;
  std::int64_t position = 0;
  for (const std::int64_t size : steps) {
    const auto logits =
        run(backend, *state, step_of(tokens.subspan(position, size), position), size);
    all.insert(all.end(), logits.begin(), logits.end());
    position += size;
  }
  return all;
}

double largest_difference(std::span<const float> a, std::span<const float> b) {
  double largest = a.size() == b.size() ? 0 : INFINITY;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i)
    largest = std::max<double>(largest, std::isnan(a[i] - b[i]) ? INFINITY : std::abs(a[i] - b[i]));
  return largest;
}

/// The largest difference of each token between vectors in panels and `expected`, [T][n], in
/// ascending order.
std::vector<double> differences(const Buffer<float>& panels, const Layout& layout, std::int64_t n,
                                const std::vector<naive::Vector>& expected) {
  std::vector<double> all(layout.tokens);
  for (std::int64_t t = 0; t < layout.tokens; ++t)
    for (std::size_t i = 0; i < expected[t].size(); ++i) {
      const double found =
          panels.data()[layout.at(t, n) + static_cast<std::int64_t>(i) * layout.width];
      all[t] = std::max(all[t], std::isnan(found) ? INFINITY : std::abs(found - expected[t][i]));
    }
  std::sort(all.begin(), all.end());
  return all;
}

/// Runs the step verb by verb on both sides and compares after each: all tokens within `tolerance`
/// and, in the first layer of a first step, half of them within `of_half`.
void check_verbs(const Backend& backend, State& s, naive::Session& session, const Step& step,
                 double tolerance, double of_half = INFINITY) {
  const ModelConfig& c = backend.model().config;
  const CpuState& state = CpuState::of(s);
  const auto check = [&](const char* verb, const Buffer<float>& found, std::int64_t n,
                         const std::vector<naive::Vector>& expected) {
    const auto all = differences(found, state.layout, n, expected);
    CHECK_NEAR(all.back(), 0, tolerance);
    CHECK_NEAR(all[all.size() / 2], 0, of_half);
    if (!(all.back() <= tolerance && all[all.size() / 2] <= of_half))
      std::printf("  after %s\n", verb);
  };
  if (step.position > 0) of_half = INFINITY;
  backend.begin(s, step);
  session.begin(step);
  backend.embed(s);
  session.embed();
  check("embed", state.x, c.hidden_size, session.x);
  for (std::int64_t l = 0; l < c.num_layers; ++l) {
    backend.qkv(s, l);
    session.qkv(l);
    check("qkv", state.qkv, c.q_size() + 2 * c.kv_size(), session.queries);
    backend.attention(s, l);
    session.attention(l);
    check("attention", state.attended, c.q_size(), session.attended);
    backend.attention_out(s, l);
    session.attention_out(l);
    check("attention_out", state.x, c.hidden_size, session.x);
    backend.ffn(s, l);
    session.ffn(l);
    check("ffn", state.x, c.hidden_size, session.x);
    of_half = INFINITY;
  }
  for (const std::int64_t rows : {std::int64_t{1}, state.layout.tokens}) {
    std::vector<float> expected;
    for (std::int64_t t = state.layout.tokens - rows; t < state.layout.tokens; ++t)
      for (const double logit : session.logits(t, rows == 1))
        expected.push_back(static_cast<float>(logit));
    CHECK_NEAR(largest_difference(backend.logits(s, rows), expected), 0, tolerance);
  }
}

struct Case {
  const char* what;
  ModelConfig config = small_config();
  WeightFormat format = WeightFormat::f32;
  KvFormat kv = KvFormat::f32;
  std::vector<std::int64_t> steps = {17, 1, 1, 5, 2, 1};
};

std::deque<Case> cases() {
  std::deque<Case> all;
  const auto add = [&](const char* what) -> Case& { return all.emplace_back(Case{what}); };
  add("small");
  add("bf16 weights").format = WeightFormat::bf16;
  Case& bf16 = add("bf16 weights and cache");
  bf16.format = WeightFormat::bf16;
  bf16.kv = KvFormat::bf16;
  add("int8 cache").kv = KvFormat::int8;
  Case& llama = add("head_dim 64, tied");
  llama.config.hidden_size = 192;
  llama.config.intermediate_size = 512;
  llama.config.num_heads = 3;
  llama.config.num_kv_heads = 1;
  llama.config.head_dim = 64;
  llama.config.tied_embeddings = true;
  llama.config.activation = Activation::gelu;
  llama.steps = {70, 1, 1};
  Case& qwen = add("qk-norm, biases");
  qwen.config.qk_norm = qwen.config.qkv_bias = qwen.config.output_bias = true;
  qwen.config.num_kv_heads = 4;
  qwen.config.head_dim = 16;
  qwen.config.activation = Activation::gelu_tanh;
  Case& chunks = add("chunks of keys");
  chunks.config.num_kv_heads = 1;
  chunks.config.hidden_size = 40;
  chunks.steps = {127, 1, 1, 1, 125, 1, 1, 3, 1};
  Case& window = add("sliding window");
  window.config.sliding_window = {7, 150};
  window.config.activation = Activation::relu;
  window.steps = {33, 1, 130, 1, 2, 1};
  Case& wide = add("more than a block of everything");
  wide.config.hidden_size = 300;
  wide.config.intermediate_size = 2500;
  wide.config.num_layers = 1;
  wide.steps = {256, 1};
  Case& rope = add("scaled rope");
  rope.config.rope.scaling = RopeConfig::Scaling::dynamic;
  rope.config.rope.factor = 2;
  rope.config.rope.original_max_position = 16;
  rope.config.rope.attention_factor = 1.2;
  like_gemma2(add("soft-capping").config);
  like_gemma3(add("norms behind, a second rope").config);
  like_olmo2(add("norms behind alone, of all heads").config);
  like_granite(add("residual scale, a layer without rope").config);
  return all;
}

}  // namespace

TEST(verbs_match_doubles) {
  for (const Kernels* table : available_kernels())
    for (const Case& c : cases()) {
      const int before = check::failures;
      const ForcedIsa isa(table->name);
      const RandomModel model(c.config, c.format, 1);
      const auto backend = make_cpu_backend(model.get(), 2);
      CHECK(backend->name() == "cpu (" + std::string(table->name) + ")");
      const std::int64_t total = std::accumulate(c.steps.begin(), c.steps.end(), std::int64_t{0});
      const auto tokens = random_tokens(total, c.config.vocab_size);
      const auto state = backend->new_state(total, c.kv);
      naive::Session session(model.get(), c.kv);
      session.rounds = panel_kernels(*table, WeightFormat::bf16).prepare;
      // A value near the middle of two bf16 numbers may be rounded to either; below 8 these are
      // 1/32 apart. So a few tokens are far off, and then those that attend to them.
      const bool rounds = c.format == WeightFormat::bf16 && session.rounds;
      const double tolerance = rounds ? 1.0 / 32 : c.kv != KvFormat::f32 ? 1e-2 : 1e-4;
      const double of_half = c.kv == KvFormat::f32 ? 1e-5 : INFINITY;
      std::int64_t position = 0;
      for (const std::int64_t size : c.steps) {
        const Step step = step_of(Tokens(tokens).subspan(position, size), position);
        check_verbs(*backend, *state, session, step, tolerance, of_half);
        position += size;
      }
      if (check::failures > before) std::printf("  in: %s, %s\n", table->name, c.what);
    }
}

namespace {

std::int64_t ffn_bytes(const Backend& backend, const State& state) {
  std::int64_t bytes = 0;
  for (std::int64_t l = 0; l < backend.model().config.num_layers; ++l)
    bytes += backend.ffn_reads(state, l).bytes;
  return bytes;
}

}  // namespace

TEST(masked_steps_match_doubles) {
  for (const std::int64_t active : {0, 1, 5, 100, 511}) {
    ModelConfig config = small_config();
    config.intermediate_size = 512;
    const RandomModel model(config, WeightFormat::bf16, 2);
    const auto backend = make_cpu_backend(model.get(), 2);
    const auto state = backend->new_state(32, KvFormat::f32);
    naive::Session session(model.get(), KvFormat::f32);
    session.rounds = panel_kernels(choose_kernels(), WeightFormat::bf16).prepare;
    const double tolerance = session.rounds ? 1e-2 : 1e-4;
    for (std::int64_t l = 0; l < config.num_layers; ++l) {
      std::vector<std::int32_t> mask;
      for (std::int64_t j = 0; j < active; ++j)
        mask.push_back(
            static_cast<std::int32_t>((j + 1) * 511 / std::max<std::int64_t>(active, 1)));
      backend->set_mask(*state, l, mask);
      CHECK(backend->mask(*state, l) == mask);
      session.masks[l] = mask;
    }
    const auto tokens = random_tokens(20, config.vocab_size);
    check_verbs(*backend, *state, session, step_of(Tokens(tokens).first(18), 0, FfnMode::sparse),
                tolerance);
    CHECK(ffn_bytes(*backend, *state) == 0);
    for (const std::int64_t position : {18, 19})
      check_verbs(*backend, *state, session,
                  step_of(Tokens(tokens).subspan(position, 1), position, FfnMode::sparse),
                  tolerance);
    CHECK(ffn_bytes(*backend, *state) == 2 * 2 * active * 3 * config.hidden_size * 2);
  }
}

TEST(mask_of_all_is_dense_to_the_bit) {
  for (const WeightFormat format : {WeightFormat::f32, WeightFormat::bf16}) {
    const RandomModel model(small_config(), format, 3);
    const auto backend = make_cpu_backend(model.get(), 2);
    const auto dense = backend->new_state(8, KvFormat::automatic);
    const auto masked = backend->new_state(8, KvFormat::automatic);
    const auto tokens = random_tokens(8, 101);
    for (std::int64_t t = 0; t < 8; ++t) {
      const Tokens token = Tokens(tokens).subspan(t, 1);
      CHECK(run(*backend, *dense, step_of(token, t), 1) ==
            run(*backend, *masked, step_of(token, t, FfnMode::sparse), 1));
    }
    CHECK(ffn_bytes(*backend, *dense) == 8 * 2 * 37 * model.get()->neuron_bytes());
    CHECK(ffn_bytes(*backend, *masked) == ffn_bytes(*backend, *dense));
  }
}

TEST(inactive_neurons_are_never_read) {
  const RandomModel model(small_config(), WeightFormat::bf16, 4);
  const auto backend = make_cpu_backend(model.get(), 2);
  std::vector<std::int32_t> mask;
  for (std::int32_t j = 0; j < 37; j += 1 + j % 3) mask.push_back(j);
  const auto tokens = random_tokens(9, 101);
  std::vector<std::vector<float>> clean, poisoned;
  for (auto* logits : {&clean, &poisoned}) {
    const auto state = backend->new_state(9, KvFormat::bf16);
    for (std::int64_t l = 0; l < 2; ++l) backend->set_mask(*state, l, mask);
    logits->push_back(
        run(*backend, *state, step_of(Tokens(tokens).first(4), 0, FfnMode::sparse), 4));
    for (std::int64_t t = 4; t < 9; ++t)
      logits->push_back(
          run(*backend, *state, step_of(Tokens(tokens).subspan(t, 1), t, FfnMode::sparse), 1));
    for (const LayerWeights& layer : model.get()->layers)
      for (std::int32_t j = 0; j < 37; ++j)
        if (!std::binary_search(mask.begin(), mask.end(), j))
          for (const Matrix& m : {layer.gate, layer.up, layer.down}) RandomModel::poison(m, j);
  }
  CHECK(clean == poisoned);
  CHECK(std::isfinite(std::accumulate(clean[5].begin(), clean[5].end(), 0.0f)));
}

TEST(any_thread_count_gives_the_same_bits) {
  ModelConfig config = small_config();
  config.intermediate_size = 300;
  config.num_heads = 6;
  const RandomModel model(config, WeightFormat::bf16, 5);
  const auto tokens = random_tokens(220, config.vocab_size);
  const std::vector<std::int64_t> steps = {150, 1, 67, 1, 1};
  std::vector<float> first;
  for (const int threads : {1, 2, 3, 4, 7}) {
    const auto backend = make_cpu_backend(model.get(), threads);
    CHECK(backend->threads() == threads);
    const auto logits = all_logits(*backend, tokens, steps, KvFormat::bf16);
    if (first.empty()) first = logits;
    CHECK(logits == first);
  }
}

TEST(prefill_agrees_with_decode) {
  ModelConfig config = small_config();
  config.sliding_window = {0, 40};
  for (const WeightFormat format : {WeightFormat::f32, WeightFormat::bf16}) {
    const RandomModel model(config, format, 6);
    const auto backend = make_cpu_backend(model.get(), 2);
    const auto tokens = random_tokens(140, config.vocab_size);
    // If prefill rounds tokens to bf16, each term of a product changes by at most 1/256.
    const bool rounds =
        format == WeightFormat::bf16 && panel_kernels(choose_kernels(), WeightFormat::bf16).prepare;
    const double tolerance = rounds ? 0.1 : 1e-4;
    const auto at_once = all_logits(*backend, tokens, {140}, KvFormat::f32);
    const auto in_parts = all_logits(*backend, tokens, {3, 64, 1, 72}, KvFormat::f32);
    const auto one_by_one =
        all_logits(*backend, tokens, std::vector<std::int64_t>(140, 1), KvFormat::f32);
    CHECK_NEAR(largest_difference(at_once, in_parts), 0, tolerance);
    CHECK_NEAR(largest_difference(at_once, one_by_one), 0, tolerance);
  }
}

TEST(sessions_do_not_know_of_each_other) {
  const RandomModel model(small_config(), WeightFormat::f32, 7);
  const auto backend = make_cpu_backend(model.get(), 2);
  const auto tokens = random_tokens(30, 101), others = random_tokens(31, 90);
  const auto alone = backend->new_state(30, KvFormat::f32);
  const auto one = backend->new_state(30, KvFormat::f32),
             two = backend->new_state(31, KvFormat::f32);
  backend->set_mask(*two, 0, {});
  run(*backend, *alone, step_of(Tokens(tokens).first(29), 0), 1);
  run(*backend, *one, step_of(Tokens(tokens).first(29), 0), 1);
  run(*backend, *two, step_of(others, 0), 31);
  const Step last = step_of(Tokens(tokens).last(1), 29);
  CHECK(run(*backend, *alone, last, 1) == run(*backend, *one, last, 1));
}

TEST(statistic_matches_doubles) {
  const RandomModel model(small_config(), WeightFormat::f32, 8);
  const auto backend = make_cpu_backend(model.get(), 3);
  const auto state = backend->new_state(64, KvFormat::f32);
  naive::Session session(model.get(), KvFormat::f32);
  const auto tokens = random_tokens(42, 101);
  std::vector<naive::Vector> sums(2, naive::Vector(37));
  std::int64_t position = 0;
  for (const std::int64_t size : {40, 1, 1}) {
    backend->reserve_samples(*state, size);
    std::vector<std::int64_t> sampled(size);
    std::iota(sampled.begin(), sampled.end(), 0);
    // The last token is sampled, but is no part of the statistic.
    Step step = step_of(Tokens(tokens).subspan(position, size), position,
                        position < 41 ? FfnMode::gather : FfnMode::dense);
    step.samples = sampled;
    run(*backend, *state, step, 0);
    session.begin(step);
    session.embed();
    for (std::int64_t l = 0; l < 2; ++l) {
      session.qkv(l);
      session.attention(l);
      session.attention_out(l);
      session.ffn(l);
      const std::vector<float> h = backend->samples(*state, l);
      CHECK(std::ssize(h) == size * 37);
      for (std::int64_t t = 0; t < size; ++t) {
        naive::Vector lengths = session.hidden[t];
        for (std::int64_t j = 0; j < 37; ++j) {
          CHECK_NEAR(h.at(t * 37 + j), lengths[j], 1e-5);
          lengths[j] *= model.get()->layers[l].down_lengths[j];
        }
        const double square =
            std::inner_product(lengths.begin(), lengths.end(), lengths.begin(), 0.0);
        if (step.ffn == FfnMode::gather)
          for (std::int64_t j = 0; j < 37; ++j) sums[l][j] += lengths[j] * lengths[j] / square;
      }
    }
    position += size;
  }
  for (std::int64_t l = 0; l < 2; ++l) {
    const std::vector<double> found = backend->statistic(*state, l);
    CHECK(backend->gathered(*state, l) == 41);
    CHECK_NEAR(std::accumulate(found.begin(), found.end(), 0.0), 41, 1e-9);
    for (std::int64_t j = 0; j < 37; ++j) CHECK_NEAR(found[j], sums[l][j], 1e-4);
    backend->fade_statistic(*state, 0.5);
    CHECK(backend->gathered(*state, l) == 20.5);
    CHECK(backend->statistic(*state, l)[3] == found[3] / 2);
    backend->fade_statistic(*state, 2);
  }
  CHECK(ffn_bytes(*backend, *state) == 2 * 37 * model.get()->neuron_bytes());
}

TEST(tokens_without_contributions_count) {
  ModelConfig config = small_config();
  const RandomModel model(config, WeightFormat::f32, 9);
  for (const LayerWeights& layer : model.get()->layers)
    std::memset(const_cast<std::byte*>(layer.up.data), 0, layer.up.bytes());
  const auto backend = make_cpu_backend(model.get(), 1);
  const auto state = backend->new_state(8, KvFormat::f32);
  const auto tokens = random_tokens(6, 101);
  run(*backend, *state, step_of(tokens, 0, FfnMode::gather), 0);
  CHECK(backend->gathered(*state, 1) == 6);
  CHECK(backend->statistic(*state, 1) == std::vector<double>(37));
}

TEST(errors_say_what_was_expected) {
  const RandomModel model(small_config(), WeightFormat::f32, 10);
  CHECK_THROWS(make_cpu_backend(model.get(), -1), OptionError, "threads: -1");
  const auto backend = make_cpu_backend(model.get(), 1);
  CHECK_THROWS(backend->new_state(0, KvFormat::f32), OptionError, "capacity");
  CHECK_THROWS(backend->new_state(std::int64_t{1} << 50, KvFormat::f32), DeviceError,
               "of 1125899906842624 tokens");
  CHECK_THROWS(backend->new_state(INT64_MAX, KvFormat::f32), DeviceError, "bytes");
  const auto state = backend->new_state(8, KvFormat::f32);
  const auto tokens = random_tokens(300, 101);
  const auto begin = [&](const Step& step) {
    backend->begin(*state, step);
    return 0;
  };
  CHECK_THROWS(begin(step_of({}, 0)), OptionError, "0 tokens");
  CHECK_THROWS(begin(step_of(tokens, 0)), OptionError, "256");
  CHECK_THROWS(begin(step_of(Tokens(tokens).first(9), 0)), ContextOverflow, "9 tokens");
  CHECK_THROWS(begin(step_of(Tokens(tokens).first(1), 8)), ContextOverflow, "position 8");
  CHECK_THROWS(begin(step_of(Tokens(tokens).first(1), -1)), ContextOverflow, "position -1");
  CHECK_THROWS(begin({Tokens(tokens).first(2), 0, 1, FfnMode::dense}), OptionError,
               "sequence_length 1");
  const std::vector<Token> bad = {3, 101};
  CHECK_THROWS(begin(step_of(bad, 0)), OptionError, "token id 101");
  begin(step_of(Tokens(tokens).first(2), 0));
  CHECK_THROWS(backend->logits(*state, 3), OptionError, "3 rows");
  const auto set_mask = [&](std::vector<std::int32_t> ids) {
    backend->set_mask(*state, 1, std::move(ids));
    return 0;
  };
  CHECK_THROWS(set_mask({-1}), OptionError, "neuron -1");
  CHECK_THROWS(set_mask({3, 37}), OptionError, "neuron 37");
  CHECK_THROWS(set_mask({3, 3}), OptionError, "index 1");
  CHECK_THROWS(set_mask({5, 4}), OptionError, "ascending");
}

int main() { return run_tests(); }
