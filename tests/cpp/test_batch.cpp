// Steps of several sequences: each gets what it gets alone, bit for bit.
#include <tda/error.h>

#include <random>
#include <set>
#include <thread>

#include "check.h"
#include "engine/decode_queue.h"
#include "kernel_tests.h"
#include "model/forward.h"
#include "random_model.h"

using namespace tda;
using naive::RandomModel;
using naive::step_of;

namespace {

constexpr WeightFormat kAllFormats[] = {WeightFormat::f32, WeightFormat::bf16, WeightFormat::int8,
                                        WeightFormat::int4, WeightFormat::graded};
constexpr std::int64_t kCapacity = 160;

/// Rows of several groups, and neurons of several tasks.
ModelConfig wide_config() {
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
  int mode;  // 0: dense, 1: a mask or thresholds of inputs, 2: of neurons, 3: both planes and the head
};

Plan random_plan(std::mt19937& random, std::int64_t vocab) {
  Plan plan;
  const auto below = [&](std::int64_t n) { return static_cast<std::int64_t>(random() % n); };
  plan.prompt = 1 + (below(8) == 0 ? below(140) : below(20));
  for (std::int64_t i = 0; i < plan.prompt + 8; ++i)
    plan.tokens.push_back(static_cast<Token>(below(vocab)));
  plan.mode = static_cast<int>(below(4));
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
        const bool planes = plan.mode == 3 && model.format == WeightFormat::int8;
        backend.set_thresholds(*state, l, {0.02f, planes ? 0.01f : 0.02f});
      }
    }
    if (plan.mode == 1 && !in_bricks(model.format)) backend.compact_masks(*state);
  }

  Step next() const {
    Step step = step_of(Tokens(plan.tokens).subspan(at, 1), at,
                        plan.mode > 0 ? FfnMode::sparse : FfnMode::dense);
    const WeightFormat format = backend.model().format;
    if (plan.mode == 3 && format == WeightFormat::int8) step.head = 0.01f;
    if (plan.mode > 0 && in_bricks(format)) step.head_inputs = 0.05f;
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

void decode_together(const Backend& backend, std::span<Sequence* const> batch) {
  std::vector<Step> steps;
  std::vector<Token> tokens;
  std::vector<State*> states;
  for (Sequence* const s : batch) {
    s->state->step = s->next();
    tokens.push_back(s->state->step.tokens[0]);
    states.push_back(s->state.get());
  }
  Step step;
  step.tokens = tokens;
  step.batch = states;
  forward(backend, *states[0], step, std::ssize(states));
  for (Sequence* const s : batch) s->take(s->state->logits);
}

}  // namespace

TEST(a_sequence_gets_in_any_batch_what_it_gets_alone) {
  std::mt19937 random(5);
  const auto below = [&](std::size_t n) { return random() % n; };
  for (const Kernels* kernels : available_kernels())
    for (const WeightFormat format : kAllFormats) {
      const ForcedIsa forced(kernels->name);
      const RandomModel model(wide_config(), format, 3);
      const auto backend = make_cpu_backend(model.get(), 3);
      std::vector<Plan> plans;
      for (int i = 0; i < 20; ++i) plans.push_back(random_plan(random, 101));
      std::vector<Sequence> alone;
      for (const Plan& plan : plans) {
        Sequence& s = alone.emplace_back(*backend, plan);
        while (!s.is_over()) s.decode_alone();
      }
      // They join at any time, miss steps, and leave when they are over.
      std::vector<Sequence> sequences;
      sequences.reserve(plans.size());
      std::set<std::size_t> sizes;
      while (true) {
        while (sequences.size() < plans.size() && (sequences.empty() || below(4) > 0))
          sequences.emplace_back(*backend, plans[sequences.size()]);
        std::vector<Sequence*> batch;
        for (Sequence& s : sequences)
          if (!s.is_over() && below(5) > 0 && batch.size() < 16) batch.push_back(&s);
        std::shuffle(batch.begin(), batch.end(), random);
        if (batch.size() > 1) decode_together(*backend, batch);
        if (batch.size() == 1) batch[0]->decode_alone();
        sizes.insert(batch.size());
        if (sequences.size() == plans.size() &&
            std::ranges::all_of(sequences, [](const Sequence& s) { return s.is_over(); }))
          break;
      }
      CHECK(sizes.size() > 6 && *sizes.rbegin() > 8);
      for (std::size_t i = 0; i < plans.size(); ++i) {
        CHECK(sequences[i].logits == alone[i].logits);
        CHECK(sequences[i].reads() == alone[i].reads());
        if (sequences[i].logits != alone[i].logits)
          std::printf("  %s %s mode %d\n", kernels->name, std::string(name_of(format)).c_str(),
                      plans[i].mode);
      }
    }
}

TEST(threads_that_decode_at_the_same_time_compute_together) {
  const RandomModel model(wide_config(), WeightFormat::int8, 3);
  const auto backend = make_cpu_backend(model.get(), 2);
  std::mt19937 random(6);
  std::vector<Plan> plans;
  for (int i = 0; i < 8; ++i) plans.push_back(random_plan(random, 101));
  for (const std::int64_t most : {1, 3, 16}) {
    ForkSafeMutex computing;
    DecodeQueue queue(*backend, computing, most);
    std::vector<Sequence> alone, together;
    std::vector<std::int64_t> sizes(plans.size());
    for (const Plan& plan : plans) alone.emplace_back(*backend, plan);
    for (const Plan& plan : plans) together.emplace_back(*backend, plan);
    for (Sequence& s : alone)
      while (!s.is_over()) s.decode_alone();
    {
      std::vector<std::jthread> threads;
      for (std::size_t i = 0; i < plans.size(); ++i)
        threads.emplace_back([&, i] {
          Sequence& s = together[i];
          DecodeQueue::Member member(queue);
          while (!s.is_over()) s.take(queue.decode(member, *s.state, s.next(), sizes[i]));
        });
    }
    for (std::size_t i = 0; i < plans.size(); ++i) {
      CHECK(together[i].logits == alone[i].logits);
      CHECK(sizes[i] >= 8 && sizes[i] <= 8 * most);
      if (most == 1) CHECK(sizes[i] == 8);
    }
  }
}

TEST(an_error_reaches_all_sequences_of_a_step) {
  const RandomModel model(wide_config(), WeightFormat::f32, 3);
  const auto backend = make_cpu_backend(model.get(), 1);
  std::mt19937 random(7);
  const Plan plan = random_plan(random, 101);
  ForkSafeMutex computing;
  DecodeQueue queue(*backend, computing, 16);
  Sequence s(*backend, plan);
  DecodeQueue::Member member(queue);
  std::int64_t sizes = 0;
  Step step = s.next();
  step.position = kCapacity;  // beyond the cache
  CHECK_THROWS(queue.decode(member, *s.state, step, sizes), ContextOverflow, "do not fit");
  s.take(queue.decode(member, *s.state, s.next(), sizes));  // and the queue works on
  CHECK(sizes == 1);
}

int main() { return run_tests(); }
