// Products of a few int8 rows and prepared x.
#pragma once

#if defined(__AVX512VNNI__)

#include "cpu/int8_products_avx512.h"

#else

#if defined(__AVX2__)
#include "cpu/int8_products_avx2.h"
#else
#include "cpu/int8_products_portable.h"
#endif

#include <memory>

namespace tda {
namespace {

/// A prepared x.
struct Vector {
  static constexpr int kRows = 2;  // per call
  const GroupOfX* groups;
  int64_t count;

  Vector(const void* prepared, int64_t n)
      : groups(static_cast<const GroupOfX*>(prepared)), count(groups_of(n)) {}
};

/// The x of several sequences, prepared. They share a row's widened codes in blocks of 8, 4, 2 and 1,
/// in which the same group of all x lies together.
struct VectorsOf {
  static constexpr int kRows = 2, kMostAtOnce = 8;
  int64_t count, groups;
  std::unique_ptr<GroupOfX[]> all;

  VectorsOf(const Vectors& vectors, int64_t n)
      : count(vectors.count), groups(groups_of(n)), all(new GroupOfX[count * groups]) {
    for_blocks<kMostAtOnce>(count, [&](auto size, int64_t first) {
      for (int64_t v = 0; v < size.value; ++v)
        for (int64_t g = 0; g < groups; ++g)
          all[first * groups + g * size.value + v] = Vector(vectors.x[first + v], n).groups[g];
    });
  }
};

/// Calls take(0, r, lanes) with the dot product of each row and x, one partial sum per lane; `ahead`
/// prefetches meanwhile.
template <int kRows, class Ahead, class Take>
[[gnu::always_inline]] inline void multiply_each(const Int8Row (&rows)[kRows], Ahead& ahead,
                                                 const Vector& x, const Take& take) {
  constexpr int kTogether = kRows % 2 == 0 ? 2 : 1;  // rows that share each load of x
  for (int first = 0; first < kRows; first += kTogether) {
    Floats lanes[kTogether][1];
    multiply<1>(rows + first, first, ahead, x.groups, x.count, lanes);
    for (int r = 0; r < kTogether; ++r) take(0, first + r, lanes[r][0]);
  }
}

/// The same for each of several x, take(v, r, lanes).
template <int kRows, class Ahead, class Take>
[[gnu::always_inline]] inline void multiply_each(const Int8Row (&rows)[kRows], Ahead& ahead,
                                                 const VectorsOf& x, const Take& take) {
  for_blocks<VectorsOf::kMostAtOnce>(
      x.count, [&](auto size, int64_t first) __attribute__((always_inline)) {
        const GroupOfX* const block = x.all.get() + first * x.groups;
        NothingAhead nothing;
        for (int r = 0; r < kRows; ++r) {
          Floats lanes[1][size.value];
          if (first == 0)
            multiply<size.value>(rows + r, r, ahead, block, x.groups, lanes);
          else
            multiply<size.value>(rows + r, r, nothing, block, x.groups, lanes);
          for (int v = 0; v < size.value; ++v) take(first + v, r, lanes[0][v]);
        }
      });
}

}  // namespace
}  // namespace tda

#endif
