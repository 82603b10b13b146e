// Parts of the backends on the host: rotary frequencies, threads, and the choice of kernels.
#include <tda/engine.h>
#include <tda/error.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <thread>
#include <vector>

#include "backend/rope.h"
#include "base/thread_pool.h"
#include "check.h"
#include "cpu/isa.h"

using namespace tda;

TEST(rope_frequencies_match_transformers) {
  using Scaling = RopeConfig::Scaling;
  const auto check = [](const RopeConfig& rope, std::int64_t length,
                        const std::vector<float>& expected) {
    const auto found = rope_frequencies(rope, 16, length);
    CHECK(found.size() == expected.size());
    for (std::size_t i = 0; i < expected.size(); ++i)
      CHECK_NEAR(found.at(i) / expected[i], 1, 2e-7);
  };
  RopeConfig rope;
  check(rope, 1,
        {1.f, 0.316227764f, 0.100000001f, 0.0316227786f, 0.00999999978f, 0.00316227786f,
         0.00100000005f, 0.000316227786f});
  rope.scaling = Scaling::linear;
  rope.factor = 3;
  check(rope, 1,
        {0.333333343f, 0.105409257f, 0.0333333351f, 0.0105409259f, 0.00333333318f, 0.00105409266f,
         0.000333333359f, 0.000105409265f});
  rope.scaling = Scaling::dynamic;
  rope.factor = 2;
  rope.original_max_position = 2048;
  check(rope, 2000,
        {1.f, 0.316227764f, 0.100000001f, 0.0316227786f, 0.00999999978f, 0.00316227786f,
         0.00100000005f, 0.000316227786f});
  check(rope, 5000,
        {1.f, 0.260517091f, 0.0678691566f, 0.0176810753f, 0.00460622227f, 0.00119999971f,
         0.000312620425f, 8.14429659e-05f});
  rope = {};
  rope.scaling = Scaling::llama3;
  rope.theta = 500000;
  rope.factor = 8;
  rope.original_max_position = 256;
  check(rope, 1,
        {1.f, 0.193922758f, 0.0105382307f, 0.000911583134f, 0.000176776681f, 3.42810235e-05f,
         6.64786967e-06f, 1.28917316e-06f});
  rope = {};
  rope.scaling = Scaling::yarn;
  rope.factor = 4;
  rope.original_max_position = 512;
  check(rope, 1,
        {1.f, 0.25693506f, 0.0625f, 0.0138349654f, 0.00249999994f, 0.000790569466f, 0.000250000012f,
         7.90569466e-05f});
  RopeConfig longrope;
  longrope.scaling = Scaling::longrope;
  longrope.original_max_position = 512;
  longrope.short_factor = {1, 1, 1, 2, 2, 2, 2, 2};
  longrope.long_factor = {1, 2, 4, 4, 4, 4, 4, 8};
  for (const std::int64_t length : {1, 512})
    check(longrope, length,
          {1.f, 0.316227764f, 0.100000001f, 0.0158113893f, 0.00499999989f, 0.00158113893f,
           0.000500000024f, 0.000158113893f});
  check(longrope, 513,
        {1.f, 0.158113882f, 0.0250000004f, 0.00790569466f, 0.00249999994f, 0.000790569466f,
         0.000250000012f, 3.95284733e-05f});
  rope.truncate = false;
  rope.beta_fast = 16;
  rope.beta_slow = 2;
  check(rope, 1,
        {1.f, 0.316227764f, 0.0756644011f, 0.0107961092f, 0.00249999994f, 0.000790569466f,
         0.000250000012f, 7.90569466e-05f});
}

TEST(thread_pool_runs_every_task_once) {
  for (const int threads : {1, 2, 5, 33}) {
    ThreadPool pool(threads);
    for (std::int64_t region = 0; region < 3000; ++region) {
      const std::int64_t n = region % 11 * (region % 100 == 0 ? 50 : 1);
      std::vector<int> runs(n);
      pool.run(n, [&](std::int64_t i, int thread) {
        if (region % 1000 == 999) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        runs[i] += 1 + (thread >= threads);
      });
      CHECK(runs == std::vector<int>(n, 1));
      // Sometimes long enough for the workers to go to sleep.
      if (region % 500 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
  }
  CHECK(ThreadPool(0).threads() >= 1);
}

TEST(thread_pool_runs_tasks_side_by_side) {
  const int threads = 4;
  ThreadPool pool(threads);
  // Each task waits for all others, so each needs its own thread.
  std::atomic<int> arrived = 0, lonely = 0;
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  pool.run(threads, [&](std::int64_t, int) {
    ++arrived;
    while (arrived < threads && std::chrono::steady_clock::now() < deadline)
      std::this_thread::yield();
    if (arrived < threads) ++lonely;
  });
  CHECK(lonely == 0);
}

TEST(bandwidth_is_measured) {
  CHECK(measure_read_bandwidth(2, 4) > 1e6);
  CHECK_THROWS(measure_read_bandwidth(1, 0), OptionError, "megabytes: 0");
}

TEST(wrong_options_are_named) {
  CHECK_THROWS(resolve_threads(-1), OptionError, "threads: -1");
  CHECK_THROWS(resolve_threads(1025), OptionError, "1024");
  setenv("TDA_CPU_ISA", "sse9", 1);
  CHECK_THROWS(choose_kernels(), OptionError, "TDA_CPU_ISA=sse9");
  CHECK_THROWS(choose_kernels(), OptionError, "portable");
  setenv("TDA_CPU_ISA", "portable", 1);
  CHECK(&choose_kernels() == available_kernels().front());
  unsetenv("TDA_CPU_ISA");
  CHECK(&choose_kernels() == available_kernels().back());
}

int main() { return run_tests(); }
