// Steps of several sequences: each gets what it gets alone, bit for bit.
#include <set>

#include "check.h"
#include "sequences.h"

using namespace sequences;

namespace {

constexpr WeightFormat kAllFormats[] = {WeightFormat::f32, WeightFormat::bf16, WeightFormat::int8,
                                        WeightFormat::int4, WeightFormat::graded};

void decode_together(const Backend& backend, std::span<Sequence* const> batch) {
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
      ModelConfig config = wide_config();
      if (format != WeightFormat::f32) config.score_cap = 0.7f, config.logit_cap = 1.3f;
      const RandomModel model(config, format, 3);
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

int main() { return run_tests(); }
