// Heap memory aligned for prepared activations, in which sanitizers see access out of bounds.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

template <class T>
struct Aligned {
  using value_type = T;
  static constexpr std::align_val_t kAlignment{64};
  T* allocate(std::size_t count) {
    return static_cast<T*>(::operator new(count * sizeof(T), kAlignment));
  }
  void deallocate(T* p, std::size_t) { ::operator delete(p, kAlignment); }
  bool operator==(const Aligned&) const = default;
};

using AlignedBytes = std::vector<std::byte, Aligned<std::byte>>;
