// Sequences of random tokens that are decoded step by step, in every way there is.
#pragma once

#include <random>

#include "kernel_tests.h"
#include "model/forward.h"
#include "random_model.h"

namespace sequences {

using namespace tda;
using naive::RandomModel;
using naive::step_of;

inline constexpr std::int64_t kCapacity = 160;

/// Rows of several groups, and neurons of several tasks.
inline ModelConfig wide_config() {
  ModelConfig config = naive::small_config();
  config.hidden_size = 330;
  config.intermediate_size = 421;
  config.sliding_window = {7, 0};
  config.qkv_bias = true;
  return config;
}

/// What a sequence does: a prompt, a way to decode, and the tokens that follow.
struct Plan {
  std::vector<Token> tokens;
  std::int64_t prompt;
  int mode;  // 0: dense, 1: a mask or thresholds of inputs, 2: of neurons
};

inline Plan random_plan(std::mt19937& random, std::int64_t vocab) {
  Plan plan;
  const auto below = [&](std::int64_t n) { return static_cast<std::int64_t>(random() % n); };
  plan.prompt = 1 + (below(8) == 0 ? below(140) : below(20));
  for (std::int64_t i = 0; i < plan.prompt + 8; ++i)
    plan.tokens.push_back(static_cast<Token>(below(vocab)));
  plan.mode = static_cast<int>(below(3));
  return plan;
}

/// A sequence under way, and all that its steps give.
struct Sequence {
  const Backend& backend;
  const Plan& plan;
  std::unique_ptr<State> state;
  std::int64_t at;
  std::vector<float> logits;

  Sequence(const Backend& b, const Plan& p)
      : backend(b), plan(p), state(b.new_state(kCapacity, KvFormat::automatic)), at(p.prompt) {
    const Tokens prompt = Tokens(plan.tokens).first(plan.prompt);
    for (std::int64_t done = 0; done < plan.prompt; done += 256) {
      const Tokens some = prompt.subspan(done, std::min<std::int64_t>(256, plan.prompt - done));
      Step step = step_of(some, done);
      step.sequence_length = plan.prompt;
      forward(backend, *state, step, 0);
    }
    const Model& model = backend.model();
    for (std::int64_t l = 0; l < model.config.num_layers && plan.mode > 0; ++l) {
      if (in_bricks(model.format)) {
        const float threshold = 0.05f * static_cast<float>(plan.mode);
        backend.set_input_thresholds(*state, l, {threshold, threshold, threshold, threshold});
      } else if (plan.mode == 1) {
        std::vector<std::int32_t> mask;
        for (std::int32_t j = static_cast<std::int32_t>(plan.prompt % 3);
             j < model.config.intermediate_size; j += 1 + (j / 50) % 3)
          mask.push_back(j);
        backend.set_mask(*state, l, mask);
      } else {
        backend.set_threshold(*state, l, 0.02f);
      }
    }
    if (plan.mode == 1 && !in_bricks(model.format)) backend.compact_masks(*state);
  }

  Step next() const {
    Step step = step_of(Tokens(plan.tokens).subspan(at, 1), at,
                        plan.mode > 0 ? FfnMode::sparse : FfnMode::dense);
    if (plan.mode > 0 && in_bricks(backend.model().format)) step.head_inputs = 0.05f;
    return step;
  }
  bool is_over() const { return at == std::ssize(plan.tokens); }
  void take(std::span<const float> row) {
    logits.insert(logits.end(), row.begin(), row.end());
    ++at;
  }
  void decode_alone() {
    const Step step = next();
    take(forward(backend, *state, step, 1));
  }
  std::vector<std::int64_t> reads() const {
    std::vector<std::int64_t> all = {backend.head_bytes(*state), backend.attention_bytes(*state)};
    for (std::int64_t l = 0; l < backend.model().config.num_layers; ++l) {
      const FfnReads reads = backend.ffn_reads(*state, l);
      all.insert(all.end(), {reads.exact, reads.coarse, reads.bytes});
    }
    return all;
  }
};

}  // namespace sequences
