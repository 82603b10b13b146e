// The CUDA backend on the CPU, whole: host code, graphs and kernels, against plain loops in
// doubles.
#include <cstdlib>
#include <deque>

#include "check.h"
#include "cuda/attention.cu"
#include "cuda/cuda_backend.cu"
#include "cuda/ffn.cu"
#include "cuda/linear.cu"
#include "model/forward.h"
#include "naive.h"

using namespace tda;
using naive::RandomModel, naive::random_tokens, naive::small_config, naive::step_of;

namespace {

double largest_difference(const float* found, const std::vector<naive::Vector>& expected) {
  double largest = 0;
  for (const naive::Vector& vector : expected)
    for (const double e : vector) {
      const double difference = std::abs(*found++ - e);
      largest = std::max(largest, std::isnan(difference) ? INFINITY : difference);
    }
  return largest;
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
  Case& bf16 = add("bf16 weights and cache");
  bf16.format = WeightFormat::bf16;
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
  return all;
}

/// Runs a case verb by verb on both sides; the largest difference after any verb.
double run_case(const Case& c, FfnMode single = FfnMode::dense) {
  const RandomModel random(c.config, c.format, 1);
  const auto model = random.get();
  const CudaBackend backend(model, 1, false);
  naive::Session session(model, c.kv);
  const std::vector<Token> tokens = random_tokens(64, c.config.vocab_size);
  const auto s = backend.new_state(64, c.kv);
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
      for (std::int64_t t = size - rows; t < size; ++t) expected.push_back(session.logits(t));
      check(backend.logits(*s, rows).data(), expected);
    }
    position += size;
  }
  return largest;
}

}  // namespace

TEST(every_verb_agrees_with_plain_loops) {
  for (const Case& c : cases())
    for (const FfnMode mode : {FfnMode::dense, FfnMode::sparse}) {
      const double difference = run_case(c, mode);
      CHECK_NEAR(difference, 0, c.kv == KvFormat::bf16 ? 0.05 : 1e-4);
      if (!(difference < 1e-4)) std::printf("  %s: %g\n", c.what, difference);
    }
}

int main() { return run_tests(); }
