// The whole CUDA backend, host code, graphs and kernels, run on the CPU and compared with plain
// loops in double precision.
#include <deque>
#include <random>

#include "check.h"
#include "model/forward.h"
#include "simt_backend.h"

using namespace tda;
using naive::like_gemma2, naive::like_gemma3, naive::like_granite, naive::like_olmo2;
using naive::RandomModel, naive::random_tokens, naive::small_config, naive::step_of;

namespace {

/// Relative to the largest expected value.
double largest_difference(const float* found, const std::vector<naive::Vector>& expected) {
  double largest = 0, size = 0;
  for (const naive::Vector& vector : expected)
    for (const double e : vector) {
      const double difference = std::abs(*found++ - e);
      largest = std::max(largest, std::isnan(difference) ? INFINITY : difference);
      size = std::max(size, std::abs(e));
    }
  return largest / size;
}

struct Case {
  const char* what;
  ModelConfig config = small_config();
  WeightFormat format = WeightFormat::f32;
  KvFormat kv = KvFormat::f32;
  std::vector<std::int64_t> steps = {5, 1, 1, 2, 1};
};

std::deque<Case> cases() {
  std::deque<Case> all;
  const auto add = [&](const char* what) -> Case& { return all.emplace_back(Case{what}); };
  add("small");
  add("bf16 weights").format = WeightFormat::bf16;
  Case& bf16 = add("bf16 weights and cache, biases");
  bf16.format = WeightFormat::bf16;
  bf16.config.qkv_bias = bf16.config.output_bias = true;
  bf16.kv = KvFormat::bf16;
  Case& wide = add("head_dim 130, slices of columns, tied");
  wide.config.hidden_size = 300;
  wide.config.intermediate_size = 70;
  wide.config.num_heads = 3;
  wide.config.num_kv_heads = 1;
  wide.config.head_dim = 130;
  wide.config.tied_embeddings = true;
  wide.config.activation = Activation::gelu;
  Case& qwen = add("qk-norm, biases, a group of 5");
  qwen.config.qk_norm = qwen.config.qkv_bias = qwen.config.output_bias = true;
  qwen.config.num_heads = 5;
  qwen.config.num_kv_heads = 1;
  qwen.config.head_dim = 72;
  qwen.config.activation = Activation::gelu_tanh;
  Case& window = add("sliding window, one head per kv head");
  window.config.num_kv_heads = 4;
  window.config.sliding_window = {3, 0};
  window.config.activation = Activation::relu;
  window.steps = {19, 1, 20, 1};
  Case& split = add("keys split over blocks, a group of 4");
  split.config.num_heads = 8;
  split.config.num_kv_heads = 2;
  split.steps = {140, 1, 1};
  like_gemma2(add("soft-capping").config);
  like_gemma3(add("norms behind, a second rope").config);
  like_olmo2(add("norms behind alone, of all heads").config);
  like_granite(add("residual scale, a layer without rope").config);
  Case& gemma = add("norms behind in bf16");
  like_gemma3(gemma.config);
  gemma.format = WeightFormat::bf16;
  Case& tiles = add("several tiles of tensor cores");
  tiles.format = WeightFormat::bf16;
  tiles.config.num_layers = 1;
  tiles.config.hidden_size = 130;
  tiles.config.intermediate_size = 203;
  tiles.steps = {70};
  return all;
}

/// While it lives, cuBLASLt has no algorithms, so GEMMs run on our own kernels.
struct WithoutCublas {
  WithoutCublas() { simt::cublas_can = false; }
  ~WithoutCublas() { simt::cublas_can = true; }
};

/// Runs a case verb by verb on both sides. Returns the largest difference after any verb.
double run_case(const Case& c, FfnMode single = FfnMode::dense) {
  const RandomModel random(c.config, c.format, 1);
  const auto model = random.get();
  const CudaBackend backend(model, 1, false);
  naive::Session session(model, c.kv);
  session.rounds = true;
  const std::vector<Token> tokens = random_tokens(192, c.config.vocab_size);
  const auto s = backend.new_state(192, c.kv);
  CudaState& state = CudaState::of(*s);
  if (single == FfnMode::sparse)
    for (std::int64_t l = 0; l < c.config.num_layers; ++l) {
      session.masks[l].clear();
      for (std::int32_t j = 0; j < c.config.intermediate_size; ++j)
        if (j % 3 != l) session.masks[l].push_back(j);
      backend.set_mask(*s, l, session.masks[l]);
    }
  double largest = 0;
  std::int64_t position = 0;
  for (const std::int64_t size : c.steps) {
    const Step step = step_of(Tokens(tokens).subspan(position, size), position, single);
    const auto check = [&](const float* found, const std::vector<naive::Vector>& expected) {
      largest = std::max(largest, largest_difference(found, expected));
    };
    backend.begin(*s, step);
    session.begin(step);
    backend.embed(*s);
    session.embed();
    check(state.x.data(), session.x);
    for (std::int64_t l = 0; l < c.config.num_layers; ++l) {
      backend.qkv(*s, l);
      session.qkv(l);
      backend.attention(*s, l);
      session.attention(l);
      check(state.attended.data(), session.attended);
      backend.attention_out(*s, l);
      session.attention_out(l);
      check(state.x.data(), session.x);
      backend.ffn(*s, l);
      session.ffn(l);
      check(state.x.data(), session.x);
    }
    for (const std::int64_t rows : {std::int64_t{1}, size}) {
      std::vector<naive::Vector> expected;
      for (std::int64_t t = size - rows; t < size; ++t)
        expected.push_back(session.logits(t, rows == 1));
      const auto logits = backend.logits(*s, rows);
      check(logits.data(), expected);
      const Token best = argmax(logits.last(c.config.vocab_size));
      if (rows == 1) CHECK(backend.draw(*s, 0, 0) == best);
    }
    position += size;
  }
  return largest;
}

}  // namespace

// Under sanitizers a single schedule is enough: they check every access. The plain build runs many.
#ifdef __SANITIZE_ADDRESS__
constexpr int kShapes = 6, kSchedules = 3;
#else
constexpr int kShapes = 60, kSchedules = 300;
#endif

TEST(every_verb_agrees_with_plain_loops) {
  for (const Case& c : cases())
    for (const FfnMode mode : {FfnMode::dense, FfnMode::sparse}) {
      const double difference = run_case(c, mode);
      if (c.format == WeightFormat::bf16) {
        const WithoutCublas own;
        CHECK_NEAR(run_case(c, mode), 0, 0.005);
      }
      // Rounding to bf16 may go to different neighbours on the two sides.
      const bool rounds = c.kv == KvFormat::bf16 || c.format == WeightFormat::bf16;
      CHECK_NEAR(difference, 0, rounds ? 0.005 : 3e-6);
      if (!(difference < 1e-4)) std::printf("  %s: %g\n", c.what, difference);
    }
}

/// Logits of a few steps, some of them sparse by the given threshold.
std::vector<float> some_logits(const CudaBackend& backend, float threshold = 0) {
  const std::vector<Token> tokens = random_tokens(8, backend.model().config.vocab_size);
  const auto state = backend.new_state(8, KvFormat::f32);
  for (std::int64_t l = 0; l < backend.model().config.num_layers; ++l)
    backend.set_threshold(*state, l, threshold);
  std::vector<float> all;
  for (std::int64_t position = 0; position < 6; ++position) {
    const FfnMode mode = position % 2 ? FfnMode::sparse : FfnMode::dense;
    const auto logits =
        forward(backend, *state, step_of({&tokens[position], 1}, position, mode), 1);
    all.insert(all.end(), logits.begin(), logits.end());
  }
  return all;
}

TEST(greedy_takes_the_lowest_of_equal_ids_and_no_nan) {
  ModelConfig config = small_config();
  config.vocab_size = 2100;  // needs several blocks
  const RandomModel random(config, WeightFormat::f32, 8);
  const auto model = random.get();
  for (std::int64_t r = 1; r < config.vocab_size; ++r)  // equal logits
    std::memcpy(const_cast<std::byte*>(model->head.row(r)), model->head.row(0),
                static_cast<std::size_t>(model->head.row_bytes()));
  RandomModel::poison(model->embedding, 1);
  const CudaBackend backend(model, 1);
  const auto state = backend.new_state(2, KvFormat::f32);
  const std::vector<Token> tokens = {0, 1};
  forward(backend, *state, step_of({&tokens[0], 1}, 0), 0);
  CHECK(backend.draw(*state, 0, 0) == 0);
  forward(backend, *state, step_of({&tokens[1], 1}, 1), 0);
  for (const double temperature : {0.0, 1.0})
    CHECK_THROWS(backend.draw(*state, temperature, 0.5), Error, "not finite");
}

TEST(one_logit_that_is_not_finite_is_an_error) {
  ModelConfig config = small_config();
  config.vocab_size = 2100;  // several blocks
  for (const std::int64_t row : {0, 7, 2099}) {
    const RandomModel random(config, WeightFormat::f32, 8);
    RandomModel::poison(random.get()->head, row);
    const CudaBackend backend(random.get(), 1);
    const auto state = backend.new_state(1, KvFormat::f32);
    const Token token = 5;
    forward(backend, *state, step_of({&token, 1}, 0), 0);
    for (const double temperature : {0.0, 1.0})
      CHECK_THROWS(backend.draw(*state, temperature, 0.5), Error, "not finite");
  }
}

TEST(what_overflows_within_a_layer_is_seen) {
  using Member = Matrix LayerWeights::*;
  for (const Activation activation : {Activation::silu, Activation::relu})
    for (const Member member : {&LayerWeights::qkv, &LayerWeights::output, &LayerWeights::gate,
                                &LayerWeights::up, &LayerWeights::down})
      for (const float large : {3e38f, 1e25f}) {
        ModelConfig config = small_config();
        config.activation = activation;
        const RandomModel random(config, WeightFormat::f32, 8);
        const Matrix& matrix = random.get()->layers[0].*member;
        for (std::int64_t r = 0; r < matrix.rows; ++r)
          std::fill_n(reinterpret_cast<float*>(const_cast<std::byte*>(matrix.row(r))), matrix.cols,
                      r % 2 ? large : -large);
        const CudaBackend backend(random.get(), 1);
        const auto state = backend.new_state(3, KvFormat::bf16);
        const std::vector<Token> tokens = {5, 6, 7};
        CHECK_THROWS(check_finite(forward(backend, *state, step_of(tokens, 0), 1)), Error,
                     "not finite");
        for (std::int64_t i = 0; i < 3; ++i)
          forward(backend, *state, step_of({&tokens[i], 1}, i), 0);
        CHECK_THROWS(backend.draw(*state, 0, 0), Error, "not finite");
      }
}

TEST(a_nan_of_a_neuron_is_selected_and_seen) {
  for (const Estimate estimate : {Estimate::contribution, Estimate::gate}) {
    const RandomModel random(small_config(), WeightFormat::f32, 8);
    const auto model = random.get();
    RandomModel::poison(model->layers[0].gate, 3);
    const CudaBackend backend(model, 1);
    const auto state = backend.new_state(1, KvFormat::f32);
    state->estimate = estimate;
    backend.set_threshold(*state, 0, 1e6f);  // no neuron passes
    const Token token = 5;
    forward(backend, *state, step_of({&token, 1}, 0, FfnMode::sparse), 0);
    CHECK_THROWS(backend.draw(*state, 0, 0), Error, "not finite");
  }
}

/// For u from 0 to almost 1, must draw the same tokens as the host from the same logits.
void check_draws(std::int64_t vocabulary, double temperature, unsigned seed, std::size_t draws) {
  ModelConfig config = small_config();
  config.num_layers = 1;
  config.hidden_size = 3;
  config.vocab_size = vocabulary;
  const RandomModel random(config, WeightFormat::f32, seed);
  const CudaBackend backend(random.get(), 1);
  const auto state = backend.new_state(1, KvFormat::f32);
  const Token token = 0;
  const auto on_device = forward(backend, *state, step_of({&token, 1}, 0), 1);
  const std::vector<float> logits(on_device.begin(), on_device.end());
  std::mt19937_64 numbers(seed);
  std::vector<double> us = {0, 1 - 0x1p-53};
  while (us.size() < draws) us.push_back(static_cast<double>(numbers() >> 11) * 0x1p-53);
  for (const double u : us)
    CHECK(backend.draw(*state, temperature, u) == draw(logits, temperature, u));
}

TEST(draws_are_those_of_the_host) {
  std::mt19937 random(9);
  const double temperatures[] = {1e-3, 0.3, 1, 5};
  for (unsigned i = 0; i < kShapes; ++i)
    check_draws(1 + random() % (i % 10 ? 300 : 3000), temperatures[i % 4], i, 12);
  check_draws(64 * kHeadBlock + 1234, 1, 1, 4);  // more than four tokens per thread
}

TEST(hundreds_of_schedules_draw_the_same) {
  ModelConfig config = small_config();
  config.num_layers = 1;
  config.vocab_size = 2 * kHeadBlock + 52;  // three blocks
  const RandomModel random(config, WeightFormat::f32, 11);
  const CudaBackend backend(random.get(), 1);
  const auto state = backend.new_state(1, KvFormat::f32);
  const Token token = 0;
  const auto on_device = forward(backend, *state, step_of({&token, 1}, 0), 1);
  const std::vector<float> logits(on_device.begin(), on_device.end());
  for (int seed = 0; seed < kSchedules; ++seed) {
    simt::seed(static_cast<unsigned>(seed));
    const double u = (seed + 0.5) / kSchedules;
    const double temperature =
        1 + seed % 2;  // differs from the last draw's, whose sums would otherwise fit
    CHECK(backend.draw(*state, temperature, u) == draw(logits, temperature, u));
  }
}

TEST(graphs_give_the_same_bits_as_single_launches) {
  const RandomModel random(small_config(), WeightFormat::bf16, 2);
  const std::vector<float> expected = some_logits(CudaBackend(random.get(), 1, false));
  CHECK(some_logits(CudaBackend(random.get(), 1, true)) == expected);
}

TEST(random_shapes_agree_with_the_cpu_backend) {
  std::mt19937 random(7);
  const auto between = [&](int low, int high) {
    return low + static_cast<int>(random() % static_cast<unsigned>(high - low + 1));
  };
  for (int i = 0; i < kShapes; ++i) {
    ModelConfig config = small_config();
    config.vocab_size = between(2, 140);
    config.hidden_size = between(1, 150);
    config.intermediate_size = between(1, 150);
    config.num_layers = between(1, 2);
    config.num_kv_heads = between(1, 3);
    config.num_heads = config.num_kv_heads * between(1, 6);
    config.head_dim = 2 * between(1, 40);
    config.qk_norm = between(0, 1) == 1;
    config.qkv_bias = config.output_bias = between(0, 1) == 1;
    const RandomModel model(config, WeightFormat::f32, static_cast<unsigned>(i));
    const CudaBackend cuda(model.get(), 1);
    const auto cpu = make_cpu_backend(model.get(), 1);
    const auto on_cuda = cuda.new_state(40, KvFormat::f32);
    const auto on_cpu = cpu->new_state(40, KvFormat::f32);
    std::vector<std::int32_t> mask;
    for (std::int32_t j = 0; j < config.intermediate_size; ++j)
      if (between(0, 1)) mask.push_back(j);
    cuda.set_mask(*on_cuda, 0, mask);
    cpu->set_mask(*on_cpu, 0, mask);
    const std::vector<Token> tokens = random_tokens(40, config.vocab_size);
    std::int64_t position = 0;
    for (const std::int64_t size : {between(1, 33), 1, between(1, 4), 1}) {
      const auto mode = static_cast<FfnMode>(between(0, 2));
      const Step step = step_of(Tokens(tokens).subspan(position, size), position, mode);
      const auto found = forward(cuda, *on_cuda, step, size);
      const auto expected = forward(*cpu, *on_cpu, step, size);
      CHECK(found.size() == expected.size());
      for (std::size_t k = 0; k < found.size(); ++k) CHECK_NEAR(found[k], expected[k], 2e-4);
      position += size;
    }
    for (std::int64_t l = 0; l < config.num_layers; ++l) {
      CHECK(cuda.ffn_reads(*on_cuda, l).exact == cpu->ffn_reads(*on_cpu, l).exact);
      const auto found = cuda.statistic(*on_cuda, l), expected = cpu->statistic(*on_cpu, l);
      CHECK(cuda.gathered(*on_cuda, l) == cpu->gathered(*on_cpu, l));
      for (std::size_t j = 0; j < found.size(); ++j) CHECK_NEAR(found[j], expected[j], 1e-4);
    }
  }
}

TEST(products_by_cublas_are_those_of_the_own_kernels) {
  std::mt19937 random(10);
  const auto between = [&](int low, int high) {
    return low + static_cast<int>(random() % static_cast<unsigned>(high - low + 1));
  };
  for (int i = 0; i < kShapes; ++i) {
    ModelConfig config = small_config();
    config.num_layers = 1;
    config.vocab_size = between(2, 140);
    config.hidden_size = between(1, 150);
    config.intermediate_size = between(1, 150);
    config.qkv_bias = between(0, 1) == 1;
    const RandomModel model(config, WeightFormat::bf16, static_cast<unsigned>(i));
    const CudaBackend backend(model.get(), 1);
    const std::int64_t tokens = between(2, 80);
    const std::vector<Token> ids = random_tokens(tokens, config.vocab_size);
    // Each verb runs right after embed(), so that both sides round the same inputs. Only the FFN
    // also rounds its own h, which differs.
    struct Products {
      std::vector<float> qkv, logits, hidden, x;
    };
    const auto products = [&] {
      const auto s = backend.new_state(tokens, KvFormat::f32);
      CudaState& state = CudaState::of(*s);
      const auto copy_of = [](const cuda::Memory<float>& from, std::int64_t count) {
        return std::vector<float>(from.data(), from.data() + count);
      };
      Products made;
      backend.begin(*s, step_of(ids, 0));
      backend.embed(*s);
      backend.qkv(*s, 0);
      made.qkv = copy_of(state.qkv, tokens * (config.q_size() + 2 * config.kv_size()));
      const auto logits = backend.logits(*s, tokens);
      made.logits.assign(logits.begin(), logits.end());
      backend.ffn(*s, 0);
      made.hidden = copy_of(state.hidden, tokens * config.intermediate_size);
      made.x = copy_of(state.x, tokens * config.hidden_size);
      return made;
    };
    const long before = simt::cublas_products;
    const Products found = products();
    CHECK(simt::cublas_products == before + 5);  // qkv, head, gate, up, down
    const WithoutCublas own;
    const Products expected = products();
    CHECK(simt::cublas_products == before + 5);
    const auto compare = [](const std::vector<float>& a, const std::vector<float>& b, double by) {
      for (std::size_t k = 0; k < a.size(); ++k) CHECK_NEAR(a[k], b[k], by);
    };
    compare(found.qkv, expected.qkv, 1e-4);
    compare(found.logits, expected.logits, 1e-4);
    compare(found.hidden, expected.hidden, 1e-4);
    compare(found.x, expected.x, 0.02);
  }
}

TEST(products_by_cublas_have_the_same_bits_every_time) {
  ModelConfig config = small_config();
  config.num_layers = 1;
  const RandomModel random(config, WeightFormat::bf16, 12);
  const CudaBackend backend(random.get(), 1);
  const std::vector<Token> tokens = random_tokens(5, config.vocab_size);
  std::vector<float> expected;
  for (int seed = 0; seed < 10; ++seed) {
    simt::seed(static_cast<unsigned>(seed));
    const auto state = backend.new_state(5, KvFormat::f32);
    const auto logits = forward(backend, *state, step_of(tokens, 0), 5);
    if (seed == 0) expected.assign(logits.begin(), logits.end());
    CHECK(std::equal(logits.begin(), logits.end(), expected.begin(), expected.end()));
  }
}

TEST(hundreds_of_schedules_give_the_same_bits) {
  ModelConfig config = small_config();
  config.num_layers = 1;
  config.hidden_size = 18;
  config.vocab_size = 9;
  const RandomModel random(config, WeightFormat::f32, 3);
  const CudaBackend backend(random.get(), 1);
  const std::vector<float> expected = some_logits(backend, 0.3f);
  for (const float v : expected) CHECK(std::isfinite(v));
  for (int seed = 0; seed < kSchedules; ++seed) {
    simt::seed(static_cast<unsigned>(seed));
    CHECK(some_logits(backend, 0.3f) == expected);
  }
}

TEST(thresholds_select_by_contribution_or_gate_and_reads_count_it) {
  ModelConfig config = small_config();
  config.num_layers = 1;
  config.intermediate_size = 301;  // the selection has several words
  for (const bool gate_alone : {false, true}) {
    const RandomModel random(config, WeightFormat::f32, 4);
    const auto model = random.get();
    const LayerWeights& w = model->layers[0];
    const CudaBackend backend(model, 1, false);
    const auto state = backend.new_state(1, KvFormat::f32);
    const Token token = 5;
    const Step step = step_of({&token, 1}, 0, FfnMode::sparse);
    naive::Session session(model, KvFormat::f32);
    backend.begin(*state, step), session.begin(step);
    backend.embed(*state), session.embed();
    const naive::Vector in = session.norm(session.x[0].data(), w.ffn_norm);
    const naive::Vector gate = session.product(w.gate, in), up = session.product(w.up, in);
    const auto estimate = [&](std::int64_t j) {
      const double active = naive::activate(config.activation, gate[j]);
      return std::abs(gate_alone ? active : active * up[j] * w.down_lengths[j]);
    };
    naive::Vector estimates;
    for (std::int64_t j = 0; j < config.intermediate_size; ++j) estimates.push_back(estimate(j));
    std::sort(estimates.begin(), estimates.end());
    // A threshold between two estimates, so that rounding does not matter.
    const auto threshold = static_cast<float>((estimates[150] + estimates[151]) / 2);
    if (gate_alone) state->estimate = Estimate::gate;
    backend.set_threshold(*state, 0, threshold);
    std::int64_t selected = 0;
    for (std::int64_t j = 0; j < config.intermediate_size; ++j) {
      const double active = naive::activate(config.activation, gate[j]);
      if (estimate(j) < threshold) continue;
      ++selected;
      const naive::Vector down = naive::values(w.down, j);
      for (std::size_t i = 0; i < down.size(); ++i) session.x[0][i] += active * up[j] * down[i];
    }
    backend.ffn(*state, 0);
    CHECK(selected == 150);
    CHECK(backend.ffn_reads(*state, 0).exact == selected);
    CHECK_NEAR(largest_difference(CudaState::of(*state).x.data(), session.x), 0, 3e-6);
  }
}

TEST(the_statistic_is_that_of_the_definition) {
  ModelConfig config = small_config();
  const RandomModel random(config, WeightFormat::f32, 5);
  const auto model = random.get();
  const CudaBackend backend(model, 1);
  const std::vector<Token> tokens = random_tokens(7, config.vocab_size);
  for (const std::int64_t size : {1, 7}) {
    const auto state = backend.new_state(7, KvFormat::f32);
    naive::Session session(model, KvFormat::f32);
    const Step step = step_of(Tokens(tokens).first(size), 0, FfnMode::gather);
    forward(backend, *state, step, 0);
    session.begin(step);
    session.embed();
    session.qkv(0), session.attention(0), session.attention_out(0), session.ffn(0);
    naive::Vector expected(config.intermediate_size);
    for (const naive::Vector& h : session.hidden) {
      double all = 0;
      for (std::size_t j = 0; j < h.size(); ++j)
        all += std::pow(h[j] * model->layers[0].down_lengths[j], 2);
      for (std::size_t j = 0; j < h.size(); ++j)
        expected[j] += std::pow(h[j] * model->layers[0].down_lengths[j], 2) / all;
    }
    const std::vector<double> found = backend.statistic(*state, 0);
    CHECK(backend.gathered(*state, 0) == size);
    for (std::size_t j = 0; j < expected.size(); ++j) CHECK_NEAR(found[j], expected[j], 1e-5);
    backend.fade_statistic(*state, 0.5);
    CHECK(backend.statistic(*state, 0)[3] == found[3] / 2);
  }
}

TEST(what_does_not_fit_is_refused_by_name) {
  const RandomModel int8(small_config(), WeightFormat::int8, 6);
  CHECK_THROWS(CudaBackend(int8.get(), 1), OptionError, "weights int8");
  const RandomModel f32(small_config(), WeightFormat::f32, 6);
  simt::memory_total = 1000;
  CHECK_THROWS(CudaBackend(f32.get(), 1), DeviceError, "of which 1000 are free");
  simt::memory_total = std::size_t{1} << 30;
  CHECK(simt::memory_used == 0);
  const CudaBackend backend(f32.get(), 1);
  CHECK_THROWS(backend.new_state(1 << 30, KvFormat::f32), DeviceError, "KV cache");
  CHECK_THROWS(backend.new_state(0, KvFormat::f32), OptionError, "capacity");
  simt::devices = 0;
  CHECK_THROWS(make_cuda_backend(f32.get(), 1), DeviceError, "no CUDA device");
  simt::devices = 1;
  simt::capability = 7;
  CHECK_THROWS(make_cuda_backend(f32.get(), 1), DeviceError, "capability 7.x, expected 8.0");
  simt::capability = 9;
  simt::driver = 0;
  CHECK_THROWS(make_cuda_backend(f32.get(), 1), DeviceError, "no NVIDIA driver");
  simt::driver = 13000;
}

int main() { return run_tests(); }
