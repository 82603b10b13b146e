#include <tda/engine.h>

#include <algorithm>
#include <chrono>
#include <string>

#include "base/buffer.h"
#include "base/thread_pool.h"
#include "cpu/isa.h"

namespace tda {

double measure_read_bandwidth(int threads, std::int64_t megabytes) {
  constexpr std::int64_t kMegabyte = 1 << 20;
  constexpr int kPasses = 8;
  if (megabytes < 1 || megabytes > INT64_MAX / kMegabyte)
    throw OptionError("option megabytes: " + std::to_string(megabytes) + ", expected 1 to " +
                      std::to_string(INT64_MAX / kMegabyte));
  ThreadPool pool(threads);
  const Kernels& kernels = *available_kernels().back();
  Buffer<std::uint64_t> buffer;
  std::uint64_t* data = buffer.reserve(megabytes * kMegabyte / 8, "measuring memory bandwidth");
  // Touch every page: those never written to are all mapped to one page of zeros.
  pool.run(megabytes, [&](std::int64_t i, int) {
    std::fill_n(data + i * kMegabyte / 8, kMegabyte / 8, static_cast<std::uint64_t>(i));
  });

  double best = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    const auto start = std::chrono::steady_clock::now();
    pool.run(megabytes, [&](std::int64_t i, int) {
      volatile std::uint64_t seen = kernels.read(data + i * kMegabyte / 8, kMegabyte);
      static_cast<void>(seen);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, static_cast<double>(megabytes * kMegabyte) / seconds.count());
  }
  return best;
}

}  // namespace tda
