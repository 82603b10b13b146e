#include "engine/cache_memory.h"

#include <tda/error.h>

#include <chrono>
#include <mutex>
#include <string>
#include <thread>

#include "base/size.h"

namespace tda {
namespace {

/// How often who waits looks whether it is its turn, and whether it is cancelled.
constexpr std::chrono::milliseconds kTurnPoll{2};

}  // namespace

void CacheMemory::check(std::int64_t tokens, std::int64_t token_bytes) const {
  const Size bytes = Size(tokens) * token_bytes;
  if (limit_ == 0 || bytes.value() <= limit_) return;
  throw OptionError("cache_memory: found " + std::to_string(bytes.value()) +
                    " bytes needed for the KV cache of " + std::to_string(tokens) +
                    " tokens, new ones included, expected at most " + std::to_string(limit_) +
                    ": ask for fewer tokens, or give the engine more");
}

CacheMemory::Share CacheMemory::take(std::int64_t bytes, const std::function<void()>& meanwhile) {
  if (limit_ == 0) return {};
  Waiting own = {bytes};
  try {
    while (!gets(own)) {
      meanwhile();
      std::this_thread::sleep_for(kTurnPoll);
    }
  } catch (...) {
    leave(own);
    throw;
  }
  return {*this, bytes};
}

/// Enters the queue, the first time, and leaves it with its bytes once they are there.
bool CacheMemory::gets(Waiting& own) {
  const std::lock_guard lock(mutex_);
  forget_lost_threads();
  Waiting** place = &first_;
  while (*place && *place != &own) place = &(*place)->next;
  if (!*place) {
    own.next = nullptr;
    *place = &own;
  }
  if (first_ != &own || own.bytes > limit_ - taken_) return false;
  first_ = own.next;
  taken_ += own.bytes;
  return true;
}

void CacheMemory::leave(const Waiting& own) {
  const std::lock_guard lock(mutex_);
  forget_lost_threads();
  for (Waiting** place = &first_; *place; place = &(*place)->next) {
    if (*place != &own) continue;
    *place = own.next;
    return;
  }
}

void CacheMemory::give_back(const Share& share) {
  const std::lock_guard lock(mutex_);
  if (share.forks_ == forks()) taken_ -= share.bytes_;
}

/// In the child of a fork the threads that waited do not exist.
void CacheMemory::forget_lost_threads() {
  if (forks_ == forks()) return;
  forks_ = forks();
  first_ = nullptr;
  taken_ = 0;
}

}  // namespace tda
