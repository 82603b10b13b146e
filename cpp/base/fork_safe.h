// Locks and threads across fork(): the child has the parent's memory, but only the thread that
// called fork().
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>

namespace tda {

/// The number of forks between the process that first called this and the current one. Threads
/// started and locks taken under another number belong to threads that do not exist here.
inline std::uint32_t forks() {
  static std::atomic<std::uint32_t> count = 0;
  static const int registered = pthread_atfork(nullptr, nullptr, [] { ++count; });
  static_cast<void>(registered);
  return count.load(std::memory_order_relaxed);
}

/// A mutex that a child of fork() can take even if a thread of the parent held it.
class ForkSafeMutex {
 public:
  void lock() {
    const std::uint32_t mine = forks() + 1;
    std::uint32_t holder = 0;
    while (!holder_.compare_exchange_weak(holder, mine, std::memory_order_acquire)) {
      if (holder != mine) continue;  // free, or held by a thread lost in a fork: try again
      holder_.wait(holder);
      holder = 0;
    }
  }
  void unlock() {
    holder_.store(0, std::memory_order_release);
    holder_.notify_one();
  }

 private:
  std::atomic<std::uint32_t> holder_ = 0;  // 0: free, else forks() + 1 of the holder's process
};

/// The same, but threads get it in the order in which they ask: one that unlocks and locks again
/// does so behind those that wait. At most 65535 wait.
class ForkSafeTurns {
 public:
  void lock() {
    State last = state_, own;
    do own = last.forks == forks() ? last : State{.forks = forks()};
    while (!state_.compare_exchange_weak(
        last, {own.forks, static_cast<std::uint16_t>(own.next + 1), own.current}));
    for (State now = state_; now.current != own.next; now = state_) state_.wait(now);
  }
  void unlock() {
    State last = state_;
    while (!state_.compare_exchange_weak(
        last, {last.forks, last.next, static_cast<std::uint16_t>(last.current + 1)})) {
    }
    state_.notify_all();
  }

 private:
  struct State {
    std::uint32_t forks = 0;
    std::uint16_t next = 0;     // the number of who asks next
    std::uint16_t current = 0;  // of who holds it or may
  };
  std::atomic<State> state_ = State();
};

}  // namespace tda
