#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace tda {

/// Runs body(i) for i in [0, n) on up to `threads` threads, which are started and joined by the
/// call: for coarse work outside the forward pass. Rethrows the first exception after joining.
template <typename Body>
void parallel_for(int threads, std::int64_t n, const Body& body) {
  std::atomic<std::int64_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  const auto work = [&] {
    try {
      for (std::int64_t i; (i = next.fetch_add(1)) < n;) body(i);
    } catch (...) {
      next = n;
      const std::lock_guard lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  };
  {
    std::vector<std::jthread> workers;
    for (std::int64_t t = 1; t < std::min<std::int64_t>(threads, n); ++t)
      workers.emplace_back(work);
    work();
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace tda
