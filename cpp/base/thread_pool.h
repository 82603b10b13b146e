// A thread pool for the many short parallel regions of a forward pass.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <type_traits>
#include <vector>

namespace tda {

/// The number of threads for option `threads`: 0 means all cores that this process's affinity and
/// CPU quota, rounded up, allow. Throws OptionError.
int resolve_threads(int threads);

class ThreadPool {
 public:
  /// threads: see resolve_threads; includes the calling thread
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(ranges_.size()); }

  /// The first of n tasks in a thread's range, and whether a task is the last in it.
  std::int64_t first_task(int thread, std::int64_t n) const { return thread * n / threads(); }
  bool is_last_task(std::int64_t task, int thread, std::int64_t n) const {
    return task + 1 == first_task(thread + 1, n);
  }

  /// Runs body(i, thread) for each i in [0, n), 0 <= thread < threads(), also on the calling
  /// thread, and returns when all are done. Each thread starts with its own range of tasks, so that
  /// it reads contiguous memory, then takes tasks of other threads: results must not depend on
  /// which thread runs a task. The body must not throw. Not reentrant: one region at a time.
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
  /// True in a child of fork(), where no worker exists; forgets them.
  bool lost_workers();

  // The current region; written while the gate is closed and no worker is inside.
  Task task_ = nullptr;
  const void* body_ = nullptr;
  struct alignas(64) Range {
    std::atomic<std::int64_t> next = 0;
    std::int64_t end = 0;
  };
  std::vector<Range> ranges_;  // one per thread
  // Workers enter an open region by incrementing the gate, so that the caller waits only for
  // workers that entered, never for a sleeping one.
  alignas(64) std::atomic<std::uint32_t> gate_ = 0;
  alignas(64) std::atomic<std::uint32_t> left_ = 0;  // workers that have left the region
  std::atomic<bool> stop_ = false;
  std::uint32_t forks_ = 0;  // forks() when the workers were started
  std::vector<std::thread> workers_;
};

}  // namespace tda
