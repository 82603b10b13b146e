// Prompts that go on behind kept rows: every bit is that of a prompt that was prefilled whole.
#include "check.h"
#include "sequences.h"

using namespace sequences;

namespace {

constexpr std::int64_t kStep = 256, kLongest = 300;

/// Prefills tokens[begin:] in steps that end at multiples of kStep; the last token's logits.
std::vector<float> prefill(const Backend& backend, State& state, Tokens tokens,
                           std::int64_t begin = 0) {
  std::span<const float> logits;
  while (begin < std::ssize(tokens)) {
    const std::int64_t end = std::min(std::ssize(tokens), begin - begin % kStep + kStep);
    Step step = step_of(tokens.subspan(begin, end - begin), begin, FfnMode::gather);
    step.sequence_length = std::ssize(tokens);
    logits = forward(backend, state, step, 1);
    begin = end;
  }
  return {logits.begin(), logits.end()};
}

ModelConfig config_of(bool gemma) {
  ModelConfig config = wide_config();
  if (gemma) naive::like_gemma3(config), config.score_cap = 0.7f;
  return config;
}

}  // namespace

TEST(the_rest_behind_kept_rows_gets_what_it_gets_behind_the_prompt) {
  std::mt19937 random(9);
  const auto below = [&](std::int64_t n) { return static_cast<std::int64_t>(random() % n); };
  int cuts = 0;
  for (const Kernels* kernels : available_kernels())
    for (const WeightFormat format : {WeightFormat::f32, WeightFormat::bf16, WeightFormat::int8,
                                      WeightFormat::int4, WeightFormat::graded})
      for (int round = 0; round < 4; ++round) {
        const ForcedIsa forced(kernels->name);
        const RandomModel model(config_of(round % 2 == 1), format, 3);
        const auto backend = make_cpu_backend(model.get(), 3);
        const std::int64_t layers = backend->model().config.num_layers;
        const std::int64_t multiple = backend->cut_multiple();
        CHECK(multiple > 1 && kStep % multiple == 0);
        const KvFormat kv = round < 2 ? KvFormat::automatic : KvFormat::int8;

        std::vector<Token> earlier, prompt;
        for (std::int64_t i = 0; i < kLongest; ++i)
          earlier.push_back(static_cast<Token>(below(101)));
        const std::int64_t common =
            round % 3 == 0 ? kStep + below(kLongest - kStep) : 2 + below(kStep);
        prompt.assign(earlier.begin(), earlier.begin() + common);
        for (std::int64_t i = 0, rest = 2 + below(50); i < rest; ++i)
          prompt.push_back(static_cast<Token>(below(101)));

        const auto whole = backend->new_state(kLongest + 60, kv),
                   kept = backend->new_state(kLongest, kv),
                   cut = backend->new_state(kLongest + 60, kv);
        const std::vector<float> expected = prefill(*backend, *whole, prompt);
        prefill(*backend, *kept, earlier);
        const std::int64_t all = kLongest / multiple * multiple;
        const std::int64_t length = common / multiple * multiple;
        backend->set_key_value_rows(*cut, backend->key_value_rows(*kept, all), all, length);
        CHECK(prefill(*backend, *cut, prompt, length) == expected);
        CHECK(backend->key_value_rows(*cut, std::ssize(prompt)) ==
              backend->key_value_rows(*whole, std::ssize(prompt)));
        cuts += length % kStep != 0;

        // The statistic, which goes on where a step ends.
        if (common < kStep) continue;
        const auto begun = backend->new_state(kLongest, kv),
                   gone_on = backend->new_state(kLongest + 60, kv);
        prefill(*backend, *begun, Tokens(earlier).first(kStep));
        backend->set_key_value_rows(*gone_on, backend->key_value_rows(*kept, all), all, kStep);
        for (std::int64_t layer = 0; layer < layers; ++layer)
          backend->set_statistic(*gone_on, layer, backend->statistic(*begun, layer),
                                 backend->gathered(*begun, layer));
        CHECK(prefill(*backend, *gone_on, prompt, kStep) == expected);
        for (std::int64_t layer = 0; layer < layers; ++layer) {
          CHECK(backend->statistic(*gone_on, layer) == backend->statistic(*whole, layer));
          CHECK(backend->gathered(*gone_on, layer) == backend->gathered(*whole, layer));
        }
      }
  CHECK(cuts > 10);
}

int main() { return run_tests(); }
