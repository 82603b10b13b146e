// Where decode steps of several threads meet: those requested at about the same time run as one.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <span>
#include <utility>
#include <vector>

#include "backend/backend.h"
#include "base/fork_safe.h"

namespace tda {

/// There is no thread of its own: the first of the callers leads, computes for all of them, and
/// passes the lead on. Before it computes it waits for those who took part in the last step, which
/// usually are back at once; who is not back after a quarter of a step's time is left out.
class DecodeQueue {
 public:
  /// A sequence that comes for its steps, until it is destroyed.
  class Member {
   public:
    explicit Member(DecodeQueue& queue) : queue_(&queue) {}
    ~Member() {
      if (queue_) queue_->leave(*this);
    }
    Member(Member&& other) noexcept
        : queue_(std::exchange(other.queue_, nullptr)), last_step_(other.last_step_) {}

   private:
    friend class DecodeQueue;
    DecodeQueue* queue_;
    std::uint64_t last_step_ = 0;  // in which it took part
  };

  /// computing: held during a step. max_batch: the most sequences of one step, at least 1
  DecodeQueue(const Backend& backend, ForkSafeTurns& computing, std::int64_t max_batch)
      : backend_(backend), computing_(computing), max_batch_(max_batch) {
    batch_.reserve(max_batch);  // later nothing may fail that others wait for
  }

  /// Runs a step of one token, maybe with others'. Returns its logits [V], valid until the state's
  /// next step, and adds the number of sequences of that step to `batch_sizes`.
  std::span<const float> decode(Member&, State&, const Step&, std::int64_t& batch_sizes);
  /// Between two steps of a prompt: lets the decode steps that wait go first.
  void let_through();

 private:
  enum class Status { waits, leads, done };
  struct Request {
    Member& member;
    State& state;
    const Step& step;
    std::atomic<Status> status = Status::waits;
    Request* next = nullptr;
    std::int64_t batch = 0;
    std::exception_ptr error = {};
  };

  void leave(const Member&);
  void enter(Request&);
  void await_others();
  void run_batch();
  void compute();
  void forget_lost_threads();
  static void wake(Request&, Status);

  const Backend& backend_;
  ForkSafeTurns& computing_;
  const std::int64_t max_batch_;
  std::vector<Request*> batch_;  // of the current step; of who holds computing_

  ForkSafeMutex mutex_;  // held while what follows is read or changed
  std::uint32_t forks_ = forks();
  Request *first_ = nullptr, *last_ = nullptr;  // in order of arrival; the first leads
  std::int64_t waiting_ = 0;                    // requests in the list
  std::int64_t expected_ = 0;                   // that many are worth waiting for
  std::uint64_t steps_ = 0;                     // done so far
  std::chrono::steady_clock::duration patience_ = {};
  std::atomic<std::uint64_t> passed_ = 0;  // steps done; what let_through waits for
};

}  // namespace tda
