#pragma once

#include <tda/error.h>

#include <atomic>
#include <string>

namespace tda {

/// A flag of an object that only one thread may use at a time; moving the object counts as a use.
struct UseFlag {
  UseFlag() = default;
  UseFlag(UseFlag&&) noexcept {}
  std::atomic_flag is_set;
};

/// Holds the flag while it lives. Throws if another thread holds it.
class InUse {
 public:
  InUse(UseFlag& flag, const char* what) : flag_(flag.is_set) {
    if (flag_.test_and_set(std::memory_order_acquire)) {
      throw OptionError(std::string(what) +
                        ": found it in use by another thread, expected one at a time");
    }
  }
  ~InUse() { flag_.clear(std::memory_order_release); }
  InUse(const InUse&) = delete;
  InUse& operator=(const InUse&) = delete;

 private:
  std::atomic_flag& flag_;
};

}  // namespace tda
