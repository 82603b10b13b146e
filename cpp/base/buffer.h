// Memory of a session: growing scratch buffers, and the KV cache.
#pragma once

#include <sys/mman.h>
#include <tda/error.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>

#include "base/size.h"

namespace tda {

/// Requests huge pages for these bytes: fewer page faults now, fewer TLB misses later.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] std::int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr std::uintptr_t kPage = 4096;
  const auto begin = reinterpret_cast<std::uintptr_t>(data), end = begin + bytes;
  const std::uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  if (first < end) ::madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

/// 64-byte aligned elements, not initialised: pages take no memory until they are written.
template <class T>
class Buffer {
 public:
  /// Makes room for `count` elements; growing loses the contents. Throws DeviceError, which says
  /// what the memory is `needed_for`.
  T* reserve(Size count, std::string_view needed_for) {
    if (count.value() <= count_) return data();
    const Size bytes = (count * sizeof(T)).rounded_up(64);
    data_.reset();
    count_ = 0;
    if (!bytes.too_large())
      data_.reset(static_cast<T*>(std::aligned_alloc(64, static_cast<std::size_t>(bytes.value()))));
    if (!data_)
      throw DeviceError("out of memory: " + std::to_string(bytes.value()) + " bytes needed for " +
                        std::string(needed_for));
    count_ = count.value();
    return data();
  }

  T* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T[], Free> data_;
  std::int64_t count_ = 0;
};

}  // namespace tda
