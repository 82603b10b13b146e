// A limit on the memory of the KV caches of what an engine computes.
#pragma once

#include <cstdint>
#include <functional>
#include <utility>

#include "base/fork_safe.h"

namespace tda {

/// Bytes are given strictly in the order of asking, so that a large cache is not overtaken for ever
/// by small ones. In the child of a fork nothing is taken: whoever has or waits for some, there is
/// only in the parent.
class CacheMemory {
 public:
  /// What one has, until it is destroyed.
  class Share {
   public:
    Share() = default;
    Share(Share&& other) noexcept { *this = std::move(other); }
    Share& operator=(Share&& other) noexcept {
      std::swap(memory_, other.memory_);
      std::swap(bytes_, other.bytes_);
      std::swap(forks_, other.forks_);
      return *this;
    }
    ~Share() {
      if (memory_) memory_->give_back(*this);
    }

   private:
    friend class CacheMemory;
    Share(CacheMemory& memory, std::int64_t bytes)
        : memory_(&memory), bytes_(bytes), forks_(forks()) {}
    CacheMemory* memory_ = nullptr;
    std::int64_t bytes_ = 0;
    std::uint32_t forks_ = 0;
  };

  /// limit: in bytes, 0 for none.
  explicit CacheMemory(std::int64_t limit) : limit_(limit) {}

  std::int64_t limit() const { return limit_; }
  /// Throws OptionError if the caches of so many tokens could never fit.
  void check(std::int64_t tokens, std::int64_t token_bytes) const;
  /// Waits for its turn and calls `meanwhile` again and again; what that throws ends the waiting.
  Share take(std::int64_t bytes, const std::function<void()>& meanwhile);

 private:
  struct Waiting {
    std::int64_t bytes;
    Waiting* next = nullptr;
  };

  bool gets(Waiting&);
  void leave(const Waiting&);
  void give_back(const Share&);
  void forget_lost_threads();

  const std::int64_t limit_;
  ForkSafeMutex mutex_;  // held while what follows is read or changed
  std::uint32_t forks_ = forks();
  Waiting* first_ = nullptr;  // in order of arrival
  std::int64_t taken_ = 0;
};

}  // namespace tda
