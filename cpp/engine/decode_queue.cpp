#include "engine/decode_queue.h"

#include <algorithm>
#include <mutex>
#include <thread>

#include "model/forward.h"

namespace tda {

using Clock = std::chrono::steady_clock;

std::span<const float> DecodeQueue::decode(Member& member, State& state, const Step& step,
                                           std::int64_t& batch_sizes) {
  Request own = {member, state, step};
  enter(own);
  own.status.wait(Status::waits);
  if (own.status == Status::leads) {
    await_others();
    run_batch();
  }
  mutex_.lock();  // then whoever woke this thread is done with `own`
  mutex_.unlock();
  if (own.error) std::rethrow_exception(own.error);
  batch_sizes += own.batch;
  return state.logits;
}

/// In the child of a fork the threads that waited do not exist.
void DecodeQueue::forget_lost_threads() {
  if (forks_ == forks()) return;
  forks_ = forks();
  first_ = last_ = nullptr;
  waiting_ = expected_ = 0;
  passed_ = steps_;
}

void DecodeQueue::enter(Request& own) {
  const std::lock_guard lock(mutex_);
  forget_lost_threads();
  (first_ ? last_->next : first_) = &own;
  last_ = &own;
  if (++waiting_ == 1) own.status = Status::leads;
}

void DecodeQueue::await_others() {
  const auto begin = Clock::now();
  while (true) {
    {
      const std::lock_guard lock(mutex_);
      if (waiting_ >= std::min(expected_, max_batch_) || Clock::now() - begin > patience_) return;
    }
    std::this_thread::yield();
  }
}

/// Computes the step of the first requests, of which the caller's is one, and passes the lead on.
void DecodeQueue::run_batch() {
  const std::lock_guard computing(computing_);
  batch_.clear();
  {
    const std::lock_guard lock(mutex_);
    for (Request* r = first_; r && std::ssize(batch_) < max_batch_; r = r->next)
      batch_.push_back(r);
  }
  const auto begin = Clock::now();
  compute();
  const std::lock_guard lock(mutex_);
  patience_ = (Clock::now() - begin) / 4;
  first_ = batch_.back()->next;
  waiting_ -= std::ssize(batch_);
  expected_ = waiting_ + std::ssize(batch_);
  passed_ = ++steps_;
  passed_.notify_all();
  for (Request* const r : batch_) {
    r->member.last_step_ = steps_;
    r->batch = std::ssize(batch_);
  }
  for (Request* const r : batch_) wake(*r, Status::done);
  if (first_) wake(*first_, Status::leads);
}

void DecodeQueue::compute() try {
  State& first = batch_[0]->state;
  if (batch_.size() == 1) {
    first.logits = forward(backend_, first, batch_[0]->step, 1);
    return;
  }
  std::vector<Token> tokens;
  std::vector<State*> states;
  for (Request* const r : batch_) {
    r->state.step = r->step;
    tokens.push_back(r->step.tokens[0]);
    states.push_back(&r->state);
  }
  Step step;
  step.tokens = tokens;
  step.batch = states;
  forward(backend_, first, step, std::ssize(states));
} catch (...) {
  for (Request* const r : batch_) r->error = std::current_exception();
}

void DecodeQueue::wake(Request& request, Status status) {
  request.status = status;
  request.status.notify_one();
}

void DecodeQueue::leave(const Member& member) {
  const std::lock_guard lock(mutex_);
  if (member.last_step_ == steps_ && expected_ > 0) --expected_;
}

void DecodeQueue::let_through() {
  std::uint64_t steps = 0;
  {
    const std::lock_guard lock(mutex_);
    forget_lost_threads();
    if (waiting_ == 0) return;
    steps = steps_;
  }
  passed_.wait(steps);
}

}  // namespace tda
