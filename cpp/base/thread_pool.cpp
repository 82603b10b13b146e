#include "base/thread_pool.h"

#include <tda/error.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <optional>
#include <string>
#include <system_error>
#include <utility>

#include "base/cpu_quota.h"
#include "base/fork_safe.h"

#if defined(__linux__)
#include <sched.h>
#endif

namespace tda {
namespace {

constexpr int kMaxThreads = 1024;

// The gate's bits, from the lowest: number of workers inside, whether it is open, region number.
constexpr std::uint32_t kOpen = 1u << 11;
constexpr std::uint32_t kInside = kOpen - 1;
constexpr std::uint32_t kRegion = kOpen << 1;
static_assert(kMaxThreads <= static_cast<int>(kInside));

/// Parallel regions of a forward pass are microseconds apart, so waiting threads first spin, then
/// yield, and workers sleep only after kAwake.
constexpr auto kAwake = std::chrono::microseconds(100);
constexpr int kSpins = 500;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// Polls done(), for at most about kAwake unless `patient`. Returns whether it is done.
template <class Done>
bool wait_until(const Done& done, bool patient) {
  for (int i = 0; i < kSpins; ++i) {
    if (done()) return true;
    pause();
  }
  const auto start = std::chrono::steady_clock::now();
  while (!done()) {
    if (!patient && std::chrono::steady_clock::now() - start > kAwake) return false;
    std::this_thread::yield();
  }
  return true;
}

}  // namespace

int resolve_threads(int threads) {
  if (threads < 0 || threads > kMaxThreads)
    throw OptionError("option threads: " + std::to_string(threads) + ", expected 0 to " +
                      std::to_string(kMaxThreads) + ", where 0 means all that may be used");
  if (threads > 0) return threads;
  int usable = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) usable = CPU_COUNT(&allowed);
#endif
  // More threads than the quota pays for would all be stopped for the rest of each period.
  if (const std::optional<double> quota = cpu_quota())
    usable = static_cast<int>(std::min<double>(usable, std::ceil(*quota)));
  return std::clamp(usable, 1, kMaxThreads);
}

ThreadPool::ThreadPool(int threads) : ranges_(resolve_threads(threads)) { start(); }

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::start() {
  const int workers = threads() - 1;
  forks_ = forks();
  workers_.reserve(workers);
  try {
    for (int i = 0; i < workers; ++i) workers_.emplace_back([this, i] { work(i + 1); });
  } catch (const std::system_error& e) {
    const auto started = workers_.size() + 1;
    stop();
    throw DeviceError("option threads: " + std::to_string(workers + 1) + ", but only " +
                      std::to_string(started) + " could be started: " + e.what());
  }
}

bool ThreadPool::lost_workers() {
  if (forks_ == forks()) return false;
  // A std::thread whose thread does not exist can be neither joined nor destroyed, so it is leaked.
  new std::vector<std::thread>(std::exchange(workers_, {}));
  gate_ = left_ = 0;
  return true;
}

void ThreadPool::stop() {
  if (lost_workers()) return;
  stop_ = true;
  gate_ += kRegion;
  gate_.notify_all();
  for (std::thread& worker : workers_) worker.join();
  workers_.clear();
  stop_ = false;
}

void ThreadPool::run(std::int64_t n, Task task, const void* body) {
  if (n <= 1 || threads() == 1) {
    for (std::int64_t i = 0; i < n; ++i) task(body, i, 0);
    return;
  }
  if (lost_workers() || workers_.empty()) start();
  task_ = task;
  body_ = body;
  for (int t = 0; t < threads(); ++t) {
    ranges_[t].next.store(first_task(t, n), std::memory_order_relaxed);
    ranges_[t].end = first_task(t + 1, n);
  }
  left_.store(0, std::memory_order_relaxed);
  const std::uint32_t region = (gate_.load(std::memory_order_relaxed) | kInside | kOpen) + 1;
  gate_.store(region | kOpen);
  gate_.notify_all();
  take_tasks(0);
  const std::uint32_t entered = gate_.fetch_and(~kOpen) & kInside;
  wait_until([&] { return left_.load(std::memory_order_acquire) == entered; }, true);
}

void ThreadPool::take_tasks(int thread) {
  for (int i = 0; i < threads(); ++i) {
    Range& range = ranges_[(thread + i) % threads()];
    for (std::int64_t task;
         (task = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;)
      task_(body_, task, thread);
  }
}

void ThreadPool::work(int thread) {
  std::uint32_t last = 0;  // the region worked on last
  for (;;) {
    std::uint32_t gate = 0;
    const auto news = [&] {
      gate = gate_.load(std::memory_order_acquire);
      return (gate & kOpen && gate / kRegion != last) || stop_.load(std::memory_order_relaxed);
    };
    if (!wait_until(news, false)) {
      gate_.wait(gate);
      continue;
    }
    if (stop_) return;
    if (!gate_.compare_exchange_strong(gate, gate + 1, std::memory_order_acquire)) continue;
    last = gate / kRegion;
    take_tasks(thread);
    left_.fetch_add(1, std::memory_order_release);
  }
}

}  // namespace tda
