// Threads that stay hot between the many short parallel regions of a forward pass.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <type_traits>
#include <vector>

namespace tda {

/// How many threads `threads` means: 0 is as many as this process may run on. Throws OptionError.
int resolve_threads(int threads);

class ThreadPool {
 public:
  /// `threads` counts the calling thread, too; see resolve_threads.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(ranges_.size()); }

  /// Of n tasks the first in a thread's range, and whether one is the last in it.
  std::int64_t first_task(int thread, std::int64_t n) const { return thread * n / threads(); }
  bool is_last_task(std::int64_t task, int thread, std::int64_t n) const {
    return task + 1 == first_task(thread + 1, n);
  }

  /// Runs body(i, thread) for each i in [0, n), the calling thread taking part, and returns when
  /// all are done. Each thread has a range of its own, so that it reads on where it stopped, and
  /// helps the others when it is through: nothing may depend on who runs what.
  /// 0 <= thread < threads(). The body must not throw. One region at a time.
  template <class Body>
  void run(std::int64_t n, const Body& body) {
    run(
        n,
        [](const void* b, std::int64_t i, int thread) {
          (*static_cast<const Body*>(b))(i, thread);
        },
        &body);
  }

 private:
  using Task = void (*)(const void* body, std::int64_t i, int thread);
  void run(std::int64_t n, Task task, const void* body);
  void take_tasks(int thread);
  void work(int thread);
  void start();
  void stop();
  /// In the child of a fork, which has none of the workers; they are forgotten.
  bool lost_workers();

  // A region's job; written while the gate is shut and nobody is inside.
  Task task_ = nullptr;
  const void* body_ = nullptr;
  struct alignas(64) Range {
    std::atomic<std::int64_t> next = 0;
    std::int64_t end = 0;
  };
  std::vector<Range> ranges_;  // one per thread
  // The gate: workers enter an open region by adding one, so that the caller waits for those who
  // came and never for one asleep.
  alignas(64) std::atomic<std::uint32_t> gate_ = 0;
  alignas(64) std::atomic<std::uint32_t> left_ = 0;  // how many went in and came out again
  std::atomic<bool> stop_ = false;
  std::uint32_t forks_ = 0;  // forks() when the workers were started
  std::vector<std::thread> workers_;
};

}  // namespace tda
