// Mutation tests: breaks every barrier and every index bound of the kernels, one at a time. A
// broken barrier does nothing, a broken bound admits one more index. Under some schedule the
// results must change, or the shim must report an error.
#include <sys/wait.h>
#include <unistd.h>

#include <set>

#include "check.h"
#include "simt_backend.h"

using namespace tda;
using naive::RandomModel, naive::random_tokens, naive::small_config, naive::step_of;

namespace {

constexpr unsigned kSchedules = 50;

/// A model and the steps it runs: small, but every loop over tiles or blocks runs several times.
struct Scenario {
  explicit Scenario(WeightFormat weights, std::vector<std::int64_t> lengths) : steps(lengths) {
    format = weights;
    config = small_config();
    config.num_layers = 1;
    config.intermediate_size = 150;  // the widest buffer, so that a fence follows it
  }
  ModelConfig config;
  WeightFormat format;
  std::vector<std::int64_t> steps;
  float threshold = 0;
  Estimate estimate = Estimate::contribution;
  FfnMode several = FfnMode::gather;
  bool masks = false;  // at the end, thresholds and masks of scope "sequence"
};

std::vector<Scenario> scenarios() {
  std::vector<Scenario> all;
  Scenario& f32 = all.emplace_back(WeightFormat::f32, std::vector<std::int64_t>{130, 1, 1});
  f32.config.qk_norm = f32.config.qkv_bias = true;
  all.emplace_back(WeightFormat::bf16, std::vector<std::int64_t>{66});
  Scenario& contribution = all.emplace_back(WeightFormat::bf16, std::vector<std::int64_t>{1, 1});
  contribution.threshold = 0.2f;
  Scenario& gate = all.emplace_back(WeightFormat::f32, std::vector<std::int64_t>{1, 1});
  gate.threshold = 0.2f;
  gate.estimate = Estimate::gate;
  Scenario& masks = all.emplace_back(WeightFormat::f32, std::vector<std::int64_t>{5});
  masks.config.intermediate_size = 300;  // needs several tiles of ranks
  masks.masks = true;
  return all;
}

/// Everything observable in a scenario.
std::vector<float> outcome(const Scenario& scenario) {
  static std::map<const Scenario*, std::shared_ptr<RandomModel>> models;
  auto& model = models[&scenario];
  if (!model) model = std::make_shared<RandomModel>(scenario.config, scenario.format, 1);
  const CudaBackend backend(model->get(), 1, false);
  std::int64_t position = 0, capacity = 0;
  for (const std::int64_t size : scenario.steps) capacity += size;
  const auto s = backend.new_state(capacity, KvFormat::automatic);
  CudaState& state = CudaState::of(*s);
  s->estimate = scenario.estimate;
  backend.set_threshold(*s, 0, scenario.threshold);
  const std::vector<Token> tokens = random_tokens(capacity, scenario.config.vocab_size);
  std::vector<float> seen;
  const auto see = [&](const auto* values, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) seen.push_back(static_cast<float>(values[i]));
  };
  std::vector<std::int64_t> sampled(scenario.masks ? capacity : 0);  // all tokens of the only step
  std::iota(sampled.begin(), sampled.end(), 0);
  backend.reserve_samples(*s, std::ssize(sampled));
  for (const std::int64_t size : scenario.steps) {
    const FfnMode mode = size > 1 ? scenario.several : FfnMode::sparse;
    Step step = step_of(Tokens(tokens).subspan(position, size), position, mode);
    step.samples = sampled;
    backend.begin(*s, step);
    backend.embed(*s);
    backend.qkv(*s, 0);
    backend.attention(*s, 0);
    see(state.attended.data(), size * scenario.config.q_size());
    backend.attention_out(*s, 0);
    backend.ffn(*s, 0);
    see(state.x.data(), size * scenario.config.hidden_size);
    const auto logits = backend.logits(*s, size);
    see(logits.data(), std::ssize(logits));
    for (const double u : {0.2, 0.5, 0.8})
      seen.push_back(static_cast<float>(backend.draw(*s, 1, u)));
    seen.push_back(static_cast<float>(backend.draw(*s, 0, 0)));
    position += size;
  }
  const auto statistic = backend.statistic(*s, 0);
  see(statistic.data(), std::ssize(statistic));
  seen.push_back(static_cast<float>(backend.ffn_reads(*s, 0).exact));
  if (scenario.masks) {
    const ThresholdSearch found = backend.search_thresholds(*s, 0.3).front();
    seen.push_back(found.threshold);
    seen.push_back(static_cast<float>(found.error));
    const auto see_mask = [&] {
      const std::vector<std::int32_t> mask = backend.mask(*s, 0);
      see(mask.data(), std::ssize(mask));
    };
    backend.mask_at_least(*s, {&found.threshold, 1});
    see_mask();
    backend.mask_top_share(*s, 0.4);
    see_mask();
  }
  backend.fade_statistic(*s, 0.5);
  backend.stream().wait();
  return seen;
}

/// Compares bits, so NaN equals NaN.
bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

struct Known {
  const Scenario* scenario;
  std::vector<float> outcome;
  std::map<std::string, long> places;
};

/// In a child process, because it may crash or hang.
bool is_caught(const std::string& place, const std::vector<Known>& known) {
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    std::freopen("/dev/null", "w", stderr);
    alarm(60);
    simt::broken = place;
    try {
      for (unsigned seed = 0; seed < kSchedules; ++seed)
        for (const Known& k : known) {
          simt::seed(seed);
          if (k.places.contains(place) && !same(outcome(*k.scenario), k.outcome)) _exit(1);
        }
    } catch (const std::exception&) {
      _exit(1);
    }
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return !WIFEXITED(status) || WEXITSTATUS(status) != 0;
}

}  // namespace

TEST(every_broken_barrier_or_bound_is_caught) {
  simt::processors = 1;      // few blocks, so that each loops several times
  simt::cublas_can = false;  // so that our own GEMM kernels run
  const std::vector<Scenario> all = scenarios();
  std::vector<Known> known;
  std::set<std::string> places;
  for (const Scenario& scenario : all) {
    simt::places.clear();
    std::vector<float> expected = outcome(scenario);
    for (unsigned seed = 0; seed < 3; ++seed) {
      simt::seed(seed);
      CHECK(same(outcome(scenario), expected));  // else a changed result would prove nothing
    }
    for (const float v : expected) CHECK(std::isfinite(v));
    for (const auto& [place, count] : simt::places) places.insert(place);
    known.push_back({&scenario, std::move(expected), simt::places});
  }
  for (const std::string& place : places)
    if (!is_caught(place, known)) check::fail(place.c_str(), 0, "broken, and no test sees it");
  std::printf("%zu places broken\n", places.size());
}

int main() { return run_tests(); }
