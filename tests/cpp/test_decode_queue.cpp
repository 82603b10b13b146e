// Decode steps of several threads.
#include <tda/error.h>

#include <mutex>
#include <thread>

#include "check.h"
#include "engine/decode_queue.h"
#include "sequences.h"

using namespace sequences;

TEST(threads_that_decode_at_the_same_time_compute_together) {
  const RandomModel model(wide_config(), WeightFormat::int8, 3);
  const auto backend = make_cpu_backend(model.get(), 2);
  std::mt19937 random(6);
  std::vector<Plan> plans;
  for (int i = 0; i < 8; ++i) plans.push_back(random_plan(random, 101));
  for (const std::int64_t most : {1, 3, 16}) {
    ForkSafeTurns computing;
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

TEST(steps_that_wait_are_computed_as_one) {
  const RandomModel model(wide_config(), WeightFormat::f32, 3);
  const auto backend = make_cpu_backend(model.get(), 1);
  std::mt19937 random(8);
  std::vector<Plan> plans;
  for (int i = 0; i < 5; ++i) plans.push_back(random_plan(random, 101));
  ForkSafeTurns computing;
  DecodeQueue queue(*backend, computing, 4);
  std::vector<Sequence> all;
  std::vector<std::int64_t> sizes(plans.size());
  for (const Plan& plan : plans) all.emplace_back(*backend, plan);
  std::atomic<std::size_t> coming = 0;
  std::vector<std::jthread> threads;
  computing.lock();  // as another step would
  for (std::size_t i = 0; i < plans.size(); ++i)
    threads.emplace_back([&, i] {
      DecodeQueue::Member member(queue);
      ++coming;
      queue.decode(member, *all[i].state, all[i].next(), sizes[i]);
    });
  while (coming < plans.size()) std::this_thread::yield();
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  computing.unlock();
  threads.clear();
  std::ranges::sort(sizes);
  CHECK((sizes == std::vector<std::int64_t>{1, 4, 4, 4, 4}));
}

TEST(an_error_reaches_all_sequences_of_a_step) {
  const RandomModel model(wide_config(), WeightFormat::f32, 3);
  const auto backend = make_cpu_backend(model.get(), 1);
  std::mt19937 random(7);
  const Plan plan = random_plan(random, 101);
  ForkSafeTurns computing;
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

TEST(turns_come_in_the_order_of_asking) {
  ForkSafeTurns turns;
  std::vector<int> order;
  std::atomic<int> asking = 0;
  std::vector<std::jthread> threads;
  turns.lock();
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&, i] {
      asking = i + 1;
      const std::lock_guard turn(turns);
      order.push_back(i);
    });
    while (asking < i + 1) std::this_thread::yield();
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
  turns.unlock();
  turns.lock();  // a plain mutex would mostly be had again at once
  order.push_back(3);
  turns.unlock();
  threads.clear();
  CHECK((order == std::vector<int>{0, 1, 2, 3}));
}

TEST(turns_exclude_each_other) {
  ForkSafeTurns turns;
  int count = 0;
  std::vector<std::jthread> threads;
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([&] {
      for (int k = 0; k < 50'000; ++k) {  // more than 65535 in all
        const std::lock_guard turn(turns);
        ++count;
      }
    });
  threads.clear();
  CHECK(count == 200'000);
}
